"""What the page about the data says from tables alone: what is usable, what is not, and why."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from hemera.config import STAGES
from hemera.config import base as options_base
from hemera.dataset.criteria import CRITERIA, MEASURES, REASONS
from hemera.masks.agreement import suitability
from hemera.masks.her2_score import asco_cap_score
from hemera.reports import charts
from hemera.reports.html import count, number, percent, plural
from hemera.sheet import SCORES, SPLITS, Pair

NETWORKS = {"generation": "GenerationNet", "segmentation": "SegmentationNet"}
ROWS_MAX = 500
"""Rows of a table on the page; the tables on disk hold them all."""
WORST_TILES = 12
LEVELS = ("weak", "moderate", "strong")
LEAN_MIN = 0.10
LEAN_TILES_MIN = 20
"""A score is named when its tiles are accepted so much less or more often than the others of its
data set, and there are so many of them."""


STATES = {
    "tiled": "tiled",
    "refused": "refused",
    "no_tissue": "no tissue",
    "unreadable": "unreadable",
}

REGISTRATIONS = {
    "registered": "came registered",
    "pass": "pass",
    "review": "review",
    "fail": "fail",
    "accepted": "accepted by a person",
    "refused": "refused by a person",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """All tables that the page is made of."""

    sheet: str
    preset: str
    pairs: tuple[Pair, ...]
    outcomes: pa.Table
    """`tables.PAIRS` of all units."""
    images: pa.Table
    """`tables.DESCRIBE` of all units, without its pictures."""
    funnel: pa.Table
    index: pa.Table
    """`tables.index`, without digests."""
    metadata: Mapping[str, str]
    """Of the index."""

    @property
    def engines(self) -> list[str]:
        """The mask engines."""
        return list(json.loads(self.metadata.get("mask_engines", "[]")))

    def options(self, stage: str) -> dict[str, Any]:
        """Return what a stage ran with, or nothing where the index does not say."""
        return dict(json.loads(self.metadata.get(f"options_{stage}", "{}")))

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column of the index; numbers as float64, absent ones nan."""
        column = self.index.column(name)
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
        return np.asarray(column.to_pylist(), dtype=object)

    @property
    def accepted(self) -> npt.NDArray[np.bool_]:
        """Which tiles are accepted."""
        return np.asarray(self.index.column("accepted").to_numpy(zero_copy_only=False), np.bool_)


def score_name(score: str) -> str:
    """Return a score as it is written on the page."""
    return score or "not known"


def score_order(score: str) -> int:
    """Return where a score stands among the others; an unknown one last."""
    return SCORES.index(score) if score in SCORES else len(SCORES)


def headline(cohort: Cohort) -> list[dict[str, str]]:
    """Return the few numbers that say what is usable: value, of what, more words."""
    accepted = cohort.accepted
    cases = cohort.column("case")
    usable = len(set(cases[accepted]))
    states = collections.Counter(cohort.outcomes.column("state").to_pylist())
    tiled = states.pop("tiled", 0)
    lost = ", ".join(f"{count(n)} {STATES.get(name, name)}" for name, n in sorted(states.items()))
    mpps = cohort.column("mpp")[accepted]
    size = cohort.column("size_px")[accepted]
    span = (
        f"{number(float(mpps.min()))}"
        + (f" to {number(float(mpps.max()))}" if mpps.max() > mpps.min() * 1.005 else "")
        + f" µm/px, {number(float(size[0]))} px a side"
        if len(mpps)
        else "no tile to measure"
    )
    total = len(accepted)
    return [
        {
            "value": count(int(accepted.sum())),
            "of": f"of {plural(total, 'tile')} accepted",
            "more": (
                f"{percent(float(accepted.mean()))}; {span}" if total else "no tile was written"
            ),
        },
        {
            "value": count(usable),
            "of": f"of {plural(len({pair.case for pair in cohort.pairs}), 'case')} with tiles",
            "more": f"{plural(len({pair.dataset for pair in cohort.pairs}), 'data set')}",
        },
        {
            "value": count(tiled),
            "of": f"of {plural(len(cohort.pairs), 'pair')} tiled",
            "more": lost or "none lost",
        },
    ]


