import functools
import hashlib
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from hemera.dataset.shards import ShardReader, ShardWriter
from hemera.dataset.torch_dataset import TileDataset, tile_weight
from hemera.errors import ConfigError, ShardError, TrainingError
from hemera.imaging.codecs import encode, encode_mask
from hemera.masks import label_format
from hemera.networks.weight_map import weight_map
from tests.small_index import write_index

HEIGHT, WIDTH = 20, 30
COUNT = 11


def drawn(number):
    """Draw a tile that says where each pixel was: red counts columns, green rows, blue the tile.

    HER2 is the same brighter, the mask the sum of row and column as a label byte.
    """
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    he = np.stack([columns, rows, np.full_like(rows, number)], 2)
    return he, he + 100, (rows + columns) & 31


def write_results(folder, count=COUNT):
    """Write an index of `count` tiles in two shards of each kind; every fourth is refused."""
    for name in ("tile", "mask", "index"):
        (folder / name).mkdir(parents=True)
    rows = []
    for unit in ("case1", "bci.000"):
        with (
            ShardWriter(folder / "tile" / f"{unit}.tar") as tiles,
            ShardWriter(folder / "mask" / f"{unit}.tar") as labels,
        ):
            for number in range(count):
                if (number % 3 == 0) != (unit == "case1"):
                    continue
                tile = f"pair{number}_000000_{number:06d}"
                row = {
                    "tile": tile,
                    "number": number,
                    "shard": f"tile/{unit}.tar",
                    "stain_shard": f"mask/{unit}.tar",
                    "registration_error_um": 10.0 * number if number else None,
                    "accepted": number % 4 != 3,
                    "he_background": [255, 255, 255],
                    "her2_background": [240, 200, 120 + number],
                    "split": ("train", "val", "test")[number % 3],
                    "generation_split": "train" if number < 5 else None,
                }
                he, her2, mask = drawn(number)
                for name, shard, data in (
                    ("he", tiles, encode(he, "png")),
                    ("her2", tiles, encode(her2, "png")),
                    ("stain", labels, encode_mask(mask)),
                ):
                    place = shard.add(f"{tile}.{name}.png", data)
                    row[f"{name}_offset"], row[f"{name}_length"] = place
                    row[f"{name}_sha256"] = hashlib.sha256(data).hexdigest()
                rows.append(row)
    rows.sort(key=lambda row: row["number"])
    index = folder / "index" / "index.parquet"
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"mask_target": "stain"})
    pq.write_table(table, index, row_group_size=4)
    return index


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results") / "r")


def everything(index, **arguments):
    return TileDataset(index, refused=True, **arguments)


def numbers(dataset):
    return [int(name.split("_")[0].removeprefix("pair")) for name in dataset.tiles]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        ({"where": "number > 3", "split": "val"}, [4, 10]),
        ({"where": "number == 7"}, []),
    ],
)
def test_rows_are_those_asked_for_in_the_order_of_the_index(index, arguments, expected):
    dataset = TileDataset(index, **arguments)
    assert numbers(dataset) == expected
    assert len(dataset) == len(expected)
    assert [dataset.stored(i)["he"][0, 0, 2] for i in range(len(dataset))] == expected
    assert [dataset.position(tile) for tile in dataset.tiles] == list(range(len(expected)))
    with pytest.raises(KeyError, match="pair99"):
        dataset.position("pair99")
    for beyond in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError, match=f"tile {beyond} of {len(expected)}"):
            dataset[beyond]


def test_an_item_is_tensors_of_documented_shapes_and_ranges(index):
    dataset = everything(index, images=("weight", "he", "her2", "mask", "positive"))
    he, her2, mask = drawn(4)
    item = dataset[4]
    assert list(item) == ["tile", "weight", "he", "her2", "mask", "positive"]
    assert item["tile"] == "pair4_000000_000004"
    shapes = {
        name: (tuple(each.shape), each.dtype) for name, each in item.items() if name[0] != "t"
    }
    assert shapes == {
        "he": ((3, HEIGHT, WIDTH), torch.uint8),
        "her2": ((3, HEIGHT, WIDTH), torch.uint8),
        "mask": ((1, HEIGHT, WIDTH), torch.uint8),
        "positive": ((1, HEIGHT, WIDTH), torch.bool),
        "weight": ((1, HEIGHT, WIDTH), torch.float32),
    }
    assert all(item[name].is_contiguous() for name in shapes)
    assert (item["he"].permute(1, 2, 0).numpy() == he).all()
    assert (item["her2"].permute(1, 2, 0).numpy() == her2).all()
    assert (item["mask"][0].numpy() == mask).all()
    assert (item["positive"][0].numpy() == label_format.positive(mask)).all()
    assert (item["weight"][0].numpy() == weight_map(label_format.nuclei(mask), "inside")).all()
    assert 0 < item["weight"].min() < item["weight"].max() == 1
    assert dataset[-7]["tile"] == item["tile"]


