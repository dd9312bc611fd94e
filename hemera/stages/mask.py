"""Make label images of the HER2 tiles of a unit, by every configured engine."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from hemera import tables
from hemera.config import MaskOptions
from hemera.dataset import excluded, shards
from hemera.errors import ShardError
from hemera.files.atomic import replacing
from hemera.imaging import codecs
from hemera.masks.agreement import lowest_agreements
from hemera.masks.engine import Engine, module
from hemera.masks.label_format import Cells, exclude, statistics

log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]


def run(
    *,
    tiles: Path,
    tile_shard: Path,
    shard: Path,
    masks: Path,
    cells: Path,
    options: MaskOptions,
) -> None:
    """Label every tile of a unit by every engine, in the order of the table of tiles."""
    rows = tables.read(tiles, tables.TILE).to_pylist()
    used = options.engines if rows else {}
    engines = {name: module(name).load(own, options) for name, own in used.items()}
    states = _prepared(engines, tile_shard, rows, options.stain_tiles)
    mask_rows: list[dict[str, Any]] = []
    cell_tables: list[pa.Table] = []
    with replacing(shard) as temporary, shards.ShardWriter(temporary) as writer:
        for row in tqdm(rows, desc="mask", unit="tile", disable=None):
            rgb = _read(tile_shard, row)
            he_artefacts, her2_artefacts = _excluded(row, rgb)
            labelled = {
                name: engine.segment(rgb, row["mpp"], states[row["pair"]][name], her2_artefacts)
                for name, engine in engines.items()
            }
            if he_artefacts is not None and her2_artefacts is not None:
                where = he_artefacts | her2_artefacts
                labelled = {name: exclude(found, where) for name, found in labelled.items()}
            agreements = lowest_agreements(labelled, row["mpp"])
            for name, found in labelled.items():
                data = codecs.encode_mask(found.mask)
                offset, length = writer.add(f"{row['tile']}.{name}.png", data)
                values = {"tile": row["tile"], "pair": row["pair"], "engine": name}
                if name in agreements:
                    values |= {f"agreement_{k}": v for k, v in vars(agreements[name]).items()}
                place = {"shard": f"{shard.parent.name}/{shard.name}", "offset": offset}
                place |= {"length": length, "sha256": hashlib.sha256(data).hexdigest()}
                mask_rows.append({**values, **statistics(found), "note": found.note, **place})
                cell_tables.append(_cell_table(row["tile"], name, found.cells))
    metadata = tables.provenance(options)
    for engine in engines.values():
        metadata |= engine.versions
    tables.write(masks, mask_rows, tables.MASK, metadata)
    tables.write(cells, pa.concat_tables([tables.CELLS.empty_table(), *cell_tables]), tables.CELLS)
    log.info("%s: %d tiles labelled by %s", shard.stem, len(rows), ", ".join(options.engines))


def _prepared(
    engines: Mapping[str, Engine], tile_shard: Path, rows: list[dict[str, Any]], count: int
) -> dict[str, dict[str, Any]]:
    """Return the state of every engine for every pair, from up to `count` evenly spaced tiles."""
    by_pair: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_pair.setdefault(row["pair"], []).append(row)
    states = {}
    for pair, own in by_pair.items():
        chosen = min(len(own), count)
        used = [own[k * len(own) // chosen] for k in range(chosen)]
        tiles = [_read(tile_shard, row) for row in used]
        without = [_excluded(row, rgb)[1] for row, rgb in zip(used, tiles, strict=True)]
        states[pair] = {
            name: engine.prepare(tiles, own[0]["mpp"], tuple(own[0]["her2_background"]), without)
            for name, engine in engines.items()
        }
        for state in states[pair].values():
            if warning := getattr(state, "warning", ""):
                log.warning("%s: %s", pair, warning)
    return states


def _excluded(
    row: Mapping[str, Any], rgb: npt.NDArray[np.uint8]
) -> tuple[Mask | None, Mask | None]:
    """Return the excluded pixels (H, W) of H&E and of HER2 of a tile; None and None: none."""
    numbers = excluded.unpack(row["artefacts"], rgb.shape[:2])
    return (None, None) if numbers is None else (numbers[0] > 0, numbers[1] > 0)


def _read(tile_shard: Path, row: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Return the HER2 tile of a row."""
    data = shards.read_member(
        tile_shard, row["her2_offset"], row["her2_length"], row["her2_sha256"]
    )
    try:
        return codecs.decode(data)
    except ShardError as error:
        raise ShardError(
            f"{tile_shard}: {row['tile']}.her2 cannot be decoded; delete the shard and run stage "
            "tile again"
        ) from error


def _cell_table(tile: str, engine: str, cells: Cells) -> pa.Table:
    """Return the rows of CELLS of one tile."""
    count = len(cells)
    columns = {
        "tile": pa.repeat(tile, count),
        "engine": pa.repeat(engine, count),
        "cell": np.arange(1, count + 1, dtype=np.int32),
        "x_px": cells.x_px,
        "y_px": cells.y_px,
        "area_px": cells.area_px,
        "positive": cells.positive,
        "intensity": cells.intensity.astype(np.int8),
        "completeness": cells.completeness,
    }
    for name in ("membrane_od", "cytoplasm_od", "nucleus_od"):
        columns[name] = pa.array(getattr(cells, name), from_pandas=True)
    return pa.table(columns, schema=tables.CELLS)
