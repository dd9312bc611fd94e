"""Sign and class of nuclei of a nuclear marker."""

import dataclasses

import numpy as np
import pytest

from hemera.masks.stain import Options
from hemera.masks.stain.nuclear_marker import measure_nuclei
from hemera.masks.stain.nuclei import Nuclei
from tests.small_cells import MEASURED, SHARED


@pytest.mark.parametrize(
    ("dab", "intensity"), [(0.9, 3), (0.25, 2), (0.11, 1), (0.05, 0)]
)  # fmt: skip
@pytest.mark.parametrize("brown_px", [11, 29, 40])
def test_a_nucleus_has_the_class_of_most_of_its_pixels(
    dab: float, intensity: int, brown_px: int
) -> None:
    """Of 40 columns `brown_px` are brown; 11 of a density of 0.9 have a mean of a positive one."""
    labels = np.zeros((30, 60), np.int32)
    labels[5:25, 10:50] = 1
    separated = np.zeros((30, 60, 3), np.float32)
    separated[..., 0] = 0.3
    separated[:, : 10 + brown_px, 1] = dab
    stains = dataclasses.replace(MEASURED, nuclear_density=0.3, dark_dab=0.8)
    _, grown, cells = measure_nuclei(
        Nuclei.from_labels(labels), separated, 0.5, stains, Options(nucleus_dab=0.12), SHARED
    )
    expected = intensity if brown_px > 20 else 0
    assert cells.intensity.tolist() == [expected]
    assert cells.positive.tolist() == [expected > 0]
    # The blur of 0.6 um moves the edge of the brown by a pixel.
    assert cells.completeness[0] == pytest.approx(brown_px / 40 * (intensity > 0), abs=0.08)
    assert cells.nucleus_od[0] == pytest.approx(dab * brown_px / 40, rel=1e-5)
    assert (grown[labels > 0] == 1).all()
