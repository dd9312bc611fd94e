import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hemera import tables
from hemera.__main__ import main
from hemera.config import EvaluateOptions, TrainGenerationOptions, load
from hemera.config.load import BUDGET, SIZE
from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import TrainingError
from hemera.evaluation import image_quality, perceptual
from hemera.evaluation.image_quality import SEGMENTER
from hemera.files import layout
from hemera.imaging.color import normalise_background
from hemera.masks import label_format
from hemera.networks import storage
from hemera.stages import evaluate, train_generation
from tests.command_line import words
from tests.small_demo import draw_tissue
from tests.small_index import write_index
from tests.small_networks import write_generator, write_networks
from tests.small_weights import write_alexnet, write_inception

SETTINGS = {"device": "cpu", "torch_threads": 1, "batch_size": 2, "gallery_tiles": 3}
GENERATION = ("demo", "pix2pix", "mean_colour", "blurred")
SEGMENTATION = (SEGMENTER, "all_positive", "all_negative", "dark")
SWAPPED = ("branch_other_tile", "branch_zeros")
"""Of skip16, which takes no image."""

HER2_BACKGROUND = (241, 240, 238)
"""Of the small index."""

GOLDEN = {
    9: {
        ("generation", "demo", "psnr_db", "mean"): 7.8025,
        ("generation", "demo", "ssim", "mean"): 0.57917,
        ("generation", "mean_colour", "psnr_db", "mean"): 15.329,
        ("generation", "blurred", "psnr_db", "mean"): 17.21,
        ("generation", "blurred", "ssim_gaussian", "mean"): 0.63286,
        ("segmentation", "all_positive", "f1", "pooled"): 0.11502,
        ("segmentation", "all_positive", "iou", "mean"): 0.06102,
        ("segmentation", "all_negative", "f1", "mean"): 0.5,
        ("segmentation", "best_constant", "f1", "mean_nonempty"): 0.21753,
        ("generation", "blurred", "dab_ratio", "pooled"): 0.87383,
        ("generation", "demo", "brown_dice_32", "pooled"): 0.86541,
        ("generation", "blurred", "brown_precision_8", "pooled"): 0.98528,
        ("segmentation", "dark", "f1", "pooled"): 0.5275,
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
    """Untrained networks and a second generator with half the weights of the first."""
    results = tmp_path_factory.mktemp("given")
    write_networks(results)
    other = write_generator(results, name="pix2pix")["generator"]
    state = storage.read_weights(other)
    storage.write_weights(other, {name: value * 0.5 for name, value in state.items()})
    return {"index": write_index(results), "results": results, "preset": "demo"}


def evaluated(given, folder, *, test=None, **changes):
    """Evaluate into a folder, of an index with so many test tiles if that is given."""
    if test is not None:
        given = given | {"index": write_index(folder / "results", test=test)}
    options = EvaluateOptions(generators=("pix2pix",), **SETTINGS | changes)
    evaluate.run(**given, options=options, **outputs(folder))
    return given["index"], tables.read(folder / "metrics.parquet", tables.METRICS).to_pylist()


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    evaluated(given, folder)
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
    assert {row["tile"] for row in rows} == {"pair5_000000_000005", "pair6_000000_000006"}
    expected = {("generation", method) for method in (*GENERATION, "real")}
    expected |= {("segmentation", method) for method in (*SEGMENTATION, *SWAPPED)}
    assert {(row["network"], row["method"]) for row in rows} == expected
    assert len(rows) == 2 * len(expected)


def stain(given, name, he):
    """Return what a generator makes of H&E, (H, W, 3), uint8."""
    generator, _ = storage.load_generation(
        layout.path(layout.GENERATOR, given["results"], generator=name),
        layout.path(layout.GENERATOR_METADATA, given["results"], generator=name),
    )
    image = torch.from_numpy(he).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        output = generator(image / 127.5 - 1)[0].permute(1, 2, 0).numpy()
    return normalise_background(((output + 1) / 2 * 255).astype(np.uint8), HER2_BACKGROUND)


def test_the_rows_are_of_the_outputs_of_each_network(given, rows):
    tiles = TileDataset(given["index"], network="generation", split="test")
    found = {(row["tile"], row["method"]): row for row in rows}
    segmenter, _ = storage.load_segmentation(
        layout.path(layout.SEGMENTER, given["results"]),
        layout.path(layout.SEGMENTER_METADATA, given["results"]),
    )
    for item in (tiles.stored(0), tiles.stored(1)):
        for name in GENERATION[:2]:
            generated = stain(given, name, item["he"])
            row = found[item["tile"], name]
            real = normalise_background(item["her2"], HER2_BACKGROUND)
            psnr = peak_signal_noise_ratio(real, generated, data_range=255)
            assert row["psnr_db"] == pytest.approx(psnr, abs=0.01)
            ssim = structural_similarity(real, generated, channel_axis=-1, data_range=255)
            assert row["ssim"] == pytest.approx(ssim, abs=0.001)
        with torch.no_grad():
            image = torch.from_numpy(item["he"]).permute(2, 0, 1)[None] / 255
            positive = (segmenter(image)[0, 0] >= 0).numpy()
        row = found[item["tile"], SEGMENTER]
        truth = label_format.positive(item["mask"])
        hits = np.count_nonzero(positive & truth)
        assert row["true_positive_px"] == pytest.approx(hits, abs=5)
        assert sum(row[name] for name in image_quality.COUNTS) == truth.size
    assert found[item["tile"], "demo"]["ssim"] != pytest.approx(
        found[item["tile"], "pix2pix"]["ssim"], abs=1e-3
    )


def test_constants_and_the_better_of_them(values, rows):
    def value(method, metric, aggregation):
        return values["segmentation", method, "all", metric, aggregation]["value"]

    positive = [row for row in rows if row["method"] == "all_positive"]
    hits = sum(row["true_positive_px"] for row in positive)
    fraction = hits / (hits + sum(row["false_positive_px"] for row in positive))
    assert 0 < fraction < 1
    assert value("all_positive", "precision", "pooled") == pytest.approx(fraction)
    assert value("all_positive", "recall", "pooled") == 1
    assert value("all_positive", "f1", "pooled") == pytest.approx(2 * fraction / (1 + fraction))
    assert value("all_negative", "f1", "pooled") == 0
    for metric in ("f1", "iou"):
        for aggregation in ("mean", "pooled", "mean_nonempty"):
            assert value("best_constant", metric, aggregation) == max(
                value("all_positive", metric, aggregation),
                value("all_negative", metric, aggregation),
            )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {
        "fid_weights": str(write_inception(folder / "inception.pth")),
        "lpips_weights": str(write_alexnet(folder / "alexnet.pth")),
    }


@pytest.fixture(scope="module")
def perceived(given, weights, tmp_path_factory):
    """The same networks on four test tiles of four cases, with all perceptual metrics."""
    folder = tmp_path_factory.mktemp("perceived")
    index, _ = evaluated(given, folder, test=4, **weights | {"batch_size": 3})
    return index, folder


def test_fid_is_of_the_features_of_the_generated_and_the_real_tiles(given, weights, perceived):
    index, folder = perceived
    table = tables.read(folder / "metrics.parquet", tables.METRICS).to_pylist()
    found = {(row["method"], row["group"], row["metric"]): row for row in table}
    inception = perceptual.Inception(Path(weights["fid_weights"]), torch.device("cpu"))
    tiles = TileDataset(index, network="generation", split="test")
    real, generated = [], []
    for item in (tiles.stored(place) for place in range(4)):
        real.append(inception(normalise_background(item["her2"], HER2_BACKGROUND)[None])[0])
        generated.append(inception(stain(given, "demo", item["he"])[None])[0])
    expected = perceptual.frechet_distance(np.stack(generated), np.stack(real))
    row = found["demo", "all", "fid"]
    assert row["value"] == pytest.approx(expected, rel=1e-3)
    assert (row["aggregation"], row["tiles"], row["low"]) == ("set", 4, None)
    assert row["value"] != found["pix2pix", "all", "fid"]["value"]
    for method in GENERATION:
        assert found[method, "all", "kid"]["value"] is not None
        assert found[method, "score=3+", "fid"]["tiles"] == 2
        assert (method, "case=case5", "fid") not in found
    assert found["mean_colour", "all", "lpips"]["low"] is not None


def test_lpips_is_in_every_row_of_a_generated_tile(perceived, rows):
    assert all(row["lpips"] is None for row in rows), "without weights"
    _, folder = perceived
    found = tables.read(folder / "tiles.parquet", tables.EVALUATION_TILES).to_pylist()
    found = [row for row in found if row["method"] != "real"]
    assert sum(row["network"] == "generation" for row in found) == 4 * len(GENERATION)
    for row in found:
        assert (row["lpips"] or 0) > 0 if row["network"] == "generation" else row["lpips"] is None


def test_tables_contain_options_index_and_digests_of_weights(done, perceived, weights):
    described = tables.read_metadata(done / "metrics.parquet")
    assert described["fingerprint"] == "f" * 64
    metadata = tables.read_metadata(perceived[1] / "metrics.parquet")
    for name, path in weights.items():
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert metadata[f"{name}_sha256"] == digest
        assert f"{name}_sha256" not in described


def test_the_public_mode_is_that_of_training_for_generators_alone(given, rows, tmp_path):
    """Batch norms use the statistics of one tile; a page without intervals is written, too."""
    evaluated(given, tmp_path, public_mode=True, bootstrap_samples=0)
    found = tables.read(tmp_path / "tiles.parquet", tables.EVALUATION_TILES).to_pylist()
    for before, after in zip(rows, found, strict=True):
        assert (before["tile"], before["method"]) == (after["tile"], after["method"])
        if before["method"] in GENERATION[:2]:
            assert before["psnr_db"] != pytest.approx(after["psnr_db"], abs=1e-4)
        else:
            assert before == after


def test_no_test_tiles_is_no_error(given, tmp_path):
    assert evaluated(given, tmp_path, test=0)[1] == []
    assert tables.read(tmp_path / "tiles.parquet", tables.EVALUATION_TILES).num_rows == 0
    assert (tmp_path / "evaluate" / "evaluate.html").exists()


def test_wrong_inputs_are_errors_before_anything_is_measured(given, tmp_path):
    def fails(error, match, changes=None, **inputs):
        with pytest.raises(error, match=match):
            evaluated(given | inputs, tmp_path, **(changes or {}))
        assert not (tmp_path / "tiles.parquet").exists()

    wrong = {"fid_weights": str(layout.path(layout.SEGMENTER, given["results"]))}
    fails(TrainingError, r"segmenter.safetensors: .*fid_weights", wrong)
    write_networks(tmp_path)
    fails(TrainingError, r"pix2pix.*no such file", results=tmp_path)
    write_generator(tmp_path, "e" * 64, name="pix2pix")
    fails(TrainingError, r"pix2pix: trained on the index eeee.* ffff", results=tmp_path)


def test_command_and_library_write_the_same_bytes(given, done, tmp_path):
    options = words(SETTINGS | {"generators": "pix2pix"})
    assert main(["evaluate", *words(given | outputs(tmp_path)), *options]) == 0
    for path, expected in zip(outputs(tmp_path).values(), outputs(done).values(), strict=True):
        # The page links to the report, which is elsewhere relative to it.
        assert path.read_bytes() == expected.read_bytes() or path.suffix == ".html"


@pytest.mark.slow
def test_a_generator_of_the_former_options_has_the_red_warning(tmp_path):
    """Both former values beside the paper's losses; preset demo generates stain from the same."""
    index = write_index(tmp_path, train=15, val=2, test=5, draw=draw_tissue)
    write_networks(tmp_path)
    preset = (
        load({"preset": "demo"})
        .stages["train_generation"]
        .replace(crop_px=128, epochs=16, decay_from_epoch=8, torch_threads=1, workers=0)
    )
    sizes = {name: getattr(preset, name) for name in (*SIZE, *BUDGET)}
    former = TrainGenerationOptions(**sizes | {"normalise_background": False, "dice_slope": 20})
    generator = {
        name: layout.path(pattern, tmp_path, generator="demo")
        for name, pattern in (
            ("generator", layout.GENERATOR),
            ("metadata", layout.GENERATOR_METADATA),
            ("history", layout.GENERATION_HISTORY),
        )
    }
    options = EvaluateOptions(
        device="cpu", torch_threads=1, cell_tiles=0, swap_tiles=0, bootstrap_samples=0
    )
    pages = []
    for each in (former, preset):
        train_generation.run(
            index=index, checkpoints=tmp_path / "checkpoints", options=each, **generator
        )
        evaluate.run(
            index=index, results=tmp_path, preset="demo", options=options, **outputs(tmp_path)
        )
        pages.append(outputs(tmp_path)["page"].read_text())
    gray, present = pages
    assert re.search('<li class="stop[^>]*>[^<]*no usable stain', gray)
    assert "no usable stain" not in present
