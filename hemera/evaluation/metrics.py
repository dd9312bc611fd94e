"""Image and segmentation metrics, by the conventions of BCI and of the HEMERA paper.

Images are uint8 RGB (H, W, 3), masks are bool (H, W). Confidence intervals are from a bootstrap of
cases, because tiles of one case are not independent.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.ssim import WINDOW_PX, structural_similarity

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

RANGE = 255.0
THRESHOLD = 0.5
"""Probability from which a pixel is positive; never fitted to test tiles."""

SEGMENTATION_METRICS = ("precision", "recall", "f1", "iou")


def to_uint8(image: npt.NDArray[np.floating]) -> RGB:
    """Return a network's image in [-1, 1] as uint8, as for BCI: (x + 1) / 2 * 255, truncated."""
    return np.clip((image + 1) / 2 * 255, 0, 255).astype(np.uint8)


def psnr(image: RGB, truth: RGB, valid: Mask) -> float:
    """Return the peak signal-to-noise ratio in dB of the valid pixels, range 255.

    Infinite for equal images.
    """
    error = float(np.mean(np.square(image.astype(np.float64) - truth)[valid]))
    return float("inf") if error == 0 else float(10 * np.log10(RANGE**2 / error))


def ssim(image: RGB, truth: RGB, valid: Mask, *, gaussian: bool = False) -> float:
    """Return the structural similarity, the mean over the channels and the valid windows.

    The window is uniform, 7 px, with sample covariance, as for BCI (scikit-image's
    ``channel_axis=-1, data_range=255``). With `gaussian` it has a standard deviation of 1.5 px,
    truncated to 11 px, without sample covariance, as in Wang et al. 2004. Windows with a pixel that
    is not valid are left out; NaN without a valid window.
    """
    window = 11 if gaussian else WINDOW_PX
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
    pad = window // 2
    whole = cv2.erode(valid.astype(np.uint8), np.ones((window, window), np.uint8))
    kept = similarity[whole[pad:-pad, pad:-pad] > 0]
    return float(kept.mean()) if kept.size else float("nan")


class Bootstrap:
    """Samples of as many cases as there are, drawn with replacement.

    One serves all methods and metrics of the same tiles, which are compared on the same samples.
    """

    def __init__(self, cases: Sequence[str], *, samples: int, confidence: float, seed: int) -> None:
        """Draw samples, 0: no intervals, of the cases of T tiles."""
        places: dict[str, int] = {}
        self._case = np.array([places.setdefault(case, len(places)) for case in cases], np.intp)
        self._count = len(places)
        self._tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        self._times: Floats | None = None
        # All samples of one case are equal: an interval would have no width.
        if samples and self._count > 1:
            even = np.full(self._count, 1 / self._count)
            drawn = np.random.default_rng(seed).multinomial(self._count, even, size=samples)
            self._times = drawn.astype(np.float64)

    def interval(
        self, columns: npt.NDArray[np.generic], statistic: Callable[[Floats], Floats]
    ) -> tuple[float | None, float | None]:
        """Return the percentile interval of a statistic of sums over tiles.

        Args:
            columns: (T, K), summed over the tiles of each of S samples.
            statistic: from sums (S, K) to values (S,); those that are not finite are left out.
        """
        sums = self.sums(columns)
        return (None, None) if sums is None else self.bounds(statistic(sums))

    def sums(self, columns: npt.NDArray[np.generic]) -> Floats | None:
        """Return the sums (S, K) of columns (T, K) over the tiles of each sample, or None."""
        if self._times is None:
            return None
        of_cases = [np.bincount(self._case, column, self._count) for column in columns.T]
        return np.asarray(self._times @ np.stack(of_cases, axis=1))

    def bounds(self, values: Floats) -> tuple[float | None, float | None]:
        """Return the percentile interval of the values (S,) that are finite."""
        values = values[np.isfinite(values)]
        if values.size == 0:
            return None, None
        low, high = np.quantile(values, self._tails)
        return float(low), float(high)


class Summary(NamedTuple):
    """A value, its standard deviation (ddof 0), tiles and confidence interval; None: undefined."""

    value: float | None
    deviation: float | None
    tiles: int
    low: float | None = None
    high: float | None = None


