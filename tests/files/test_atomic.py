"""Writing in one step: a reader sees the old file or the whole new one."""

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from hemera.files.atomic import replacing, write_bytes


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


def test_a_reader_sees_whole_files_while_writers_race(tmp_path: Path) -> None:
    path = tmp_path / "race.bin"
    contents = [bytes([65 + k]) * 200_000 for k in range(2)]
    write_bytes(path, contents[0])
    with ThreadPoolExecutor(2) as pool:
        writes = [pool.submit(write_bytes, path, data) for data in contents * 20]
        while wait(writes, timeout=0).not_done:
            assert path.read_bytes() in contents
    assert [write.exception() for write in writes] == [None] * 40
    assert path.read_bytes() in contents
    assert names(tmp_path) == {"race.bin"}


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path):
    left = [".bci.000.0123abcd.tar", ".bci.000.deadbeef.tar"]
    others = [".bci.001.0123abcd.tar", ".bci.000.0123abcd.parquet", ".bci.000.tar", "bci.000.x.tar"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    with replacing(tmp_path / "bci.000.tar") as temporary:
        temporary.write_bytes(b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"bci.000.tar", *others}
