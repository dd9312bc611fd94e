"""Section mask: options of engines are declared and checked by the engines."""

from typing import Any

import pytest

from hemera.config import MaskOptions, load
from hemera.config.base import flags, plain
from hemera.errors import ConfigError


def test_a_named_engine_runs_with_its_defaults_and_the_options_given() -> None:
    options = load({"mask": {"engines": {"stain": None, "deepliif": {"threshold": 90}}}}).stages[
        "mask"
    ]
    assert isinstance(options, MaskOptions)
    assert list(options.engines) == ["deepliif", "stain"], "in the order of the dictionary"
    assert plain(options)["engines"]["deepliif"]["threshold"] == 90
    assert flags(options) == ["--engines.deepliif.threshold", "90", "--engines.stain", "{}"]
    assert MaskOptions(engines=options.engines) == options
    assert options.resources() == {"memory_mb": 8000, "threads": 2, "gpu": 1}
    assert MaskOptions(engines={"stain": {}}).resources()["gpu"] == 0
    assert flags(MaskOptions()) == []


@pytest.mark.parametrize(
    ("engines", "fault"),
    [
        ({"stian": {}}, "stian: no such engine; did you mean stain?"),
        ({"deepliif": {"modle": "a"}}, "deepliif.modle: no such key; did you mean model?"),
        ({"deepliif": {"seg_weights": [0.2] * 4}}, "deepliif.seg_weights: 4 weights with sum 0.8"),
        ({"deepliif": {"seg_weights": [1] * 5}}, "deepliif.seg_weights: 5 weights with sum 5"),
        ({"stain": {"nucleus_area_min_um2": 700}}, "stain.nucleus_area_min_um2: 700.* lower it"),
        ({"stain": 5}, "stain: 5 is not a section"),
        (["stain"], " is not a section with one key per engine"),
        ({}, " is not a section with one key per engine"),
    ],
)
def test_faults_name_the_engine_and_the_key(engines: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"^mask\.engines\b.*{fault}"):
        MaskOptions(engines=engines)


def test_all_faults_of_all_engines_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"mask": {"engines": {"x": {}, "stain": {"a": 1, "b": 2}}}})
    assert len(str(caught.value).splitlines()) == 3


def test_missing_weights_are_requirements() -> None:
    (missing,) = MaskOptions().requirements()
    assert missing.startswith("mask.engines.deepliif.model: not given; ")
    assert MaskOptions(engines={"stain": {}}).requirements() == []
