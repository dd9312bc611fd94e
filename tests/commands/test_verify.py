"""hemera verify: the first difference of each file, down to the tile."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hemera import tables
from hemera.__main__ import main
from hemera.config import IndexOptions, RegisterOptions, load
from hemera.config.base import plain
from hemera.files.digests import content_digest
from hemera.networks import storage
from tests import small_results
from tests.small_networks import write_networks
from tests.small_results import BLOCK_COUNT, Made, make

SIZE_PX = 128

CONFIG = {
    "preset": "demo",
    "sheet": "pairs.tsv",
    "allow_demo_sizes": True,
    "block_count": BLOCK_COUNT,
    "register": plain(RegisterOptions()),
    "tile": {"size_px": SIZE_PX},
    "index": plain(IndexOptions(target="stain")),
    "train_generation": {"crop_px": None},
    "train_segmentation": {"crop_px": None},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sheet, its images, results of every stage and a configuration."""
    tmp_path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        # Networks divide the sides of tiles by 128.
        patch.setattr(small_results, "SIZE_PX", SIZE_PX)
        make(tmp_path, [Made("p1"), Made("p2"), Made("slide", slide=True, dataset="acrobat")])
    for table in (tmp_path / "results/describe").iterdir():
        rows, metadata = (
            tables.read(table, tables.DESCRIBE).to_pylist(),
            tables.read_metadata(table),
        )
        for row in rows:
            image = tmp_path / row["file"]
            image.write_bytes(row["file"].encode() * 50)
            row["content_digest"] = content_digest(image)
        tables.write(table, rows, tables.DESCRIBE, metadata)
    write_config(tmp_path)
    options = load(CONFIG)
    fingerprint = tables.read_metadata(tmp_path / "results/index/index.parquet")["fingerprint"]
    paths = write_networks(tmp_path / "results", fingerprint)
    trained = {
        "generator": options.generator("demo"),
        "segmenter": options.stages["train_segmentation"],
    }
    for name, own in trained.items():
        metadata_file = paths[f"{name}_metadata"]
        described = json.loads(metadata_file.read_text())
        described |= {"options": own.model_dump(), "options_version": own.version}
        storage.write_metadata(metadata_file, described, paths[name])
    return tmp_path


@pytest.fixture
def study(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    folder = shutil.copytree(made, tmp_path / "study")
    monkeypatch.chdir(folder)
    return folder


def write_config(folder: Path, **sections: Any) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | sections))


