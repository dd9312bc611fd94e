"""What the stage writes for right, wrong and impossible pairs, by a given and the real engine."""

import hashlib
import json
import shutil

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from hemera import demo, tables
from hemera.__main__ import main
from hemera.config import DescribeOptions, RegisterOptions
from hemera.config.base import flags
from hemera.errors import ConfigError, RegistrationError, SheetError
from hemera.registration import deeperhistreg as engine
from hemera.registration import displacement as dp
from hemera.registration.displacement_files import read_displacement, write_displacement
from hemera.stages import describe, register
from tests.small_sections import FIXED_PX, FIXED_UM, MOVING_PX, MOVING_UM, MPP, sections, to_moving

COLUMNS = (
    "pair",
    "case",
    "dataset",
    "he",
    "her2",
    "mirrored",
    "he_mpp",
    "her2_mpp",
    "displacement",
)

FAST = RegisterOptions(
    preset="default_initial_nonrigid_fast",
    size_px=512,
    levels=5,
    iterations=60,
    device="cpu",
    retries=0,
)
"""Small enough for tests."""

GOLDEN = "f363050a8936ee902adb7be82caa55505993ad3eeecf90486796799d977e7a2b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sheet of one pair as it is, mirrored and declared so, and with files that are no use."""
    folder = tmp_path_factory.mktemp("pairs")
    fixed, moving = sections()
    images = {"he": fixed, "her2": moving, "mirrored": moving[:, ::-1]}
    images["gray"] = np.clip(moving * 0.86, 0, 255).astype(np.uint8)
    # The same section at half its resolution in another file.
    images["coarse"] = cv2.resize(moving, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    for name, image in images.items():
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "her2.png").read_bytes()[:2000])
    rows = [
        ("plain", "her2", "", MPP),
        ("mirrored", "mirrored", "true", MPP),
        ("undeclared", "mirrored", "", MPP),
        ("contradicted", "her2", "true", MPP),
        ("gray", "gray", "", MPP),
        ("coarse", "coarse", "", 2 * MPP),
        ("broken", "broken", "", MPP),
        ("own", "her2", "", MPP),
    ]
    lines = ["\t".join(COLUMNS)]
    for pair, her2, mirrored, mpp in rows:
        own = "own.npz" if pair == "own" else ""
        cells = (pair, "case1", "own", "he.png", f"{her2}.png", mirrored, str(MPP), str(mpp), own)
        lines.append("\t".join(cells))
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    for pair, *_ in rows:
        describe.run(
            sheet=folder / "pairs.tsv",
            unit=pair,
            block_count=1,
            images_table=folder / f"{pair}.describe.parquet",
            options=DescribeOptions(),
        )
    return folder


def paths(folder, out, unit):
    return {
        "sheet": folder / "pairs.tsv",
        "unit": unit,
        "images_table": folder / f"{unit}.describe.parquet",
        "displacement": out / f"{unit}.displacement.npz",
        "certificate": out / f"{unit}.parquet",
        "quality": out / f"{unit}.quality.parquet",
    }


def run(folder, out, unit="plain", options=FAST):
    named = paths(folder, out, unit)
    register.run(**named, options=options)
    rows = tables.read(named["certificate"], tables.CERTIFICATE).to_pylist()
    assert len(rows) == 1
    return rows[0], read_displacement(named["displacement"])


def given(nonrigid, rigid=None, matches=200, fraction=0.9, reason=None, mirrored_matches=20):
    """Stand in for the engine: its result is known, and what it was handed is looked at."""

    def found(fixed, moving, *, fixed_mpp, moving_mpp, settings, folder):
        given.fixed, given.moving, given.settings = fixed, moving, settings
        given.mpps = fixed_mpp, moving_mpp
        (folder / "left behind").write_text("by the engine")
        if reason:
            return engine.Outcome(None, None, None, None, None, reason, "the log")
        grid = dp.identity(*FIXED_UM, fixed_mpp)
        nodes = dp.node_points(grid)
        maps = [
            dp.Displacement((function(nodes) - nodes).astype(np.float32), fixed_mpp)
            for function in (nonrigid, rigid or nonrigid)
        ]
        other = mirrored_matches if settings.probe else None
        return engine.Outcome(*maps, matches, other, fraction, None, "the log")

    return found


