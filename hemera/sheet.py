"""Read and validate the sheet of pairs, and divide it into units.

Light on purpose: Snakemake imports this module each time it parses the workflow.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from hemera.config.base import nearest
from hemera.errors import SheetError

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$"
MPP_BOUNDS = (0.05, 20.0)
HEADER_MAX = 200
"""Columns of a sheet, unknown ones among them, of which each is named in a message."""
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
"""Files with one plain image: registered pairs of these are processed in blocks."""

_PATH_HOSTILE = re.compile(r"[\x00-\x1f\x7f\"'`$;|&<>*?{}\\]|^[-~]")


def _path(value: str | Path, info: ValidationInfo) -> Path:
    if _PATH_HOSTILE.search(str(value)):
        raise ValueError(
            f"{info.field_name} is {str(value)!r}, which a shell would read as more than a path; "
            "rename the file without quotes, braces, $ ; | & < > * ? \\ and without - or ~ in front"
        )
    return Path((info.context or {}).get("folder", ""), value)


Split = Literal["", "train", "val", "test"]
Score = Literal["", "0", "1+", "2+", "3+"]
Status = Literal["", "negative", "positive"]
SPLITS: tuple[str, ...] = typing.get_args(Split)[1:]
SCORES: tuple[str, ...] = typing.get_args(Score)[1:]
Name = Annotated[str, Field(pattern=NAME)]
SheetPath = Annotated[Path, BeforeValidator(_path)]
Mpp = Annotated[float, Field(ge=MPP_BOUNDS[0], le=MPP_BOUNDS[1])]


class Pair(BaseModel):
    """One row of the sheet, its paths resolved against the sheet's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pair: Name
    case: Name
    dataset: Name
    he: SheetPath
    her2: SheetPath | None = None
    split: Split = ""
    score: Score = ""
    status: Status = ""
    site: Annotated[str, Field(pattern=f"^$|{NAME}")] = ""
    registered: bool = False
    mirrored: bool = False
    he_mpp: Mpp | None = None
    her2_mpp: Mpp | None = None
    he_landmarks: SheetPath | None = None
    her2_landmarks: SheetPath | None = None
    roi: SheetPath | None = None
    annotations: SheetPath | None = None
    he_artefacts: SheetPath | None = None
    her2_artefacts: SheetPath | None = None
    verdict: Literal["", "accept", "refuse"] = ""
    displacement: SheetPath | None = None
    verdict_reason: str = ""
    """For readers; no stage reads it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.her2 is None:
            given = [name for name in HER2_COLUMNS if getattr(self, name)]
            if given:
                raise ValueError(
                    f"her2 is empty beside {', '.join(given)}, which refer to it; give the HER2 "
                    "image, or leave them empty for an H&E image alone"
                )
        if (self.he_landmarks is None) != (self.her2_landmarks is None):
            raise ValueError(
                "he_landmarks and her2_landmarks: only one is given; give both (one ACROBAT file "
                "serves both) or none"
            )
        if self.displacement is not None and self.registered:
            raise ValueError(
                "registered is true beside a displacement; leave one of the two empty: registered "
                "images need none"
            )
        if self.displacement is not None and self.mirrored:
            raise ValueError(
                "mirrored is true beside a displacement; leave mirrored empty: the displacement "
                "refers to HER2 as stored"
            )
        return self

    @property
    def in_block(self) -> bool:
        """Whether it is of plain images, alone or registered, which are processed in a block."""
        suffixes = {path.suffix.lower() for path in self.images}
        return (self.registered or self.her2 is None) and suffixes <= IMAGE_SUFFIXES

    @property
    def images(self) -> tuple[Path, ...]:
        """The H&E and, unless H&E is alone, the HER2 file."""
        return (self.he,) if self.her2 is None else (self.he, self.her2)

    @property
    def her2_image(self) -> Path:
        """The HER2 file; SheetError for H&E alone."""
        if self.her2 is None:
            raise SheetError(f"pair {self.pair}: H&E alone; this needs a HER2 image in the sheet")
        return self.her2

    @property
    def landmarks(self) -> tuple[Path, ...]:
        """The landmark files: none, one for both stains, or two."""
        given = [path for path in (self.he_landmarks, self.her2_landmarks) if path is not None]
        return tuple(dict.fromkeys(given))

    @property
    def artefacts(self) -> tuple[Path | None, Path | None]:
        """The files with the artefacts of H&E and of HER2; None: they are detected."""
        return self.he_artefacts, self.her2_artefacts

    @property
    def others(self) -> tuple[Path, ...]:
        """All other files that are given."""
        paths = (*self.artefacts, *self.landmarks, self.roi, self.annotations, self.displacement)
        return tuple(path for path in paths if path is not None)

    @property
    def has_landmarks(self) -> bool:
        """Whether errors at landmarks are measured: of whole slides only."""
        return bool(self.landmarks) and not self.in_block


HER2_COLUMNS = (
    *("registered", "mirrored", "her2_mpp", "he_landmarks", "her2_landmarks"),
    *("her2_artefacts", "displacement"),
)
"""The columns that refer to the HER2 image."""

COLUMNS = tuple(Pair.model_fields)
REQUIRED = ("pair", "case", "dataset", "he", "her2")

STAGE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "describe": (
        "pair", "he", "her2", "registered", "mirrored", "he_mpp", "her2_mpp",
        "he_artefacts", "her2_artefacts",
    ),
    "register": ("pair", "he", "her2", "mirrored", "he_mpp", "her2_mpp", "displacement"),
    "landmarks": (
        "pair", "mirrored", "he_landmarks", "her2_landmarks", "he_mpp", "her2_mpp",
    ),
    "landmarks_cohort": ("pair", "dataset"),
    "tile": (
        "pair", "he", "her2", "registered", "mirrored", "he_mpp", "her2_mpp", "roi", "verdict",
        "he_artefacts", "her2_artefacts",
    ),
    "filter": ("pair", "dataset", "score"),
    "index": ("pair", "case", "dataset", "split", "score", "he", "her2"),
    "cases": ("pair", "case", "dataset", "split", "score", "status", "site", "her2"),
    "train_encoder": ("pair", "case", "annotations"),
    "report": ("pair", "case", "dataset", "split", "score", "verdict", "mirrored"),
}  # fmt: skip
"""The columns that each stage reads: a change in another column does not rerun it."""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A validated sheet."""

    path: Path
    pairs: tuple[Pair, ...]

    @property
    def with_her2(self) -> "Sheet":
        """The sheet without the rows of H&E alone, which only the stages of the status use."""
        return Sheet(self.path, tuple(pair for pair in self.pairs if pair.her2 is not None))

    def pair(self, name: str) -> Pair:
        """Return a pair by its name."""
        known = {pair.pair: pair for pair in self.pairs}
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=5, cutoff=0)
            raise SheetError(
                f"{self.path.name}: no pair {name}; the most similar are {', '.join(similar)}"
            )
        return known[name]


