"""Write the accepted tiles in the formats of other programs, see `hemera.dataset.exports`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hemera.commands import flags
from hemera.dataset import exports
from hemera.dataset.splits import PARTS
from hemera.io.atomic import new_folder


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("output", type=Path, metavar="OUT", help="folder, new or empty")
    common.add_argument(
        "--index",
        type=Path,
        default=Path("results/index/index.parquet"),
        metavar="FILE",
        help="the index (default results/index/index.parquet)",
    )
    common.add_argument(
        "--where",
        metavar="QUERY",
        help="a pandas query on the columns of the index, such as \"score == '3+'\"",
    )
    common.add_argument("--split", choices=PARTS, help="one split only (default: all three)")
    common.add_argument(
        "--network",
        choices=("generation", "segmentation"),
        help="the tiles of its subset, in its splits (default: all accepted tiles)",
    )
    masked = argparse.ArgumentParser(add_help=False)
    masked.add_argument(
        "--engine", help="mask engine (default: the one that the index was made to train on)"
    )
    masked.add_argument(
        "--shard-mb",
        type=flags.positive,
        default=1000.0,
        metavar="MB",
        help="largest size of a file; a file contains one tile at least (default 1000)",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, words, parents in (
        ("webdataset", "tar files of {tile}.he, .her2, .mask and .json", [common, masked]),
        ("huggingface", "Parquet with images, and a dataset card", [common, masked]),
        ("aligned", "folders of images, H&E left and HER2 right, as pix2pix reads them", [common]),
    ):
        chosen = formats.add_parser(
            name, help=words, description=f"Write {words}.", parents=parents, allow_abbrev=False
        )
        if name == "aligned":
            chosen.add_argument(
                "--codec",
                choices=("png", "jpeg"),
                default="png",
                help="png is lossless, jpeg a fifth of its size (default png)",
            )
            chosen.add_argument(
                "--quality", type=flags.quality, default=95, help="of jpeg, 1 to 100 (default 95)"
            )
            chosen.add_argument(
                "--workers", type=flags.workers, default=2, help="threads that encode (default 2)"
            )


def main(namespace: argparse.Namespace) -> int:
    """Export."""
    masks = namespace.format != "aligned"
    selection = exports.choose(
        namespace.index,
        where=namespace.where,
        split=namespace.split,
        network=namespace.network,
        engine=namespace.engine if masks else None,
        masks=masks,
    )
    with new_folder(namespace.output) as folder:
        if namespace.format == "webdataset":
            exports.write_webdataset(folder, selection, namespace.shard_mb)
        elif namespace.format == "huggingface":
            exports.write_huggingface(folder, selection, namespace.shard_mb)
        else:
            exports.write_aligned(
                folder, selection, namespace.codec, namespace.quality, namespace.workers
            )
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    splits = ", ".join(f"{split} {rows.num_rows}" for split, rows in selection.splits.items())
    sys.stdout.write(
        f"{namespace.output}: {selection.count} tiles ({splits}), {size / 1e6:.1f} MB; its "
        "README.md states the terms\n"
    )
    return 0
