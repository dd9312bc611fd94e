"""Write tiles, outlines and descriptions for other software."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from hemera.commands import ConfigFile, Positive, Workers
from hemera.config import IndexOptions, load_file
from hemera.errors import ConfigError, RegistrationError, SheetError
from hemera.files import layout
from hemera.sheet import read_sheet, units

if TYPE_CHECKING:
    from hemera.interop.exports import Selection

log = logging.getLogger(__name__)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles to export.

    Args:
        index: the index.
        where: a pandas query on the columns of the index, such as "score == '3+'".
        split: one split only; by default all three.
        network: the tiles of the subset of a network, in its splits; by default all accepted tiles.
        anonymous: replace names of cases and pairs by hashes; their key, anonymous.key beside the
            folder of results, is not part of the export.
    """

    index: Path = Path(layout.INDEX)
    where: str | None = None
    split: Literal["train", "val", "test"] | None = None
    network: Literal["generation", "segmentation"] | None = None
    anonymous: bool = False


ShardMb = Annotated[
    Positive, Parameter(help="largest size of a file, MB; a file contains one tile at least.")
]


def webdataset(output: Path, /, *, tiles: Tiles = Tiles(), shard_mb: ShardMb = 1000.0) -> None:
    """Write tar files of {tile}.he, .her2, .mask and .json for WebDataset.

    Args:
        output: directory, new or empty.
    """
    from hemera.interop import exports

    _export(output, tiles, functools.partial(exports.write_webdataset, shard_mb=shard_mb))


def huggingface(output: Path, /, *, tiles: Tiles = Tiles(), shard_mb: ShardMb = 1000.0) -> None:
    """Write Parquet with images, and a dataset card, for Hugging Face datasets.

    Args:
        output: directory, new or empty.
    """
    from hemera.interop import exports

    _export(output, tiles, functools.partial(exports.write_huggingface, shard_mb=shard_mb))


def aligned(output: Path, /, *, tiles: Tiles = Tiles(), workers: Workers = 2) -> None:
    """Write folders of images, H&E left and HER2 right, as pix2pix reads them.

    Args:
        output: directory, new or empty.
        workers: threads that encode.
    """
    from hemera.interop import exports

    _export(output, tiles, functools.partial(exports.write_aligned, threads=workers), masks=False)


def qupath(
    output: Path,
    /,
    *,
    pair: tuple[str, ...] = (),
    configfile: ConfigFile = Path("config.yaml"),
    results: Path = Path(layout.RESULTS),
    anonymous: bool = False,
) -> None:
    """Write tissue, tiles, cells and regions of slides as GeoJSON, and a script for QuPath.

    Args:
        output: directory, new or empty.
        pair: pairs to export; by default all of the sheet.
        results: directory of results.
        anonymous: name the files by hashes of the pairs, and write no script, which would name the
            slides.
    """
    from tqdm import tqdm

    from hemera.files.atomic import new_folder
    from hemera.interop import qupath as files
    from hemera.interop.anonymous import Names

    config = load_file(configfile)
    sheet = read_sheet(Path(config.cohort.sheet))
    chosen = {sheet.pair(name).pair for name in pair} or {found.pair for found in sheet.pairs}
    study = files.Study(results, config.options(IndexOptions).target)
    names = Names(results.absolute().parent) if anonymous else None
    slides = []
    with new_folder(output) as folder:
        of_units = units(sheet, config.cohort.block_count).items()
        pairs = [(unit, each) for unit, own in of_units for each in own if each.pair in chosen]
        for unit, each in tqdm(pairs, desc="export", unit="pair", disable=None, leave=False):
            name = each.pair if names is None else names.of("pair", each.pair)
            slides += files.write_pair(folder, name, each, unit, study)
        if not anonymous:
            files.write_project(folder, slides, output)
    script = "" if anonymous else f"; in QuPath, run {output / files.SCRIPT}"
    sys.stdout.write(f"{output}: GeoJSON of {len(slides)} slides{script}\n")


