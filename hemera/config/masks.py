"""Options of stage mask; those of an engine are defined by the engine."""

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from hemera.config.base import Count, Options, nearest, plain
from hemera.errors import ConfigError


def engine_modules() -> dict[str, Any]:
    """Return the module of every mask engine; see `hemera.masks.engine`."""
    # Not at import: engines define their options with this package.
    names = importlib.import_module("hemera.masks").ENGINES
    return {name: importlib.import_module(path) for name, path in names.items()}


def _paper_and_check() -> dict[str, Options]:
    modules = engine_modules()
    return {name: modules[name].Options() for name in ("deepliif", "stain")}


class MaskOptions(Options):
    """Label images from the HER2 tiles."""

    section: ClassVar[str] = "mask"
    version: ClassVar[int] = 13

    engines: dict[str, Options] = Field(
        default_factory=_paper_and_check,
        description="engines that make masks, each with its options",
        json_schema_extra={"paper": "deepliif"},
    )
    ring_um: Annotated[float, Field(gt=0, le=20)] = 4.0
    """Width of the ring around a nucleus that is searched for its membrane, um."""
    dab_weak: Annotated[float, Field(gt=0, le=3)] = 0.055
    """Smallest DAB optical density above the background of weak (1+) staining."""
    dab_moderate: Annotated[float, Field(gt=0, le=3)] = 0.15
    """Smallest DAB optical density above the background of moderate (2+) staining; higher on slides
    of high contrast, whose dark nuclei have more than 0.35 of haematoxylin."""
    dab_strong: Annotated[float, Field(gt=0, le=3)] = 0.35
    """Smallest DAB optical density above the background of strong (3+) staining; higher on
    slides of high contrast, likewise."""
    dab_contrast: Annotated[float, Field(ge=0, le=10)] = 1.3
    """Smallest ratio of weak membrane staining to the mean DAB of the 22 um around it."""
    dab_control: Annotated[float, Field(ge=0, le=10)] = 2.0
    """Smallest ratio of weak membrane staining to the background DAB of the slide, measured in
    tissue away from nuclei; 0: not required."""
    completeness_min: Annotated[float, Field(gt=0, le=1)] = 0.28
    """Smallest stained fraction of the membrane ring of a positive cell."""
    stain_tiles: Count = 32
    """Evenly spaced tiles of a pair from which its stain vectors are estimated; a few tiles are
    divided into blocks."""

    @classmethod
    def nested(cls) -> dict[str, type[Options]]:
        """Return the options of every engine, by dotted name."""
        return {f"engines.{name}": module.Options for name, module in engine_modules().items()}

    @field_validator("engines", mode="before")
    @classmethod
    def _with_options_of_each(cls, value: Any) -> dict[str, Options]:
        if not isinstance(value, Mapping) or not value:
            raise ConfigError(
                f"mask.engines: {value!r} is not a section with one key per engine; write "
                "engines: {stain: {}}"
            )
        modules, made = engine_modules(), {}
        faults = [
            f"mask.engines.{name}: no such engine{nearest(str(name), modules)}"
            for name in value
            if name not in modules
        ]
        # In the order of the dictionary: that of a section means nothing.
        for name in (name for name in modules if name in value):
            given, own = value[name], modules[name].Options
            if isinstance(given, own):
                made[name] = given
            elif isinstance(given, Mapping | None):
                try:
                    made[name] = own(**{str(key): item for key, item in (given or {}).items()})
                except ConfigError as error:
                    faults.append(str(error))
            else:
                faults.append(f"mask.engines.{name}: {given!r} is not a section; write {{}}")
        if faults:
            raise ConfigError("\n".join(faults))
        return made

    @field_serializer("engines")
    def _plain_engines(self, engines: dict[str, Options]) -> dict[str, Any]:
        return {name: plain(options) for name, options in engines.items()}

    @model_validator(mode="after")
    def _intensities_rise(self) -> Self:
        if not self.dab_weak < self.dab_moderate < self.dab_strong:
            raise ValueError(
                f"dab_weak: {self.dab_weak}, with dab_moderate {self.dab_moderate} and dab_strong "
                f"{self.dab_strong}, is not in ascending order; give three ascending densities"
            )
        return self

    def __hash__(self) -> int:
        """Return a hash of all values; that of pydantic fails for a mapping."""
        return hash(self.model_dump_json())

    def requirements(self) -> list[str]:
        """Return what is missing for the engines, each with its remedy."""
        modules = engine_modules()
        return [
            missing
            for name, options in self.engines.items()
            for missing in modules[name].requirements(options)
        ]

    def files(self) -> list[str]:
        """Return the files that the options of the engines name."""
        return [name for options in self.engines.values() for name in options.files()]

    def resources(self) -> dict[str, int]:
        """Return memory_mb, threads and gpu of a job: the most that one of the engines needs."""
        modules = engine_modules()
        needed = [modules[name].resources(options) for name, options in self.engines.items()]
        return {
            name: max(int(getattr(one, name)) for one in needed)
            for name in ("memory_mb", "threads", "gpu")
        }
