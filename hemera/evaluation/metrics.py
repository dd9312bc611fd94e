"""Image and segmentation metrics, by the conventions of BCI and of the HEMERA paper.

Images are uint8 RGB (H, W, 3), masks are bool (H, W). PSNR and SSIM are taken per image and then
averaged; segmentation metrics come in three aggregations, because papers mix them silently; FID and
KID compare two sets of images by the features (N, D) that a network gives them. Intervals come from
drawing cases again, because tiles of one case resemble one another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.ssim import WINDOW_PX, structural_similarity

RGB = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

RANGE = 255.0

SEGMENTATION_METRICS = ("precision", "recall", "f1", "iou")
AGGREGATIONS = ("mean", "pooled", "mean_nonempty")

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""How many subsets of how many images KID is the mean over, by custom."""


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
    window = 11 if gaussian else WINDOW_PX
    if image.shape != truth.shape or min(image.shape[:2]) < window:
        raise ValueError(
            f"ssim: shapes {image.shape} and {truth.shape}; give equal shapes, {window} px or more"
        )
    x, y = image.astype(np.float64), truth.astype(np.float64)
    ratio = 1.0 if gaussian else window**2 / (window**2 - 1)

    def mean(values: Floats) -> Floats:
        if gaussian:
            taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
            taps /= taps.sum()
            filtered = cv2.sepFilter2D(values, cv2.CV_64F, taps, taps)
        else:
            filtered = cv2.boxFilter(values, cv2.CV_64F, (window, window))
        pad = window // 2
        return np.asarray(filtered[pad:-pad, pad:-pad], np.float64)

    similarity = structural_similarity(x, y, mean, ratio=ratio, span=RANGE)
    return float(similarity.mean())


class Resampling:
    """Cases drawn with replacement, as many at a time as there are, many times: the bootstrap.

    One resampling serves every method and metric of the same tiles, so that they are compared on
    the same draws.
    """

    def __init__(self, cases: Sequence[str], *, samples: int, confidence: float, seed: int) -> None:
        """Draw.

        Args:
            cases: the case of each tile, T of them.
            samples: how many times all cases are drawn; 0: never, there are no intervals.
            confidence: share of the draws that an interval holds.
            seed: of the draws.
        """
        places: dict[str, int] = {}
        self._case = np.array([places.setdefault(case, len(places)) for case in cases], np.intp)
        self._count = len(places)
        self._tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        self._times: Floats | None = None
        # Of one case there is nothing to draw: any interval would have no width.
        if samples and self._count > 1:
            even = np.full(self._count, 1 / self._count)
            drawn = np.random.default_rng(seed).multinomial(self._count, even, size=samples)
            self._times = drawn.astype(np.float64)

    def interval(
        self, columns: npt.NDArray[np.generic], statistic: Callable[[Floats], Floats]
    ) -> tuple[float | None, float | None]:
        """Return the percentile interval of a statistic that sums over tiles decide.

        Args:
            columns: (T, K), what is summed over the tiles of a draw.
            statistic: (S, K) sums to (S,) values; draws without a finite value are left out.
        """
        if self._times is None:
            return None, None
        sums = np.stack(
            [np.bincount(self._case, column, self._count) for column in columns.T], axis=1
        )
        values = statistic(self._times @ sums)
        values = values[np.isfinite(values)]
        if values.size == 0:
            return None, None
        low, high = np.quantile(values, self._tails)
        return float(low), float(high)


class Summary(NamedTuple):
    """A value, its standard deviation (ddof 0), the tiles it is of, and its interval.

    None: there is no such value, or it cannot be had.
    """

    value: float | None
    deviation: float | None
    tiles: int
    low: float | None = None
    high: float | None = None


def summarise(
    values: Iterable[float],
    resampling: Resampling | None = None,
    kept: npt.NDArray[np.bool_] | None = None,
) -> Summary:
    """Return mean and deviation of the finite values; None where there is none.

    Args:
        values: one per tile.
        resampling: of the cases of these tiles.
        kept: which tiles count; None: all.
    """
    given = np.fromiter(values, np.float64)
    counted = np.isfinite(given) if kept is None else np.isfinite(given) & kept
    finite = given[counted]
    if finite.size == 0:
        return Summary(None, None, 0)
    low, high = None, None
    if resampling is not None:
        columns = np.stack([np.where(counted, given, 0), counted], axis=1)
        low, high = resampling.interval(columns, lambda sums: _ratio(sums[:, 0], sums[:, 1]))
    return Summary(float(finite.mean()), float(finite.std()), int(finite.size), low, high)


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


def rates(counts: npt.NDArray[np.generic]) -> dict[str, Floats]:
    """Return precision, recall, f1 and iou, each (...), of confusions (..., 4).

    When truth and prediction are both empty all four are 1; when no pixel is hit otherwise, all
    four are 0.
    """
    hit, false, missed, _ = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    empty = hit + false + missed == 0
    found = {
        "precision": _ratio(hit, hit + false),
        "recall": _ratio(hit, hit + missed),
        "f1": _ratio(2 * hit, 2 * hit + false + missed),
        "iou": _ratio(hit, hit + false + missed),
    }
    return {
        name: np.where(empty, 1.0, np.where(hit == 0, 0.0, value)) for name, value in found.items()
    }


