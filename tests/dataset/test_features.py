"""Files of features: TRIDENT's layout, same bytes, bags."""

import hashlib

import numpy as np
import pytest
import torch

from hemera.dataset.bags import Bags
from hemera.dataset.features import (
    DATASETS,
    FeatureFile,
    ViewList,
    check_features,
    write_features,
)
from hemera.errors import TableError

h5py = pytest.importorskip("h5py")


def views(count, tile="t", pair="p"):
    found = ViewList()
    for k in range(count):
        found.add(10 * k, 20 * k, 256.5, f"{tile}{k // 2}", pair)
    return found


def write(path, values, batches=2, **attributes):
    recorded = {"encoder": "e", "encoder_sha256": "00", "options": "{}", "trained_on": [],
                "pretraining": "none"}  # fmt: skip
    parts = np.array_split(values, batches) if len(values) else []
    return write_features(
        path, parts, values.shape[1], views(len(values)), {**recorded, **attributes},
        {"patch_size": 256, "overlap": 0},
    )  # fmt: skip


def test_other_software_reads_features_and_coordinates(tmp_path, rng):
    values = rng.normal(size=(7, 5)).astype(np.float32)
    assert write(tmp_path / "a.h5", values) == 7
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"].shape == (7, 5) and file["features"].dtype == np.float16
        assert file["features"].chunks is None  # contiguous
        assert np.array_equal(file["features"][:], values.astype(np.float16))
        assert file["coords"][:].tolist() == [[10 * k, 20 * k] for k in range(7)]
        assert file["coords"].attrs["patch_size"] == 256
        assert file.attrs["encoder"] == b"e"


def test_equal_features_are_equal_bytes_in_any_batches(tmp_path, rng):
    values = rng.normal(size=(9, 4)).astype(np.float32)
    digests = set()
    for batches in (1, 3, 9):
        write(tmp_path / "a.h5", values, batches)
        digests.add(hashlib.sha256((tmp_path / "a.h5").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_unit_without_views_has_zero_rows(tmp_path):
    assert write(tmp_path / "a.h5", np.zeros((0, 3), np.float32)) == 0
    with FeatureFile(tmp_path / "a.h5") as file:
        found = file.views()
        assert file.width == 3 and found.coords.shape == (0, 2) and list(found.tiles) == []
        assert file.read(np.array([], np.int64)).shape == (0, 3)


def test_what_16_bits_do_not_hold_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(TableError, match="not finite in 16 bits"):
        write(tmp_path / "a.h5", np.array([[1e6, 0.0]], np.float32), 1)
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_missing_file_is_an_error(tmp_path):
    with pytest.raises(TableError, match="no such file; run the stage embed"):
        FeatureFile(tmp_path / "a.h5")
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    with pytest.raises(TableError, match="not a file of features"):
        FeatureFile(tmp_path / "a.h5")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x04
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["features", "coords", "size_px", "tile", "pair"])
def test_a_flipped_bit_of_any_dataset_is_found_when_bags_are_read(tmp_path, rng, name):
    path = tmp_path / "u.h5"
    write(path, rng.normal(size=(8, 5)).astype(np.float32))
    check_features(path)
    with h5py.File(path) as file:
        begin, length = file[name].id.get_offset(), file[name].id.get_storage_size()
    flip(path, begin + length // 2)
    for read in (check_features, lambda _: Bags({"u": path}, tile_rows("abcd"), 1)):
        with pytest.raises(TableError, match=f"u.h5: {name}: differs from its SHA-256"):
            read(path)


@pytest.mark.parametrize("owner", ["/", "coords"])
def test_a_changed_attribute_is_found(tmp_path, rng, owner):
    path = tmp_path / "u.h5"
    write(path, rng.normal(size=(8, 5)).astype(np.float32))
    with h5py.File(path, "r+") as file:
        name = "encoder" if owner == "/" else "patch_size"
        file[owner].attrs[name] = {"encoder": "f", "patch_size": 512}[name]
    with pytest.raises(TableError, match="attributes: differs from its SHA-256"):
        check_features(path)


def test_a_flipped_bit_anywhere_changes_nothing_unnoticed(tmp_path, rng):
    """Bytes that no reader uses, as HDF5's free space, may change."""
    path = tmp_path / "u.h5"
    write(path, rng.normal(size=(4, 3)).astype(np.float32))
    whole, found = path.read_bytes(), 0

    def content():
        with h5py.File(path) as file:
            data = [file[name][:].tolist() for name in DATASETS]
            return repr([data, sorted(file.attrs.items()), sorted(file["coords"].attrs.items())])

    before = content()
    for place in rng.integers(0, len(whole), 100):
        path.write_bytes(whole)
        flip(path, place)
        try:
            check_features(path)
        except TableError:
            found += 1
        else:
            assert content() == before
    assert found > 20


def tile_rows(cases):
    return [
        {"tile": f"t{k}", "case": case, "pair": "p", "unit": "u", "accepted": True, "reason": None}
        for k, case in enumerate(cases)
    ]


@pytest.mark.parametrize("memory_mb", [1, 1e-9])
def test_a_bag_has_the_views_of_accepted_tiles_only(tmp_path, rng, memory_mb):
    values = rng.normal(size=(8, 3)).astype(np.float32)
    write(tmp_path / "u.h5", values)
    tiles = tile_rows(["a", "b", "a", "b"])
    tiles[3]["accepted"] = False
    bags = Bags({"u": tmp_path / "u.h5"}, tiles, memory_mb)
    half = torch.from_numpy(values.astype(np.float16).astype(np.float32))
    assert torch.equal(bags.load("a"), half[[0, 1, 4, 5]])
    assert torch.equal(bags.load("b"), half[[2, 3]])
    assert torch.equal(bags.load("a"), half[[0, 1, 4, 5]])
    assert [view.x_px for view in bags.views["a"]] == [0, 10, 40, 50]
    assert bags.width == 3 and bags.trained_on == []


def test_files_of_two_encoders_are_an_error(tmp_path, rng):
    values = rng.normal(size=(2, 3)).astype(np.float32)
    write(tmp_path / "u.h5", values)
    write(tmp_path / "v.h5", values, encoder_sha256="11")
    files = {name: tmp_path / f"{name}.h5" for name in ("u", "v")}
    with pytest.raises(TableError, match="another encoder, weights or options"):
        Bags(files, tile_rows("a"), 1)
