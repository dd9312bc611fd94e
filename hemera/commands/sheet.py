"""Write a sheet from a release as it is unpacked, or check one with its files."""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hemera.errors import HemeraError, SheetError
from hemera.io.atomic import write_text
from hemera.sheet import Sheet, read_sheet, units, write_rows

log = logging.getLogger(__name__)

BCI_MPP = 0.46
"""Of BCI's scanner, um/px: not stated in the release, unconfirmed."""
MIST_MPP = 0.4661
"""Of MIST, um/px, as third parties report it."""

_ACROBAT_FILE = re.compile(r"([A-Za-z0-9]+)_(HE|HER2)_(train|val|test)\.tiff?", re.IGNORECASE)
_BCI_FILE = re.compile(r"([A-Za-z0-9]+)_(train|test)_(0|1\+|2\+|3\+)\.(?:png|jpe?g)", re.IGNORECASE)
_IMAGE_FILE = re.compile(r".+\.(?:png|jpe?g|bmp|webp)", re.IGNORECASE)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, help in (
        ("acrobat", "H&E and HER2 whole slides of ACROBAT"),
        ("bci", "BCI's registered pairs of 1024 x 1024"),
        ("mist", "MIST's registered HER2 pairs"),
    ):
        release = kinds.add_parser(kind, help=help)
        release.add_argument("folder", type=Path, help="where the release is unpacked")
        release.add_argument("--output", type=Path, help="the sheet; none: standard output")
        if kind != "acrobat":
            default = BCI_MPP if kind == "bci" else MIST_MPP
            release.add_argument(
                "--mpp", type=float, default=default, help=f"um/px (default {default})"
            )
    check = kinds.add_parser("check", help="open every file of a sheet")
    check.add_argument("sheet", type=Path)
    check.add_argument("--block-count", type=int, default=19, help="as in config.yaml")


def main(namespace: argparse.Namespace) -> int:
    """Write or check."""
    if namespace.kind == "check":
        return _check(read_sheet(namespace.sheet), namespace.block_count)
    folder: Path = namespace.folder
    if not folder.is_dir():
        raise SheetError(f"{folder}: no such folder; name where the release is unpacked")
    if namespace.kind == "acrobat":
        rows = list(acrobat_rows(folder))
    elif namespace.kind == "bci":
        rows = list(bci_rows(folder, namespace.mpp))
    else:
        rows = list(mist_rows(folder, namespace.mpp))
    output: Path | None = namespace.output
    base = Path.cwd() if output is None else output.parent
    for row in rows:
        for column in ("he", "her2", "he_landmarks", "her2_landmarks"):
            if row.get(column) and not Path(row[column]).is_absolute():
                row[column] = os.path.relpath(row[column], base)
    text = write_rows(rows)
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(output, text)
        read_sheet(output)
        log.info("%s: %d pairs", output, len(rows))
    return 0


