"""Write a sheet from a public release, or check one."""

import array
import collections
import csv
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hemera.commands import Positive, check_new
from hemera.errors import HemeraError, SheetError
from hemera.files.atomic import write_text
from hemera.interop.labelled_releases import her2sc_rows, herohe_rows
from hemera.sheet import IMAGE_SUFFIXES, Pair, parse_sheet, read_sheet, write_rows

if TYPE_CHECKING:
    from hemera.imaging.identity import Identity

log = logging.getLogger(__name__)

BCI_MPP = 0.46
"""Of BCI's scanner, um/px: not stated in the release, unconfirmed."""
MIST_MPP = 0.4661
"""Of MIST, um/px, as third parties report it."""

STRUCTURE_MAX = 14
"""Most of the `coarse_bits` in which copies differ: measured 14 for JPEG and scaling; others 18."""
TWINS_READ = 4
"""Images of similar structure that are read again for a comparison."""

_ACROBAT_FILE = re.compile(r"([A-Za-z0-9]+)_(HE|HER2)_(train|val|test)\.tiff?", re.IGNORECASE)
_BCI_FILE = re.compile(r"([A-Za-z0-9]+)_(train|test)_(0|1\+|2\+|3\+)\.(?:png|jpe?g)", re.IGNORECASE)
_IMAGE_FILE = re.compile(r".+\.(?:png|jpe?g|bmp|webp)", re.IGNORECASE)


def acrobat(folder: Path, /, *, output: Path | None = None) -> None:
    """Write a sheet of the H&E and HER2 whole slides of ACROBAT.

    Args:
        folder: directory in which the release is unpacked.
        output: the sheet, a new file; by default it is printed.
    """
    _write(output, "acrobat", folder)


def bci(folder: Path, /, *, output: Path | None = None, mpp: Positive = BCI_MPP) -> None:
    """Write a sheet of BCI's registered pairs of 1024 x 1024.

    Args:
        folder: directory in which the release is unpacked.
        output: the sheet, a new file; by default it is printed.
        mpp: resolution of the images, um per pixel; the release does not state it.
    """
    _write(output, "bci", folder, mpp=mpp)


def mist(folder: Path, /, *, output: Path | None = None, mpp: Positive = MIST_MPP) -> None:
    """Write a sheet of MIST's registered HER2 pairs.

    Args:
        folder: directory in which the release is unpacked.
        output: the sheet, a new file; by default it is printed.
        mpp: resolution of the images, um per pixel, as third parties report it.
    """
    _write(output, "mist", folder, mpp=mpp)


def herohe(folder: Path, /, *, labels: Path, output: Path | None = None) -> None:
    """Write a sheet of the H&E slides of HEROHE; slides in a folder test... are the test split.

    Args:
        folder: directory in which the release is unpacked.
        labels: CSV with the columns name (file name of the slide without suffix), status, and, if
            known, score and split.
        output: the sheet, a new file; by default it is printed.
    """
    _write(output, "herohe", folder, labels=labels)


def her2sc(folder: Path, /, *, labels: Path, output: Path | None = None) -> None:
    """Write a sheet of the H&E and HER2 slides of HER2SC.

    Args:
        folder: directory in which the release is unpacked.
        labels: CSV with the columns name (of the case), score, and, if known, status and split.
        output: the sheet, a new file; by default it is printed.
    """
    _write(output, "her2sc", folder, labels=labels)


Release = Literal["acrobat", "bci", "mist", "herohe", "her2sc"]
LABELLED = ("herohe", "her2sc")
"""Releases whose labels are in a file of their own."""


