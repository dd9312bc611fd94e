"""hemera verify: the first difference of each file, down to the tile."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from hemera import tables
from hemera.__main__ import main
from hemera.files.digests import content_digest
from hemera.networks import storage
from tests.small_networks import write_networks
from tests.small_results import BLOCK_COUNT, Made, make


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sheet, its images, results of every stage and a configuration."""
    make(tmp_path, [Made("p1"), Made("p2"), Made("slide", slide=True, dataset="acrobat")])
    for table in (tmp_path / "results/describe").iterdir():
        rows = tables.read(table, tables.DESCRIBE).to_pylist()
        for row in rows:
            image = tmp_path / row["file"]
            image.write_bytes(row["file"].encode() * 50)
            row["content_digest"] = content_digest(image)
        tables.write(table, rows, tables.DESCRIBE)
    paths = write_networks(tmp_path / "results")
    for name in ("generator", "segmenter"):
        metadata = paths[f"{name}_metadata"]
        storage.write_metadata(metadata, json.loads(metadata.read_text()), paths[name])
    config = {"preset": "demo", "sheet": "pairs.tsv", "allow_demo_sizes": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "block_count": BLOCK_COUNT}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    [fault] = verified(capsys)
    assert words in fault and found[0].name in fault


def test_a_flipped_bit_in_the_place_of_a_view_is_named(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h5py = pytest.importorskip("h5py")
    from tests.small_status import case_rows, write_status

    write_status(study / "results", case_rows(8))
    assert verified(capsys) == []
    [path] = (study / "results/embed").rglob("*.h5")
    with h5py.File(path) as file:
        begin = file["coords"].id.get_offset()
    flip(path, begin + 16)
    [fault] = verified(capsys)
    assert f"{path.name}: coords: differs from its SHA-256" in fault


def test_an_index_of_other_tiles_or_rows_is_named(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study / "results/index/index.parquet"
    table, metadata = pq.read_table(path), pq.read_schema(path).metadata
    place = table.column_names.index("accepted")
    rows = table.column("accepted").to_pylist()
    changed = table.set_column(place, "accepted", [[not rows[0], *rows[1:]]])
    pq.write_table(changed.cast(table.schema).replace_schema_metadata(metadata), path)
    [fault] = verified(capsys)
    assert "differ from its fingerprint" in fault
    pq.write_table(table, path)
    tiles = study / "results/tile/slide.parquet"
    own = tables.read(tiles, tables.TILE).to_pylist()
    tables.write(tiles, own[1:], tables.TILE)
    [fault] = verified(capsys)
    assert own[0]["tile"] in fault and "is not that of its tile or mask" in fault
    tables.write(tiles, own, tables.TILE)
    masks = study / "results/mask/slide.parquet"
    labelled = tables.read(masks, tables.MASK).to_pylist()
    tables.write(masks, [labelled[0] | {"sha256": "0" * 64}, *labelled[1:]], tables.MASK)
    [fault] = verified(capsys, "--only-tables")
    assert f"stain_sha256 of {labelled[0]['tile']} is not that" in fault


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
    assert any("no metadata fingerprint, mask_engines; run index" in fault for fault in faults)
