"""Copies on a disk of the node."""

from pathlib import Path

import pytest

from hemera.files.staging import local_copies


def test_copies_have_names_and_bytes_of_the_files(tmp_path: Path) -> None:
    """Two files of one name, one of them a slide with a folder of data."""
    for side in ("he", "her2"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "7.mrxs").write_text(side)
    (tmp_path / "he" / "7").mkdir()
    (tmp_path / "he" / "7" / "Data0000.dat").write_text("data")
    paths = {side: tmp_path / side / "7.mrxs" for side in ("he", "her2")}
    node = tmp_path / "node"
    with local_copies(paths, node) as copies:
        assert {side: path.read_text() for side, path in copies.items()} == {
            "he": "he", "her2": "her2",
        }  # fmt: skip
        assert all(node in path.parents and path.name == "7.mrxs" for path in copies.values())
        assert (copies["he"].with_suffix("") / "Data0000.dat").read_text() == "data"
    assert list(node.iterdir()) == []
    assert all(path.is_file() for path in paths.values())


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("a")
    paths = {name: tmp_path / f"{name}.tif" for name in "ab"}
    with pytest.raises(OSError, match=r"b\.tif"), local_copies(paths, tmp_path / "node"):
        pass
    assert list((tmp_path / "node").iterdir()) == []


def test_without_a_folder_the_files_themselves_are_read(tmp_path: Path) -> None:
    paths = {"he": tmp_path / "a.tif"}
    with local_copies(paths, None) as found:
        assert found == paths
