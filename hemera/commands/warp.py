"""Carry points, annotations and labels between the slides of a pair, or HER2 onto H&E's grid."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from hemera import tables
from hemera.commands import flags
from hemera.config import Config, DescribeOptions, load_file
from hemera.errors import ConfigError, RegistrationError, SheetError, SlideError, TableError
from hemera.imaging.geometry import same_mpp
from hemera.imaging.pyramid import TILE_PX, tile_count, write_pyramid
from hemera.imaging.slide import Slide, open_slide
from hemera.interop.geojson import (
    COORDINATE_MAX,
    features,
    title,
    transform_features,
    with_features,
)
from hemera.interop.label_images import TIFF_SUFFIXES, read_labels, write_labels
from hemera.io import layout
from hemera.io.atomic import write_text
from hemera.io.threads import in_order
from hemera.registration import displacement as fields
from hemera.registration.displacement import Displacement, Points
from hemera.registration.displacement_files import read_displacement
from hemera.registration.verdict import FAIL, REVIEW, effective_verdict
from hemera.registration.warping import lattice_px, read_displaced, warp_labels
from hemera.sheet import MPP_BOUNDS, Pair, read_sheet, units

log = logging.getLogger(__name__)

INVERSE_TOLERANCE_PX = 0.005
"""How near a point of HER2 must be met on the way back to H&E."""

BEYOND_MAX = 0.1
"""How far outside of its slide a point may lie, as a share of the slide's sides."""

BAD_TILES_MAX = 0.10
"""A warped slide of which a larger share cannot be made is refused."""

OBLONG_MAX = 0.02
"""A label image whose pixels are further from square may be of another slide."""

