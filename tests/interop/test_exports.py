import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hemera import tables
from hemera.errors import ConfigError, ShardError
from hemera.interop import exports
from tests.dataset.test_shards import webdataset_samples
from tests.small_index import write_index

LICENCES = ["BCI: non-commercial use, cite its paper", "masks by DeepLIIF: its own"]


def changed(index, change, **metadata):
    """Write the index again with its rows as `change` leaves them."""
    rows = pq.read_table(index).to_pylist()
    for number, row in enumerate(rows):
        change(number, row)
    kept = tables.read_metadata(index) | metadata
    tables.write(index, rows, tables.index(("stain",)), kept)
    return index


@pytest.fixture
def index(tmp_path):
    """Nine tiles; one of train is rejected, and GenerationNet does not use the first."""
    path = write_index(tmp_path / "results", train=4, val=3, test=2)

    def change(number, row):
        if number == 1:
            row.update(accepted=False, reason="blurred", generation_split=None)
            row.update(segmentation_split=None)
        if number == 0:
            row["generation_split"] = None
        row["he_sharpness"] = float("nan") if number == 2 else 10.0 * number

    return changed(path, change, licences=json.dumps(LICENCES))


def accepted(index, split):
    rows = pq.read_table(index).to_pylist()
    return [row for row in rows if row["accepted"] and row["split"] == split]


def stored(index, row, name):
    """Read a member at its offset, without HEMERA's reader."""
    prefix = {"mask": "stain"}.get(name, name)
    shard = row["stain_shard"] if name == "mask" else row["shard"]
    data = (index.parent.parent / shard).read_bytes()
    return data[row[f"{prefix}_offset"] :][: row[f"{prefix}_length"]]


def content(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(kind, index, folder, *, shard_mb=1000.0, threads=2, **asked):
    """Export with `choose` and the writer of a format."""
    folder.mkdir()
    selection = exports.choose(index, masks=kind != "aligned", **asked)
    if kind == "aligned":
        exports.write_aligned(folder, selection, threads)
    else:
        getattr(exports, f"write_{kind}")(folder, selection, shard_mb)
    return folder


def test_webdataset_samples_are_the_stored_bytes_in_the_order_of_the_index(index, tmp_path):
    out = write("webdataset", index, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "test-000000.tar", "train-000000.tar", "val-000000.tar",
    ]  # fmt: skip
    for split in ("train", "val", "test"):
        rows = accepted(index, split)
        samples = webdataset_samples(out / f"{split}-000000.tar")
        assert [sample["__key__"] for sample in samples] == [row["tile"] for row in rows]
        for row, sample in zip(rows, samples, strict=True):
            assert list(sample)[1:] == ["he.jpg", "her2.jpg", "mask.png", "json"]
            assert sample["he.jpg"] == stored(index, row, "he")
            assert sample["her2.jpg"] == stored(index, row, "her2")
            assert sample["mask.png"] == stored(index, row, "mask")
            described = json.loads(sample["json"])
            for name in ("tile", "case", "dataset", "score", "x_px", "mpp", "generation_split"):
                assert described[name] == row[name]
            assert not [name for name in described if "shard" in name or "offset" in name]
            nan = row["he_sharpness"] != row["he_sharpness"]
            assert described["he_sharpness"] == (None if nan else row["he_sharpness"])
    with tarfile.open(out / "train-000000.tar") as archive:
        found = {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in archive.getmembers()}
    assert found == {(0, 0, 0, "", "", 0o644)}


def test_shards_are_divided_between_tiles(index, tmp_path):
    """A file is no larger than asked for, unless it contains a single tile."""
    rows = accepted(index, "train")
    one = max(row["he_length"] + row["her2_length"] + row["stain_length"] for row in rows)
    for megabytes, expected in ((1e-6, [1, 1, 1]), (2.5 * one / 1e6 + 0.01, [2, 1]), (9, [3])):
        out = write(
            "webdataset", index, tmp_path / f"out{megabytes}", shard_mb=megabytes, split="train"
        )
        shards = sorted(out.glob("*.tar"))
        assert [path.name for path in shards] == [
            f"train-{number:06d}.tar" for number in range(len(expected))
        ]
        assert [len(webdataset_samples(path)) for path in shards] == expected
        found = [sample["__key__"] for path in shards for sample in webdataset_samples(path)]
        assert found == [row["tile"] for row in rows]


def test_huggingface_parquet_contains_images_and_rows(index, tmp_path):
    out = write("huggingface", index, tmp_path / "out")
    assert len(list((out / "data").iterdir())) == 3
    for split, name in exports.HUGGINGFACE_SPLITS.items():
        table = pq.read_table(out / "data" / f"{name}-00000-of-00001.parquet")
        rows = accepted(index, split)
        assert table.column("tile").to_pylist() == [row["tile"] for row in rows]
        assert table.column("score").to_pylist() == [row["score"] for row in rows]
        for row, found in zip(rows, table.to_pylist(), strict=True):
            for member, suffix in (("he", "jpg"), ("her2", "jpg"), ("mask", "png")):
                assert found[member] == {
                    "bytes": stored(index, row, member),
                    "path": f"{row['tile']}.{member}.{suffix}",
                }
        for member, mode in (("he", "RGB"), ("mask", "L")):
            with PIL.Image.open(io.BytesIO(table.column(member)[0].as_py()["bytes"])) as image:
                assert (image.size, image.mode) == ((256, 128), mode)


def test_datasets_recognises_the_features(index, tmp_path):
    """As Features.from_arrow_schema reads it: a feature counts where its field is nullable and of
    the feature's own type, struct<bytes: binary, path: string> for an image."""
    out = write("huggingface", index, tmp_path / "out")
    schema = pq.read_schema(out / "data" / "train-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [name for name, feature in features.items() if feature == {"_type": "Image"}]
    assert images == ["he", "her2", "mask"]
    known = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64()}
    known |= {"int32": pa.int32(), "bool": pa.bool_()}
    for field in schema:
        feature, kind = features[field.name], field.type
        assert field.nullable
        if feature["_type"] == "Sequence":
            assert (feature["feature"]["dtype"], kind) == ("uint8", pa.list_(pa.uint8()))
            continue
        assert field.type == (image if field.name in images else known[feature["dtype"]])
    assert features["size_px"] == {"dtype": "int32", "_type": "Value"}


def test_parquet_files_and_row_groups_are_divided(index, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "ROW_GROUP_ROWS", 2)
    one = write("huggingface", index, tmp_path / "one", split="val") / "data"
    path = one / "validation-00000-of-00001.parquet"
    groups = pq.ParquetFile(path).metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [2, 1]
    two = write("huggingface", index, tmp_path / "two", split="val", shard_mb=1e-6) / "data"
    names = sorted(path.name for path in two.iterdir())
    assert names == [f"validation-{n:05d}-of-00003.parquet" for n in range(3)]
    divided = pa.concat_tables([pq.read_table(two / name) for name in names])
    assert divided.equals(pq.read_table(path))


def test_the_card_states_splits_fingerprint_and_terms(index, tmp_path):
    out = write("huggingface", index, tmp_path / "out", where="split != 'val'")
    _, header, body = (out / "README.md").read_text().split("---\n", 2)
    described = yaml.safe_load(header)
    assert described["license"] == "other"
    assert described["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*"},
                {"split": "test", "path": "data/test-*"},
            ],
        }
    ]
    for expected in ("f" * 64, "where split != 'val'", "| train | 3 | 3 |", *LICENCES):
        assert expected in body


