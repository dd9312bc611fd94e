"""What the stage writes for right, wrong and impossible pairs, by engines with known results."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from hemera import tables
from hemera.__main__ import main
from hemera.config import RegisterOptions
from hemera.errors import InputFileError, RegistrationError, SheetError
from hemera.registration import deeperhistreg as engine
from hemera.registration.local_quality import LocalQuality
from hemera.stages import register
from tests.command_line import words
from tests.small_registration import (
    SMALL,
    describe_pair,
    error_um,
    given,
    in_turn,
    paths,
    run,
)
from tests.small_sections import MPP, to_moving
from tests.small_slides import damage_tile, write_pyramid

GOLDEN = "fd088124d64cf501a4c6d5e38cec1a9d4d4eeda71f7bc9086de5df74fe2a1383"


@pytest.fixture
def right(monkeypatch):
    """The engine finds the true map, every time."""
    monkeypatch.setattr(engine, "register", given(to_moving))


def test_a_right_map_passes_and_is_written_in_um(pairs, tmp_path, right):
    row, d = run(pairs, tmp_path, retries=2)
    assert (row["verdict"], row["reason"], row["map"]) == ("pass", None, "nonrigid")
    assert row["attempts"] == ["default_initial_nonrigid_fast at 338 px: pass"]
    assert row["match_count"] == 200
    assert row["tile_ok"] > 0.9
    assert row["displacement_mpp"] == d.mpp
    # Coarsening adds less than 0.1 px.
    assert error_um(d).max() < 0.1 * MPP
    names = {"plain.displacement.npz", "plain.parquet", "plain.quality.parquet"}
    assert {path.name for path in tmp_path.iterdir()} == names
    squares = tables.read(tmp_path / "plain.quality.parquet", tables.QUALITY).to_pandas()
    errors = LocalQuality.from_columns(squares).error_um
    assert row["error_median_um"] == pytest.approx(np.median(errors))
    assert row["tile_ok"] == pytest.approx((squares.ncc > squares.best_shifted_ncc).mean())


def test_a_wrong_map_fails_and_is_written_all_the_same(pairs, tmp_path, monkeypatch):
    in_turn(monkeypatch, given(lambda p: to_moving(p) + np.array([90, -70])))
    row, d = run(pairs, tmp_path)
    assert row["verdict"] == "fail"
    assert "tile_ok" in row["reason"]
    assert not d.empty


def test_a_reason_of_the_engine_is_a_verdict(pairs, tmp_path, monkeypatch):
    in_turn(monkeypatch, given(None, reason="DeeperHistReg failed (odd)"))
    row, d = run(pairs, tmp_path)
    assert (row["verdict"], row["map"]) == ("fail", "none")
    assert row["reason"] == "DeeperHistReg failed (odd)"
    assert d.empty
    assert row["tile_ok"] is None
    assert tables.read(tmp_path / "plain.quality.parquet", tables.QUALITY).num_rows == 0


def test_the_same_bytes_by_command_and_library(pairs, tmp_path, right):
    run(pairs, tmp_path / "library")
    assert main(["register", *words(paths(pairs, tmp_path / "command", "plain") | SMALL)]) == 0
    for path in (tmp_path / "library").iterdir():
        assert path.read_bytes() == (tmp_path / "command" / path.name).read_bytes()


def test_golden(pairs, tmp_path, right):
    """What HEMERA computes from a given engine's result, without times and machines."""
    row, d = run(pairs, tmp_path)
    del row["engine_version"]
    rounded = {
        name: round(value, 2) if isinstance(value, float) else value
        for name, value in row.items()
        if name != "rigid"
    }
    digest = hashlib.sha256(json.dumps(rounded, sort_keys=True).encode())
    digest.update(str(d.vectors_um.shape).encode())
    digest.update(np.rint(d.vectors_um).astype(np.int32).tobytes())
    assert {RegisterOptions.version: digest.hexdigest()} == {4: GOLDEN}


class TestBadInput:
    def test_images_that_cannot_be_registered_are_verdicts(self, pairs, pairs_copy, tmp_path):
        row, d = run(pairs, tmp_path, "broken")
        assert (row["verdict"], d.empty) == ("fail", True)
        assert "broken.png" in row["reason"]
        shutil.copy(pairs_copy / "coarse.png", pairs_copy / "her2.png")
        with pytest.raises(InputFileError, match=r"her2\.png: has changed since stage describe"):
            run(pairs_copy, tmp_path)
        (pairs_copy / "her2.png").unlink()
        with pytest.raises(InputFileError, match=r"her2\.png: no such file"):
            run(pairs_copy, tmp_path)

    def test_a_broken_tile_is_background(self, pairs_copy, tmp_path, right, caplog):
        image = np.asarray(Image.open(pairs_copy / "her2.png"))
        write_pyramid(pairs_copy / "her2.tif", [image], (MPP, MPP), compression="jpeg")
        # The lower right corner, where there is no tissue.
        damage_tile(pairs_copy / "her2.tif", -1)
        sheet = (pairs_copy / "pairs.tsv").read_text().replace("her2.png", "her2.tif")
        (pairs_copy / "pairs.tsv").write_text(sheet)
        describe_pair(pairs_copy, "plain")
        row, _ = run(pairs_copy, tmp_path)
        assert row["verdict"] == "pass"
        assert "px are treated as background" in caplog.text
        assert (given.moving[320:, 448:] >= 250).all()
        difference = given.moving[150:200, 150:200].astype(int) - image[150:200, 150:200]
        assert np.abs(difference).max() < 90

    def test_an_unknown_pair_is_an_error(self, pairs, tmp_path):
        named = paths(pairs, tmp_path, "plain") | {"unit": "another"}
        with pytest.raises(SheetError, match="no pair another"):
            register.run(**named, options=RegisterOptions())
        assert not list(tmp_path.iterdir())

    def test_an_engine_that_is_not_installed_is_an_error(self, pairs, tmp_path, monkeypatch):
        def missing(name):
            raise engine.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(engine.importlib.metadata, "version", missing)
        with pytest.raises(RegistrationError, match="not installed"):
            run(pairs, tmp_path)
