import hashlib
import os
import pickle
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hemera.dataset.shards import (
    SUFFIXES,
    ShardReader,
    ShardWriter,
    decode,
    decode_mask,
    encode,
    encode_mask,
    read_member,
    select,
)
from hemera.errors import ConfigError, ShardError
from tests.small_index import write_index


@pytest.fixture
def rng():
    return np.random.default_rng(20251)


def smooth(rng, height=48, width=80):
    import cv2

    noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)).astype(np.float32), (0, 0), 3)
    return np.clip(140 + 300 * noise, 0, 255).astype(np.uint8)


def write(path, members):
    with ShardWriter(path) as writer:
        return [writer.add(name, data) for name, data in members]


def test_tar_reads_what_was_written(tmp_path):
    members = [("b.he.jpg", b"x" * 700), ("a.her2.jpg", b""), ("c.he.jpg", bytes(512))]
    path = tmp_path / "unit.tar"
    places = write(path, members)
    with tarfile.open(path, "r:") as archive:
        infos = archive.getmembers()
        assert [info.name for info in infos] == [name for name, _ in members]
        assert [archive.extractfile(info).read() for info in infos] == [d for _, d in members]
        assert [(info.offset_data, info.size) for info in infos] == places
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {
            (0, 0, 0, "", "", 0o644)
        }
    assert path.stat().st_size % 10_240 == 0
    assert [read_member(path, *place) for place in places] == [data for _, data in members]


def test_equal_members_give_equal_bytes(tmp_path):
    members = [("t1.he.png", b"abc"), ("t1.her2.png", b"de")]
    write(tmp_path / "one.tar", members)
    write(tmp_path / "two.tar", members)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_an_empty_shard_is_an_archive(tmp_path):
    write(tmp_path / "empty.tar", [])
    with tarfile.open(tmp_path / "empty.tar") as archive:
        assert archive.getmembers() == []


def test_long_names_are_kept(tmp_path):
    name = "p" * 100 + "_000512_001024.her2.jpg"
    path = tmp_path / "long.tar"
    [place] = write(path, [(name, b"data")])
    with tarfile.open(path) as archive:
        assert archive.getnames() == [name]
    assert read_member(path, *place) == b"data"


def test_rewound_members_leave_no_trace(tmp_path):
    write(tmp_path / "plain.tar", [("a", b"1" * 600), ("d", b"4")])
    with ShardWriter(tmp_path / "rewound.tar") as writer:
        writer.add("a", b"1" * 600)
        start = writer.position()
        writer.add("b", b"2" * 3000)
        writer.add("c", b"3")
        writer.rewind(start)
        writer.add("d", b"4")
    assert (tmp_path / "rewound.tar").read_bytes() == (tmp_path / "plain.tar").read_bytes()


def test_a_name_stands_once(tmp_path):
    with pytest.raises(ShardError, match="stands in it already"):
        write(tmp_path / "twice.tar", [("a", b"1"), ("a", b"2")])


def test_missing_truncated_and_foreign_shards(tmp_path):
    path = tmp_path / "unit.tar"
    _, place = write(path, [("a", b"1" * 900), ("b", b"2" * 5000)])
    with pytest.raises(ShardError, match="run the stage"):
        read_member(tmp_path / "none.tar", *place)
    for wrong in ((place[0] + 512, 100), (place[0], 4999), (0, 10), (100, 10)):
        with pytest.raises(ShardError):
            read_member(path, *wrong)
    path.write_bytes(path.read_bytes()[: place[0] + 1000])
    with pytest.raises(ShardError, match=r"ends before byte \d+; run its stage again"):
        read_member(path, *place)


@pytest.mark.parametrize("codec", ["png", "webp", "jxl"])
def test_lossless_codecs(rng, codec):
    rgb = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    assert (decode(encode(rgb, codec)) == rgb).all()
    assert codec in SUFFIXES


def test_jpeg_is_444_and_close(rng):
    rgb = smooth(rng)
    data = encode(rgb, "jpeg", 95)
    assert np.abs(decode(data).astype(int) - rgb).mean() < 1.5
    # The frame header: three components, each sampled 1 x 1.
    frame = data.index(b"\xff\xc0")
    assert [data[frame + 11 + 3 * i] for i in range(3)] == [0x11] * 3
    assert len(encode(rgb, "jpeg", 50)) < len(data)


