"""Write the accepted tiles for WebDataset, Hugging Face or pix2pix."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from hemera.commands import Positive, Workers
from hemera.errors import ConfigError
from hemera.files import layout

if TYPE_CHECKING:
    from hemera.interop.exports import Selection


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


def _export(
    output: Path,
    tiles: Tiles,
    write: Callable[[Path, Selection], None],
    *,
    masks: bool = True,
) -> None:
    from hemera.files.atomic import new_folder
    from hemera.interop import exports

    if not tiles.index.is_file():
        raise ConfigError(
            f"{tiles.index}: no such file; give --index, or run `snakemake --cores all data`"
        )
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