def in_turn(monkeypatch, *engines):
    """Stand in for the engine by one after the other; return what each was given."""
    calls = []

    def register(fixed, moving, **more):
        result = engines[len(calls)](fixed, moving, **more)
        calls.append(more["settings"])
        return result

    monkeypatch.setattr(engine, "register", register)
    return calls


@pytest.fixture
def engine_gives(monkeypatch):
    return lambda *values, **more: monkeypatch.setattr(engine, "register", given(*values, **more))


def points():
    rng = np.random.default_rng(8)
    return rng.uniform(0.05, 0.95, (300, 2)) * FIXED_UM


class TestGivenResult:
    def test_a_right_map_passes_and_is_written_in_um(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving)
        row, d = run(folder, tmp_path)
        assert (row["verdict"], row["reason"], row["map"]) == ("pass", None, "nonrigid")
        assert row["match_count"] == 200
        assert row["tile_ok"] > 0.9
        assert row["displacement_mpp"] == d.mpp
        # Less than 0.1 px is added to the engine's field.
        error = np.linalg.norm(dp.map_points(d, points()) - to_moving(points()), axis=1)
        assert error.max() < 0.1 * MPP
        assert {path.name for path in tmp_path.iterdir()} == {
            "plain.displacement.npz",
            "plain.parquet",
            "plain.quality.parquet",
        }

    def test_a_wrong_map_fails_and_is_written_for_a_person_to_see(
        self, folder, tmp_path, engine_gives
    ):
        engine_gives(lambda p: to_moving(p) + np.array([90, -70]))
        row, d = run(folder, tmp_path)
        assert row["verdict"] == "fail"
        assert "tile_ok" in row["reason"]
        assert not d.empty

    def test_the_identity_of_no_match_fails(self, folder, tmp_path, engine_gives):
        engine_gives(lambda p: p, matches=0, fraction=None)
        row, _ = run(folder, tmp_path)
        assert row["verdict"] == "fail"
        assert "returned the identity" in row["reason"]
        # Even where the slides lie right as they are.
        engine_gives(to_moving, matches=0, fraction=None)
        assert run(folder, tmp_path)[0]["verdict"] == "fail"

    def test_the_rigid_map_is_kept_where_the_nonrigid_one_is_worse(
        self, folder, tmp_path, engine_gives
    ):
        def worse(p):
            return to_moving(p) + 60 * np.sin(p[..., ::-1] / 120)

        engine_gives(worse, to_moving)
        row, d = run(folder, tmp_path)
        assert (row["verdict"], row["map"]) == ("review", "rigid")
        assert np.abs(dp.map_points(d, points()) - to_moving(points())).max() < 0.1 * MPP

    def test_a_reason_of_the_engine_is_a_verdict(self, folder, tmp_path, engine_gives):
        engine_gives(None, reason="DeeperHistReg was ended by SIGKILL")
        row, d = run(folder, tmp_path)
        assert (row["verdict"], row["map"]) == ("fail", "none")
        assert row["reason"] == "DeeperHistReg was ended by SIGKILL"
        assert d.empty
        assert row["tile_ok"] is None

    def test_a_declared_mirror_is_in_the_map(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving)
        row, d = run(folder, tmp_path, "mirrored")
        # The engine was shown the slide as it would be without the mirror.
        np.testing.assert_array_equal(given.moving, np.asarray(Image.open(folder / "her2.png")))
        assert row["verdict"] == "pass"
        assert row["determinant"] < 0
        expected = to_moving(points()) * (-1, 1) + (MOVING_UM[0], 0)
        assert np.abs(dp.map_points(d, points()) - expected).max() < 0.1 * MPP

    def test_both_slides_are_read_at_one_resolution(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving)
        run(folder, tmp_path)
        assert given.mpps == (MPP, MPP)
        assert given.fixed.shape[1::-1] == FIXED_PX
        # Never finer than either of the two.
        row, d = run(folder, tmp_path, "coarse")
        assert given.mpps == (2 * MPP, 2 * MPP)
        assert given.fixed.shape == (156, 210, 3)
        assert given.moving.shape == (169, 226, 3)
        assert np.abs(dp.map_points(d, points()) - to_moving(points())).max() < 0.1 * MPP
        # As coarse as is asked for: the canvas is as large as the larger of the two.
        run(folder, tmp_path, options=FAST.replace(size_px=169))
        assert given.mpps == pytest.approx((2 * MPP, 2 * MPP))
        assert row["verdict"] in ("pass", "review")

    def test_gray_glass_is_made_white(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving)
        row, _ = run(folder, tmp_path, "gray")
        assert np.median(given.moving[:20]) >= 254
        assert row["verdict"] == "pass"

    def test_the_options_reach_the_engine(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving)
        options = FAST.replace(torch_threads=3, timeout_s=77, levels=None)
        run(folder, tmp_path, options=options)
        assert given.settings == engine.Settings(
            preset=FAST.preset, levels=None, iterations=60, device="cpu", torch_threads=3,
            timeout_s=77, match_fraction_min=FAST.match_fraction_fail,
        )  # fmt: skip
        tight = FAST.replace(tile_ok_pass=1.0, tile_ok_fail=1.0, lncc_pass=1.0)
        assert run(folder, tmp_path, options=tight)[0]["verdict"] != "pass"

    def test_the_same_bytes_by_command_and_library(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving)
        run(folder, tmp_path / "library")
        words = ["register"]
        for name, value in paths(folder, tmp_path / "command", "plain").items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        assert main([*words, *flags(FAST)]) == 0
        for name in ("plain.parquet", "plain.quality.parquet", "plain.displacement.npz"):
            assert (tmp_path / "library" / name).read_bytes() == (
                tmp_path / "command" / name
            ).read_bytes()

    def test_what_a_killed_job_left_is_cleared(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving)
        stale = tmp_path / ".plain.displacement.engine"
        stale.mkdir()
        (stale / "field.npy").write_text("of another run")
        assert run(folder, tmp_path)[0]["verdict"] == "pass"
        assert not stale.exists()

    def test_golden(self, folder, tmp_path, engine_gives):
        """What HEMERA computes from a given engine's result, without times and machines."""
        engine_gives(to_moving)
        row, d = run(folder, tmp_path)
        del row["engine_version"]
        rounded = {
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in row.items()
            if name != "rigid"
        }
        digest = hashlib.sha256(json.dumps(rounded, sort_keys=True).encode())
        digest.update(str(d.vectors_um.shape).encode())
        digest.update(np.rint(d.vectors_um).astype(np.int32).tobytes())
        assert {RegisterOptions.version: digest.hexdigest()} == {2: GOLDEN}


