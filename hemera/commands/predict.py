"""Predict HER2-positive regions from an H&E slide alone."""

from pathlib import Path

from hemera.inference.options import DEFAULTS, PredictOptions


def predict(
    slide: Path,
    /,
    *,
    model: Path,
    out: Path = Path("results/predict"),
    options: PredictOptions = DEFAULTS,
) -> None:
    """Predict HER2-positive regions from an H&E slide alone.

    Writes a new directory, OUT/NAME: NAME.mask.tif (255 where HER2-positive, else 0),
    NAME.positive.geojson (its regions, for QuPath), NAME.overlay.png and NAME.json (areas,
    fractions, model, versions).

    Args:
        slide: an H&E slide or image.
        model: output of train_segmentation, such as results/train_segmentation.
        out: where to write the directory.
    """
    from hemera.inference import whole_slide

    whole_slide.predict(slide, model, out, options)
