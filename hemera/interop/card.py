"""The dataset card: what an index contains, in Markdown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hemera import tables
from hemera.config import IndexOptions
from hemera.dataset.subsets import NETWORKS
from hemera.errors import TableError
from hemera.files.faults import translated
from hemera.sheet import SPLITS

COLUMNS = [
    "case", "dataset", "score", "split", "reason", "accepted",
    *(f"{network}_split" for network in NETWORKS),
]  # fmt: skip
"""Columns of the index whose rows are counted."""

CARD = """\
# Dataset card

Fingerprint `{fingerprint}`.

{accepted} of {tiles} tiles accepted, of {cases} cases.
Masks by {engines}; the networks are trained with those of {target}.
{mixture}
## Accepted tiles

{splits}

## Subsets of the networks

{networks}

## Excluded regions

{excluded}

## Why tiles were refused

{reasons}

## Leakage

No case and no source image is in two splits, and GenerationNet was trained on no test case of \
SegmentationNet: both were checked when this card was written. BCI's release has no patient \
identifiers, so tiles of one of its slides may be in the training and the test split.

## Terms of use

{terms}
## Software versions

{versions}
## Options

{options}"""


def card_of_index(index: Path) -> str:
    """Return the dataset card of an index, Markdown; TableError when it is not one."""
    metadata, schema = tables.read_metadata(index), tables.index(tables.mask_engines(index))
    with translated(TableError, f"{index}: damaged metadata ({{error}}); run index again"):
        values = json.loads(metadata["options_index"])
        options = IndexOptions(**{name: values[name] for name in values if name != "version"})
    name = f"{options.target}_excluded_fraction"
    if name not in schema.names:
        raise TableError(
            f"{index}: options of index name masks of {options.target}, which it lacks; run index "
            "again"
        )
    excluded = tables.read(index, schema, ["accepted", name])
    excluded = excluded.filter(excluded["accepted"])[name]
    rows = tables.read(index, schema, COLUMNS)
    with translated(TableError, f"{index}: damaged metadata ({{error}}); run index again"):
        return _card(rows, excluded, metadata, options)


def _card(
    table: pa.Table, excluded: pa.ChunkedArray, metadata: Mapping[str, str], options: IndexOptions
) -> str:
    """Return the dataset card of an index with its metadata, Markdown.

    `excluded` is the fraction of every accepted tile that its mask excludes.
    """
    # Equal rows once, with their number: a table of 10^7 rows is not for pandas.
    counted = table.select(COLUMNS).group_by(COLUMNS).aggregate([([], "count_all")])
    tiles = counted.sort_by("case").to_pandas().rename(columns={"count_all": "tiles"})
    accepted = tiles[tiles["accepted"]]
    rows = []
    for network in NETWORKS:
        for split in SPLITS:
            own = accepted[accepted[f"{network}_split"] == split]
            requested = getattr(options, f"{network}_{split}")
            given = "all" if requested is None else requested
            count = int(own["tiles"].sum())
            rows.append((network, split, given, count, own["case"].nunique()))
    versions = json.loads(metadata["versions"])
    own_options = {key: value for key, value in metadata.items() if key.startswith("options_")}
    return CARD.format(
        fingerprint=metadata["fingerprint"],
        accepted=int(accepted["tiles"].sum()),
        tiles=int(tiles["tiles"].sum()),
        cases=accepted["case"].nunique(),
        engines=", ".join(json.loads(metadata["mask_engines"])),
        target=metadata["mask_target"],
        mixture=f"\n**Attention: {metadata['mixture']}.**\n" if metadata["mixture"] else "",
        splits=_counts(accepted, "split"),
        networks=_markdown(("network", "split", "tiles requested", "tiles", "cases"), rows),
        excluded=_excluded(excluded),
        reasons=_counts(tiles[~tiles["accepted"]], "reason"),
        terms="".join(f"- {line}\n" for line in json.loads(metadata["licences"])),
        versions="".join(f"- {name} {version}\n" for name, version in versions.items()),
        options="".join(
            f"- {key.removeprefix('options_')}: `{value}`\n" for key, value in own_options.items()
        ),
    )


def _excluded(excluded: pa.ChunkedArray) -> str:
    """Return how many accepted tiles have pixels that losses and metrics ignore, and how many."""
    fractions = np.asarray(excluded, float)
    return (
        f"{int((fractions > 0).sum())} of {len(fractions)} accepted tiles have artefacts or places "
        f"without image, {100 * fractions.sum() / max(len(fractions), 1):.2g} % of all their "
        "pixels; losses and metrics ignore them."
    )


def _counts(tiles: Any, by: str) -> str:
    """Return a table of tiles and cases per data set, score and a third column."""
    found = tiles.groupby(["dataset", "score", by]).agg(
        tiles=("tiles", "sum"), cases=("case", "nunique")
    )
    found = found.rename({"": "unknown"}, level="score").reset_index()
    header = ("data set", "score", by, "tiles", "cases")
    return _markdown(header, list(found.itertuples(index=False)))


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return "None."
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    lines.insert(1, f"|{'---|' * len(header)}")
    return "\n".join(lines)
