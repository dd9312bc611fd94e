"""Reading a slide with regions that cannot be decoded: losses are counted and bounded."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hemera.errors import SlideError
from hemera.files.threads import in_order

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]

LOST_MAX = 0.10
"""A slide of which a larger fraction cannot be decoded is refused."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass
class Losses:
    """Counts what cannot be read, and raises SlideError when it is too much."""

    subject: str
    total: int
    fraction_max: float
    unit: str = "tiles"
    option: str = ""
    """That sets `fraction_max`, for the error message."""
    lost: int = 0
    first: SlideError | None = None

    def add(self, error: SlideError, amount: int = 1) -> None:
        """Count one error; SlideError when more than `fraction_max` of `total` is lost."""
        self.first = self.first or error
        self.lost += amount
        if self.lost > self.fraction_max * self.total:
            option = f" ({self.option})" if self.option else ""
            raise SlideError(
                f"{self.subject}: {self.lost} of {self.total} {self.unit} cannot be read, over "
                f"{self.fraction_max:.0%}{option}; the first: {self.first}"
            ) from error


def read_tiles(
    read: Callable[[Item], Result], places: Sequence[Item], workers: int, losses: Losses
) -> Generator[Result | None, None, None]:
    """Yield ``read(place)`` in order, None where it raises a `SlideError`; see `Losses.add`.

    `read` is called in threads; any number of them gives the same results.
    """

    def attempt(place: Item) -> Result | SlideError:
        try:
            return read(place)
        except SlideError as error:
            return error

    with contextlib.closing(in_order(attempt, places, workers)) as results:
        for result in results:
            if isinstance(result, SlideError):
                log.warning("%s: a tile is left out: %s", losses.subject, result)
                losses.add(result)
                yield None
            else:
                yield result


def read_region(
    read: Callable[[int, int, int, int], RGB],
    width: int,
    height: int,
    *,
    piece_px: int,
    fill: tuple[int, ...],
    losses: Losses,
) -> RGB:
    """Read a region at once or, where that fails, in pieces of a side of `piece_px`.

    `read` takes left, top, width and height. Pieces that fail are filled with a colour, and their
    pixels counted, see `Losses.add`.
    """
    with contextlib.suppress(SlideError):
        return read(0, 0, width, height)
    region = np.empty((height, width, 3), np.uint8)
    region[:] = fill
    for top in range(0, height, piece_px):
        for left in range(0, width, piece_px):
            size = min(piece_px, width - left), min(piece_px, height - top)
            try:
                region[top : top + size[1], left : left + size[0]] = read(left, top, *size)
            except SlideError as error:
                losses.add(error, size[0] * size[1])
    return region
