"""The package as a whole: light imports, shipped files, one name per stage, locked versions."""

import hashlib
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hemera
from hemera.config import STAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {"cv2", "matplotlib", "numpy", "pandas", "pyarrow", "scipy", "skimage", "torch"}


@pytest.mark.parametrize("modules", ["hemera", "hemera.config, hemera.sheet", "hemera.__main__"])
def test_what_the_rules_import_loads_nothing_heavy(modules: str) -> None:
    """Snakemake imports these whenever it parses the workflow."""
    code = f"import sys, {modules}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & HEAVY


def test_the_package_gives_its_names_on_first_use() -> None:
    code = "import sys, hemera; assert not {'pydantic', 'yaml'} & set(sys.modules);"
    code += "from hemera import *; print(Config, Sheet, read_sheet, __version__)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'Shet'"):
        hemera.Shet  # noqa: B018


@pytest.mark.parametrize("stage", STAGES)
def test_one_name_per_stage(stage: str) -> None:
    rules = (ROOT / "workflow" / "rules" / f"{stage}.smk").read_text()
    names = re.findall(r"^\s*rule (\w+):", rules, re.MULTILINE)
    assert names and all(name.startswith(stage) for name in names)
    assert STAGES[stage].section == stage
    assert callable(importlib.import_module(f"hemera.stages.{stage}").run)
    assert (ROOT / "tests" / "stages" / f"test_{stage}.py").is_file()
    assert re.search(rf"^{stage}:", (ROOT / "config.yaml").read_text(), re.MULTILINE)
    # No job state in rules, and every rule with its resources.
    assert not re.search(r"^\s+(run|script|notebook|wrapper):", rules, re.MULTILINE)
    assert all(rules.count(word) >= len(names) for word in ("mem_mb=", "runtime="))
    own = {"train_generation": "generator_flags", "aggregate": "method_flags"}
    own["train_encoder"] = "network_flags"
    flags = own.get(stage, f'CONFIG.flags("{stage}")')
    assert f"options={flags}" in rules and "{params.options}" in rules
    assert f'version=CONFIG.stages["{stage}"].version' in rules
    for word in ("log:", "benchmark:", "conda:", "threads:", "shell:"):
        assert len(re.findall(rf"^\s+{word}", rules, re.MULTILINE)) == len(names), word


def test_there_is_no_stage_without_options_and_rule() -> None:
    modules = {path.stem for path in (ROOT / "hemera" / "stages").glob("*.py")} - {"__init__"}
    rules = {path.stem for path in (ROOT / "workflow" / "rules").glob("*.smk")}
    assert modules == set(STAGES)
    assert rules == {*STAGES, "common", "demo"}


def locked() -> dict[str, list[str]]:
    """Hashes of every package of requirements.lock, by name."""
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)
    found = {}
    for entry in entries:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==", entry)
        if match:
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", entry)
            found[re.sub(r"[-_.]+", "-", match[1]).lower()] = hashes
    return found


def test_the_lock_holds_every_dependency_with_hashes() -> None:
    settings = PROJECT["project"]
    extras = settings["optional-dependencies"].values()
    wanted = [*settings["dependencies"], *(name for group in extras for name in group)]
    names = {re.split(r"[\[<>=!~; ]", name, maxsplit=1)[0].lower() for name in wanted}
    lock = locked()
    assert names - {"hemera"} <= set(lock), "run `make lock`"
    assert all(lock.values())
    excluded = PROJECT["tool"]["uv"]["exclude-dependencies"]
    assert not set(excluded) & set(lock)


def test_the_conda_environment_is_built_from_the_lock() -> None:
    script = (ROOT / "envs" / "hemera.post-deploy.sh").read_text()
    digest = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    assert re.findall(r"^LOCK_SHA256=(\w+)$", script, re.MULTILINE) == [digest], "run `make lock`"
    assert "--require-hashes -r requirements.lock" in script


def test_no_file_names_a_registry_or_a_folder_of_a_machine() -> None:
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "conda.anaconda" + ".org", "ghcr" + ".io")
    folder = re.compile(r"(?<![\w./-])/(home|root|work|Users)/\w")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("no git repository here")
    found = []
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path.suffix != ".png":
            text = path.read_text(errors="replace")
            found += [f"{name}: {host}" for host in hosts if host in text]
            found += [f"{name}: {match[0]}" for match in folder.finditer(text)]
    assert not found


def test_the_image_for_processors_leaves_out_cuda_alone():
    """The filter of the Dockerfile, run on the lock."""
    recipe = (ROOT / "Dockerfile").read_text()
    (program,) = re.findall(r"awk '(.*)' requirements\.lock", recipe)
    words = ["awk", program, str(ROOT / "requirements.lock")]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^([A-Za-z0-9_.-]+)==", re.MULTILINE)
    left_out = {*locked()} - {name.lower() for name in pattern.findall(text)}
    assert {"torch", "torchvision", "triton", "cuda-toolkit", "nvidia-cudnn-cu13"} <= left_out
    others = {"torch", "torchvision", "triton"}
    assert all(name in others or name.startswith(("nvidia-", "cuda-")) for name in left_out)
    for line in recipe.splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
