"""Write the accepted tiles as others read them: WebDataset, Hugging Face Parquet, A|B images."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from tqdm import tqdm

from hemera import __version__, tables
from hemera.commands import flags
from hemera.dataset.shards import ShardReader, ShardWriter, decode, encode, select
from hemera.dataset.splits import PARTS
from hemera.errors import ConfigError, ShardError

log = logging.getLogger(__name__)

ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 100_000_000
"""Both bound a row group of Parquet: viewers read one at a time."""

SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""How Hugging Face names the parts."""

SAMPLED = 16
"""A|B images that are made to say how large all will be."""

_BYTES_PER_ROW = 3_000
_TILE = re.compile(r"[A-Za-z0-9_-]+")
_PLACES = ("shard", "offset", "length", "sha256")
_SUFFIXES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL ", "jxl"),
)
_VALUES = {pa.float64(): "float64", pa.int64(): "int64", pa.int32(): "int32", pa.bool_(): "bool"}


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
    common.add_argument("--part", choices=PARTS, help="one part alone (default: all three)")
    common.add_argument(
        "--network",
        choices=("generation", "segmentation"),
        help="the tiles drawn for it, in its parts (default: all accepted tiles)",
    )
    masked = argparse.ArgumentParser(add_help=False)
    masked.add_argument(
        "--engine", help="whose masks (default: those that the index was made to train on)"
    )
    masked.add_argument(
        "--shard-mb",
        type=flags.positive,
        default=1000.0,
        metavar="MB",
        help="how large a file gets, about; one tile at least (default 1000)",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="FORMAT")
    for name, help, parents in (
        ("webdataset", "tar files of {tile}.he, .her2, .mask and .json", [common, masked]),
        ("huggingface", "Parquet with images, and a dataset card", [common, masked]),
        ("ab", "folders of images, H&E left and HER2 right, as pix2pix reads them", [common]),
    ):
        kind = kinds.add_parser(
            name, help=help, description=f"Write {help}.", parents=parents, allow_abbrev=False
        )
        if name == "ab":
            kind.add_argument(
                "--codec",
                choices=("png", "jpeg"),
                default="png",
                help="png is lossless, jpeg a fifth of its size (default png)",
            )
            kind.add_argument(
                "--quality", type=flags.quality, default=95, help="of jpeg, 1 to 100 (default 95)"
            )
            kind.add_argument(
                "--workers", type=flags.workers, default=2, help="threads that encode (default 2)"
            )


def main(namespace: argparse.Namespace) -> int:
    """Export."""
    asked = vars(namespace)
    chosen = choose(
        namespace.index,
        where=namespace.where,
        part=namespace.part,
        network=namespace.network,
        engine=asked.get("engine"),
        masks=namespace.kind != "ab",
    )
    output = namespace.output.absolute().resolve()
    with _new_folder(output) as folder:
        if namespace.kind == "webdataset":
            write_webdataset(folder, chosen, namespace.shard_mb)
        elif namespace.kind == "huggingface":
            write_huggingface(folder, chosen, namespace.shard_mb)
        else:
            write_ab(folder, chosen, namespace.codec, namespace.quality, namespace.workers)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    parts = ", ".join(f"{part} {rows.num_rows}" for part, rows in chosen.parts.items())
    sys.stdout.write(
        f"{namespace.output}: {chosen.count} tiles ({parts}), {size / 1e6:.1f} MB; README.md in it "
        "states the terms\n"
    )
    return 0


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The tiles of an export."""

    parts: dict[str, pa.Table]
    """Rows of the index by part, all columns, in its order; a part without a tile is not there."""
    kinds: dict[str, tuple[str, str]]
    """What is exported by name: columns of the shard, and how the columns of its place begin."""
    results: Path
    """The folder that shards are relative to."""
    metadata: dict[str, str]
    """Of the index."""
    selection: str
    """What was asked for, in words."""

    @property
    def count(self) -> int:
        """Tiles in all."""
        return sum(rows.num_rows for rows in self.parts.values())

    def bytes(self, rows: pa.Table) -> Any:
        """Return how long the members of each row are together, (N,) int64."""
        lengths = [rows.column(f"{begin}_length").to_numpy() for _, begin in self.kinds.values()]
        return np.sum(lengths, axis=0)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One tile: its id, the stored bytes by name, and the row of the index without places."""

    tile: str
    members: dict[str, bytes]
    row: dict[str, Any]


