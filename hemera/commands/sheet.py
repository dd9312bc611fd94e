"""Write a sheet from a release as it is unpacked, or check one with its files."""

from __future__ import annotations

import collections
import csv
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hemera.commands import Blocks, Positive
from hemera.errors import HemeraError, SheetError
from hemera.files.atomic import write_text
from hemera.sheet import Pair, read_sheet, units, write_rows

log = logging.getLogger(__name__)

BCI_MPP = 0.46
"""Of BCI's scanner, um/px: not stated in the release, unconfirmed."""
MIST_MPP = 0.4661
"""Of MIST, um/px, as third parties report it."""

_ACROBAT_FILE = re.compile(r"([A-Za-z0-9]+)_(HE|HER2)_(train|val|test)\.tiff?", re.IGNORECASE)
_BCI_FILE = re.compile(r"([A-Za-z0-9]+)_(train|test)_(0|1\+|2\+|3\+)\.(?:png|jpe?g)", re.IGNORECASE)
_IMAGE_FILE = re.compile(r".+\.(?:png|jpe?g|bmp|webp)", re.IGNORECASE)


def acrobat(folder: Path, /, *, output: Path | None = None) -> None:
    """Write a sheet of the H&E and HER2 whole slides of ACROBAT.

    Args:
        folder: directory in which the release is unpacked.
        output: the sheet; by default it is printed.
    """
    _write(folder, acrobat_rows, output)


def bci(folder: Path, /, *, output: Path | None = None, mpp: Positive = BCI_MPP) -> None:
    """Write a sheet of BCI's registered pairs of 1024 x 1024.

    Args:
        folder: directory in which the release is unpacked.
        output: the sheet; by default it is printed.
        mpp: resolution of the images, um per pixel; the release does not state it.
    """
    _write(folder, functools.partial(bci_rows, mpp=mpp), output)


def mist(folder: Path, /, *, output: Path | None = None, mpp: Positive = MIST_MPP) -> None:
    """Write a sheet of MIST's registered HER2 pairs.

    Args:
        folder: directory in which the release is unpacked.
        output: the sheet; by default it is printed.
        mpp: resolution of the images, um per pixel, as third parties report it.
    """
    _write(folder, functools.partial(mist_rows, mpp=mpp), output)


def _write(
    folder: Path, find: Callable[[Path], Iterator[dict[str, str]]], output: Path | None
) -> None:
    """Write the rows found in a folder, with paths relative to the sheet."""
    if output is not None and output.exists():
        raise SheetError(
            f"{output}: exists, and decisions written into it would be lost; give another --output "
            "or remove it first"
        )
    if not folder.is_dir():
        raise SheetError(f"{folder}: no such directory; give the one with the unpacked release")
    rows = list(find(folder))
    base = Path.cwd() if output is None else output.parent
    for row in rows:
        for column in ("he", "her2", "he_landmarks", "her2_landmarks"):
            if row.get(column) and not Path(row[column]).is_absolute():
                row[column] = os.path.relpath(row[column], base)
    if output is None:
        sys.stdout.write(write_rows(rows))
    else:
        write_text(output, write_rows(rows))
        read_sheet(output)
        log.info("%s: %d pairs", output, len(rows))