def spatialdata(
    output: Path,
    /,
    *,
    pair: tuple[str, ...] = (),
    mpp: Positive = 1.0,
    configfile: ConfigFile = Path("config.yaml"),
    results: Path = Path(layout.RESULTS),
    workers: Workers = 2,
    anonymous: bool = False,
    allow_failed_registration: bool = False,
) -> None:
    """Write registered pairs as Zarr stores for SpatialData, with the displacement as OME-Zarr.

    Args:
        output: directory, new or empty; one store PAIR.zarr per pair.
        pair: pairs to export; by default all whose registration can be used.
        mpp: resolution of the images, um per pixel; of a coarser slide, its own.
        results: directory of results.
        workers: threads that read slides.
        anonymous: name the stores and their tiles by hashes of the pairs.
        allow_failed_registration: use a registration even where its verdict is fail or refuse.
    """
    from tqdm import tqdm

    from hemera.files.atomic import new_folder
    from hemera.interop.anonymous import Names
    from hemera.interop.qupath import Study
    from hemera.interop.spatialdata import write_store
    from hemera.registration.registered_pair import load_pair

    config = load_file(configfile)
    sheet = read_sheet(Path(config.cohort.sheet))
    chosen = {sheet.pair(name).pair for name in pair}
    study = Study(results, config.options(IndexOptions).target)
    names = Names(results.absolute().parent) if anonymous else None
    of_units = units(sheet, config.cohort.block_count).items()
    pairs = [(unit, each) for unit, own in of_units for each in own]
    if chosen:
        pairs = [(unit, each) for unit, each in pairs if each.pair in chosen]
    count = 0
    with new_folder(output) as folder:
        for unit, each in tqdm(pairs, desc="export", unit="pair", disable=None, leave=False):
            try:
                registered = load_pair(each, results, allow_failed=allow_failed_registration)
            except (RegistrationError, SheetError) as error:
                if chosen:
                    raise
                log.warning("left out: %s", error)
                continue
            name = each.pair if names is None else names.of("pair", each.pair)
            store = folder / f"{name}.zarr"
            write_store(store, registered, unit, study, mpp=mpp, workers=workers)
            count += 1
        if not count:
            raise RegistrationError(f"{sheet.path.name}: no pair is registered; nothing to export")
        # Images are in two places of a store, but the same files where the file system has links.
        files = [path.stat() for path in folder.rglob("*") if path.is_file()]
        size = sum(each.st_size / each.st_nlink for each in files)
    sys.stdout.write(f"{output}: {count} stores, {size / 1e6:.1f} MB\n")


def card(
    output: Path,
    /,
    *,
    index: Path = Path(layout.INDEX),
    anonymous: bool = False,
) -> None:
    """Write the tiles' table with a Hugging Face card, Croissant and Workflow Run RO-Crate.

    Args:
        output: directory, new or empty.
        index: the index, with its card beside it.
        anonymous: as in the exports of tiles.
    """
    from hemera.commands.workflow import snakefile
    from hemera.files.atomic import new_folder
    from hemera.interop.descriptions import write_descriptions

    _check_index(index)
    with new_folder(output) as folder:
        write_descriptions(folder, index, workflow=snakefile(), anonymous=anonymous)
    sys.stdout.write(f"{output}: README.md, croissant.json and ro-crate-metadata.json\n")


def _check_index(index: Path) -> None:
    if not index.is_file():
        raise ConfigError(
            f"{index}: no such file; give --index, or run `snakemake --cores all data`"
        )


def _export(
    output: Path,
    tiles: Tiles,
    write: Callable[[Path, Selection], None],
    *,
    masks: bool = True,
) -> None:
    from hemera.files.atomic import new_folder
    from hemera.interop import exports

    _check_index(tiles.index)
    chosen = dataclasses.asdict(tiles)
    selection = exports.choose(chosen.pop("index"), **chosen, masks=masks)
    with new_folder(output) as folder:
        write(folder, selection)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    splits = ", ".join(f"{split} {rows.num_rows}" for split, rows in selection.splits.items())
    sys.stdout.write(
        f"{output}: {selection.count} tiles ({splits}), {size / 1e6:.1f} MB; its README.md states "
        "the terms\n"
    )
