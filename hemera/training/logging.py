"""Logs and pictures of a training; no later stage reads them, the history is a table."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from hemera.dataset.torch_dataset import TileDataset
from hemera.files import atomic

log = logging.getLogger(__name__)

GAP_PX = 4


class TrainingLog(contextlib.AbstractContextManager["TrainingLog"]):
    """TensorBoard's log, the pictures and the progress bar of a run."""

    def __init__(self, folder: Path, done: int, total: int, *, silent: bool = False) -> None:
        """Open the log of a run of `total` steps in its folder; all ranks but one are silent.

        What an interrupted run logged after the steps `done` is discarded.
        """
        self.folder = folder
        self.silent = silent
        self._done = done
        self._started = time.monotonic()
        self._epochs = 0
        self._bar = tqdm(total=total, initial=done, unit="step", disable=True if silent else None)
        if not silent:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if not self.silent:
            self._writer.close()

    def step(self) -> None:
        """Count a step."""
        self._bar.update()
        self._done += 1

    def losses(self, values: Mapping[str, float]) -> None:
        """Log mean losses at the last step."""
        if not self.silent:
            for name, value in values.items():
                self._writer.add_scalar(f"step/{name}", value, self._done)

    def epoch(self, epoch: int, epochs: int, values: Mapping[str, float]) -> None:
        """Log an epoch of so many, which ended with the last step, by split/quantity."""
        if self.silent:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, self._done)
        self._writer.flush()
        self._epochs += 1
        shown = ", ".join(f"{name.replace('/', ' ')} {value:.4g}" for name, value in values.items())
        left_s = (time.monotonic() - self._started) / self._epochs * (epochs - epoch)
        log.info("epoch %d/%d: %s; about %.0f s left", epoch, epochs, shown, left_s)

    def picture(self, epoch: int, image: npt.NDArray[np.uint8]) -> None:
        """Store a picture (H, W, 3) of an epoch that ended with the last step."""
        if self.silent:
            return
        self._writer.add_image("samples", image, self._done, dataformats="HWC")
        _, png = cv2.imencode(".png", image[..., ::-1])
        atomic.write_bytes(self.folder / "samples" / f"{epoch:04d}.png", png.tobytes())


def image_grid(rows: Sequence[Sequence[npt.NDArray[np.uint8]]]) -> npt.NDArray[np.uint8]:
    """Arrange pictures (H, W, 3) of one size: those of a row side by side, rows downwards."""
    gap = ((0, GAP_PX), (0, GAP_PX), (0, 0))
    padded = [[np.pad(image, gap, constant_values=255) for image in row] for row in rows]
    return np.vstack([np.hstack(row) for row in padded])[:-GAP_PX, :-GAP_PX]


def sample_items(tiles: TileDataset) -> list[dict[str, Any]]:
    """Return items of four tiles, evenly spaced, as in validation."""
    positions = np.linspace(0, len(tiles) - 1, min(4, len(tiles))).round().astype(int)
    return [tiles[0, int(position)] for position in np.unique(positions)]
