"""Accepted tiles in the formats of other programs: WebDataset, Hugging Face Parquet, A|B images.

`choose` selects tiles of the index; each ``write_*`` fills a folder with them and a README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from tqdm import tqdm

from hemera import __version__
from hemera.dataset.index import TileIndex
from hemera.dataset.shards import ShardReader, ShardWriter
from hemera.errors import ConfigError, ShardError
from hemera.files.threads import in_order
from hemera.imaging.codecs import decode, encode, suffix
from hemera.interop.anonymous import Names
from hemera.sheet import SPLITS

ROW_GROUP_ROWS = 100
"""As Hugging Face uses for images."""

HUGGINGFACE_SPLITS = {"train": "train", "val": "validation", "test": "test"}

_ROW_BYTES = 3_000
"""Size of a row without its images, for dividing an export into files."""
_LOCATION = ("offset", "length", "sha256")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_DTYPES = {
    pa.float64(): "float64", pa.int64(): "int64", pa.int32(): "int32", pa.bool_(): "bool",
    pa.uint8(): "uint8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Selection:
    """The tiles of an export.

    Attributes:
        splits: rows of the index by split; without the splits that have no tile.
        members: by exported name, the column of the shard and the prefix of the columns of its
            location.
        results: folder that shards are relative to.
        description: the selection in words.
    """

    splits: dict[str, pa.Table]
    members: dict[str, tuple[str, str]]
    results: Path
    metadata: dict[str, str]
    description: str

    @property
    def count(self) -> int:
        """Number of tiles."""
        return sum(rows.num_rows for rows in self.splits.values())

    @property
    def columns(self) -> list[str]:
        """Columns of the index that have a meaning outside the folder of results."""
        names = next(iter(self.splits.values())).column_names
        local = {"accepted", "reason", "shard", "artefacts", *_LOCATION}
        return [name for name in names if not {name, name.rsplit("_", 1)[-1]} & local]


def choose(
    index: Path,
    *,
    where: str | None = None,
    split: str | None = None,
    network: str | None = None,
    anonymous: bool = False,
    masks: bool = True,
) -> Selection:
    """Choose accepted tiles, one or more; the conditions are those of `TileIndex.select`.

    `anonymous`: with names by `hemera.interop.anonymous` and its key beside the results.
    """
    opened = TileIndex(index)
    engine = opened.mask_target
    members = {"he": ("shard", "he"), "her2": ("shard", "her2")}
    if masks:
        members["mask"] = f"{engine}_shard", engine
    needed = ["tile", "case", "split"]
    for shard, prefix in members.values():
        needed += [shard, *(f"{prefix}_{name}" for name in _LOCATION)]
    columns = list(dict.fromkeys([*needed, *opened.columns]))
    rows = opened.select(columns, where=where, network=network, split=split)
    description = f"accepted tiles of the index {opened.fingerprint[:12]}"
    for given, word in ((network, "of"), (split, "of"), (where, "where")):
        description += "" if given is None else f", {word} {given}"
    if not rows.num_rows:
        raise ConfigError(
            f"{index}: no tile is left ({description}); select more, or inspect the rejected tiles "
            "in the report and loosen the options of filter"
        )
    if masks and (lacking := rows.column(members["mask"][0]).null_count):
        raise ShardError(
            f"{index}: {lacking} tiles without a mask of {engine}; run mask and index again"
        )
    column = rows.column("split" if network is None else f"{network}_split")
    splits = {name: rows.filter(pc.equal(column, name)) for name in SPLITS}
    splits = {name: found for name, found in splits.items() if found.num_rows}
    results = opened.path.parent.parent
    if not anonymous:
        return Selection(splits, members, results, opened.metadata, description)
    names = Names(results.parent)
    splits = {name: names.replaced(rows) for name, rows in splits.items()}
    # It is computed from the names, and a query may contain some.
    mark = names.of("fingerprint", opened.fingerprint)
    description = description.replace(opened.fingerprint[:12], mark)
    if where is not None:
        description = description.replace(where, "a query is true")
    description += "; hashes replace the names of cases and pairs"
    return Selection(splits, members, results, opened.metadata | {"fingerprint": mark}, description)


def read_tiles(selection: Selection, rows: pa.Table) -> Iterator[tuple[Any, dict[str, bytes]]]:
    """Yield each row of `rows` in order, without locations, and its stored bytes by name."""
    reader = ShardReader(selection.results)
    for batch in rows.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            members = {}
            for name, (shard, prefix) in selection.members.items():
                offset, length, sha256 = (row[f"{prefix}_{part}"] for part in _LOCATION)
                members[name] = reader.read(row[shard], offset, length, bytes.fromhex(sha256))
            yield {name: row[name] for name in selection.columns}, members


def write_webdataset(folder: Path, selection: Selection, shard_mb: float) -> None:
    """Write ``{split}-{number}.tar``: a tile's images as they are stored, and its row as JSON."""
    progress = _progress(selection)
    for split, rows in selection.splits.items():
        for number, part in enumerate(_divided(selection, rows, shard_mb)):
            with ShardWriter(folder / f"{split}-{number:06d}.tar") as writer:
                for row, members in read_tiles(selection, part):
                    for name, data in members.items():
                        writer.add(f"{row['tile']}.{name}.{suffix(data)}", data)
                    writer.add(f"{row['tile']}.json", _json(row))
                    progress.update()
    words = (
        "WebDataset: one sample per tile, `he`, `her2` and `mask` as HEMERA stored them, and "
        "`json`, its row in the index."
    )
    _write_card(folder, selection, words)


