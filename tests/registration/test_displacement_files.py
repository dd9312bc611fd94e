"""Displacement files: what is written is read; what is damaged or foreign is refused."""

import io
import zipfile

import numpy as np
import pytest

from hemera.errors import RegistrationError
from hemera.registration import displacement_files
from hemera.registration.displacement import Displacement
from hemera.registration.displacement_files import read_displacement, write_displacement


@pytest.fixture
def d():
    rng = np.random.default_rng(7)
    return Displacement(rng.normal(0, 90, (23, 41, 2)).astype(np.float32), 6.0)


def test_what_is_written_is_read_to_a_512th_of_a_node(tmp_path, d):
    path = tmp_path / "new" / "case1.npz"
    write_displacement(path, d)
    again = read_displacement(path)
    assert again.mpp == d.mpp
    assert again.vectors_um.shape == (23, 41, 2)
    assert np.abs(again.vectors_um - d.vectors_um).max() <= d.mpp / 512
    write_displacement(tmp_path / "again.npz", again)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_any_type_of_number_is_read(tmp_path, d):
    np.savez(tmp_path / "own.npz", vectors_um=d.vectors_um.astype(np.float64), mpp=6)
    np.testing.assert_array_equal(read_displacement(tmp_path / "own.npz").vectors_um, d.vectors_um)


def test_damage_is_named_wherever_it_is(tmp_path, d):
    path = tmp_path / "own.npz"
    write_displacement(path, d)
    whole = path.read_bytes()
    rng = np.random.default_rng(20251)
    broken = [whole[:length] for length in rng.integers(1, len(whole), 40)]
    for start in (*range(160), *range(len(whole) - 400, len(whole) - 7)):
        broken.append(whole[:start] + rng.bytes(7) + whole[start + 7 :])
    refused = 0
    for data in broken:
        path.write_bytes(data)
        try:
            read_displacement(path)
        except RegistrationError as error:
            refused += 1
            assert str(error).startswith("own.npz: ")
            assert "\n" not in str(error)
    assert refused > len(broken) / 2


@pytest.mark.parametrize("content", [b"PK\x03\x04 rubbish", b"ObjectType = Image\n"])
def test_another_format_is_refused_with_the_one_that_is_read(tmp_path, content):
    (tmp_path / "own.mha").write_bytes(content)
    with pytest.raises(RegistrationError, match=r"own.mha: .*give an .npz file with vectors_um"):
        read_displacement(tmp_path / "own.mha")


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"field": np.zeros(3)}, "vectors_um is not a file in the archive"),
        ({"vectors_um": np.zeros((4, 5)), "mpp": 1.0}, "shape"),
        ({"vectors_um": np.full((5, 7, 2), "a"), "mpp": 1.0}, "cannot be read"),
        ({"vectors_um": np.full((5, 7, 2), 1j), "mpp": 1.0}, "complex128, not of real"),
    ],
)
def test_an_archive_of_something_else(tmp_path, arrays, why):
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(RegistrationError, match=f"own.npz: .*{why}"):
        read_displacement(tmp_path / "own.npz")


def test_arrays_are_bounded_before_they_are_read(tmp_path, d, monkeypatch):
    """A header that claims a terabyte, and arrays beyond the limit, allocate nothing."""
    path = tmp_path / "claims.npz"
    header = io.BytesIO()
    shape = (2**19, 2**18, 2)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vectors_um.npy", header.getvalue() + bytes(800))
        archive.writestr("mpp.npy", b"")
    with pytest.raises(RegistrationError, match="is not of the shape"):
        read_displacement(path)
    write_displacement(path, d)
    monkeypatch.setattr(displacement_files, "BYTES_MAX", 1000)
    with pytest.raises(RegistrationError, match="more than 1000"):
        read_displacement(path)
