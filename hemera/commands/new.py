"""Create a study: a folder with the sheet, the configuration and the workflow of a cohort."""

import glob
import logging
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from hemera.commands.sheet import LABELLED, Release, examine, release_rows
from hemera.commands.workflow import snakefile
from hemera.errors import HemeraError, SheetError
from hemera.files.atomic import new_folder
from hemera.files.faults import translated
from hemera.files.separated import read_cells
from hemera.sheet import COLUMNS, IMAGE_SUFFIXES, MPP_BOUNDS, parse_sheet, write_rows

log = logging.getLogger(__name__)

Row = dict[str, str]

Mpp = Annotated[float, Parameter(validator=Number(gte=MPP_BOUNDS[0], lte=MPP_BOUNDS[1]))]

_WILDCARD = re.compile(r"(\*\*/|\*|\?|\[[^\]]+\])")
_WILDCARDS = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}
_BREAK = re.compile(r"[\t\n\r]")
_PATHS = [name for name in COLUMNS if name in ("he", "her2", "roi", "annotations", "displacement")
          or name.endswith(("_landmarks", "_artefacts"))]  # fmt: skip
_SHOWN = 10
"""Files or names that a message lists."""

_CONFIG = """\
# The options of this study; `hemera config --template no_weights` explains all of them.
preset: no_weights
sheet: pairs.tsv
mask:
  engines:
    stain: {}  # needs no weights; deepliif is the paper's engine
"""

_SNAKEFILE = """\
# The workflow of the installed HEMERA, on pairs.tsv and config.yaml of this folder.
from hemera.commands.workflow import snakefile


include: str(snakefile())


# Snakemake takes no default target from an included file.
workflow.default_target = "all"
"""

_README = """\
# {name}

Created by `hemera new`: {pairs} pairs in `pairs.tsv`, options in `config.yaml`. In this folder:

```
hemera sheet check pairs.tsv     # opens every file, lists all faults
hemera run data                  # up to the index and the data report
hemera view                      # look at pairs and tiles, decide what is refused
```

`hemera run data` is `snakemake --cores all data` with a line per stage. Read
`results/report/report.html`. Then `hemera run` trains both networks, which needs a GPU. On a
cluster, set partition and account in `profiles/slurm/profile.yaml`, and use
`snakemake --profile slurm`.

Masks are made by the engine `stain`: DeepLIIF, the engine of the HEMERA paper, needs weights that
are not configured.

Each pair is a case of its own, unless the images were given with cases. Where a patient has several
pairs, give them the same `case` in `pairs.tsv`: all pairs of a case are in one split.
"""


def new(
    study: Path,
    /,
    *,
    he: str | None = None,
    her2: str | None = None,
    sheet: Path | None = None,
    release: tuple[Release, Path] | None = None,
    labels: Path | None = None,
    mpp: Mpp | None = None,
) -> None:
    """Create a study: a new folder with pairs.tsv, config.yaml and the workflow.

    Images are found by two patterns, listed in a table, or those of a public release. They are
    opened, and stay where they are. Their faults are listed; the study is created nevertheless.

    Args:
        study: the folder, new or empty.
        he: pattern of the H&E files in quotes, such as `'slides/*_HE.*'`.
        her2: pattern of the HER2 files. A pair is two files in which the wildcards are equal; that
            of an extension may differ.
        sheet: a table (.tsv, .csv, .xlsx) with columns of a sheet of pairs, of which only he is
            required.
        release: name of a release, and the folder in which it is unpacked.
        labels: of the releases herohe and her2sc, a CSV file, see `hemera sheet herohe --help`.
        mpp: resolution of files that state none, um per pixel; by default the median of the others.
    """
    found = _rows(study, he, her2, sheet, release, labels)
    rows = completed(found, study.absolute().name)
    _propose(rows, mpp, study)
    with new_folder(study) as folder:
        (folder / "pairs.tsv").write_text(write_rows(rows), encoding="utf-8")
        source = (sheet.name, [int(row["row"]) for row in rows]) if sheet else None
        pairs, faults = parse_sheet(folder / "pairs.tsv", source)
        if faults:
            raise SheetError(
                "\n".join([*faults, f"{study}: not created; correct {sheet or 'the images given'}"])
            )
        (folder / "config.yaml").write_text(_CONFIG)
        (folder / "Snakefile").write_text(_SNAKEFILE)
        (folder / "README.md").write_text(_README.format(name=study.name, pairs=len(rows)))
        # Copies, because partition and account are written into them.
        for profile in (snakefile().parent / "profiles").glob("*/*"):
            own = folder / "profiles" / profile.relative_to(profile.parents[1])
            own.parent.mkdir(parents=True, exist_ok=True)
            # copytree raises an exception of its own, without the cause, for a full disk.
            own.write_bytes(profile.read_bytes())
        (folder / "slurm").symlink_to("profiles/slurm")
    faults = examine("pairs.tsv", pairs)
    for fault in faults:
        log.warning("%s", fault)
    if faults:
        log.warning(
            "faults: %d; correct the rows in %s, or these pairs are refused",
            len(faults), study / "pairs.tsv",
        )  # fmt: skip
    log.info("%s: number of pairs: %d; masks by engine stain, without weights", study, len(rows))
    log.info("next: cd %s && hemera run data", shlex.quote(str(study)))


