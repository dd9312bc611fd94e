"""Attempts at a registration, by engines whose results are known and by the real one."""

import cv2
import numpy as np
import pytest
from PIL import Image

from hemera import demo, tables
from hemera.config import RegisterOptions
from hemera.registration import attempts
from hemera.registration import deeperhistreg as engine
from hemera.registration import displacement as dp
from hemera.registration.displacement_files import write_displacement
from tests.small_registration import (
    SMALL,
    describe_pair,
    error_um,
    given,
    in_turn,
    made,
    run,
)
from tests.small_sections import FIXED_PX, MOVING_UM, MPP, sections, to_moving

FAST = "default_initial_nonrigid_fast"

WRONG = given(lambda p: to_moving(p) + 200.0)
MIRRORED = given(lambda p: p, matches=30, mirrored_matches=120, fraction=None)


class TestResult:
    def test_the_rigid_map_is_kept_where_the_nonrigid_one_is_worse(
        self, pairs, tmp_path, monkeypatch
    ):
        worse = given(lambda p: to_moving(p) + 60 * np.sin(p[..., ::-1] / 120), to_moving)
        in_turn(monkeypatch, worse)
        row, d = run(pairs, tmp_path)
        assert (row["verdict"], row["map"]) == ("review", "rigid")
        assert error_um(d).max() < 0.1 * MPP

    @pytest.mark.parametrize(
        ("rigid", "nonrigid", "kept"),
        [
            (0.8, 0.5, "rigid"),
            (0.8, 0.77, "rigid"),
            (0.8, 0.79, "nonrigid"),
            (0.5, 0.9, "nonrigid"),
            (0.5, None, "nonrigid"),
        ],
    )
    def test_the_nonrigid_map_may_be_worse_by_the_tolerance(
        self, pairs, tmp_path, monkeypatch, rigid, nonrigid, kept
    ):
        measure, values = attempts._measure, [rigid, nonrigid]

        def measured(*args):
            signals, local = measure(*args)
            return signals | {"tile_ok": values.pop(0)}, local

        monkeypatch.setattr(attempts, "_measure", measured)
        in_turn(monkeypatch, given(to_moving))
        assert run(pairs, tmp_path)[0]["map"] == kept

    def test_the_rigid_map_is_in_the_certificate(self, pairs, tmp_path, monkeypatch):
        matrix = np.array([[0.96, 0.1], [-0.12, 1.03]])
        in_turn(monkeypatch, given(to_moving, lambda p: p @ matrix.T + (31.0, -17.0)))
        row, _ = run(pairs, tmp_path)
        assert row["map"] == "nonrigid"
        assert row["rigid"] == pytest.approx([0.96, 0.1, 31.0, -0.12, 1.03, -17.0], abs=1e-3)

    def test_the_options_reach_the_engine(self, pairs, tmp_path, monkeypatch):
        in_turn(monkeypatch, given(to_moving))
        changes = {"torch_threads": 3, "levels": None, "lncc": (1.0, 1.0)}
        row, _ = run(pairs, tmp_path, **changes)
        assert given.options == RegisterOptions(**SMALL | changes)
        assert row["verdict"] != "pass"

    def test_what_a_killed_job_left_is_cleared(self, pairs, tmp_path, monkeypatch):
        in_turn(monkeypatch, given(to_moving))
        stale = tmp_path / ".plain.displacement.engine"
        stale.mkdir()
        (stale / "field.npy").write_text("of another run")
        assert run(pairs, tmp_path)[0]["verdict"] == "pass"
        assert not stale.exists()


class TestMirror:
    def test_a_declared_mirror_is_in_the_map(self, pairs, tmp_path, monkeypatch):
        in_turn(monkeypatch, *[given(to_moving)] * 2)
        row, d = run(pairs, tmp_path, "mirrored")
        # The engine was given the slide without the mirror.
        np.testing.assert_array_equal(given.moving, np.asarray(Image.open(pairs / "her2.png")))
        assert row["verdict"] == "pass"
        assert (row["mirrored"], row["mirrored_by"], row["mirror_probe"]) == (True, "sheet", 10.0)
        assert row["determinant"] < 0
        assert error_um(d, mirrored=True).max() < 0.1 * MPP
        row, _ = run(pairs, tmp_path, "plain")
        assert (row["mirrored"], row["mirrored_by"]) == (False, None)

    @pytest.mark.parametrize(
        ("unit", "mirrored", "verdict"),
        [("undeclared", True, "pass"), ("contradicted", False, "review")],
    )
    def test_an_orientation_against_the_sheet_is_found(
        self, pairs, tmp_path, monkeypatch, unit, mirrored, verdict
    ):
        calls = in_turn(monkeypatch, MIRRORED, given(to_moving, matches=120))
        row, d = run(pairs, tmp_path, unit)
        assert [call["probe"] for call in calls] == [True, False]
        assert row["verdict"] == verdict
        assert verdict == "pass" or "mirrored in the sheet" in row["reason"]
        assert (row["mirrored"], row["mirrored_by"]) == (mirrored, "probe")
        assert row["mirror_probe"] == 4.0
        assert error_um(d, mirrored).max() < 0.1 * MPP


