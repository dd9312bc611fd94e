"""The dataset card: what an index contains, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hemera.config import IndexOptions
from hemera.sheet import SPLITS

NETWORKS = ("generation", "segmentation")


def dataset_card(table: pa.Table, metadata: Mapping[str, str], options: IndexOptions) -> str:
    """Return the dataset card, Markdown.

    Args:
        table: the index.
        metadata: its key-value metadata.
        options: of stage index.
    """
    accepted = table.filter(table.column("accepted"))
    lines = [
        "# Dataset card",
        "",
        f"Fingerprint `{metadata['fingerprint']}`.",
        "",
        f"{accepted.num_rows} of {table.num_rows} tiles accepted, of "
        f"{len(set(accepted.column('case').to_pylist()))} cases.",
        f"Masks by {', '.join(json.loads(metadata['mask_engines']))}; trained on "
        f"{metadata['mask_target']}.",
    ]
    if metadata["mixture"]:
        lines += ["", f"**Attention: {metadata['mixture']}.**"]
    lines += ["", "## Accepted tiles", ""]
    lines += _markdown(
        ("data set", "score", "split", "tiles", "cases"),
        [
            (dataset, score or "not known", split, tiles, cases)
            for dataset, score, split, tiles, cases in _grouped(
                accepted, ["dataset", "score", "split"]
            )
        ],
    )
    lines += ["", "## What the networks see", ""]
    rows = []
    for network in NETWORKS:
        for split in SPLITS:
            own = accepted.filter(pc.equal(accepted.column(f"{network}_split"), split))
            requested = getattr(options, f"{network}_{split}")
            cases = len(set(own.column("case").to_pylist()))
            rows.append(
                (network, split, "all" if requested is None else requested, own.num_rows, cases)
            )
    lines += _markdown(("network", "part", "asked for", "tiles", "cases"), rows)
    lines += ["", "## Why tiles were refused", ""]
    refused = table.filter(pc.invert(table.column("accepted")))
    lines += _markdown(
        ("data set", "score", "reason", "tiles", "cases"),
        [
            (dataset, score or "not known", reason, tiles, cases)
            for dataset, score, reason, tiles, cases in _grouped(
                refused, ["dataset", "score", "reason"]
            )
        ],
    )
    lines += _terms(metadata)
    return "\n".join(lines)


def _terms(metadata: Mapping[str, str]) -> list[str]:
    """Return the sections on leakage, licences, versions and options."""
    return [
        "",
        "## Leakage",
        "",
        "No case and no source image stands in two splits, and no test case of SegmentationNet was "
        "seen by GenerationNet: checked when this card was written. BCI names no patients; its "
        "images of one slide can stand on both sides of its released split, which cannot be seen "
        "from the release.",
        "",
        "## Terms",
        "",
        *(f"- {line}" for line in json.loads(metadata["licences"])),
        "",
        "## Made by",
        "",
        *(f"- {name} {version}" for name, version in json.loads(metadata["versions"]).items()),
        "",
        "## Options",
        "",
        *(
            f"- {key.removeprefix('options_')}: `{value}`"
            for key, value in metadata.items()
            if key.startswith("options_")
        ),
        "",
    ]


def _grouped(table: pa.Table, keys: list[str]) -> list[tuple[Any, ...]]:
    """Return rows (*keys, tiles, cases), sorted."""
    grouped = table.group_by(keys).aggregate([("tile", "count"), ("case", "count_distinct")])
    grouped = grouped.sort_by([(key, "ascending") for key in keys])
    columns = [
        grouped.column(name).to_pylist() for name in (*keys, "tile_count", "case_count_distinct")
    ]
    return list(zip(*columns, strict=True))


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    if not rows:
        return ["None."]
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
