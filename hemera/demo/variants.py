"""Variants of synthetic tissue: how one image of nuclei for training differs from the next.

The demo cohort has one look. A network that is trained on it alone finds the nuclei of that look,
so `draw_variant` chooses shape, stains, staining pattern, artefacts and camera at random. Lengths
are in um of the image; amounts of stain are natural-log optical densities along a vector of length
one.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

PATTERNS = ("nuclear", "membrane", "cytoplasm", "mixed", "none")
"""Where DAB is: a nuclear marker, a membrane marker, diffuse cytoplasm, all of them, none."""
_PATTERN_FRACTIONS = (0.46, 0.35, 0.05, 0.09, 0.05)

# Colours of haematoxylin and of DAB from several scanners, natural-log density of R, G, B.
_HAEMATOXYLIN = np.array(
    [
        [0.650, 0.704, 0.286],
        [0.72, 0.56, 0.33],
        [0.66, 0.68, 0.31],
        [0.78, 0.53, 0.25],
        [0.60, 0.72, 0.35],
        [0.85, 0.45, 0.20],
    ]
)
_DAB = np.array(
    [
        [0.268, 0.570, 0.776],
        [0.31, 0.58, 0.78],
        [0.40, 0.60, 0.70],
        [0.48, 0.60, 0.64],
        [0.25, 0.50, 0.83],
    ]
)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Which part of a block of tissue is seen, and how it is deformed."""

    scale: float
    """How much larger the tissue appears than it was grown."""
    angle: float
    mirrored: bool
    stretch: float
    """Ratio of the two axes; far from 1, epithelium is columnar and nuclei are parallel."""
    bends_um: tuple[tuple[float, float], ...]
    """Wavelength and amplitude of random displacements."""


@dataclasses.dataclass(frozen=True)
class NucleusShape:
    """Size, outline and focus of nuclei; fractions are of all cells."""

    size: float
    size_spread: float
    elongation_spread: float
    irregular: float
    """Amplitude of waves of the outline, as a fraction of the radius."""
    indented: float
    missing: float
    """Fraction of cells whose nucleus is outside of the section."""
    pale: float
    pyknotic: float
    edge_um: float
    gap_um: float
    """Half the width of the gap between touching nuclei."""
    overlapping: int
    """Additional nuclei drawn over others."""
    defocused: int
    """Additional faint nuclei of another focal plane."""


@dataclasses.dataclass(frozen=True)
class Counterstain:
    """Haematoxylin in and between nuclei."""

    spread: float
    kinds: float
    """How different the kinds of cells are: exponent of their relative amounts."""
    vesicular: float
    grain: tuple[float, float]
    epithelium: float
    stroma: float
    veil: float
    clefts: bool


@dataclasses.dataclass(frozen=True)
class Staining:
    """DAB: pattern, fractions of cells and amounts."""

    pattern: str
    positive: float
    nuclear: float
    nuclear_spread: float
    nuclear_grain: tuple[float, float]
    """How unevenly nuclei are stained, in detail of 0.5 and of 1.2 um."""
    leak: float
    membrane: float
    intensities: str
    """Those of the HER2 score of the tissue; any: any cell has any; strong: all are strong."""
    width_um: float
    doubled_um: float
    """Distance of the membrane from the border between two cells: 0 one line, else two."""
    holes: float
    """How complete a membrane is: below 0 mostly broken, above 2 complete."""
    one_sided: float
    """Fraction of cells whose membrane is stained on one side."""
    tangential: float
    """Fraction of cells that are covered by a membrane which was cut along."""
    clear_cytoplasm: float
    """Fraction of stained cells whose cytoplasm is as pale as background."""
    cytoplasm: float
    unspecific: float


@dataclasses.dataclass(frozen=True)
class Debris:
    """What is not a nucleus: counts and amounts."""

    specks: int
    macrophages: float
    """Fraction of the cells of the stroma that are brown macrophages."""
    smear: float
    haze: float
    """Amount of blurred blue patches between the cells."""
    streaks: float
    vacuoles: int
    fold_um: float
    """Width of a fold; 0: none."""


