"""Names of cases and pairs replaced by keyed hashes."""

import hashlib
import hmac
import secrets
from pathlib import Path

import pyarrow as pa

from hemera.errors import ConfigError

KEY_FILE = "anonymous.key"
KEY_BYTES = 32


class Names:
    """Hashes of names by the key of a study: equal names have equal hashes in all its exports."""

    def __init__(self, study: Path) -> None:
        """Read the key in the folder of a study, or write one that only its owner can read.

        Raises:
            ConfigError: when the file there is not a key.
        """
        path = study / KEY_FILE
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(KEY_BYTES) + "\n")
        try:
            self._key = bytes.fromhex(path.read_text())
        except ValueError:
            self._key = b""
        if len(self._key) != KEY_BYTES:
            raise ConfigError(
                f"{path}: not a key of {KEY_BYTES} bytes in hexadecimal; restore it, or remove it "
                "for a new one, with which names differ from those of earlier exports"
            )

    def of(self, kind: str, name: str) -> str:
        """Return the hash of a name, 16 hexadecimal digits of HMAC-SHA-256."""
        return hmac.new(self._key, f"{kind} {name}".encode(), hashlib.sha256).hexdigest()[:16]

    def replaced(self, rows: pa.Table) -> pa.Table:
        """Return rows of the index with hashes in the columns tile, pair and case, sorted by tile.

        A tile is named by the hash of its pair and its position.
        """
        pairs = rows["pair"].to_pylist()
        new = {name: self.of("pair", name) for name in {*pairs}}
        columns = {
            "case": [self.of("case", name) for name in rows["case"].to_pylist()],
            "pair": [new[name] for name in pairs],
            "tile": [
                new[pair] + tile.removeprefix(pair)
                for tile, pair in zip(rows["tile"].to_pylist(), pairs, strict=True)
            ],
        }
        for name, values in columns.items():
            if name in rows.column_names:
                rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
        return rows.sort_by("tile")