def summarise(
    values: Iterable[float],
    bootstrap: Bootstrap,
    kept: npt.NDArray[np.bool_] | None = None,
) -> Summary:
    """Return mean and deviation of the finite values of the `kept` tiles.

    The interval is from a bootstrap of the cases of all tiles.
    """
    given = np.fromiter(values, np.float64)
    included = np.isfinite(given) if kept is None else np.isfinite(given) & kept
    finite = given[included]
    if finite.size == 0:
        return Summary(None, None, 0)
    columns = np.stack([np.where(included, given, 0), included], axis=1)
    low, high = bootstrap.interval(columns, lambda sums: ratio(sums[:, 0], sums[:, 1]))
    return Summary(float(finite.mean()), float(finite.std()), int(finite.size), low, high)


class Confusion(NamedTuple):
    """Pixels included by prediction and truth."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int


def confusion(predicted: Mask, truth: Mask, valid: Mask) -> Confusion:
    """Count the valid pixels of one tile, (H, W)."""
    predicted, truth = predicted & valid, truth & valid
    hits, positive, real, total = (
        int(np.count_nonzero(mask)) for mask in (predicted & truth, predicted, truth, valid)
    )
    return Confusion(hits, positive - hits, real - hits, total - positive - real + hits)


def rates(counts: npt.NDArray[np.generic]) -> dict[str, Floats]:
    """Return precision, recall, f1 and iou, each (...), of confusions (..., 4).

    All four are 1 where truth and prediction are both empty, else 0 without a true positive.
    """
    hit, false, missed, _ = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    empty = hit + false + missed == 0
    found = {
        "precision": ratio(hit, hit + false),
        "recall": ratio(hit, hit + missed),
        "f1": ratio(2 * hit, 2 * hit + false + missed),
        "iou": ratio(hit, hit + false + missed),
    }
    return {
        name: np.where(empty, 1.0, np.where(hit == 0, 0.0, value)) for name, value in found.items()
    }


def scores(count: Confusion) -> dict[str, float]:
    """Return precision, recall, f1 and iou of one confusion, as `rates` has them."""
    return {name: float(value) for name, value in rates(np.array(count)).items()}


def aggregate(
    counts: npt.NDArray[np.int64], bootstrap: Bootstrap
) -> dict[tuple[str, str], Summary]:
    """Return the metrics of confusions (T, 4) of tiles in three aggregations.

    ``mean``: over tiles, 1 where truth and prediction are empty. ``pooled``: of all pixels
    together; undefined where none of them is positive. ``mean_nonempty``: over the tiles whose
    truth is not empty.
    """
    per_tile = rates(counts)
    nonempty = counts[:, 0] + counts[:, 2] > 0
    found = {}
    for metric in SEGMENTATION_METRICS:
        pooled = functools.partial(pooled_rate, metric)
        found[metric, "mean"] = summarise(per_tile[metric], bootstrap)
        found[metric, "pooled"] = of_sums(counts, pooled, len(counts), bootstrap)
        found[metric, "mean_nonempty"] = summarise(per_tile[metric], bootstrap, nonempty)
    return found


def pooled_rate(metric: str, counts: Floats) -> Floats:
    """Return one of `rates` (...) of confusions (..., 4), NaN where the truth is empty."""
    empty = counts[..., 0] + counts[..., 2] == 0
    return np.where(empty, np.nan, rates(counts)[metric])


def f1_difference(sums: Floats) -> Floats:
    """Return pooled F1 of the first of two confusions (..., 8) of the same tiles minus the other's.

    Of the same samples of cases, so that its interval is that of the difference.
    """
    return pooled_rate("f1", sums[..., :4]) - pooled_rate("f1", sums[..., 4:])


def of_sums(
    columns: npt.NDArray[np.generic],
    statistic: Callable[[Floats], Floats],
    tiles: int,
    bootstrap: Bootstrap,
) -> Summary:
    """Return a statistic of the sums of columns (T, K), and its interval; see `Bootstrap`."""
    columns = columns.astype(np.float64)
    value = float(statistic(columns.sum(0)))
    bounds = bootstrap.interval(columns, statistic)
    return Summary(value if np.isfinite(value) else None, None, tiles, *bounds)


def ratio(above: Floats, below: Floats) -> Floats:
    """Return a quotient, NaN where the divisor is 0."""
    found = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=found, where=below != 0)
    return found