def warnings(cohort: Cohort, leans: Sequence[str]) -> list[dict[str, str]]:
    """Return what a reader must know before all else: level, words, and an anchor of the page."""
    found: list[dict[str, str]] = []

    def add(level: str, words: str, link: str = "") -> None:
        found.append({"level": level, "words": words, "link": link})

    total, accepted = len(cohort.accepted), int(cohort.accepted.sum())
    if not total:
        add("stop", "No tile was written: the table of pairs says why, pair by pair.", "pairs")
    elif not accepted:
        add(
            "stop",
            "Nothing was accepted: the funnel says why, and the thresholds are in config.yaml "
            "(section filter).",
            "funnel",
        )
    if accepted:
        split = cohort.column("split")[cohort.accepted]
        for part in SPLITS:
            if not np.any(split == part):
                add(
                    "stop" if part == "train" else "care",
                    f"Split {part} is empty: no accepted tile stands in it. Give cases to it in "
                    "pairs.tsv (split), or add cases.",
                    "splits",
                )
        for network, name in NETWORKS.items():
            subset = cohort.column(f"{network}_split")
            for part in SPLITS:
                if np.any(split == part) and not np.any(subset == part):
                    add(
                        "stop" if part == "train" else "care",
                        f"{name} has no tile in {part}, although the split has some: see "
                        f"index.{network}_datasets and its neighbours in config.yaml.",
                        "splits",
                    )
    if cohort.metadata.get("mixture"):
        words = cohort.metadata["mixture"]
        add("care", words[0].upper() + words[1:] + ". tile.mpp sets one for all.", "quality")
    states = collections.Counter(cohort.outcomes.column("state").to_pylist())
    for state, words in (
        ("refused", "refused and not tiled"),
        ("unreadable", "with an image that cannot be read"),
        ("no_tissue", "without tissue"),
    ):
        if states[state]:
            add("care", f"{plural(states[state], 'pair')} {words}.", "pairs")
    review = cohort.outcomes.filter(pc.equal(cohort.outcomes.column("registration"), "review"))
    if review.num_rows:
        taken = cohort.options("filter").get("accept_review", False)
        add(
            "care",
            f"{plural(review.num_rows, 'registration')} under review: "
            + (
                "its tiles are taken (filter.accept_review)."
                if taken
                else "its tiles are not taken; look, and write accept or refuse into pairs.tsv "
                "(verdict)."
            ),
            "registration",
        )
    broken = sum(cohort.outcomes.column("tiles_unreadable").to_pylist())
    if broken:
        add("care", f"{plural(broken, 'tile')} could not be decoded and is left out.", "pairs")
    for words in leans:
        add("care", words, "funnel")
    for engine in cohort.engines:
        fractions = cohort.column(f"{engine}_positive_fraction")[cohort.accepted]
        if accepted and not np.nansum(fractions):
            add("care", f"No accepted tile has a positive pixel in the masks of {engine}.", "masks")
    compared = agreement(cohort)
    verdict = compared["all"]["verdict"] if compared else None
    if verdict in ("doubtful", "unsuitable"):
        first, second = compared["engines"]
        add(
            "care",
            f"The masks of {first} and {second} agree too little to trust either unseen: {verdict} "
            "as labels overall.",
            "masks",
        )
    return found


def outcomes(cohort: Cohort) -> dict[str, Any]:
    """Return the rows of the table of pairs: whole slides, and image pairs that are not tiled."""
    state = {row["pair"]: row for row in cohort.outcomes.to_pylist()}
    images: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for row in cohort.images.to_pylist():
        images[row["pair"]][row["stain"]] = row
    tiles = collections.Counter(cohort.column("pair")[cohort.accepted])
    rows = []
    blocks: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for pair in cohort.pairs:
        row = state.get(pair.pair)
        if row is None:
            continue
        if pair.in_block:
            blocks[pair.dataset]["pairs"] += 1
            blocks[pair.dataset][row["state"]] += 1
            blocks[pair.dataset]["written"] += row["tiles_written"]
            blocks[pair.dataset]["accepted"] += tiles[pair.pair]
            if row["state"] == "tiled":
                continue
        rows.append(
            {
                "pair": pair.pair,
                "dataset": pair.dataset,
                "score": score_name(pair.score),
                "state": row["state"],
                "state_words": STATES.get(row["state"], row["state"]),
                "registration": REGISTRATIONS.get(row["registration"], row["registration"]),
                "verdict": row["registration"],
                "reason": row["reason"] or "",
                "sizes": [_size(images[pair.pair].get(stain)) for stain in ("he", "her2")],
                "grid": row["tiles_grid"],
                "tissue": row["tiles_tissue"],
                "unreadable": row["tiles_unreadable"],
                "written": row["tiles_written"],
                "accepted": tiles[pair.pair],
            }
        )
    order = {"unreadable": 0, "refused": 1, "no_tissue": 2}
    rows.sort(key=lambda row: (order.get(row["state"], 3), row["pair"]))
    return {
        "rows": rows[:ROWS_MAX],
        "left_out": max(0, len(rows) - ROWS_MAX),
        "blocks": [{"dataset": name, **blocks[name]} for name in sorted(blocks)],
        "slides": any(not pair.in_block for pair in cohort.pairs),
    }


