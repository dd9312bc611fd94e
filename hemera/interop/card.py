"""The dataset card: what an index contains, in Markdown."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from hemera.config import IndexOptions
from hemera.dataset.subsets import NETWORKS
from hemera.sheet import SPLITS


def dataset_card(table: pa.Table, metadata: Mapping[str, str], options: IndexOptions) -> str:
    """Return the dataset card of an index with its metadata, Markdown."""
    columns = ["tile", "case", "dataset", "score", "split", "reason", "accepted"]
    tiles = table.select([*columns, *(f"{network}_split" for network in NETWORKS)]).to_pandas()
    accepted = tiles[tiles["accepted"]]
    lines = [
        "# Dataset card",
        "",
        f"Fingerprint `{metadata['fingerprint']}`.",
        "",
        f"{len(accepted)} of {len(tiles)} tiles accepted, of {accepted['case'].nunique()} cases.",
        f"Masks by {', '.join(json.loads(metadata['mask_engines']))}; trained on "
        f"{metadata['mask_target']}.",
    ]
    if metadata["mixture"]:
        lines += ["", f"**Attention: {metadata['mixture']}.**"]
    lines += ["", "## Accepted tiles", "", *_counts(accepted, "split")]
    rows = []
    for network in NETWORKS:
        for split in SPLITS:
            own = accepted[accepted[f"{network}_split"] == split]
            requested = getattr(options, f"{network}_{split}")
            given = "all" if requested is None else requested
            rows.append((network, split, given, len(own), own["case"].nunique()))
    lines += ["", "## What the networks see", ""]
    lines += _markdown(("network", "part", "asked for", "tiles", "cases"), rows)
    lines += ["", "## Why tiles were refused", "", *_counts(tiles[~tiles["accepted"]], "reason")]
    return "\n".join([*lines, *_terms(metadata)])


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


def _counts(tiles: Any, by: str) -> list[str]:
    """Return a table of tiles and cases per data set, score and a third column."""
    found = tiles.groupby(["dataset", "score", by]).agg(
        tiles=("tile", "size"), cases=("case", "nunique")
    )
    found = found.rename({"": "not known"}, level="score").reset_index()
    return _markdown(
        ("data set", "score", by, "tiles", "cases"), list(found.itertuples(index=False))
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    if not rows:
        return ["None."]
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
