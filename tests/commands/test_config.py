"""hemera config: what is in force, and a config.yaml in which every option is explained."""

import json
import re
from pathlib import Path

import pytest
import yaml

from hemera.__main__ import main
from hemera.commands import config
from hemera.config import PRESETS, STAGES, CohortOptions, load
from hemera.config.base import keys

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


def test_what_is_printed_is_a_config_of_the_same_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "preset: demo\nblock_count: 3\ntrain_generation: {learning_rate: 3e-4}\n"
        "filter: {histogram_datasets: []}\ntile: {mpp: 0.5}\n"
    )
    assert main(["config", "--configfile", str(path)]) == 0
    printed = capsys.readouterr().out
    given, values = yaml.safe_load(path.read_text()), yaml.safe_load(printed)
    assert load(values) == load(given)
    assert values["train_generation"]["learning_rate"] == 3e-4
    assert values["filter"]["histogram_datasets"] == []
    assert list(values["mask"]["engines"]) == ["stain"], "what the preset changes is in force"
    for name, cls in STAGES.items():
        assert list(values[name]) == list(cls.model_fields)


@pytest.mark.parametrize("preset", NAMES)
def test_the_template_has_the_effect_of_its_preset(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--template", preset]) == 0
    text = capsys.readouterr().out
    assert text == config.explained(preset)
    assert load(yaml.safe_load(text)) == load({"preset": preset})


@pytest.mark.parametrize("preset", NAMES)
def test_every_option_stands_in_the_template_with_its_help(preset: str) -> None:
    text = config.explained(preset)
    joined = " ".join(re.sub(r"\n\s*#?", " ", text).split())
    for cls in (CohortOptions, *STAGES.values()):
        for field in keys(cls).values():
            assert re.search(rf"^\s*(# ?)?{field.name}:", text, re.MULTILINE), field.name
            if field.name != "preset":
                help = " ".join(field.help.split())
                assert help in joined, f"{cls.section}.{field.name}"
            if field.paper:
                assert " ".join(field.paper.split()) in joined


def test_an_unknown_preset(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["config", "--template", "paper"]) == 1
    assert "--template paper: unknown; choose from asp, demo, hemera, " in caplog.text


def test_only_the_demo_needs_no_sheet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: no_weights\n")
    assert main(["config", "--configfile", str(path)]) == 1
    assert "sheet: not set, and preset is no_weights; set sheet: to your sheet" in caplog.text
    path.write_text("preset: no_weights\nsheet: pairs.tsv\n")
    assert main(["config", "--configfile", str(path)]) == 0


def test_a_missing_or_faulty_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["config", "--configfile", str(tmp_path / "no.yaml")]) == 1
    assert "No such file or directory; work in the folder of a study" in caplog.text
    caplog.clear()
    (tmp_path / "two.yaml").write_text("tile: {size_px: 1}\nfiter: {}\n")
    assert main(["config", "--configfile", str(tmp_path / "two.yaml")]) == 1
    assert len(caplog.records) == 2
    for text in ("sheet: 2020-13-45\n", f"block_count: {'9' * 6000}\n"):
        caplog.clear()
        (tmp_path / "value.yaml").write_text(text)
        assert main(["config", "--configfile", str(tmp_path / "value.yaml")]) == 1
        assert "value.yaml: a value that YAML cannot convert" in caplog.text


def test_the_schema_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "$ref" not in json.dumps(schema)
    sections = {name: schema["properties"][name] for name in STAGES}
    for name, cls in STAGES.items():
        assert set(sections[name]["properties"]) == set(cls.model_fields)
    assert sections["tile"]["properties"]["size_px"]["maximum"] == 4096
    engines = sections["mask"]["properties"]["engines"]["properties"]
    assert engines["stain"]["properties"]["nucleus_edge"]["description"]
