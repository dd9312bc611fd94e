import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import TrainingError
from hemera.evaluation import image_quality, perceptual
from hemera.evaluation.metrics import Confusion
from hemera.masks import label_format
from hemera.networks import storage
from hemera.stages import evaluate
from tests.small_index import write_index
from tests.small_judges import write_alexnet, write_inception
from tests.small_networks import write_networks

OPTIONS = EvaluateOptions(device="cpu", torch_threads=1, batch_size=2, gallery_tiles=3)
GENERATION = ("model", "mean_colour", "blurred")

GOLDEN = {
    3: {
        ("generation", "model", "psnr_db", "mean"): 8.3407,
        ("generation", "model", "ssim", "mean"): 0.58276,
        ("generation", "mean_colour", "psnr_db", "mean"): 15.864,
        ("generation", "blurred", "psnr_db", "mean"): 17.664,
        ("generation", "blurred", "ssim_gaussian", "mean"): 0.63852,
        ("segmentation", "all_positive", "f1", "pooled"): 0.11502,
        ("segmentation", "all_positive", "iou", "mean"): 0.06102,
        ("segmentation", "all_negative", "f1", "mean"): 0.5,
        ("segmentation", "best_constant", "f1", "mean_nonempty"): 0.21753,
    }
}
"""Values over all test tiles, by version: processors differ in the last bits, not in these."""


