"""Rows of the sheet for releases with a table of labels beside the slides: HEROHE and HER2SC."""

import collections
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hemera.errors import SheetError
from hemera.files.separated import read_cells
from hemera.sheet import SCORES, SPLITS

log = logging.getLogger(__name__)

STATUSES = ("negative", "positive")
COLUMNS = ("name", "score", "status", "split")

_HER2SC_FILE = re.compile(r"([A-Za-z0-9]+)[ _-](HE|HER2)\.(?:ndpi|svs|tiff?)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Label:
    """A row of a table of labels; empty texts are unknown."""

    name: str
    score: str
    status: str
    split: str


def read_labels(path: Path) -> list[Label]:
    """Read a table of labels: CSV with the columns name, score, status and split.

    `name` and one of score and status must be there; other columns are not read. A score may lack
    its plus sign. Cells are separated by commas, semicolons or tabs.

    Raises:
        SheetError: one line per fault of the table.
    """
    if not path.is_file():
        raise SheetError(f"{path}: no such file; give the table of labels, CSV")
    first, *others = read_cells(path) or [[]]
    header = [cell.strip().lower() for cell in first]
    if "name" not in header or not {"score", "status"} & {*header}:
        raise SheetError(
            f"{path}: its columns are {', '.join(header) or 'missing'}; give name, and score or "
            "status or both"
        )
    rows: dict[str, Label] = {}
    faults = []
    for number, cells in enumerate(others, 2):
        given = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        if not any(given.values()):
            continue
        label = Label(*(given.get(name, "") for name in COLUMNS))
        label = dataclasses.replace(
            label,
            score=label.score + "+" if label.score in ("1", "2", "3") else label.score,
            status=label.status.lower(),
            split=label.split.lower(),
        )
        faults += [f"{path.name} row {number}: {fault}" for fault in _faults(label)]
        if label.name in rows:
            faults.append(
                f"{path.name} row {number}: name {label.name!r} is there twice; keep one row"
            )
        rows[label.name] = label
    if faults:
        raise SheetError("\n".join(faults))
    return list(rows.values())


def _faults(label: Label) -> Iterator[str]:
    if not label.name:
        yield "name is empty; every row needs one"
    for column, values in (("score", SCORES), ("status", STATUSES), ("split", SPLITS)):
        value = getattr(label, column)
        if value and value not in values:
            yield (
                f"{column} is {value!r}; give {', '.join(values[:-1])} or {values[-1]}, or nothing"
            )


def herohe_rows(folder: Path, labels: Path) -> Iterator[dict[str, object]]:
    """Yield a row per labelled H&E slide of HEROHE, MIRAX, at any depth; each is a case.

    A label names its slide by the file name without suffix, or, where two folders have a slide of
    that name, by its path below `folder`. A slide below a folder whose name begins with test is of
    the test split, unless the label names another.

    Raises:
        SheetError: when a label fits several slides, or none fits any.
    """
    slides: dict[str, list[Path]] = collections.defaultdict(list)
    found = sorted(folder.rglob("*.mrxs"))
    for path in found:
        relative = path.relative_to(folder).with_suffix("")
        for key in {relative.name.lower(), relative.as_posix().lower()}:
            slides[key].append(path)
    used: dict[Path, str] = {}
    missing = []
    for label in read_labels(labels):
        key = re.sub(r"\.mrxs$", "", label.name.lower())
        own = slides.get(key, [])
        if len(own) > 1:
            raise SheetError(
                f"{labels.name}: {label.name} is the name of {own[0]} and of {own[1]}; give the "
                f"path below {folder} as the name"
            )
        if not own:
            missing.append(label.name)
            continue
        (path,) = own
        if path in used:
            raise SheetError(
                f"{labels.name}: {used[path]} and {label.name} are the same slide {path}; keep one"
            )
        used[path] = label.name
        if not path.with_suffix("").is_dir():
            log.warning(
                "%s: no folder %s with its data; left out, unpack it again", path, path.stem
            )
            continue
        pair = "herohe_" + re.sub(r"[^A-Za-z0-9_-]", "-", key)
        tested = any(
            part.lower().startswith("test") for part in path.relative_to(folder).parts[:-1]
        )
        split = label.split or ("test" if tested else "")
        yield {**_labelled(label, pair, "herohe"), "he": path, "split": split}
    _report(labels, missing, len(found) - len(used))


def her2sc_rows(folder: Path, labels: Path) -> Iterator[dict[str, object]]:
    """Yield a row per labelled case of HER2SC with an H&E slide, ``{case}_HE``, ``{case}_HER2``.

    Slides are found at any depth; a label names its case, with or without leading zeros. A case
    without a HER2 slide is H&E alone.

    Raises:
        SheetError: when two slides have the same name, or two labels the same case.
    """
    slides: dict[str, dict[str, Path]] = collections.defaultdict(dict)
    for path in sorted(folder.rglob("*")):
        match = _HER2SC_FILE.fullmatch(path.name)
        if match is None:
            continue
        stain = "her2" if match[2].upper() == "HER2" else "he"
        twin = slides[_number(match[1])].setdefault(stain, path)
        if twin != path:
            raise SheetError(
                f"{path}: {twin} has the same name; keep one of the two below {folder}"
            )
    missing, used = [], set()
    for label in read_labels(labels):
        key = _number(label.name)
        if key in used:
            raise SheetError(f"{labels.name}: case {label.name} is there twice; keep one row")
        own = slides.get(key, {})
        if "he" not in own:
            missing.append(label.name)
            continue
        used.add(key)
        pair = "her2sc_" + re.sub(r"[^A-Za-z0-9_-]", "-", label.name)
        her2 = own.get("her2", "")
        yield {
            **_labelled(label, pair, "her2sc"), "he": own["he"], "her2": her2, "split": label.split,
        }  # fmt: skip
    _report(labels, missing, len(slides.keys() - used))


def _labelled(label: Label, pair: str, dataset: str) -> Mapping[str, object]:
    known = {"score": label.score, "status": label.status}
    return {"pair": pair, "case": pair, "dataset": dataset, **known}


def _number(name: str) -> str:
    return name.lower().lstrip("0") or "0"


def _report(labels: Path, missing: list[str], unlabelled: int) -> None:
    """Log labels without a slide, and the number of cases without a label."""
    if missing:
        log.warning(
            "%s: %d labels without an H&E slide, the first %s; left out",
            labels.name, len(missing), missing[0],
        )  # fmt: skip
    if unlabelled:
        log.warning("%s: no label for %d slides or cases; left out", labels.name, unlabelled)