def release_rows(name: Release, folder: Path, **values: float | Path) -> list[dict[str, object]]:
    """Return the rows of a release; SheetError where the folder contains no pair of it."""
    labels = values.get("labels")
    layouts: dict[str, tuple[Callable[..., Iterable[dict[str, object]]], str]] = {
        "acrobat": (acrobat_rows, "patient with {id}_HE_{split}.tif, {id}_HER2_{split}.tif"),
        "bci": (bci_rows, "pair HE/train/00000_train_1+.png, IHC/train/00000_train_1+.png"),
        "mist": (mist_rows, "pair HER2/TrainValAB/trainA/NAME, HER2/TrainValAB/trainB/NAME"),
        "herohe": (herohe_rows, f"slide NAME.mrxs with its folder NAME and a name in {labels}"),
        "her2sc": (her2sc_rows, f"slide {{case}}_HE.ndpi of a case with a name in {labels}"),
    }
    find, expected = layouts[name]
    if not folder.is_dir():
        raise SheetError(f"{folder}: no such directory; give the one with the unpacked release")
    rows = list(find(folder, **values))
    if not rows:
        raise SheetError(
            f"{folder}: no {expected}; give the directory in which the release is unpacked"
        )
    return rows


def _write(output: Path | None, name: Release, folder: Path, **values: float | Path) -> None:
    """Write the rows of a release, with paths relative to the sheet."""
    if output is not None:
        check_new(output)
    base = Path.cwd() if output is None else output.parent
    rows = [
        {
            name: os.path.relpath(cell, base)
            if isinstance(cell, Path) and not cell.is_absolute()
            else str(cell)
            for name, cell in row.items()
        }
        for row in release_rows(name, folder, **values)
    ]
    if output is None:
        sys.stdout.write(write_rows(rows))
    else:
        write_text(output, write_rows(rows))
        read_sheet(output)
        log.info("%s: number of pairs: %d", output, len(rows))


def acrobat_rows(folder: Path) -> Iterator[dict[str, object]]:
    """Yield a row per ACROBAT patient with both an H&E and a HER2 slide, at any depth.

    A patient is (split, anon_id), because anon_id repeats across splits. The challenge's splits are
    for registration; the split column stays empty, to be drawn.
    """
    slides: dict[tuple[str, str], dict[str, Path]] = collections.defaultdict(dict)
    for path in sorted(folder.rglob("*")):
        match = _ACROBAT_FILE.fullmatch(path.name)
        if match is not None:
            _add(slides[match[3].lower(), match[1]], match[2].upper(), path, folder)
    resolutions = _acrobat_resolutions(folder)
    landmarks = _acrobat_landmarks(folder)
    pairs = [key for key, files in slides.items() if len(files) == 2]
    log.info("number of patients with H&E and HER2: %d of %d", len(pairs), len(slides))
    # By split and number.
    for split, identity in sorted(pairs, key=lambda key: (key[0], len(key[1]), key[1])):
        he, her2 = (slides[split, identity][stain] for stain in ("HE", "HER2"))
        name = f"acrobat_{split}_{identity}"
        points = landmarks.get((split, identity), "")
        yield {
            "pair": name,
            "case": name,
            "dataset": "acrobat",
            "he": he,
            "her2": her2,
            "he_mpp": resolutions.get(he.stem.lower(), ""),
            "her2_mpp": resolutions.get(her2.stem.lower(), ""),
            "he_landmarks": points,
            "her2_landmarks": points,
        }


def bci_rows(folder: Path, mpp: float = BCI_MPP) -> Iterator[dict[str, object]]:
    """Yield a row per BCI pair, in the released test split or none.

    BCI does not identify patients, so each pair is a case of its own.
    """
    he_files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.parent.parent.name.upper() == "HE" and _BCI_FILE.fullmatch(path.name):
            _add(he_files, path.name, path, folder)
    for name, he in he_files.items():
        match = _BCI_FILE.fullmatch(name)
        assert match is not None
        split, pair = match[2].lower(), f"bci_{match[2].lower()}_{match[1]}"
        row = _registered(pair, pair, he, he.parents[2] / "IHC" / he.parent.name / name, mpp)
        if row:
            yield {**row, "split": "test" if split == "test" else "", "score": match[3]}


