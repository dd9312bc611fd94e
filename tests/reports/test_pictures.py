"""Pictures: contours, the limit of an album, colours."""

import numpy as np

from hemera.masks import label_format
from hemera.reports import pictures


def test_contours_lie_on_the_cells() -> None:
    """A positive and a negative cell: each contour has its colour, and the inside is untouched."""
    classes = np.zeros((60, 90), np.uint8)
    classes[10:30, 10:35] = label_format.POSITIVE
    classes[35:55, 50:80] = label_format.NEGATIVE
    label = label_format.pack(classes, classes > 0, np.zeros_like(classes))
    gray = np.full((60, 90, 3), 200, np.uint8)
    drawn = pictures.outlined(gray, label)
    assert tuple(drawn[10, 20]) == pictures.POSITIVE_COLOUR
    assert tuple(drawn[35, 60]) == pictures.NEGATIVE_COLOUR
    assert tuple(drawn[20, 22]) == tuple(drawn[45, 65]) == tuple(drawn[2, 2]) == (200, 200, 200)
    assert (gray == 200).all()


def test_album_gives_all_of_a_group_or_none_and_never_exceeds() -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 255, (90, 120, 3), np.uint8)
    one = len(pictures.Album(10**9).take({"a": noise}, 400)["a"])
    album = pictures.Album(round(4.5 * one))
    groups = []
    while group := album.take({"a": noise, "b": noise}, 400):
        groups.append(group)
    assert [set(group) for group in groups] == [{"a", "b"}] * 2
    assert sum(len(address) for group in groups for address in group.values()) <= 4.5 * one
    left = album.left_bytes
    assert album.take({"a": noise[:8, :8], "b": noise}, 400) == {}
    assert album.left_bytes == left


def test_steps_go_from_light_to_dark() -> None:
    """In gray, too, each colour is darker than the one before."""
    colours = pictures.steps(7)
    gray = [np.dot([int(c[k : k + 2], 16) for k in (1, 3, 5)], (0.3, 0.59, 0.11)) for c in colours]
    assert len(set(colours)) == 7
    assert all(np.diff(gray) < -10)
