import hashlib
import io
import json
import os
import re
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
from hemera.__main__ import main
from hemera.commands import export
from hemera.dataset.shards import ShardWriter, decode, encode
from hemera.errors import ConfigError, ShardError
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
    """Nine tiles; one of train is refused, and GenerationNet does not use the first."""
    path = write_index(tmp_path / "results", train=4, val=3, test=2)

    def change(number, row):
        if number == 1:
            row.update(accepted=False, reason="blurred", generation_split=None)
            row.update(segmentation_split=None)
        if number == 0:
            row["generation_split"] = None
        row["he_sharpness"] = float("nan") if number == 2 else 10.0 * number

    return changed(path, change, licences=json.dumps(LICENCES))


def rows_of(index):
    return pq.read_table(index).to_pylist()


def stored(index, row, name):
    """Read a member as the index says, by hand."""
    begin = {"mask": "stain"}.get(name, name)
    shard = row["stain_shard"] if name == "mask" else row["shard"]
    data = (index.parent.parent / shard).read_bytes()
    return data[row[f"{begin}_offset"] :][: row[f"{begin}_length"]]


def run(index, kind, output, *words):
    return main(["export", kind, str(output), "--index", str(index), *words])


def content(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


KINDS = ("webdataset", "huggingface", "ab")


# WebDataset


def test_webdataset_triplets_are_the_stored_bytes_in_the_order_of_the_index(
    index, tmp_path, capsys
):
    assert run(index, "webdataset", tmp_path / "out") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "test-000000.tar", "train-000000.tar", "val-000000.tar",
    ]  # fmt: skip
    for part in ("train", "val", "test"):
        rows = [row for row in rows_of(index) if row["accepted"] and row["split"] == part]
        samples = webdataset_samples(out / f"{part}-000000.tar")
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
    said = capsys.readouterr().out
    assert "8 tiles (train 3, val 3, test 2)" in said