def test_background_becomes_white(index):
    """HER2 of tile 4 has the background (240, 200, 124); brighter pixels are white too."""
    dataset = everything(index, images=("her2", "her2_background"), normalise_background=True)
    expected = np.minimum(np.rint(drawn(4)[1] * 255.0 / np.array([240, 200, 124])), 255)
    item = dataset[4]
    assert (item["her2"].permute(1, 2, 0).numpy() == expected).all()
    assert (dataset.stored(4)["her2"] == expected).all()
    assert item["her2_background"].flatten().tolist() == [1, 1, 1]
    assert dataset.background(4, "her2") == (240, 200, 124)
    plain = everything(index, images=("her2", "her2_background"))[4]
    assert (plain["her2"].permute(1, 2, 0).numpy() == drawn(4)[1]).all()
    assert (plain["her2_background"] * 255).flatten().tolist() == pytest.approx([240, 200, 124])


def test_only_what_is_needed_is_read(index, tmp_path):
    """Without masks no engine is needed, nor any shard of masks."""
    table = pq.read_table(index).drop_columns(["stain_shard", "registration_error_um"])
    folder = tmp_path / "results"
    (folder / "index").mkdir(parents=True)
    (folder / "tile").symlink_to(index.parent.parent / "tile")
    bare = folder / "index" / "index.parquet"
    pq.write_table(table.replace_schema_metadata(None), bare)
    assert TileDataset(bare, images=["her2"])[2]["her2"][2, 0, 0] == 102
    with pytest.raises(ShardError, match="metadata lacks mask_target"):
        TileDataset(bare)
    with pytest.raises(ShardError, match="no column stain_shard"):
        TileDataset(bare, engine="stain", images=["mask"])


def test_weights_follow_options(index):
    weighting = functools.partial(
        tile_weight, mode="literal", source="her2_positive", renormalise_mean=True
    )
    dataset = everything(index, images=["weight"], weighting=weighting)
    found = dataset[5]["weight"][0].numpy()
    expected = weight_map(label_format.positive(drawn(5)[2]), "literal", renormalise_mean=True)
    assert (found == expected).all()
    assert found.mean() == pytest.approx(1)


# How a tile is seen


def seen(index, **arguments):
    return everything(index, **{"seed": 7, "crop_px": 12, **arguments})


def corners(item):
    """The columns and rows that stand in the corners: top left, top right, bottom left."""
    he = item["he"].numpy()
    return tuple(tuple(int(v) for v in he[:2, y, x]) for y, x in ((0, 0), (0, -1), (-1, 0)))


def test_cut_flip_and_turn_are_shared_by_the_images_of_a_tile(index):
    dataset = seen(index, flips=(0, 1), turns=True)
    symmetries = set()
    for epoch in range(1, 80):
        item = dataset[epoch, 3]
        he, her2, mask = (item[name].numpy().astype(int) for name in ("he", "her2", "mask"))
        assert he.shape == (3, 12, 12)
        assert (her2 == he + 100).all()
        assert (mask[0] == (he[0] + he[1]) & 31).all()
        (x0, y0), (x1, y1), (x2, y2) = corners(item)
        symmetries.add((np.sign(x1 - x0), np.sign(y1 - y0), np.sign(x2 - x0), np.sign(y2 - y0)))
    assert len(symmetries) == 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {(1, 0, 0, 1)}),
        ({"flips": (1,)}, {(1, 0, 0, 1), (-1, 0, 0, 1)}),
        ({"flips": (0,)}, {(1, 0, 0, 1), (1, 0, 0, -1)}),
        ({"turns": True}, {(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)}),
    ],
)
def test_only_the_symmetries_that_are_allowed_are_drawn(index, arguments, expected):
    dataset = seen(index, **arguments)
    found = set()
    for epoch in range(1, 40):
        (x0, y0), (x1, y1), (x2, y2) = corners(dataset[epoch, 1])
        found.add((np.sign(x1 - x0), np.sign(y1 - y0), np.sign(x2 - x0), np.sign(y2 - y0)))
    assert found == expected


@pytest.mark.parametrize("side", [1, 2, HEIGHT])
def test_the_smallest_and_the_largest_crop(index, side):
    dataset = seen(index, crop_px=side, flips=(0, 1), turns=True, images=("he", "mask", "weight"))
    item = dataset[3, 6]
    assert [tuple(item[name].shape) for name in ("he", "mask", "weight")] == [
        (channels, side, side) for channels in (3, 1, 1)
    ]
    x, y, number = (int(v) for v in item["he"][:, 0, 0])
    assert number == 6
    assert int(item["mask"][0, 0, 0]) == (x + y) & 31