def _size(image: Mapping[str, Any] | None) -> str:
    if image is None or image["width_px"] is None:
        return "not read"
    text = f"{count(image['width_px'])} × {count(image['height_px'])} px"
    return f"{text}, {number(image['mpp'])} µm/px ({image['mpp_source']})"


def funnel(cohort: Cohort) -> dict[str, Any]:
    """Return the way of the tiles: the steps, the reasons per data set and score, the leanings."""
    rows = cohort.funnel.to_pylist()
    total = collections.Counter[str]()
    groups: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for row in rows:
        total[row["reason"]] += row["tiles"]
        groups[row["dataset"], row["score"]][row["reason"]] += row["tiles"]
    reasons = [name for name in REASONS if total[name]]
    reasons += sorted(name for name in total if name not in REASONS and name != "accepted")
    limits = cohort.options("filter")
    everything = sum(total.values())
    grid, tissue = (
        sum(cohort.outcomes.column(f"tiles_{name}").to_pylist()) for name in ("grid", "tissue")
    )
    steps: list[tuple[str, list[tuple[str, str, float]], str]] = []

    def step(label: str, left: int, taken: int, words: str) -> None:
        steps.append(
            (
                label,
                [("left", charts.BLUE, left), ("taken away here", charts.ORANGE, taken)],
                words,
            )
        )

    step("positions on the grid", grid, 0, count(grid))
    step("above the tissue floor", tissue, grid - tissue, f"{count(tissue)} left")
    step("written", everything, max(0, tissue - everything), f"{count(everything)} left")
    left = everything
    for name in reasons:
        left -= total[name]
        step(
            name,
            left,
            total[name],
            f"{count(left)} left, {count(total[name])} taken",
        )
    ordered = sorted(groups, key=lambda key: (key[0], score_order(key[1])))
    table = [
        {
            "dataset": dataset,
            "score": score_name(score),
            "tiles": sum(groups[dataset, score].values()),
            "accepted": groups[dataset, score]["accepted"],
            "rate": _rate(groups[dataset, score]),
            "taken": [groups[dataset, score][name] for name in reasons],
        }
        for dataset, score in ordered
    ]
    colours = dict(
        zip(reasons, (charts.ORANGE, charts.VERMILLION, charts.PURPLE, charts.GREEN,
                      charts.SKY, charts.BROWN, charts.GRAY), strict=False)
    )  # fmt: skip
    shares = charts.bars(
        "What became of the tiles of each data set and score",
        [
            (
                f"{dataset}, {score_name(score)}",
                [("accepted", charts.BLUE, float(groups[dataset, score]["accepted"]))]
                + [
                    (name, colours.get(name, charts.GRAY), float(groups[dataset, score][name]))
                    for name in reasons
                ],
                f"{percent(_rate(groups[dataset, score]))} of "
                f"{plural(sum(groups[dataset, score].values()), 'tile')}",
            )
            for dataset, score in ordered
        ],
        share=True,
    )
    return {
        "steps": charts.bars("From positions on the grid to accepted tiles", steps) if grid else "",
        "shares": shares if everything else "",
        "legend": [("accepted", charts.BLUE)]
        + [(name, colours.get(name, charts.GRAY)) for name in reasons],
        "reasons": [
            {
                "name": name,
                "words": REASONS[name].text if name in REASONS else "",
                "limit": limit_words(name, limits),
                "tiles": total[name],
            }
            for name in reasons
        ],
        "names": reasons,
        "table": table,
        "leans": leanings(groups, reasons),
        "everything": everything,
    }


def limit_words(reason: str, limits: Mapping[str, Any]) -> str:
    """Return the key and the value in config.yaml that decide a reason."""
    criterion = REASONS.get(reason)
    if criterion is None:
        return ""
    value = limits.get(criterion.option)
    if criterion.column is None:
        return f"filter.{criterion.option}: false"
    return f"filter.{criterion.option}" + ("" if value is None else f": {value:g}")