class TestQuality:
    def test_it_shows_where_the_map_is_off_and_by_how_much(self, folder, tmp_path, engine_gives):
        def partly(p):
            return to_moving(p + np.where(p[..., :1] > FIXED_UM[0] / 2, (40.0, 16.0), 0.0))

        engine_gives(partly)
        row, _ = run(folder, tmp_path)
        squares = tables.read(tmp_path / "plain.quality.parquet", tables.QUALITY).to_pandas()
        assert (squares.pair == "plain").all()
        right = squares[squares.x_um > FIXED_UM[0] / 2 + squares.side_um]
        left = squares[squares.x_um < FIXED_UM[0] / 2 - squares.side_um]
        assert min(len(left), len(right)) > 10
        assert right.residual_x_um.median() == pytest.approx(-40, abs=MPP)
        assert right.residual_y_um.median() == pytest.approx(-16, abs=MPP)
        assert left.residual_x_um.abs().median() < MPP
        lengths = np.hypot(squares.residual_x_um, squares.residual_y_um)
        assert row["error_median_um"] == pytest.approx(lengths.median())
        assert row["tile_ok"] == pytest.approx((squares.ncc > squares.best_shifted_ncc).mean())

    def test_without_a_map_it_has_no_rows(self, folder, tmp_path, engine_gives):
        engine_gives(None, reason="ended")
        run(folder, tmp_path)
        assert tables.read(tmp_path / "plain.quality.parquet", tables.QUALITY).num_rows == 0

    def test_the_rigid_map_is_in_the_certificate(self, folder, tmp_path, engine_gives):
        matrix = np.array([[0.96, 0.1], [-0.12, 1.03]])
        engine_gives(to_moving, lambda p: p @ matrix.T + (31.0, -17.0))
        row, _ = run(folder, tmp_path)
        assert row["map"] == "nonrigid"
        expected = [0.96, 0.1, 31.0, -0.12, 1.03, -17.0]
        assert row["rigid"] == pytest.approx(expected, abs=1e-3)


