"""Image and segmentation metrics, by the conventions of BCI and of the HEMERA paper.

Images are uint8 RGB (H, W, 3), masks are bool (H, W). PSNR and SSIM are taken per image and then
averaged; segmentation metrics come in three aggregations, because papers mix them silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

RGB = npt.NDArray[np.uint8]

K1, K2, RANGE = 0.01, 0.03, 255.0

SEGMENTATION_METRICS = ("precision", "recall", "f1", "iou")
AGGREGATIONS = ("mean", "pooled", "mean_nonempty")


def to_uint8(image: npt.NDArray[np.floating]) -> RGB:
    """Turn a network's image in [-1, 1] to uint8 as BCI is scored: (x + 1) / 2 * 255, truncated.

    Values outside are held at 0 and 255.
    """
    return np.clip((image + 1) / 2 * 255, 0, 255).astype(np.uint8)


def psnr(image: RGB, truth: RGB) -> float:
    """Return the peak signal-to-noise ratio in dB, range 255; infinite for equal images."""
    error = float(np.mean(np.square(image.astype(np.float64) - truth)))
    return float("inf") if error == 0 else float(10 * np.log10(RANGE**2 / error))


def ssim(image: RGB, truth: RGB, *, gaussian: bool = False) -> float:
    """Return the structural similarity, the mean over the channels.

    Args:
        image: the image judged.
        truth: the real one; both at least 7 px (11 px with `gaussian`) on each side.
        gaussian: False: a uniform window of 7 with sample covariance, as BCI is scored
            (scikit-image's ``channel_axis=-1, data_range=255``). True: a Gaussian of sigma 1.5 cut
            at 3.5 sigma, without sample covariance, as in Wang et al. 2004.

    Raises:
        ValueError: when the shapes differ or a side is smaller than the window.
    """
    window = 11 if gaussian else 7
    if image.shape != truth.shape or min(image.shape[:2]) < window:
        raise ValueError(
            f"ssim: shapes {image.shape} and {truth.shape}; give equal shapes, {window} px or more"
        )
    x, y = image.astype(np.float64), truth.astype(np.float64)
    ratio = 1.0 if gaussian else window**2 / (window**2 - 1)

    def mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if gaussian:
            taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
            taps /= taps.sum()
            filtered = cv2.sepFilter2D(values, cv2.CV_64F, taps, taps)
        else:
            filtered = cv2.boxFilter(values, cv2.CV_64F, (window, window))
        pad = window // 2
        return np.asarray(filtered[pad:-pad, pad:-pad], np.float64)

    mean_x, mean_y = mean(x), mean(y)
    variance_x = ratio * (mean(x * x) - mean_x * mean_x)
    variance_y = ratio * (mean(y * y) - mean_y * mean_y)
    covariance = ratio * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return float(similarity.mean())


class Summary(NamedTuple):
    """A mean over tiles, its standard deviation (ddof 0) and how many tiles it is of."""

    value: float | None
    deviation: float | None
    tiles: int


def summarise(values: Iterable[float]) -> Summary:
    """Return mean and deviation of the finite values; None where there is none."""
    finite = np.array([value for value in values if np.isfinite(value)], np.float64)
    if finite.size == 0:
        return Summary(None, None, 0)
    return Summary(float(finite.mean()), float(finite.std()), int(finite.size))


class Confusion(NamedTuple):
    """Pixels counted by prediction and truth."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int


def confusion(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> Confusion:
    """Count the pixels of one tile.

    Raises:
        ValueError: when the shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"confusion: shapes {predicted.shape} and {truth.shape} differ")
    both = int(np.count_nonzero(predicted & truth))
    said, real = int(np.count_nonzero(predicted)), int(np.count_nonzero(truth))
    return Confusion(both, said - both, real - both, truth.size - said - real + both)


def pool(counts: Iterable[Confusion]) -> Confusion:
    """Return the sum of confusions: all pixels of all tiles in one."""
    totals = [0, 0, 0, 0]
    for count in counts:
        totals = [total + part for total, part in zip(totals, count, strict=True)]
    return Confusion(*totals)


def scores(count: Confusion) -> dict[str, float]:
    """Return precision, recall, f1 and iou of one confusion.

    When truth and prediction are both empty all four are 1; when no pixel is hit otherwise, all
    four are 0.
    """
    hit, false, missed = count.true_positive, count.false_positive, count.false_negative
    if hit + false + missed == 0:
        return dict.fromkeys(SEGMENTATION_METRICS, 1.0)
    if hit == 0:
        return dict.fromkeys(SEGMENTATION_METRICS, 0.0)
    return {
        "precision": hit / (hit + false),
        "recall": hit / (hit + missed),
        "f1": 2 * hit / (2 * hit + false + missed),
        "iou": hit / (hit + false + missed),
    }


def aggregate(counts: Iterable[Confusion]) -> dict[tuple[str, str], Summary]:
    """Return the four metrics in three aggregations, by (metric, aggregation).

    ``mean``: per tile, both-empty tiles counting 1. ``pooled``: of all pixels together.
    ``mean_nonempty``: per tile, over the tiles whose truth is not empty.
    """
    counts = list(counts)
    per_tile = [scores(count) for count in counts]
    nonempty = [
        score
        for score, count in zip(per_tile, counts, strict=True)
        if count.true_positive + count.false_negative
    ]
    pooled = scores(pool(counts)) if counts else {}
    found = {}
    for metric in SEGMENTATION_METRICS:
        found[metric, "mean"] = summarise(score[metric] for score in per_tile)
        found[metric, "pooled"] = Summary(pooled.get(metric), None, len(counts))
        found[metric, "mean_nonempty"] = summarise(score[metric] for score in nonempty)
    return found