def write_huggingface(folder: Path, selection: Selection, shard_mb: float) -> None:
    """Write ``data/{split}-{number}-of-{count}.parquet`` with images, and the dataset card."""
    schema = _huggingface_schema(selection)
    columns = [field.name for field in schema if field.type != _IMAGE]
    progress = _progress(selection)
    (folder / "data").mkdir()
    for split, rows in selection.splits.items():
        parts = _divided(selection, rows, shard_mb)
        for number, part in enumerate(parts):
            name = f"{HUGGINGFACE_SPLITS[split]}-{number:05d}-of-{len(parts):05d}.parquet"
            # Images are compressed already, and their statistics would be copies of images.
            with pq.ParquetWriter(
                folder / "data" / name,
                schema,
                compression="none",
                use_dictionary=columns,
                write_statistics=columns,
            ) as writer:
                for start in range(0, part.num_rows, ROW_GROUP_ROWS):
                    tiles = read_tiles(selection, part.slice(start, ROW_GROUP_ROWS))
                    group = []
                    for row, members in tiles:
                        for member, data in members.items():
                            path = f"{row['tile']}.{member}.{suffix(data)}"
                            row[member] = {"bytes": data, "path": path}
                        group.append(row)
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    progress.update(len(group))
    names = [HUGGINGFACE_SPLITS[split] for split in selection.splits]
    files = [{"split": name, "path": f"data/{name}-*"} for name in names]
    _write_card(
        folder,
        selection,
        "One row per tile: `he`, `her2` and `mask` are images, the other columns its row in the "
        'index. Read it with `datasets.load_dataset("FOLDER")`.',
        {
            "license": "other",
            "task_categories": ["image-to-image", "image-segmentation"],
            "configs": [{"config_name": "default", "data_files": files}],
        },
    )


def _huggingface_schema(selection: Selection) -> pa.Schema:
    """Return the schema with features of `datasets`, whose fields must be nullable and exact."""
    types = next(iter(selection.splits.values())).schema
    fields = [pa.field("tile", pa.string())]
    fields += [pa.field(name, _IMAGE) for name in selection.members]
    fields += [pa.field(name, types.field(name).type) for name in selection.columns[1:]]
    features = {field.name: _feature(field.type) for field in fields}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """Return the feature of `datasets` of a type."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": _DTYPES.get(kind, "string"), "_type": "Value"}


def write_aligned(folder: Path, selection: Selection, threads: int) -> None:
    """Write ``{split}/{tile}.png``: H&E on the left, HER2 on the right."""

    def side_by_side(item: tuple[Any, dict[str, bytes]]) -> tuple[str, bytes]:
        row, members = item
        both = np.concatenate((decode(members["he"]), decode(members["her2"])), axis=1)
        return row["tile"], encode(both, "png")

    progress = _progress(selection)
    for split, rows in selection.splits.items():
        (folder / split).mkdir()
        encoded = in_order(side_by_side, read_tiles(selection, rows), threads)
        with contextlib.closing(encoded):
            for tile, data in encoded:
                (folder / split / f"{tile}.png").write_bytes(data)
                progress.update()
    words = (
        "One image per tile, lossless PNG: H&E (A) on the left, HER2 (B) on the right, as pix2pix "
        "reads them with `--dataset_mode aligned`."
    )
    _write_card(folder, selection, words)


def _divided(selection: Selection, rows: pa.Table, shard_mb: float) -> list[pa.Table]:
    """Divide rows into files of about so many MB at most, one tile at least."""
    prefixes = [prefix for _, prefix in selection.members.values()]
    lengths = [rows.column(f"{prefix}_length").to_numpy() for prefix in prefixes]
    starts, filled = [0], 0
    for number, size in enumerate((np.sum(lengths, axis=0) + _ROW_BYTES).tolist()):
        if number > starts[-1] and filled + size > shard_mb * 1e6:
            starts.append(number)
            filled = 0
        filled += size
    stops = [*starts[1:], rows.num_rows]
    return [rows.slice(start, stop - start) for start, stop in zip(starts, stops, strict=True)]


def _progress(selection: Selection) -> tqdm[Any]:
    return tqdm(total=selection.count, desc="export", unit="tile", disable=None, leave=False)


def _json(row: Mapping[str, Any]) -> bytes:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False).encode()


def _write_card(
    folder: Path, selection: Selection, words: str, header: Mapping[str, Any] | None = None
) -> None:
    """Write README.md: the format, the index and selection, and the terms."""
    licences = json.loads(selection.metadata.get("licences", "[]"))
    lines = [
        *(["---", yaml.safe_dump(dict(header), sort_keys=False) + "---\n"] if header else []),
        f"# Tiles of H&E and HER2\n\n{words}\n",
        f"Made by HEMERA {__version__}: {selection.description}.\n",
        f"Fingerprint of the index: `{selection.metadata['fingerprint']}`\n",
        "| split | tiles | cases |\n|---|---|---|",
        *(
            f"| {split} | {rows.num_rows} | {pc.count_distinct(rows.column('case')).as_py()} |"
            for split, rows in selection.splits.items()
        ),
        "\nBits of a mask: 0-1 the class (background, negative, positive, boundary), 2 nucleus, "
        "3-4 DAB intensity, 5 excluded.\n\n## Terms\n",
        *(f"- {line}" for line in licences or ["The index has none: check those of the images."]),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))