class TestMirror:
    def test_an_undeclared_mirror_is_found_corrected_and_declared(
        self, folder, tmp_path, monkeypatch
    ):
        # The slide as it is stored matches worse than its mirror image.
        calls = in_turn(
            monkeypatch,
            given(lambda p: p, matches=30, mirrored_matches=120, fraction=None),
            given(to_moving, matches=120),
        )
        row, d = run(folder, tmp_path, "undeclared")
        assert [settings.probe for settings in calls] == [True, False]
        assert (row["verdict"], row["reason"]) == ("pass", None)
        assert (row["mirrored"], row["mirrored_by"]) == (True, "probe")
        assert row["mirror_probe"] == 4.0
        assert row["determinant"] < 0
        expected = to_moving(points()) * (-1, 1) + (MOVING_UM[0], 0)
        assert np.abs(dp.map_points(d, points()) - expected).max() < 0.1 * MPP

    def test_a_sheet_that_is_contradicted_is_for_a_person(self, folder, tmp_path, monkeypatch):
        in_turn(
            monkeypatch,
            given(lambda p: p, matches=30, mirrored_matches=120, fraction=None),
            given(to_moving, matches=120),
        )
        row, d = run(folder, tmp_path, "contradicted")
        assert row["verdict"] == "review"
        assert "the sheet says mirrored" in row["reason"]
        assert (row["mirrored"], row["mirrored_by"]) == (False, "probe")
        assert np.abs(dp.map_points(d, points()) - to_moving(points())).max() < 0.1 * MPP

    def test_a_declared_one_is_as_the_sheet_says(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving)
        row, _ = run(folder, tmp_path, "mirrored")
        assert (row["mirrored"], row["mirrored_by"], row["mirror_probe"]) == (True, "sheet", 10.0)
        row, _ = run(folder, tmp_path, "plain")
        assert (row["mirrored"], row["mirrored_by"]) == (False, None)

    def test_a_close_probe_is_under_review(self, folder, tmp_path, engine_gives):
        engine_gives(to_moving, matches=110, mirrored_matches=100)
        row, _ = run(folder, tmp_path)
        assert (row["verdict"], row["reason"]) == ("review", "mirror_probe 1.100, below 1.5")