def mist_rows(folder: Path, mpp: float = MIST_MPP) -> Iterator[dict[str, object]]:
    """Yield a row per MIST HER2 pair ``{train,val}{A,B}/{slide}_{x}_{y}.jpg``; a case is a slide.

    Slides occur on both sides of MIST's own split, so it is not used.
    """
    for he in sorted(folder.rglob("*")):
        side = he.parent.name
        if side not in ("trainA", "valA") or not _IMAGE_FILE.fullmatch(he.name):
            continue
        if {"ER", "PR", "KI67"} & {part.upper() for part in he.relative_to(folder).parts}:
            continue
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", he.stem)
        her2 = he.parent.with_name(f"{side[:-1]}B") / he.name
        case = f"mist_{stem.split('_')[0]}"
        if row := _registered(f"mist_{side[:-1]}_{stem}", case, he, her2, mpp):
            yield row


def _registered(pair: str, case: str, he: Path, her2: Path, mpp: float) -> dict[str, object]:
    """Return the row of a registered pair of images; empty, with a warning, without HER2."""
    if not her2.is_file():
        log.warning("%s: no HER2 image %s; left out", he, her2)
        return {}
    row = {"pair": pair, "case": case, "dataset": pair.partition("_")[0], "he": he, "her2": her2}
    return {**row, "registered": "true", "he_mpp": f"{mpp:g}", "her2_mpp": f"{mpp:g}"}


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
            name = row.get("anon_filename_ihc") or ""
            match = _ACROBAT_FILE.fullmatch(f"{Path(name).stem}.tif")
            if match and match[2].upper() == "HER2":
                found.setdefault((match[3].lower(), match[1]), path)
    return found


