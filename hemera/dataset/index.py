"""Queries of the index, one Parquet file with one row per tile of a cohort."""

import dataclasses
import functools
import json
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from hemera.config import MaskOptions
from hemera.errors import ConfigError, ShardError, TrainingError
from hemera.files.faults import translated
from hemera.sheet import SPLITS


class TileIndex:
    """An index, opened once for any number of queries."""

    def __init__(self, path: Path | str) -> None:
        """Open the file; ShardError when it is not Parquet."""
        self.path = Path(path).absolute()
        with translated(ShardError, f"{path}: not an index ({{error}}); run the stage index"):
            self._data = ds.dataset([str(self.path)], format="parquet")
            # In a damaged file, names are not UTF-8.
            self.columns: list[str] = self._data.schema.names
            self.metadata: dict[str, str] = {
                key.decode(): value.decode()
                for key, value in (self._data.schema.metadata or {}).items()
            }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all tiles."""
        return self._metadata("fingerprint")

    @property
    def mask_target(self) -> str:
        """The engine whose masks are for training."""
        return self._metadata("mask_target")

    @property
    def mask_options(self) -> MaskOptions:
        """The options of the stage that made the masks."""
        values = json.loads(self._metadata("options_mask"))
        return MaskOptions(**{name: value for name, value in values.items() if name != "version"})

    def _metadata(self, key: str) -> str:
        if key not in self.metadata:
            raise ShardError(f"{self.path}: its metadata lacks {key}; run the stage index again")
        return self.metadata[key]

    def cases_seen(self, *networks: str) -> list[str]:
        """Return the cases of which generation or segmentation has seen tiles, sorted.

        Those that choose the epoch, of split val, count as seen.
        """
        found = {
            str(case)
            for network in networks
            for split in ("train", "val")
            for case in self.select(["case"], network=network, split=split, refused=True)[
                "case"
            ].to_pylist()
        }
        return sorted(found)

    def select(
        self,
        columns: Sequence[str],
        *,
        where: str | None = None,
        network: str | None = None,
        split: str | None = None,
        refused: bool = False,
    ) -> pa.Table:
        """Read columns of the rows that meet all conditions, in the order of the index.

        Args:
            where: a pandas query, such as ``"dataset == 'bci' and he_sharpness > 40"``.
            network: generation or segmentation: the tiles drawn for it.
            split: train, val or test, of the network or, without one, of the cohort.
            refused: include rejected tiles.
        """
        if split is not None and split not in SPLITS:
            raise ConfigError(f"split: {split!r} is unknown; choose from {', '.join(SPLITS)}")
        of_network = "split" if network is None else f"{network}_split"
        conditions = {} if refused else {"accepted": pc.field("accepted")}
        if split is not None:
            conditions[of_network] = pc.field(of_network) == split
        elif network is not None:
            conditions[of_network] = pc.field(of_network).is_valid()
        if lacking := sorted({*columns, *conditions} - {*self.columns}):
            raise ShardError(
                f"{self.path}: no column {', '.join(lacking)}; name a network and a mask engine of "
                "this index"
            )
        words = set(re.findall(r"\w+", where or ""))
        queried = [name for name in self.columns if name in words]
        with translated(ShardError, f"{self.path}: cannot be read ({{error}}); run index again"):
            table = self._data.to_table(
                columns=list(dict.fromkeys([*columns, *queried])),
                filter=functools.reduce(operator.and_, conditions.values()) if conditions else None,
            )
        if where is not None:
            table = table.filter(pa.array(_evaluate(where, table.select(queried))))
        return table.select(list(columns))

    def facts(self, network: str, split: str) -> dict[str, dict[str, Any]]:
        """Return what evaluation needs of the tiles of a network's split, by tile, in order."""
        columns = ("tile", "case", "dataset", "score", "mpp")
        rows = self.select(columns, network=network, split=split, refused=True).to_pylist()
        return {row["tile"]: row for row in rows}


def _evaluate(where: str, table: pa.Table) -> npt.NDArray[np.bool_]:
    with translated(
        ConfigError,
        f"where: {where!r} is not a query of the index ({{error}}); it is written as for "
        "pandas.DataFrame.query, with the columns of the index",
    ):
        found = np.asarray(table.to_pandas().eval(where, local_dict={}, global_dict={}))
    if found.dtype != bool or found.shape != (table.num_rows,):
        raise ConfigError(
            f"where: {where!r} is not true or false for each tile; compare a column with a value"
        )
    return found


@dataclasses.dataclass(frozen=True)
class TrainingTiles:
    """What determines a training beside its options: the tiles of a network, and their masks.

    `mpp` is the median resolution of the training tiles, `mpp_max` the coarsest, `size_px` their
    smallest side; `engine` made the masks.
    """

    fingerprint: str
    engine: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    mpp: float
    mpp_max: float
    size_px: int


def training_tiles(index: TileIndex, network: str, crop_px: int | None = None) -> TrainingTiles:
    """Return the training and validation tiles of a network; TrainingError when they do not do."""
    fingerprint, engine = index.fingerprint, index.mask_target
    train, val = (
        index.select(
            ("tile", "mpp", "size_px"), network=network, split=split, refused=True
        ).to_pylist()
        for split in ("train", "val")
    )
    for tiles, purpose in ((train, "training"), (val, "validation")):
        if not tiles:
            raise TrainingError(
                f"index: no tiles for {purpose} of {network}; at least one is needed; read the "
                "rejections in the report, then loosen filter, add pairs, or check "
                f"index.{network}_datasets, index.val_fraction and the sheet's splits"
            )
    smallest = min((*train, *val), key=lambda row: row["size_px"])
    if crop_px is not None and smallest["size_px"] < crop_px:
        raise TrainingError(
            f"{smallest['tile']}: {smallest['size_px']} px is smaller than crop_px {crop_px}; give "
            "a smaller crop or none"
        )
    names = [tuple(str(row["tile"]) for row in tiles) for tiles in (train, val)]
    mpps = [row["mpp"] for row in train]
    size_px = min(row["size_px"] for row in train)
    return TrainingTiles(
        fingerprint, engine, names[0], names[1], float(np.median(mpps)), max(mpps), size_px
    )
