import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hemera import tables
from hemera.__main__ import main
from hemera.config import CompareOptions, TrainGenerationOptions, load
from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import ConfigError, TrainingError
from hemera.evaluation import published
from hemera.evaluation.metrics import ssim
from hemera.networks import storage
from hemera.stages import compare, evaluate
from tests.reports.test_pages import check_page
from tests.small_index import write_index
from tests.small_judges import write_alexnet, write_inception
from tests.small_networks import write_generator, write_networks
from tests.stages.test_evaluate import OPTIONS as EVALUATE
from tests.stages.test_evaluate import outputs as evaluate_outputs
from tests.test_workflow import TINY, bare, lay_out, planned, snakemake, write_config

__all__ = ["bare"]

OPTIONS = CompareOptions(
    presets=("hemera", "pix2pix"), device="cpu", torch_threads=1, gallery_tiles=2
)

GOLDEN = {
    1: {
        ("hemera", "psnr_db"): 8.3407,
        ("hemera", "ssim"): 0.58276,
        ("mean_colour", "psnr_db"): 15.864,
        ("blurred", "ssim_gaussian"): 0.63852,
        ("Pyramid Pix2pix", "psnr_db"): 21.16,
    }
}
"""Values by version; those of hemera are evaluate's, of the same network."""


def outputs(folder):
    return {
        "table": folder / "compare.parquet",
        "tsv": folder / "compare.tsv",
        "page": folder / "compare" / "compare.html",
    }


def benchmark(path, seconds):
    path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:01:05\t812.5\n")
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two generators on one index: the small one of evaluate's tests, and it with other weights."""
    folder = tmp_path_factory.mktemp("given")
    first, second = (write_generator(folder / name) for name in ("hemera", "pix2pix"))
    state = storage.read_weights(second["generator"])
    storage.write_weights(second["generator"], {name: value * 0.5 for name, value in state.items()})
    for paths, epochs, map_mode in ((first, 100, "inside"), (second, 200, "none")):
        described = json.loads(paths["generator_metadata"].read_text())
        described |= {"parameters": 1234 * epochs, "options": {"epochs": epochs, "seed": 5}}
        described["options"]["weight_map"] = map_mode
        storage.write_metadata(paths["generator_metadata"], described)
    return {
        "index": write_index(folder / "results"),
        "report": folder / "report" / "report.html",
        "preset": "demo",
        "generators": (first["generator"], second["generator"]),
        "generator_metadata": (first["generator_metadata"], second["generator_metadata"]),
        "benchmarks": (benchmark(folder / "a.tsv", 65.25), benchmark(folder / "b.tsv", 7200)),
    }


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    compare.run(**given, options=OPTIONS, **outputs(folder))
    return folder


@pytest.fixture(scope="module")
def rows(done):
    return tables.read(done / "compare.parquet", tables.COMPARISON).to_pylist()


@pytest.fixture(scope="module")
def by_method(rows):
    return {row["method"]: row for row in rows}


def test_golden(by_method):
    expected = GOLDEN[CompareOptions.version]
    found = {(method, metric): by_method[method][metric] for method, metric in expected}
    assert found == pytest.approx(expected, rel=2e-3), (
        "the same networks give other metrics: raise CompareOptions.version"
    )


def test_presets_then_baselines_then_every_paper(rows):
    assert [(row["method"], row["kind"]) for row in rows[:4]] == [
        ("hemera", "network"), ("pix2pix", "network"),
        ("mean_colour", "baseline"), ("blurred", "baseline"),
    ]  # fmt: skip
    papers = rows[4:]
    assert [row["method"] for row in papers] == [
        figure.method for figure in published.PAPERS["generation"]
    ]
    assert all(row["kind"] == "paper" and row["source"] and row["comparable"] for row in papers)
    assert all(row["tiles"] is None and row["psnr_db_low"] is None for row in papers)


def test_the_papers_figures_stand_in_the_columns_of_ours(by_method):
    row = by_method["VP-GAN"]
    assert (row["psnr_db"], row["ssim"], row["fid"]) == (22.16, 0.47, 346.37)
    row = by_method["HEMERA GenerationNet"]
    assert (row["psnr_db"], row["ssim"], row["fid"]) == (21.669, 0.355, None)


