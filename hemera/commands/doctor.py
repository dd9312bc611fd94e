"""Report what can run on this machine and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hemera.config import Config, MaskOptions, load_file
from hemera.errors import HemeraError

PACKAGES = (
    "snakemake",
    "torch",
    "torchvision",
    "deeperhistreg",
    "deepliif",
    "openslide-python",
    "tiffslide",
    "opencv-python-headless",
    "scikit-image",
    "numpy",
    "pyarrow",
)


def doctor(*, configfile: Path = Path("config.yaml")) -> int:
    """Report what can run on this machine and what is missing.

    Returns 1 when something that the configuration needs is missing.

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
    for package in PACKAGES:
        try:
            yield "ok", f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield (
                "missing",
                f"{package}: not installed; run `make .venv` or install requirements.lock",
            )
    gpu = False
    try:
        import torch
    except ImportError as error:
        yield "missing", f"torch: cannot be imported ({error}); install requirements.lock"
    else:
        gpu = torch.cuda.is_available()
        if gpu:
            yield "ok", f"GPU {torch.cuda.get_device_name()}"
        else:
            yield (
                "absent",
                "GPU: none that PyTorch can use; engines and training run on the processor",
            )
    free = shutil.disk_usage(".").free / 2**30
    yield "ok", f"{free:.0f} GiB free in this folder"
    yield from _mask_engines(config, gpu=gpu)
    encoder = getattr(config.stages["train_segmentation"], "encoder_weights", None)
    if encoder is None:
        yield (
            "absent",
            (
                "ImageNet weights of ResNet34: not given (train_segmentation.encoder_weights); "
                "SegmentationNet begins untrained"
            ),
        )
    else:
        try:
            from hemera.stages.train_segmentation import encoder_file

            path = encoder_file(encoder)
        except (HemeraError, ImportError) as error:
            yield "missing", str(error)
            return
        if path.is_file():
            yield "ok", f"ImageNet weights {path}"
        else:
            yield (
                "missing",
                f"train_segmentation.encoder_weights: {path} does not exist; mend the path",
            )


def _mask_engines(config: Config, *, gpu: bool) -> Iterator[tuple[str, str]]:
    """Yield whether the engines of stage mask can run, and what is missing for them."""
    mask = config.stages["mask"]
    assert isinstance(mask, MaskOptions)
    try:
        from hemera.masks import deepliif
    except ImportError as error:
        # What `deepliif` is made of is what `stain` needs too.
        yield "missing", f"mask engines: {error}; install requirements.lock"
        return
    if "stain" in mask.engines:
        yield "ok", "mask engine stain"
    lacking = "missing" if "deepliif" in mask.engines else "absent"
    if mask.device == "cuda" and not gpu:
        yield lacking, "mask.device: cuda, and PyTorch sees no GPU; set auto or cpu"
    if mask.deepliif_model is None:
        yield (
            lacking,
            (
                f"mask engine deepliif: no model; unpack {deepliif.RECORD} and name the folder in "
                "mask.deepliif_model, or set mask.engines: [stain]"
            ),
        )
        return
    folder = Path(mask.deepliif_model)
    try:
        deepliif.check_package()
        raw = deepliif.check_model(folder)
        found = deepliif.digest(folder)
    except (HemeraError, OSError) as error:
        yield lacking, f"mask engine deepliif: {error}"
        return
    kind = "raw" if raw else "serialized"
    yield "ok", f"mask engine deepliif, {kind} networks in {folder} (published: {deepliif.RECORD})"
    if mask.deepliif_sha256 is None:
        yield "ok", f"mask.deepliif_sha256: {found} (not asked for; put it into the configuration)"
    elif mask.deepliif_sha256.lower() == found:
        yield "ok", f"mask.deepliif_sha256: {found}, as asked for"
    else:
        yield (
            lacking,
            (
                f"mask.deepliif_sha256: the files have {found}, and {mask.deepliif_sha256} is "
                f"asked for; unpack {deepliif.RECORD} again, or mend the digest"
            ),
        )
