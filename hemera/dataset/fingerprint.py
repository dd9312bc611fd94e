"""The fingerprint of a dataset: a digest of what its tiles are."""

import hashlib
import json
from collections.abc import Iterable, Sequence

import pyarrow as pa

FINGERPRINTED = (
    "tile", "case", "dataset", "split", "score", "x_px", "y_px", "her2_x_px", "her2_y_px",
    "size_px",
    "mpp", "he_mpp", "her2_mpp", "registration_error_um", "her2_coverage_fraction", "accepted",
    "reason", "generation_split", "segmentation_split", "he_sha256", "her2_sha256",
)  # fmt: skip
"""Identity, geometry, decision and the bytes of the members: no path, no version, no option."""


def fingerprint(table: pa.Table, engines: Sequence[str]) -> str:
    """Return the SHA-256 over all tiles: `fingerprint_of_parts` of the table sorted by id."""
    return fingerprint_of_parts([table.sort_by("tile")], engines)


def fingerprint_of_parts(parts: Iterable[pa.Table], engines: Sequence[str]) -> str:
    """Return the SHA-256 over all tiles, which are sorted by id: content, not location.

    The digest is of UTF-8 text, one JSON array and a line feed per line, as `json.dumps` writes
    them: first the names of the columns (FINGERPRINTED, then ``{engine}_sha256`` of each engine in
    the order given), then each tile's values in these columns.
    """
    names = [*FINGERPRINTED, *(f"{engine}_sha256" for engine in engines)]
    line = json.JSONEncoder().encode
    state = hashlib.sha256(f"{line(names)}\n".encode())
    for part in parts:
        for batch in part.select(names).to_batches(max_chunksize=65536):
            columns = [column.to_pylist() for column in batch.columns]
            state.update("".join(f"{line(row)}\n" for row in zip(*columns, strict=True)).encode())
    return state.hexdigest()