def test_codec_errors():
    with pytest.raises(ShardError, match="no codec 'gif'"):
        encode(np.zeros((8, 9, 3), np.uint8), "gif")
    whole = encode(np.full((64, 90, 3), 120, np.uint8), "png")
    for data in (b"", b"GIF89a", whole[:40], b"\xff\xd8\xff" + bytes(40), b"RIFF0000WEBP"):
        with pytest.raises(ShardError):
            decode(data)
        with pytest.raises(ShardError):
            decode_mask(data)


def test_masks_survive_bit_by_bit(rng):
    mask = rng.integers(0, 32, (41, 67), dtype=np.uint8)
    assert (decode_mask(encode_mask(mask)) == mask).all()
    with pytest.raises(ShardError, match="not a gray"):
        decode_mask(encode(np.zeros((8, 9, 3), np.uint8), "png"))


def webdataset_samples(path):
    """Group as WebDataset does (webdataset.tariterators): it reads members in their order, the key
    is the name up to the first dot of its last part, and consecutive members of a key are a sample.
    """
    samples = []
    with tarfile.open(path, "r|") as archive:
        for info in archive:
            match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", info.name)
            if not info.isreg() or re.match(r"__[^/]*__($|/)", info.name) or match is None:
                continue
            key, suffix = match[1], match[2].lower()
            if not samples or samples[-1]["__key__"] != key:
                samples.append({"__key__": key})
            assert suffix not in samples[-1], "a name twice in a sample is an error there"
            samples[-1][suffix] = archive.extractfile(info).read()
    return samples


def test_webdataset_reads_the_shards_of_the_stages(tmp_path):
    """Each tile is one sample: he and her2 from the shard of tile, the mask from that of mask."""
    index = write_index(tmp_path)
    rows = pq.read_table(index).to_pylist()
    tiles = webdataset_samples(tmp_path / "tile" / "unit.tar")
    assert [sample["__key__"] for sample in tiles] == [row["tile"] for row in rows]
    labels = webdataset_samples(tmp_path / "mask" / "unit.tar")
    for row, sample, label in zip(rows, tiles, labels, strict=True):
        assert set(sample) == {"__key__", "he.jpg", "her2.jpg"}
        assert hashlib.sha256(sample["he.jpg"]).hexdigest() == row["he_sha256"]
        assert hashlib.sha256(sample["her2.jpg"]).hexdigest() == row["her2_sha256"]
        assert label["__key__"] == row["tile"]
        assert hashlib.sha256(label["stain.png"]).hexdigest() == row["stain_sha256"]


def test_a_reader_reads_every_shard_and_keeps_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr("hemera.dataset.shards._OPEN_SHARDS", 3)
    places = {
        f"unit{n}.tar": write(tmp_path / f"unit{n}.tar", [("a", b"%d" % n * 600)]) for n in range(7)
    }
    reader = ShardReader(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for n, (name, [place]) in enumerate(places.items()):
            assert reader.read(name, *place) == b"%d" % n * 600
            assert len(os.listdir("/proc/self/fd")) <= before + 3
    copy = pickle.loads(pickle.dumps(reader))
    assert len(os.listdir("/proc/self/fd")) == before + 3
    assert copy.read("unit2.tar", *places["unit2.tar"][0]) == b"2" * 600
    del copy, reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_names_the_shard_that_fails(tmp_path):
    [place] = write(tmp_path / "unit.tar", [("a", b"1" * 900)])
    reader = ShardReader(tmp_path)
    with pytest.raises(ShardError, match=r"other.tar: No such file or directory; run the stage"):
        reader.read("other.tar", *place)
    assert reader.read("unit.tar", *place) == b"1" * 900
    os.truncate(tmp_path / "unit.tar", place[0] + 500)
    with pytest.raises(ShardError, match=r"unit.tar: ends before byte 1412; run its stage again"):
        reader.read("unit.tar", *place)


@pytest.fixture
def index(tmp_path):
    """Nine rows: what they are can be told from their names."""
    path = tmp_path / "index.parquet"
    table = pa.table(
        {
            "tile": ["a", "b", "c", "d", "e", "f", "g", "h", "i"],
            "dataset": ["bci"] * 4 + ["mist"] * 5,
            "score": ["3+", "1+", "", "3+", "0", "3+", "3+", "2+", "3+"],
            "he_sharpness": [10.0, 20.0, 30.0, 40.0, 50.0, None, 70.0, 80.0, 90.0],
            "accepted": [True, True, False, True, True, True, False, True, True],
            "split": ["train", "train", "train", "val", "test", "train", "val", "val", "test"],
            "generation_split": ["train", None, None, "val", "test", "train", None, None, "val"],
        }
    )
    pq.write_table(table, path)
    return path


def names(index, **conditions):
    return "".join(select(index, ["tile"], **conditions).column("tile").to_pylist())


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, "abdefhi"),
        ({"refused": True}, "abcdefghi"),
        ({"part": "train"}, "abf"),
        ({"part": "val", "refused": True}, "dgh"),
        ({"network": "generation"}, "adefi"),
        ({"network": "generation", "part": "val"}, "di"),
        ({"where": "score == '3+'"}, "adfi"),
        ({"where": "score == '3+'", "refused": True}, "adfgi"),
        ({"where": pc.field("score") == "3+"}, "adfi"),
        ({"where": "dataset == 'mist' and he_sharpness > 45"}, "ehi"),
        ({"where": (pc.field("dataset") == "mist") & (pc.field("he_sharpness") > 45)}, "ehi"),
        ({"where": "he_sharpness.isna()"}, "f"),
        ({"where": "not accepted", "refused": True}, "cg"),
        ({"where": "score in ['0', '2+'] or tile.str.startswith('a')"}, "aeh"),
        ({"where": "`split` != generation_split"}, "bhi"),
        ({"where": "score == '9'"}, ""),
        ({"where": "score == '3+'", "network": "generation", "part": "val"}, "di"),
        ({"where": pc.field("score") == "3+", "part": "test"}, "i"),
    ],
)
def test_rows_are_chosen_by_words_expressions_and_parts(index, conditions, expected):
    assert names(index, **conditions) == expected


