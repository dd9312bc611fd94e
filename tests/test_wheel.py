"""The wheel as a user installs it: the core alone, and a study outside of the checkout."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.small_workflow import TINY

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path | None = None) -> str:
    # Nothing of the checkout: only what is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, ROOT)
    [path] = folder.glob("*.whl")
    return path


def install(folder: Path, requirement: str) -> Path:
    """Install into a new environment, with the versions of the lock; return its bin."""
    lock = (ROOT / "requirements.lock").read_text()
    versions = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?(==[^ ]+)", lock, re.MULTILINE)
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}{version}\n" for name, version in versions))
    uv = Path(sys.executable).with_name("uv")
    run(uv, "venv", "--quiet", "--python", sys.executable, folder / "venv")
    where = ["--python", folder / "venv" / "bin" / "python", "--constraints", constraints]
    run(uv, "pip", "install", "--quiet", "--system-certs", *where, requirement)
    return folder / "venv" / "bin"


def test_the_wheel_contains_the_weights_that_find_nuclei(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        weights = archive.getinfo("hemera/masks/stain/nuclei.safetensors")
    assert 1e5 < weights.file_size < 3e6


def test_the_core_reads_slides_without_the_extras(
    wheel: Path, cohort: Path, tmp_path: Path
) -> None:
    bin = install(tmp_path, str(wheel))
    packages = run(
        bin / "python",
        "-c",
        "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))",
    ).split()
    assert not {"torch", "snakemake", "deeperhistreg", "deepliif"} & set(packages)
    assert "hemera sheet" in run(bin / "hemera", "--help", cwd=tmp_path)
    code = (
        "import sys; from pathlib import Path; import hemera\n"
        "from hemera.imaging.slide import open_slide\n"
        "with open_slide(Path(sys.argv[1])) as slide:\n"
        "    print(slide.read(x_px=300, y_px=200, width=120, height=80, mpp=1.84).shape)"
    )
    slide = cohort / "acrobat" / "0_HE_train.tif"
    assert run(bin / "python", "-c", code, slide, cwd=tmp_path).strip() == "(80, 120, 3)"
    words = [bin / "hemera", "predict", slide, "--model", tmp_path]
    missing = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert missing.returncode == 1 and "Traceback" not in missing.stderr
    assert "pip install hemera[train]" in missing.stderr


def test_a_study_of_image_pairs_runs_outside_of_the_checkout(
    wheel: Path, cohort: Path, tmp_path: Path
) -> None:
    bin = install(tmp_path, f"hemera[train,workflow] @ {wheel.as_uri()}")
    (tmp_path / "bci").symlink_to(cohort / "bci")
    header, *rows = (cohort / "pairs.tsv").read_text().splitlines()
    sheet = tmp_path / "cohort.tsv"
    sheet.write_text("\n".join([header, *(row for row in rows if "\tbci\t" in row), ""]))
    study = tmp_path / "study"
    run(bin / "hemera", "new", "study", "--sheet", sheet, cwd=tmp_path)
    (study / "config.yaml").write_text(yaml.safe_dump(TINY))
    assert Path(run(bin / "hemera", "workflow", cwd=study).strip()).is_relative_to(tmp_path)
    command = f'export PATH="{bin}:$PATH"; snakemake --cores 2'
    run("bash", "-c", command, cwd=study)
    assert (study / "results" / "evaluate" / "evaluate.html").is_file()
    code = (
        "from hemera.dataset.torch_dataset import TileDataset\n"
        "tiles = TileDataset('results/index/index.parquet', images=('he', 'mask'))\n"
        "print(len(tiles), tuple(tiles[0]['he'].shape), tuple(tiles[0]['mask'].shape))"
    )
    count, *shape = run(bin / "python", "-c", code, cwd=study).split(maxsplit=1)
    assert int(count) > 0 and shape == ["(3, 256, 256) (1, 256, 256)\n"]
