"""Reasons of jobs, from texts as Snakemake writes them."""

import pytest

from hemera.config import STAGES
from hemera.config.base import flags
from hemera.graph.reasons import changed_options, reasons

PARAMS = (
    "Params have changed since last execution: "
    "Union of exclusive params before and now across all output: "
)
PRODUCERS = {"results/tile/p1.tar": "tile", "results/mask/p1.tar": "mask"}


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Missing output files: results/tile/p1.tar", ["missing: results/tile/p1.tar"]),
        ("Missing output files: b.tar, a.tar", ["missing: a.tar and 1 more"]),
        ("Updated input files: img/1.tif", ["newer: img/1.tif"]),
        (
            "Input files updated by another job: results/mask/p1.tar, results/tile/p1.tar",
            ["follows mask, tile"],
        ),
        (
            "Set of input files has changed since last execution; Code has changed since last "
            "execution",
            ["other input files", "another command in the workflow"],
        ),
        (
            f"{PARAMS}before: '' now: '--dust-max 0.2' ",
            ["filter.dust_max: 0.1 -> 0.2"],
        ),
        (f"{PARAMS}before: 8 now: 9 ", ["version of filter: 8 -> 9"]),
        (
            f"{PARAMS}before: '0123456789abcdef',8 now: 9,'fedcba9876543210' ",
            ["rows of the sheet", "version of filter: 8 -> 9"],
        ),
        (
            f"{PARAMS}before: ['stain'] now: ['stain', 'deepliif'] ; Code has changed since last "
            "execution",
            [
                "parameters: ['stain'] -> ['stain', 'deepliif']",
                "another command in the workflow",
            ],
        ),
        (f"{PARAMS}before: <nothing exclusive> now: 'x' ", ["parameters: none -> x"]),
        ("A reason of another version", ["A reason of another version"]),
    ],
)
def test_reasons_in_words(reason: str, words: list[str]) -> None:
    default = STAGES["filter"]().model_dump()["dust_max"]
    found = reasons("filter", reason, PRODUCERS)
    assert found == [text.replace("dust_max: 0.1", f"dust_max: {default}") for text in words]


def test_quotes_and_separators_inside_values() -> None:
    reason = f"""{PARAMS}before: "--weights 'a, b now: c'" now: '--weights x' """
    assert reasons("unknown_rule", reason, {}) == [
        "parameters: --weights 'a, b now: c' -> --weights x"
    ]


def test_an_option_that_returns_to_its_default() -> None:
    cls = STAGES["mask"]
    before = "--engines.stain.nucleus-dab 0.2 --engines.stain '{}'"
    (line,) = changed_options(cls, before, "--engines.stain '{}'")
    default = cls.nested()["engines.stain"]().model_dump()["nucleus_dab"]
    assert line == f"mask.engines.stain.nucleus_dab: 0.2 -> {default}"


@pytest.mark.parametrize("stage", STAGES)
def test_flags_that_options_write_are_read_back(stage: str) -> None:
    """For every option with a default, another value is found under its own name."""
    cls = STAGES[stage]
    base = cls()
    for name, value in base.model_dump().items():
        if isinstance(value, bool):
            other = base.model_copy(update={name: not value})
        elif isinstance(value, float):
            other = base.model_copy(update={name: -value - 1})
        elif isinstance(value, tuple):
            other = base.model_copy(update={name: (*value, *value, "x")})
        else:
            continue
        (line,) = changed_options(cls, "", " ".join(flags(other)))
        assert line.startswith(f"{stage}.{name}: ")
        assert line != f"{stage}.{name}: none -> none"