class TestCanvas:
    def test_both_slides_are_read_at_one_resolution(self, pairs, tmp_path, monkeypatch):
        in_turn(monkeypatch, *[given(to_moving)] * 3)
        run(pairs, tmp_path)
        assert given.mpp == MPP
        assert given.fixed.shape[1::-1] == FIXED_PX
        # Never finer than either of the two.
        row, d = run(pairs, tmp_path, "coarse")
        assert given.mpp == 2 * MPP
        assert given.fixed.shape == (156, 210, 3)
        assert given.moving.shape == (169, 226, 3)
        assert error_um(d).max() < 0.15 * MPP
        assert row["verdict"] in ("pass", "review")
        # As coarse as the options require: the canvas is as large as the larger of the two.
        run(pairs, tmp_path, size_px=169)
        assert given.mpp == pytest.approx(2 * MPP)

    def test_gray_background_is_made_white(self, pairs, tmp_path, monkeypatch):
        in_turn(monkeypatch, given(to_moving))
        assert run(pairs, tmp_path, "gray")[0]["verdict"] == "pass"
        assert np.median(given.moving[:20]) >= 254

    def test_the_second_attempt_sees_tissue_alone(self, pairs_copy, tmp_path, monkeypatch):
        image = np.asarray(Image.open(pairs_copy / "her2.png")).copy()
        # A speck far from the tissue, which describe does not outline, and did not see.
        monkeypatch.setattr("hemera.stages.register.check_content", lambda *_: None)
        image[4:9, 4:9] = 30
        Image.fromarray(image).save(pairs_copy / "her2.png")
        in_turn(monkeypatch, given(lambda p: p + 200.0), given(to_moving))
        row, _ = run(pairs_copy, tmp_path, retries=1)
        assert row["verdict"] == "pass"
        assert (given.moving[:12, :12] == 255).all()
        np.testing.assert_array_equal(given.moving[150:190, 200:250], image[150:190, 200:250])


class TestAttempts:
    def test_what_fails_is_tried_again_another_way(self, pairs, tmp_path, monkeypatch):
        wrong = given(lambda p: to_moving(p) + 200.0, fraction=0.1)
        calls = in_turn(monkeypatch, wrong, wrong, given(to_moving))
        row, d = run(pairs, tmp_path, retries=2)
        assert (row["verdict"], row["preset"]) == ("pass", FAST)
        assert [call["thorough"] for call in calls] == [False, True, True]
        assert len(row["attempts"]) == 3
        assert "match_fraction 0.100, below 0.25" in row["attempts"][0]
        assert row["attempts"][1].startswith(f"{FAST} at 338 px, tissue alone: fail")
        words = f"{FAST} at 338 px, haematoxylin of the tissue alone: pass"
        assert row["attempts"][2] == words
        assert error_um(d).max() < 0.1 * MPP
        # The last one was of one stain: grey, darker where the nuclei are.
        assert (given.moving == given.moving[..., :1]).all()
        stained = np.asarray(Image.open(pairs / "her2.png"))[..., 0]
        nuclei = given.moving[..., 0] < 140
        assert nuclei.sum() > 500
        assert stained[nuclei].mean() < stained[~nuclei].mean() - 60

    def test_good_matches_are_not_made_again(self, pairs, tmp_path, monkeypatch):
        calls = in_turn(monkeypatch, given(to_moving))
        row, _ = run(pairs, tmp_path, retries=2, lncc=(1.0, 0.1))
        assert (row["verdict"], len(calls)) == ("review", 1)

    def test_the_best_attempt_is_kept(self, pairs, tmp_path, monkeypatch):
        in_turn(monkeypatch, given(to_moving, fraction=0.4), WRONG, WRONG)
        row, d = run(pairs, tmp_path, retries=2)
        assert row["verdict"] == "review"
        assert "match_fraction 0.400" in row["reason"]
        assert error_um(d).max() < 0.1 * MPP

    def test_a_later_attempt_starts_from_the_orientation_found(self, pairs, tmp_path, monkeypatch):
        calls = in_turn(monkeypatch, MIRRORED, WRONG, given(to_moving, matches=120))
        row, _ = run(pairs, tmp_path, "undeclared", retries=1)
        assert [call["probe"] for call in calls] == [True, False, True]
        assert (row["verdict"], row["mirrored_by"]) == ("pass", "probe")

    def test_low_coverage_is_not_tried_again(self, pairs_copy, tmp_path, monkeypatch):
        image = np.asarray(Image.open(pairs_copy / "her2.png"))
        Image.fromarray(np.ascontiguousarray(image[:, :140])).save(pairs_copy / "her2.png")
        describe_pair(pairs_copy, "plain")
        calls = in_turn(monkeypatch, given(to_moving))
        row, _ = run(pairs_copy, tmp_path, retries=2)
        assert row["verdict"] == "review"
        assert row["reason"].startswith("coverage_fraction")
        assert len(calls) == 1


