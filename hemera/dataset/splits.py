"""Assign cases to splits and draw the tiles of each network, by hash; check for leakage.

Drawing ranks names by a hash of seed and name, so that an added case or tile moves few others.
"""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from hemera.errors import LeakageError


def split_cases(
    cases: Mapping[str, tuple[str, str, str]],
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
) -> dict[str, str]:
    """Give every case a split.

    A case whose split the sheet names keeps it. The free cases of a data set are drawn, in equal
    fractions of each score, for the splits that the sheet leaves open: a data set with its own test
    cases gets no further ones, and likewise validation. At least one of the free cases trains.

    Args:
        cases: case to (data set, score, split or empty).
        val_fraction: fraction of a data set's free cases.
        test_fraction: likewise.
    """
    splits = {case: split for case, (_, _, split) in cases.items() if split}
    for dataset in sorted({dataset for dataset, _, _ in cases.values()}):
        own = {case: values for case, values in cases.items() if values[0] == dataset}
        named = {split for _, _, split in own.values()}
        free = _interleaved(
            {case: score for case, (_, score, split) in own.items() if not split}, seed
        )
        val = _rounded(len(free), 0.0 if "val" in named else val_fraction)
        test = _rounded(len(free), 0.0 if "test" in named else test_fraction)
        # Few cases: one at least must train, and validation goes before test.
        while val + test and val + test >= len(free):
            val, test = (val - 1, test) if val > test else (val, test - 1)
        for number, case in enumerate(free):
            splits[case] = "val" if number < val else "test" if number < val + test else "train"
    return splits


def assign_folds(strata: Mapping[str, str], folds: int, *, seed: int) -> dict[str, int]:
    """Give every case a fold from 0 on; the cases of each stratum are evenly distributed."""
    return {case: place % folds for place, case in enumerate(_by_stratum(strata, seed))}


def draw_inner(
    strata: Mapping[str, str], fraction: float, *, seed: int
) -> tuple[list[str], list[str]]:
    """Divide cases into those that are trained on and a `fraction` for choices, each sorted.

    At least one case remains for training; the strata are in equal fractions of both.
    """
    order = _by_stratum(strata, seed)
    count = min(_rounded(len(order), fraction), len(order) - 1)
    places = {(2 * number + 1) * len(order) // (2 * count) for number in range(count)}
    inner = [case for place, case in enumerate(order) if place in places]
    return sorted({*order} - {*inner}), sorted(inner)


def _by_stratum(strata: Mapping[str, str], seed: int) -> list[str]:
    """Order cases by stratum, and at random within each."""
    return sorted(strata, key=lambda case: (strata[case], _key(case, seed, "fold")))


def check_unseen(judged: Iterable[str], trained_on: Iterable[str], network: str) -> None:
    """Raise LeakageError where a network was trained on cases that it is evaluated on."""
    seen = sorted({*judged} & {*trained_on})
    if seen:
        raise LeakageError(
            f"{network}: was trained on {', '.join(seen[:5])}{', ...' if len(seen) > 5 else ''}, "
            f"{len(seen)} of the cases that it is evaluated on; train it without them, or evaluate "
            "it on others"
        )


def draw(
    tiles: Iterable[str], count: int | None, *, seed: int, purpose: str
) -> npt.NDArray[np.bool_]:
    """Return which of `tiles` are drawn, (N,); all of them when count is None or too large.

    Draws of different `purpose` are independent.
    """
    ranks = (int.from_bytes(_key(tile, seed, purpose)) for tile in tiles)
    keys = np.fromiter(ranks, np.uint64)
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[np.argsort(keys, kind="stable")[:count]] = True
    return chosen


def check_leakage(rows: Iterable[tuple[str, str, str, str]]) -> None:
    """Check that no case and no source image is in two splits; LeakageError otherwise.

    `rows` are (case, H&E file, HER2 file, split) of every pair.
    """
    seen: dict[tuple[str, str], str] = {}
    for case, he, her2, split in rows:
        for key in (("case", case), ("source image", he), ("source image", her2)):
            first = seen.setdefault(key, split)
            if first != split:
                raise LeakageError(
                    f"{key[0]} {key[1]}: is in {first} and in {split}; give its pairs the same "
                    "case in the sheet"
                )


def _interleaved(scores: Mapping[str, str], seed: int) -> list[str]:
    """Order cases at random, with all scores evenly distributed over the order."""
    groups: dict[str, list[str]] = {}
    for case in sorted(scores, key=lambda case: _key(case, seed, "case")):
        groups.setdefault(scores[case], []).append(case)
    places = {
        case: (number + 0.5) / len(group)
        for group in groups.values()
        for number, case in enumerate(group)
    }
    return sorted(places, key=lambda case: (places[case], _key(case, seed, "case")))


def _rounded(count: int, fraction: float) -> int:
    return max(1, round(count * fraction)) if fraction > 0 and count else 0


def _key(name: str, seed: int, purpose: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()[:8]