def choose(
    index: Path,
    *,
    where: str | pc.Expression | None = None,
    part: str | None = None,
    network: str | None = None,
    engine: str | None = None,
    masks: bool = True,
) -> Chosen:
    """Choose accepted tiles.

    Args:
        index: the index.
        where: a condition on its columns, see `hemera.dataset.shards.select`.
        part: train, val or test; None for all three.
        network: generation or segmentation: the tiles drawn for it, in its parts.
        engine: whose masks; None for those that the index was made to train on.
        masks: whether masks are exported.

    Raises:
        ConfigError: when no tile is left, or `where` cannot be asked.
        ShardError: when the index lacks columns, a tile its mask, or an id is no file name.
    """
    metadata = tables.read_metadata(index)
    if "fingerprint" not in metadata:
        raise ShardError(f"{index}: its metadata lacks fingerprint; run the stage index again")
    kinds = {"he": ("shard", "he"), "her2": ("shard", "her2")}
    needed = ["tile", "case", "split"]
    if masks:
        engine = engine or metadata.get("mask_target")
        if engine is None:
            raise ShardError(f"{index}: does not say whose masks count; give --engine")
        kinds["mask"] = (f"{engine}_shard", engine)
    for shard, begin in kinds.values():
        needed += [shard, *(f"{begin}_{of}" for of in ("offset", "length", "sha256"))]
    columns = list(dict.fromkeys([*needed, *pq.read_schema(index).names]))
    table = select(index, columns, where=where, network=network, part=part)
    asked = [f"accepted tiles of the index {metadata['fingerprint'][:12]}"]
    asked += [f"of {network}"] * (network is not None) + [f"of {part}"] * (part is not None)
    asked += [f"where {where}"] * (where is not None)
    selection = ", ".join(asked)
    if not table.num_rows:
        raise ConfigError(
            f"{index}: no tile is left ({selection}); ask for less, or read the funnel in the "
            "report and loosen filter"
        )
    _check(index, table, kinds, engine)
    split = "split" if network is None else f"{network}_split"
    parts = {name: table.filter(pc.equal(table.column(split), name)) for name in PARTS}
    return Chosen(
        {name: rows for name, rows in parts.items() if rows.num_rows},
        kinds,
        index.absolute().parent.parent,
        metadata,
        selection,
    )


def _check(
    index: Path, table: pa.Table, kinds: Mapping[str, tuple[str, str]], engine: str | None
) -> None:
    tiles = table.column("tile").to_pylist()
    wrong = next((tile for tile in tiles if not _TILE.fullmatch(tile)), None)
    if wrong is not None:
        raise ShardError(
            f"{index}: tile {wrong!r} is no file name; ids hold letters, digits, hyphens and "
            "underscores"
        )
    if len(set(tiles)) < len(tiles):
        raise ShardError(f"{index}: a tile stands in it twice; run index again")
    if "mask" in kinds and (lacking := table.column(kinds["mask"][0]).null_count):
        raise ShardError(
            f"{index}: {lacking} tiles without a mask of {engine}; run mask and index again"
        )


def samples(chosen: Chosen, rows: pa.Table) -> Iterator[Sample]:
    """Yield the tiles of a part in their order, their bytes held to the digests of the index.

    Raises:
        ShardError: when a shard does not hold what the index says.
    """
    reader = ShardReader(chosen.results)
    shown = [name for name in rows.column_names if _shown(name)]
    for batch in rows.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            members = {}
            for name, (shard, begin) in chosen.kinds.items():
                place = row[f"{begin}_offset"], row[f"{begin}_length"]
                data = reader.read(row[shard], *place)
                if hashlib.sha256(data).hexdigest() != row[f"{begin}_sha256"]:
                    raise ShardError(
                        f"{chosen.results / row[shard]}: {row['tile']} is not the {name} that the "
                        "index was made of; run the stages of its unit, and index, again"
                    )
                members[name] = data
            yield Sample(row["tile"], members, {name: row[name] for name in shown})


def _shown(name: str) -> bool:
    """Tell whether a column says something away from the folder of results."""
    return name not in ("accepted", "reason") and not (
        name in _PLACES or name.rsplit("_", 1)[-1] in _PLACES
    )


def suffix(data: bytes) -> str:
    """Return the suffix of a file of these bytes.

    Raises:
        ShardError: when they are no image that HEMERA writes.
    """
    for begin, name in _SUFFIXES:
        if data.startswith(begin) and (name != "webp" or data[8:12] == b"WEBP"):
            return name
    raise ShardError("tile: neither JPEG, PNG, WebP nor JPEG XL; run the stage again")


# WebDataset