def pix2pix(folder, phase):
    """Read as the public code does: aligned_dataset.py, image_folder.py."""
    names = sorted(
        os.path.join(root, name)
        for root, _, names in sorted(os.walk(os.path.join(folder, phase)))
        for name in names
        if name.endswith((".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".ppm", ".bmp", ".tif"))
    )
    for name in names:
        both = PIL.Image.open(name).convert("RGB")
        width, height = both.size
        half = int(width / 2)
        yield (
            Path(name).stem,
            np.asarray(both.crop((0, 0, half, height))),
            np.asarray(both.crop((half, 0, width, height))),
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_pix2pix_reads_he_left_and_her2_right(index, tmp_path, threads):
    (index.parent.parent / "mask" / "unit.tar").unlink()
    out = write("aligned", index, tmp_path / "out", threads=threads)
    assert {path.name for path in out.iterdir()} == {"README.md", "train", "val", "test"}
    for split in ("train", "val", "test"):
        rows = {row["tile"]: row for row in accepted(index, split)}
        found = list(pix2pix(out, split))
        assert [tile for tile, _, _ in found] == sorted(rows)
        for tile, left, right in found:
            for name, pixels in (("he", left), ("her2", right)):
                data = np.frombuffer(stored(index, rows[tile], name), np.uint8)
                truth = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
                assert pixels.shape == (128, 256, 3)
                # Two builds of libjpeg-turbo may differ by one.
                assert np.abs(pixels.astype(int) - truth).max() <= 1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "0 2 3 4 5 6 7 8"),
        ({"network": "generation", "split": "train"}, "2 3"),
        ({"where": "score == '3+'", "split": "val"}, "5"),
    ],
)
def test_accepted_tiles_are_chosen_by_query_split_and_network(index, asked, expected):
    selection = exports.choose(index, **asked)
    tiles = [tile for rows in selection.splits.values() for tile in rows["tile"].to_pylist()]
    assert " ".join(tile.split("_")[0].removeprefix("pair") for tile in tiles) == expected


def test_splits_are_those_of_the_network(index):
    changed(
        index, lambda number, row: row.update(generation_split={4: "test", 8: "train"}.get(number))
    )
    selection = exports.choose(index, network="generation")
    found = {split: rows["pair"].to_pylist() for split, rows in selection.splits.items()}
    assert found == {"train": ["pair8"], "test": ["pair4"]}


@pytest.mark.parametrize("kind", ["webdataset", "huggingface", "aligned"])
def test_the_same_bytes_come_again(index, tmp_path, kind):
    first, second = (content(write(kind, index, tmp_path / name)) for name in ("one", "two"))
    assert first == second
    assert len(first) >= 4


def test_no_tile_is_an_error_that_names_the_selection(index, tmp_path):
    with pytest.raises(ConfigError, match=r"no tile is left \(accepted .*, where score == '9'\); "):
        exports.choose(index, where="score == '9'")
    empty = write_index(tmp_path / "empty", train=0, val=0, test=0)
    with pytest.raises(ConfigError, match="no tile is left"):
        exports.choose(empty)


def test_bytes_that_differ_from_the_index_are_an_error(index, tmp_path):
    last = accepted(index, "test")[-1]
    path = index.parent.parent / "tile" / "unit.tar"
    data = bytearray(path.read_bytes())
    data[last["her2_offset"] + 700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"pair8_\d+_\d+\.her2\.\w+ differs from its SHA-256"):
        write("aligned", index, tmp_path / "out")


def test_a_lacking_mask_is_an_error(index):
    changed(index, lambda number, row: row.update(stain_shard=None) if number == 3 else None)
    with pytest.raises(ShardError, match="1 tiles without a mask of stain; run mask"):
        exports.choose(index)
    assert exports.choose(index, masks=False).count == 8
