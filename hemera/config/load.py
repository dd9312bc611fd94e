"""The configuration: presets, defaults and checks across sections."""

import dataclasses
import math
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

import yaml
from pydantic import Field, model_validator

from hemera.config.base import TOP, Options, flags, nearest
from hemera.config.dataset import FilterOptions, IndexOptions, ReportOptions
from hemera.config.encoders import (
    NETWORKS,
    SEGMENTER,
    STAIN_MAP,
    EmbedOptions,
    RestainOptions,
    TrainEncoderOptions,
)
from hemera.config.evaluation import EvaluateOptions
from hemera.config.imaging import DescribeOptions, TileOptions
from hemera.config.masks import MaskOptions
from hemera.config.registration import LandmarksOptions, RegisterOptions
from hemera.config.status import (
    METHOD_DEFAULTS,
    METHODS,
    AggregateOptions,
    CasesOptions,
    EvaluateStatusOptions,
)
from hemera.config.training import (
    BRANCHES,
    GENERATORS,
    TrainGenerationOptions,
    TrainingOptions,
    TrainSegmentationOptions,
)
from hemera.errors import ConfigError

OptionsT = TypeVar("OptionsT", bound=Options)
PRESETS = Path(__file__).parents[1] / "presets"
DEMO_SHEET = "demo/pairs.tsv"
DEMO_SHEETS = {DEMO_SHEET: "full", "../demo/status.tsv": "status"}
"""The sheets of the demo and the sizes of their cohorts; the second is used in a folder of its own,
so that its results do not mix with those of the first."""
DEMO_VERSION = 2
"""Incremented when `hemera.demo` writes other images than before."""


class CohortOptions(Options):
    """The keys at the top of config.yaml: which cohort, in how many blocks."""

    section: ClassVar[str] = TOP

    preset: str = "hemera"
    """Set of values that differ from the defaults: a name in hemera/presets."""
    sheet: str = DEMO_SHEET
    """Path of the sheet of pairs."""
    allow_demo_sizes: bool = False
    """Allow preset demo, which trains toy networks, for another sheet than the demo's."""
    block_count: Annotated[int, Field(ge=1, le=4096)] = 19
    """Blocks into which the image pairs of a data set are divided, one job each."""

    @model_validator(mode="after")
    def _demo_sizes_are_for_the_demo(self) -> Self:
        if self.preset == "demo" and self.sheet not in DEMO_SHEETS and not self.allow_demo_sizes:
            raise ValueError(
                f"preset: demo trains toy networks, and sheet is {self.sheet}; set preset: "
                "no_weights or hemera, or allow_demo_sizes: true to try the workflow"
            )
        return self


STAGES: dict[str, type[Options]] = {
    cls.section: cls
    for cls in (
        DescribeOptions,
        RegisterOptions,
        LandmarksOptions,
        TileOptions,
        MaskOptions,
        FilterOptions,
        IndexOptions,
        ReportOptions,
        TrainGenerationOptions,
        TrainSegmentationOptions,
        EvaluateOptions,
        CasesOptions,
        TrainEncoderOptions,
        EmbedOptions,
        RestainOptions,
        AggregateOptions,
        EvaluateStatusOptions,
    )
}
"""Options class of every stage, in the order of the graph."""

BUDGET = (
    *(name for name in TrainingOptions.model_fields if name not in ("ema", "clip_norm")),
    *("decay_from_epoch", "lpips_weights"),
)
"""Options that are equal for all generators of one configuration."""

