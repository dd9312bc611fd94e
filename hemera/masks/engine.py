"""The interface of mask engines: modules of `hemera.masks.ENGINES` that implement `EngineModule`.

The module itself is light: it is imported to check a configuration, without cv2, torch and the
packages of the engine. What `load` needs is imported there.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from hemera.masks import ENGINES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hemera.config import MaskOptions
    from hemera.config.base import Options
    from hemera.imaging.color import Color
    from hemera.masks.label_format import Labelled

    RGB = npt.NDArray[np.uint8]
    Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a job needs for an engine."""

    memory_mb: int = 2000
    threads: int = 1
    gpu: bool = False
    """Whether it uses a GPU where there is one."""


class Engine(Protocol):
    """An engine that is loaded."""

    @property
    def versions(self) -> Mapping[str, str]:
        """See `EngineModule.versions`."""

    def prepare(
        self,
        tiles: Sequence[RGB],
        mpp: float,
        background: Color | None = None,
        excluded: Sequence[Mask | None] = (),
    ) -> Any:
        """Return the engine's state for a pair, estimated from some of its HER2 tiles.

        `background` is the colour of HER2's background; None: the engine measures it. `excluded`
        are the pixels (H, W) of each tile that it does not use, None or nothing given: none. An
        attribute `warning` of the state, if any, is logged with the name of the pair.
        """

    def segment(self, rgb: RGB, mpp: float, state: Any, excluded: Mask | None = None) -> Labelled:
        """Label one HER2 tile (H, W, 3) of `mpp` um/px; `state` of its pair is from `prepare`.

        `excluded` (H, W) are artefacts and places without HER2, which stain nothing; None: none.
        The caller marks them in the result, with those of H&E.
        """


class EngineModule(Protocol):
    """The module of an engine."""

    Options: type[Options]
    """Its keys in ``mask: {engines: {name: ...}}``, each with a default."""
    LICENCE: str
    """Terms of its masks, for the dataset card; empty: those of HEMERA."""
    PACKAGES: tuple[str, ...]
    """Packages whose versions the index records."""

    def requirements(self, options: Any) -> list[str]:
        """Return what is missing to run with these options, each with its remedy; quickly."""

    def versions(self, options: Any) -> dict[str, str]:
        """Return what the tables record beside the options, such as a digest of the weights.

        EngineError when they are not what the options require.
        """

    def resources(self, options: Any) -> Resources:
        """Return what a job needs."""

    def load(self, options: Any, shared: MaskOptions) -> Engine:
        """Load the engine; EngineError when something is missing or unusable.

        The thresholds of DAB and membranes in `shared`, the section `mask`, are common to all.
        """


def module(name: str) -> EngineModule:
    """Import the module of an engine."""
    return cast(EngineModule, importlib.import_module(ENGINES[name]))
