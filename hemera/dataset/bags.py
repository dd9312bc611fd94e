"""Bags: the features of the accepted H&E tiles of each case, read from the files of stage embed."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hemera.dataset.features import FeatureFile, Features
from hemera.errors import TableError

Rows = npt.NDArray[np.int64]

STAGES = {"describe": "options_describe", "tile": "options_tile", "embed": "options"}
"""Stages whose options the features are made with, and the attributes that have them."""

RECORDED = ("encoder", "encoder_sha256", "trained_on", "pretraining", *STAGES.values())
"""Attributes in which all files of an encoder agree."""


@dataclasses.dataclass(frozen=True)
class View:
    """A view of a bag: its names and its place."""

    pair: str
    tile: str
    x_px: int
    y_px: int
    size_px: float


class Bags:
    """The features of cases, kept in memory up to a size.

    Attributes:
        width: number of features; 0 without any file.
        encoder_sha256: digest of the weights behind all features.
        trained_on: cases that the encoder was trained on.
        stages: options of `STAGES` that the features are made with.
        mpps: resolutions of the tiles, um/px, one per unit.
    """

    def __init__(
        self, files: Mapping[str, Path], tiles: Sequence[Mapping[str, Any]], memory_mb: int
    ) -> None:
        """Find the rows of each case.

        Args:
            files: features by unit.
            tiles: rows of `tables.STATUS_TILES`.
            memory_mb: features up to this size are kept.

        Raises:
            TableError: when files are missing or damaged, or of different encoders or options.
        """
        accepted = {row["tile"]: row["case"] for row in tiles if row["accepted"]}
        self._rows: dict[str, list[tuple[Path, Rows]]] = collections.defaultdict(list)
        self.views: dict[str, list[View]] = collections.defaultdict(list)
        self.width = 0
        self.encoder_sha256 = self.pretraining = ""
        self.trained_on: list[str] = []
        self.stages: dict[str, dict[str, Any]] = {}
        self.mpps: list[float] = []
        first: tuple[Path, tuple[Any, ...]] | None = None
        for unit in sorted(files):
            with FeatureFile(files[unit]) as file:
                file.check()
                found = tuple(file.attributes.get(name) for name in RECORDED)
                if "mpp" in file.attributes:
                    self.mpps.append(float(file.attributes["mpp"]))
                first = first or (files[unit], (*found, file.width))
                if (*found, file.width) != first[1]:
                    raise TableError(
                        f"{files[unit]}: made with another encoder, weights or options than "
                        f"{first[0]}; delete the folder and run the stage embed again"
                    )
                self._add(files[unit], file, accepted)
        if first is not None:
            _, sha256, trained_on, pretraining, *made_with, width = first[1]
            self.stages = {
                stage: json.loads(values)
                for stage, values in zip(STAGES, made_with, strict=True)
                if values
            }
            self.width, self.encoder_sha256 = int(width), str(sha256)
            self.trained_on, self.pretraining = _listed(trained_on), str(pretraining)
        size = sum(len(views) for views in self.views.values()) * self.width * 2
        fits = size <= memory_mb * 1e6
        self._kept: dict[str, Features] | None = {} if fits else None

    def _add(self, path: Path, file: FeatureFile, accepted: Mapping[str, str]) -> None:
        """Add the rows of a file."""
        views = file.views()
        rows: dict[str, list[int]] = collections.defaultdict(list)
        for row, tile in enumerate(views.tiles):
            case = accepted.get(tile)
            if case is None:
                continue
            rows[case].append(row)
            x, y = views.coords[row].tolist()
            self.views[case].append(View(views.pairs[row], tile, x, y, float(views.size_px[row])))
        for case, own in rows.items():
            self._rows[case].append((path, np.array(own, np.int64)))

    def load(self, case: str) -> Tensor:
        """Return the features of a case, (N, D) float32, in the order of `views`."""
        if self._kept is None:
            return torch.from_numpy(self._read(case)).float()
        if case not in self._kept:
            self._kept[case] = self._read(case)
        return torch.from_numpy(self._kept[case]).float()

    def _read(self, case: str) -> Features:
        parts = []
        for path, rows in self._rows[case]:
            with FeatureFile(path) as file:
                parts.append(file.read(rows))
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.float16)


def _listed(value: Any) -> list[str]:
    """Return the cases of an attribute, JSON."""
    return [str(case) for case in json.loads(value)] if value else []