def acrobat_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Yield a row per ACROBAT patient with both an H&E and a HER2 slide.

    Files are ``{anon_id}_{STAIN}_{split}.tif``, at any depth. The resolution is taken from
    ``df_acrobat_meta.csv`` when it is below `folder`. A patient is (split, anon_id), because
    anon_id repeats across splits. The challenge's splits are for registration; the split column
    stays empty, to be drawn.

    Raises:
        SheetError: when there is no pair.
    """
    slides: dict[tuple[str, str], dict[str, Path]] = collections.defaultdict(dict)
    for path in sorted(folder.rglob("*")):
        match = _ACROBAT_FILE.fullmatch(path.name)
        if match is None:
            continue
        identity, stain, split = match[1], match[2].upper(), match[3].lower()
        _add(slides[split, identity], stain, path, folder)
    resolutions = _acrobat_resolutions(folder)
    landmarks = _acrobat_landmarks(folder)
    pairs = {key: files for key, files in slides.items() if len(files) == 2}
    if not pairs:
        raise SheetError(
            f"{folder}: no patient with {{id}}_HE_{{split}}.tif and {{id}}_HER2_{{split}}.tif; "
            "give the directory in which ACROBAT is unpacked"
        )
    log.info(
        "%d patients, %d of them with H&E and HER2 (the others have other stains)",
        len(slides),
        len(pairs),
    )

    def order(key: tuple[str, str]) -> tuple[str, int, str]:
        return key[0], int(key[1]) if key[1].isdigit() else -1, key[1]

    for split, identity in sorted(pairs, key=order):
        files = pairs[split, identity]
        name = f"acrobat_{split}_{identity}"
        points = landmarks.get((split, identity), "")
        yield {
            "pair": name,
            "case": name,
            "dataset": "acrobat",
            "he": str(files["HE"]),
            "her2": str(files["HER2"]),
            "he_mpp": resolutions.get(files["HE"].stem.lower(), ""),
            "her2_mpp": resolutions.get(files["HER2"].stem.lower(), ""),
            "he_landmarks": str(points),
            "her2_landmarks": str(points),
        }


def bci_rows(folder: Path, mpp: float) -> Iterator[dict[str, str]]:
    """Yield a row per BCI pair ``{HE,IHC}/{train,test}/00000_train_1+.png``.

    The released test split is kept. BCI does not identify patients, so each pair is a case of its
    own and validation is drawn from the others.

    Raises:
        SheetError: when there is no pair.
    """
    he_files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.parent.parent.name.upper() == "HE" and _BCI_FILE.fullmatch(path.name):
            _add(he_files, path.name, path, folder)
    count = 0
    for name, he in he_files.items():
        her2 = he.parents[2] / "IHC" / he.parent.name / name
        match = _BCI_FILE.fullmatch(name)
        if match is None or not her2.is_file():
            log.warning("%s: no HER2 image %s; left out", he, her2)
            continue
        pair = f"bci_{match[2].lower()}_{match[1]}"
        count += 1
        yield {
            "pair": pair,
            "case": pair,
            "dataset": "bci",
            "he": str(he),
            "her2": str(her2),
            "split": "test" if match[2].lower() == "test" else "",
            "score": match[3],
            "registered": "true",
            "he_mpp": f"{mpp:g}",
            "her2_mpp": f"{mpp:g}",
        }
    if not count:
        raise SheetError(
            f"{folder}: no pair HE/train/00000_train_1+.png with its counterpart under IHC; "
            "give the directory in which BCI is unpacked"
        )


def mist_rows(folder: Path, mpp: float) -> Iterator[dict[str, str]]:
    """Yield a row per MIST HER2 pair ``HER2/TrainValAB/{train,val}{A,B}/{slide}_{x}_{y}.jpg``.

    A case is the slide, named before the first underscore. Slides occur on both sides of MIST's own
    split, so it is not used: the split column stays empty, to be drawn by case.

    Raises:
        SheetError: when there is no pair.
    """
    count = 0
    roots = [path for path in sorted(folder.rglob("*A")) if path.name in ("trainA", "valA")]
    if folder.name in ("trainA", "valA"):
        roots.append(folder)
    her2_roots = [root for root in roots if "HER2" in (part.upper() for part in root.parts)]
    for root in her2_roots or roots:
        twin = root.with_name(root.name[:-1] + "B")
        for he in sorted(root.iterdir()):
            if not _IMAGE_FILE.fullmatch(he.name):
                continue
            her2 = twin / he.name
            if not her2.is_file():
                log.warning("%s: no HER2 image %s; left out", he, her2)
                continue
            stem = re.sub(r"[^A-Za-z0-9_-]", "-", he.stem)
            count += 1
            yield {
                "pair": f"mist_{root.name[:-1]}_{stem}",
                "case": f"mist_{stem.split('_')[0]}",
                "dataset": "mist",
                "he": str(he),
                "her2": str(her2),
                "registered": "true",
                "he_mpp": f"{mpp:g}",
                "her2_mpp": f"{mpp:g}",
            }
    if not count:
        raise SheetError(
            f"{folder}: no pair HER2/TrainValAB/trainA/NAME with its counterpart in trainB; "
            "give the directory in which MIST is unpacked"
        )


def _add(files: dict[str, Path], key: str, path: Path, folder: Path) -> None:
    """Add a file; raise SheetError when there is another one of its name."""
    twin = files.setdefault(key, path)
    if twin != path:
        raise SheetError(f"{path}: {twin} has the same name; keep one of the two below {folder}")


def _acrobat_resolutions(folder: Path) -> dict[str, str]:
    """Return um/px of level 0 per file name, without its suffix and in lower case."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("df_acrobat_meta.csv")):
        for row in _csv_rows(path):
            value = row.get("mpp_lvl_0") or ""
            if row.get("filename") and value and value.lower() != "nan":
                found[Path(row["filename"]).stem.lower()] = value
    if not found:
        log.warning("%s: no df_acrobat_meta.csv with mpp_lvl_0; the files' own mpp is used", folder)
    return found