class TestOwnMap:
    """A map that was made elsewhere: no engine runs, and the certificate is the same."""

    @pytest.fixture
    def judge(self, folder, tmp_path, monkeypatch):
        copy = tmp_path / "pairs"
        shutil.copytree(folder, copy)
        monkeypatch.setattr(engine, "register", None)

        def judge(function, grid_mpp=8.0):
            nodes = dp.node_points(grid := dp.identity(*FIXED_UM, grid_mpp))
            d = dp.Displacement((function(nodes) - nodes).astype(np.float32), grid.mpp)
            write_displacement(copy / "own.npz", d)
            return run(copy, tmp_path, "own")

        judge.folder = copy
        return judge

    def test_a_right_one_passes_without_matches(self, judge, tmp_path):
        row, d = judge(to_moving)
        assert (row["verdict"], row["reason"], row["map"]) == ("pass", None, "own")
        assert (row["engine"], row["preset"], row["match_fraction"]) == ("own", None, None)
        assert row["tile_ok"] > 0.9
        assert np.abs(dp.map_points(d, points()) - to_moving(points())).max() < 0.2 * MPP
        quality = tables.read(tmp_path / "own.quality.parquet", tables.QUALITY)
        assert quality.num_rows > 20

    def test_a_wrong_one_fails(self, judge):
        row, _ = judge(lambda p: to_moving(p) + np.array([90, -70]))
        assert row["verdict"] == "fail"
        assert "tile_ok" in row["reason"]
        assert "match" not in row["reason"]

    def test_one_that_mirrors_is_judged_as_such(self, judge):
        row, _ = judge(lambda p: to_moving(p) * (-1, 1) + (MOVING_UM[0], 0))
        assert row["mirrored"] is True
        assert row["verdict"] == "fail", "HER2 is not mirrored"
        assert row["folding_fraction"] == 0

    def test_it_needs_no_engine(self, judge, monkeypatch):
        def missing(name):
            raise engine.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(engine.importlib.metadata, "version", missing)
        assert judge(to_moving)[0]["verdict"] == "pass"

    def test_one_that_cannot_be_read_is_a_verdict(self, judge, tmp_path):
        (judge.folder / "own.npz").write_bytes(b"nothing of the kind")
        row, d = run(judge.folder, tmp_path, "own")
        assert row["verdict"] == "fail"
        assert "own.npz" in row["reason"]
        assert d.empty

    def test_an_empty_one_is_a_verdict(self, judge, tmp_path):
        write_displacement(judge.folder / "own.npz", dp.none())
        row, d = run(judge.folder, tmp_path, "own")
        assert row["verdict"] == "fail"
        assert d.empty