def _rate(group: Mapping[str, int]) -> float:
    total = sum(group.values())
    return group["accepted"] / total if total else float("nan")


def leanings(
    groups: Mapping[tuple[str, str], Mapping[str, int]], reasons: Sequence[str]
) -> list[str]:
    """Return a sentence for each score that the filters take more or fewer tiles of than of others.

    Of each data set, the score that stands out most against the rest is named first and then left
    out, so that the others are not blamed for standing beside it.
    """
    found = []
    for dataset in sorted({dataset for dataset, _ in groups}):
        own = {
            score: collections.Counter(group)
            for (name, score), group in groups.items()
            if name == dataset and score and sum(group.values()) >= LEAN_TILES_MIN
        }
        while len(own) > 1:
            everything: collections.Counter[str] = sum(own.values(), collections.Counter())
            rests = {score: everything - group for score, group in own.items()}
            score = max(
                sorted(own, key=score_order, reverse=True),
                key=lambda name: abs(_rate(own[name]) - _rate(rests[name])),
            )
            group, rest = own.pop(score), rests[score]
            gap = _rate(group) - _rate(rest)
            if abs(gap) < LEAN_MIN:
                break
            sign = -1 if gap < 0 else 1
            size, others = sum(group.values()), sum(rest.values())
            most = max(
                reasons,
                key=lambda name: sign * (rest[name] / others - group[name] / size),
                default="",
            )
            found.append(
                f"The filters lean on {dataset}: {percent(_rate(group), 0)} of its tiles of "
                f"score {score} are accepted, {percent(_rate(rest), 0)} of its other tiles; most "
                f"of the difference is {most}."
            )
    return found


def quality(cohort: Cohort) -> list[Markup]:
    """Return a histogram of each measure, with the line of its threshold."""
    if not cohort.index.num_rows:
        return []
    limits = cohort.options("filter")
    accepted = cohort.accepted
    reasons = cohort.column("reason").astype(str)
    made = []
    for measure, (title, unit) in MEASURES.items():
        values = cohort.column(measure)
        # What nobody measured is no chart: pairs that come registered have no estimated error.
        measured = int(np.isfinite(values).sum())
        if not measured:
            continue
        if measure == "folding_fraction" and not np.nanmax(values, initial=0) > 0:
            continue
        own = [criterion for criterion in CRITERIA if criterion.column == measure]
        taken = np.isin(reasons, [criterion.reason for criterion in own])
        lines = [
            (
                f"{'≥' if criterion.direction == '>=' else '≤'} {limits[criterion.option]:g}",
                limits[criterion.option],
            )
            for criterion in own
            if limits.get(criterion.option) is not None
        ]
        chart = charts.histogram(
            title,
            [
                ("accepted", charts.BLUE, values[accepted]),
                ("refused for another reason", charts.GRAY, values[~accepted & ~taken]),
                ("refused for this", charts.ORANGE, values[taken]),
            ],
            limits=lines,
            unit=unit,
            span=(0.0, 1.0) if measure.endswith("_fraction") else None,
        )
        caption = title if measured == len(values) else f"{title}, {plural(measured, 'tile')}"
        made.append(Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(caption, chart))
    return made


def mask_statistics(cohort: Cohort) -> list[dict[str, Any]]:
    """Return, per engine, what the masks of the accepted tiles hold, per data set and score."""
    made = []
    accepted = cohort.accepted
    dataset, score = cohort.column("dataset"), cohort.column("score")
    area_mm2 = (cohort.column("size_px") * cohort.column("mpp") / 1000) ** 2
    groups = sorted(
        set(zip(dataset[accepted], score[accepted], strict=True)),
        key=lambda key: (key[0], score_order(key[1])),
    )
    for engine in cohort.engines:
        fraction = cohort.column(f"{engine}_positive_fraction")
        cells = cohort.column(f"{engine}_cells")
        positive = cohort.column(f"{engine}_positive_cells")
        levels = [cohort.column(f"{engine}_{name}_cells") for name in LEVELS]
        excluded = cohort.column(f"{engine}_excluded_fraction")
        rows, spread = [], []
        for name, level in groups:
            own = accepted & (dataset == name) & (score == level)
            own &= np.isfinite(fraction)
            if not own.any():
                continue
            total = float(cells[own].sum())
            rows.append(
                {
                    "dataset": name,
                    "score": score_name(level),
                    "tiles": int(own.sum()),
                    "median": float(np.median(fraction[own])),
                    "empty": float(np.mean(fraction[own] == 0)),
                    "density": total / float(area_mm2[own].sum()),
                    "positive": float(positive[own].sum()) / total if total else None,
                    "levels": [
                        float(level[own].sum()) / total if total else None for level in levels
                    ],
                    "excluded": float(np.nanmean(excluded[own])),
                }
            )
            spread.append((f"{name}, {score_name(level)}", fraction[own]))
        made.append(
            {
                "engine": engine,
                "target": engine == cohort.metadata.get("mask_target"),
                "rows": rows,
                "chart": charts.boxes(
                    f"Positive share of the accepted tiles, masks of {engine}",
                    spread,
                    unit="share of the tile that is HER2-positive",
                ),
            }
        )
    return made