@dataclasses.dataclass(frozen=True)
class Camera:
    """Colours of stains and background, optics and file."""

    haematoxylin: Vector
    dab: Vector
    tint: Vector
    background: Vector
    blur_um: float
    sharpened: float
    gamma: float
    glare: float
    noise: float
    noise_is_smooth: bool
    jpeg_quality: int
    """0: no JPEG."""
    background_error: Vector
    """Factors on the background when it is estimated."""
    background_is_measured: bool
    """Whether the estimate is the 99th percentile of the image."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant."""

    geometry: Geometry
    shape: NucleusShape
    counterstain: Counterstain
    staining: Staining
    debris: Debris
    camera: Camera


def draw_variant(rng: np.random.Generator) -> Variant:
    """Draw one variant; the same state of `rng` gives the same one."""
    staining = _staining(rng)
    # Pale nuclei between strong membranes, in columns, are the hardest to find.
    membranous = staining.pattern == "membrane"
    geometry = _geometry(rng, columnar=0.45 if membranous else 0.2)
    camera = _camera(rng, palest=0.08 if membranous else 0.2)
    return Variant(geometry, _shape(rng), _counterstain(rng), staining, _debris(rng), camera)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _sometimes(rng: np.random.Generator, fraction: float, low: float, high: float) -> float:
    """Return a uniform number in a fraction of the variants, else 0."""
    value = float(rng.uniform(low, high))
    return value if rng.random() < fraction else 0.0


def _geometry(rng: np.random.Generator, columnar: float) -> Geometry:
    """Draw a geometry; `columnar`: how often epithelium is."""
    is_columnar = rng.random() < columnar
    stretch = _log_uniform(rng, 1.25, 2.6) if is_columnar else float(np.exp(rng.normal(0, 0.06)))
    return Geometry(
        scale=_log_uniform(rng, 0.72, 1.5),
        angle=float(rng.uniform(0, 2 * np.pi)),
        mirrored=bool(rng.random() < 0.5),
        stretch=stretch,
        bends_um=(
            (float(rng.uniform(4, 9)), float(rng.uniform(0, 0.65))),
            (float(rng.uniform(10, 24)), float(rng.uniform(0, 1.0))),
        ),
    )


def _shape(rng: np.random.Generator) -> NucleusShape:
    return NucleusShape(
        size=float(np.exp(rng.uniform(-0.15, 0.25))),
        size_spread=float(rng.uniform(0.03, 0.18)),
        elongation_spread=float(rng.uniform(0, 0.25)),
        irregular=float(rng.uniform(0, 0.12)),
        indented=_sometimes(rng, 0.5, 0.0, 0.4),
        missing=float(rng.uniform(0, 0.2)),
        pale=float(rng.uniform(0, 0.15)),
        pyknotic=_sometimes(rng, 0.4, 0.0, 0.15),
        edge_um=float(rng.uniform(0.5, 1.6)),
        gap_um=float(rng.uniform(0, 0.5)),
        overlapping=int(rng.integers(0, 10)) if rng.random() < 0.5 else 0,
        defocused=int(rng.integers(0, 8)) if rng.random() < 0.4 else 0,
    )


def _counterstain(rng: np.random.Generator) -> Counterstain:
    return Counterstain(
        spread=float(rng.uniform(0.08, 0.5)),
        kinds=float(rng.uniform(0, 2)),
        vesicular=float(rng.uniform(-0.2, 0.8)),
        grain=(float(rng.uniform(0, 0.35)), float(rng.uniform(0, 0.4))),
        epithelium=float(rng.uniform(0, 0.22)),
        stroma=float(rng.uniform(0, 0.32)),
        veil=float(rng.uniform(0, 0.12)),
        clefts=bool(rng.random() < 0.3),
    )