class TestLadder:
    LADDER = FAST.replace(retries=2)

    def test_a_pass_is_tried_once(self, folder, tmp_path, monkeypatch):
        calls = in_turn(monkeypatch, given(to_moving))
        row, _ = run(folder, tmp_path, options=self.LADDER)
        assert len(calls) == 1
        assert row["attempts"] == ["default_initial_nonrigid_fast at 338 px: pass"]

    def test_what_fails_is_tried_again_another_way(self, folder, tmp_path, monkeypatch):
        wrong = given(lambda p: to_moving(p) + 200.0, fraction=0.1)
        calls = in_turn(monkeypatch, wrong, wrong, given(to_moving))
        row, d = run(folder, tmp_path, options=self.LADDER)
        assert row["verdict"] == "pass"
        assert [(call.preset, call.thorough) for call in calls] == [
            ("default_initial_nonrigid_fast", False),
            ("default_initial_nonrigid_fast", True),
            ("default_initial_nonrigid", True),
        ]
        assert row["preset"] == "default_initial_nonrigid"
        assert len(row["attempts"]) == 3
        assert "match_fraction 0.100, below 0.25" in row["attempts"][0]
        assert row["attempts"][2] == "default_initial_nonrigid at 338 px, tissue alone: pass"
        assert np.abs(dp.map_points(d, points()) - to_moving(points())).max() < 0.1 * MPP

    def test_the_best_of_the_tries_is_kept(self, folder, tmp_path, monkeypatch):
        wrong = given(lambda p: to_moving(p) + 200.0)
        in_turn(monkeypatch, given(to_moving, fraction=0.4), wrong, wrong)
        row, d = run(folder, tmp_path, options=self.LADDER)
        assert row["verdict"] == "review"
        assert "match_fraction 0.400" in row["reason"]
        assert np.abs(dp.map_points(d, points()) - to_moving(points())).max() < 0.1 * MPP

    def test_want_of_memory_is_answered_with_half_the_size(self, folder, tmp_path, monkeypatch):
        options = self.LADDER.replace(preset="default_initial_nonrigid", size_px=300)
        calls = in_turn(monkeypatch, given(None, reason="ended by SIGKILL"), given(to_moving))
        row, d = run(folder, tmp_path, options=options)
        assert row["verdict"] == "pass"
        assert [call.preset for call in calls] == [
            "default_initial_nonrigid",
            "default_initial_nonrigid_fast",
        ]
        assert given.mpps[0] == pytest.approx(2 * 338 / 300 * MPP)
        assert "SIGKILL" in row["attempts"][0]
        assert np.abs(dp.map_points(d, points()) - to_moving(points())).max() < 0.1 * MPP

    def test_a_wrong_map_is_kept_over_none(self, folder, tmp_path, monkeypatch):
        """A person may overrule a verdict, but not look at a map that is not there."""
        wrong = given(lambda p: to_moving(p) + 200.0)
        in_turn(monkeypatch, given(None, reason="ended by SIGSEGV"), wrong, wrong)
        row, d = run(folder, tmp_path, options=self.LADDER)
        assert (row["verdict"], row["map"]) == ("fail", "nonrigid")
        assert not d.empty
        assert len(row["attempts"]) == 3

    def test_the_only_retry_after_a_kill_is_smaller(self, folder, tmp_path, monkeypatch):
        options = self.LADDER.replace(preset="default_initial_nonrigid", retries=1)
        calls = in_turn(monkeypatch, given(None, reason="ended by SIGKILL"), given(to_moving))
        row, _ = run(folder, tmp_path, options=options)
        assert row["verdict"] == "pass"
        assert calls[1].preset == "default_initial_nonrigid_fast"
        assert given.mpps[0] == pytest.approx(2 * MPP)

    def test_a_later_try_goes_on_from_the_orientation_found(self, folder, tmp_path, monkeypatch):
        wrong = given(lambda p: to_moving(p) + 200.0, matches=120)
        calls = in_turn(
            monkeypatch,
            given(lambda p: p, matches=30, mirrored_matches=120, fraction=None),
            wrong,
            given(to_moving, matches=120),
        )
        row, _ = run(folder, tmp_path, "undeclared", FAST.replace(retries=1))
        assert [call.probe for call in calls] == [True, False, True]
        assert (row["verdict"], row["mirrored_by"]) == ("pass", "probe")
        # Both runs of a try share its time.
        assert calls[1].timeout_s <= calls[0].timeout_s

    def test_the_second_try_sees_tissue_alone(self, folder, tmp_path, monkeypatch):
        copy = tmp_path / "pairs"
        shutil.copytree(folder, copy)
        image = np.asarray(Image.open(copy / "her2.png")).copy()
        # A speck far from the tissue, which describe does not outline.
        image[4:9, 4:9] = 30
        Image.fromarray(image).save(copy / "her2.png")
        in_turn(monkeypatch, given(lambda p: p + 200.0), given(to_moving), given(to_moving))
        row, _ = run(copy, tmp_path, options=self.LADDER.replace(retries=1))
        assert row["verdict"] == "pass"
        assert (given.moving[:12, :12] == 255).all()
        inside = image[150:190, 200:250]
        np.testing.assert_array_equal(given.moving[150:190, 200:250], inside)

    def test_coverage_is_not_tried_again(self, folder, tmp_path, monkeypatch):
        copy = tmp_path / "pairs"
        shutil.copytree(folder, copy)
        image = np.asarray(Image.open(copy / "her2.png"))
        Image.fromarray(np.ascontiguousarray(image[:, :226])).save(copy / "her2.png")
        named = {name: paths(copy, tmp_path, "plain")[name] for name in ("sheet", "unit")}
        table = copy / "plain.describe.parquet"
        describe.run(**named, block_count=1, images_table=table, options=DescribeOptions())
        calls = in_turn(monkeypatch, given(to_moving))
        row, _ = run(copy, tmp_path, options=self.LADDER)
        assert row["verdict"] == "review"
        assert row["reason"].startswith("coverage_fraction")
        assert len(calls) == 1

    def test_no_retries_are_none(self, folder, tmp_path, monkeypatch):
        calls = in_turn(monkeypatch, given(lambda p: p + 200.0))
        assert run(folder, tmp_path)[0]["verdict"] == "fail"
        assert len(calls) == 1