def test_columns_come_as_asked_and_no_others(index):
    found = select(index, ["score", "tile"], where="he_sharpness < 25", part="train")
    assert found.column_names == ["score", "tile"]
    assert found.to_pylist() == [{"score": "3+", "tile": "a"}, {"score": "1+", "tile": "b"}]


@pytest.mark.parametrize(
    "where",
    [
        "colour == 'red'",
        "score ==",
        "score",
        "he_sharpness + 1",
        "True",
        "1 == 1",
        "he_sharpness > 'much'",
        "@secret > 1",
        "new = he_sharpness > 1",
        "__import__('os').system('true')",
        "tile.nothing()",
        "he_sharpness > 1\nscore == '3+'",
        "",
        pc.field("colour") == "red",
        pc.field("score"),
        pc.field("score") > 3,
    ],
)
def test_what_cannot_be_asked_is_one_line_with_a_remedy(index, where):
    with pytest.raises(ConfigError, match=r"^where: .*; .*") as found:
        select(index, ["tile"], where=where)
    assert "\n" not in str(found.value)


def test_selecting_from_what_is_no_index(index, tmp_path):
    with pytest.raises(ShardError, match="not an index"):
        select(tmp_path / "none.parquet", ["tile"])
    (tmp_path / "broken.parquet").write_bytes(index.read_bytes()[:300])
    with pytest.raises(ShardError, match="not an index"):
        select(tmp_path / "broken.parquet", ["tile"])
    with pytest.raises(ShardError, match="no column status_split; name a network"):
        select(index, ["tile"], network="status", part="train")
    with pytest.raises(ConfigError, match="part: 'validation' is none; choose from train, val"):
        select(index, ["tile"], part="validation")


def test_an_empty_index_has_no_rows(index, tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(index).slice(0, 0), empty)
    assert names(empty) == names(empty, where="score == '3+'", part="train") == ""


def test_what_was_taken_back_may_be_written_again(tmp_path):
    path = tmp_path / "shard.tar"
    with ShardWriter(path) as writer:
        writer.add("a.he.png", b"first")
        start = writer.position()
        writer.add("b.he.png", b"to go")
        writer.rewind(start)
        offset, length = writer.add("b.he.png", b"second")
        with pytest.raises(ShardError, match=r"a\.he\.png stands in it already"):
            writer.add("a.he.png", b"again")
    assert read_member(path, offset, length) == b"second"
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["a.he.png", "b.he.png"]


@pytest.mark.parametrize("length", [99, 100, 101, 180])
def test_names_of_any_length_are_read_by_tar(tmp_path, length):
    name = "x" * (length - 7) + ".he.png"
    with ShardWriter(tmp_path / "shard.tar") as writer:
        writer.add(name, b"bytes")
    with tarfile.open(tmp_path / "shard.tar") as archive:
        assert archive.getnames() == [name]
        assert archive.extractfile(name).read() == b"bytes"
