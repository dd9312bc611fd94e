"""What a run has done, from records written by hand as Snakemake and stage tile write them."""

import os
from pathlib import Path
from typing import Any

import pytest

from hemera import tables
from hemera.config import load
from hemera.files import layout
from hemera.graph.live import Watch
from hemera.graph.summary import summarise, write_summary
from hemera.sheet import read_sheet, units, write_rows
from tests.graph.test_records import LOG

SHEET = [
    {"pair": pair, "case": pair, "dataset": "d", "he": f"{pair}.svs", "her2": f"{pair}_2.svs"}
    for pair in ("p1", "p2")
]


def pair_row(pair: str, state: str, reason: str | None) -> dict[str, Any]:
    counts = dict.fromkeys(
        ("tiles_grid", "tiles_tissue", "tiles_artefact", "tiles_unreadable", "tiles_written"), 0
    )
    return {"pair": pair, "state": state, "reason": reason, "registration": "fail", **counts}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study in which p1 is refused and stage tile of p2 failed."""
    monkeypatch.chdir(tmp_path)
    Path("logs/tile").mkdir(parents=True)
    Path("logs/tile/p1.tsv").write_text("s\th:m:s\tmax_rss\n30\t0:00:30\t1\n")
    Path("logs/tile/p2.log").write_text("ERROR hemera: no space left on device\n")
    Path(".snakemake/log").mkdir(parents=True)
    Path("results/tile").mkdir(parents=True)
    rows = [pair_row("p1", "refused", "the registration failed")]
    tables.write(layout.path(layout.PAIRS, unit="p1"), rows, tables.PAIRS)
    Path("pairs.tsv").write_text(write_rows(SHEET))
    return tmp_path


def test_stages_of_a_run(folder: Path) -> None:
    log = Path(".snakemake/log/2026-11-22T080000.000000.snakemake.log")
    log.write_text("Provided cores: 2\n")
    planned = [
        {"stage": "tile", "jobs": 3, "hours": 0.5},
        {"stage": "mask", "jobs": 4, "hours": 2.0},
        {"stage": "filter", "jobs": 1, "hours": None},
    ]
    watch = Watch(planned)
    assert watch.update() == []
    assert [stage.remaining_s for stage in watch.stages.values()] == [1800, 7200, None]
    log.write_text(LOG)
    assert watch.update() == [
        "refused: p1: the registration failed",
        "failed: tile: no space left on device",
    ]
    # Nothing is reported twice.
    assert watch.update() == []
    tile, mask, _ = watch.stages.values()
    assert (tile.done, tile.running, tile.refused, tile.failed) == (1, 0, 1, 1)
    assert (mask.done, mask.running) == (0, 1)
    # Two jobs as long as the one of 30 s that is done.
    assert tile.remaining_s == 60


def test_a_repeated_job_is_one_job(folder: Path) -> None:
    """Each attempt that fails has a line; failed is the job, until it is repeated."""
    log = Path(".snakemake/log/2026-11-22T080000.000000.snakemake.log")
    watch = Watch([{"stage": "tile", "jobs": 3, "hours": 0.5}])
    failure = LOG[LOG.index("Error in rule tile") :]
    again = "rule tile:\n    output: results/tile/p2.tar, results/tile/p2.parquet\n    jobid: 5\n"
    log.write_text(LOG)
    assert len(watch.update()) == 2
    tile = watch.stages["tile"]
    log.write_text(LOG + again)
    assert watch.update() == [] and (tile.failed, tile.running) == (0, 1)
    Path("logs/tile/p2.log").write_text("ERROR hemera: out of memory\n")
    log.write_text(LOG + again + failure)
    assert watch.update() == ["failed: tile: out of memory"]
    assert (tile.failed, tile.running) == (1, 0)
    log.write_text(LOG + again + failure + again + "Finished jobid: 5 (Rule: tile)\n")
    assert watch.update() == [] and (tile.failed, tile.running) == (0, 0)


def test_the_record_of_an_earlier_run_is_not_read(folder: Path) -> None:
    log = Path(".snakemake/log/2026-11-22T080000.000000.snakemake.log")
    log.write_text(LOG)
    os.utime(log, (1e9, 1e9))
    assert Watch([{"stage": "tile", "jobs": 3, "hours": None}]).update() == []


def test_summary(folder: Path) -> None:
    Path(".snakemake/log/2026-11-22T080000.000000.snakemake.log").write_text(LOG)
    for place, path in enumerate((layout.EVALUATION, layout.INDEX, layout.REPORT)):
        Path(path).parent.mkdir(parents=True)
        Path(path).touch()
        os.utime(path, (1e9 + place, 1e9 + place))
    config = load({"preset": "no_weights", "sheet": "pairs.tsv"})
    found = summarise(config, 1, Path("logs/run/x.log"))
    assert found["refused"] == [
        {"pair": "p1", "state": "refused", "reason": "the registration failed"}
    ]
    assert [each["rule"] for each in found["failures"]] == ["tile"]
    assert found["pages"] == {"the data": layout.REPORT}
    assert found["older_pages"] == {"the networks": layout.EVALUATION}
    text = write_summary(found)
    assert Path("results/summary.md").read_text() == text
    for line in (
        "- pairs: 2, refused so far: 1",
        "- p1: refused; the registration failed",
        "- tile: no space left on device (logs/tile/p2.log)",
        "- the data: results/report/report.html",
        "- the networks, of an earlier index: results/evaluate/evaluate.html",
    ):
        assert line in text.splitlines()
    assert "toy" not in text and "demo" not in text
    demo = load({"preset": "demo", "sheet": "pairs.tsv", "allow_demo_sizes": True})
    assert "networks: of the demo" in write_summary(summarise(demo, 0, None))
    # The failed job was repeated since.
    for name in ("p2.tar", "p2.parquet"):
        Path("results/tile", name).touch()
    ended = summarise(config, 0, None)
    assert ended["failures"] == [] and "- pairs: 2, refused: 1\n" in write_summary(ended)
    # The index of a failed job is deleted.
    Path(layout.INDEX).unlink()
    assert set(summarise(config, 1, None)["older_pages"]) == {"the data", "the networks"}


def test_registered_pairs_without_measurable_alignment_are_a_warning(folder: Path) -> None:
    """Of four, one aligned, one refused by hand: two to inspect."""
    sheet = [
        {**SHEET[0], "pair": f"p{k}", "case": f"p{k}", "he": f"{k}.png", "her2": f"{k}_2.png",
         "registered": "true", "verdict": "refuse" if k == 2 else ""}
        for k in range(4)
    ]  # fmt: skip
    Path("pairs.tsv").write_text(write_rows(sheet))
    config = load({"preset": "no_weights", "sheet": "pairs.tsv"})
    assert summarise(config, 0, None)["registered"] == {
        "measured": 0, "measurable": 0, "to_inspect": [],
    }  # fmt: skip
    for unit, own in units(read_sheet(Path("pairs.tsv")), config.cohort.block_count).items():
        rows = [
            dict.fromkeys(tables.DESCRIBE.names)
            | {"pair": pair.pair, "stain": stain, "file": "x", "verdict": "accept"}
            | {"alignment_margin": None if stain == "he" else 0.3 if pair.pair == "p3" else 0.0}
            for pair in own
            for stain in tables.STAINS
        ]
        tables.write(layout.path(layout.IMAGES_TABLE, unit=unit), rows, tables.DESCRIBE)
    found = summarise(config, 0, None)
    found["registered"]["to_inspect"].sort()
    assert found["registered"] == {"measured": 4, "measurable": 1, "to_inspect": ["p0", "p1"]}
    text = write_summary(found)
    assert "## Warnings\n\n- 1 of 4 pairs provided registered show measurable alignment" in text
    assert "; not p0, p1. Either" in text and "write a verdict in pairs.tsv" in text
    found["registered"]["to_inspect"] = []
    assert "Warnings" not in write_summary(found)
