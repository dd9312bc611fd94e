"""Read and validate the sheet of pairs, and cut it into units.

Light on purpose: Snakemake imports this module each time it parses the workflow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hemera.errors import SheetError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
PATH_HOSTILE = re.compile(r"[\x00-\x1f\x7f\"'`$;|&<>*?{}\\]")
SPLITS = ("train", "val", "test")
SCORES = ("0", "1+", "2+", "3+")
VERDICTS = ("accept", "refuse")
MPP_BOUNDS = (0.05, 20.0)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
"""Files that hold one plain image: registered pairs of these are worked on in blocks."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of the sheet, its paths resolved against the sheet's folder."""

    pair: str
    case: str
    dataset: str
    he: Path
    her2: Path
    split: str = ""
    score: str = ""
    registered: bool = False
    mirrored: bool = False
    he_mpp: float | None = None
    her2_mpp: float | None = None
    he_landmarks: Path | None = None
    her2_landmarks: Path | None = None
    roi: Path | None = None
    verdict: str = ""
    displacement: Path | None = None

    @property
    def in_block(self) -> bool:
        """Whether the pair is a ready-made pair of plain images, worked on in a block."""
        return (
            self.registered
            and self.he.suffix.lower() in IMAGE_SUFFIXES
            and self.her2.suffix.lower() in IMAGE_SUFFIXES
        )

    @property
    def images(self) -> tuple[Path, Path]:
        """The H&E and the HER2 file."""
        return self.he, self.her2

    @property
    def landmarks(self) -> tuple[Path, ...]:
        """The landmark files: none, one that serves both stains, or two."""
        given = [path for path in (self.he_landmarks, self.her2_landmarks) if path is not None]
        return tuple(dict.fromkeys(given))


COLUMNS = tuple(field.name for field in dataclasses.fields(Pair))
REQUIRED = ("pair", "case", "dataset", "he", "her2")

