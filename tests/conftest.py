"""What all tests share: the real images, when they are at hand, and the small demo cohort."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--images", type=Path, default=None, help="folder of real images")


@pytest.fixture(scope="session")
def images(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--images")
    if folder is None:
        pytest.skip("real images are not at hand; give their folder with --images")
    if not folder.is_dir():
        pytest.fail(f"--images: {folder} is no folder")
    return folder.resolve()
