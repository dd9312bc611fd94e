import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hemera.__main__ import INTERRUPTED, main
from hemera.interop import exports
from tests.interop.test_exports import accepted, content, index, write

__all__ = ["index"]

FORMATS = ("webdataset", "huggingface", "aligned")


def run(index, kind, output, *words):
    return main(["export", kind, str(output), "--index", str(index), *words])


@pytest.mark.parametrize("kind", FORMATS)
def test_command_and_library_write_the_same_bytes(index, tmp_path, kind, capsys):
    assert run(index, kind, tmp_path / "out", "--split", "train") == 0
    assert "3 tiles (train 3)" in capsys.readouterr().out
    expected = content(write(kind, index, tmp_path / "expected", split="train"))
    assert content(tmp_path / "out") == expected


def test_a_folder_with_content_is_not_changed(index, tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert run(index, "aligned", out) == 1
    assert "out: is not empty; name a new folder" in caplog.text
    assert content(out).keys() == {"thesis.tex"}
    assert run(index, "aligned", out / "thesis.tex") == 1
    assert "is a file; name a new folder" in caplog.text
    assert run(index, "aligned", out / "thesis.tex" / "in") == 1


def test_new_empty_and_linked_folders_are_filled(index, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("empty", "deep/er", "link"):
        assert run(index, "webdataset", tmp_path / name) == 0
        assert (tmp_path / name / "README.md").is_file()
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interrupted_or_failed_export_leaves_nothing(index, tmp_path, kind, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exports, "_write_card", interrupt)
    assert run(index, kind, tmp_path / "out", "--split", "train") == INTERRUPTED
    shard = index.parent.parent / "tile" / "unit.tar"
    shard.write_bytes(shard.read_bytes()[: accepted(index, "test")[-1]["her2_offset"]])
    assert run(index, kind, tmp_path / "out", "--split", "test") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_a_file_that_is_no_index_is_an_error(tmp_path, caplog):
    assert run(tmp_path / "none.parquet", "aligned", tmp_path / "out") == 1
    assert (
        "none.parquet: no such file; give --index, or run `snakemake --cores all data`"
        in caplog.text
    )
    pq.write_table(pa.table({"tile": ["a"]}), tmp_path / "other.parquet")
    assert run(tmp_path / "other.parquet", "aligned", tmp_path / "out") == 1
    assert "other.parquet: its metadata lacks" in caplog.text
