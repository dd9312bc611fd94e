"""Stage index: splits, the subsets of both networks, fingerprint, audit and card."""

import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hemera import tables
from hemera.__main__ import main
from hemera.config import FilterOptions, IndexOptions
from hemera.config.base import flags
from hemera.dataset.fingerprint import fingerprint
from hemera.dataset.subsets import NETWORKS
from hemera.errors import TableError
from hemera.sheet import SPLITS, write_rows
from hemera.stages import index
from tests.command_line import words
from tests.small_tables import digest, tile_row

GOLDEN = {3: "2257625208f8db77"}
ENGINES = ("stain",)
ALL = IndexOptions(
    target="stain",
    generation_test_datasets=("bci",),
    **{f"{network}_{split}": None for network in NETWORKS for split in SPLITS},
)
SCORES = ("0", "1+", "2+", "3+")


def pairs(bci: int = 20, bci_test: int = 4, acrobat: int = 10) -> list[dict[str, str]]:
    rows = []
    for number in range(bci + bci_test):
        split = "train" if number < bci else "test"
        name = f"bci_{split}_{number:05d}"
        rows.append({
            "pair": name, "case": name, "dataset": "bci", "registered": "true",
            "he": f"HE/{name}.png", "her2": f"IHC/{name}.png",
            "split": "test" if split == "test" else "", "score": SCORES[number % 4],
        })  # fmt: skip
    for number in range(acrobat):
        # Two slides of one patient, so that a case is more than a pair.
        rows.append({
            "pair": f"slide{number}", "case": f"patient{number // 2}", "dataset": "acrobat",
            "he": f"{number}_HE.tif", "her2": f"{number}_HER2.tif",
        })  # fmt: skip
    return rows


def tile(pair: dict[str, str], number: int, **values: Any) -> dict[str, Any]:
    """Return the row of a tile with one mask, as filter writes it."""
    bci = pair["dataset"] == "bci"
    row = tile_row(pair["pair"], number, mpp=0.46 if bci else 0.92)
    statistics = {
        f"stain_{name}": 2 if name.endswith("cells") else 0.5 for name in tables.MASK_STATISTICS
    }
    return {
        **row, **statistics,
        "registration_error_um": None if number % 2 else 1.5,
        "stain_shard": f"mask/{pair['pair']}.tar", "stain_offset": 512, "stain_length": 50,
        "stain_sha256": digest(f"mask {row['tile']}"),
        "dataset": pair["dataset"], "score": pair.get("score", ""),
        "registration": "registered" if bci else "pass",
        "accepted": True, "reason": None, **values,
    }  # fmt: skip


def refused(pair: dict[str, str], number: int, reason: str = "low_tissue") -> dict[str, Any]:
    return tile(pair, number, accepted=False, reason=reason)


class Made:
    """One run of the stage and what it left."""

    def __init__(
        self,
        folder: Path,
        rows: list[dict[str, str]],
        tiles: list[dict[str, Any]],
        options: IndexOptions = ALL,
        provenance: FilterOptions | None = None,
    ) -> None:
        """Write sheet and table, run, read."""
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = {
            "sheet": folder / "pairs.tsv", "tiles": folder / "tiles.parquet", "engines": ENGINES,
            "index": folder / "index.parquet", "card": folder / "card.md",
        }  # fmt: skip
        self.index, self.card = self.paths["index"], self.paths["card"]
        (folder / "pairs.tsv").write_text(write_rows(rows))
        tables.write(
            folder / "tiles.parquet",
            sorted(tiles, key=lambda row: row["tile"]),
            tables.filtered(ENGINES),
            {**tables.provenance(provenance or FilterOptions()), "options_tile": "{}"},
        )
        index.run(**self.paths, options=options)
        self.table = tables.read(self.index, tables.index(ENGINES))
        self.metadata = tables.read_metadata(self.index)
        self.fingerprint = self.metadata["fingerprint"]

    def parts(self, network: str) -> dict[str | None, int]:
        return dict(collections.Counter(self.table[f"{network}_split"].to_pylist()))


def plain(rows: list[dict[str, str]], per_pair: int = 4) -> list[dict[str, Any]]:
    return [tile(row, number) for row in rows for number in range(per_pair)]


