"""Records of runs, written by hand as Snakemake writes them."""

from pathlib import Path

import pytest

from hemera.graph.records import KILLED, Durations, last_run, seconds

LOG = """\
Provided cores: 2
[Sun Nov 22 08:00:00 2026]
rule tile:
    input: a
    output: results/tile/p1.tar, results/tile/p1.parquet
    log: logs/tile/p1.log
    jobid: 4
    benchmark: logs/tile/p1.tsv
Shell command: hemera tile
[Sun Nov 22 08:00:00 2026]
rule tile:
    output: results/tile/p2.tar, results/tile/p2.parquet
    log: logs/tile/p2.log
    jobid: 5
    benchmark: logs/tile/p2.tsv
[Sun Nov 22 08:00:20 2026]
Finished jobid: 4 (Rule: tile)
1 of 9 steps (11%) done
[Sun Nov 22 08:00:30 2026]
rule mask:
    output: results/mask/p1.tar
    jobid: 7
    benchmark: logs/mask/p1.tsv
[Sun Nov 22 08:00:40 2026]
Error in rule tile:
    message: None
    jobid: 5
    output: results/tile/p2.tar, results/tile/p2.parquet
    log: logs/tile/p2.log (check log file(s) for error details)
    shell:
        hemera tile
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("tile", "mask"):
        Path("logs", name).mkdir(parents=True)
    for unit, time in (("p1", "30"), ("p3", "10"), ("p4", "50")):
        Path(f"logs/tile/{unit}.tsv").write_text(f"s\th:m:s\tmax_rss\n{time}\t0:00:30\t1\n")
    Path("logs/tile/p2.log").write_text("INFO x\nERROR hemera: no space left on device\n\n")
    logs = Path(".snakemake/log")
    logs.mkdir(parents=True)
    (logs / "2026-11-22T080000.000000.snakemake.log").write_text(LOG)
    (logs / "2026-11-22T090000.000000.snakemake.log").write_text("good condition!\n")
    return tmp_path


def test_durations_are_those_of_the_unit_or_the_median(folder: Path) -> None:
    durations = Durations()
    assert durations.of("logs/tile/p4.tsv") == 50
    assert durations.of("logs/tile/new.tsv") == 30
    assert durations.of("logs/mask/new.tsv") is None
    assert durations.total(["logs/tile/p4.tsv", "logs/tile/new.tsv"]) == 80
    assert durations.total(["logs/tile/p4.tsv", "logs/mask/new.tsv"]) is None
    Path("logs/mask/p1.tsv").write_text("cut off")
    assert seconds("logs/mask/p1.tsv") is None


def test_the_last_run_with_jobs_is_read(folder: Path) -> None:
    run = last_run()
    assert run is not None and run.log.name.startswith("2026-11-22T0800")
    assert (run.steps, run.elapsed_s) == (9, 40)
    assert [fields["rule"] for fields in run.running.values()] == ["mask"]
    (failure,) = run.failures
    assert failure.outputs == ("results/tile/p2.tar", "results/tile/p2.parquet")
    assert (failure.log, failure.cause) == (
        "logs/tile/p2.log",
        "no space left on device",
    )
    # One job of 30 s in 40 s: never less than one at once.
    assert run.concurrency == 1


def test_a_job_that_wrote_nothing_was_killed(folder: Path) -> None:
    Path("logs/tile/p2.log").write_text("")
    run = last_run()
    assert run is not None and [each.cause for each in run.failed.values()] == [KILLED]
    assert last_run(since=run.log.stat().st_mtime + 1) is None


def test_no_run(tmp_path: Path) -> None:
    assert last_run(tmp_path) is None
