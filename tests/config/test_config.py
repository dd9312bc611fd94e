"""Options: one class for config section, flags and library; a fault is one line with a remedy."""

import functools
import importlib
import inspect
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hemera import __main__ as command_line
from hemera.config import (
    PRESETS,
    STAGES,
    CohortOptions,
    Config,
    FilterOptions,
    IndexOptions,
    MaskOptions,
    RegisterOptions,
    TileOptions,
    TrainGenerationOptions,
    TrainSegmentationOptions,
    check_datasets,
    load,
    load_file,
)
from hemera.config.base import Key, Options, flags, keys
from hemera.errors import ConfigError

ROOT = Path(__file__).parents[2]
CLASSES = [*STAGES.values(), CohortOptions]


def faults(values: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(values)
    return str(error.value).splitlines()


def changed(cls: type[Options]) -> list[Options]:
    """Options of a class in which each field in turn has another value, and None if it may."""
    base = cls()
    if isinstance(base, TrainGenerationOptions):
        base = base.replace(batch_size=12)
    if isinstance(base, TrainSegmentationOptions):
        base = base.replace(batch_size=12, encoder="timm:x", encoder_weights="x.pth")
    found = []
    for key in keys(cls).values():
        options = []
        for value in candidates(key, getattr(base, key.name)):
            try:
                options.append(base.replace(**{key.name: value}))
            except ConfigError:
                continue
        assert options, f"{cls.section}.{key.name}: no other value is valid by itself"
        found += options
    return found


def candidates(key: Key, default: Any) -> list[Any]:
    if isinstance(default, dict):
        return [{"stain": {}}, {"stain": {"nucleus_edge": 0.2}, "deepliif": {"device": "cpu"}}]
    if key.is_list and key.type is float:
        # Weights may have to make one.
        moved = (*default[:-2], default[-2] / 2, default[-1] + default[-2] / 2)
        return [tuple(value / 2 for value in default), moved]
    if key.is_list:
        given = key.choices or ("bci", "it's", "$HOME", "a b")
        return [tuple(reversed(given)), given[:1], given[:2], ()]
    if key.choices:
        return [choice for choice in key.choices if choice != default]
    found: list[Any] = [None] if key.optional and default is not None else []
    if key.type is bool:
        found.append(not default)
    elif key.type is int:
        found += [value for value in (1, 3, 4, 64, 128, 512, 1024) if value != default]
    elif key.type is float:
        base = default if default is not None else 0.5
        found += [base + 0.001, base - 0.001, 1e-5, base * 1.5]
        if key.limits.get("ge", 0) < 0:
            found += [-1e-5, -0.25]
    else:
        found += [
            "two words",
            "-leading",
            "quote ' and \" and $HOME `x` \\",
            "timm:it's",
            "statistics",
        ]
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.section)
def test_options_are_hashable_and_explained(cls: type[Options]) -> None:
    options = cls()
    assert all(key.help for key in keys(cls).values())
    assert hash(options) == hash(cls())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fiter": {}}, ["fiter", "did you mean filter"]),
        ({"zzzzzz": 1}, ["zzzzzz", "known are", "train_generation"]),
        ({"tile": {"size": 512}}, ["tile.size:", "did you mean size_px"]),
        ({"tile": {"size_px": "512"}}, ["tile.size_px", "'512'", "valid integer"]),
        ({"tile": {"codec": "gif"}}, ["tile.codec", "'gif'", "'jpeg' or 'png'"]),
        ({"tile": {"mpp": "nan"}}, ["tile.mpp", "nan", "finite"]),
        ({"tile": {"mpp": "20x"}}, ["tile.mpp", "'20x'", "number"]),
        ({"filter": {"histogram_datasets": "bci"}}, ["histogram_datasets", "list, such as [a, b]"]),
        ({"filter": {"histogram_datasets": [None]}}, ["histogram_datasets", "valid string"]),
        ({"filter": 5}, ["filter", "5", "not a section", "indent"]),
        ({"preset": "paper"}, ["preset", "'paper'", "demo, hemera"]),
        ({"preset": 5}, ["preset", "5", "valid string"]),
        ({"block_count": 0}, ["block_count", "0", "at least 1"]),
        ({"preset": "demo", "sheet": "mine.tsv"}, ["preset", "mine.tsv", "allow_demo_sizes"]),
        ({"mask": {"engines": {"stain": {}}}}, ["index.target", "deepliif", "stain"]),
        ({"index": {"val_fraction": 0.5, "test_fraction": 0.5}}, ["index.val_fraction", "below 1"]),
        ({"train_generation": {"epochs": 20}}, ["decay_from_epoch", "20"]),
        ({"train_generation": {"l1_weights": []}}, ["l1_weights", "one to six"]),
        (
            {"train_generation": {"nce_weight": 1}},
            ["nce_weight", "norm: instance", "resnet_6blocks", "not batch and unet_512"],
        ),
        (
            {"train_generation": {"crop_px": 64, "network": "unet_32", "discriminator_layers": 5}},
            ["discriminator_layers: 5", "crop of 64 px", "at least 96"],
        ),
        (
            {"train_generation": {"crop_px": 64, "network": "unet_32", "lpips_half_weight": 1}},
            ["crop_px: 64", "LPIPS", "at least 128"],
        ),
        (
            {"tile": {"size_px": 256}, "train_segmentation": {"generation_branch": "none"}},
            ["tile.size_px: 256", "multiple of 512"],
        ),
        (
            {"train_segmentation": {"encoder": "resnet50"}},
            ["encoder: 'resnet50'", "neither resnet34 nor timm:NAME"],
        ),
        ({"train_segmentation": {"encoder": "timm:x"}}, ["encoder_weights: imagenet", "timm:x"]),
        ({"train_segmentation": {"encoder_frozen": True}}, ["encoder_frozen", "resnet34"]),
        (
            {
                "train_segmentation": {
                    "encoder": "timm:x",
                    "encoder_weights": None,
                    "encoder_frozen": True,
                }
            },
            ["encoder_frozen: true", "stays random"],
        ),
        (
            {
                "train_segmentation": {
                    "encoder": "timm:x",
                    "encoder_weights": "a",
                    "generation_branch": "virtual_rgb_input",
                }
            },
            ["virtual_rgb_input has six channels", "timm:x takes three"],
        ),
        ({"tile": {"size_px": 500}}, ["size_px: 500", "train_generation and train_segmentation"]),
        ({"train_segmentation": {"crop_px": 544}}, ["544", "512"]),
        (
            {"train_segmentation": {"crop_px": 256}},
            ["train_segmentation.crop_px", "multiple of 512"],
        ),
        ({"train_generation": {"network": "unet_32"}}, ["generation_branch", "unet_128"]),
        (
            {"train_segmentation": {"normalise_background": False}},
            ["train_segmentation.normalise_background", "give both the same"],
        ),
    ],
    ids=repr,
)
def test_a_fault_is_one_line(values: Any, words: list[str]) -> None:
    lines = faults(values)
    assert len(lines) == 1, lines
    assert lines[0].startswith("config.yaml: ")
    assert ";" in lines[0], f"no remedy: {lines[0]}"
    for word in words:
        assert word in lines[0], lines[0]