def test_members_have_no_time_and_no_owner(index, tmp_path):
    run(index, "webdataset", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        infos = archive.getmembers()
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_shards_are_cut_between_tiles(index, tmp_path):
    """A file is no larger than asked, but for one that holds a single tile."""
    rows = [row for row in rows_of(index) if row["accepted"] and row["split"] == "train"]
    one = max(row["he_length"] + row["her2_length"] + row["stain_length"] for row in rows)
    for megabytes, expected in ((1e-6, [1, 1, 1]), (2.5 * one / 1e6 + 0.02, [2, 1]), (9, [3])):
        out = tmp_path / f"out{megabytes}"
        run(index, "webdataset", out, "--shard-mb", str(megabytes), "--part", "train")
        shards = sorted(out.glob("*.tar"))
        assert [path.name for path in shards] == [
            f"train-{number:06d}.tar" for number in range(len(expected))
        ]
        assert [len(webdataset_samples(path)) for path in shards] == expected
        for path, count in zip(shards, expected, strict=True):
            assert count == 1 or path.stat().st_size <= megabytes * 1e6 + 10_240
        found = [sample["__key__"] for path in shards for sample in webdataset_samples(path)]
        assert found == [row["tile"] for row in rows]


# Hugging Face


def test_huggingface_parquet_holds_images_and_rows(index, tmp_path):
    out = tmp_path / "out"
    assert run(index, "huggingface", out) == 0
    assert sorted(path.name for path in (out / "data").iterdir()) == [
        "test-00000-of-00001.parquet", "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]  # fmt: skip
    for part, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        table = pq.read_table(out / "data" / f"{split}-00000-of-00001.parquet")
        rows = [row for row in rows_of(index) if row["accepted"] and row["split"] == part]
        assert table.column("tile").to_pylist() == [row["tile"] for row in rows]
        assert table.column("score").to_pylist() == [row["score"] for row in rows]
        for row, found in zip(rows, table.to_pylist(), strict=True):
            for name, ending in (("he", "jpg"), ("her2", "jpg"), ("mask", "png")):
                assert found[name] == {
                    "bytes": stored(index, row, name), "path": f"{row['tile']}.{name}.{ending}",
                }  # fmt: skip
        with PIL.Image.open(io.BytesIO(table.column("he")[0].as_py()["bytes"])) as image:
            assert (image.size, image.mode) == ((256, 128), "RGB")
        with PIL.Image.open(io.BytesIO(table.column("mask")[0].as_py()["bytes"])) as image:
            assert (image.size, image.mode) == ((256, 128), "L")


def test_datasets_is_told_what_is_an_image(index, tmp_path):
    """As Features.from_arrow_schema reads it: a feature counts where its field is nullable and of
    the feature's own type, struct<bytes: binary, path: string> for an image."""
    run(index, "huggingface", tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [name for name, feature in features.items() if feature == {"_type": "Image"}]
    assert images == ["he", "her2", "mask"]
    known = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64()}
    known |= {"int32": pa.int32(), "bool": pa.bool_()}
    for field in schema:
        feature = features[field.name]
        assert field.nullable
        assert field.type == (image if field.name in images else known[feature["dtype"]])
    assert features["size_px"] == {"dtype": "int32", "_type": "Value"}


def test_the_card_names_splits_fingerprint_and_terms(index, tmp_path):
    run(index, "huggingface", tmp_path / "out", "--where", "split != 'val'")
    text = (tmp_path / "out" / "README.md").read_text()
    _, heading, body = text.split("---\n", 2)
    described = yaml.safe_load(heading)
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
    assert "f" * 64 in body
    assert "where split != 'val'" in body
    assert all(line in body for line in LICENCES)
    assert "| train | 3 | 3 |" in body


def test_parquet_files_and_row_groups_are_cut_by_size(index, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ROW_GROUP_ROWS", 2)
    run(index, "huggingface", tmp_path / "one", "--part", "val")
    path = tmp_path / "one" / "data" / "validation-00000-of-00001.parquet"
    groups = pq.ParquetFile(path).metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [2, 1]
    monkeypatch.setattr(export, "ROW_GROUP_BYTES", 1)
    run(index, "huggingface", tmp_path / "two", "--part", "val", "--shard-mb", "0.000001")
    names = sorted(path.name for path in (tmp_path / "two" / "data").iterdir())
    assert names == [f"validation-{n:05d}-of-00003.parquet" for n in range(3)]
    tables_read = [pq.read_table(tmp_path / "two" / "data" / name) for name in names]
    assert pa.concat_tables(tables_read).equals(pq.read_table(path))


def test_the_bytes_of_images_are_not_compressed_again(index, tmp_path):
    run(index, "huggingface", tmp_path / "out", "--part", "train")
    group = pq.ParquetFile(
        tmp_path / "out" / "data" / "train-00000-of-00001.parquet"
    ).metadata.row_group(0)
    codecs = {
        group.column(n).path_in_schema: group.column(n).compression
        for n in range(group.num_columns)
    }
    assert codecs["he.bytes"] == codecs["mask.bytes"] == "UNCOMPRESSED"
    assert codecs["tile"] == "ZSTD"


def with_codec(index, codec):
    """Store the tiles of the index again, with another codec."""
    results = index.parent.parent
    places = {}
    with ShardWriter(results / "tile" / "other.tar") as shard:
        for row in rows_of(index):
            for name in ("he", "her2"):
                data = encode(decode(stored(index, row, name)), codec)
                places[row["tile"], name] = (
                    *shard.add(f"{row['tile']}.{name}.{codec}", data),
                    hashlib.sha256(data).hexdigest(),
                )

    def change(number, row):
        row["shard"] = "tile/other.tar"
        for name in ("he", "her2"):
            place = dict(
                zip(("offset", "length", "sha256"), places[row["tile"], name], strict=True)
            )
            for of, value in place.items():
                row[f"{name}_{of}"] = value

    return changed(index, change)


@pytest.mark.parametrize("codec", ["png", "webp", "jxl"])
def test_other_codecs_are_copied_where_the_format_allows(index, tmp_path, codec):
    """Pillow cannot show JPEG XL, so Parquet holds it as PNG, of the very pixels."""
    with_codec(index, codec)
    [row] = [row for row in rows_of(index) if row["tile"] == "pair4_000000_000004"]
    where = ("--where", f"tile == '{row['tile']}'")
    run(index, "webdataset", tmp_path / "wds", *where)
    [sample] = webdataset_samples(tmp_path / "wds" / "val-000000.tar")
    assert sample[f"her2.{codec}"] == stored(index, row, "her2")
    run(index, "huggingface", tmp_path / "hf", *where)
    [found] = pq.read_table(tmp_path / "hf" / "data").select(["her2"]).to_pylist()
    ending = "png" if codec == "jxl" else codec
    assert found["her2"]["path"] == f"{row['tile']}.her2.{ending}"
    with PIL.Image.open(io.BytesIO(found["her2"]["bytes"])) as image:
        assert (np.asarray(image.convert("RGB")) == decode(stored(index, row, "her2"))).all()
    run(index, "ab", tmp_path / "ab", *where)
    with PIL.Image.open(tmp_path / "ab" / "val" / f"{row['tile']}.png") as image:
        assert (np.asarray(image)[:, 256:] == decode(stored(index, row, "her2"))).all()


# A|B


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


@pytest.mark.parametrize("workers", ["1", "3"])
def test_pix2pix_reads_he_left_and_her2_right(index, tmp_path, workers):
    assert run(index, "ab", tmp_path / "out", "--workers", workers) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "train", "val", "test",
    }  # fmt: skip
    for part in ("train", "val", "test"):
        rows = {row["tile"]: row for row in rows_of(index) if row["accepted"]}
        rows = {tile: row for tile, row in rows.items() if row["split"] == part}
        found = list(pix2pix(tmp_path / "out", part))
        assert [tile for tile, _, _ in found] == sorted(rows)
        for tile, left, right in found:
            for name, pixels in (("he", left), ("her2", right)):
                data = np.frombuffer(stored(index, rows[tile], name), np.uint8)
                truth = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
                assert pixels.shape == (128, 256, 3)
                # Two builds of libjpeg-turbo may differ by one.
                assert np.abs(pixels.astype(int) - truth).max() <= 1


def test_ab_images_may_be_jpeg(index, tmp_path):
    run(index, "ab", tmp_path / "png", "--part", "val")
    run(index, "ab", tmp_path / "jpg", "--part", "val", "--codec", "jpeg")
    run(index, "ab", tmp_path / "low", "--part", "val", "--codec", "jpeg", "--quality", "40")
    both = zip(pix2pix(tmp_path / "png", "val"), pix2pix(tmp_path / "jpg", "val"), strict=True)
    for (tile, left, right), (other, he, her2) in both:
        assert tile == other
        assert np.abs(left.astype(int) - he).mean() < 2
        assert np.abs(right.astype(int) - her2).mean() < 2
        assert (tmp_path / "jpg" / "val" / f"{tile}.jpg").read_bytes()[:3] == b"\xff\xd8\xff"
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).rglob("*.*g"))
        for name in ("low", "jpg", "png")
    ]
    assert sizes == sorted(sizes)


