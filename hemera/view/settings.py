"""Values of options, written into a configuration file whose comments remain."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hemera.config import FilterOptions
from hemera.errors import ConfigError
from hemera.files.atomic import replacing
from hemera.graph.dry_run import effective_config
from hemera.view.decisions import Backups, locked


def save_filter(configfile: Path, options: FilterOptions, backups: Backups) -> Path | None:
    """Write the options of section filter that differ from the file's effective ones.

    Return the backup of the file, if one was made.

    Raises:
        ConfigError: when the new file would not have these options, or changes others; it is
            unchanged then.
    """
    path = configfile.resolve()
    with locked(path.parent):
        before = effective_config(path)
        old = before.options(FilterOptions)
        values = {
            name: value for name, value in options.model_dump(mode="json").items()
            if getattr(options, name) != getattr(old, name)
        }  # fmt: skip
        if not values:
            return None
        content = path.read_bytes()
        text = changed_section(content.decode(), "filter", values)
        with replacing(path) as temporary:
            temporary.write_bytes(text.encode())
            after = effective_config(temporary)
            expected = {**before.stages, "filter": options}
            if after.cohort != before.cohort or dict(after.stages) != expected:
                raise ConfigError(
                    f"{configfile}: its section filter cannot be changed by a program; write "
                    f"filter: {json.dumps(values)} into it"
                )
            copy = backups.keep(path, content)
        backups.wrote(path, text.encode())
    return copy


def changed_section(text: str, section: str, values: Mapping[str, Any]) -> str:
    """Return the text of a YAML file with other values of keys of a section."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("no keys in the configuration; begin with `preset: no_weights`")
    words = {name: json.dumps(value) for name, value in values.items()}
    lines = "".join(f"  {name}: {word}\n" for name, word in words.items())
    found = [(key, node) for key, node in root.value if key.value == section]
    if not found:
        return f"{text}{'' if text.endswith(chr(10)) else chr(10)}\n{section}:\n{lines}"
    key, node = found[0]
    if not isinstance(node, yaml.MappingNode):
        # Without a value: the keys follow in lines of their own.
        rest = text[key.end_mark.index :].partition("\n")
        line = rest[0].replace(text[node.start_mark.index : node.end_mark.index], "", 1)
        return f"{text[: key.end_mark.index]}{line}\n{lines}{rest[2]}"
    known = {own.value: value for own, value in node.value}
    for name in sorted(words.keys() & known, key=lambda name: -known[name].start_mark.index):
        start, end = known[name].start_mark.index, known[name].end_mark.index
        text = text[:start] + words[name] + text[end:]
    added = [f"{name}: {word}" for name, word in words.items() if name not in known]
    start = node.start_mark.index
    if node.flow_style:
        inside = ", ".join([*added, ""] if known else added)
        return text[: start + 1] + inside + text[start + 1 :]
    indent = "\n" + " " * node.start_mark.column
    return text[:start] + "".join(each + indent for each in added) + text[start:]