def test_a_network_is_judged_as_evaluate_judges_it(given, by_method, tmp_path):
    networks = write_networks(tmp_path)
    evaluate.run(
        index=given["index"], report=given["report"], preset="demo", options=EVALUATE,
        **networks, **evaluate_outputs(tmp_path),
    )  # fmt: skip
    found = tables.read(tmp_path / "metrics.parquet", tables.METRICS).to_pylist()
    own = {
        (row["method"], row["metric"]): row
        for row in found
        if row["group"] == "all" and row["network"] == "generation"
    }
    for method, name in (("model", "hemera"), ("mean_colour", "mean_colour")):
        for metric in ("psnr_db", "ssim", "ssim_gaussian"):
            row = own[method, metric]
            assert by_method[name][metric] == pytest.approx(row["value"], rel=1e-6)
            for part in ("deviation", "low", "high"):
                value = by_method[name][f"{metric}_{part}"]
                assert value == pytest.approx(row[part], rel=1e-6)


def test_each_row_is_of_its_own_network(given, by_method):
    tiles = TileDataset(given["index"], network="generation", split="test", images=("he", "her2"))
    net, _ = storage.load_generation(given["generators"][1], given["generator_metadata"][1])
    values = []
    for place in range(len(tiles)):
        item = tiles.stored(place)
        with torch.no_grad():
            image = torch.from_numpy(item["he"]).permute(2, 0, 1)[None].float() / 127.5 - 1
            made = net(image)[0].permute(1, 2, 0).numpy()
        values.append(ssim(((made + 1) / 2 * 255).astype(np.uint8), item["her2"]))
    assert by_method["pix2pix"]["ssim"] == pytest.approx(np.mean(values), abs=1e-4)
    assert by_method["pix2pix"]["ssim"] != pytest.approx(by_method["hemera"]["ssim"], abs=1e-3)


def test_what_a_method_costs_stands_beside_it(by_method):
    row = by_method["pix2pix"]
    assert (row["parameters"], row["epochs"], row["training_s"]) == (246_800, 200, 7200)
    assert (row["generator"], row["tiles"]) == ("unet_128", 2)
    assert by_method["hemera"]["training_s"] == 65.25
    assert by_method["blurred"]["parameters"] is None


def test_the_text_is_the_table(done, rows):
    text = list(csv.DictReader((done / "compare.tsv").read_text().splitlines(), delimiter="\t"))
    assert len(text) == len(rows)
    for line, row in zip(text, rows, strict=True):
        for name in tables.COMPARISON.names:
            if row[name] is None:
                assert line.get(name, "") == ""
            elif isinstance(row[name], float):
                assert float(line[name]) == pytest.approx(row[name], rel=1e-5)
            else:
                assert line[name] == str(row[name])
    assert "lpips" not in text[0], "what nobody has is left out"


def test_the_page(done):
    page = check_page(done / "compare" / "compare.html")
    text = (done / "compare" / "compare.html").read_text()
    assert len(page.images) == 2 * 4
    assert "1 min 5 s" in text and "2 h 0 min" in text and "246\u202f800" in text
    assert "What papers report: not comparable with anything on this page" in text
    assert "346.37" in text and "third-party report; no: 1,000 tiles of MIST" in text
    differences = text[text.index('id="methods"') : text.index("<details>")]
    assert re.findall(r"<tr><td><code>(\w+)</code>", differences) == ["epochs", "weight_map"]
    assert "compare.fid_weights names no file" in text
    assert "No better by PSNR, dB than a trivial answer, the blurred H&amp;E in the" in text
    assert "with 17.66: hemera 8.34, pix2pix " in text
    assert ">21.669</td>" in text and ">.5585</td>" in text, "as the sources print them"


def test_the_page_is_the_same_again(given, done, tmp_path):
    compare.run(**given, options=OPTIONS, **outputs(tmp_path))
    for name in ("table", "tsv", "page"):
        assert outputs(tmp_path)[name].read_bytes() == outputs(done)[name].read_bytes()