def agreement(cohort: Cohort) -> dict[str, Any]:
    """Return how far two engines agree on the accepted tiles: per score, overall, worst tiles.

    Dice and sign are means over tiles; tiles that both call empty agree wholly, and say little:
    they are counted apart.
    """
    if len(cohort.engines) < 2:
        return {}
    first, second = cohort.engines[:2]
    dice, sign = (cohort.column(f"{first}_agreement_{name}") for name in ("dice", "sign"))
    compared = cohort.accepted & np.isfinite(dice)
    if not compared.any():
        return {}
    shares = [cohort.column(f"{engine}_positive_fraction") for engine in (first, second)]
    empty = (shares[0] == 0) & (shares[1] == 0)
    dataset, score = cohort.column("dataset"), cohort.column("score")
    groups = sorted(
        set(zip(dataset[compared], score[compared], strict=True)),
        key=lambda key: (key[0], score_order(key[1])),
    )
    verdicts = np.array(
        [suitability(d, s) if np.isfinite(d) else "" for d, s in zip(dice, sign, strict=True)],
        dtype=object,
    )

    def row(words: tuple[str, str], own: npt.NDArray[np.bool_]) -> dict[str, Any]:
        telling = own & ~empty
        means = [
            float(values[part].mean()) if part.any() else None
            for values, part in ((dice, telling), (sign, telling & np.isfinite(sign)))
        ]
        counts = collections.Counter(verdicts[own])
        return {
            "dataset": words[0],
            "score": words[1],
            "tiles": int(own.sum()),
            "empty": int((own & empty).sum()),
            "dice": means[0],
            "sign": means[1],
            "verdict": suitability(means[0], means[1]) if means[0] is not None else None,
            **{name: counts[name] for name in ("suitable", "doubtful", "unsuitable")},
        }

    rows = [
        row((name, score_name(level)), compared & (dataset == name) & (score == level))
        for name, level in groups
    ]
    least = np.fmin(dice, sign)
    order = np.flatnonzero(compared)
    names = cohort.column("tile")
    order = np.array(sorted(order, key=lambda place: (least[place], names[place])), np.int64)
    return {
        "engines": (first, second),
        "rows": rows,
        "all": row(("all", ""), compared),
        "worst": [
            {
                "place": int(place),
                "tile": names[place],
                "dataset": dataset[place],
                "score": score_name(score[place]),
                "dice": float(dice[place]),
                "sign": float(sign[place]) if np.isfinite(sign[place]) else None,
                "first": float(shares[0][place]),
                "second": float(shares[1][place]),
                "verdict": verdicts[place],
            }
            for place in order[:WORST_TILES]
        ],
    }


def readings(cohort: Cohort, intense_share: float | None = None) -> list[dict[str, Any]]:
    """Return, per engine, the ASCO/CAP reading of its cells against the score in the sheet.

    Once by case and once by tile, of the accepted tiles; of pairs without a score nothing is said.
    `intense_share` is that of `her2_score.asco_cap_score`.
    """
    accepted = cohort.accepted
    score = cohort.column("score")
    made = []
    for engine in cohort.engines:
        columns = [np.nan_to_num(cohort.column(f"{engine}_{name}_cells")) for name in LEVELS]
        cells = np.nan_to_num(cohort.column(f"{engine}_cells"))
        counts = np.column_stack([cells - sum(columns), *columns])
        tables = []
        for words, keys in (("case", cohort.column("case")), ("tile", cohort.column("tile"))):
            total: dict[tuple[str, str], npt.NDArray[np.float64]] = collections.defaultdict(
                lambda: np.zeros(4)
            )
            for place in np.flatnonzero(accepted):
                if score[place] in SCORES:
                    total[keys[place], score[place]] += counts[place]
            table = confusion(
                (truth, asco_cap_score(own.tolist(), intense_fraction=intense_share))
                for (_, truth), own in total.items()
            )
            if table:
                tables.append({"by": words, **table})
        if tables:
            made.append({"engine": engine, "scores": SCORES, "tables": tables})
    return made


