import math
import multiprocessing
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hemera.errors import ShardError
from hemera.shards import (
    SUFFIXES,
    ShardWriter,
    TileDataset,
    decode,
    decode_mask,
    encode,
    encode_mask,
    read_member,
)


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


@pytest.fixture
def results(rng, tmp_path):
    """Two shards of tiles with masks of one engine, and an index that shuffles them."""
    rows, truth = [], {}
    for unit in ("case1", "bci.000"):
        he, her2, masks = [], [], []
        names = [f"{unit.replace('.', '')}_{n:06d}_000000" for n in range(5)]
        for name in names:
            truth[name] = (
                smooth(rng), smooth(rng), rng.integers(0, 32, (48, 80), dtype=np.uint8)
            )  # fmt: skip
            he.append((f"{name}.he.png", encode(truth[name][0], "png")))
            her2.append((f"{name}.her2.png", encode(truth[name][1], "png")))
            masks.append((f"{name}.stain.png", encode_mask(truth[name][2])))
        for folder in ("tile", "mask", "index"):
            (tmp_path / folder).mkdir(exist_ok=True)
        pairs = [member for both in zip(he, her2, strict=True) for member in both]
        places = write(tmp_path / "tile" / f"{unit}.tar", pairs)
        mask_places = write(tmp_path / "mask" / f"{unit}.tar", masks)
        for n, name in enumerate(names):
            rows.append(
                {
                    "tile": name,
                    "shard": f"tile/{unit}.tar",
                    "he_offset": places[2 * n][0],
                    "he_length": places[2 * n][1],
                    "her2_offset": places[2 * n + 1][0],
                    "her2_length": places[2 * n + 1][1],
                    "registration_error_um": [12.5, None, 3.0, 4.0, 5.0][n],
                    "stain_shard": f"mask/{unit}.tar",
                    "stain_offset": mask_places[n][0],
                    "stain_length": mask_places[n][1],
                    "generation_split": ["train", "train", "val", None, "test"][n],
                    "segmentation_split": [None, "train", "train", "train", "test"][n],
                }
            )
    rows = [rows[n] for n in rng.permutation(len(rows))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "index" / "index.parquet")
    return tmp_path / "index" / "index.parquet", rows, truth


def test_a_dataset_is_one_networks_part(results):
    index, rows, truth = results
    for network in ("generation", "segmentation"):
        for part in ("train", "val", "test"):
            dataset = TileDataset(index, network=network, part=part, engine="stain")
            expected = [row["tile"] for row in rows if row[f"{network}_split"] == part]
            assert list(dataset.tiles) == expected
            assert len(dataset) == len(expected)
            for i, name in enumerate(expected):
                item = dataset[i]
                assert item["tile"] == name
                [error] = [r["registration_error_um"] for r in rows if r["tile"] == name]
                found = item["registration_error_um"]
                assert math.isnan(found) if error is None else found == error
                for key, array in zip(("he", "her2", "mask"), truth[name], strict=True):
                    assert item[key].dtype == np.uint8
                    assert (item[key] == array).all()
            with pytest.raises(IndexError):
                dataset[len(expected)]


def test_an_empty_part_is_an_empty_dataset(results, tmp_path):
    index = results[0]
    empty = tmp_path / "index" / "empty.parquet"
    table = pq.read_table(index)
    pq.write_table(table.slice(0, 0), empty)
    assert len(TileDataset(empty, network="generation", part="train", engine="stain")) == 0


def test_dataset_errors(results, tmp_path):
    index, rows, _ = results
    with pytest.raises(ShardError, match="no column deepliif_shard"):
        TileDataset(index, network="generation", part="train", engine="deepliif")
    with pytest.raises(ShardError, match="no column status_split"):
        TileDataset(index, network="status", part="train", engine="stain")
    with pytest.raises(ShardError, match="not an index"):
        TileDataset(tmp_path / "none.parquet", network="generation", part="train", engine="stain")
    lacking = [{**row, "stain_shard": None} for row in rows]
    pq.write_table(pa.Table.from_pylist(lacking, pq.read_schema(index)), tmp_path / "index" / "l")
    with pytest.raises(ShardError, match="without a mask of stain"):
        TileDataset(tmp_path / "index" / "l", network="generation", part="val", engine="stain")
    dataset = TileDataset(index, network="generation", part="train", engine="stain")
    (tmp_path / "mask" / "case1.tar").unlink()
    (tmp_path / "mask" / "bci.000.tar").unlink()
    with pytest.raises(ShardError, match="run the stage that writes it"):
        dataset[0]


def test_a_pickled_dataset_has_no_open_file(results):
    dataset = TileDataset(results[0], network="generation", part="train", engine="stain")
    first = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert not copy._open
    assert (copy[0]["he"] == first["he"]).all()


@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
def test_workers_read_each_row_once_and_right(results, workers, start):
    import torch.utils.data

    index, rows, truth = results
    dataset = TileDataset(index, network="segmentation", part="train", engine="stain")
    dataset[0]  # open files before the workers start
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=2,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context=start and multiprocessing.get_context(start),
        generator=torch.Generator().manual_seed(3),
    )
    seen = []
    for batch in loader:
        for n, name in enumerate(batch["tile"]):
            seen.append(name)
            assert (batch["he"][n].numpy() == truth[name][0]).all()
            assert (batch["mask"][n].numpy() == truth[name][2]).all()
    assert sorted(seen) == sorted(r["tile"] for r in rows if r["segmentation_split"] == "train")