def write_webdataset(folder: Path, chosen: Chosen, shard_mb: float) -> None:
    """Write ``{part}-{number}.tar``: a tile's images as they are stored, and its row as JSON."""
    bounds = {}
    needed = 0
    for part, rows in chosen.parts.items():
        # Each of the four members has a header and is filled up to blocks.
        sizes = chosen.bytes(rows) + len(chosen.kinds) * 1024 + _BYTES_PER_ROW
        bounds[part] = _files(sizes, shard_mb)
        needed += int(sizes.sum())
    _check_room(folder, needed)
    with _bar(chosen) as bar:
        for part, rows in chosen.parts.items():
            for number, (start, stop) in enumerate(bounds[part]):
                path = folder / f"{part}-{number:06d}.tar"
                with ShardWriter(path) as writer:
                    for sample in samples(chosen, rows.slice(start, stop - start)):
                        for name, data in sample.members.items():
                            writer.add(f"{sample.tile}.{name}.{suffix(data)}", data)
                        writer.add(f"{sample.tile}.json", _json(sample.row))
                        bar.update()
    described = [
        "One sample per tile: `he`, `her2` and `mask` as HEMERA stored them, and `json`, its row "
        "in the index.",
        "",
        "```python",
        "import webdataset",
        "",
        f'tiles = webdataset.WebDataset("{next(iter(chosen.parts))}-000000.tar").decode("pil")',
        "```",
    ]
    _write_card(folder, chosen, described)


def _json(row: Mapping[str, Any]) -> bytes:
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(values, allow_nan=False).encode()


# Hugging Face


def write_huggingface(folder: Path, chosen: Chosen, shard_mb: float) -> None:
    """Write ``data/{split}-{number}-of-{count}.parquet`` with images, and the dataset card."""
    schema = _schema(next(iter(chosen.parts.values())), chosen.kinds)
    sizes = {part: chosen.bytes(rows) + _BYTES_PER_ROW for part, rows in chosen.parts.items()}
    _check_room(folder, int(sum(each.sum() for each in sizes.values())))
    (folder / "data").mkdir()
    images = [f"{name}.bytes" for name in chosen.kinds]
    columns = [field.name for field in schema if field.name not in chosen.kinds]
    with _bar(chosen) as bar:
        for part, rows in chosen.parts.items():
            bounds = _files(sizes[part], shard_mb)
            for number, (start, stop) in enumerate(bounds):
                name = f"{SPLITS[part]}-{number:05d}-of-{len(bounds):05d}.parquet"
                with pq.ParquetWriter(
                    folder / "data" / name,
                    schema,
                    compression={path: "zstd" for path in _leaves(schema)}
                    | dict.fromkeys(images, "none"),
                    use_dictionary=columns,
                    write_statistics=columns,
                ) as writer:
                    group: list[dict[str, Any]] = []
                    held = 0
                    for sample in samples(chosen, rows.slice(start, stop - start)):
                        if len(group) == ROW_GROUP_ROWS or held > ROW_GROUP_BYTES:
                            writer.write_table(pa.Table.from_pylist(group, schema))
                            group, held = [], 0
                        group.append(_with_images(sample))
                        held += sum(map(len, sample.members.values()))
                        bar.update()
                    writer.write_table(pa.Table.from_pylist(group, schema))
    heading = {
        "license": "other",
        "task_categories": ["image-to-image", "image-segmentation"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": SPLITS[part], "path": f"data/{SPLITS[part]}-*"}
                    for part in chosen.parts
                ],
            }
        ],
    }
    described = [
        "One row per tile: `he`, `her2` and `mask` are images, the other columns its row in the "
        "index.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'tiles = load_dataset("FOLDER", split="{SPLITS[next(iter(chosen.parts))]}")',
        "```",
    ]
    _write_card(folder, chosen, described, heading)


def _with_images(sample: Sample) -> dict[str, Any]:
    row = dict(sample.row)
    for name, data in sample.members.items():
        if suffix(data) == "jxl":
            # Pillow, by which its images are shown, does not read JPEG XL.
            data = encode(decode(data), "png")
        row[name] = {"bytes": data, "path": f"{sample.tile}.{name}.{suffix(data)}"}
    return row


def _schema(rows: pa.Table, kinds: Mapping[str, object]) -> pa.Schema:
    """Return the schema with the features by which `datasets` knows what is an image.

    It takes a feature only where the field is nullable and of the feature's very type.
    """
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("tile", pa.string()), *(pa.field(name, image) for name in kinds)]
    fields += [
        pa.field(field.name, field.type)
        for field in rows.schema
        if _shown(field.name) and field.name != "tile"
    ]
    features = {
        field.name: {"_type": "Image"}
        if field.type == image
        else {"dtype": _VALUES.get(field.type, "string"), "_type": "Value"}
        for field in fields
    }
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the paths of a schema's columns as Parquet names them."""
    return [
        f"{field.name}.{inner}" if pa.types.is_struct(field.type) else field.name
        for field in schema
        for inner in (("bytes", "path") if pa.types.is_struct(field.type) else ("",))
    ]


# A|B