def test_all_faults_stand_together() -> None:
    lines = faults(
        {
            "preset": "paper",
            "shet": "x",
            "block_count": "many",
            "fiter": {},
            "tile": {"size": 1, "size_px": 1, "mpp": math.nan, "codec": "gif", "quality": None},
            "mask": 3,
            "train_generation": {"epochs": "1e3"},
            "index": {"seed": -1},
        }
    )
    assert {line.removeprefix("config.yaml: ").split(":")[0] for line in lines} == {
        "preset", "shet", "block_count", "fiter", "tile.size", "tile.size_px", "tile.mpp",
        "tile.codec", "tile.quality", "mask", "train_generation.epochs", "index.seed",
    }  # fmt: skip


def test_yaml_traps() -> None:
    values = yaml.safe_load(
        "train_generation: {learning_rate: 2e-4, dice_weight: 1e-1, weight_map: none}\n"
        "tile: {mpp: 1, stride_px: null, upsample: yes}\n"
        "register: {levels: none}\n"
        "filter:\n"
        "index: {generation_train: ~}\n"
    )
    assert values["train_generation"]["learning_rate"] == "2e-4", "else the trap is gone"
    config = load(values)
    training = config.options(TrainGenerationOptions)
    assert (training.learning_rate, training.dice_weight) == (2e-4, 0.1)
    assert training.weight_map == "none"
    tile = config.options(TileOptions)
    assert (tile.mpp, tile.stride_px, tile.upsample) == (1.0, None, True)
    assert type(tile.mpp) is float
    assert config.options(RegisterOptions).levels is None
    assert config.options(IndexOptions).generation_train is None
    assert config.options(FilterOptions) == FilterOptions()