def read_sheet(path: Path) -> Sheet:
    """Read and check a sheet: its columns, names and values, not its files.

    Raises:
        SheetError: one line per fault, all faults of the sheet together.
    """
    pairs, faults = parse_sheet(path)
    if faults:
        raise SheetError("\n".join(faults))
    return Sheet(path, pairs)


def parse_sheet(
    path: Path, source: tuple[str, Sequence[int]] | None = None
) -> tuple[tuple[Pair, ...], list[str]]:
    """Return the valid rows of a sheet, and a line per fault of the others.

    Faults name the rows of `source` where the sheet was made of a table: its name, row numbers.
    """
    if not path.is_file():
        raise SheetError(f"{path}: no such file; give the path of a sheet of pairs")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SheetError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
    # Not splitlines: it would cut a row at characters that a spreadsheet leaves inside a cell.
    lines = [
        (number, [cell.strip() for cell in line.split("\t")])
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    header = lines[0][1] if lines else []
    faults = [f"{path.name}: {fault}" for fault in _header_faults(header)]
    if len(lines) == 1:
        faults.append(f"{path.name}: no pairs below the header; give one row per pair")
    if faults:
        raise SheetError("\n".join(faults))
    name_of_table, numbers = source or (path.name, [number for number, _ in lines[1:]])
    rows: dict[int, Pair] = {}
    names: dict[str, int] = {}
    for number, (_, cells) in zip(numbers, lines[1:], strict=True):
        row = f"{name_of_table} row {number}"
        if len(cells) > len(header):
            faults.append(
                f"{row}: {len(cells)} cells under {len(header)} columns; separate cells by one tab"
            )
            continue
        given = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
        try:
            rows[number] = Pair.model_validate(given, context={"folder": path.parent})
        except ValidationError as error:
            faults += [f"{row}: {_fault(details)}" for details in error.errors()]
        name = given.get("pair", "")
        # Names become files, and not every file system distinguishes a from A.
        first = names.setdefault(name.lower(), number)
        if name and first != number:
            faults.append(
                f"{row}: pair {name!r} is already in row {first}; give each pair its own name, not "
                "only in another case"
            )
    faults += [f"{name_of_table} {fault}" for fault in _common_faults(rows)]
    return tuple(rows.values()), faults


NO_FILE = "no such file"


def missing_files(sheet: Sheet, *, images: bool = True) -> dict[Path, str]:
    """Return the files of a sheet that do not exist or cannot be reached, and why.

    Without `images`, those of H&E and HER2 may be missing, but must not be unreachable.
    """
    found = {
        path: path in pair.images for pair in sheet.pairs for path in (*pair.images, *pair.others)
    }
    faults = {path: _absence(path) for path in found}
    return {
        path: fault
        for path, fault in faults.items()
        if fault is not None and (images or not found[path] or fault != NO_FILE)
    }


def _absence(path: Path) -> str | None:
    try:
        return None if path.exists() else NO_FILE
    except OSError as error:
        return (error.strerror or type(error).__name__).lower()


def units(sheet: Sheet, block_count: int) -> dict[str, tuple[Pair, ...]]:
    """Divide a sheet into units, the work of one job each.

    A whole-slide pair is a unit. Registered pairs of plain images are divided into `block_count`
    blocks ``{dataset}.{number}`` by a hash of their names, so that an added pair changes one block.
    Plain H&E images alone are in as many further blocks.
    """
    found: dict[str, list[Pair]] = {}
    for pair in sheet.pairs:
        found.setdefault(_unit(pair, block_count), []).append(pair)
    return {name: tuple(found[name]) for name in sorted(found)}


def unit_pairs(sheet: Sheet, unit: str, block_count: int) -> tuple[Pair, ...]:
    """Return the pairs of one unit."""
    pairs = tuple(pair for pair in sheet.pairs if _unit(pair, block_count) == unit)
    if not pairs:
        raise SheetError(
            f"{sheet.path.name}: no unit {unit} when image pairs are divided into {block_count} "
            "blocks; give the name of a pair of whole slides, or a block such as bci.000"
        )
    return pairs


def digest(pairs: Iterable[Pair], stage: str) -> str:
    """Return a digest of what `stage` reads of these rows, so that a change reruns its readers."""
    rows = [{name: getattr(pair, name) for name in STAGE_COLUMNS[stage]} for pair in pairs]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_rows(rows: Iterable[Mapping[str, str]]) -> str:
    """Return the text of a sheet with all columns, from cells given as texts.

    Raises:
        SheetError: when the name of a file is not UTF-8.
    """
    lines = ["\t".join(COLUMNS)]
    lines += ["\t".join(str(row.get(name, "")) for name in COLUMNS) for row in rows]
    for line in lines:
        # Python reads other bytes of a file name as surrogates.
        if any("\ud800" <= letter <= "\udfff" for letter in line):
            raise SheetError(f"{line!a}: the name of a file is not UTF-8; rename the file")
    return "\n".join(lines) + "\n"


def _unit(pair: Pair, block_count: int) -> str:
    if not pair.in_block:
        return pair.pair
    number = int.from_bytes(hashlib.sha256(pair.pair.encode()).digest()[:8]) % block_count
    number += block_count if pair.her2 is None else 0
    return f"{pair.dataset}.{number:03d}"


def _header_faults(header: list[str]) -> Iterator[str]:
    if len(header) > HEADER_MAX:
        yield f"{len(header)} columns, over {HEADER_MAX}; keep those of a sheet of pairs"
        return
    for separator, word in ((",", "commas"), (";", "semicolons")):
        if len(header) == 1 and separator in header[0]:
            yield f"its cells are separated by {word}; separate them by tabs"
            return
    if len(header) == 1 and len(header[0].split()) > 1:
        yield "its cells are separated by spaces; separate them by tabs"
        return
    for name in dict.fromkeys(header):
        if name not in COLUMNS:
            yield f"column {name!r} is unknown{nearest(name, COLUMNS)}"
        if header.count(name) > 1:
            yield f"column {name} is given {header.count(name)} times; keep one"
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        yield f"no column {', '.join(missing)}; add it (cells are separated by tabs, not by spaces)"


def _fault(details: ErrorDetails) -> str:
    """Return the fault of a cell, or of a row."""
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    column = str(details["loc"][0])
    if details["type"] == "missing":
        return f"{column} is empty; every row needs one"
    if details["type"] == "string_pattern_mismatch":
        expected = "give 1 to 100 letters, digits, hyphens and underscores, no hyphen in front"
    elif details["type"] == "literal_error":
        values = [value for value in typing.get_args(Pair.model_fields[column].annotation) if value]
        expected = f"give {', '.join(values[:-1])} or {values[-1]}, or nothing"
    elif Pair.model_fields[column].annotation is bool:
        expected = "give true or false, or nothing"
    elif column in ("he_mpp", "her2_mpp"):
        low, high = MPP_BOUNDS
        expected = f"give {low:g} to {high:g} um per pixel with a decimal point, or nothing"
    else:
        expected = details["msg"]
    return f"{column} is {details['input']!r}; {expected}"


def _split_words(split: str) -> str:
    return f"split {split}" if split else "no split"


def _common_faults(rows: Mapping[int, Pair]) -> Iterator[str]:
    """Yield the contradictions between rows."""
    splits: dict[str, tuple[str, int]] = {}
    owners: dict[str, tuple[str, int]] = {}
    for row, pair in rows.items():
        split, first = splits.setdefault(pair.case, (pair.split, row))
        if split != pair.split:
            yield (
                f"row {row}: case {pair.case} has {_split_words(pair.split)} here and "
                f"{_split_words(split)} in row {first}; give both rows the same split"
            )
        for column, image in zip(("he", "her2"), pair.images, strict=False):
            case, first = owners.setdefault(os.path.normpath(image), (pair.case, row))
            if case != pair.case:
                yield (
                    f"row {row}: {column} {image.name} belongs to case {pair.case} here and to "
                    f"{case} in row {first}; give both rows the same case, or the image could be "
                    "in two splits"
                )