def acrobat_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Yield a row per ACROBAT patient with both an H&E and a HER2 slide.

    Files are ``{anon_id}_{STAIN}_{split}.tif``, at any depth. The resolution is taken from
    ``df_acrobat_meta.csv`` when it lies below `folder`. A patient is (split, anon_id), because
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
        twin = slides[split, identity].setdefault(stain, path)
        if twin != path:
            raise SheetError(
                f"{path}: {twin} has the same name; keep one of the two below {folder}"
            )
    resolutions = _acrobat_resolutions(folder)
    landmarks = _acrobat_landmarks(folder)
    pairs = {key: files for key, files in slides.items() if len(files) == 2}
    if not pairs:
        raise SheetError(
            f"{folder}: no patient with {{id}}_HE_{{split}}.tif and {{id}}_HER2_{{split}}.tif; "
            "name the folder that ACROBAT is unpacked in"
        )
    log.info(
        "%d patients, %d of them with H&E and HER2 (the others have other stains)",
        len(slides),
        len(pairs),
    )
    for (split, identity), files in sorted(pairs.items(), key=_acrobat_order):
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

    The released test split is kept. BCI names no patients, so each pair is a case of its own and
    validation is drawn from the free ones without cutting through a source image.

    Raises:
        SheetError: when there is no pair.
    """
    he_files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.parent.parent.name.upper() == "HE" and _BCI_FILE.fullmatch(path.name):
            twin = he_files.setdefault(path.name, path)
            if twin != path:
                raise SheetError(
                    f"{path}: {twin} has the same name; keep one of the two below {folder}"
                )
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
            f"{folder}: no pair HE/train/00000_train_1+.png with its twin under IHC; "
            "name the folder that BCI is unpacked in"
        )


def mist_rows(folder: Path, mpp: float) -> Iterator[dict[str, str]]:
    """Yield a row per MIST HER2 pair ``HER2/TrainValAB/{train,val}{A,B}/{slide}_{x}_{y}.jpg``.

    A case is the slide, named before the first underscore. Slides stand on both sides of MIST's own
    split, so it is not kept: the split column stays empty, to be drawn by case.

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
            f"{folder}: no pair HER2/TrainValAB/trainA/NAME with its twin in trainB; "
            "name the folder that MIST is unpacked in"
        )


def _acrobat_order(item: tuple[tuple[str, str], object]) -> tuple[str, int, str]:
    (split, identity), _ = item
    return split, int(identity) if identity.isdigit() else -1, identity


def _acrobat_resolutions(folder: Path) -> dict[str, str]:
    """Return um/px of level 0 per file name, without its suffix and in lower case."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("df_acrobat_meta.csv")):
        for row in _csv_rows(path):
            value = row.get("mpp_lvl_0") or ""
            if row.get("filename") and value and value.lower() != "nan":
                found[Path(row["filename"]).stem.lower()] = value
    if not found:
        log.warning(
            "%s: no df_acrobat_meta.csv with mpp_lvl_0; the files' own mpp will count", folder
        )
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


def _check(sheet: Sheet, block_count: int) -> int:
    """Open every file of the sheet; list all faults, then what the sheet holds."""
    from tqdm import tqdm

    from hemera.imaging.slide import open_slide
    from hemera.interop.geojson import read_polygons
    from hemera.registration.displacement_files import read_displacement
    from hemera.registration.landmarks import check_landmarks

    faults = []
    for pair in tqdm(sheet.pairs, "opening", disable=None, unit="pair"):
        for stain, path, mpp in (("he", pair.he, pair.he_mpp), ("her2", pair.her2, pair.her2_mpp)):
            if not path.is_file():
                faults.append(f"{pair.pair}: {stain} {path} does not exist; mend the path")
                continue
            try:
                with open_slide(path, mpp=mpp, mpp_column=f"{stain}_mpp"):
                    pass
            except HemeraError as error:
                faults.append(f"{pair.pair}: {error}")
        others: list[tuple[tuple[Path, ...], Callable[[], object]]] = []
        if pair.landmarks:
            others.append((pair.landmarks, functools.partial(check_landmarks, pair)))
        if pair.roi is not None:
            others.append(((pair.roi,), functools.partial(read_polygons, pair.roi)))
        if pair.displacement is not None:
            field = pair.displacement
            others.append(((field,), functools.partial(read_displacement, field)))
        for paths, read in others:
            lacking = [path for path in paths if not path.is_file()]
            faults += [f"{pair.pair}: {path} does not exist; mend the path" for path in lacking]
            if lacking:
                continue
            try:
                read()
            except HemeraError as error:
                faults.append(f"{pair.pair}: {error}")
    if faults:
        raise SheetError("\n".join(f"{sheet.path.name} {fault}" for fault in faults))
    counts = collections.Counter(pair.dataset for pair in sheet.pairs)
    for dataset, count in sorted(counts.items()):
        log.info("%s: %d pairs", dataset, count)
    log.info("%d units of work, every file opens", len(units(sheet, block_count)))
    return 0