def _rows(
    study: Path,
    he: str | None,
    her2: str | None,
    sheet: Path | None,
    release: tuple[Release, Path] | None,
    labels: Path | None,
) -> list[Mapping[str, object]]:
    """Return the rows of the sheet, with names and paths as they were found."""
    options = {"--he and --her2": he or her2, "--sheet": sheet, "--release": release}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1 or (he is None) != (her2 is None):
        raise SheetError(
            f"{study}: images given by {', '.join(given) or 'no option'}; give either --he and "
            "--her2, or --sheet, or --release"
        )
    if (labels is not None) != (release is not None and release[0] in LABELLED):
        raise SheetError(
            f"{study}: --labels belongs to --release {' and '.join(LABELLED)}; give both or neither"
        )
    if release is not None:
        values = {} if labels is None else {"labels": labels}
        return list(release_rows(release[0], release[1], **values))
    if sheet is not None:
        return list(table_rows(sheet))
    assert he is not None and her2 is not None
    return list(_matched_rows(he, her2))


def _matched_rows(he: str, her2: str) -> Iterator[Row]:
    """Yield a row for every two files whose wildcards are equal; name the others."""
    files = {pattern: _matches(pattern) for pattern in (he, her2)}
    keys = [key for key in files[he] if key in files[her2]]
    if not keys:
        found = "; ".join(
            f"{pattern}: {len(own)} files{_some(map(str, own.values()))}"
            for pattern, own in files.items()
        )
        raise SheetError(f"no pair of files with equal wildcards; {found}; correct the patterns")
    for pattern, other in ((he, her2), (her2, he)):
        alone = [str(path) for key, path in files[pattern].items() if key not in files[other]]
        if alone:
            log.warning(
                "%s: left out, without partner: %d files%s", pattern, len(alone), _some(alone)
            )
    for key in keys:
        words = [word.strip("/") for word in key]
        pair = "_".join(filter(None, words)) or files[he][key].stem
        yield {"pair": pair, "he": str(files[he][key]), "her2": str(files[her2][key])}


def _matches(pattern: str) -> dict[tuple[str, ...], Path]:
    """Return the files of a pattern by the text of its wildcards, but for that of an extension."""
    pattern = str(Path(pattern).expanduser())
    stem = pattern.removesuffix(".*")
    parts = [
        re.escape(part)
        if place % 2 == 0
        else _WILDCARDS.get(part, f"({part.replace('[!', '[^', 1)})")
        for place, part in enumerate(_WILDCARD.split(stem))
    ]
    regex = re.compile("".join(parts) + ("" if stem == pattern else r"\.[^/]*"), re.DOTALL)
    found: dict[tuple[str, ...], Path] = {}
    # Path.glob takes no pattern from the root.
    for name in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
        match = regex.fullmatch(name)
        if match is None or not Path(name).is_file():
            continue
        twin = found.setdefault(match.groups(), Path(name))
        if twin != Path(name):
            raise SheetError(f"{name}: {twin} matches {pattern} in the same way; keep one of both")
    return found