def verified(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Run the command; return its lines, and check its exit status."""
    status = main(["verify", *words])
    *faults, last = capsys.readouterr().out.splitlines()
    assert (status, f"{len(faults) or 'none'} differ" in last) == (int(bool(faults)), True)
    return faults


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x04
    path.write_bytes(data)


def test_an_untouched_study_has_no_difference(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verified(capsys) == []
    assert verified(capsys, "--only-tables") == []


@pytest.mark.parametrize(("folder", "prefix"), [("tile", "her2_"), ("mask", "")])
def test_a_flipped_bit_of_a_shard_names_the_tile(
    study: Path, capsys: pytest.CaptureFixture[str], folder: str, prefix: str
) -> None:
    row = pq.read_table(study / "results" / folder / "slide.parquet").to_pylist()[2]
    flip(study / "results" / row["shard"], row[f"{prefix}offset"] + row[f"{prefix}length"] // 2)
    assert verified(capsys, "--only-tables") == []
    [fault] = verified(capsys)
    assert row["tile"] in fault and "differs from its SHA-256" in fault


def test_generated_tiles_and_their_masks_are_compared(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have the format of the real ones, in folders of their own."""
    for old, new in (("tile", "restain"), ("mask", "restain_mask")):
        shutil.copytree(
            f"results/{old}", f"results/{new}", ignore=shutil.ignore_patterns("*pairs*")
        )
        for table in (study / "results" / new).glob("*.parquet"):
            if "cells" not in table.name:
                rewritten(str(table), lambda rows, new=new: [
                    row.update(shard=f"{new}/{Path(row['shard']).name}") for row in rows
                ])  # fmt: skip
    assert verified(capsys) == []
    row = pq.read_table("results/restain/slide.parquet").to_pylist()[1]
    flip(study / "results/restain/slide.tar", row["her2_offset"] + row["her2_length"] // 2)
    [fault] = verified(capsys)
    assert row["tile"] in fault and "differs from its SHA-256" in fault
    rewritten("results/restain_mask/slide.parquet", removed)
    faults = verified(capsys, "--only-tables")
    assert any("restain_mask" in fault and T in fault for fault in faults)


@pytest.mark.parametrize("member", [0, 2])
def test_a_flipped_bit_of_a_header_is_named(
    study: Path, capsys: pytest.CaptureFixture[str], member: int
) -> None:
    """It leaves the bytes of all tiles as they are, but tar finds no member after it."""
    rows = pq.read_table(study / "results/mask/slide.parquet").to_pylist()
    flip(study / "results" / rows[member]["shard"], rows[member]["offset"] - 512)
    [fault] = verified(capsys)
    assert ("not a tar file" if member == 0 else "its headers are damaged") in fault


def test_what_is_no_file_or_folder_is_named(
    study: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["verify", "nowhere"]) == 1
    assert "nowhere: no such folder" in caplog.text
    image = study / "p1_he.png"
    image.unlink()
    os.mkfifo(image)
    [fault] = verified(capsys)
    assert f"{image.name}: a folder, pipe or device, not a file" in fault


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("results/filter/../mask/slide.cells.parquet", "not a Parquet file"),
        ("results/register/slide.displacement.npz", "displacement"),
        ("results/train_generation/demo/generator.safetensors", "differs from its SHA-256"),
        ("results/train_segmentation/segmenter.safetensors", "differs from its SHA-256"),
        ("slide_her2.tif", "has changed since stage describe read it"),
    ],
)
def test_a_flipped_bit_of_any_file_is_named(
    study: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    path = study / name
    found = [path] if path.exists() else sorted(study.glob(name.replace("demo", "*")))
    flip(found[0], found[0].stat().st_size // 3)
    # A displacement is read again with the tiles that it maps.
    fault, *others = verified(capsys)
    assert words in fault and found[0].name in fault
    assert len(others) == ("displacement" in name)


def test_a_flipped_bit_in_the_place_of_a_view_is_named(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h5py = pytest.importorskip("h5py")
    from tests.small_status import case_rows, write_status

    write_status(study / "results", case_rows(8))
    write_config(study, cases={"min_tiles": 4})
    assert verified(capsys) == []
    [path] = (study / "results/embed").rglob("*.h5")
    with h5py.File(path) as file:
        begin = file["coords"].id.get_offset()
    flip(path, begin + 16)
    [fault] = verified(capsys)
    assert f"{path.name}: coords: differs from its SHA-256" in fault


TILES = "results/tile/slide.parquet"
MASKS = "results/mask/slide.parquet"
FILTERED = "results/filter/tiles.parquet"
INDEX = "results/index/index.parquet"
CARD = "results/index/card.md"
T = "slide_000128_000000"
"""The second tile of the pair `slide`."""

Rows = list[dict[str, Any]]


def rewritten(name: str, change: Callable[[Rows], object]) -> None:
    """Change the rows of a table, and write it as its stage does, with the same metadata."""
    table = pq.read_table(name)
    rows = table.to_pylist()
    change(rows)
    new = pa.Table.from_pylist(rows, schema=table.schema)
    tables.write(Path(name), new, table.schema, tables.read_metadata(Path(name)))


def of_tile(**values: Any) -> Callable[[Rows], object]:
    return lambda rows: next(row for row in rows if row["tile"] == T).update(values)


def removed(rows: Rows) -> None:
    rows[:] = [row for row in rows if row["tile"] != T]


def added(rows: Rows) -> None:
    own = next(row for row in rows if row["tile"] == T)
    rows.append({**own, "tile": f"{T[:-1]}9"})
    rows.sort(key=lambda row: row["tile"])


def with_options(name: str, key: str, **values: Any) -> None:
    """Change options that the metadata of a table state."""
    table = pq.read_table(name)
    metadata = tables.read_metadata(Path(name))
    metadata[key] = json.dumps({**json.loads(metadata[key]), **values}, sort_keys=True)
    tables.write(Path(name), table, table.schema, metadata)


CHANGES: dict[str, tuple[str, Callable[[Rows], object], str]] = {
    "index, row removed": (INDEX, removed, f"{INDEX}: no row of {T}"),
    "index, row added": (INDEX, added, f"{INDEX}: a row of {T[:-1]}9"),
    "index, digest": (INDEX, of_tile(he_sha256="0" * 64), f"he_sha256 of {T} is 000"),
    "index, measure": (INDEX, of_tile(folding_fraction=0.5), f"folding_fraction of {T} is 0.5"),
    "index, split": (INDEX, of_tile(split="test"), f"{INDEX}: split of {T} is test"),
    "index, subset": (INDEX, of_tile(generation_split=None), f"generation_split of {T} is None"),
    "filter, row removed": (FILTERED, removed, f"{FILTERED}: no row of {T}"),
    "filter, row added": (FILTERED, added, f"{FILTERED}: a row of {T[:-1]}9"),
    "filter, measure": (FILTERED, of_tile(he_sharpness=1.0), f"he_sharpness of {T} is 1.0"),
    "filter, decision": (
        FILTERED, of_tile(accepted=False, reason="dust"), f"{FILTERED}: accepted of {T} is False",
    ),
    "tile, row removed": (TILES, removed, "slide.pairs.parquet: 4 tiles of slide, and slide.par"),
    "tile, measure": (TILES, of_tile(tissue_fraction=0.9), f"{FILTERED}: tissue_fraction of {T}"),
    "tile, position": (TILES, of_tile(her2_x_px=40.0), f"{T} is at 40.00, -97.83 px on HER2"),
    "mask, row removed": (MASKS, removed, f"{MASKS}: no row of {T}"),
    "mask, row added": (MASKS, added, f"{MASKS}: a row of {T[:-1]}9"),
    "mask, order": (MASKS, lambda rows: rows.reverse(), "is in another place than in slide.par"),
    "mask, cells": (MASKS, of_tile(cells=11), f"slide.cells.parquet: 12 cells of {T}"),
    "mask, digest": (MASKS, of_tile(sha256="0" * 64), f"{FILTERED}: stain_sha256 of {T} is"),
    "cells, row removed": (
        "results/mask/slide.cells.parquet", lambda rows: rows.pop(12), f"11 cells of {T}",
    ),
    "pairs, row removed": (
        "results/tile/slide.pairs.parquet", lambda rows: rows.clear(), "no row of slide, which the",
    ),
}  # fmt: skip
"""File, change, and what the first line states."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_table_is_named_down_to_the_tile(
    study: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """The file is a valid table with checksums; its rows are not what the other tables give."""
    name, alter, words = CHANGES[change]
    rewritten(name, alter)
    faults = verified(capsys, "--only-tables")
    assert faults and words in faults[0], faults


def test_a_decision_against_the_limits_is_found_where_the_index_has_it_too(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Filter's table and the index agree with each other, and not with the limits."""
    change = of_tile(accepted=True, reason=None, tissue_fraction=0.01)
    for name in (TILES, FILTERED):
        rewritten(name, change)
    [fault, *_] = verified(capsys, "--only-tables")
    assert f"{FILTERED}: accepted of {T} is True, and its sources give False" in fault


@pytest.mark.parametrize(
    ("name", "key", "values", "words"),
    [
        (
            TILES,
            "options",
            {"size_px": 64},
            "made with tile: size_px 64, and the configuration has",
        ),
        (TILES, "options", {"version": 1}, "made with tile: version 1, and this version of HEMERA"),
        (TILES, "options_describe", {"version": 1}, "options_describe is"),
        (
            MASKS,
            "options",
            {"seed": 3},
            "made with mask: seed 3, and the configuration has missing",
        ),
        (FILTERED, "options_mask", {"version": 1}, f"{FILTERED}: options_mask is"),
        (INDEX, "options_index", {"seed": 99}, "made with index: seed 99, and the configuration"),
        (INDEX, "options_tile", {"size_px": 64}, f"{INDEX}: options_tile is"),
    ],
)
def test_other_options_in_the_metadata_are_named(
    study: Path, capsys: pytest.CaptureFixture[str], name: str, key: str, values: Any, words: str
) -> None:
    with_options(name, key, **values)
    assert any(words in fault for fault in verified(capsys, "--only-tables"))


@pytest.mark.parametrize("key", ["options_index", "mask_engines", "licences", "fingerprint"])
@pytest.mark.parametrize("value", ["{", "[1]", "{}", "3"])
def test_damaged_metadata_of_the_index_are_a_difference(
    study: Path, capsys: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    """They have no checksum in the file."""
    table = pq.read_table(INDEX)
    metadata = tables.read_metadata(Path(INDEX)) | {key: value}
    tables.write(Path(INDEX), table, table.schema, metadata)
    assert any(INDEX in fault for fault in verified(capsys, "--only-tables"))


def test_a_limit_that_was_changed_after_the_run_is_named_once(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results agree with each other, so that there is one difference."""
    write_config(study, filter={"dust_max": 0.9})
    [fault] = verified(capsys, "--only-tables")
    assert fault.startswith(f"{FILTERED}: made with filter: dust_max") and "has 0.9" in fault


def test_a_changed_card_is_named_by_its_line(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(CARD).read_text()
    Path(CARD).write_text(text.replace("tiles accepted, of 3 cases", "tiles accepted, of 4 cases"))
    [fault] = verified(capsys, "--only-tables")
    assert fault.startswith(f"{CARD}: has ") and "of 4 cases" in fault and "of 3 cases" in fault
    Path(CARD).write_text(text + "More.\n")
    [fault] = verified(capsys, "--only-tables")
    assert "has 'More.', and the index gives 'no line'" in fault


def test_networks_of_another_index_or_other_options_are_named(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = study.glob("results/train_generation/*/metadata.json")
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "index_fingerprint": "f" * 64}))
    [fault] = verified(capsys, "--only-tables")
    assert "metadata.json: trained on the index ffffffffffff, and this one is" in fault
    path.write_text(json.dumps({**described, "options": {**described["options"], "seed": 5}}))
    [fault] = verified(capsys, "--only-tables")
    assert "made with train_generation: seed 5, and the configuration has" in fault


def test_an_added_pair_and_an_index_without_metadata_are_named(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = study / "pairs.tsv"
    header, first, *rest = sheet.read_text().splitlines()
    added = first.replace("p1", "p9")
    sheet.write_text("\n".join([header, first, added, *rest]) + "\n")
    index = study / "results/index/index.parquet"
    pq.write_table(pq.read_table(index).replace_schema_metadata(None), index)
    faults = verified(capsys)
    assert any("no row of p9, he; run the workflow again" in fault for fault in faults)
    assert any("no metadata fingerprint, mask_engines, " in fault for fault in faults)