STAGE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "describe": ("pair", "he", "her2", "registered", "he_mpp", "her2_mpp"),
    "register": ("pair", "he", "her2", "mirrored", "he_mpp", "her2_mpp", "displacement"),
    "landmarks": (
        "pair", "mirrored", "he_landmarks", "her2_landmarks", "he_mpp", "her2_mpp",
    ),
    "landmarks_cohort": ("pair", "dataset"),
    "tile": (
        "pair", "he", "her2", "registered", "mirrored", "he_mpp", "her2_mpp", "roi", "verdict",
    ),
    "filter": ("pair", "dataset", "score"),
    "index": ("pair", "case", "dataset", "split", "score", "he", "her2"),
    "report": ("pair", "case", "dataset", "split", "score", "verdict", "mirrored"),
}  # fmt: skip
"""The columns each stage reads: a change in another one does not concern it."""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A whole sheet, checked."""

    path: Path
    pairs: tuple[Pair, ...]


def read_sheet(path: Path) -> Sheet:
    """Read and check a sheet: its columns, names and values, not its files.

    Args:
        path: tab-separated text with a header; paths in it are relative to its own folder.

    Raises:
        SheetError: one line per fault, all faults of the sheet together.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SheetError(f"{path}: no such sheet; name one in config.yaml (sheet:)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SheetError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
    # Not splitlines: it would cut a row at characters that a spreadsheet leaves inside a cell.
    lines = [
        (number, line.split("\t"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise SheetError(f"{path.name}: empty; give a header with {', '.join(REQUIRED)}")
    header = [cell.strip() for cell in lines[0][1]]
    faults = _header_faults(header)
    if faults:
        raise SheetError("\n".join(f"{path.name}: {fault}" for fault in faults))
    pairs: list[Pair] = []
    rows: list[int] = []
    names: dict[str, int] = {}
    for number, row in lines[1:]:
        if len(row) > len(header):
            faults.append(
                f"row {number}: {len(row)} cells under {len(header)} columns; "
                "separate cells by one tab"
            )
            continue
        cells = dict(zip(header, [cell.strip() for cell in row], strict=False))
        row_faults: list[str] = []
        pair = _pair(cells, path.parent, row_faults)
        name = cells.get("pair", "")
        if name and names.setdefault(name, number) != number:
            row_faults.append(
                f"pair {name!r} stands in row {names[name]} already; give each pair its own name"
            )
        faults += [f"row {number}: {fault}" for fault in row_faults]
        if pair is not None:
            pairs.append(pair)
            rows.append(number)
    faults += _common_faults(pairs, rows)
    if not pairs and not faults:
        faults.append("no pairs below the header; give one row per pair")
    if faults:
        raise SheetError("\n".join(f"{path.name} {fault}" for fault in faults))
    return Sheet(path, tuple(pairs))


def units(sheet: Sheet, block_count: int) -> dict[str, tuple[Pair, ...]]:
    """Cut a sheet into units: what one job works on.

    A whole-slide pair is a unit of its own name. Ready-made pairs of plain images are cut into
    `block_count` blocks per data set by a hash of the pair's name, so that an added pair touches
    one block; blocks are named ``{dataset}.{number}``, with a dot that no pair's name holds.
    """
    found: dict[str, list[Pair]] = {}
    for pair in sheet.pairs:
        found.setdefault(_unit(pair, block_count), []).append(pair)
    return {name: tuple(found[name]) for name in sorted(found)}


def unit_pairs(sheet: Sheet, unit: str, block_count: int) -> tuple[Pair, ...]:
    """Return the pairs of one unit.

    Raises:
        SheetError: when the sheet has no such unit.
    """
    pairs = tuple(pair for pair in sheet.pairs if _unit(pair, block_count) == unit)
    if not pairs:
        raise SheetError(
            f"{sheet.path.name}: no unit {unit} when image pairs are cut into {block_count} "
            "blocks; name a pair of whole slides, or a block as {dataset}.{number}"
        )
    return pairs


def digest(pairs: Iterable[Pair], stage: str) -> str:
    """Return a digest of what `stage` reads of these rows, so that a change reruns its readers."""
    rows = [{name: _plain(getattr(pair, name)) for name in STAGE_COLUMNS[stage]} for pair in pairs]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def write_rows(rows: Iterable[Mapping[str, str]]) -> str:
    """Return the text of a sheet with all columns, from cells given as texts."""
    lines = ["\t".join(COLUMNS)]
    lines += ["\t".join(str(row.get(name, "")) for name in COLUMNS) for row in rows]
    return "\n".join(lines) + "\n"


def _unit(pair: Pair, block_count: int) -> str:
    if not pair.in_block:
        return pair.pair
    number = int.from_bytes(hashlib.sha256(pair.pair.encode()).digest()[:8]) % block_count
    return f"{pair.dataset}.{number:03d}"


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _header_faults(header: list[str]) -> list[str]:
    faults = []
    for name in header:
        if name not in COLUMNS:
            faults.append(f"column {name!r} is unknown; known are {', '.join(COLUMNS)}")
    faults += [
        f"column {name} stands {header.count(name)} times; keep one"
        for name in dict.fromkeys(header)
        if header.count(name) > 1
    ]
    lacking = [name for name in REQUIRED if name not in header]
    if lacking:
        faults.append(
            f"no column {', '.join(lacking)}; add it (cells are separated by tabs, not by spaces)"
        )
    return faults


def _pair(cells: Mapping[str, str], folder: Path, faults: list[str]) -> Pair | None:
    """Make a pair of one row; append what is wrong to `faults` and return None then."""
    before = len(faults)

    def text(name: str) -> str:
        return cells.get(name, "")

    def name(column: str) -> str:
        value = text(column)
        if not NAME.fullmatch(value):
            shown = repr(value) if value else "empty"
            faults.append(
                f"{column} is {shown}; use 1 to 100 letters, digits, hyphens and underscores, "
                "no hyphen in front"
            )
        return value

    def path(column: str) -> Path | None:
        value = text(column)
        if not value:
            if column in REQUIRED:
                faults.append(f"{column} is empty; give a path")
            return None
        if PATH_HOSTILE.search(value) or value.startswith(("-", "~")):
            faults.append(
                f"{column} is {value!r}, which a shell would read as more than a path; rename the "
                "file without quotes, braces, $ ; | & < > * ? \\ and without - or ~ in front"
            )
            return None
        return folder / value

    def choice(column: str, known: tuple[str, ...]) -> str:
        value = text(column)
        if value and value not in known:
            faults.append(
                f"{column} is {value!r}; choose from {', '.join(known)}, or leave it empty"
            )
        return value

    def yes(column: str) -> bool:
        value = text(column).lower()
        if value not in ("", "true", "false"):
            faults.append(f"{column} is {text(column)!r}; write true or false, or leave it empty")
        return value == "true"

    def mpp(column: str) -> float | None:
        value = text(column)
        if not value:
            return None
        low, high = MPP_BOUNDS
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            faults.append(
                f"{column} is {value!r}; give um per pixel between {low:g} and {high:g}, "
                "or leave it empty to take the file's own"
            )
        return number

    displacement = path("displacement")
    registered = yes("registered")
    he, her2 = path("he"), path("her2")
    row = {
        "pair": name("pair"),
        "case": name("case"),
        "dataset": name("dataset"),
        "split": choice("split", SPLITS),
        "score": choice("score", SCORES),
        "verdict": choice("verdict", VERDICTS),
    }
    he_mpp, her2_mpp = mpp("he_mpp"), mpp("her2_mpp")
    he_landmarks, her2_landmarks = path("he_landmarks"), path("her2_landmarks")
    roi = path("roi")
    mirrored = yes("mirrored")
    if (he_landmarks is None) != (her2_landmarks is None):
        faults.append(
            "he_landmarks and her2_landmarks go together; give both (one ACROBAT file may stand "
            "in both) or none"
        )
    if displacement is not None and registered:
        faults.append(
            "registered is true beside a displacement; leave one of the two empty: images that "
            "come registered need no map"
        )
    if displacement is not None and mirrored:
        faults.append(
            "mirrored is true beside a displacement; leave mirrored empty: the map leads to HER2 "
            "as it is stored"
        )
    if len(faults) > before or he is None or her2 is None:
        return None
    return Pair(
        **row,
        he=he,
        her2=her2,
        registered=registered,
        mirrored=mirrored,
        he_mpp=he_mpp,
        her2_mpp=her2_mpp,
        he_landmarks=he_landmarks,
        her2_landmarks=her2_landmarks,
        roi=roi,
        displacement=displacement,
    )


def _common_faults(pairs: list[Pair], rows: list[int]) -> list[str]:
    """Return the faults that show only when rows are held beside each other."""
    faults = []
    splits: dict[str, tuple[str, int]] = {}
    for pair, row in zip(pairs, rows, strict=True):
        split, first = splits.setdefault(pair.case, (pair.split, row))
        if split != pair.split:
            faults.append(
                f"row {row}: case {pair.case} is {pair.split or 'free'} here and "
                f"{split or 'free'} in row {first}; a case stands in one split, give both the same"
            )
    owners: dict[str, tuple[str, int]] = {}
    for pair, row in zip(pairs, rows, strict=True):
        for column, image in zip(("he", "her2"), pair.images, strict=True):
            case, first = owners.setdefault(os.path.normpath(image), (pair.case, row))
            if case != pair.case:
                faults.append(
                    f"row {row}: {column} {image.name} belongs to case {pair.case} here and to "
                    f"{case} in row {first}; an image shown twice must be one case, or it could "
                    "stand in two splits"
                )
    return faults