@pytest.mark.parametrize("stage", STAGES)
def test_flags_come_back_as_the_same_options(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    module = importlib.import_module(f"hemera.stages.{stage}")
    run = functools.wraps(module.run)(lambda **values: given.update(values))
    monkeypatch.setattr(module, "run", run)
    parameters = inspect.signature(command_line._stage(stage)).parameters.values()
    required = [each for each in parameters if each.default is inspect.Parameter.empty]
    files = [word for each in required for word in (f"--{each.name.replace('_', '-')}", "1")]
    cls = STAGES[stage]
    for options in (cls(), *changed(cls)):
        shell = Config(CohortOptions(), {stage: options}).flags(stage)
        assert "\n" not in shell
        assert command_line.main([stage, *files, *shlex.split(shell)]) == 0
        assert given["options"] == options


def test_flags_name_what_differs_from_the_defaults() -> None:
    assert flags(TileOptions()) == []
    assert flags(TileOptions(mpp=0.5, upsample=True)) == ["--mpp", "0.5", "--upsample", "true"]
    assert flags(FilterOptions(registration_margin_min=-0.5, histogram_datasets=())) == [
        "--histogram-datasets", "--registration-margin-min=-0.5",
    ]  # fmt: skip


def test_preset_hemera_is_the_defaults_with_bci_alone_as_test() -> None:
    index = IndexOptions(generation_test_datasets=("bci",))
    for config in (load({}), load({"preset": "hemera"})):
        assert config.cohort == CohortOptions()
        assert config.stages == {name: cls() for name, cls in STAGES.items()} | {"index": index}


def test_data_sets_that_the_sheet_lacks_are_errors() -> None:
    check_datasets(load({}), "pairs.tsv", {"bci", "acrobat"})
    check_datasets(load({"preset": "no_weights"}), "pairs.tsv", {"acrobat"})
    fault = "index.generation_test_datasets: bci: no such data set in pairs.tsv, which has a, mist;"
    with pytest.raises(ConfigError, match=fault):
        check_datasets(load({}), "pairs.tsv", {"mist", "a"})
    named = {"index": {"segmentation_datasets": ["bc"]}, "filter": {"histogram_datasets": ["x"]}}
    with pytest.raises(ConfigError) as error:
        check_datasets(load(named), "pairs.tsv", {"bci"})
    first, second = str(error.value).splitlines()
    assert first.startswith("filter.histogram_datasets: x:")
    assert second.startswith("index.segmentation_datasets: bc:")


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_load_and_name_themselves(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert values["preset"] == path.stem
    assert load({"preset": path.stem}) == load(values)


def test_own_values_win_over_the_preset() -> None:
    preset = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    assert preset["mask"]["engines"] == {"stain": {}}
    assert load({"preset": "demo"}).stages["mask"] == MaskOptions(**preset["mask"])
    config = load({"preset": "demo", "mask": {"dab_weak": 0.09}, "block_count": 5})
    mask = config.options(MaskOptions)
    assert (mask.dab_weak, list(mask.engines)) == (0.09, ["stain"])
    assert config.cohort.block_count == 5


def test_load_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        load_file(path)
    for content, fault in (
        (b"", "no keys"),
        (b"- a\n- b\n", "no keys"),
        (b"tile: [1, 2\n", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"a: !!python/x 1\n", "not YAML"),
        (b"block_count: 2\nsheet: a\nblock_count: 3", "line 3: block_count is also in line 1"),
        (b"tile:\n  mpp: 1\n  # mpp: 2\n  mpp: 3\n", "line 4: mpp is also in line 2"),
        (b"tile:\n  size: 5\n", "tile.size: no such key"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"^{path}: {fault}") as error:
            load_file(path)
        assert len(str(error.value).splitlines()) == 1


def test_the_repositorys_config_is_up_to_date() -> None:
    from hemera.commands.config import explained

    assert (ROOT / "config.yaml").read_text() == explained("demo"), (
        "config.yaml is out of step with the options; run "
        "`hemera config --template demo > config.yaml` and commit it"
    )


# --- generators ----------------------------------------------------------------------------------


def test_generators_share_the_budget_and_differ_in_the_method() -> None:
    own = {"epochs": 70, "workers": 5, "seed": 3, "device": "cpu", "weight_map": "literal"}
    own |= {"ema": 0.5, "lpips_weights": "alexnet.pth"}
    names = ["pyramid_pix2pix", "pix2pix", "variance_penalized", "asp", "misaligned"]
    config = load({"train_generation": own, "evaluate": {"generators": names}})
    assert config.generators == ("hemera", *names)
    found = {name: config.generator(name) for name in config.generators}
    for options in found.values():
        assert (options.epochs, options.workers, options.seed, options.device) == (70, 5, 3, "cpu")
        assert (options.decay_from_epoch, options.batch_size) == (50, 2)
    assert found["hemera"] == config.stages["train_generation"], "the preset's name: as configured"
    assert found["pyramid_pix2pix"].l1_weights == (25, 25, 25, 25)
    assert found["pyramid_pix2pix"].network == "resnet_9blocks"
    assert found["pix2pix"].weight_map == "none"
    assert found["variance_penalized"].variance_weight == 25
    assert (found["asp"].ema, found["misaligned"].ema) == (0, 0.999), "of the method"
    assert found["misaligned"].lpips_weights == "alexnet.pth", "a file of this machine"


def test_a_preset_without_a_network_has_the_configured_size_and_its_own_method() -> None:
    config = load({"preset": "demo", "evaluate": {"generators": ["hemera"]}})
    assert config.generators == ("demo", "hemera")
    configured, hemera = (config.generator(name) for name in config.generators)
    for name in ("network", "base_width", "crop_px", "epochs", "learning_rate", "select"):
        assert getattr(hemera, name) == getattr(configured, name)
    assert (configured.dice_weight, hemera.dice_weight) == (640, 1)
    assert hemera.l1_weights == TrainGenerationOptions().l1_weights != configured.l1_weights


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"generators": ["pix2pix", "pix2pix"]}, "evaluate.generators: ['pix2pix', 'pix2pix']"),
        ({"generators": ["../hemera"]}, "'../hemera' is unknown; choose from"),
        ({"batch_size": 1}, "generators: variance_penalized: train_generation.batch_size"),
        ({"crop_px": 128, "network": "unet_128"}, "generators: pix2pix: train_generation.crop_px"),
    ],
    ids=str,
)
def test_generators_that_cannot_be_trained_are_errors(
    values: dict[str, Any], expected: str
) -> None:
    names = values.pop("generators", ["pix2pix", "variance_penalized"])
    with pytest.raises(ConfigError) as error:
        load({"evaluate": {"generators": names}, "train_generation": values})
    assert expected in str(error.value)


def test_aliases_and_deep_nesting_of_yaml_are_errors(tmp_path: Path) -> None:
    """Aliases of aliases: a few lines are as many values as one likes."""
    path = tmp_path / "config.yaml"
    path.write_text("preset: demo\ntile: &a {size_px: 512}\nmask: *a\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: line 3: \*a is an alias; write"):
        load_file(path)
    path.write_text("[" * 5000)
    with pytest.raises(ConfigError, match=r"config\.yaml: "):
        load_file(path)
