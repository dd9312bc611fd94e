"""From images to a decision in a browser: new, run, view, with the real workflow and Chromium."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hemera import tables
from hemera.config import FilterOptions, load_file
from hemera.imaging.codecs import decode
from hemera.sheet import read_sheet, write_rows
from hemera.stages import filter
from tests.small_workflow import TINY

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
SLIDE = "slide"


def hemera(folder: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hemera", *words], cwd=folder, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def study(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a pair of slides and of four registered pairs of images, run up to the report."""
    folder = tmp_path_factory.mktemp("browser")
    pairs = read_sheet(cohort / "pairs.tsv").pairs
    slide = next(pair for pair in pairs if pair.dataset == "acrobat")
    images = [pair for pair in pairs if pair.dataset == "bci"][:4]
    rows = [
        {
            "pair": SLIDE if pair is slide else pair.pair,
            "case": pair.case,
            "dataset": pair.dataset,
            "score": pair.score,
            "registered": str(pair is not slide).lower(),
            "he": str(pair.he),
            "her2": str(pair.her2),
            "he_mpp": str(pair.he_mpp or ""),
            "her2_mpp": str(pair.her2_mpp or ""),
        }
        for pair in (slide, *images)
    ]
    (folder / "cohort.tsv").write_text(write_rows(rows))
    hemera(folder, "new", "study", "--sheet", "cohort.tsv")
    (folder / "study/config.yaml").write_text(yaml.safe_dump(TINY))
    hemera(folder / "study", "run", "data", "--cores", "2")
    return folder / "study"


@pytest.fixture
def address(study: Path) -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-m", "hemera", "view", str(study), "data", "--no-browser"],
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            found = re.search(r"http://\S+/", process.stderr.readline())
            assert found
            yield found[0]
        finally:
            process.terminate()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """The page in a window of 1280 x 800 px; it may only speak with its server, without errors."""
    faults: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = browser.new_page(viewport={"width": 1280, "height": 800})
        found.on("pageerror", lambda error: faults.append(str(error)))
        found.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        found.on(
            "request",
            lambda sent: (
                None
                if sent.url.startswith((address, "data:", "blob:"))
                else faults.append(f"request of {sent.url}")
            ),
        )
        yield found
        browser.close()
    assert not faults


def until(page: Any, condition: str) -> None:
    """Wait until a condition in JavaScript is true; the page forbids the loop of Playwright."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"never: {condition}")


def mean_color(page: Any) -> np.ndarray:
    """Return the mean colour of what is drawn."""
    return np.array(
        page.evaluate("""() => {
            const canvas = viewers[0].drawer.canvas;
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            const sums = [0, 0, 0, 0];
            for (let k = 0; k < data.length; k += 4) {
                if (!data[k + 3]) continue;
                for (let c = 0; c < 3; c += 1) sums[c] += data[k + c];
                sums[3] += 1;
            }
            return sums.slice(0, 3).map((sum) => sum / sums[3]);
        }""")
    )


def test_pairs_and_tiles(study: Path, address: str, page: Any) -> None:
    before = (study / "pairs.tsv").read_text()
    page.goto(f"{address}#{SLIDE}")
    page.wait_for_selector(f"body[data-drawn={SLIDE}]")
    until(page, "[0, 1].every((k) => viewers[0].world.getItemAt(k).getFullyLoaded())")
    # Swiped to one side, the view has the colours of H&E, to the other those of HER2.
    version = json.loads(urllib.request.urlopen(f"{address}api/pair/{SLIDE}").read())["version"]
    means = {}
    for stain, key in (("her2", "["), ("he", "]")):
        for _ in range(20):
            page.keyboard.press(key)
        page.wait_for_timeout(500)
        tile = f"{address}tile/{SLIDE}/{stain}/0/0/0?v={version}"
        means[stain] = decode(urllib.request.urlopen(tile).read()).mean(axis=(0, 1))
        assert np.abs(mean_color(page) - means[stain]).max() < 3
    assert np.abs(means["he"] - means["her2"]).max() > 10
    # Refused by a key: the sheet has it, and the plan is this pair's tiles and what follows.
    until(page, "document.querySelector('#plan').innerText.startsWith('Nothing')")
    page.fill("#reason", "other section")
    page.locator("#reason").blur()
    page.keyboard.press("r")
    until(page, "document.querySelector('#plan table') !== null")
    pair = read_sheet(study / "pairs.tsv").pair(SLIDE)
    assert (pair.verdict, pair.verdict_reason) == ("refuse", "other section")
    (backup,) = study.glob("pairs.tsv.*.bak")
    assert backup.read_text() == before
    rows = page.locator("#plan .stage-row").all()
    cells = [row.locator("td").all_inner_texts()[:2] for row in rows]
    assert cells == [
        ["tile", SLIDE], ["mask", SLIDE], ["filter", "1 job"], ["index", "1 job"],
        ["report", "1 job"],
    ]  # fmt: skip
    page.keyboard.press("u")
    until(page, "document.querySelector('#plan').innerText.startsWith('Nothing')")
    assert read_sheet(study / "pairs.tsv").pair(SLIDE).verdict == ""


def test_a_moved_limit(study: Path, address: str, page: Any) -> None:
    page.goto(f"{address}tiles.html")
    page.wait_for_selector("body[data-loaded]")
    first = page.locator("body").get_attribute("data-updated")
    options = load_file(study / "config.yaml").options(FilterOptions)
    sharpness = tables.read(study / "results/filter/tiles.parquet", tables.TILE).to_pandas()
    limit = float(sharpness["he_sharpness"].quantile(0.6).round(2))
    page.fill("#he_sharpness_min", str(limit))
    page.keyboard.press("Tab")
    until(page, f"document.body.dataset.updated !== '{first}'")
    shown = {
        row.get_attribute("data-reason"): int(row.get_attribute("data-tiles"))
        for row in page.locator("#funnel tr[data-reason]").all()
    }
    moved = options.replace(he_sharpness_min=limit)
    filter.run(
        sheet=study / "pairs.tsv", block_count=TINY["block_count"], results=study / "results",
        engines=("stain",), tiles=study / "again.parquet", options=moved,
    )  # fmt: skip
    truth = tables.read(study / "again.parquet", tables.filtered(("stain",))).to_pandas()
    assert shown == dict(truth["reason"].value_counts()) and shown["blurred_he"] > 0
    page.click("#save")
    until(page, "document.querySelector('#plan table') !== null")
    assert load_file(study / "config.yaml").options(FilterOptions) == moved
    stages = [
        row.locator("td").all_inner_texts()[0] for row in page.locator("#plan .stage-row").all()
    ]
    assert stages == ["filter", "index", "report"]


@pytest.mark.parametrize("width", [400, 900, 3840])
def test_no_page_is_wider_than_its_window(address: str, page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for name, ready in (
        ("index.html", "body[data-opened]"),
        ("tiles.html", "body[data-loaded]"),
        ("cohort.html", "body[data-loaded]"),
    ):
        page.goto(f"{address}{name}")
        page.wait_for_selector(ready)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