def test_ab_needs_no_masks(index, tmp_path):
    (index.parent.parent / "mask" / "unit.tar").unlink()
    assert run(index, "ab", tmp_path / "out") == 0
    assert run(index, "webdataset", tmp_path / "wds") == 1


# What is chosen


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "0 2 3 4 5 6 7 8"),
        (["--part", "train"], "0 2 3"),
        (["--network", "generation"], "2 3 4 5 6 7 8"),
        (["--network", "generation", "--part", "train"], "2 3"),
        (["--where", "score == '3+'"], "3 5 7"),
        (["--where", "score == '3+'", "--part", "val", "--engine", "stain"], "5"),
    ],
)
def test_accepted_tiles_are_chosen_by_query_part_and_network(index, tmp_path, words, expected):
    assert run(index, "webdataset", tmp_path / "out", *words) == 0
    found = [
        sample["__key__"].split("_")[0].removeprefix("pair")
        for part in ("train", "val", "test")
        for path in sorted((tmp_path / "out").glob(f"{part}-*.tar"))
        for sample in webdataset_samples(path)
    ]
    assert " ".join(found) == expected


def test_parts_are_those_of_the_network(index, tmp_path):
    """A tile that trains GenerationNet stands in train, whatever its case's split is."""

    def change(number, row):
        row["generation_split"] = {4: "test", 8: "train"}.get(number)

    changed(index, change)
    run(index, "ab", tmp_path / "out", "--network", "generation")
    found = {path.parent.name: path.stem for path in (tmp_path / "out").rglob("*.png")}
    assert found == {"test": "pair4_000000_000004", "train": "pair8_000000_000008"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_come_again(index, tmp_path, kind):
    run(index, kind, tmp_path / "one")
    run(index, kind, tmp_path / "two")
    first, second = content(tmp_path / "one"), content(tmp_path / "two")
    assert first == second
    assert len(first) >= 4


# What is refused


@pytest.mark.parametrize("kind", KINDS)
def test_no_tile_is_one_clear_error_and_no_folder(index, tmp_path, kind, caplog):
    assert run(index, kind, tmp_path / "out", "--where", "score == '9'") == 1
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert re.search(r"index.parquet: no tile is left \(accepted .*, where score == '9'\); ", said)
    assert not (tmp_path / "out").exists()


def test_an_empty_index_is_the_same_error(tmp_path):
    index = write_index(tmp_path / "results", train=0, val=0, test=0)
    with pytest.raises(ConfigError, match="no tile is left"):
        export.choose(index)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_holds_something_is_left_alone(index, tmp_path, kind, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert run(index, kind, out) == 1
    assert "out: holds files already; name a new folder" in caplog.text
    assert content(out).keys() == {"thesis.tex"}
    assert run(index, kind, out / "thesis.tex") == 1
    assert "is a file; name a new folder" in caplog.text
    assert run(index, kind, out / "thesis.tex" / "in") == 1
    assert "is no folder; name another place" in caplog.text


def test_new_empty_and_linked_folders_are_filled(index, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("empty", "deep/er", "link"):
        assert run(index, "webdataset", tmp_path / name) == 0
        assert (tmp_path / name / "README.md").is_file()
    assert (tmp_path / "link").is_symlink()
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_seen_beforehand(index, tmp_path, kind, caplog, monkeypatch):
    needed = sum(row["he_length"] + row["her2_length"] for row in rows_of(index) if row["accepted"])
    usage = export.shutil._ntuple_diskusage
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage(9e9, 9e9, needed - 1))
    assert run(index, kind, tmp_path / "out") == 1
    assert re.search(r"GB are needed and [\d.e-]+ GB are free; make room", caplog.text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_or_failed_export_leaves_nothing(index, tmp_path, kind, monkeypatch):
    """The last tile of test is not what the index was made of."""
    last = rows_of(index)[-1]
    path = index.parent.parent / "tile" / "unit.tar"
    data = bytearray(path.read_bytes())
    data[last["her2_offset"] + 700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"pair8_\d+_\d+ is not the her2 that the index was made"):
        export.main(arguments(index, kind, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_write_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export.main(arguments(index, kind, tmp_path / "out", "--part", "train"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def arguments(index, kind, output, *words):
    import argparse

    parser = argparse.ArgumentParser()
    export.arguments(parser)
    return parser.parse_args([kind, str(output), "--index", str(index), *words])


@pytest.mark.parametrize("name", ["../../evil", "a.b", "", "a/b", "ü", "a\n"])
def test_a_tile_that_is_no_file_name_is_refused(index, tmp_path, name):
    changed(index, lambda number, row: row.update(tile=name) if number == 3 else None)
    with pytest.raises(ShardError, match=r"tile .* is no file name; ids hold letters"):
        export.choose(index)


def test_a_tile_twice_a_mask_lacking_an_engine_unknown(index, tmp_path, caplog):
    with pytest.raises(ShardError, match="no column deepliif_"):
        export.choose(index, engine="deepliif")
    changed(index, lambda number, row: row.update(stain_shard=None) if number == 3 else None)
    with pytest.raises(ShardError, match="1 tiles without a mask of stain; run mask"):
        export.choose(index)
    assert export.choose(index, masks=False).count == 8
    changed(index, lambda number, row: row.update(tile="same"))
    with pytest.raises(ShardError, match="a tile stands in it twice"):
        export.choose(index, masks=False)


def test_what_is_no_index_is_one_line(tmp_path, caplog):
    assert run(tmp_path / "none.parquet", "ab", tmp_path / "out") == 1
    assert "none.parquet: no such table; run the stage" in caplog.text
    pq.write_table(pa.table({"tile": ["a"]}), tmp_path / "other.parquet")
    assert run(tmp_path / "other.parquet", "ab", tmp_path / "out") == 1
    assert "its metadata lacks fingerprint" in caplog.text
    (tmp_path / "text.parquet").write_text("x")
    assert run(tmp_path / "text.parquet", "ab", tmp_path / "out") == 1
    assert "not a Parquet file" in caplog.text


def test_images_of_two_sizes_are_no_pair(index, tmp_path):
    results = index.parent.parent
    data = encode(np.zeros((128, 250, 3), np.uint8))

    def change(number, row):
        if number == 0:
            he = stored(index, row, "he")
            with ShardWriter(results / "tile" / "odd.tar") as shard:
                row["he_offset"], row["he_length"] = shard.add("a.he.jpg", he)
                row["her2_offset"], row["her2_length"] = shard.add("a.her2.jpg", data)
            row["shard"] = "tile/odd.tar"
            row["her2_sha256"] = hashlib.sha256(data).hexdigest()

    changed(index, change)
    with pytest.raises(ShardError, match="H&E is 256 x 128 px and HER2 250 x 128"):
        export.main(arguments(index, "ab", tmp_path / "out"))


@pytest.mark.parametrize(
    "words",
    [
        ["webdataset", "out", "--shard-mb", "0"],
        ["webdataset", "out", "--shard-mb", "nan"],
        ["webdataset", "out", "--codec", "png"],
        ["ab", "out", "--quality", "101"],
        ["ab", "out", "--workers", "0"],
        ["ab", "out", "--engine", "stain"],
        ["ab", "out", "--part", "validation"],
        ["tfrecord", "out"],
        ["ab"],
    ],
)
def test_wrong_flags_are_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(["export", *words])
    assert left.value.code == 2
    assert "usage: hemera export" in capsys.readouterr().err