def _staining(rng: np.random.Generator) -> Staining:
    pattern = str(rng.choice(PATTERNS, p=_PATTERN_FRACTIONS))
    diffuse = rng.random() < 0.2
    return Staining(
        pattern=pattern,
        positive=float(rng.beta(0.8, 1.1)),
        nuclear=_log_uniform(rng, 0.3, 2.4),
        nuclear_spread=float(rng.uniform(0.15, 1.0)),
        nuclear_grain=(float(rng.uniform(0, 0.5)), float(rng.uniform(0, 0.9))),
        leak=_sometimes(rng, 0.5, 0.0, 0.3),
        membrane=_log_uniform(rng, 0.4, 2.2),
        intensities=str(rng.choice(["score", "any", "strong"], p=[0.45, 0.25, 0.3])),
        width_um=float(rng.uniform(1.8, 3.5) if diffuse else rng.uniform(0.6, 1.6)),
        doubled_um=_sometimes(rng, 0.25, 0.7, 1.8),
        holes=float(rng.uniform(-0.5, 3.0)),
        one_sided=_sometimes(rng, 0.3, 0.2, 0.8),
        tangential=_sometimes(rng, 0.5, 0.0, 0.2),
        clear_cytoplasm=_sometimes(rng, 0.5, 0.2, 1.0),
        cytoplasm=float(rng.uniform(0.05, 0.5)),
        unspecific=float(rng.uniform(0, 0.16)),
    )


def _debris(rng: np.random.Generator) -> Debris:
    return Debris(
        specks=int(rng.integers(1, 12)) if rng.random() < 0.4 else 0,
        macrophages=_sometimes(rng, 0.08, 0.05, 0.4),
        smear=_sometimes(rng, 0.25, 0.1, 0.9),
        haze=_sometimes(rng, 0.3, 0.1, 0.5),
        streaks=_sometimes(rng, 0.15, 0.2, 0.8),
        vacuoles=int(rng.integers(1, 10)) if rng.random() < 0.3 else 0,
        fold_um=_sometimes(rng, 0.06, 8.0, 25.0),
    )


def _camera(rng: np.random.Generator, palest: float) -> Camera:
    """Draw a camera; `palest`: smallest strength of haematoxylin."""
    background = rng.uniform(205, 253) * np.exp(rng.normal(0, [0.03, 0.03, 0.06]))
    if rng.random() < 0.2:
        background = np.array([250.0, 248.0, 246.0])
    return Camera(
        haematoxylin=_vector(rng, _HAEMATOXYLIN) * np.float32(_log_uniform(rng, palest, 1.9)),
        dab=_vector(rng, _DAB) * np.float32(_log_uniform(rng, 0.5, 1.8)),
        tint=(rng.dirichlet([1, 1, 1]) * rng.uniform(0, 0.12)).astype(np.float32),
        background=np.minimum(background, 255).astype(np.float32),
        blur_um=float(rng.uniform(0.15, 0.9)),
        sharpened=_sometimes(rng, 0.4, 0.2, 2.0),
        gamma=float(np.exp(rng.normal(0, 0.15))) if rng.random() < 0.3 else 1.0,
        glare=_sometimes(rng, 0.3, 0.0, 0.3),
        noise=float(rng.uniform(0, 4)),
        noise_is_smooth=bool(rng.random() < 0.5),
        jpeg_quality=int(rng.integers(40, 96)) if rng.random() < 0.5 else 0,
        background_error=np.exp(rng.normal(0, 0.03, 3)).astype(np.float32),
        background_is_measured=bool(rng.random() < 0.4),
    )


def _vector(rng: np.random.Generator, measured: npt.NDArray[np.float64]) -> Vector:
    """Return a unit vector: a measured one or a mixture of them, and noise."""
    mixture = rng.dirichlet(np.ones(len(measured))) @ measured
    chosen = measured[rng.integers(len(measured))] if rng.random() < 0.5 else mixture
    vector = np.maximum(chosen + rng.normal(0, 0.04, 3), 0.03)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)
