"""What is tissue and not an artefact; what is excluded is tested with the engine `stain`."""

import cv2
import numpy as np
import pytest

from hemera.imaging.artefacts import KINDS, find_artefacts, resized, typical_density
from tests.small_cells import BACKGROUND, DAB, HAEMATOXYLIN, RGB, over


def finds(rgb: RGB) -> bool:
    return find_artefacts(rgb, 0.5, BACKGROUND) is not None


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


@pytest.mark.parametrize("length_um", [220, 420])
def test_on_an_overview_a_line_is_longer_than_a_duct(length_um: float) -> None:
    """A grey oblique line, 16 um wide, at 4.6 um/px."""
    y, x = (np.mgrid[:160, :210] + 0.5) * 4.6
    along, across = (x - 400) * 0.8 + (y - 350) * 0.6, (y - 350) * 0.8 - (x - 400) * 0.6
    line = 0.3 * np.exp(-((across / 8) ** 2)) * (np.abs(along) < length_um / 2)
    image = over(np.array(BACKGROUND), 0.05 * HAEMATOXYLIN + line[..., None])
    assert (find_artefacts(image, 4.6, BACKGROUND) is not None) == (length_um > 300)


def tissue() -> tuple[RGB, np.ndarray]:
    """H&E of 200 x 240 um at 0.5 um/px: nuclei in eosin, and its optical density."""
    y, x = (np.mgrid[:400, :480] + 0.5) * 0.5
    nuclei = np.hypot((y + 7) % 14 - 7, (x + 7) % 14 - 7) < 3.5
    blue = cv2.GaussianBlur(0.5 * nuclei.astype(float), (0, 0), 0.8)
    density = blue[..., None] * HAEMATOXYLIN + 0.18 * np.array(EOSIN)
    return over(np.array(BACKGROUND), density), density


EOSIN = (0.07, 0.94, 0.33)
INKS = {
    "black": (0.58, 0.58, 0.57),
    "cyan": (0.84, 0.50, 0.20),
    "blue": (0.75, 0.62, 0.22),
    "navy": (0.67, 0.67, 0.34),
    "green": (0.82, 0.25, 0.50),
    "dark green": (0.82, 0.37, 0.44),
    "red": (0.06, 0.72, 0.69),
    "crimson": (0.10, 0.77, 0.63),
}


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("width_um", [9, 40])
def test_a_stroke_of_pen_is_found_where_it_is(ink: str, width_um: float) -> None:
    """An oblique stroke; the stroke may be found 8 um wider, for its pale edge."""
    clean, density = tissue()
    assert find_artefacts(clean, 0.5, BACKGROUND) is None
    y, x = (np.mgrid[:400, :480] + 0.5) * 0.5
    distance = np.abs((x - 120) * 0.8 + (y - 100) * 0.6)
    stroke = 1 / (1 + np.exp((distance - width_um / 2) / 0.7))
    inked = over(np.array(BACKGROUND), density + stroke[..., None] * 1.1 * np.array(INKS[ink]))
    found = find_artefacts(inked, 0.5, BACKGROUND)
    assert found is not None
    pen = resized(found, (400, 480)) == 1 + KINDS.index("pen")
    assert pen[distance < width_um / 2 - 1].mean() > 0.95
    assert not pen[distance > width_um / 2 + 10].any()


@pytest.mark.parametrize("ink", ["blue", "navy"])
@pytest.mark.parametrize(("opacity", "width_um"), [(0.7, 12), (0.85, 9)])
def test_ink_of_the_hue_of_nuclei_has_no_gaps(ink: str, opacity: float, width_um: float) -> None:
    """An opaque stroke over tissue; a row of nuclei as wide and dark has gaps."""
    clean, density = tissue()
    y, x = (np.mgrid[:400, :480] + 0.5) * 0.5
    across = (x - 120) * 0.8 + (y - 100) * 0.6
    cover = (opacity / (1 + np.exp((np.abs(across) - width_um / 2) / 0.7)))[..., None]
    color = {"blue": (45, 60, 150), "navy": (60, 60, 120)}[ink]
    inked = (clean * (1 - cover) + cover * np.array(color)).round().astype(np.uint8)
    found = find_artefacts(inked, 0.5, BACKGROUND)
    assert found is not None
    pen = resized(found, (400, 480)) == 1 + KINDS.index("pen")
    assert pen[np.abs(across) < width_um / 2 - 1].mean() > 0.8
    assert not pen[np.abs(across) > width_um / 2 + 10].any()
    along = (x - 120) * 0.6 - (y - 100) * 0.8
    row = np.hypot(across, (along + 4.75) % 9.5 - 4.75) < 4.5
    nuclei = cv2.GaussianBlur(0.6 * row, (0, 0), 0.6)[..., None] * HAEMATOXYLIN
    assert find_artefacts(over(np.array(BACKGROUND), density + nuclei), 0.5, BACKGROUND) is None


@pytest.mark.parametrize("closed", [True, False])
def test_a_dark_rim_is_a_bubble_where_it_is_round_and_pen_where_it_is_not(closed: bool) -> None:
    """Both are grey, 12 um wide and as dark as ink: a circle, and a wave across the tile."""
    _, density = tissue()
    y, x = (np.mgrid[:400, :480] + 0.5) * 0.5
    distance = np.hypot(y - 100, x - 120) - 60 if closed else y - 100 - 20 * np.sin(x / 30)
    rim = 0.7 / (1 + np.exp((np.abs(distance) - 6) / 0.7))
    found = find_artefacts(over(np.array(BACKGROUND), density + rim[..., None]), 0.5, BACKGROUND)
    assert found is not None
    kind = 1 + KINDS.index("edge" if closed else "pen")
    assert (resized(found, (400, 480))[np.abs(distance) < 4] == kind).mean() > 0.9


