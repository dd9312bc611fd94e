"""hemera status: the predictions of the workflow, for one slide alone."""

import json
import logging
import shutil

import numpy as np
import pytest
import shapely
import torch
from PIL import Image

from hemera import tables
from hemera.__main__ import main
from hemera.config import (
    METHODS,
    AggregateOptions,
    CasesOptions,
    DescribeOptions,
    EmbedOptions,
    TileOptions,
)
from hemera.files import layout
from hemera.inference.status import DISTANCE_MAX, distance
from hemera.networks.aggregators import MeanAggregator
from hemera.sheet import write_rows
from hemera.stages import aggregate, cases, describe, embed, tile
from hemera.training.aggregation import Fitted
from tests.small_networks import write_published
from tests.small_status import QUICK, run_method
from tests.small_units import tissue

UNIT = "d.001"
COLOURS = {
    "negative": ((235, 190, 215), (95, 60, 140)),
    "positive": ((225, 200, 225), (120, 60, 160)),
}
MPP = "0.5"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Results of 12 images of 300 x 420 px of two colours; the last two are of the test split."""
    folder = tmp_path_factory.mktemp("cohort")
    rng, rows = np.random.default_rng(7), []
    for number in range(12):
        status = ("negative", "positive")[number % 2]
        Image.fromarray(tissue(rng, 300, 420, COLOURS[status])).save(folder / f"{number}.png")
        rows.append({"pair": f"p{number}", "case": f"c{number}", "dataset": "d",
                     "he": f"{number}.png", "he_mpp": MPP, "status": status,
                     "score": "" if number % 3 else ("1+", "3+")[number % 2],
                     "split": "test" if number > 9 else ""})  # fmt: skip
    sheet, results = folder / "sheet.tsv", folder / "results"
    sheet.write_text(write_rows(rows))

    def path(pattern, **names):
        return layout.path(pattern, results, unit=UNIT, **names)

    of_unit = {"sheet": sheet, "unit": UNIT, "block_count": 1,
               "images_table": path(layout.IMAGES_TABLE)}  # fmt: skip
    describe.run(**of_unit, options=DescribeOptions())
    tile.run(
        **of_unit, shard=path(layout.TILE_SHARD), tiles=path(layout.TILES),
        pairs=path(layout.PAIRS), options=TileOptions(size_px=128),
    )  # fmt: skip
    listed = {"cases": path(layout.STATUS_CASES), "case_tiles": path(layout.STATUS_TILES)}
    cases.run(
        sheet=sheet, block_count=1, results=results, **listed,
        options=CasesOptions(folds=2, he_sharpness_min=0, min_tiles=1),
    )  # fmt: skip
    embed.run(
        tiles=path(layout.TILES), tile_shard=path(layout.TILE_SHARD),
        images_table=path(layout.IMAGES_TABLE), encoder="statistics",
        features=path(layout.FEATURES, encoder="statistics"), options=EmbedOptions(),
    )  # fmt: skip
    patterns = {
        "weights": layout.AGGREGATOR, "metadata": layout.AGGREGATOR_METADATA,
        "history": layout.AGGREGATOR_HISTORY, "predictions": layout.STATUS_PREDICTIONS,
        "contributions": layout.CONTRIBUTIONS,
    }  # fmt: skip
    for method in ("floor", "statistics_abmil"):
        aggregate.run(
            method=method, results=results, **listed,
            **{name: path(pattern, method=method) for name, pattern in patterns.items()},
            options=AggregateOptions(**{**QUICK, "seeds": 2, "shuffles": 0, **METHODS[method]}),
        )  # fmt: skip
    return folder


def of(folder, method="floor"):
    return folder / "results" / "aggregate" / method


def errors(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.parametrize("method", ["floor", "statistics_abmil"])
@pytest.mark.parametrize("number", [10, 11])
def test_a_case_of_the_test_split_has_the_prediction_of_the_workflow(
    cohort, tmp_path, caplog, method, number
):
    words = [str(cohort / f"{number}.png"), "--model", str(of(cohort, method)), "--mpp", MPP]
    assert main(["status", *words, "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / str(number) / f"{number}.json").read_text())
    table = tables.read(of(cohort, method) / "predictions.parquet", tables.STATUS_PREDICTIONS)
    (row,) = [row for row in table.to_pylist() if row["part"] == "test"
              and row["target"] == "status" and row["case"] == f"c{number}"]  # fmt: skip
    own = facts["status"]
    assert own["predicted"] == row["predicted"] == ("negative", "positive")[number % 2]
    for name in ("logit", "bias", "probability", "calibrated", "threshold"):
        assert own[name] == pytest.approx(row[name], abs=1e-9), name
    assert own["models"] == row["models"] == (2 if method == "floor" else 4)
    assert own["calibrated_low"] <= own["calibrated"] <= own["calibrated_high"]
    assert own["folds"] == 2
    document = json.loads((tmp_path / str(number) / f"{number}.contributions.geojson").read_text())
    parts = [feature["properties"]["measurements"] for feature in document["features"]]
    total = sum(part["sum of contributions"] for part in parts)
    assert total + own["bias"] == pytest.approx(own["logit"], abs=1e-5)
    assert sum(part["views"] for part in parts) == facts["tiles"]["views"] > 4
    area = sum(shapely.geometry.shape(each["geometry"]).area for each in document["features"])
    assert area == pytest.approx(64**2 * facts["tiles"]["views"])
    bounds = shapely.total_bounds([shapely.geometry.shape(each["geometry"])
                                   for each in document["features"]])  # fmt: skip
    assert min(bounds) >= 0 and bounds[2] <= 420 and bounds[3] <= 300
    overlay = Image.open(tmp_path / str(number) / f"{number}.overlay.png")
    assert overlay.size == (420, 300)
    # The options of this test are smaller than those of the demo, and labelled like it.
    assert facts["model"]["demo_sizes"]
    assert "a network of demo sizes; not meaningful for HER2" in caplog.text
    assert facts["distance"] < DISTANCE_MAX and "standard deviations" not in caplog.text


@pytest.mark.parametrize("method", ["floor", "statistics_abmil"])
def test_a_slide_unlike_those_of_the_training_is_named(cohort, tmp_path, caplog, method):
    noise = tmp_path / "noise.png"
    pixels = np.random.default_rng(8).integers(0, 256, (300, 420, 3), np.uint8)
    Image.fromarray(pixels).save(noise)
    words = [str(noise), "--model", str(of(cohort, method)), "--mpp", MPP]
    assert main(["status", *words, "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "noise" / "noise.json").read_text())
    assert facts["distance"] > DISTANCE_MAX
    assert "noise.png: its features are " in caplog.text


def test_distance_is_in_standard_deviations():
    net = MeanAggregator(3, "status")
    # Means 1, 2, 3 and deviations 0.5, 2 and 0: the last feature is constant and not counted.
    net.fit_scale(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 0.0]))
    views = torch.tensor([[3.0, 2.0, 9.0], [2.0, 10.0, 9.0]])  # means 2.5 and 6: 3 and 2 away
    assert distance(Fitted(net, 0.5, 1.0, []), views) == pytest.approx(np.sqrt((9 + 4) / 2))


def test_a_published_encoder(cohort, tmp_path, caplog):
    """Method foundation, with a tiny network of random weights in a folder as the Hub has them."""
    net = tmp_path / "net"
    write_published(net)
    results, of_cohort = tmp_path / "results", cohort / "results"
    shutil.copytree(of_cohort / "cases", results / "cases")

    def path(pattern, **names):
        return layout.path(pattern, results, unit=UNIT, **names)

    embed.run(
        tiles=layout.path(layout.TILES, of_cohort, unit=UNIT),
        tile_shard=layout.path(layout.TILE_SHARD, of_cohort, unit=UNIT),
        images_table=layout.path(layout.IMAGES_TABLE, of_cohort, unit=UNIT),
        encoder="tiny", features=path(layout.FEATURES, encoder="tiny"),
        options=EmbedOptions(weights=(f"tiny={net}",), device="cpu"),
    )  # fmt: skip
    run_method(results, "foundation", encoder="tiny", shuffles=0)
    model = results / "aggregate" / "foundation"
    table = tables.read(model / "predictions.parquet", tables.STATUS_PREDICTIONS).to_pylist()
    (row,) = [row for row in table if (row["part"], row["target"], row["case"])
              == ("test", "status", "c10")]  # fmt: skip
    words = [str(cohort / "10.png"), "--model", str(model), "--mpp", MPP, "--device", "cpu"]
    assert main(["status", *words, "--out", str(tmp_path / "a")]) == 0
    net.rename(tmp_path / "moved")
    assert main(["status", *words, "--out", str(tmp_path / "b")]) == 1
    moved = ["--weights", str(tmp_path / "moved")]
    assert main(["status", *words, "--out", str(tmp_path / "b"), *moved]) == 0
    found = [json.loads((tmp_path / name / "10" / "10.json").read_text()) for name in "ab"]
    assert found[0] == found[1]
    assert found[0]["status"]["logit"] == pytest.approx(row["logit"], abs=1e-3)
    assert "does not exist" in errors(caplog)[0]


def damaged(cohort, folder, change):
    """A copy of the floor whose metadata are changed."""
    shutil.copytree(of(cohort), folder)
    path = folder / "metadata.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: own.update(encoder="cells"), "a rule without models"),
        (lambda own: own["stages"].pop("tile"), "lacks the options of its tiles"),
        (lambda own: own.update(encoder_sha256="other"), "its weights have the SHA-256"),
        (lambda own: own.update(weights_sha256="0"), "differs from its SHA-256"),
        (lambda own: own.update(runs=[]), "no model of the status was trained"),
        (lambda own: own.update(features=3), "does not fit the network"),
        (lambda own: own.update(network="segmentation"), "does not describe a network"),
        (lambda own: own.update(encoder="uni2_h"), "no weights of encoder uni2_h"),
    ],
)
def test_models_that_cannot_be_used(cohort, tmp_path, caplog, change, said):
    model = damaged(cohort, tmp_path / "model", change)
    words = [str(cohort / "10.png"), "--model", str(model), "--mpp", MPP]
    assert main(["status", *words, "--out", str(tmp_path / "out")]) == 1
    (line,) = errors(caplog)
    assert said in line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_slide_of_the_training_is_refused(cohort, tmp_path, caplog):
    words = ["--model", str(of(cohort)), "--out", str(tmp_path), "--mpp", MPP]
    copy = tmp_path / "renamed.png"
    shutil.copy(cohort / "3.png", copy)
    assert main(["status", str(copy), *words]) == 1
    (line,) = errors(caplog)
    assert line.startswith("renamed.png: is of case c3, which these models were trained on; ")


def test_slides_that_have_no_status(cohort, tmp_path, caplog):
    white = tmp_path / "white.png"
    Image.fromarray(np.full((300, 420, 3), 245, np.uint8)).save(white)
    words = ["--model", str(of(cohort)), "--out", str(tmp_path / "out")]
    assert main(["status", str(white), "--mpp", MPP, *words]) == 1
    assert main(["status", str(cohort / "10.png"), *words]) == 1
    assert main(["status", str(tmp_path / "none.png"), "--mpp", MPP, *words]) == 1
    assert main(["status", str(white), "--mpp", MPP, "--model", str(tmp_path / "none")]) == 1
    assert main(["status", str(cohort / "10.png"), "--mpp", "0.6", *words]) == 1
    brown, stated = tmp_path / "brown.png", ["--mpp", MPP]
    pixels = tissue(np.random.default_rng(1), 300, 420, ((205, 190, 175), (110, 80, 60)))
    Image.fromarray(pixels).save(brown)
    assert main(["status", str(brown), *stated, *words]) == 1
    assert main(["status", str(brown), *stated, *words, "--any-stain"]) == 0
    nothing, no_mpp, no_file, no_model, other, stain = errors(caplog)
    assert stain.startswith("brown.png: has no eosin and is IHC by its colours; give the H&E slide")
    assert "its tiles have 0.6 um/px, and those of the training 0.5" in other
    assert nothing.startswith("white.png: no tile for a status: ")
    assert "give --mpp" in no_mpp
    assert "none.png" in no_file
    assert "none/weights.safetensors: no such file; name a folder such as" in no_model
