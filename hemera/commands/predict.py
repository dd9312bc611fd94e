"""Predict HER2-positive regions from an H&E slide alone, see `hemera.inference`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from hemera.commands import Positive, Workers


def predict(
    slide: Path,
    /,
    *,
    model: Path,
    out: Path = Path("results/predict"),
    mpp: Positive | None = None,
    model_mpp: Positive | None = None,
    upsample: bool = False,
    threshold: Annotated[float, Parameter(validator=Number(gt=0, lt=1))] = 0.5,
    min_area_um2: Annotated[float, Parameter(validator=Number(gte=0))] = 25.0,
    probability: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["float32", "tf32", "bf16", "fp16"] = "float32",
    batch_size: Workers = 8,
    torch_threads: Workers | None = None,
    workers: Workers = 2,
) -> None:
    """Predict HER2-positive regions from an H&E slide alone.

    Writes a new directory, OUT/NAME: NAME.mask.tif (255 where HER2-positive, else 0),
    NAME.positive.geojson (its regions, for QuPath), NAME.overlay.png and NAME.json (areas,
    fractions, model, versions).

    Args:
        slide: an H&E slide or image.
        model: output of train_segmentation, such as results/train_segmentation.
        out: where to write the directory.
        mpp: resolution of the slide, um per pixel, where its file does not state it.
        model_mpp: resolution of the tiles the model was trained on, um per pixel, where its
            metadata does not state it.
        upsample: enlarge a slide that is coarser than the model's tiles instead of refusing it.
        threshold: probability from which a pixel is positive.
        min_area_um2: smaller regions are left out of the GeoJSON, not of mask and areas; the
            default is half a nucleus.
        probability: also write NAME.probability.tif, the probability from 0 to 255.
        device: where the network runs; auto is the GPU where there is one.
        precision: of the network; all but float32 need a GPU.
        batch_size: tiles that the network takes at once.
        torch_threads: threads of the network on a CPU; by default one per processor.
        workers: threads that read.
    """
    from hemera import inference

    inference.predict(
        slide,
        model,
        out,
        mpp=mpp,
        model_mpp=model_mpp,
        upsample=upsample,
        threshold=threshold,
        min_area_um2=min_area_um2,
        probability=probability,
        device=device,
        precision=precision,
        batch_size=batch_size,
        torch_threads=torch_threads,
        workers=workers,
    )