def write_ab(folder: Path, chosen: Chosen, codec: str, quality: int, workers: int) -> None:
    """Write ``{part}/{tile}.png`` or ``.jpg``: H&E on the left, HER2 on the right."""
    ending = "jpg" if codec == "jpeg" else "png"

    def side_by_side(sample: Sample) -> bytes:
        he, her2 = (decode(sample.members[name]) for name in ("he", "her2"))
        if he.shape != her2.shape:
            raise ShardError(
                f"{sample.tile}: H&E is {he.shape[1]} x {he.shape[0]} px and HER2 "
                f"{her2.shape[1]} x {her2.shape[0]}; run tile again"
            )
        return encode(np.concatenate((he, her2), axis=1), codec, quality)

    def write(place: Path, sample: Sample) -> None:
        (place / f"{sample.tile}.{ending}").write_bytes(side_by_side(sample))

    spread = np.unique(np.linspace(0, chosen.count - 1, SAMPLED).round().astype(int))
    some = pa.concat_tables(chosen.parts.values()).take(pa.array(spread))
    made = [len(side_by_side(sample)) for sample in samples(chosen, some)]
    block = os.statvfs(folder).f_frsize
    _check_room(folder, math.ceil(chosen.count * (1.1 * sum(made) / len(made) + block)))
    with _bar(chosen) as bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        ahead: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        try:
            for part, rows in chosen.parts.items():
                (folder / part).mkdir()
                for sample in samples(chosen, rows):
                    ahead.append(pool.submit(write, folder / part, sample))
                    if len(ahead) > 4 * workers:
                        ahead.popleft().result()
                        bar.update()
            while ahead:
                ahead.popleft().result()
                bar.update()
        finally:
            for future in ahead:
                future.cancel()
    how = "lossless PNG" if codec == "png" else f"JPEG of quality {quality}, 4:4:4"
    described = [
        f"One image per tile, {how}: H&E (A) on the left, HER2 (B) on the right, as pix2pix reads "
        "them with `--dataset_mode aligned`.",
    ]
    _write_card(folder, chosen, described)


# What all formats share


def _files(sizes: Any, shard_mb: float) -> list[tuple[int, int]]:
    """Cut rows of these sizes, in bytes, into files: first and last of each, the last excluded."""
    bounds = []
    start, held = 0, 0
    for place, size in enumerate(sizes.tolist()):
        if place > start and held + size > shard_mb * 1e6:
            bounds.append((start, place))
            start, held = place, 0
        held += size
    return [*bounds, (start, len(sizes))]


def _bar(chosen: Chosen) -> Any:
    return tqdm(total=chosen.count, desc="export", unit="tile", disable=None, leave=False)


def _check_room(folder: Path, needed: int) -> None:
    """Refuse what the disk has no room for, before hours are spent on it."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder.parent}: about {needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are "
            "free; make room, name another disk, or ask for less with --part or --where"
        )


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output`, which becomes it when the block succeeds."""
    if output.is_dir():
        if any(output.iterdir()):
            raise ConfigError(f"{output}: holds files already; name a new folder")
    elif output.exists():
        raise ConfigError(f"{output}: is a file; name a new folder")
    for parent in output.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ConfigError(f"{output}: {parent} is no folder; name another place")
            break
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        # A machine that goes down must not leave empty files under the final name.
        os.sync()
        try:
            # Onto an empty folder this is one step; onto one that others filled it fails.
            os.rename(temporary, output)
        except OSError as error:
            raise ConfigError(
                f"{output}: cannot be put in place ({error.strerror}); name a new folder"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_card(
    folder: Path,
    chosen: Chosen,
    described: Sequence[str],
    heading: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md: what is in the folder, of which index, and under which terms."""
    licences = json.loads(chosen.metadata.get("licences", "[]"))
    lines = ["---", yaml.safe_dump(dict(heading), sort_keys=False) + "---", ""] if heading else []
    lines += [
        "# Tiles of H&E and HER2",
        "",
        *described,
        "",
        f"Made by HEMERA {__version__}: {chosen.selection}.",
        "",
        f"Fingerprint of the index: `{chosen.metadata['fingerprint']}`",
        "",
        "| part | tiles | cases |",
        "|---|---|---|",
        *(
            f"| {part} | {rows.num_rows} | {pc.count_distinct(rows.column('case')).as_py()} |"
            for part, rows in chosen.parts.items()
        ),
    ]
    if "mask" in chosen.kinds:
        lines += [
            "",
            f"Masks by {chosen.kinds['mask'][1]}: bits 0-1 of a pixel are its class (0 background, "
            "1 negative cell, 2 positive cell, 3 cell boundary), bit 2 the nucleus, bits 3-4 the "
            "DAB intensity, 0 to 3.",
        ]
    lines += ["", "## Terms", ""]
    lines += [f"- {line}" for line in licences] or [
        "The index states none: ask who owns the images."
    ]
    (folder / "README.md").write_text("\n".join([*lines, ""]))
