"""Results that were cut off."""

import os
from pathlib import Path

import h5py
import pytest

from hemera.files.digests import is_cut_off


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("rows", [0, 700])
def test_a_file_of_features_that_was_cut_off(tmp_path: Path, libver: str, rows: int) -> None:
    path = tmp_path / "f.h5"
    assert not is_cut_off(path)
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset("features", (rows, 5), "float16", fillvalue=1)
        file.attrs["encoder"] = "statistics"
    assert not is_cut_off(path)
    for size in (path.stat().st_size - 1, 100, 30, 0):
        os.truncate(path, size)
        assert is_cut_off(path), size
