"""Working directories in which tests run Snakemake as a user would."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent

TINY: dict[str, Any] = {
    "preset": "demo",
    "sheet": "pairs.tsv",
    "allow_demo_sizes": True,
    "block_count": 2,
    "register": {"size_px": 512},
    "tile": {"size_px": 256},
    "train_generation": {
        "network": "unet_128",
        "base_width": 4,
        "discriminator_width": 4,
        "crop_px": 128,
        "epochs": 1,
        "decay_from_epoch": 1,
        "workers": 0,
    },
    "train_segmentation": {
        "base_width": 4,
        "crop_px": 128,
        "epochs": 1,
        "batch_size": 4,
        "workers": 0,
    },
    "evaluate": {"generators": ["hemera"]},
}

STATUS: dict[str, Any] = {
    **TINY,
    "sheet": "status.tsv",
    "block_count": 1,
    "cases": {"folds": 2},
    "train_encoder": {"base_width": 2, "hidden": 8, "epochs": 1},
    "aggregate": {"epochs": 2, "seeds": 1, "shuffles": 1},
    "evaluate_status": {"routes": ["floor", "oliveira", "virtual"], "bootstrap_samples": 100},
}
"""Target `status` with all of its stages."""


KILLER = """\
#!{python}
import os, signal, subprocess, sys, time
stage, moment, folder = {stage!r}, {moment!r}, {folder!r}
own = [{hemera!r}, *sys.argv[1:]]
mark = os.path.join(folder, "killed")
if sys.argv[1] != stage or os.path.exists(mark):
    os.execv(own[0], own)
open(mark, "w").close()
if moment == "before":
    os.kill(os.getpid(), signal.SIGKILL)
child = subprocess.Popen(own, start_new_session=True)
if moment == "after":
    child.wait()
else:
    # While it computes: most of its first second are imports.
    time.sleep(2.5)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def lay_out(folder: Path, config: Mapping[str, Any]) -> None:
    """Make a working directory of HEMERA with its own config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Snakefile", "workflow", "envs", "profiles"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "slurm").symlink_to("profiles/slurm")
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any], **changes: Mapping[str, Any]) -> None:
    values = dict(config)
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def snakemake(
    folder: Path, *words: str, check: bool = True, first_on_path: Path | None = None
) -> str:
    """Run Snakemake as a user would; return what it printed."""
    environment = dict(os.environ)
    found = [first_on_path, Path(sys.executable).parent, environment["PATH"]]
    environment["PATH"] = os.pathsep.join(str(path) for path in found if path)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check and done.returncode:
        pytest.fail(f"snakemake {' '.join(words)}:\n{done.stdout[-8000:]}")
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every result but the checkpoints, which have records of the time."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "results").rglob("*"))
        if path.is_file() and "checkpoints" not in path.parts
    }


def planned(folder: Path, *words: str) -> dict[str, int]:
    """Return how many jobs of each rule a dry run plans."""
    text = snakemake(folder, "-n", "--cores", "2", *words)
    counts = {
        rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)$", text, re.MULTILINE)
    }
    counts.pop("total", None)
    counts.pop("all", None)
    return counts


def killed_and_run_again(folder: Path, stage: str, moment: str, *target: str) -> None:
    """Run the workflow, kill a job of a stage, and run it again; nothing temporary is left."""
    shims = folder.parent / "shims"
    shims.mkdir()
    hemera = str(Path(sys.executable).parent / "hemera")
    text = KILLER.format(
        python=sys.executable, stage=stage, moment=moment, folder=str(folder.parent), hemera=hemera
    )
    (shims / "hemera").write_text(text)
    (shims / "hemera").chmod(0o755)
    text = snakemake(folder, "--cores", "2", *target, check=False, first_on_path=shims)
    assert (folder.parent / "killed").exists()
    assert "To continue, run the same command again" in text
    snakemake(folder, "--cores", "2", *target)
    assert planned(folder, *target) == {}
    # Snakemake itself marks folders that are outputs.
    left = {path.name for path in (folder / "results").rglob(".*")} - {".snakemake_timestamp"}
    assert left == set()
