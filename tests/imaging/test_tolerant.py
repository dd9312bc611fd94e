import numpy as np
import pytest

from hemera.errors import SlideError
from hemera.imaging.tolerant import Losses, read_region, read_tiles


def odd(number):
    if number % 2 == 0:
        raise SlideError(f"tile {number}")
    return 10 * number


@pytest.mark.parametrize("workers", [1, 3])
def test_tiles_that_cannot_be_read_are_none_and_counted(workers):
    losses = Losses("a.tif", 5, 0.4)
    assert list(read_tiles(odd, [1, 2, 3, 4, 5], workers, losses)) == [10, None, 30, None, 50]
    assert (losses.lost, str(losses.first)) == (2, "tile 2")


@pytest.mark.parametrize("workers", [1, 3])
def test_more_than_the_allowed_fraction_is_an_error(workers):
    losses = Losses("a.tif", 5, 0.3, option="tile.bad_tiles_max")
    tiles = read_tiles(odd, [1, 2, 3, 4, 5], workers, losses)
    assert [next(tiles) for _ in range(3)] == [10, None, 30]
    message = r"^a\.tif: 2 of 5 tiles cannot be read, over 30% \(tile\.bad_tiles_max\); .* tile 2$"
    with pytest.raises(SlideError, match=message):
        next(tiles)


def test_only_the_pieces_that_cannot_be_read_are_filled():
    picture = np.arange(10 * 14 * 3, dtype=np.uint8).reshape(10, 14, 3)

    def read(x, y, width, height):
        # The pixel in row 9, column 6 is damaged.
        if x <= 6 < x + width and y <= 9 < y + height:
            raise SlideError("damaged")
        return picture[y : y + height, x : x + width]

    losses = Losses("a.tif", 140, 0.1, "px")
    region = read_region(read, 14, 10, piece_px=4, fill=(1, 2, 3), losses=losses)
    damaged = np.zeros((10, 14), bool)
    damaged[8:10, 4:8] = True
    assert (region[~damaged] == picture[~damaged]).all()
    assert (region[damaged] == (1, 2, 3)).all()
    assert losses.lost == 8
    with pytest.raises(SlideError, match="8 of 70 px"):
        read_region(read, 14, 10, piece_px=4, fill=(1, 2, 3), losses=Losses("a.tif", 70, 0.1, "px"))
