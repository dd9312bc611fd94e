"""Calibrated estimate of the local registration error, with its interval of 90 %."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FLOOR = 0.004
"""Added to both measures: 0.03 % of the diagonal, below which they are noise of the pixels."""

ERROR_FLOOR = 0.001
"""The model is of the logarithm of the error plus this: smaller errors are of no interest."""

COEFFICIENTS = {
    "median": (-0.506, 0.716, 0.150),
    "low": (-3.270, 0.496, 0.095),
    "high": (0.339, 0.414, 0.373),
}
"""Logarithm of the error in sides of a square: constant, and factors of the logarithms of residual
and spread. Derived by `benchmarks/registration_error.py` from synthetic sections of known fields by
quantile regression; the ends of the interval are widened so that it contains 90 % of the errors on
a new slide (conformalised quantile regression, Romano et al. 2019; of 20 slides whose points are
not independent, hierarchical, Lee et al. 2023)."""


def measures(residuals: Floats, spreads: Floats) -> Floats:
    """Return the terms of the model, (N, 3): 1 and the logarithms of both measures."""
    logarithms = [np.log(np.asarray(values) + FLOOR) for values in (residuals, spreads)]
    return np.stack([np.ones_like(logarithms[0]), *logarithms], axis=-1)


def estimate_error(residuals: Floats, spreads: Floats) -> Floats:
    """Estimate the error of a registration in squares of tissue.

    Args:
        residuals: (N,) distances at which the stains match best, in sides of a square.
        spreads: (N,) expected distances of the best match, in sides of a square.

    Returns:
        (3, N) in sides of a square: the median of the error, and the ends of the interval that
        contains it with a probability of 90 %.
    """
    terms = measures(residuals, spreads)
    logarithms = np.stack([terms @ values for values in COEFFICIENTS.values()])
    result: Floats = (np.exp(logarithms) - ERROR_FLOOR).clip(0)
    # Quantiles that are fitted one by one may cross.
    result[1], result[2] = np.minimum(result[0], result[1]), np.maximum(result[0], result[2])
    return result
