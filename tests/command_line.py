"""Arguments of a library function as flags of the command line."""

from collections.abc import Mapping


def words(values: Mapping[str, object]) -> list[str]:
    """Return ``--name value`` for each argument; a tuple has many values."""
    found: list[str] = []
    for name, value in values.items():
        many = value if isinstance(value, tuple) else (value,)
        found += [f"--{name.replace('_', '-')}", *map(str, many)]
    return found