def outputs(folder):
    return {
        "tiles": folder / "tiles.parquet",
        "metrics": folder / "metrics.parquet",
        "page": folder / "evaluate" / "evaluate.html",
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    index = write_index(folder / "results")
    report = folder / "report" / "report.html"
    return {"index": index, "report": report, "preset": "demo", **write_networks(folder)}


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    evaluate.run(**given, options=OPTIONS, **outputs(folder))
    return folder


@pytest.fixture(scope="module")
def rows(done):
    return tables.read(done / "tiles.parquet", tables.EVALUATION_TILES).to_pylist()


@pytest.fixture(scope="module")
def values(done):
    table = tables.read(done / "metrics.parquet", tables.METRICS).to_pylist()
    return {
        (row["network"], row["method"], row["group"], row["metric"], row["aggregation"]): row
        for row in table
    }


def test_golden(values):
    expected = GOLDEN[EvaluateOptions.version]
    found = {key: values[*key[:2], "all", *key[2:]]["value"] for key in expected}
    assert found == pytest.approx(expected, rel=2e-3), (
        "the same networks give other metrics: raise EvaluateOptions.version"
    )


def test_every_test_tile_has_a_row_for_every_method(rows):
    assert len(rows) == 2 * 3 + 2 * 3
    assert {row["tile"] for row in rows} == {"pair5_000000_000005", "pair6_000000_000006"}
    assert {(row["network"], row["method"]) for row in rows} == {
        ("generation", "model"), ("generation", "mean_colour"), ("generation", "blurred"),
        ("segmentation", "model"), ("segmentation", "all_positive"),
        ("segmentation", "all_negative"),
    }  # fmt: skip


def test_the_rows_hold_what_the_networks_answer(given, rows):
    tiles = TileDataset(given["index"], network="generation", split="test", engine="stain")
    painter, _ = storage.load_generation(given["generator"], given["generator_metadata"])
    finder, _ = storage.load_segmentation(given["segmenter"], given["segmenter_metadata"])
    found = {(row["tile"], row["network"]): row for row in rows if row["method"] == "model"}
    for item in (tiles.stored(0), tiles.stored(1)):
        image = torch.from_numpy(item["he"]).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            painted = painter(image / 127.5 - 1)[0].permute(1, 2, 0).numpy()
            positive = (finder(image / 255)[0, 0] >= 0).numpy()
        painted = ((painted + 1) / 2 * 255).astype(np.uint8)
        row = found[item["tile"], "generation"]
        psnr = peak_signal_noise_ratio(item["her2"], painted, data_range=255)
        assert row["psnr_db"] == pytest.approx(psnr, abs=0.01)
        ssim = structural_similarity(item["her2"], painted, channel_axis=-1, data_range=255)
        assert row["ssim"] == pytest.approx(ssim, abs=0.001)
        row = found[item["tile"], "segmentation"]
        truth = label_format.positive(item["mask"])
        hits = np.count_nonzero(positive & truth)
        assert row["true_positive_px"] == pytest.approx(hits, abs=5)
        assert sum(row[name] for name in image_quality.COUNTS) == truth.size


def test_trivial_baselines_by_hand(given, rows):
    train = TileDataset(given["index"], network="generation", split="train", engine="stain")
    her2 = np.concatenate([train.stored(i)["her2"].reshape(-1, 3) for i in range(3)]).astype(float)
    soft = np.concatenate(
        [
            cv2.GaussianBlur(train.stored(i)["he"].astype(float), (0, 0), 8).reshape(-1, 3)
            for i in range(3)
        ]
    )
    item = TileDataset(given["index"], network="generation", split="test").stored(1)
    flat = np.ones(item["he"].shape) * np.round(her2.mean(0))
    image = cv2.GaussianBlur(item["he"].astype(float), (0, 0), 8)
    image = (image - soft.mean(0)) / soft.std(0) * her2.std(0) + her2.mean(0)
    found = {
        row["method"]: row["psnr_db"]
        for row in rows
        if row["tile"] == item["tile"] and row["network"] == "generation"
    }
    for method, expected in (("mean_colour", flat), ("blurred", np.clip(image, 0, 255))):
        psnr = peak_signal_noise_ratio(item["her2"].astype(float), expected, data_range=255)
        assert found[method] == pytest.approx(psnr, abs=0.02)


def test_constants_and_their_better_one(values, rows):
    def value(method, metric, aggregation):
        return values["segmentation", method, "all", metric, aggregation]["value"]

    positive = [row for row in rows if row["method"] == "all_positive"]
    hits = sum(row["true_positive_px"] for row in positive)
    pixels = hits + sum(row["false_positive_px"] for row in positive)
    share = hits / pixels
    assert 0 < share < 1
    assert value("all_positive", "precision", "pooled") == pytest.approx(share)
    assert value("all_positive", "recall", "pooled") == 1
    assert value("all_positive", "f1", "pooled") == pytest.approx(2 * share / (1 + share))
    assert value("all_negative", "f1", "pooled") == 0
    # The first test tile has no positive pixel: silence is right there, and wrong on the second.
    assert value("all_negative", "f1", "mean") == pytest.approx(0.5)
    for metric in ("f1", "iou"):
        for aggregation in ("mean", "pooled", "mean_nonempty"):
            assert value("best_constant", metric, aggregation) == max(
                value("all_positive", metric, aggregation),
                value("all_negative", metric, aggregation),
            )


def test_groups_are_all_dataset_score_and_case(values):
    groups = {key[2] for key in values}
    assert groups == {"all", "dataset=bci", "score=3+", "score=1+", "case=case5", "case=case6"}
    row = values["generation", "model", "case=case6", "ssim", "mean"]
    assert row["tiles"] == 1
    assert row["deviation"] == 0
    assert values["segmentation", "model", "case=case5", "f1", "mean_nonempty"]["value"] is None


def test_intervals_are_drawn_over_cases_where_there_are_two(values, rows):
    row = values["generation", "model", "all", "ssim", "mean"]
    each = sorted(
        row["ssim"] for row in rows if row["network"] == "generation" and row["method"] == "model"
    )
    assert (row["low"], row["high"]) == pytest.approx(each), "one case or the other alone"
    row = values["segmentation", "all_positive", "all", "f1", "pooled"]
    assert row["low"] == 0 < row["value"] < row["high"]
    assert (
        values["segmentation", "best_constant", "all", "f1", "pooled"] | {"method": "all_positive"}
        == row
    )
    for key, row in values.items():
        if key[2] != "all" and key[2] != "dataset=bci":
            assert row["low"] is None and row["high"] is None, "of one case"


def test_without_weights_no_distance_is_measured_and_the_page_says_so(values, rows, done):
    assert all(row["lpips"] is None for row in rows)
    assert not {key for key in values if key[3] in ("lpips", "fid", "kid")}
    page = (done / "evaluate" / "evaluate.html").read_text()
    assert "FID and KID are not measured: evaluate.fid_weights names no file" in page
    assert "LPIPS is not measured: evaluate.lpips_weights names no file" in page


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {
        "fid_weights": str(write_inception(folder / "inception.pth")),
        "lpips_weights": str(write_alexnet(folder / "alexnet.pth")),
    }


@pytest.fixture(scope="module")
def judged(given, weights, tmp_path_factory):
    """The same networks on four test tiles of four cases, with every judge."""
    folder = tmp_path_factory.mktemp("judged")
    index = write_index(folder / "results", test=4)
    options = OPTIONS.replace(batch_size=3, **weights)
    evaluate.run(**(given | {"index": index}), options=options, **outputs(folder))
    return index, folder


def test_networks_and_baselines_are_judged_by_features(given, weights, judged):
    index, folder = judged
    table = tables.read(folder / "metrics.parquet", tables.METRICS).to_pylist()
    found = {(row["method"], row["group"], row["metric"]): row for row in table}
    inception = perceptual.Inception(Path(weights["fid_weights"]), torch.device("cpu"))
    painter, _ = storage.load_generation(given["generator"], given["generator_metadata"])
    tiles = TileDataset(index, network="generation", split="test", engine="stain")
    real, painted = [], []
    for place in range(4):
        item = tiles.stored(place)
        image = torch.from_numpy(item["he"]).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            answer = painter(image / 127.5 - 1)[0].permute(1, 2, 0).numpy()
        real.append(inception(item["her2"][None])[0])
        painted.append(inception(((answer + 1) / 2 * 255).astype(np.uint8)[None])[0])
    statistics = [
        fid_features_to_statistics(torch.from_numpy(np.stack(each)).double())
        for each in (painted, real)
    ]
    expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    row = found["model", "all", "fid"]
    assert row["value"] == pytest.approx(expected, rel=1e-3)
    assert (row["aggregation"], row["tiles"], row["low"]) == ("set", 4, None)
    for method in GENERATION:
        assert found[method, "all", "kid"]["value"] is not None
        assert found[method, "score=3+", "fid"]["tiles"] == 2
        assert (method, "case=case5", "fid") not in found
    assert found["mean_colour", "all", "lpips"]["low"] is not None


def test_lpips_stands_in_every_row_of_a_tile(judged):
    _, folder = judged
    rows = tables.read(folder / "tiles.parquet", tables.EVALUATION_TILES).to_pylist()
    values = [row["lpips"] for row in rows if row["network"] == "generation"]
    assert len(values) == 12
    assert all(value > 0 for value in values)
    assert all(row["lpips"] is None for row in rows if row["network"] == "segmentation")


def test_page_and_tables_say_by_which_weights(judged, weights):
    _, folder = judged
    metadata = tables.read_metadata(folder / "metrics.parquet")
    for name, path in weights.items():
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert metadata[f"{name}_sha256"] == digest
    page = (folder / "evaluate" / "evaluate.html").read_text()
    assert "N 4</small>" in page
    assert "are not measured" not in page and "is not measured" not in page


def test_one_tile_has_no_distance_of_sets_and_no_interval(given, weights, tmp_path):
    index = write_index(tmp_path / "results", test=1)
    options = OPTIONS.replace(**weights)
    evaluate.run(**(given | {"index": index}), options=options, **outputs(tmp_path))
    table = tables.read(tmp_path / "metrics.parquet", tables.METRICS).to_pylist()
    distances = [row for row in table if row["metric"] in ("fid", "kid")]
    assert distances
    assert all(row["value"] is None and row["tiles"] == 1 for row in distances)
    assert all(row["low"] is None for row in table)
    page = (tmp_path / "evaluate" / "evaluate.html").read_text()
    assert "they compare sets of two tiles or more" in page
    assert "all test tiles are of one case" in page


def test_a_wrong_file_of_weights_ends_before_anything_is_measured(given, tmp_path):
    options = OPTIONS.replace(fid_weights=str(given["generator"]))
    with pytest.raises(TrainingError, match=r"generator.safetensors: .*fid_weights"):
        evaluate.run(**given, options=options, **outputs(tmp_path))
    assert not (tmp_path / "tiles.parquet").exists()


def test_the_page_stands_alone(done):
    page = (done / "evaluate" / "evaluate.html").read_text()
    assert "../" in page
    assert "pair6_000000_000006" in page
    assert "<script src" not in page


def test_tables_say_what_made_them(done):
    described = tables.read_metadata(done / "metrics.parquet")
    assert described["fingerprint"] == "f" * 64
    assert json.loads(described["options"])["threshold"] == 0.5


def test_no_test_tiles_is_no_error(given, tmp_path):
    index = write_index(tmp_path / "results", test=0)
    evaluate.run(**(given | {"index": index}), options=OPTIONS, **outputs(tmp_path))
    assert tables.read(tmp_path / "tiles.parquet", tables.EVALUATION_TILES).num_rows == 0
    assert tables.read(tmp_path / "metrics.parquet", tables.METRICS).num_rows == 0
    assert (tmp_path / "evaluate" / "evaluate.html").exists()


def test_networks_of_another_index_are_refused(given, tmp_path):
    networks = write_networks(tmp_path, "e" * 64)
    with pytest.raises(TrainingError, match=r"generation: trained on the index eeee.* ffff"):
        evaluate.run(**(given | networks), options=OPTIONS, **outputs(tmp_path))


def test_weights_of_another_network_are_refused(given, tmp_path):
    swapped = given | {"segmenter": given["generator"]}
    with pytest.raises(TrainingError, match=r"generator.safetensors: does not fit the network"):
        evaluate.run(**swapped, options=OPTIONS, **outputs(tmp_path))


def row(network, tile, **values):
    return {
        "tile": tile, "case": "c", "dataset": "bci", "score": "2+", "network": network,
        "method": "model", **values,
    }  # fmt: skip


def test_the_page_shows_tiles_from_best_to_worst():
    counts = {
        "a": Confusion(1, 9, 9, 81), "b": Confusion(9, 1, 1, 89), "c": Confusion(0, 0, 0, 100),
        "d": Confusion(5, 5, 5, 85), "e": Confusion(0, 5, 5, 90),
    }  # fmt: skip
    rows = [
        row("segmentation", tile, **dict(zip(image_quality.COUNTS, count, strict=True)))
        for tile, count in counts.items()
    ]
    assert [tile for tile, _ in evaluate.choose(rows, 99)] == ["b", "d", "a", "e", "c"]
    assert evaluate.choose(rows, 3) == [
        ("b", "best: F1 0.900"), ("a", "F1 0.100"), ("c", "worst: nothing positive, nothing found"),
    ]  # fmt: skip
    assert evaluate.choose([], 3) == []
    only = [row("generation", tile, ssim=ssim) for tile, ssim in (("x", 0.2), ("y", 0.7))]
    assert [tile for tile, _ in evaluate.choose(only, 5)] == ["y", "x"]
