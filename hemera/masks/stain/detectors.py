"""What finds nuclei for the engine `stain`: a network, thresholds, or a model of InstanSeg."""

import functools
from collections.abc import Callable
from pathlib import Path

from hemera.errors import EngineError
from hemera.masks.stain import Options, nucleus_files
from hemera.masks.stain.nuclei import Nuclei, Tile, find_nuclei


def load(options: Options) -> Callable[[Tile], Nuclei]:
    """Return what finds the nuclei of a tile with these options.

    Raises:
        EngineError: when its weights or its package are missing or unusable.
    """
    named = options.detector
    if named == nucleus_files.CLASSICAL:
        return functools.partial(find_nuclei, options=options)
    missing = nucleus_files.requirements(named)
    if missing:
        raise EngineError("\n".join(missing))
    if nucleus_files.is_instanseg(named):
        from hemera.masks.stain.instanseg import InstanSegDetector

        return InstanSegDetector(Path(named), options).find
    from hemera.masks.stain.network import NetworkDetector

    return NetworkDetector(nucleus_files.weights_file(named), options).find