def test_the_rim_of_a_bubble_that_touches_dark_nuclei_is_none_of_pen() -> None:
    """A soft dark rim, 8 um wide; grey nuclei touch it at one side."""
    _, density = tissue()
    y, x = (np.mgrid[:400, :480] + 0.5) * 0.5
    rim = 0.9 * np.exp(-(((np.hypot(y - 90, x - 130) - 55) / 5) ** 2))
    nuclei = 0.25 * (np.hypot((y + 4) % 10 - 5, (x + 3) % 10 - 5) < 4) * (x > 170)
    gray = np.maximum(rim, nuclei)[..., None]
    found = find_artefacts(over(np.array(BACKGROUND), density + gray), 0.5, BACKGROUND)
    assert found is not None
    kinds = resized(found, (400, 480))
    assert (kinds[rim > 0.8] == 1 + KINDS.index("edge")).mean() > 0.95
    assert not (kinds == 1 + KINDS.index("pen")).any()


@pytest.mark.parametrize("radius_um", [20, 25, 30])
@pytest.mark.parametrize("closed", [True, False])
def test_a_small_rim_is_a_bubble_only_where_it_is_round(radius_um: float, closed: bool) -> None:
    """A grey circle that absorbs half of the light, with two gaps of 2 um; a quarter of one."""
    _, density = tissue()
    y, x = (np.mgrid[:400, :480] + 0.5) * 0.5
    around = np.arctan2(y - 100, x - 120) * radius_um
    distance = np.abs(np.hypot(y - 100, x - 120) - radius_um)
    shown = np.abs(np.abs(around) - radius_um) > 1 if closed else np.abs(around) < 0.7 * radius_um
    rim = 0.3 * np.exp(-((distance / 4) ** 2)) * shown
    found = find_artefacts(over(np.array(BACKGROUND), density + rim[..., None]), 0.5, BACKGROUND)
    if not closed:
        assert found is None
    else:
        assert found is not None
        edge = resized(found, (400, 480)) == 1 + KINDS.index("edge")
        assert edge[rim > 0.2].mean() > 0.9
        assert not edge[distance > 16].any()


def test_a_bubble_and_dust_are_told_from_tissue() -> None:
    _, density = tissue()
    y, x = (np.mgrid[:400, :480] + 0.5) * 0.5
    rim = np.exp(-(((np.hypot(y - 90, x - 110) - 60) / 3) ** 2))
    found = find_artefacts(
        over(np.array(BACKGROUND), density + 0.4 * rim[..., None]), 0.5, BACKGROUND
    )
    assert found is not None
    assert set(np.unique(found)) == {0, 1 + KINDS.index("edge")}
    speck = np.hypot(y - 90, x - 110) < 13
    found = find_artefacts(
        over(np.array(BACKGROUND), density + 1.2 * speck[..., None]), 0.5, BACKGROUND
    )
    assert found is not None
    assert set(np.unique(found)) == {0, 1 + KINDS.index("dust")}


@pytest.mark.parametrize("dye", ["gray", "haematoxylin"])
def test_a_small_colourless_particle_is_dust_where_there_is_no_tissue(dye: str) -> None:
    """A disc of 8 um on background, and the same between nuclei; a lone nucleus is none."""
    rgb, _ = tissue()
    y, x = (np.mgrid[:400, :480] + 0.5) * 0.5
    vector = np.full(3, 0.577) if dye == "gray" else HAEMATOXYLIN
    disc = 0.5 * (np.hypot(y - 90, x - 110) < 4)[..., None] * vector
    alone = find_artefacts(over(np.full_like(rgb, BACKGROUND), disc), 0.5, BACKGROUND)
    assert (alone is not None) == (dye == "gray")
    if alone is not None:
        kinds = resized(alone, (400, 480))
        assert (kinds[np.hypot(y - 90, x - 110) < 4] == 1 + KINDS.index("dust")).all()
        assert not kinds[np.hypot(y - 90, x - 110) > 16].any()
    assert find_artefacts(over(rgb, disc), 0.5, BACKGROUND) is None


def test_a_fold_is_denser_than_the_tissue_of_its_slide() -> None:
    """A band of three layers, on a slide of this density; on a denser slide it is none."""
    rgb, density = tissue()
    x = (np.mgrid[:400, :480][1] + 0.5) * 0.5
    density = density + 0.25 * np.array([0.5, 0.8, 0.4])
    folded = over(np.array(BACKGROUND), density * (1 + 2 * (np.abs(x - 120) < 20))[..., None])
    plain = over(np.array(BACKGROUND), density)
    typical = typical_density(plain, BACKGROUND)
    assert typical == pytest.approx(np.percentile(density.mean(axis=2), 75), abs=0.01)
    found = find_artefacts(folded, 0.5, BACKGROUND, typical)
    assert found is not None
    fold = resized(found, (400, 480)) == 1 + KINDS.index("fold")
    assert fold[np.abs(x - 120) < 18].mean() > 0.9
    assert not fold[np.abs(x - 120) > 30].any()
    assert find_artefacts(plain, 0.5, BACKGROUND, typical) is None
    assert find_artefacts(rgb, 0.5, BACKGROUND, typical) is None
