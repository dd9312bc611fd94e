import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hemera.dataset.index import TileIndex, TrainingTiles, training_tiles
from hemera.errors import ConfigError, ShardError, TrainingError
from tests.small_index import write_index


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
    return "".join(TileIndex(index).select(["tile"], **conditions).column("tile").to_pylist())


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
        ({"where": "dataset == 'mist' and he_sharpness > 45"}, "ehi"),
        ({"where": "he_sharpness.isna()"}, "f"),
        ({"where": "not accepted", "refused": True}, "cg"),
        ({"where": "score in ['0', '2+'] or tile.str.startswith('a')"}, "aeh"),
        ({"where": "`split` != generation_split"}, "bhi"),
        ({"where": "score == '9'"}, ""),
        ({"where": "score == '3+'", "network": "generation", "split": "val"}, "di"),
    ],
)
def test_rows_are_chosen_by_words_expressions_and_parts(index, conditions, expected):
    assert names(index, **conditions) == expected


def test_an_empty_index_has_no_rows(index, tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(index).slice(0, 0), empty)
    assert names(empty) == names(empty, where="score == '3+'", split="train") == ""


def test_columns_come_as_asked_and_no_others(index):
    found = TileIndex(index).select(["score", "tile"], where="he_sharpness < 25", split="train")
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
    ],
)
def test_what_cannot_be_asked_is_one_line_with_a_remedy(index, where):
    with pytest.raises(ConfigError, match=r"^where: .*; .*") as found:
        TileIndex(index).select(["tile"], where=where)
    assert "\n" not in str(found.value)


def test_selecting_from_what_is_no_index(index, tmp_path):
    with pytest.raises(ShardError, match="not an index"):
        TileIndex(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(index.read_bytes()[:300])
    with pytest.raises(ShardError, match="not an index"):
        TileIndex(tmp_path / "broken.parquet")
    with pytest.raises(ShardError, match="no column status_split; name a network"):
        TileIndex(index).select(["tile"], network="status", split="train")
    with pytest.raises(ConfigError, match="split: 'validation' is unknown; choose from train, val"):
        TileIndex(index).select(["tile"], split="validation")


def test_metadata_name_fingerprint_and_mask_engine(index, tmp_path):
    with pytest.raises(ShardError, match=r"metadata lacks fingerprint; run the stage index"):
        _ = TileIndex(index).fingerprint
    own = TileIndex(write_index(tmp_path / "results"))
    assert (own.fingerprint, own.mask_target) == ("f" * 64, "stain")
    assert set(own.metadata) == {"fingerprint", "mask_target", "options_mask"}


def test_facts_of_a_split_by_tile(tmp_path):
    found = TileIndex(write_index(tmp_path, train=1, val=2, test=1)).facts("generation", "val")
    assert found == {
        f"pair{number}_000000_{number:06d}": {
            "tile": f"pair{number}_000000_{number:06d}", "case": f"case{number}", "dataset": "bci",
            "score": score, "mpp": 0.5,
        }
        for number, score in ((1, "3+"), (2, "1+"))
    }  # fmt: skip


def test_training_tiles_of_a_network(tmp_path):
    index = TileIndex(write_index(tmp_path, train=2, val=1))
    tiles = [f"pair{number}_000000_{number:06d}" for number in range(3)]
    assert training_tiles(index, "generation") == TrainingTiles(
        "f" * 64, "stain", tuple(tiles[:2]), tuple(tiles[2:]), 0.5, 0.5, 256
    )
    with pytest.raises(TrainingError, match=r"pair0_.*: 256 px is smaller than crop_px 512"):
        training_tiles(index, "generation", crop_px=512)


def test_an_empty_subset_is_an_error_with_a_remedy(tmp_path):
    index = write_index(tmp_path, train=0)
    with pytest.raises(TrainingError, match=r"index: no tiles for training of generation;.*loosen"):
        training_tiles(TileIndex(index), "generation")
    index = write_index(tmp_path, val=0)
    with pytest.raises(TrainingError, match=r"no tiles for validation of segmentation"):
        training_tiles(TileIndex(index), "segmentation")