class TestOwnDisplacement:
    """A displacement that was made elsewhere: no engine runs, and the certificate is the same."""

    @pytest.fixture
    def assess(self, pairs_copy, tmp_path, monkeypatch):
        monkeypatch.setattr(engine, "register", None)

        def assess(d):
            write_displacement(pairs_copy / "own.npz", d)
            return run(pairs_copy, tmp_path, "own")

        return assess

    def test_a_right_one_passes_without_matches(self, assess, tmp_path, monkeypatch):
        def missing(name):
            raise engine.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(engine.importlib.metadata, "version", missing)
        row, d = assess(made(to_moving, 8.0))
        assert (row["verdict"], row["reason"], row["map"]) == ("pass", None, "own")
        assert (row["engine"], row["preset"], row["match_fraction"]) == ("own", None, None)
        assert error_um(d).max() < 0.25 * MPP
        assert tables.read(tmp_path / "own.quality.parquet", tables.QUALITY).num_rows > 20

    def test_one_that_mirrors_is_judged_as_such(self, assess):
        row, _ = assess(made(lambda p: to_moving(p) * (-1, 1) + (MOVING_UM[0], 0)))
        assert row["mirrored"] is True
        assert row["verdict"] == "fail", "HER2 is not mirrored"
        assert row["folding_fraction"] == 0

    def test_one_that_cannot_be_read_or_is_empty_is_a_verdict(self, assess, pairs_copy, tmp_path):
        row, d = assess(dp.none())
        assert (row["verdict"], d.empty) == ("fail", True)
        (pairs_copy / "own.npz").write_bytes(b"nothing of the kind")
        row, d = run(pairs_copy, tmp_path, "own")
        assert (row["verdict"], d.empty) == ("fail", True)
        assert "own.npz" in row["reason"]


@pytest.mark.slow
class TestReal:
    """The real engine, from the files to the certificate."""

    def test_the_small_cohort_is_registered_to_its_truth(self, cohort, tmp_path):
        pair = next(
            line.split("\t")[0]
            for line in demo.sheet_text("small").splitlines()[1:]
            if "\tacrobat\t" in line
        )
        table = describe_pair(cohort, pair, tmp_path)
        row, d = run(cohort, tmp_path, pair, images_table=table)
        assert (row["verdict"], row["map"]) == ("pass", "nonrigid"), row["reason"]
        described = tables.read(table, tables.DESCRIBE).to_pylist()[0]
        y, x = np.nonzero(cv2.imdecode(np.frombuffer(described["tissue"], np.uint8), 0))
        at = (np.stack([x, y], axis=-1) + 0.5) * described["tissue_mpp"]
        goal = demo.load_truth(cohort, pair).field.to_moving(at)
        error = np.median(np.linalg.norm(dp.map_points(d, at) - goal, axis=1))
        initial = np.median(np.linalg.norm(at - goal, axis=1))
        assert error <= 2 * described["mpp"]
        assert error <= 0.01 * initial

    def test_an_undeclared_mirror_is_corrected(self, pairs, tmp_path):
        row, d = run(pairs, tmp_path, "undeclared")
        assert (row["verdict"], row["mirrored_by"]) == ("pass", "probe"), row["reason"]
        assert np.median(error_um(d, mirrored=True)) < MPP

    def test_other_tissue_fails(self, pairs_copy, tmp_path):
        Image.fromarray(sections(1, other_seed=2)[1]).save(pairs_copy / "her2.png")
        describe_pair(pairs_copy, "plain")
        row, _ = run(pairs_copy, tmp_path, levels=3, iterations=20)
        assert row["verdict"] == "fail", row
        assert "tile_ok" in row["reason"]

    def test_the_kidney_pair(self, images, tmp_path):
        birl = images / "registration" / "birl" / "rat-kidney_" / "scale-5pc"
        slides = images / "wsi_derived"
        (tmp_path / "pairs.tsv").write_text(
            "pair\tcase\tdataset\the\ther2\n"
            f"kidney\tkidney\tbirl\t{slides / '0_HE_val.tif'}\t{slides / '0_PANCK_val.tif'}\n"
        )
        describe_pair(tmp_path, "kidney")
        row, d = run(tmp_path, tmp_path, "kidney", size_px=None)
        assert row["verdict"] == "pass", row["reason"]
        he, ihc = (
            np.loadtxt(birl / f"Rat-Kidney_{name}.csv", delimiter=",", skiprows=1, usecols=(1, 2))
            for name in ("HE", "PanCytokeratin")
        )
        found = dp.map_points(d, he[: len(ihc)] * 4.6) / 4.6
        error_px = np.linalg.norm(found - ihc, axis=1)
        assert np.median(error_px) <= 5.6
        assert np.percentile(error_px, 90) <= 14