class TestBadInput:
    def test_an_image_that_describe_refused_is_a_verdict(self, folder, tmp_path):
        row, d = run(folder, tmp_path, "broken")
        assert row["verdict"] == "fail"
        assert "broken.png" in row["reason"]
        assert d.empty

    def test_a_slide_that_vanished_is_a_verdict(self, folder, tmp_path):
        copy = tmp_path / "pairs"
        shutil.copytree(folder, copy)
        (copy / "her2.png").unlink()
        row, d = run(copy, tmp_path)
        assert row["verdict"] == "fail"
        assert "her2.png" in row["reason"]
        assert d.empty

    def test_a_slide_that_changed_since_describe_is_a_verdict(self, folder, tmp_path):
        copy = tmp_path / "pairs"
        shutil.copytree(folder, copy)
        shutil.copy(copy / "coarse.png", copy / "her2.png")
        row, _ = run(copy, tmp_path)
        assert row["verdict"] == "fail"
        assert "run describe again" in row["reason"]

    def test_a_broken_tile_is_glass_and_not_the_end(self, folder, tmp_path, engine_gives, caplog):
        engine_gives(to_moving)
        copy = tmp_path / "pairs"
        shutil.copytree(folder, copy)
        image = np.asarray(Image.open(folder / "her2.png"))
        tifffile.imwrite(
            copy / "her2.tif", image, tile=(64, 64), photometric="rgb", compression="jpeg",
            resolution=(1e4 / MPP, 1e4 / MPP), resolutionunit="CENTIMETER",
        )  # fmt: skip
        with tifffile.TiffFile(copy / "her2.tif") as file:
            page = file.pages[0]
            # The lower right corner, where there is no tissue.
            place, length = page.dataoffsets[-1], page.databytecounts[-1]
        with open(copy / "her2.tif", "r+b") as file:
            file.seek(place)
            file.write(bytes(length))
        sheet = (copy / "pairs.tsv").read_text().replace("her2.png", "her2.tif")
        (copy / "pairs.tsv").write_text(sheet)
        named = {name: paths(copy, tmp_path, "plain")[name] for name in ("sheet", "unit")}
        table = copy / "plain.describe.parquet"
        describe.run(**named, block_count=1, images_table=table, options=DescribeOptions())
        row, _ = run(copy, tmp_path)
        assert row["verdict"] == "pass"
        assert "px are treated as background" in caplog.text
        assert (given.moving[320:, 448:] >= 250).all()
        assert (
            np.abs(given.moving[150:200, 150:200].astype(int) - image[150:200, 150:200]).max() < 90
        )

    def test_an_unknown_pair_is_an_error(self, folder, tmp_path):
        named = paths(folder, tmp_path, "plain") | {"unit": "another"}
        with pytest.raises(SheetError, match="no pair another"):
            register.run(**named, options=FAST)
        assert not list(tmp_path.iterdir())

    def test_a_table_without_the_pair_is_a_verdict(self, folder, tmp_path):
        named = paths(folder, tmp_path, "plain")
        tables.write(tmp_path / "empty.parquet", [], tables.DESCRIBE)
        register.run(**named | {"images_table": tmp_path / "empty.parquet"}, options=FAST)
        row = tables.read(named["certificate"], tables.CERTIFICATE).to_pylist()[0]
        assert row["verdict"] == "fail"
        assert "not described" in row["reason"]

    def test_an_engine_that_is_not_installed_is_an_error(self, folder, tmp_path, monkeypatch):
        def missing(name):
            raise engine.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(engine.importlib.metadata, "version", missing)
        with pytest.raises(RegistrationError, match="not installed"):
            run(folder, tmp_path)

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"tile_ok_pass": 0.2}, "register.tile_ok_pass: 0.2 is below"),
            ({"folding_pass": 0.5}, "register.folding_pass: 0.5 is above"),
            ({"preset": "best"}, "register.preset"),
            ({"size_px": 12}, "register.size_px"),
        ],
    )
    def test_impossible_options_are_errors(self, values, words):
        with pytest.raises(ConfigError, match=words):
            RegisterOptions(**values)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    demo.write_cohort(folder, "small", workers=1)
    return folder