def test_subsets(tmp_path: Path) -> None:
    rows = pairs()
    made = Made(tmp_path, rows, [*plain(rows, 4), *(refused(row, 9) for row in rows)])
    for row in made.table.to_pylist():
        if not row["accepted"]:
            assert (row["generation_split"], row["segmentation_split"]) == (None, None)
        elif row["split"] == "test" and row["dataset"] == "acrobat":
            assert row["generation_split"] is None, "GenerationNet is tested on BCI alone"
            assert row["segmentation_split"] == "test"
        else:
            assert row["generation_split"] == row["segmentation_split"] == row["split"]


def test_subsets_of_a_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs()
    options = IndexOptions(
        target="stain",
        generation_train=11,
        generation_val=4,
        generation_test=9999,
        generation_test_datasets=("bci",),
        segmentation_train=42,
        segmentation_val=8,
        segmentation_test=2,
    )
    made = Made(tmp_path, rows, plain(rows), options)
    assert made.parts("generation") == {"train": 11, "val": 4, "test": 16, None: 105}
    assert made.parts("segmentation") == {"train": 42, "val": 8, "test": 2, None: 84}
    assert "generation test: 16 of 9999 requested tiles" in caplog.text
    for network in ("generation", "segmentation"):
        for row in made.table.to_pylist():
            assert row[f"{network}_split"] in (None, row["split"])


def test_the_mix_of_data_sets(tmp_path: Path) -> None:
    rows = pairs()
    options = IndexOptions(
        target="stain",
        generation_datasets=("bci",),
        segmentation_datasets=("acrobat",),
    )
    made = Made(tmp_path, rows, plain(rows), options)
    rows_of = made.table.to_pylist()
    trained = {row["dataset"] for row in rows_of if row["generation_split"] in ("train", "val")}
    assert trained == {"bci"}
    tested = {row["dataset"] for row in rows_of if row["generation_split"] == "test"}
    assert tested == {"acrobat", "bci"}, "by default all data sets of the test split"
    assert {row["dataset"] for row in rows_of if row["segmentation_split"]} == {"acrobat"}


def written_by_hand(made: Made) -> str:
    """The documented rule, followed without HEMERA's code."""
    names = [
        "tile", "case", "dataset", "split", "score", "x_px", "y_px", "her2_x_px", "her2_y_px",
        "size_px", "mpp", "he_mpp", "her2_mpp", "registration_error_um", "her2_coverage_fraction",
        "accepted", "reason", "generation_split", "segmentation_split",
        "he_sha256", "her2_sha256", "stain_sha256",
    ]  # fmt: skip
    lines = [json.dumps(names)]
    for row in sorted(made.table.to_pylist(), key=lambda row: row["tile"]):
        lines.append(json.dumps([row[name] for name in names]))
    return digest("\n".join(lines) + "\n")


def test_the_fingerprint_follows_its_rule(tmp_path: Path) -> None:
    rows = pairs()
    made = Made(tmp_path, rows, [*plain(rows), refused(rows[0], 9)])
    assert made.fingerprint == written_by_hand(made)
    assert made.fingerprint in made.card.read_text()
    shuffled = made.table.take(list(reversed(range(made.table.num_rows))))
    assert fingerprint(shuffled, ENGINES) == made.fingerprint


def test_the_fingerprint_knows_no_path_version_or_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pairs()
    base = Made(tmp_path / "a", rows, plain(rows)).fingerprint
    moved = [{**row, "he": f"else/{row['he']}", "her2": f"else/{row['her2']}"} for row in rows]
    assert Made(tmp_path / "b", moved, plain(rows)).fingerprint == base
    shards = [{**row, "shard": "x.tar", "he_offset": 5, "he_length": 6} for row in plain(rows)]
    assert Made(tmp_path / "c", rows, shards).fingerprint == base
    other = FilterOptions(he_sharpness_min=1.0)
    assert Made(tmp_path / "d", rows, plain(rows), provenance=other).fingerprint == base
    assert Made(tmp_path / "e", rows[::-1], plain(rows)).fingerprint == base
    monkeypatch.setattr(index, "_version", lambda package: "99")
    made = Made(tmp_path / "f", rows, plain(rows))
    assert made.fingerprint == base
    assert json.loads(made.metadata["versions"])["numpy"] == "99"


