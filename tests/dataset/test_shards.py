import hashlib
import os
import pickle
import re
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hemera.dataset.shards import ShardReader, ShardWriter, read_member
from hemera.errors import ShardError


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


def test_members_can_be_taken_back_without_a_trace(tmp_path):
    write(tmp_path / "plain.tar", [("a", b"1" * 600), ("b", b"4")])
    with ShardWriter(tmp_path / "rewound.tar") as writer:
        writer.add("a", b"1" * 600)
        start = writer.position()
        writer.add("b", b"2" * 3000)
        writer.rewind(start)
        writer.add("b", b"4")
        with pytest.raises(ShardError, match="a exists already"):
            writer.add("a", b"again")
    assert (tmp_path / "rewound.tar").read_bytes() == (tmp_path / "plain.tar").read_bytes()


def test_an_empty_shard_is_an_archive(tmp_path):
    write(tmp_path / "empty.tar", [])
    with tarfile.open(tmp_path / "empty.tar") as archive:
        assert archive.getmembers() == []


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


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "shard.tar"
    [(offset, length), other] = write(path, [("a", bytes(range(200))), ("b", b"b" * 700)])
    sha256 = hashlib.sha256(bytes(range(200))).hexdigest()
    assert read_member(path, offset, length, sha256) == bytes(range(200))
    stored = bytearray(path.read_bytes())
    stored[offset + 77] ^= 0x10
    path.write_bytes(stored)
    with pytest.raises(ShardError, match=r"shard.tar: a differs from its SHA-256"):
        read_member(path, offset, length, sha256)
    with pytest.raises(ShardError, match="a differs from its SHA-256"):
        ShardReader(tmp_path).read("shard.tar", offset, length, bytes.fromhex(sha256[:16]))
    assert read_member(path, *other, hashlib.sha256(b"b" * 700).hexdigest()) == b"b" * 700


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


def test_threads_that_close_the_shards_of_each_other_read_the_right_bytes(tmp_path, monkeypatch):
    """One shard is open at a time, and a slow read would lose its descriptor to another thread."""
    monkeypatch.setattr("hemera.dataset.shards._OPEN_SHARDS", 1)
    pread = os.pread

    def slow(descriptor, length, offset):
        time.sleep(1e-3)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", slow)
    places = [write(tmp_path / f"unit{n}.tar", [("a", b"%d" % n * 600)])[0] for n in range(5)]
    reader = ShardReader(tmp_path)

    def read(n):
        return reader.read(f"unit{n % 5}.tar", *places[n % 5]) == b"%d" % (n % 5) * 600

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(100)))


@pytest.mark.parametrize("length", [99, 100, 101, 180])
def test_names_of_any_length_are_read_by_tar(tmp_path, length):
    name = "x" * (length - 7) + ".he.png"
    with ShardWriter(tmp_path / "shard.tar") as writer:
        writer.add(name, b"bytes")
    with tarfile.open(tmp_path / "shard.tar") as archive:
        assert archive.getnames() == [name]
        assert archive.extractfile(name).read() == b"bytes"