def table_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table: columns of a sheet, paths from its folder, its number `row`."""
    if not path.is_file():
        raise SheetError(f"{path}: no such file; give a table, .tsv, .csv or .xlsx")
    lines = _xlsx(path) if path.suffix.lower() == ".xlsx" else read_cells(path)
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    known = [name for name in header if name in COLUMNS]
    if "he" not in known:
        raise SheetError(
            f"{path}: no column he in {', '.join(header[:_SHOWN]) or 'it'}; name the columns as "
            f"in a sheet of pairs: {', '.join(COLUMNS)}"
        )
    twice = sorted({name for name in known if known.count(name) > 1})
    if twice:
        raise SheetError(f"{path}: two columns {', '.join(twice)}; keep one of each")
    others = [name for name in header if name and name not in COLUMNS]
    if others:
        log.warning("%s: columns that are not used: %s", path, ", ".join(others))
    times: Counter[str] = Counter()
    for number, line in enumerate(lines[1:], 2):
        row = {name: cell.strip() for name, cell in zip(header, line, strict=False) if cell.strip()}
        if not row:
            continue
        if "he" not in row:
            raise SheetError(f"{path} row {number}: he is empty; every row needs one")
        row = {name: value for name, value in row.items() if name in COLUMNS}
        for name, value in row.items():
            if _BREAK.search(value):
                raise SheetError(f"{path} row {number}: {name} has a tab or line break; remove it")
        paths = {name: str(path.parent / row[name]) for name in _PATHS if name in row}
        stem = Path(row["he"]).stem
        times[stem] += 1
        pair = f"{stem}_{times[stem]}" if times[stem] > 1 else stem
        yield {"row": str(number), "pair": pair, **row, **paths}


def _xlsx(path: Path) -> list[list[str]]:
    """Return the cells of the first worksheet as texts."""
    import openpyxl

    with translated(SheetError, f"{path}: cannot be read ({{error}}); save it as .xlsx or .csv"):
        sheet = openpyxl.load_workbook(path, data_only=True).worksheets[0]
        merged = sorted(map(str, sheet.merged_cells.ranges))
        rows = [
            ["" if value is None else str(value) for value in row]
            for row in sheet.iter_rows(values_only=True)
        ]
    if merged:
        raise SheetError(
            f"{path}: merged cells {', '.join(merged[:_SHOWN])}; divide them, and give each its "
            "value"
        )
    return rows


def completed(found: Sequence[Mapping[str, object]], dataset: str) -> list[Row]:
    """Return rows with valid and different names, and with absolute paths."""
    rows = [{name: str(cell) for name, cell in row.items()} for row in found]
    pairs = _valid_names(row["pair"] for row in rows)
    others = {
        column: _valid_names(row[column] for row in rows if row.get(column))
        for column in ("case", "dataset", "site")
    }
    changed = [f"{old!r} is {new}" for old, new in pairs.items() if old != new]
    if changed:
        log.info("names of pairs are letters, digits, - and _%s", _some(changed))
    dataset = next(iter(_valid_names([dataset]).values()))
    for row in rows:
        row["pair"] = pairs[row["pair"]]
        row.update({name: own[row[name]] for name, own in others.items() if row.get(name)})
        row.setdefault("case", row["pair"])
        row.setdefault("dataset", dataset)
        row.update({name: str(Path(row[name]).absolute()) for name in _PATHS if row.get(name)})
    return rows


def _valid_names(texts: Iterable[str]) -> dict[str, str]:
    """Return a name for each text; names of different texts differ, not only in case."""
    names: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        first = name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:90] or "unnamed"
        number = 2
        while name.lower() in map(str.lower, names.values()):
            name, number = f"{first}-{number}", number + 1
        names[text] = name
    return names


def _propose(rows: list[Row], given_mpp: float | None, study: Path) -> None:
    """Add resolutions that files do not state, and which plain images are registered.

    Raises:
        SheetError: when no file of a stain states one, and none is given.
    """
    headers = {row["pair"]: (_header(row["he"]), _header(row.get("her2"))) for row in rows}
    for place, column in enumerate(("he_mpp", "her2_mpp")):
        own = [(row, headers[row["pair"]][place]) for row in rows if not row.get(column)]
        stated = [header[1] for _, header in own if header and header[1]]
        proposed = [row for row, header in own if header and not header[1]]
        if proposed and given_mpp is None and not stated:
            raise SheetError(
                f"{study}: not created: no file states a resolution ({column}"
                f"{_some(row['pair'] for row in proposed)}); give --mpp, um per pixel, or a column "
                f"{column} in the table of --sheet"
            )
        mpp = statistics.median(stated or [0]) if given_mpp is None else given_mpp
        for row in proposed:
            row[column] = f"{mpp:.4g}"
        if proposed and given_mpp is None:
            log.warning(
                "%s: %.4g, the median of the other files, for %d that state none; confirm%s",
                column, mpp, len(proposed), _some(row["pair"] for row in proposed),
            )  # fmt: skip
    registered = []
    for row in rows:
        he, her2 = headers[row["pair"]]
        plain = all(Path(row.get(stain, "")).suffix in IMAGE_SUFFIXES for stain in ("he", "her2"))
        if plain and he and her2 and he[0] == her2[0] and not row.get("registered"):
            row["registered"] = "true"
            registered.append(row["pair"])
    if registered:
        log.warning(
            "registered: true for %d pairs of plain images of equal size; confirm%s",
            len(registered), _some(registered),
        )  # fmt: skip


def _header(path: str | None) -> tuple[tuple[int, int], float | None] | None:
    """Return size and resolution of an image; None for none, or one that `examine` reports."""
    from hemera.imaging.slide import read_header

    try:
        return read_header(Path(path)) if path else None
    except HemeraError:
        return None


def _some(texts: Iterable[str]) -> str:
    """Return the first texts after a colon, and how many more there are; "" for none."""
    given = list(texts)
    more = f" and {len(given) - _SHOWN} more" if len(given) > _SHOWN else ""
    return f": {', '.join(given[:_SHOWN])}{more}" if given else ""