@pytest.mark.parametrize(
    "tiles",
    [
        lambda rows: [],
        lambda rows: [refused(row, number) for row in rows for number in range(3)],
    ],
    ids=["no tiles", "all refused"],
)
def test_zero_accepted_tiles(
    tmp_path: Path, tiles: Callable[[list[dict[str, str]]], list[dict[str, Any]]]
) -> None:
    rows = pairs()
    made = Made(tmp_path, rows, tiles(rows), IndexOptions(target="stain"))
    assert made.table.schema.equals(tables.index(ENGINES))
    assert made.fingerprint == written_by_hand(made)
    assert made.table["generation_split"].null_count == made.table.num_rows
    card = made.card.read_text()
    assert f"0 of {made.table.num_rows} tiles accepted, of 0 cases." in card
    assert "None." in card


def test_a_target_that_is_no_engine_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"index\.target: deepliif is not among the engines stain"):
        Made(tmp_path, pairs(), [], IndexOptions(target="deepliif"))
    assert not (tmp_path / "index.parquet").exists()


def test_two_scales(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs()
    made = Made(tmp_path / "a", rows, plain(rows))
    assert "acrobat 0.92, bci 0.46 um/px" in made.metadata["mixture"]
    assert "**Attention: tiles of different resolution" in made.card.read_text()
    assert "two scales" in caplog.text
    wide = IndexOptions(target="stain", mpp_tolerance=1.0)
    assert Made(tmp_path / "c", rows, plain(rows), wide).metadata["mixture"] == ""
    alone = pairs(acrobat=0)
    only_bci = [*plain(alone), *(refused(row, 0) for row in rows if row["dataset"] == "acrobat")]
    made = Made(tmp_path / "e", rows, only_bci)
    assert made.metadata["mixture"] == "", "tiles that nobody trains on mix nothing"
    within = [tile(alone[0], 9, mpp=0.23), *plain(alone)]
    assert "bci 0.23 to 0.46" in Made(tmp_path / "f", alone, within).metadata["mixture"]


def test_metadata_and_card(tmp_path: Path) -> None:
    rows = pairs()
    made = Made(tmp_path, rows, [*plain(rows), refused(rows[0], 9, "blurred_he")])
    assert json.loads(made.metadata["mask_engines"]) == ["stain"]
    assert made.metadata["mask_target"] == "stain"
    assert json.loads(made.metadata["options_index"])["seed"] == ALL.seed
    assert json.loads(made.metadata["options_filter"])["tissue_fraction_min"] == 0.5
    assert made.metadata["options_tile"] == "{}"
    licences = json.loads(made.metadata["licences"])
    assert [line.split(":")[0] for line in licences] == [
        "ACROBAT",
        "BCI",
        "registration by DeeperHistReg",
    ]
    card = made.card.read_text()
    assert "136 of 137 tiles accepted, of 29 cases." in card
    assert "| bci | 0 | blurred_he | 1 | 1 |" in card
    assert "| generation | test | all | 16 | 4 |" in card
    assert "136 of 136 accepted tiles have artefacts or places without image, 50 % of all" in card
    for name in ("Leakage", "Terms of use", "Software versions", "Options"):
        assert f"## {name}" in card
    assert str(tmp_path) not in card


def test_golden(tmp_path: Path) -> None:
    """Fails when what index adds changes and `IndexOptions.version` does not: raise it then."""
    rows = pairs()
    options = IndexOptions(
        target="stain",
        generation_train=15,
        generation_test_datasets=("bci",),
        segmentation_train=20,
        segmentation_val=5,
    )
    made = Made(tmp_path, rows, [*plain(rows), refused(rows[0], 9)], options)
    added = made.table.select(["tile", "case", "split", "generation_split", "segmentation_split"])
    text = json.dumps([added.to_pylist(), made.fingerprint])
    assert digest(text)[:16] == GOLDEN[IndexOptions.version]


def test_the_command_line_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = pairs()
    options = IndexOptions(
        target="stain",
        generation_train=15,
        segmentation_test=None,
        generation_datasets=("bci", "acrobat"),
        generation_test_datasets=("bci",),
    )
    made = Made(tmp_path, rows, plain(rows), options)
    others = {name: tmp_path / "cli" / made.paths[name].name for name in ("index", "card")}
    assert main(["index", *words(made.paths | others), *flags(options)]) == 0
    for path in (made.index, made.card):
        assert (tmp_path / "cli" / path.name).read_bytes() == path.read_bytes()