_NAMES = {"he": "H&E", "her2": "HER2"}
_NAMED_MAX = 10


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--pair", required=True, help="its name in the sheet")
    common.add_argument(
        "--configfile",
        type=Path,
        default=Path("config.yaml"),
        metavar="FILE",
        help="names the sheet (default config.yaml)",
    )
    common.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="where describe and register have written (default results)",
    )
    common.add_argument(
        "--even-failed",
        action="store_true",
        help="use the map even where its certificate says fail, or a person refused it",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")

    def add(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return kinds.add_parser(
            name, help=help, description=description, parents=[common], allow_abbrev=False
        )

    def both_ways(kind: argparse.ArgumentParser, source: str, output: str) -> None:
        kind.add_argument("source", type=Path, metavar="IN", help=source)
        kind.add_argument("output", type=Path, metavar="OUT", help=output)
        kind.add_argument(
            "--to",
            required=True,
            choices=tables.STAINS,
            help="the slide that OUT is for; IN is of the other",
        )

    points = add(
        "points",
        "a table of points",
        "Carry the points of a table to the other slide. Pixels are those of level 0, not shifted "
        "by the bounds that some scanners store. A point without partner gets empty cells.",
    )
    both_ways(points, "CSV with the columns X and Y; others are kept", "CSV")
    annotations = add(
        "annotations",
        "QuPath's annotations or cells",
        "Carry GeoJSON, as QuPath exports it, to the other slide; names, classes and measurements "
        "are kept as they are. Long edges get points, so that they follow the curve they become.",
    )
    both_ways(annotations, "GeoJSON in pixels of level 0", "GeoJSON")
    annotations.add_argument(
        "--tolerance-px",
        type=flags.positive,
        default=0.1,
        metavar="PX",
        help="how far an edge may stray from its curve, pixels of the other slide (default 0.1)",
    )
    labels = add(
        "labels",
        "a label image",
        "Carry a label image to the other slide, to each pixel the nearest label, 0 where there "
        "is none. It covers its slide from edge to edge, at any resolution; so does the result.",
    )
    both_ways(labels, "PNG or TIFF, one channel of 8, 16 or 32 bits", "PNG or TIFF, by its suffix")
    labels.add_argument(
        "--mpp", type=flags.positive, help="um/px of the result (default: that of the label image)"
    )
    slide = add(
        "slide",
        "the whole HER2 slide",
        "Write HER2 on the grid of H&E, as a pyramidal OME-TIFF that viewers open. Where HER2 does "
        "not reach, it has the colour of its own glass.",
    )
    slide.add_argument("output", type=Path, metavar="OUT", help="best named NAME.ome.tif")
    slide.add_argument(
        "--mpp", type=flags.positive, help="um/px of the result (default: that of H&E)"
    )
    slide.add_argument(
        "--quality", type=flags.quality, default=90, help="quality of JPEG, 1 to 100 (default 90)"
    )
    slide.add_argument("--workers", type=flags.workers, default=2, help="threads (default 2)")


def main(namespace: argparse.Namespace) -> int:
    """Carry."""
    output: Path = namespace.output
    config = load_file(namespace.configfile)
    source = [namespace.source] if namespace.kind != "slide" else []
    _check_output(output, [*source, namespace.configfile, *_files(config)])
    sides = _sides(
        config,
        namespace.pair,
        namespace.results,
        even_failed=namespace.even_failed,
    )
    if namespace.kind == "points":
        warp_points(namespace.source, output, sides, namespace.to)
    elif namespace.kind == "annotations":
        warp_annotations(namespace.source, output, sides, namespace.to, namespace.tolerance_px)
    elif namespace.kind == "labels":
        warp_label_image(namespace.source, output, sides, namespace.to, namespace.mpp)
    else:
        warp_slide(output, sides, namespace.mpp, namespace.quality, namespace.workers)
    return 0


@dataclasses.dataclass(frozen=True)
class Side:
    """One slide of a pair, as far as points on it need to know."""

    path: Path
    size_px: tuple[int, int]
    mpp: float
    background: tuple[int, int, int] | None
    """The colour of its glass; None: not looked for yet."""

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height."""
        return self.size_px[0] * self.mpp, self.size_px[1] * self.mpp


@dataclasses.dataclass(frozen=True, eq=False)
class Sides:
    """A pair with the map between its slides."""

    pair: str
    he: Side
    her2: Side
    field: Displacement

    def ends(self, to: str) -> tuple[Side, Side]:
        """Return the slide that is carried from and the one that is carried to."""
        return (self.he, self.her2) if to == "her2" else (self.her2, self.he)

    def carry_um(self, points_um: Points, to: str) -> Points:
        """Carry points in um to the other slide; NaN where there is no partner."""
        if to == "her2":
            return fields.map_points(self.field, points_um)
        tolerance_um = INVERSE_TOLERANCE_PX * self.her2.mpp
        return fields.inverse_points(self.field, points_um, tolerance_um=tolerance_um)

    def carry_px(self, points_px: Points, to: str) -> Points:
        """Carry points in level-0 pixels to the other slide."""
        source, target = self.ends(to)
        return self.carry_um(points_px * source.mpp, to) / target.mpp


# The pair and its map


def _files(config: Config) -> list[Path]:
    """Return the sheet and every file that it names: none of them is ever written over."""
    sheet = read_sheet(Path(config.cohort.sheet))
    found = [sheet.path]
    for pair in sheet.pairs:
        others = (pair.roi, pair.displacement)
        found += [*pair.images, *pair.landmarks, *(path for path in others if path is not None)]
    return found


def _sides(config: Config, name: str, results: Path, *, even_failed: bool) -> Sides:
    """Find a pair in the sheet, its slides and the map between them."""
    sheet = read_sheet(Path(config.cohort.sheet))
    pair = sheet.pair(name)
    described: dict[str, dict[str, Any]] = {}
    blocks = units(sheet, config.cohort.block_count)
    unit = next(unit for unit, pairs in blocks.items() if pair in pairs)
    table = layout.path(layout.IMAGES_TABLE, results, unit=unit)
    if table.is_file():
        columns = ("pair", "stain", "file", "mpp", "width_px", "height_px", "background")
        rows = tables.read(table, tables.DESCRIBE, columns).to_pylist()
        described = {row["stain"]: row for row in rows if row["pair"] == name}
    options = config.stages["describe"]
    assert isinstance(options, DescribeOptions)
    he, her2 = (_side(pair, stain, described.get(stain), options) for stain in tables.STAINS)
    return Sides(name, he, her2, _field(pair, he, her2, results, even_failed))


def _side(pair: Pair, stain: str, row: dict[str, Any] | None, options: DescribeOptions) -> Side:
    """Take what describe found, or open the slide where it has not seen this one."""
    path, mpp = (pair.he, pair.he_mpp) if stain == "he" else (pair.her2, pair.her2_mpp)
    known = row is not None and row["mpp"] is not None and row["file"] == path.name
    if row is not None and known and mpp in (None, row["mpp"]):
        colour = tuple(row["background"]) if row["background"] else None
        return Side(path, (row["width_px"], row["height_px"]), row["mpp"], colour)
    with open_slide(
        path,
        mpp=mpp,
        mpp_min=options.mpp_min,
        mpp_max=options.mpp_max,
        mpp_column=f"{stain}_mpp",
    ) as slide:
        return Side(path, slide.size_px, slide.mpp, None)


def _field(pair: Pair, he: Side, her2: Side, results: Path, even_failed: bool) -> Displacement:
    """Return the map of a pair: that of register, or of a pair that comes registered.

    Raises:
        RegistrationError: when there is none, or its verdict forbids its use.
    """
    # A map of the user's own is read where register judged it.
    path, certificate = (
        layout.path(pattern, results, unit=pair.pair)
        for pattern in (layout.DISPLACEMENT, layout.CERTIFICATE)
    )
    row = None
    if not pair.registered:
        for file in (path, certificate):
            if not file.is_file():
                raise RegistrationError(
                    f"pair {pair.pair}: not registered yet, there is no {file}; run "
                    f"`snakemake --cores all {certificate}`"
                )
        rows = tables.read(certificate, tables.CERTIFICATE, ("pair", "verdict", "reason"))
        row = next((row for row in rows.to_pylist() if row["pair"] == pair.pair), None)
    reason = (row or {}).get("reason")
    verdict, refusal = effective_verdict(pair, row)
    if refusal is not None and not even_failed:
        raise RegistrationError(
            f"pair {pair.pair}: {refusal}; look at it in the report, then set verdict to accept in "
            "the sheet, or give --even-failed"
        )
    if pair.registered:
        return fields.of_registered(
            he.size_px, he.mpp, her2.size_px, her2.mpp, mirror=pair.mirrored
        )
    field = read_displacement(path)
    if field.empty:
        raise RegistrationError(
            f"pair {pair.pair}: registration gave no map ({reason or 'no reason given'}); give "
            "displacement in the sheet"
        )
    if verdict in (REVIEW, FAIL):
        log.warning("pair %s: registration: %s: %s", pair.pair, verdict, reason)
    return field


# Points and annotations


def warp_points(source: Path, output: Path, sides: Sides, to: str) -> None:
    """Carry the columns X and Y of a CSV file, level-0 pixels; the rest is kept as it is.

    Raises:
        TableError: when it cannot be read as one.
    """
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except FileNotFoundError:
        raise TableError(f"{source}: no such file; name a table of points") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(
            f"{source.name}: cannot be read ({error}); save it as comma-separated UTF-8 text"
        ) from error
    header = [name.strip().lower() for name in lines[0]] if lines else []
    for name in ("x", "y"):
        if header.count(name) != 1:
            raise TableError(
                f"{source.name}: {header.count(name) or 'no'} columns {name.upper()}; give one X "
                "and one Y, in level-0 pixels, separated by commas"
            )
    x, y = header.index("x"), header.index("y")
    places = [number for number, line in enumerate(lines) if number and max(x, y) < len(line)]
    points = np.array(
        [[_cell(source, number, lines[number][column]) for column in (x, y)] for number in places]
    ).reshape(-1, 2)
    given = np.isfinite(points).all(axis=1)
    begun, _ = sides.ends(to)
    # What was carried here may lie a little beyond the edge, and is carried back.
    size_px = np.array(begun.size_px)
    near = (points >= -BEYOND_MAX * size_px) & (points <= (1 + BEYOND_MAX) * size_px)
    beyond = given & ~near.all(axis=1)
    if beyond.any():
        log.warning(
            "%s: %d of %d points lie far outside of %s, %d x %d px, and have no partner; give "
            "level-0 pixels",
            source.name, beyond.sum(), given.sum(), begun.path.name, *begun.size_px,
        )  # fmt: skip
    given &= ~beyond
    carried = np.full_like(points, np.nan)
    carried[given] = sides.carry_px(points[given], to)
    for number, point in zip(places, carried, strict=True):
        for column, value in zip((x, y), point, strict=True):
            lines[number][column] = "" if math.isnan(value) else f"{value:.3f}"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(output, text.getvalue())
    lost = int(np.isnan(carried[given, 0]).sum())
    log.info("%s: %d points on %s", output, given.sum() - lost, _NAMES[to])
    if lost:
        log.warning("%s: %d points have no partner on %s", source.name, lost, _NAMES[to])


def _cell(path: Path, number: int, text: str) -> float:
    """Return a coordinate; NaN where the cell is empty."""
    try:
        value = float(text) if text.strip() else math.nan
    except ValueError:
        raise TableError(
            f"{path.name}: row {number + 1}: {text!r} is no number; mend it or leave it empty"
        ) from None
    if abs(value) > COORDINATE_MAX:
        raise TableError(f"{path.name}: row {number + 1}: {text} is no pixel of a slide; mend it")
    return value


def warp_annotations(
    source: Path, output: Path, sides: Sides, to: str, tolerance_px: float
) -> None:
    """Carry the geometries of a GeoJSON file, level-0 pixels; the rest is kept as it is.

    Raises:
        SheetError: when it is not GeoJSON, or nothing of its one feature is left.
    """
    try:
        document = json.loads(source.read_text(encoding="utf-8-sig"))
        items = list(features(document))
        step_px = sides.field.mpp / sides.ends(to)[0].mpp

        def carry(points_px: Points) -> Points:
            return sides.carry_px(points_px, to)

        results = list(
            tqdm(
                transform_features(items, carry, tolerance_px=tolerance_px, step_px=step_px),
                total=len(items), desc=sides.pair, unit="feature", disable=None, leave=False,
            )
        )  # fmt: skip
    except FileNotFoundError:
        raise SheetError(f"{source}: no such file; name an export of annotations") from None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise SheetError(
            f"{source.name}: not GeoJSON ({' '.join(str(error).split())}); export the "
            "annotations again"
        ) from error
    left_out = [
        title(item, number)
        for number, (item, result) in enumerate(zip(items, results, strict=True), 1)
        if result.feature is None
    ]
    carried = with_features(document, iter([result.feature for result in results]))
    if carried is None:
        raise RegistrationError(
            f"{source.name}: nothing of it has a partner on {_NAMES[to]}; look at the pair in the "
            "report"
        )
    write_text(output, json.dumps(carried) + "\n")
    log.info("%s: %d features on %s", output, len(items) - len(left_out), _NAMES[to])
    lost = sum(result.lost for result in results)
    if lost:
        log.warning("%s: %d vertices have no partner on %s", source.name, lost, _NAMES[to])
    if left_out:
        log.warning(
            "%s: %d features are left out: %s%s",
            source.name, len(left_out), ", ".join(left_out[:_NAMED_MAX]),
            ", ..." if len(left_out) > _NAMED_MAX else "",
        )  # fmt: skip


# Label images


def warp_label_image(source: Path, output: Path, sides: Sides, to: str, mpp: float | None) -> None:
    """Carry a label image to the other slide, nearest neighbour, edge to edge as it came.

    Raises:
        SlideError: when it cannot be read as one, or written as asked.
        ConfigError: when the resolution asked for is finer than the slide's.
    """
    begin, end = sides.ends(to)
    if mpp is not None:
        _check_mpp(mpp, end)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, where the room is: the labels may be larger than the memory.
    with tempfile.TemporaryDirectory(prefix=".", dir=output.parent) as room:
        labels = read_labels(source, Path(room) / "labels")
        height, width = labels.shape
        label_um = begin.size_um[0] / width, begin.size_um[1] / height
        if abs(label_um[0] / label_um[1] - 1) > OBLONG_MAX + 1 / min(width, height):
            log.warning(
                "%s: %d x %d px have not the proportions of %s, %d x %d px; edge to edge all the "
                "same",
                source.name, width, height, begin.path.name, *begin.size_px,
            )  # fmt: skip
        wanted = math.sqrt(label_um[0] * label_um[1]) if mpp is None else mpp
        size = max(1, round(end.size_um[0] / wanted)), max(1, round(end.size_um[1] / wanted))
        pixel_um = end.size_um[0] / size[0], end.size_um[1] / size[1]
        step = lattice_px(sides.field, min(pixel_um))
        across, down = tile_count(size)

        def back(points_um: Points) -> Points:
            return sides.carry_um(points_um, "he" if to == "her2" else "her2")

        tiles = (
            warp_labels(
                labels,
                back,
                column * TILE_PX,
                row * TILE_PX,
                size_px=TILE_PX,
                pixel_um=pixel_um,
                label_um=label_um,
                lattice_px=step,
            )
            for row in range(down)
            for column in range(across)
        )
        shown = tqdm(
            tiles, total=across * down, desc=sides.pair, unit="tile", disable=None, leave=False
        )
        write_labels(output, shown, size_px=size, dtype=labels.dtype, pixel_um=pixel_um)
    log.info("%s: %d x %d px at %.4g um/px on %s", output, *size, wanted, _NAMES[to])


# The warped slide


def warp_slide(output: Path, sides: Sides, mpp: float | None, quality: int, workers: int) -> None:
    """Write HER2 on the grid of H&E as a pyramid.

    Raises:
        ConfigError: when the result cannot be as asked.
        SlideError: when HER2 cannot be read, or too much of it cannot.
    """
    he, her2 = sides.he, sides.her2
    if output.suffix.lower() not in TIFF_SUFFIXES:
        raise ConfigError(f"{output.name}: a slide is .tif; name it NAME.ome.tif")
    _check_output(output, [he.path, her2.path])
    if mpp is None or same_mpp(mpp, he.mpp):
        mpp, size = he.mpp, he.size_px
    else:
        _check_mpp(mpp, he if he.mpp < her2.mpp else her2)
        size = math.ceil(he.size_um[0] / mpp - 1e-6), math.ceil(he.size_um[1] / mpp - 1e-6)
    across, down = tile_count(size)
    with open_slide(
        her2.path, mpp=her2.mpp, mpp_min=0, mpp_max=math.inf, background=her2.background
    ) as slide:
        tiles = _Tiles(slide, sides, mpp, across, down, workers)
        with contextlib.closing(tiles.read()) as read:
            write_pyramid(
                output,
                tqdm(
                    read,
                    total=across * down,
                    desc=sides.pair,
                    unit="tile",
                    disable=None,
                    leave=False,
                ),
                size_px=size,
                mpp=mpp,
                quality=quality,
                name=f"{sides.pair}: HER2 on H&E",
            )
    if tiles.faults:
        log.warning(
            "%s: %d of %d tiles cannot be made and are glass; the first: %s",
            output, len(tiles.faults), across * down, tiles.faults[0],
        )  # fmt: skip
    log.info(
        "%s: %d x %d px at %.4g um/px; HER2 reaches %d of %d tiles",
        output, *size, mpp, tiles.reached, across * down,
    )  # fmt: skip


class _Tiles:
    """The tiles of the warped slide, made in a few threads, and what became of them."""

    def __init__(
        self, slide: Slide, sides: Sides, mpp: float, across: int, down: int, workers: int
    ) -> None:
        self.faults: list[SlideError] = []
        self.reached = 0
        self._slide = slide
        self._sides = sides
        self._mpp = mpp
        self._places = [(column, row) for row in range(down) for column in range(across)]
        self._workers = workers

    def read(self) -> Generator[npt.NDArray[np.uint8], None, None]:
        """Yield the tiles row by row; one that cannot be made is glass."""
        glass = np.empty((TILE_PX, TILE_PX, 3), np.uint8)
        glass[:] = self._slide.background
        for result in in_order(self._one, self._places, self._workers):
            if isinstance(result, SlideError):
                self.faults.append(result)
                if len(self.faults) > BAD_TILES_MAX * len(self._places):
                    raise SlideError(
                        f"{self._slide.path.name}: {len(self.faults)} of {len(self._places)} tiles "
                        f"cannot be made, over {BAD_TILES_MAX:.0%}; the first: {self.faults[0]}"
                    )
                yield glass
                continue
            pixels, coverage = result
            self.reached += coverage > 0
            yield pixels

    def _one(self, place: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], float] | SlideError:
        column, row = place
        try:
            pixels, coverage, _ = read_displaced(
                self._slide,
                self._sides.field,
                column * TILE_PX,
                row * TILE_PX,
                grid_mpp=self._mpp,
                size_px=TILE_PX,
                mpp=self._mpp,
                pair=self._sides.pair,
            )
        except SlideError as error:
            return error
        return pixels, coverage


# Flags


def _check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that cannot be, before hours are spent on it."""
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder; name a file in it")
    for parent in output.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ConfigError(f"{output}: {parent} is no folder; name another place")
            break
    for path in inputs:
        if path.exists() and output.exists() and os.path.samefile(path, output):
            raise ConfigError(f"{output}: would be written over a file of the cohort; name another")


def _check_mpp(mpp: float, side: Side) -> None:
    """Refuse what would be invented, and what no slide is as coarse as."""
    coarsest = MPP_BOUNDS[1]
    if (mpp < side.mpp and not same_mpp(mpp, side.mpp)) or mpp > coarsest:
        raise ConfigError(
            f"--mpp {mpp:g}: {side.path.name} has {side.mpp:.4g} um/px; give that or more, up to "
            f"{coarsest:g}"
        )
