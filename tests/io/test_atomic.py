"""Writing in one step: a reader sees the old file or the whole new one."""

import threading
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from hemera.errors import RegistrationError
from hemera.io.atomic import (
    read_displacement,
    replacing,
    write_bytes,
    write_displacement,
    write_text,
)
from hemera.registration.displacement import Displacement, map_points, node_points, none


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_success_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.parquet"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent, "os.replace works within one file system only"
        assert temporary.suffix == ".parquet", "writers choose their format by the suffix"
        assert temporary.name.startswith("."), "no pattern of a reader may find it"
        temporary.write_bytes(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with replacing(path) as temporary:
        temporary.write_bytes(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert names(path.parent) == {"table.parquet"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"table.parquet"}


def test_failure_without_an_old_file_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError), replacing(tmp_path / "a.npz") as temporary:
        temporary.write_bytes(b"half")
        raise ValueError
    assert names(tmp_path) == set()


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_bytes() == b"old"


def test_many_dots_and_no_suffix(tmp_path: Path) -> None:
    for name in ("bci.003.pairs.parquet", "LICENCE", "case.displacement.npz"):
        write_bytes(tmp_path / name, name.encode())
        assert (tmp_path / name).read_bytes() == name.encode()
    assert len(names(tmp_path)) == 3


def test_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "card.md", "Å\nµm\n")
    assert (tmp_path / "card.md").read_bytes() == b"\xc3\x85\n\xc2\xb5m\n"


def test_a_reader_sees_whole_files_while_writers_race(tmp_path: Path) -> None:
    path = tmp_path / "race.bin"
    contents = [bytes([65 + k]) * 200_000 for k in range(4)]
    write_bytes(path, contents[0])
    done = threading.Event()
    broken: list[int] = []

    def look() -> None:
        while not done.is_set():
            seen = path.read_bytes()
            if seen not in contents:
                broken.append(len(seen))

    reader = threading.Thread(target=look)
    writers = [
        threading.Thread(target=lambda data=data: [write_bytes(path, data) for _ in range(5)])
        for data in contents
    ]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert not broken
    assert path.read_bytes() in contents
    assert names(tmp_path) == {"race.bin"}


def bent(points):
    """Where a point goes, um: a turn and a bend, linear enough for any grid used here."""
    points = np.asarray(points, float)
    turned = points @ np.array([[0.8, -0.6], [0.6, 0.8]]).T + (40.0, -15.0)
    return turned + 2 * np.sin(points[..., ::-1] / 300)


def field(height=23, width=41, mpp=6.0):
    nodes = node_points(Displacement(np.zeros((height, width, 2), np.float32), mpp))
    return Displacement((bent(nodes) - nodes).astype(np.float32), mpp)


def itk(path, *, spacing=(6.0, 6.0), origin=None, shape=(23, 41), change=None):
    """Write `bent` as ITK does: nodes at origin + index * spacing."""
    origin = tuple(n / 2 for n in spacing) if origin is None else origin
    j, i = np.meshgrid(np.arange(shape[1]), np.arange(shape[0]))
    nodes = np.stack([j, i], axis=-1) * spacing + origin
    image = sitk.GetImageFromArray((bent(nodes) - nodes).astype(np.float32), isVector=True)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if change:
        change(image)
    sitk.WriteImage(image, str(path))
    return path


