import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hemera.dataset.queries import select
from hemera.errors import ConfigError, ShardError


@pytest.fixture
def index(tmp_path):
    """Nine rows: what they are can be told from their names."""
    path = tmp_path / "index.parquet"
    table = pa.table(
        {
            "tile": ["a", "b", "c", "d", "e", "f", "g", "h", "i"],
            "dataset": ["bci"] * 4 + ["mist"] * 5,
            "score": ["3+", "1+", "", "3+", "0", "3+", "3+", "2+", "3+"],
            "he_sharpness": [10.0, 20.0, 30.0, 40.0, 50.0, None, 70.0, 80.0, 90.0],
            "accepted": [True, True, False, True, True, True, False, True, True],
            "split": ["train", "train", "train", "val", "test", "train", "val", "val", "test"],
            "generation_split": ["train", None, None, "val", "test", "train", None, None, "val"],
        }
    )
    pq.write_table(table, path)
    return path


def names(index, **conditions):
    return "".join(select(index, ["tile"], **conditions).column("tile").to_pylist())


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, "abdefhi"),
        ({"refused": True}, "abcdefghi"),
        ({"split": "train"}, "abf"),
        ({"split": "val", "refused": True}, "dgh"),
        ({"network": "generation"}, "adefi"),
        ({"network": "generation", "split": "val"}, "di"),
        ({"where": "score == '3+'"}, "adfi"),
        ({"where": "score == '3+'", "refused": True}, "adfgi"),
        ({"where": pc.field("score") == "3+"}, "adfi"),
        ({"where": "dataset == 'mist' and he_sharpness > 45"}, "ehi"),
        ({"where": (pc.field("dataset") == "mist") & (pc.field("he_sharpness") > 45)}, "ehi"),
        ({"where": "he_sharpness.isna()"}, "f"),
        ({"where": "not accepted", "refused": True}, "cg"),
        ({"where": "score in ['0', '2+'] or tile.str.startswith('a')"}, "aeh"),
        ({"where": "`split` != generation_split"}, "bhi"),
        ({"where": "score == '9'"}, ""),
        ({"where": "score == '3+'", "network": "generation", "split": "val"}, "di"),
        ({"where": pc.field("score") == "3+", "split": "test"}, "i"),
    ],
)
def test_rows_are_chosen_by_words_expressions_and_parts(index, conditions, expected):
    assert names(index, **conditions) == expected


def test_columns_come_as_asked_and_no_others(index):
    found = select(index, ["score", "tile"], where="he_sharpness < 25", split="train")
    assert found.column_names == ["score", "tile"]
    assert found.to_pylist() == [{"score": "3+", "tile": "a"}, {"score": "1+", "tile": "b"}]


@pytest.mark.parametrize(
    "where",
    [
        "colour == 'red'",
        "score ==",
        "score",
        "he_sharpness + 1",
        "True",
        "1 == 1",
        "he_sharpness > 'much'",
        "@secret > 1",
        "new = he_sharpness > 1",
        "__import__('os').system('true')",
        "tile.nothing()",
        "he_sharpness > 1\nscore == '3+'",
        "",
        pc.field("colour") == "red",
        pc.field("score"),
        pc.field("score") > 3,
    ],
)
def test_what_cannot_be_asked_is_one_line_with_a_remedy(index, where):
    with pytest.raises(ConfigError, match=r"^where: .*; .*") as found:
        select(index, ["tile"], where=where)
    assert "\n" not in str(found.value)


def test_selecting_from_what_is_no_index(index, tmp_path):
    with pytest.raises(ShardError, match="not an index"):
        select(tmp_path / "none.parquet", ["tile"])
    (tmp_path / "broken.parquet").write_bytes(index.read_bytes()[:300])
    with pytest.raises(ShardError, match="not an index"):
        select(tmp_path / "broken.parquet", ["tile"])
    with pytest.raises(ShardError, match="no column status_split; name a network"):
        select(index, ["tile"], network="status", split="train")
    with pytest.raises(ConfigError, match="split: 'validation' is unknown; choose from train, val"):
        select(index, ["tile"], split="validation")


def test_an_empty_index_has_no_rows(index, tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(index).slice(0, 0), empty)
    assert names(empty) == names(empty, where="score == '3+'", split="train") == ""