def _csv_rows(path: Path) -> Iterator[Mapping[str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            yield from csv.DictReader(file)
        except csv.Error as error:
            raise SheetError(
                f"{path}: cannot be read ({error}); unpack the release again"
            ) from error


def check(path: Path, /) -> None:
    """Open every file of a sheet and report all faults of cells and files.

    Images that contradict the sheet are faults too: the same image twice, registered images of
    different extent, a wrong stain. Verdict accept overrides the stain.

    Args:
        path: the sheet.
    """
    pairs, faults = parse_sheet(path)
    faults += examine(path.name, pairs)
    if faults:
        raise SheetError("\n".join(faults))
    counts = collections.Counter(pair.dataset for pair in pairs)
    for dataset, count in sorted(counts.items()):
        log.info("%s: number of pairs: %d", dataset, count)
    log.info("every file opens")


def examine(name: str, pairs: Iterable[Pair]) -> list[str]:
    """Open every file of a sheet, named in messages; return a line per fault."""
    from tqdm import tqdm

    seen = _Seen()
    faults = [
        f"{name} {pair.pair}: {fault}"
        for pair in tqdm(pairs, "opening", disable=None, unit="pair")
        for fault in (*_faults(pair), *_contradictions(pair, seen))
    ]
    for pair in pairs:
        plain_images = {image.suffix for image in pair.images} <= IMAGE_SUFFIXES
        if pair.her2 and not pair.registered and plain_images:
            log.warning(
                "pair %s: plain images, which will be registered like whole slides; write true in "
                "column registered if both have the same position", pair.pair,
            )  # fmt: skip
    return faults


def _faults(pair: Pair) -> Iterator[str]:
    """Yield the faults of the files of a pair."""
    import numpy as np

    from hemera.dataset.labelled_views import read_regions
    from hemera.files.geojson import read_polygons
    from hemera.imaging.artefact_files import read_artefacts
    from hemera.imaging.slide import open_slide, read_header
    from hemera.registration.displacement_files import read_displacement
    from hemera.registration.landmarks import read_landmarks

    def read_slide(path: Path, mpp: float | None, column: str) -> None:
        with open_slide(path, mpp=mpp, mpp_column=column) as slide:
            slide.check_complete()

    def read_mask(stain: str, path: Path) -> None:
        image, mpp = (pair.he, pair.he_mpp) if stain == "he" else (pair.her2_image, pair.her2_mpp)
        with open_slide(image, mpp=mpp, mpp_column=f"{stain}_mpp") as slide:
            read_artefacts(path, slide.size_px, np.ones((64, 64), np.bool_), f"{stain}_artefacts")

    def read_points() -> None:
        if pair.he_landmarks == pair.her2_landmarks:
            read_landmarks(pair, 1.0, 1.0, "um")
            return
        try:
            he_px, he_mpp = read_header(pair.he)
            her2_px, her2_mpp = read_header(pair.her2_image)
        except HemeraError:
            # The column of the image names it.
            return
        mpps = pair.he_mpp or he_mpp, pair.her2_mpp or her2_mpp
        # Where one has no resolution, which is another fault, both are as if of one.
        mpps = mpps if all(mpps) else (1.0, 1.0)
        read_landmarks(pair, *mpps, "um", he_px, her2_px)

    checks: list[tuple[str, tuple[Path | None, ...], Callable[..., object]]] = [
        ("he", (pair.he,), lambda path: read_slide(path, pair.he_mpp, "he_mpp")),
        ("her2", (pair.her2,), lambda path: read_slide(path, pair.her2_mpp, "her2_mpp")),
        ("landmarks", pair.landmarks, lambda *_: read_points()),
        ("roi", (pair.roi,), read_polygons),
        ("annotations", (pair.annotations,), read_regions),
        ("he_artefacts", (pair.he_artefacts,), lambda path: read_mask("he", path)),
        ("her2_artefacts", (pair.her2_artefacts,), lambda path: read_mask("her2", path)),
        ("displacement", (pair.displacement,), read_displacement),
    ]
    for column, paths, read in checks:
        given = [path for path in paths if path is not None]
        missing = [path for path in given if not path.is_file()]
        for path in missing:
            what = (
                "is a directory; give a file"
                if path.is_dir()
                else "does not exist; correct the path"
            )
            yield f"{column} {path} {what}"
        if given and not missing:
            try:
                read(*given)
            except HemeraError as error:
                yield str(error)


def _identity(pair: Pair, column: str) -> "Identity":
    from hemera.imaging.identity import identify
    from hemera.imaging.slide import open_slide

    path, mpp = (pair.he, pair.he_mpp) if column == "he" else (pair.her2_image, pair.her2_mpp)
    with open_slide(path, mpp=mpp) as slide:
        return identify(slide)


class _Seen:
    """The images of a sheet so far."""

    def __init__(self) -> None:
        self._owners: list[tuple[str, Pair, str]] = []
        self._structures = array.array("Q")

    def twin(self, column: str, pair: Pair, identity: "Identity") -> tuple[str, Pair, bool] | None:
        """Return another pair's image that equals this, and whether in each pixel; add this one."""
        import numpy as np

        from hemera.imaging.identity import is_same_image

        own = np.uint64(identity.coarse_bits)
        distances = np.bitwise_count(np.array(self._structures, np.uint64) ^ own)
        others = []
        for place in np.flatnonzero(distances <= STRUCTURE_MAX).tolist():
            first, other, digest = self._owners[place]
            # One column of the pairs of a case may repeat an image.
            if other is not pair and (first != column or other.case != pair.case):
                others.append((digest != identity.digest, distances[place], first, other))
        self._owners.append((column, pair, identity.digest))
        self._structures.append(int(own))
        others.sort(key=lambda each: each[:2])
        for differs, _, first, other in others[:TWINS_READ]:
            if not differs or is_same_image(_identity(other, first), identity):
                return first, other, not differs
        return None


def _contradictions(pair: Pair, seen: _Seen) -> Iterator[str]:
    """Yield what the pixels of a pair contradict; both images are added to those seen."""
    from hemera.imaging.identity import contradictions

    try:
        found = [_identity(pair, column) for column in ("he", "her2")[: len(pair.images)]]
    except HemeraError:
        # A fault of the file, which `_faults` yields.
        return
    faults = contradictions(
        found[0], found[1] if len(found) == 2 else None, registered=pair.registered
    )
    for verdict, reason in dict.fromkeys(faults.values()):
        if verdict == "refuse" or pair.verdict != "accept":
            yield reason
    for column, identity in zip(("he", "her2"), found, strict=False):
        twin = seen.twin(column, pair, identity)
        if twin is not None:
            first, other, equal = twin
            remedy = "" if first != column else ", or give both pairs the same case"
            yield (
                f"{column} {identity.name} is the image of pair {other.pair}, {first}, case "
                f"{other.case}{'' if equal else ', compressed or scaled anew'}; correct one of the "
                f"two paths{remedy}"
            )