class TestDisplacement:
    def test_what_is_written_is_read_to_a_256th_of_a_node(self, tmp_path):
        d = field()
        path = tmp_path / "new" / "case1.npz"
        write_displacement(path, d)
        again = read_displacement(path)
        assert again.mpp == d.mpp
        assert again.vectors_um.shape == (23, 41, 2)
        assert np.abs(again.vectors_um - d.vectors_um).max() <= d.mpp / 512
        assert names(path.parent) == {"case1.npz"}

    def test_the_same_displacement_gives_the_same_bytes(self, tmp_path):
        a, b = tmp_path / "a.npz", tmp_path / "b.npz"
        write_displacement(a, field())
        write_displacement(b, read_displacement(a))
        assert a.read_bytes() == b.read_bytes()

    def test_no_map_is_written_as_one(self, tmp_path):
        write_displacement(tmp_path / "none.npz", none())
        assert read_displacement(tmp_path / "none.npz").empty

    @pytest.mark.parametrize("suffix", ["mha", "nii.gz", "nrrd"])
    def test_an_itk_image_is_read_in_um(self, tmp_path, suffix):
        d = read_displacement(itk(tmp_path / f"own.{suffix}"))
        np.testing.assert_allclose(d.vectors_um, field().vectors_um, atol=1e-4)
        assert d.mpp == pytest.approx(6)

    @pytest.mark.parametrize(
        ("spacing", "origin"),
        [((6.0, 6.0), (31.0, 12.0)), ((6.0, 6.0), (-20.0, -9.0)), ((6.0, 4.0), (3.0, 2.0))],
        ids=["cropped", "wider", "unequal spacing"],
    )
    def test_origin_and_spacing_are_heeded(self, tmp_path, spacing, origin):
        d = read_displacement(itk(tmp_path / "own.mha", spacing=spacing, origin=origin))
        rng = np.random.default_rng(4)
        points = np.array(origin) + rng.uniform(0, 1, (200, 2)) * np.array(spacing) * (40, 22)
        points = points[(points > 0).all(axis=1)]
        assert len(points) > 100
        assert d.mpp == pytest.approx(min(spacing))
        np.testing.assert_allclose(map_points(d, points), bent(points), atol=0.01)

    def test_an_origin_nobody_set_is_told(self, tmp_path, caplog):
        read_displacement(itk(tmp_path / "own.mha", origin=(0.0, 0.0)))
        assert "half its spacing" in caplog.text

    def test_the_field_of_deeperhistreg_is_recognised(self, tmp_path):
        path = tmp_path / "displacement_field.mha"
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 23, 41), np.float32)), str(path))
        with pytest.raises(RegistrationError, match=r"41 x 23 x 2, as DeeperHistReg"):
            read_displacement(path)

    def test_a_turned_image_is_refused(self, tmp_path):
        path = itk(tmp_path / "own.mha", change=lambda image: image.SetDirection((0, 1, -1, 0)))
        with pytest.raises(RegistrationError, match="direction"):
            read_displacement(path)

    def test_a_scalar_image_is_refused(self, tmp_path):
        path = tmp_path / "own.mha"
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((23, 41), np.float32)), str(path))
        with pytest.raises(RegistrationError, match="1 components"):
            read_displacement(path)

    def test_vectors_that_are_no_numbers_are_refused(self, tmp_path):
        path = tmp_path / "own.mha"
        vectors = np.full((5, 7, 2), np.nan, np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(vectors, isVector=True), str(path))
        with pytest.raises(RegistrationError, match=r"own.mha: .*no numbers"):
            read_displacement(path)

    @pytest.mark.parametrize("name", ["own.npz", "own.mha"])
    def test_rubbish_is_one_line(self, tmp_path, name):
        path = tmp_path / name
        path.write_bytes(b"PK\x03\x04 rubbish")
        with pytest.raises(RegistrationError, match=name) as caught:
            read_displacement(path)
        assert "\n" not in str(caught.value)

    def test_a_damaged_archive_is_named_wherever_the_damage_is(self, tmp_path):
        write_displacement(tmp_path / "own.npz", field())
        whole = (tmp_path / "own.npz").read_bytes()
        rng = np.random.default_rng(20251)
        broken = [whole[:length] for length in rng.integers(1, len(whole), 40)]
        for start in (*range(160), *range(len(whole) - 400, len(whole) - 7)):
            broken.append(whole[:start] + rng.bytes(7) + whole[start + 7 :])
        refused = 0
        for data in broken:
            (tmp_path / "own.npz").write_bytes(data)
            try:
                read_displacement(tmp_path / "own.npz")
            except RegistrationError as error:
                refused += 1
                assert str(error).startswith("own.npz: ")
                assert ";" in str(error)
                assert "\n" not in str(error)
        assert refused > len(broken) / 2

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(RegistrationError, match="no such file"):
            read_displacement(tmp_path / "own.npz")

    def test_an_archive_of_something_else(self, tmp_path):
        np.savez(tmp_path / "own.npz", field=np.zeros(3))
        with pytest.raises(RegistrationError, match="lacks vectors_um and mpp"):
            read_displacement(tmp_path / "own.npz")
        np.savez(tmp_path / "own.npz", vectors_um=np.zeros((4, 5)), mpp=1.0)
        with pytest.raises(RegistrationError, match=r"own.npz: .*shape"):
            read_displacement(tmp_path / "own.npz")
