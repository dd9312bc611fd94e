"""The reference of options, generated from their definitions when the documentation is built."""

from hemera.config import STAGES, CohortOptions
from hemera.config.base import keys, range_words


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Fill in the tables of options."""
    return markdown.replace("<!-- options -->", options())


def options() -> str:
    """Return one table per section of config.yaml, in Markdown."""
    parts = []
    sections = {"Top level": CohortOptions, **STAGES}
    for name, cls in sections.items():
        parts += [f"## {name}\n", f"{(cls.__doc__ or '').strip()}\n", *table(cls)]
        for nested_name, nested in cls.nested().items():
            parts += [f"### {name}.{nested_name}\n", f"{(nested.__doc__ or '').strip()}\n"]
            parts += table(nested)
    return "\n".join(parts)


def table(cls) -> list[str]:
    """Return the table of one class of options."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for key in keys(cls).values():
        valid = ", ".join(key.choices) or range_words(key.limits)
        notes = [key.help, f"Valid: {valid}." if valid else "", paper(key)]
        default = "per engine" if isinstance(key.default, dict) else f"`{key.default}`"
        text = " ".join(note for note in notes if note).replace("|", "\\|").replace("\n", " ")
        rows.append(f"| `{key.name}` | {default} | {text} |")
    return [*rows, ""]


def paper(key) -> str:
    """Return the paper's value as a note."""
    return f"Paper: {key.paper}." if key.paper else ""