class TestReal:
    """The real engine, from the files to the certificate."""

    def test_the_small_cohort_is_registered_to_its_truth(self, cohort, tmp_path):
        pair = next(
            line.split("\t")[0]
            for line in demo.sheet_text("small").splitlines()[1:]
            if "\tacrobat\t" in line
        )
        describe.run(
            sheet=cohort / "pairs.tsv",
            unit=pair,
            block_count=1,
            images_table=cohort / f"{pair}.describe.parquet",
            options=DescribeOptions(),
        )
        row, d = run(cohort, tmp_path, pair)
        assert (row["verdict"], row["map"]) == ("pass", "nonrigid"), row["reason"]
        described = tables.read(cohort / f"{pair}.describe.parquet", tables.DESCRIBE).to_pylist()[0]
        tissue = cv2.imdecode(np.frombuffer(described["tissue"], np.uint8), 0) > 0
        y, x = np.nonzero(tissue)
        at = (np.stack([x, y], axis=-1) + 0.5) * described["tissue_mpp"]
        goal = demo.load_truth(cohort, pair).field.to_moving(at)
        error = np.median(np.linalg.norm(dp.map_points(d, at) - goal, axis=1))
        initial = np.median(np.linalg.norm(at - goal, axis=1))
        assert error <= 2 * described["mpp"]
        assert error <= 0.01 * initial

    def test_an_undeclared_mirror_is_corrected(self, folder, tmp_path):
        row, d = run(folder, tmp_path, "undeclared")
        assert (row["verdict"], row["mirrored_by"]) == ("pass", "probe"), row["reason"]
        expected = to_moving(points()) * (-1, 1) + (MOVING_UM[0], 0)
        error = np.linalg.norm(dp.map_points(d, points()) - expected, axis=1)
        assert np.median(error) < MPP

    def test_other_tissue_is_refused(self, folder, tmp_path):
        copy = tmp_path / "pairs"
        shutil.copytree(folder, copy)
        Image.fromarray(sections(1, other_seed=2)[1]).save(copy / "her2.png")
        row, _ = run(copy, tmp_path, options=FAST.replace(levels=3, iterations=20))
        assert row["verdict"] == "fail", row

    def test_the_kidney_pair(self, images, tmp_path):
        birl = images / "registration" / "birl" / "rat-kidney_" / "scale-5pc"
        slides = images / "wsi_derived"
        (tmp_path / "pairs.tsv").write_text(
            "pair\tcase\tdataset\the\ther2\n"
            f"kidney\tkidney\tbirl\t{slides / '0_HE_val.tif'}\t{slides / '0_PANCK_val.tif'}\n"
        )
        describe.run(
            sheet=tmp_path / "pairs.tsv",
            unit="kidney",
            block_count=1,
            images_table=tmp_path / "kidney.describe.parquet",
            options=DescribeOptions(),
        )
        options = FAST.replace(size_px=None)
        row, d = run(tmp_path, tmp_path, "kidney", options)
        assert row["verdict"] == "pass", row["reason"]
        he = np.loadtxt(birl / "Rat-Kidney_HE.csv", delimiter=",", skiprows=1, usecols=(1, 2))
        ihc = np.loadtxt(
            birl / "Rat-Kidney_PanCytokeratin.csv", delimiter=",", skiprows=1, usecols=(1, 2)
        )
        he = he[: len(ihc)]
        error_px = np.linalg.norm(dp.map_points(d, he * 4.6) / 4.6 - ihc, axis=1)
        assert np.median(error_px) <= 5.6
        assert np.percentile(error_px, 90) <= 14
        assert MOVING_PX != FIXED_PX
