"""Stains by colour, and one image under two names: real images, and colours worked out by hand."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hemera.imaging.background import measure_background
from hemera.imaging.identity import contradictions, eosin_excess, identify, identify_stain
from hemera.imaging.slide import open_slide

HAEMATOXYLIN, EOSIN, DAB = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)
BROWNISH_EOSIN = (0.10, 0.75, 0.60)
WHITE, HAZE = (248, 247, 249), (178, 176, 170)


def section(rng, first, second, *, background=WHITE, amount=(0.6, 0.25), size=(300, 420)):
    """Nuclei of one stain on tissue of another, and background at the left."""
    noise = rng.random(size).astype(np.float32)
    nuclei = cv2.GaussianBlur(noise, (0, 0), 3)
    nuclei = np.where(nuclei > np.quantile(nuclei, 0.8), 1.0, 0.0)
    tissue = np.ones(size)
    tissue[:, :80] = nuclei[:, :80] = 0
    density = amount[0] * nuclei[..., None] * first + amount[1] * tissue[..., None] * second
    rgb = np.array(background) * 10**-density + rng.normal(0, 1, (*size, 3))
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def stain(rgb, background=WHITE, mpp=1.0):
    return identify_stain(rgb, mpp, background)


def test_excess_is_that_of_the_stain(rng):
    for vector, expected in (
        (HAEMATOXYLIN, (0.70 - 0.65 / 2) / 1.64),
        (EOSIN, (0.99 - 0.07 / 2) / 1.17),
        (DAB, (0.57 - 0.27 / 2) / 1.62),
    ):
        rgb = section(rng, vector, vector)
        excess, pixels = eosin_excess(rgb, 2.0, WHITE)
        assert pixels == 300 * 420
        assert np.median(excess) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("background", [WHITE, HAZE])
def test_stains(rng, background):
    def seen(first, second, **options):
        return stain(section(rng, first, second, background=background, **options), background)

    assert seen(HAEMATOXYLIN, EOSIN) == "he"
    assert seen(HAEMATOXYLIN, BROWNISH_EOSIN) == "he"
    assert seen(DAB, DAB) == "ihc"
    assert seen(HAEMATOXYLIN, DAB, amount=(0.5, 0.3)) == "ihc"
    # A score of 0: nothing but a pale counterstain.
    assert seen(HAEMATOXYLIN, HAEMATOXYLIN, amount=(0.35, 0.03)) != "he"


def test_no_evidence_no_verdict(rng):
    assert stain(section(rng, HAEMATOXYLIN, EOSIN, amount=(0, 0))) is None
    # A gray line, as the edge of a coverslip, is no stain.
    line = section(rng, HAEMATOXYLIN, EOSIN, amount=(0, 0))
    line[:, 200:206] = 60
    assert stain(line) is None
    # Red ink on a fifth of an IHC section.
    inked = section(rng, DAB, HAEMATOXYLIN)
    inked[:80, 80:] = (200, 40, 50)
    assert stain(inked) != "he"


def write(path: Path, rgb, **options):
    Image.fromarray(rgb).save(path, **options)
    with open_slide(path, mpp=1.0) as slide:
        return identify(slide)


def verdicts(he, her2):
    return {column: verdict for column, (verdict, _) in contradictions(he, her2).items()}


def test_contradictions(rng, tmp_path):
    he = section(rng, HAEMATOXYLIN, EOSIN)
    first = write(tmp_path / "he.png", he)
    other = write(tmp_path / "other.png", section(rng, HAEMATOXYLIN, EOSIN))
    her2 = write(tmp_path / "her2.png", section(rng, HAEMATOXYLIN, DAB, amount=(0.5, 0.3)))
    copies = {
        "renamed.png": (he, {}),
        "again.jpg": (he, {"quality": 40}),
        "small.png": (cv2.resize(he, (231, 165), interpolation=cv2.INTER_AREA), {}),
    }
    assert verdicts(first, her2) == {}
    assert verdicts(her2, first) == {"he": "wrong_stain", "her2": "wrong_stain"}
    assert verdicts(first, other) == {"her2": "wrong_stain"}
    assert verdicts(her2, write(tmp_path / "x.png", section(rng, DAB, DAB))) == {
        "he": "wrong_stain"
    }
    for name, (rgb, options) in copies.items():
        found = write(tmp_path / name, rgb, **options)
        assert verdicts(first, found) == {"he": "refuse", "her2": "refuse"}, name
    assert write(tmp_path / "renamed.png", he).digest == first.digest
    gray = np.repeat(cv2.cvtColor(he, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    assert verdicts(first, write(tmp_path / "gray.jpg", gray)) == {"her2": "wrong_stain"}
    # Empty glass is no gray image; it is refused for what it lacks.
    assert verdicts(first, write(tmp_path / "empty.png", np.full_like(he, 240))) == {}
    swapped = contradictions(her2, first)
    assert "swap he and her2" in swapped["he"][1]


def test_one_section_in_two_stains_is_no_copy(rng, tmp_path):
    seed = int(rng.integers(1 << 30))
    pair = [section(np.random.default_rng(seed), HAEMATOXYLIN, second) for second in (EOSIN, DAB)]
    he, her2 = (write(tmp_path / f"{n}.png", rgb) for n, rgb in enumerate(pair))
    assert verdicts(he, her2) == {}


NO_TISSUE = ("qc_tiles/no-tissue.png", "qc_tiles/no-tissue-line.png")
PLAIN = (".png", ".jpg", ".jpeg")


@pytest.mark.slow
def test_every_real_image(images):
    """At least 98 % of the real images, and none is the other stain."""
    found = {}
    with (images / "MANIFEST.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            path = images / row["file"]
            truth = {"H&E": "he", "IHC": "ihc"}.get(row["stain"].split(" ")[0])
            if truth and path.suffix in PLAIN and path.parent.name != "train":
                rgb = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
                # Sizes of nuclei differ; the rule does not depend on the resolution.
                side = max(rgb.shape)
                factor = min(1.0, 2048 / side)
                rgb = cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
                back = measure_background([rgb], 0.5)
                seen = identify_stain(rgb, 0.5, back.color if back.measured else None)
                found[row["file"]] = truth, seen
    assert len(found) > 80
    wrong = {name for name, (truth, seen) in found.items() if seen not in (truth, None)}
    assert not wrong
    unknown = {name for name, (_, seen) in found.items() if seen is None} - set(NO_TISSUE)
    assert len(unknown) <= 0.02 * len(found), unknown
