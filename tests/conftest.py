"""What all tests share: the real images, when they are given, and the small demo cohort."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from filelock import FileLock

from hemera.commands import text_table
from hemera.demo import status, write_cohort
from tests.small_workflow import STATUS, TINY, lay_out, snakemake

if TYPE_CHECKING:
    from tests.small_units import Unit


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--images", type=Path, default=None, help="folder of real images")


@pytest.fixture
def fault_seen(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """A function that adds a row to the table of `make test-faults`."""

    def seen(fault: str, behaviour: str, same: bool | None = None) -> None:
        """`same`: whether the rerun gave the bytes of an undisturbed run; None: not compared."""
        compared = {None: "-", True: "yes", False: "no"}[same]
        record_property("fault", (fault, " ".join(behaviour.split()), compared))

    return seen


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table of faults, where tests injected any."""
    rows = []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            if "fault" not in getattr(report, "keywords", {}):
                continue
            found = [value for name, value in report.user_properties if name == "fault"]
            survived = "yes" if outcome == "passed" else "no"
            if not found and outcome != "passed":
                found = [(report.nodeid.rpartition("::")[2], "see the failure", "-")]
            if report.when == "call" or outcome != "passed":
                rows += [(name, what[:150], survived, same) for name, what, same in found]
    if rows:
        header = ("fault", "behaviour", "survived", "same bytes after the rerun")
        terminalreporter.write_sep("=", "faults")
        terminalreporter.write(text_table(header, sorted(rows)))


@pytest.fixture(scope="session")
def images(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--images")
    if folder is None:
        pytest.skip("no real images; give their folder with --images")
    if not folder.is_dir():
        pytest.fail(f"--images: {folder} is not a folder")
    return folder.resolve()


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The small demo cohort, written once for all processes; do not write into it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "small_cohort"
    with FileLock(f"{folder}.lock"):
        if not (folder / "pairs.tsv").is_file():  # written last
            write_cohort(folder, "small", workers=1)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str, cohort: Path) -> Path:
    """A run of the small cohort to the end, made once for all processes; do not write into it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    with FileLock(f"{folder}.lock"):
        if not (folder / "finished").is_file():
            lay_out(folder, TINY)
            shutil.copytree(cohort, folder, dirs_exist_ok=True)
            snakemake(folder, "--cores", "2")
            (folder / "finished").touch()
    return folder


@pytest.fixture(scope="session")
def finished_status(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A run of target `status` of 16 cases, half of them of H&E alone, likewise."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished_status"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        if not (folder / "finished").is_file():
            lay_out(folder, STATUS)
            for name, value in {"CASES_PER_SCORE": 4, "SIDE_PX": 512, "WIDE_PX": 768}.items():
                patch.setattr(status, name, value)
            (folder / status.SHEET).write_text(status.sheet_text())
            for case in status.cases():
                status.write_images(folder, 20251, case)
            snakemake(folder, "--cores", "2", "status")
            (folder / "finished").touch()
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of small sections to register, described; do not write into their folder."""
    from tests.small_registration import write_pairs

    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def pairs_copy(pairs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pairs, tmp_path / "pairs")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251)


@pytest.fixture
def images_of_pair(
    rng: np.random.Generator, tmp_path: Path
) -> tuple[Path, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A folder with a pair that comes registered, and its two images."""
    from tests.small_units import write_pair

    return tmp_path, *write_pair(tmp_path, rng)


@pytest.fixture
def unit(images_of_pair: tuple[Path, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]) -> "Unit":
    """That pair as a unit of stage tile."""
    from tests.small_units import Unit, registered

    return Unit(images_of_pair[0], [registered("p1")])


@pytest.fixture
def slides(rng: np.random.Generator, tmp_path: Path) -> Path:
    """A folder with a pair of slides, its displacement and its certificate."""
    from tests.small_units import write_slides

    write_slides(tmp_path, rng)
    return tmp_path