def test_stored_images_are_never_cropped(index):
    dataset = everything(index, images=("he", "positive"), crop_px=7, flips=(0,), turns=True)
    he, _, mask = drawn(9)
    found = dataset.stored(9)
    assert list(found) == ["tile", "he", "mask"]
    assert (found["he"] == he).all()
    assert (found["mask"] == mask).all()
    assert list(dataset.stored(9, ["he"])) == ["tile", "he"]


def test_validation_is_the_middle_and_never_turned(index):
    dataset = seen(index, flips=(0, 1), turns=True)
    for item in (dataset[0, 2], dataset[2]):
        assert item["tile"] == "pair2_000000_000002"
        assert item["he"][:, 0, 0].tolist() == [9, 4, 2]
        assert item["he"][:, 11, 11].tolist() == [20, 15, 2]
    assert seen(index, crop_px=None)[0, 2]["he"].shape == (3, HEIGHT, WIDTH)


def test_a_plain_position_is_of_the_epoch_set(index):
    dataset = seen(index, flips=(0, 1), turns=True)
    dataset.set_epoch(5)
    for position in (0, 4, -1):
        assert torch.equal(dataset[position]["he"], dataset[5, position]["he"])
    assert not torch.equal(dataset[4]["he"], dataset[6, 4]["he"])
    dataset.set_epoch(0)
    assert torch.equal(dataset[4]["he"], dataset[0, 4]["he"])


def test_what_is_seen_follows_from_seed_epoch_and_position(index):
    def digest(**arguments):
        dataset = seen(index, flips=(0, 1), turns=True, **arguments)
        state = hashlib.sha256()
        for epoch in (1, 2):
            for position in (5, 3):
                state.update(dataset[epoch, position]["he"].numpy().tobytes())
        return state.hexdigest()

    assert digest() == digest() == digest(images=("he", "weight"))
    assert digest() != digest(seed=8)