def scores(count: Confusion) -> dict[str, float]:
    """Return precision, recall, f1 and iou of one confusion, as `rates` has them."""
    return {name: float(value) for name, value in rates(np.array(count)).items()}


def aggregate(
    counts: Iterable[Confusion], resampling: Resampling | None = None
) -> dict[tuple[str, str], Summary]:
    """Return the four metrics in three aggregations, by (metric, aggregation).

    ``mean``: per tile, both-empty tiles counting 1. ``pooled``: of all pixels together.
    ``mean_nonempty``: per tile, over the tiles whose truth is not empty.

    Args:
        counts: one per tile.
        resampling: of the cases of these tiles; None: no intervals.
    """
    table = np.array(list(counts), np.int64).reshape(-1, 4)
    per_tile = rates(table)
    nonempty = table[:, 0] + table[:, 2] > 0
    whole = rates(table.sum(0))
    found = {}
    for metric in SEGMENTATION_METRICS:
        found[metric, "mean"] = summarise(per_tile[metric], resampling)
        pooled = Summary(None, None, 0)
        if len(table):
            low, high = None, None
            if resampling is not None:
                low, high = resampling.interval(table, functools.partial(_rate, metric))
            pooled = Summary(float(whole[metric]), None, len(table), low, high)
        found[metric, "pooled"] = pooled
        found[metric, "mean_nonempty"] = summarise(per_tile[metric], resampling, nonempty)
    return found


def frechet_distance(
    features: npt.NDArray[np.floating], truth: npt.NDArray[np.floating]
) -> float | None:
    """Return the squared Fréchet distance of two Gaussians fitted to features; FID if Inception's.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the covariances divided by N - 1. Below some
    thousand images it is far too large, and the more so the fewer they are.

    Args:
        features: (N, D), of the images judged.
        truth: (M, D), of the real ones.

    Returns:
        None where one of them has fewer than two rows.
    """
    if min(len(features), len(truth)) < 2:
        return None
    (mean, root), (true_mean, true_root) = _gaussian(features), _gaussian(truth)
    # With C1 = A'A and C2 = B'B the trace of (C1 C2)^(1/2) is the sum of the singular values of
    # AB': no root of a matrix, which fails when covariances of few images have no full rank.
    common = float(np.linalg.svd(root @ true_root.T, compute_uv=False).sum())
    shift = float(np.square(mean - true_mean).sum())
    spread = float(np.square(root).sum() + np.square(true_root).sum())
    return max(0.0, shift + spread - 2 * common)


def kernel_distance(
    features: npt.NDArray[np.floating],
    truth: npt.NDArray[np.floating],
    *,
    seed: int,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
) -> Summary:
    """Return the squared kernel distance of two sets of features; KID if they are Inception's.

    The unbiased estimate with the kernel (x.y / D + 1)^3; where there are more images than
    `subset_size`, its mean and deviation over `subsets` random subsets of that size. It may fall
    below 0.

    Args:
        features: (N, D), of the images judged.
        truth: (M, D), of the real ones.
        seed: of the subsets.
        subsets: how many.
        subset_size: images in each.

    Returns:
        No value where one of them has fewer than two rows.
    """
    fewest = min(len(features), len(truth))
    if fewest < 2:
        return Summary(None, None, fewest)
    if fewest <= subset_size:
        return Summary(_mmd(features, truth), None, fewest)
    rng = np.random.default_rng(seed)
    found = [
        _mmd(
            features[rng.choice(len(features), subset_size, replace=False)],
            truth[rng.choice(len(truth), subset_size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return Summary(float(np.mean(found)), float(np.std(found)), fewest)


def _rate(metric: str, counts: Floats) -> Floats:
    return rates(counts)[metric]


def _ratio(above: Floats, below: Floats) -> Floats:
    """Return a quotient, NaN where it is of nothing."""
    found = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=found, where=below != 0)
    return found


def _gaussian(features: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Return the mean (D,) and a matrix (K, D), K at most D, whose square is the covariance."""
    values = np.asarray(features, np.float64)
    mean = values.mean(0)
    root = (values - mean) / np.sqrt(len(values) - 1)
    if len(root) > root.shape[1]:
        root = np.linalg.qr(root, mode="r")
    return mean, root


def _mmd(features: npt.NDArray[np.floating], truth: npt.NDArray[np.floating]) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3."""
    x, y = np.asarray(features, np.float64), np.asarray(truth, np.float64)

    def kernel(a: Floats, b: Floats) -> Floats:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3, np.float64)

    def within(a: Floats) -> float:
        values = kernel(a, a)
        return float(values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())
