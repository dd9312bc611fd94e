"""Score of a case from views that three networks have classified (Oyelade et al.).

A network for the tumour on H&E, one for the stain class and one for the map of stain intensities on
HER2 of the same place: views without tumour, without a stained or unstained cell, or whose two
stains are not in register, do not vote.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hemera.masks.her2_score import her2_scores
from hemera.sheet import SCORES

Floats = npt.NDArray[np.floating]

Fusion = Literal["mean", "map", "class"]
Rule = Literal["asco_cap", "paper_max"]

SAMPLES = 2000
_AT_ONCE = 100
"""Bootstrap samples in memory at once: of 100,000 views, 2,000 would take gigabytes."""
NO_PROBABILITIES = (0.0, 0.0, 0.0, 0.0)


class Graded(NamedTuple):
    """What the views of a case give.

    Attributes:
        score: of `SCORES`; empty: no view votes, or by paper_max no view has 2+ or 3+.
        fractions: of the cell area of voting views, of intensity 0 to 3, (4,); NaN without any.
        positive_fraction: area of intensity 2 and 3 in voting views over that of all tumour views.
        tumour, voting, unplaced: number of views.
        probabilities: of the scores: how often they are those of a bootstrap sample of the voting
            views, `SAMPLES` of them; without any 0.
    """

    score: str
    fractions: Floats
    positive_fraction: float
    tumour: int
    voting: int
    unplaced: int
    probabilities: tuple[float, ...]


def fuse(areas: Floats, classes: Floats, fusion: Fusion) -> Floats:
    """Return the probability of each score of views, (N, 4).

    Args:
        areas: of intensity 0 to 3 by the map, (N, 4), each row with a sum above 0.
        classes: probabilities by the classifier, (N, 4).
        fusion: mean: of both; map: fractions of the areas alone; class: the classifier alone.
    """
    fractions = areas / areas.sum(axis=1, keepdims=True)
    chosen = {"mean": (fractions + classes) / 2, "map": fractions, "class": classes}[fusion]
    return np.asarray(chosen)


def view_scores(probabilities: Floats) -> npt.NDArray[np.int64]:
    """Return the likeliest score of views, (N,), 0 to 3; of equal ones the higher."""
    last = probabilities.shape[1] - 1
    return np.asarray(last - np.argmax(probabilities[:, ::-1], axis=1), np.int64)


def grade(
    tumour: Floats,
    areas: Floats,
    classes: Floats,
    placed: npt.NDArray[np.bool_],
    *,
    fusion: Fusion = "mean",
    rule: Rule = "asco_cap",
    tumour_min: float = 0.5,
) -> Graded:
    """Grade a case.

    Args:
        tumour: probability of tumour of each view, (N,).
        areas: fractions of the area of each view that are of intensity 0 to 3, (N, 4).
        classes: probabilities of the scores of each view, (N, 4).
        placed: whether both stains of a view are in register, (N,).
        fusion: see `fuse`.
        rule: asco_cap: `her2_scores` of the fractions of the cell area; paper_max: the greatest
            score of a view, of which only 2+ and 3+ count.
        tumour_min: smallest probability of tumour of a view that votes.
    """
    gated = tumour >= tumour_min
    votes = gated & placed & (areas.sum(axis=1) > 0)
    counts = int(gated.sum()), int(votes.sum()), int((gated & ~placed).sum())
    if not votes.any():
        return Graded("", np.full(len(SCORES), np.nan), np.nan, *counts, NO_PROBABILITIES)
    probabilities = fuse(areas[votes], classes[votes], fusion)
    weighted = areas[votes].sum(axis=1)[:, None] * probabilities
    fractions = weighted.sum(axis=0) / weighted.sum()
    positive = float(areas[votes, 2:].sum() / gated.sum())
    number = len(weighted)
    random, even = np.random.default_rng(0), np.full(number, 1 / number)
    drawn = np.concatenate(
        [
            _scores(random.multinomial(number, even, _AT_ONCE), weighted, probabilities, rule)
            for _ in range(SAMPLES // _AT_ONCE)
        ]
    )
    likely = tuple((np.bincount(drawn, minlength=len(SCORES)) / SAMPLES).tolist())
    place = int(_scores(np.ones((1, number), np.int64), weighted, probabilities, rule)[0])
    score = "" if rule == "paper_max" and place < 2 else SCORES[place]
    return Graded(score, fractions, positive, *counts, likely)


def _scores(
    times: npt.NDArray[np.int64], weighted: Floats, probabilities: Floats, rule: Rule
) -> npt.NDArray[np.int64]:
    """Return the score, 0 to 3, of each sample (S, N) of views by how often each is in it."""
    if rule == "paper_max":
        found: npt.NDArray[np.int64] = np.where(times > 0, view_scores(probabilities), 0).max(1)
        return found
    # Ultralow is 0.
    return np.maximum(her2_scores(times @ weighted) - 1, 0)
