"""Content of the demo cohort: every slide and image pair, the sheet, the names of all files."""

import dataclasses

from hemera.errors import ConfigError

SEED = 20251
"""Seed of the cohort that the demo ships."""

COLUMNS = (
    *("pair", "case", "dataset", "he", "her2", "split", "score", "registered", "mirrored"),
    *("he_mpp", "her2_mpp", "he_landmarks", "her2_landmarks", "roi", "verdict", "displacement"),
)
LANDMARKS = "acrobat/acrobat_validation_points.csv"
META = "acrobat/df_acrobat_meta.csv"
TILE_SIDE_PX = 1024
TILE_MPP = 0.46


@dataclasses.dataclass(frozen=True)
class SlidePair:
    """One whole-slide case in ACROBAT's layout; angles turn H&E onto HER2, y down."""

    number: int
    part: str
    split: str
    score: str
    he_size_px: tuple[int, int]
    her2_size_px: tuple[int, int]
    he_mpp: float
    her2_mpp: float
    angle_deg: float
    shift_um: tuple[float, float]
    elastic_um: float
    artefacts: bool = False
    other_tissue: bool = False
    landmarks: bool = False

    @property
    def pair(self) -> str:
        """Name in the sheet; ids repeat across ACROBAT's parts, so the part belongs to it."""
        return f"acrobat_{self.part}_{self.number}"

    @property
    def he(self) -> str:
        """File of the H&E slide, relative to the cohort's folder."""
        return f"acrobat/{self.number}_HE_{self.part}.tif"

    @property
    def her2(self) -> str:
        """File of the HER2 slide."""
        return f"acrobat/{self.number}_HER2_{self.part}.tif"


@dataclasses.dataclass(frozen=True)
class TilePair:
    """One registered image pair in BCI's layout."""

    number: int
    part: str
    score: str
    gray: bool = False
    jpeg: bool = True
    empty: bool = False

    @property
    def pair(self) -> str:
        """Name in the sheet: the file name in allowed characters."""
        return f"bci_{self.part}_{self.number:05d}"

    @property
    def file(self) -> str:
        """File name, shared by both stains."""
        return f"{self.number:05d}_{self.part}_{self.score}.png"

    @property
    def he(self) -> str:
        """File of the H&E image, relative to the cohort's folder."""
        return f"bci/HE/{self.part}/{self.file}"

    @property
    def her2(self) -> str:
        """File of the HER2 image."""
        return f"bci/IHC/{self.part}/{self.file}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All pairs of one size of the cohort."""

    slides: tuple[SlidePair, ...]
    tiles: tuple[TilePair, ...]


def _full() -> Plan:
    slides = (
        # Two cases to train on, one of them with a blurred region and a pen mark.
        SlidePair(
            *(0, "train", "train", "3+", (4016, 3008), (3872, 3344), 0.92, 0.92),
            *(14.0, (61.0, -38.0), 26.0),
            landmarks=True,
        ),
        SlidePair(
            *(1, "train", "train", "2+", (4112, 2976), (3664, 3408), 0.92, 0.912),
            *(-31.0, (-44.0, 52.0), 22.0),
            artefacts=True,
        ),
        # HER2 of another block: its registration has to be refused.
        SlidePair(
            *(2, "train", "train", "1+", (3776, 2912), (3920, 2832), 0.92, 0.92),
            *(9.0, (30.0, 24.0), 20.0),
            other_tissue=True,
        ),
        # Id 0 again, another patient; nearly upside down. Kept for the test.
        SlidePair(
            *(0, "val", "test", "3+", (3936, 3072), (3808, 3520), 0.914, 0.92),
            *(152.0, (-35.0, -27.0), 24.0),
            landmarks=True,
        ),
    )
    scores = ("0", "1+", "2+", "3+")
    train = tuple(
        TilePair(
            *(number, "train", scores[number % 4]),
            gray=number % 5 in (1, 3),
            jpeg=number % 7 != 2,
            empty=number == 17,
        )
        for number in range(20)
    )
    test = tuple(
        TilePair(number, "test", scores[(number + 1) % 4], gray=number % 3 == 0, jpeg=number != 5)
        for number in range(8)
    )
    return Plan(slides, train + test)


def _small() -> Plan:
    slide = SlidePair(
        *(0, "train", "train", "3+", (1616, 1216), (1680, 1344), 0.92, 0.92),
        *(17.0, (33.0, -21.0), 14.0),
        landmarks=True,
    )
    tiles = (
        TilePair(0, "train", "1+"),
        TilePair(1, "train", "3+", jpeg=False),
        TilePair(0, "test", "2+", gray=True),
        TilePair(1, "test", "0"),
    )
    return Plan((slide,), tiles)


def _tiles() -> Plan:
    """Return image pairs alone, enough of them that a tenth can have masks."""
    scores = ("0", "1+", "2+", "3+")
    counts = {"train": 40, "test": 16}
    return Plan(
        (),
        tuple(
            TilePair(number, part, scores[number % 4], gray=number % 5 in (1, 3))
            for part, count in counts.items()
            for number in range(count)
        ),
    )


SIZES = {"full": _full, "small": _small, "tiles": _tiles}


def plan(size: str) -> Plan:
    """Return the content of the cohort of this size.

    Raises:
        ConfigError: there is no such size.
    """
    if size not in SIZES:
        raise ConfigError(f"size: {size!r} is unknown; choose from {', '.join(SIZES)}")
    return SIZES[size]()


def sheet_text(size: str = "full") -> str:
    """Return pairs.tsv of the cohort; paths are relative to its folder."""
    cohort = plan(size)
    rows = ["\t".join(COLUMNS)]
    for slide in cohort.slides:
        points = LANDMARKS if slide.landmarks else ""
        row = (slide.pair, slide.pair, "acrobat", slide.he, slide.her2, slide.split, slide.score)
        resolution = (f"{slide.he_mpp:g}", f"{slide.her2_mpp:g}")
        rows.append("\t".join((*row, "false", "false", *resolution, points, points, "", "", "")))
    for tile in cohort.tiles:
        split = "test" if tile.part == "test" else ""
        row = (tile.pair, tile.pair, "bci", tile.he, tile.her2, split, tile.score)
        rows.append("\t".join((*row, "true", "false", f"{TILE_MPP:g}", f"{TILE_MPP:g}", *[""] * 5)))
    return "\n".join(rows) + "\n"


def outputs(size: str = "full") -> tuple[str, ...]:
    """Return every file that `write_cohort` writes, relative to its folder."""
    cohort = plan(size)
    pairs: tuple[SlidePair | TilePair, ...] = (*cohort.slides, *cohort.tiles)
    files = [file for item in pairs for file in (item.he, item.her2, f"truth/{item.pair}.npz")]
    return (*files, META, LANDMARKS, "pairs.tsv")