def test_every_judge_judges_every_method(given, tmp_path):
    options = OPTIONS.replace(
        fid_weights=str(write_inception(tmp_path / "inception.pth")),
        lpips_weights=str(write_alexnet(tmp_path / "alexnet.pth")),
    )
    compare.run(**given, options=options, **outputs(tmp_path))
    rows = tables.read(tmp_path / "compare.parquet", tables.COMPARISON).to_pylist()
    for row in rows[:4]:
        assert row["fid"] > 0 and row["kid"] is not None and row["lpips"] > 0
    assert rows[0]["fid"] != rows[1]["fid"]
    assert "fid_weights_sha256" in tables.read_metadata(tmp_path / "compare.parquet")
    assert "N 2</small>" in (tmp_path / "compare" / "compare.html").read_text()


def test_no_test_tiles_is_no_error(given, tmp_path):
    index = write_index(tmp_path / "results", test=0)
    compare.run(**(given | {"index": index}), options=OPTIONS, **outputs(tmp_path))
    rows = tables.read(tmp_path / "compare.parquet", tables.COMPARISON).to_pylist()
    assert [row["tiles"] for row in rows[:4]] == [0, 0, 0, 0]
    assert all(row["psnr_db"] is None for row in rows[:4])
    check_page(tmp_path / "compare" / "compare.html")
    text = (tmp_path / "compare" / "compare.html").read_text()
    assert "Nothing was compared" in text and "346.37" in text


def test_a_time_that_is_not_known_is_not_shown(given, tmp_path, caplog):
    broken = tmp_path / "broken.tsv"
    broken.write_text("s\th:m:s\n")
    other = benchmark(tmp_path / "other.tsv", "-")
    compare.run(**(given | {"benchmarks": (broken, other)}), options=OPTIONS, **outputs(tmp_path))
    rows = tables.read(tmp_path / "compare.parquet", tables.COMPARISON).to_pylist()
    assert [row["training_s"] for row in rows[:2]] == [None, None]
    assert "broken.tsv: no benchmark file" in caplog.text
    compare.run(**(given | {"benchmarks": ()}), options=OPTIONS, **outputs(tmp_path))


def test_a_network_of_another_index_is_refused(given, tmp_path):
    foreign = write_generator(tmp_path, "e" * 64)
    mixed = {
        "generators": (given["generators"][0], foreign["generator"]),
        "generator_metadata": (given["generator_metadata"][0], foreign["generator_metadata"]),
    }
    with pytest.raises(TrainingError, match=r"pix2pix: trained on the index eeee.* ffff"):
        compare.run(**(given | mixed), options=OPTIONS, **outputs(tmp_path))


@pytest.mark.parametrize("name", ["generators", "generator_metadata", "benchmarks"])
def test_each_preset_needs_its_own_files(given, tmp_path, name):
    fewer = {name: given[name][:1]}
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag}: 1 files for 2 presets"):
        compare.run(**(given | fewer), options=OPTIONS, **outputs(tmp_path))


def test_command_and_library_give_the_same_bytes(given, done, tmp_path):
    words = ["compare", "--index", given["index"], "--report", given["report"], "--preset", "demo"]
    for name in ("generators", "generator_metadata", "benchmarks"):
        words += ["--" + name.replace("_", "-"), *given[name]]
    for name, path in outputs(tmp_path).items():
        words += [f"--{name}", path]
    words += ["--presets", "hemera", "pix2pix", "--device", "cpu", "--torch-threads", "1"]
    assert main([*map(str, words), "--gallery-tiles", "2"]) == 0
    for name in ("table", "tsv", "page"):
        assert outputs(tmp_path)[name].read_bytes() == outputs(done)[name].read_bytes()


# --- what is trained -----------------------------------------------------------------------------

PRESETS = CompareOptions().presets