SIZE = ("network", "base_width", "discriminator_width")
"""Options of train_generation for presets that do not set them."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A validated configuration."""

    cohort: CohortOptions
    stages: Mapping[str, Options]

    def options(self, cls: type[OptionsT]) -> OptionsT:
        """Return the options of the stage with this class."""
        return cast(OptionsT, self.stages[cls.section])

    def flags(self, stage: str) -> str:
        """Return the options of `stage` that differ from its defaults, quoted for a shell."""
        return shlex.join(flags(self.stages[stage]))

    @property
    def generators(self) -> tuple[str, ...]:
        """Names of the generators that are evaluated; the configured one is the first."""
        return self.options(EvaluateOptions).names(self.cohort.preset)

    def generator(self, name: str) -> TrainGenerationOptions:
        """Return the options by which the generator `name` is trained, or raise ConfigError.

        The generator with the name of this configuration's preset is the configured one. Any other
        name is a preset: its values of train_generation, or the defaults, are the method; `BUDGET`
        is taken from this configuration, and so is `SIZE` where the preset does not set it.
        """
        configured = self.options(TrainGenerationOptions)
        if name == self.cohort.preset:
            return configured
        own = dict(configured)
        method = dict(_preset(name, "evaluate.generators").get("train_generation") or {})
        values = {key: own[key] for key in SIZE} | method | {key: own[key] for key in BUDGET}
        faults: list[str] = []
        options = _section(faults, TrainGenerationOptions, values)
        if options is not None:
            faults += _size_faults(self.options(TileOptions).size_px, (options, options.divisor))
        if options is None or faults:
            raise ConfigError(_lines(f"evaluate.generators: {name}: ", faults))
        return options

    @property
    def methods(self) -> dict[str, AggregateOptions]:
        """Options of the methods that determine the status, by name; `floor` is the first.

        The options of a method are those of section aggregate, but for those that it fixes; those
        that the configuration does not set are the method's own, where it has some.
        """
        own = self.options(AggregateOptions)
        found = {}
        for name in self.options(EvaluateStatusOptions).methods:
            defaults = METHOD_DEFAULTS.get(name, {})
            unset = {key: defaults[key] for key in defaults if key not in own.model_fields_set}
            found[name] = own.replace(**unset, **METHODS[name])
        return found

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders of these methods; none for the methods cells and virtual."""
        own = (name for options in self.methods.values() for name in options.encoders)
        return tuple(dict.fromkeys(own))

    def network_flags(self, name: str) -> str:
        """Return the options by which an encoder is trained as flags, quoted for a shell."""
        return shlex.join(flags(self.options(TrainEncoderOptions).of_network(name)))

    def method_flags(self, name: str) -> str:
        """Return the options of a method as flags, quoted for a shell."""
        return shlex.join(flags(self.methods[name]))

    def generator_flags(self, name: str) -> str:
        """Return the options of a generator as flags, quoted for a shell."""
        return shlex.join(flags(self.generator(name)))


def load(values: Mapping[str, Any], *, source: str = "config.yaml") -> Config:
    """Check a configuration, completed by its preset and the defaults.

    Raises:
        ConfigError: one line per fault: source, key, value, valid range and remedy.
    """
    top = set(CohortOptions.model_fields)
    known = top | set(STAGES)
    faults = [f"{key}: no such key{nearest(str(key), known)}" for key in values if key not in known]
    preset: Mapping[str, Any] = {}
    if isinstance(values.get("preset", "hemera"), str):
        try:
            preset = _preset(values.get("preset", "hemera"), "preset")
        except ConfigError as error:
            faults.append(str(error))
    merged = {**preset, **values}
    cohort = _section(faults, CohortOptions, {key: merged[key] for key in merged if key in top})
    stages: dict[str, Options] = {}
    for name, cls in STAGES.items():
        own = values.get(name)
        if own is not None and not isinstance(own, Mapping):
            faults.append(f"{name}: {own!r} is not a section; indent its keys below it")
            continue
        given = {**(preset.get(name) or {}), **(own or {})}
        section = _section(faults, cls, given)
        if section is not None:
            stages[name] = section
    if not faults and cohort is not None:
        config = Config(cohort, stages)
        faults = _disagreements(config)
        for generator in () if faults else config.generators:
            try:
                config.generator(generator)
            except ConfigError as error:
                faults.append(str(error))
        if not faults:
            return config
    raise ConfigError(_lines(f"{source}: ", faults))


def _lines(prefix: str, faults: list[str]) -> str:
    return "\n".join(prefix + line for fault in faults for line in fault.splitlines())


def _section(faults: list[str], cls: type[OptionsT], values: Mapping[str, Any]) -> OptionsT | None:
    """Return the options of a section, or None and another of the `faults`."""
    try:
        return cls(**{str(key): value for key, value in values.items()})
    except ConfigError as error:
        faults.append(str(error))
        return None


def _disagreements(config: Config) -> list[str]:
    """Return the contradictions between sections."""
    tile, mask = config.options(TileOptions), config.options(MaskOptions)
    filter, index = config.options(FilterOptions), config.options(IndexOptions)
    generation = config.options(TrainGenerationOptions)
    segmentation = config.options(TrainSegmentationOptions)
    faults = []
    if index.target not in mask.engines:
        faults.append(
            f"index.target: {index.target} is not among mask.engines {list(mask.engines)}; add it "
            "there or choose one of them"
        )
    if filter.require_agreement is not None and len(mask.engines) < 2:
        faults.append(
            f"filter.require_agreement: {filter.require_agreement} with only one engine; give two "
            "mask.engines or require_agreement: null"
        )
    # SegmentationNet passes its input to GenerationNet too, unless it has no such branch.
    branch = segmentation.generation_branch
    both = 32 if branch == "none" else max(32, generation.divisor)
    faults += _size_faults(tile.size_px, (generation, generation.divisor), (segmentation, both))
    fits = BRANCHES.get(branch, tuple(GENERATORS))
    if generation.network not in fits:
        faults.append(
            f"train_segmentation.generation_branch: {branch} needs one of the networks "
            f"{', '.join(fits)}, and train_generation.network is {generation.network}; choose one "
            "of these networks, or generation_branch: virtual_rgb_encoder or none"
        )
    faults += _view_faults(config, both)
    own = segmentation.normalise_background
    if branch != "none" and own != generation.normalise_background:
        faults.append(
            f"train_segmentation.normalise_background: {own}, and that of train_generation is "
            f"{not own}; the generator has the same input: give both the same value, or "
            "generation_branch: none"
        )
    return faults


def _view_faults(config: Config, divisor: int) -> list[str]:
    """Return why the encoders of the HER2 status do not fit the views.

    `divisor` is the factor by which SegmentationNet and its generator downsample.
    """
    encoder, embed = config.options(TrainEncoderOptions), config.options(EmbedOptions)
    faults = []
    trained = [name for name in config.encoders if name in NETWORKS]
    if trained and encoder.split != embed.split:
        faults.append(
            f"train_encoder.split: {encoder.split}, and embed.split is {embed.split}; give both "
            "the same value: the network is trained on views of the size that it is applied to"
        )
    folds = config.options(CasesOptions).folds
    if trained and encoder.held_out_folds >= folds:
        faults.append(
            f"train_encoder.held_out_folds: {encoder.held_out_folds}, and cases.folds is {folds}; "
            "give fewer, so that some cases are left to train on"
        )
    side = config.options(TileOptions).size_px // embed.split
    needed = {SEGMENTER: divisor, STAIN_MAP: 32 if encoder.map_px is None else 1}
    faults += [
        f"embed.split: {embed.split} gives views of {side} px, and {name} needs a multiple of "
        f"{factor}; give another split or tile.size_px"
        for name, factor in needed.items()
        if name in config.encoders and side % factor
    ]
    return faults


def _size_faults(tile_px: int, *networks: tuple[TrainingOptions, int]) -> list[str]:
    """Return why crops, which are trained on, or tiles, which are evaluated, do not fit.

    `networks` are options of training and the factor by which their networks downsample.
    """
    faults = []
    misfits: dict[str, dict[str, int]] = {}
    for options, divisor in networks:
        name = f"{options.section}.crop_px: {options.crop_px}"
        if options.crop_px is not None and options.crop_px > tile_px:
            faults.append(
                f"{name} is larger than tile.size_px {tile_px}; give a smaller crop or larger tiles"
            )
        elif options.crop_px is not None and options.crop_px % divisor:
            misfits.setdefault(name, {})[options.section] = divisor
        if tile_px % divisor:
            misfits.setdefault(f"tile.size_px: {tile_px}", {})[options.section] = divisor
    return faults + [
        f"{name} is not a multiple of {max(own.values())}, by which the networks of "
        f"{' and '.join(own)} downsample; give a multiple, or a shallower train_generation.network"
        for name, own in misfits.items()
    ]


def check_datasets(config: Config, sheet: str, datasets: Collection[str]) -> None:
    """Raise ConfigError, a line per option, for data sets that are not in the sheet.

    A name in an option's default is accepted: it applies to the sheets that have this data set.
    """
    faults = []
    for stage, options in config.stages.items():
        for name in (name for name in type(options).model_fields if name.endswith("_datasets")):
            known = {*datasets, *type(options).model_fields[name].default}
            if unknown := [each for each in getattr(options, name) if each not in known]:
                faults.append(
                    f"{stage}.{name}: {', '.join(unknown)}: no such data set in {sheet}, which has "
                    f"{', '.join(sorted(datasets))}; name one of these, or set {stage}.{name}: [] "
                    f"for {'none' if name == 'histogram_datasets' else 'all'}"
                )
    if faults:
        raise ConfigError("\n".join(faults))


def check_sheet_given(config: Config, values: Mapping[str, Any]) -> None:
    """Raise ConfigError where `values` name no sheet, which only the demo does without."""
    if config.cohort.preset != "demo" and "sheet" not in values:
        raise ConfigError(
            f"sheet: not set, and preset is {config.cohort.preset}; set sheet: to your sheet of "
            "pairs, or preset: demo for the demo cohort"
        )


def load_file(path: Path) -> Config:
    """Read and check a YAML file; see `read_yaml` and `load`."""
    return load(read_yaml(path), source=str(path))


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a configuration file; raise ConfigError when it is not YAML or repeats a key."""
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; work in the folder of a study (`hemera new`), or "
            "give the path of a config file"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; the options have three levels") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        # Of dates that do not exist, and of numbers of thousands of digits.
        raise ConfigError(f"{path}: a value that YAML cannot convert ({error})") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: no keys; begin with `preset: no_weights`")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a repeated key, which would win in the library, and an alias are errors.

    Aliases of aliases grow without limit.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise ConfigError(
                f"line {event.start_mark.line + 1}: *{event.anchor} is an alias; write its value"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise ConfigError(
                    f"line {line}: {key.value} is also in line {first[key.value]}; keep one of them"
                )
            first[key.value] = line
        return super().construct_mapping(node, deep)


def has_demo_sizes(stage: str, options: Mapping[str, Any]) -> bool:
    """Return whether a network trained with these options is no wider than that of preset demo."""
    own = _preset("demo", "preset")[stage]
    widths = {name: own[name] for name in own if name.endswith("width")}
    return all(options.get(name, math.inf) <= width for name, width in widths.items())


def _preset(name: str, option: str) -> Mapping[str, Any]:
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"{option}: {name!r} is unknown; choose from {', '.join(names)}")
    values: Mapping[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return values
