"""The synthetic cohort of the HER2 status."""

import collections
from pathlib import Path

import cv2
import numpy as np
import pytest

from hemera.demo import status, write_cohort
from hemera.errors import ConfigError, HemeraError
from hemera.sheet import read_sheet

ROOT = Path(__file__).parents[2]


def test_the_committed_sheet_is_that_of_the_demo():
    assert (ROOT / "demo" / status.SHEET).read_text() == status.sheet_text()


@pytest.mark.parametrize("variant", status.VARIANTS)
def test_the_sheet_is_valid_and_balanced(tmp_path, variant):
    (tmp_path / status.SHEET).write_text(status.sheet_text(variant))
    pairs = read_sheet(tmp_path / status.SHEET).pairs
    assert len(pairs) == 64 and sum(pair.her2 is not None for pair in pairs) == 24
    assert collections.Counter(pair.score for pair in pairs) == dict.fromkeys(status.SCORES, 16)
    # The status is given only where the score leaves it open.
    assert collections.Counter((pair.score, pair.status) for pair in pairs if pair.status) == {
        ("2+", "negative"): 8, ("2+", "positive"): 8,
    }  # fmt: skip
    cases = status.cases(variant)
    count = collections.Counter((case.status, case.site) for case in cases)
    if variant == "confounded":
        agreeing = count["positive", "north"] + count["negative", "south"]
        assert agreeing / 64 == pytest.approx(0.9, abs=0.02)
    else:
        assert dict(count) == {
            ("negative", "north"): 20, ("negative", "south"): 20,
            ("positive", "north"): 12, ("positive", "south"): 12,
        }  # fmt: skip
    # Neither size nor the HER2 image betrays the score.
    for attribute in ("size_px", "paired"):
        of_score = collections.Counter((getattr(case, attribute), case.score) for case in cases)
        assert len({value for (kind, _), value in of_score.items() if kind}) <= 2


def test_images_are_the_same_twice_and_of_their_size(tmp_path):
    case = next(case for case in status.cases() if case.paired and case.size_px[0] > 1024)
    for folder in ("a", "b"):
        status.write_images(tmp_path / folder, 20251, case)
    for name in (case.he, case.her2):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second
        image = cv2.imdecode(np.frombuffer(first, np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == (1024, 1536, 3)


def test_another_sheet_is_kept_and_an_unknown_variant_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="choose from signal, null, confounded"):
        write_cohort(tmp_path, "status", variant="none")
    (tmp_path / status.SHEET).write_text("mine")
    with pytest.raises(HemeraError, match="not a sheet of the demo, and kept"):
        write_cohort(tmp_path, "status")