def test_a_preset_is_trained_by_its_own_method_on_this_machine():
    config = load({"train_generation": {"epochs": 70, "workers": 5, "seed": 3, "device": "cpu"}})
    found = {name: config.compared(name) for name in PRESETS}
    for options in found.values():
        assert (options.workers, options.seed, options.device) == (5, 3, "cpu")
    assert found["hemera"] == TrainGenerationOptions(workers=5, seed=3, device="cpu")
    assert found["pyramid_pix2pix"].l1_weights == (25, 25, 25, 25)
    assert found["pyramid_pix2pix"].network == "resnet_9blocks"
    assert found["pix2pix"].weight_map == "none"
    assert found["variance_penalized"].variance_weight == 25
    assert len({json.dumps(each.model_dump(), sort_keys=True) for each in found.values()}) == 4


def test_a_budget_holds_for_all_alike():
    budget = {
        "network": "unet_256", "base_width": 8, "discriminator_width": 16, "crop_px": 256,
        "epochs": 4, "decay_from_epoch": 2, "batch_size": 6, "learning_rate": 0.001,
    }  # fmt: skip
    config = load({"compare": budget})
    for name in PRESETS:
        options = config.compared(name).model_dump()
        assert {key: options[key] for key in budget} == budget
    assert config.compared("pix2pix").l1_weights == (100, 0, 0, 0), "the method stays"


def test_what_evaluate_says_of_judging_holds_here_unless_said_otherwise():
    config = load({"evaluate": {"fid_weights": "a.pth", "confidence": 0.9, "threshold": 0.4}})
    options = config.stages["compare"]
    assert (options.fid_weights, options.confidence) == ("a.pth", 0.9)
    config = load({"evaluate": {"fid_weights": "a.pth"}, "compare": {"fid_weights": None}})
    assert config.stages["compare"].fid_weights is None


@pytest.mark.parametrize(
    ("values", "preset", "said"),
    [
        ({}, "pix3pix", "preset: 'pix3pix' is not known"),
        ({"batch_size": 1}, "variance_penalized", "preset variance_penalized: "),
        ({"epochs": 3}, "hemera", "preset hemera: train_generation.decay_from_epoch: 50 is after"),
        ({"crop_px": 128}, "hemera", "is not a multiple of 512"),
        ({"crop_px": 1024}, "hemera", "crop_px is 1024, tile.size_px 512; set compare.network"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_said_with_its_preset(values, preset, said):
    config = load({"compare": values})
    with pytest.raises(ConfigError) as error:
        config.compared(preset)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "presets", [[], ["hemera", "hemera"], ["../hemera"], ["a/b"], ["Hemera"], ["hemera\n"]]
)
def test_names_that_are_no_presets_are_refused(presets):
    with pytest.raises(ConfigError, match=r"compare\.presets"):
        load({"compare": {"presets": presets}})


# --- the graph -----------------------------------------------------------------------------------

SMALL = {
    "network": "unet_128", "base_width": 4, "discriminator_width": 4, "crop_px": 128,
    "epochs": 1, "decay_from_epoch": 1,
}  # fmt: skip


def test_it_is_planned_when_it_is_asked_for_and_only_then(bare: Path) -> None:
    write_config(bare, TINY, compare=SMALL)
    counts = planned(bare, "compare")
    assert counts["compare"] == 1
    assert counts["compare_generation"] == 4
    assert {"index", "report"} <= set(counts)
    assert not {"train_generation", "train_segmentation", "evaluate"} & set(counts)
    text = snakemake(bare, "-n", "-p", "--cores", "2", "results/compare/pix2pix/metadata.json")
    (command,) = re.findall(r"hemera train_generation .*", text)
    assert "--weight-map none" in command and "--epochs 1 " in command
    assert "--checkpoints results/compare/checkpoints/pix2pix " in command
    assert not {"compare", "compare_generation"} & set(planned(bare))


def test_a_preset_that_cannot_be_trained_is_one_line_and_hinders_nothing_else(
    tmp_path: Path,
) -> None:
    lay_out(tmp_path, {"preset": "demo", "compare": SMALL | {"presets": ["hemera", "pix3pix"]}})
    (tmp_path / "demo").mkdir()
    shutil.copy(Path(__file__).parents[2] / "demo" / "pairs.tsv", tmp_path / "demo")
    text = snakemake(tmp_path, "-n", "--cores", "2", "compare", check=False)
    assert "compare: preset: 'pix3pix' is not known" in text
    assert "evaluate" in planned(tmp_path)
