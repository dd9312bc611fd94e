"""What the pages show of a study: its sheet, its configuration and its tables of results.

All paths are relative to the working directory, as in the workflow.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.config import Config, MaskOptions
from hemera.dataset.criteria import REASONS
from hemera.dataset.shards import read_member
from hemera.errors import TableError
from hemera.files import layout
from hemera.graph.dry_run import effective_config
from hemera.imaging.codecs import decode, decode_mask
from hemera.registration.local_quality import LocalQuality
from hemera.reports import filters, pictures, registration
from hemera.reports.html import number, percent
from hemera.sheet import Pair, Sheet, read_sheet, units
from hemera.view.pixels import OpenPair


class Study:
    """The study of the working directory; files are read again when they have changed."""

    def __init__(self, configfile: Path) -> None:
        self.configfile = configfile
        self._kept: dict[str, tuple[Any, Any]] = {}

    def _fresh(self, name: str, paths: Sequence[Path], read: Any) -> Any:
        """Return what `read` returns, once for each state of the files."""
        state = tuple(path.stat().st_mtime_ns if path.exists() else None for path in paths)
        kept = self._kept.get(name)
        if kept is None or kept[0] != state:
            self._kept[name] = kept = (state, read())
        return kept[1]

    @property
    def config(self) -> Config:
        """The configuration as the workflow reads it."""
        files = [Path("config.yaml"), self.configfile]
        found: Config = self._fresh("config", files, lambda: effective_config(self.configfile))
        return found

    @property
    def sheet_path(self) -> Path:
        """The sheet of pairs."""
        return Path(self.config.cohort.sheet)

    @property
    def sheet(self) -> Sheet:
        """The sheet, without H&E alone."""
        path = self.sheet_path
        found: Sheet = self._fresh("sheet", [path], lambda: read_sheet(path).with_her2)
        return found

    @property
    def engines(self) -> tuple[str, ...]:
        """Mask engines."""
        return tuple(self.config.options(MaskOptions).engines)

    @property
    def units(self) -> dict[str, str]:
        """Unit of each pair."""
        found = units(self.sheet, self.config.cohort.block_count)
        return {pair.pair: name for name, own in found.items() for pair in own}

    def pair(self, name: str) -> Pair | None:
        """Return a pair by its name; None where the sheet has none with HER2."""
        return next((pair for pair in self.sheet.pairs if pair.pair == name), None)

    @property
    def tiles(self) -> pa.Table:
        """The table of stage filter; TableError where there is none yet."""
        path = Path(layout.FILTERED)
        schema = tables.filtered(self.engines)
        names = [name for name in schema.names if name != "artefacts"]
        found: pa.Table = self._fresh("tiles", [path], lambda: tables.read(path, schema, names))
        return found

    def tiles_of(self, pair: str) -> list[dict[str, Any]]:
        """Return the rows of a pair in the table of tiles, none before stage filter has run."""
        if not Path(layout.FILTERED).exists():
            return []
        found: list[dict[str, Any]] = self.tiles.filter(
            pc.equal(self.tiles["pair"], pair)
        ).to_pylist()
        return found

    def tile(self, name: str) -> dict[str, Any] | None:
        """Return a row of the table of tiles; None where it has none of this name."""
        rows = self.tiles.filter(pc.equal(self.tiles["tile"], name)).to_pylist()
        return rows[0] if rows else None

    def splits(self, tile: str) -> dict[str, str | None]:
        """Return the split of a tile for both networks, by their names; None: it is not used.

        Nothing where there is no index, or where it does not have the tile.
        """
        path = Path(layout.INDEX)
        columns = {"GenerationNet": "generation_split", "SegmentationNet": "segmentation_split"}
        if not path.exists():
            return {}
        schema, names = tables.index(self.engines), ["tile", *columns.values()]
        found = self._fresh("index", [path], lambda: tables.read(path, schema, names))
        rows = found.filter(pc.equal(found["tile"], tile)).to_pylist()
        return {name: rows[0][column] for name, column in columns.items()} if rows else {}

    @property
    def reasons(self) -> dict[str, dict[str, str]]:
        """Words and colour of each reason of stage filter, as in the data report."""
        present = (
            self.tiles["reason"].unique().to_pylist() if Path(layout.FILTERED).exists() else ()
        )
        colors = filters.reason_colors(present)
        return {
            name: {"words": criterion.text, "color": colors[name]}
            for name, criterion in REASONS.items()
        }

    def certificate(self, pair: Pair) -> dict[str, Any] | None:
        """Return the certificate of a pair with the options of register; None where it has none."""
        path = layout.path(layout.CERTIFICATE, unit=pair.pair)
        if pair.registered or not path.exists():
            return None

        def read() -> dict[str, Any]:
            (row,) = tables.read(path, tables.CERTIFICATE).to_pylist()
            return {**row, "options": json.loads(tables.read_metadata(path)["options"])}

        found: dict[str, Any] = self._fresh(f"certificate {pair.pair}", [path], read)
        return found

    def pairs(self) -> list[dict[str, Any]]:
        """Return the pairs, the worst registration first, then those without certificate."""
        counts: dict[str, dict[bool, int]] = {}
        if Path(layout.FILTERED).exists():
            groups = self.tiles.group_by(["pair", "accepted"]).aggregate([([], "count_all")])
            for row in groups.to_pylist():
                counts.setdefault(row["pair"], {})[row["accepted"]] = row["count_all"]
        found = []
        for pair in self.sheet.pairs:
            row = self.certificate(pair)
            own = counts.get(pair.pair, {})
            found.append(
                {
                    **pair.model_dump(
                        include={"pair", "case", "dataset", "score", "verdict", "verdict_reason"}
                    ),
                    "registration": row["verdict"] if row else "registered" * pair.registered,
                    "reason": row["reason"] if row else None,
                    **{key: row and row[key] for key in ("tile_ok", "error_p90_um")},
                    "accepted": own.get(True, 0),
                    "tiles": sum(own.values()),
                    "order": (0, *registration.worst_first(row)) if row else (1, 0, 0, pair.pair),
                }
            )
        found.sort(key=lambda each: each.pop("order"))
        return found

    def facts(self, pair: Pair, opened: OpenPair) -> dict[str, Any]:
        """Return what the page of a pair shows besides pixels; positions in pixels of H&E."""
        width, height = opened.he.size_px
        row = self.certificate(pair)
        signals = registration.signals(row, row["options"]) if row else []
        return {
            "width": width,
            "height": height,
            "level_max": opened.level_max,
            "he_mpp": opened.he.mpp,
            "note": opened.note,
            "registration": row["verdict"] if row else "",
            "why": row["reason"] if row else None,
            "signals": [
                {
                    "name": each["name"],
                    "words": each["words"],
                    "grade": each["grade"],
                    "shown": (percent if each["is_fraction"] else number)(each["value"]),
                }
                for each in signals
                if each["value"] is not None
            ],
            "landmarks": self._landmarks(pair, opened),
            "squares": self._squares(pair, opened) if row else [],
            "classes": registration.ERROR_CLASSES,
            "tiles": [
                {
                    "tile": each["tile"],
                    "x": each["x_px"],
                    "y": each["y_px"],
                    "size_px": each["size_px"],
                    "side": each["size_px"] * each["mpp"] / each["he_mpp"],
                    "reason": each["reason"],
                    "error_um": each["registration_error_um"],
                }
                for each in self.tiles_of(pair.pair)
            ],
            "reasons": self.reasons,
            "engines": self.engines,
        }

    def _landmarks(self, pair: Pair, opened: OpenPair) -> list[dict[str, Any]]:
        """Return corresponding points: that of H&E, and that of HER2 mapped to H&E."""
        path = layout.path(layout.LANDMARK_ERRORS, unit=pair.pair)
        if not pair.has_landmarks or not path.exists():
            return []
        mpp = opened.he.mpp
        return [
            {
                "point": row["point"],
                "error_um": row["error_um"],
                **{
                    name: row[column] / mpp if row[column] is not None else None
                    for name, column in (
                        ("x", "he_x_um"), ("y", "he_y_um"),
                        ("to_x", "predicted_x_um"), ("to_y", "predicted_y_um"),
                    )
                },
            }
            for row in tables.read(path, tables.LANDMARKS).to_pylist()
            if row["he_x_um"] is not None
        ]  # fmt: skip

    def _squares(self, pair: Pair, opened: OpenPair) -> list[dict[str, Any]]:
        """Return the squares of the local error."""
        path = layout.path(layout.QUALITY, unit=pair.pair)
        if not path.exists():
            return []
        local = LocalQuality.from_columns(tables.read(path, tables.QUALITY).to_pydict())
        frame = registration.local_squares(local, opened.registered.he.size_um, opened.he.size_px)
        found: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
        return found

    def picture(self, row: Mapping[str, Any], name: str) -> bytes:
        """Return a stain of a tile as it is in its shard: JPEG or PNG."""
        path = Path(layout.RESULTS) / row["shard"]
        return read_member(path, int(row[f"{name}_offset"]), int(row[f"{name}_length"]))

    def mask(self, row: Mapping[str, Any], engine: str) -> Any:
        """Return the label image (H, W) of a tile; TableError where its engine has none."""
        if engine not in self.engines or not isinstance(row.get(f"{engine}_shard"), str):
            raise TableError("no mask of this engine in this study")
        path = Path(layout.RESULTS) / row[f"{engine}_shard"]
        offset, length = (int(row[f"{engine}_{name}"]) for name in ("offset", "length"))
        return decode_mask(read_member(path, offset, length))

    def outlined(self, row: Mapping[str, Any], engine: str) -> Any:
        """Return the HER2 of a tile (H, W, 3) with the contours of its mask."""
        return pictures.outlined(decode(self.picture(row, "her2")), self.mask(row, engine))

    def cells(self, row: Mapping[str, Any], engine: str) -> list[dict[str, Any]]:
        """Return the cells of a tile; positions in pixels of the tile."""
        path = layout.path(layout.CELLS, unit=self.units[row["pair"]])
        columns = ["tile", "engine", "x_px", "y_px", "positive", "intensity"]
        found = self._fresh("cells", [path], lambda: tables.read(path, tables.CELLS, columns))
        own = found.filter(
            pc.and_(pc.equal(found["tile"], row["tile"]), pc.equal(found["engine"], engine))
        )
        cells: list[dict[str, Any]] = own.select(columns[2:]).to_pylist()
        return cells