def confusion(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the confusion table of (score in the sheet, reading): rows, columns, agreement.

    Args:
        pairs: the reading may be empty: no cell was found.
    """
    counts = collections.Counter(pairs)
    if not counts:
        return {}
    read = sum(n for (_, found), n in counts.items() if found)
    right = sum(counts[name, name] for name in SCORES)
    return {
        "rows": [
            {
                "score": truth,
                "counts": [counts[truth, found] for found in SCORES],
                "without": counts[truth, ""],
            }
            for truth in SCORES
            if any(counts[truth, found] for found in (*SCORES, ""))
        ],
        "read": read,
        "right": right / read if read else None,
        "near": (
            sum(
                n
                for (truth, found), n in counts.items()
                if found and abs(score_order(truth) - score_order(found)) <= 1
            )
            / read
            if read
            else None
        ),
    }


def splits(cohort: Cohort) -> dict[str, Any]:
    """Return cases and tiles per split, and what each network sees."""
    accepted = cohort.accepted
    columns = [cohort.column(name)[accepted] for name in ("dataset", "score", "split", "case")]
    tiles: collections.Counter[tuple[str, str, str]] = collections.Counter()
    cases: dict[tuple[str, str, str], set[str]] = collections.defaultdict(set)
    for dataset, score, split, case in zip(*columns, strict=True):
        tiles[dataset, score, split] += 1
        cases[dataset, score, split].add(case)
    groups = sorted({key[:2] for key in tiles}, key=lambda key: (key[0], score_order(key[1])))
    rows = [
        {
            "dataset": dataset,
            "score": score_name(score),
            "parts": [
                {"tiles": tiles[dataset, score, part], "cases": len(cases[dataset, score, part])}
                for part in SPLITS
            ],
        }
        for dataset, score in groups
    ]
    everywhere = [
        {
            "tiles": sum(n for key, n in tiles.items() if key[2] == part),
            "cases": len(set().union(*(own for key, own in cases.items() if key[2] == part))),
        }
        for part in SPLITS
    ]
    asked = cohort.options("index")
    networks = []
    for network, name in NETWORKS.items():
        subset = cohort.column(f"{network}_split")
        case = cohort.column("case")
        dataset = cohort.column("dataset")
        for part in SPLITS:
            own = subset == part
            wanted = asked.get(f"{network}_{part}")
            by_set = collections.Counter(dataset[own])
            networks.append(
                {
                    "network": name,
                    "part": part,
                    "asked": "all" if wanted is None else count(wanted),
                    "short": wanted is not None and int(own.sum()) < wanted,
                    "tiles": int(own.sum()),
                    "cases": len(set(case[own])),
                    "datasets": ", ".join(f"{key} {count(by_set[key])}" for key in sorted(by_set)),
                }
            )
    return {"parts": SPLITS, "rows": rows, "all": everywhere, "networks": networks}


def provenance(cohort: Cohort) -> dict[str, Any]:
    """Return fingerprint, versions, licences, and every option with what differs from the paper."""
    stages = []
    for stage in STAGES:
        values = cohort.options(stage)
        if values:
            stages.append({"stage": stage, "rows": option_rows(stage, values)})
    return {
        "fingerprint": cohort.metadata.get("fingerprint", ""),
        "versions": json.loads(cohort.metadata.get("versions", "{}")),
        "licences": json.loads(cohort.metadata.get("licences", "[]")),
        "stages": stages,
    }


def option_rows(stage: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of a stage as rows: name, value, the default where it is another, help."""
    declared = options_base.keys(STAGES[stage])
    rows = []
    for name, value in values.items():
        if name not in declared:
            continue
        default = declared[name].default
        same = json.loads(json.dumps(default)) == json.loads(json.dumps(value))
        rows.append(
            {
                "name": name,
                "value": json.dumps(value),
                "default": None if same else json.dumps(default),
                "help": declared[name].help,
                "paper": declared[name].paper,
            }
        )
    return rows
