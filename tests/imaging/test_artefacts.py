"""What is tissue and not an artefact; what is excluded is tested with the engine `stain`."""

import cv2
import numpy as np
import pytest

from hemera.imaging.artefacts import ihc_artefacts
from tests.small_cells import BACKGROUND, DAB, HAEMATOXYLIN, RGB, over


def finds(rgb: RGB) -> bool:
    vectors = np.array([HAEMATOXYLIN, DAB])
    return ihc_artefacts(rgb, 0.5, BACKGROUND, vectors, nuclear_density=0.5) is not None


@pytest.mark.parametrize("shape", ["crowd", "giant"])
def test_crowded_dark_nuclei_and_one_giant_nucleus_are_no_pen(shape: str) -> None:
    """Lymphocytes wall to wall, 7 um wide and 8 um apart; a nucleus of 24 um."""
    y, x = (np.mgrid[:240, :330] + 0.5) * 0.5
    crowd = np.hypot((y + 4) % 8 - 4, (x + 4) % 8 - 4) < 3.5
    nuclei = crowd if shape == "crowd" else np.hypot(y - 60, x - 80) < 12
    density = cv2.GaussianBlur(0.05 + 0.55 * nuclei, (0, 0), 0.6)[..., None] * HAEMATOXYLIN
    assert not finds(over(np.array(BACKGROUND), density))


@pytest.mark.parametrize("dye", [HAEMATOXYLIN, DAB, (HAEMATOXYLIN + DAB) / 2, None])
def test_a_thin_line_is_an_artefact_only_without_colour(dye: np.ndarray | None) -> None:
    """The edge of a gland or a thread of cells has a colour, the edge of a coverslip has none."""
    y, x = (np.mgrid[:340, :410] + 0.5) * 0.5
    line = 0.6 * np.exp(-(((x - 80 - 25 * np.sin(y / 60)) / 1.5) ** 2))
    gray = np.full(3, 0.577)
    assert finds(over(np.array(BACKGROUND), line[..., None] * (gray if dye is None else dye))) == (
        dye is None
    )