def test_what_cannot_be_cut_or_turned_names_tile_and_remedy(index):
    with pytest.raises(TrainingError, match=r"pair1_\d+_\d+: 30 x 20 px is smaller than crop_px 2"):
        seen(index, crop_px=24)[1, 1]
    with pytest.raises(TrainingError, match=r"30 x 20 px cannot be turned .*; give crop_px"):
        seen(index, crop_px=None, turns=True)[0, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": ["he", "dapi"]}, "images: .*dapi.*; give a list of he, her2, mask, positive"),
        ({"images": "he"}, "images: 'he'; give a list"),
        ({"images": []}, "images: "),
        ({"crop_px": 0}, "crop_px: 0; give at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(index, arguments, words):
    with pytest.raises(ConfigError, match=words):
        TileDataset(index, **arguments)


def test_faults_of_the_index_and_of_its_shards(index, tmp_path):
    with pytest.raises(ShardError, match="not an index"):
        TileDataset(tmp_path / "none.parquet")
    with pytest.raises(ShardError, match=r"no column .*deepliif_shard; name"):
        TileDataset(index, engine="deepliif")
    own = write_results(tmp_path / "own")
    table = pq.read_table(own)
    lacking = [
        None if n == 4 else shard for n, shard in enumerate(table["stain_shard"].to_pylist())
    ]
    place = table.column_names.index("stain_shard")
    pq.write_table(table.set_column(place, "stain_shard", pa.array(lacking)), own)
    with pytest.raises(ShardError, match="1 tiles without a mask of stain; run mask"):
        TileDataset(own)
    assert len(TileDataset(own, where="number < 4")) == 3
    dataset = TileDataset(own, images=["he"])
    (tmp_path / "own" / "tile" / "case1.tar").unlink()
    with pytest.raises(ShardError, match=r"case1.tar: No such file .*; run the stage"):
        dataset[0]
    assert dataset[1]["he"].shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize(("shard", "name"), [("tile", "he"), ("tile", "her2"), ("mask", "stain")])
def test_a_flipped_bit_is_found(tmp_path, shard, name):
    own = write_results(tmp_path / "own", count=4)
    rows = {row["tile"]: row for row in pq.read_table(own).to_pylist()}
    dataset = everything(own)
    [tile] = [tile for tile in dataset.tiles if tile.startswith("pair2_")]
    path = tmp_path / "own" / shard / "bci.000.tar"
    stored = bytearray(path.read_bytes())
    stored[rows[tile][f"{name}_offset"] + rows[tile][f"{name}_length"] // 2] ^= 0x10
    path.write_bytes(stored)
    with pytest.raises(ShardError, match=rf"bci\.000\.tar: {tile}\.{name}\.png differs"):
        dataset[dataset.position(tile)]
    assert [dataset[i]["tile"] for i in range(4) if dataset.tiles[i] != tile]


def test_each_member_is_compared_once_in_a_process(index, monkeypatch):
    dataset, compared = everything(index), []
    read = ShardReader.read

    def counted(self, shard, offset, length, digest=b""):
        compared.append(bool(digest))
        return read(self, shard, offset, length, digest)

    monkeypatch.setattr(ShardReader, "read", counted)
    for _ in range(2):
        dataset[0]
    assert compared == [True] * 3 + [False] * 3


def test_a_mask_of_another_size_is_refused(index, tmp_path):
    own = write_results(tmp_path / "own", count=1)
    with ShardWriter(tmp_path / "own" / "mask" / "case1.tar") as shard:
        data = encode_mask(np.zeros((9, 30), np.uint8))
        offset, length = shard.add("pair0.stain.png", data)
    table = pq.read_table(own)
    sha256 = hashlib.sha256(data).hexdigest()
    for name, value in (("offset", offset), ("length", length), ("sha256", sha256)):
        place = table.column_names.index(f"stain_{name}")
        table = table.set_column(place, f"stain_{name}", pa.array([value]))
    pq.write_table(table, own)
    with pytest.raises(ShardError, match=r"mask is 30 x 9 px and he 30 x 20; run tile and mask"):
        TileDataset(own)[0]


def test_an_index_is_found_from_another_folder(index, monkeypatch):
    """What is relative is so to the folder of the first call: workers may start elsewhere."""
    monkeypatch.chdir(index.parent)
    dataset = TileDataset("index.parquet", where="number == 4")
    monkeypatch.chdir("/")
    assert dataset[0]["he"][2, 0, 0] == 4


def test_a_pickled_dataset_sees_the_same_and_holds_no_file(index):
    dataset = seen(index, flips=(0, 1), turns=True, where="number > 2")
    first = dataset[4, 2]
    before = len(os.listdir("/proc/self/fd"))
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(os.listdir("/proc/self/fd")) - before <= 1  # the shared epoch
    assert torch.equal(copy[4, 2]["her2"], first["her2"])


# Processes that read


def digests(batch):
    """One line per tile of a batch: its name and what is seen of it."""
    return [
        (tile, *(hashlib.sha256(batch[name][i].numpy().tobytes()).hexdigest() for name in IMAGES))
        for i, tile in enumerate(batch["tile"])
    ]


IMAGES = ("he", "her2", "mask", "weight")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_distributed_sampler_sees_the_epoch_that_is_set(index, workers):
    """Each of two ranks has a loader whose workers persist; one of nine tiles is padded."""
    orders, arguments = [], {"images": IMAGES, "seed": 7, "crop_px": 12, "flips": (0, 1)}
    datasets = [TileDataset(index, turns=True, **arguments) for _ in range(2)]
    samplers = [DistributedSampler(tiles, 2, rank, seed=3) for rank, tiles in enumerate(datasets)]
    loaders = [
        DataLoader(tiles, 2, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        for tiles, sampler in zip(datasets, samplers, strict=True)
    ]
    for epoch in (1, 2):
        for one in (*datasets, *samplers):
            one.set_epoch(epoch)
        lines = [line for loader in loaders for batch in loader for line in digests(batch)]
        assert len(lines) == 10
        assert {line[0] for line in lines} == set(datasets[0].tiles)
        assert len(set(lines)) == 9  # the tile that comes twice is seen alike
        for line in lines:
            item = datasets[0][epoch, datasets[0].position(line[0])]
            assert line[1] == hashlib.sha256(item["he"].numpy().tobytes()).hexdigest()
        orders.append([line[0] for line in lines])
    assert orders[0] != orders[1]


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch):
    """Two epochs of the tiles of score 3+ (here the odd ones) that train, in batches of four."""
    text = (Path(__file__).parents[2] / "docs/how-to/export.md").read_text()
    [code] = re.findall(r"```python\n(from torch.utils.data .*?)```", text, re.DOTALL)
    write_index(tmp_path / "results", train=11, val=1, test=1, height=260, width=300)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, "export.md", "exec"), found)
    assert [name.split("_")[0] for name in found["tiles"].tiles] == [
        f"pair{number}" for number in (1, 3, 5, 7, 9)
    ]
    assert len(found["sampler"]) == 4
    assert found["he"].shape == (1, 3, 256, 256)
    assert 0 <= found["he"].min() < found["he"].max() <= 1
    assert found["batch"]["weight"].shape == (1, 1, 256, 256)