def _acrobat_landmarks(folder: Path) -> dict[tuple[str, str], Path]:
    """Return the landmark file of each patient whose HER2 slide has points."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.rglob("*.csv")):
        for row in _csv_rows(path):
            name = row.get("anon_filename_ihc")
            if name is None:
                break
            match = _ACROBAT_FILE.fullmatch(Path(name).with_suffix(".tif").name)
            if match and match[2].upper() == "HER2":
                found.setdefault((match[3].lower(), match[1]), path)
    return found


def _csv_rows(path: Path) -> Iterator[Mapping[str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        yield from csv.DictReader(file)


def check(path: Path, /, *, block_count: Blocks = 19) -> None:
    """Open every file of a sheet and report all faults.

    Args:
        path: the sheet.
        block_count: number of blocks, as in config.yaml.
    """
    from tqdm import tqdm

    sheet = read_sheet(path)
    faults = [
        f"{path.name} {pair.pair}: {fault}"
        for pair in tqdm(sheet.pairs, "opening", disable=None, unit="pair")
        for fault in _faults(pair)
    ]
    if faults:
        raise SheetError("\n".join(faults))
    counts = collections.Counter(pair.dataset for pair in sheet.pairs)
    for dataset, count in sorted(counts.items()):
        log.info("%s: %d pairs", dataset, count)
    log.info("%d units of work, every file opens", len(units(sheet, block_count)))


def _faults(pair: Pair) -> Iterator[str]:
    """Yield the faults of the files of a pair."""
    from hemera.files.geojson import read_polygons
    from hemera.imaging.slide import open_slide
    from hemera.registration.displacement_files import read_displacement
    from hemera.registration.landmarks import read_landmarks

    def check_slide(path: Path, mpp: float | None, column: str) -> None:
        with open_slide(path, mpp=mpp, mpp_column=column):
            pass

    checks: list[tuple[str, tuple[Path | None, ...], Callable[[], object]]] = [
        ("he", (pair.he,), lambda: check_slide(pair.he, pair.he_mpp, "he_mpp")),
        ("her2", (pair.her2,), lambda: check_slide(pair.her2, pair.her2_mpp, "her2_mpp")),
        ("landmarks", pair.landmarks, lambda: read_landmarks(pair, 1.0, 1.0, "um")),
        ("roi", (pair.roi,), lambda: pair.roi and read_polygons(pair.roi)),
        (
            "displacement",
            (pair.displacement,),
            lambda: pair.displacement and read_displacement(pair.displacement),
        ),
    ]
    for column, paths, read in checks:
        given = [path for path in paths if path is not None]
        missing = [path for path in given if not path.is_file()]
        yield from (f"{column} {path} does not exist; correct the path" for path in missing)
        if given and not missing:
            try:
                read()
            except HemeraError as error:
                yield str(error)
