"""The formula of structural similarity (Wang et al. 2004), for NumPy arrays and torch tensors."""

from collections.abc import Callable
from typing import Any

K1, K2 = 0.01, 0.03

WINDOW_PX = 7
"""Side of the uniform window by which BCI is scored."""


def structural_similarity(
    image: Any,
    truth: Any,
    mean: Callable[[Any], Any],
    *,
    ratio: float,
    span: float,
    origin: Any = 0,
) -> Any:
    """Return the map of the structural similarity of two floating-point arrays or tensors.

    Args:
        image: of any shape.
        truth: of the same shape.
        mean: of an array over the window of each place.
        ratio: of the variance to the mean square in a window: n / (n - 1) for the sample
            covariance over n pixels, 1 for the population's.
        span: of the values, 255 for 8 bits.
        origin: subtracted before values are squared, so that single precision keeps its digits.
    """
    x, y = image - origin, truth - origin
    mean_x, mean_y = mean(x), mean(y)
    variance_x = ratio * (mean(x * x) - mean_x * mean_x)
    variance_y = ratio * (mean(y * y) - mean_y * mean_y)
    covariance = ratio * (mean(x * y) - mean_x * mean_y)
    mean_x, mean_y = mean_x + origin, mean_y + origin
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
