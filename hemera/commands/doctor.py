"""Report what can run on this machine and what is missing."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hemera.config import Config, MaskOptions, load_file
from hemera.config.masks import engine_modules
from hemera.errors import HemeraError

PACKAGES = (
    "snakemake",
    "torch",
    "torchvision",
    "deeperhistreg",
    "openslide-python",
    "tiffslide",
    "opencv-python-headless",
    "scikit-image",
    "numpy",
    "pyarrow",
)


def doctor(*, configfile: Path = Path("config.yaml")) -> int:
    """Report what can run on this machine and what is missing; return 1 if anything is missing.

    Args:
        configfile: the configuration whose requirements are checked.
    """
    is_missing = False
    for mark, line in facts(load_file(configfile)):
        sys.stdout.write(f"{mark:<8}{line}\n")
        is_missing |= mark == "missing"
    return int(is_missing)


def facts(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (ok | absent | missing, what); only `missing` keeps the graph from running."""
    yield "ok", f"Python {platform.python_version()}, {os.cpu_count()} processors"
    engines = config.options(MaskOptions).engines
    modules = engine_modules()
    for package in (*PACKAGES, *(p for name in engines for p in modules[name].PACKAGES)):
        try:
            yield "ok", f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield "missing", f"{package}: not installed; install requirements.lock"
    try:
        import torch
    except ImportError as error:
        yield "missing", f"torch: cannot be imported ({error}); install requirements.lock"
    else:
        if torch.cuda.is_available():
            yield "ok", f"GPU {torch.cuda.get_device_name()}"
        else:
            yield "absent", "GPU: PyTorch finds none; engines and training run on the processor"
    free = shutil.disk_usage(".").free / 2**30
    yield "ok", f"{free:.0f} GiB free in this folder"
    yield from _mask_engines(config)
    for name, options in config.stages.items():
        if name != "mask":
            yield from (("missing", line) for line in options.requirements())


def _mask_engines(config: Config) -> Iterator[tuple[str, str]]:
    modules = engine_modules()
    for name, options in config.options(MaskOptions).engines.items():
        module = modules[name]
        missing = module.requirements(options)
        try:
            versions = {} if missing else module.versions(options)
            if not missing and options.files():
                # What is no model, or one of another kind, shows when it is loaded.
                module.load(options, config.options(MaskOptions))
        except HemeraError as error:
            missing.append(str(error))
        for line in missing:
            yield "missing", f"mask engine {name}: {line}"
        if not missing:
            yield "ok", " ".join([f"mask engine {name}", *map(" ".join, versions.items())])
