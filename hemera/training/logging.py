"""What a training leaves to look at while it runs: TensorBoard's log, and pictures.

Nothing here is read by a later stage; the history that counts is a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hemera.io import atomic

GAP_PX = 4


class Journal:
    """The log and the pictures of one run, in its folder; one that is silent leaves nothing."""

    def __init__(self, folder: Path, step: int, *, silent: bool = False) -> None:
        """Open the log.

        Args:
            folder: of the run; the log is its ``tensorboard``, pictures go to ``samples``.
            step: steps done: what a broken run logged after them counts as never logged.
            silent: leave nothing.
        """
        self.folder = folder
        self.silent = silent
        if not silent:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the log."""
        if not self.silent:
            self.writer.close()

    def losses(self, step: int, steps: Sequence[tuple[Mapping[str, Tensor], object]]) -> None:
        """Log the mean losses of the steps before and with `step`."""
        if self.silent:
            return
        for name in steps[0][0]:
            values = torch.stack([found[name].detach().float() for found, _ in steps])
            self.writer.add_scalar(f"step/{name}", float(values.mean()), step)

    def epoch(self, step: int, values: Mapping[str, float]) -> None:
        """Log what an epoch that ended with `step` gave, by part/quantity."""
        if not self.silent:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def picture(self, epoch: int, step: int, image: npt.NDArray[np.uint8]) -> None:
        """Keep a picture (H, W, 3) of an epoch that ended with `step`."""
        if self.silent:
            return
        self.writer.add_image("samples", image, step, dataformats="HWC")
        _, png = cv2.imencode(".png", image[..., ::-1])
        with atomic.replacing(self.folder / "samples" / f"{epoch:04d}.png") as temporary:
            temporary.write_bytes(png.tobytes())


def sheet(rows: Sequence[Sequence[npt.NDArray[np.uint8]]]) -> npt.NDArray[np.uint8]:
    """Set pictures (H, W, 3) of one size each row beside each other, rows below each other."""
    lines = []
    for row in rows:
        gap = np.full((row[0].shape[0], GAP_PX, 3), 255, np.uint8)
        parts = [part for image in row for part in (image, gap)]
        lines.append(np.concatenate(parts[:-1], 1))
    width = max(line.shape[1] for line in lines)
    padded = [
        np.pad(line, ((0, GAP_PX), (0, width - line.shape[1]), (0, 0)), constant_values=255)
        for line in lines
    ]
    return np.concatenate(padded)[:-GAP_PX]
