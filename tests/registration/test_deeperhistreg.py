"""The real engine on small sections, and every way in which it can end without a result."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from hemera.config import RegisterOptions
from hemera.config.registration import CANVAS_PX
from hemera.errors import RegistrationError
from hemera.registration import deeperhistreg as engine
from hemera.registration import displacement as dp
from tests.small_sections import FIXED_PX, FIXED_UM, MPP, sections, to_moving

FAST, FULL = "default_initial_nonrigid_fast", "default_initial_nonrigid"
SMALL = RegisterOptions(preset=FAST, levels=4, iterations=25, device="cpu", torch_threads=1)


def register(folder, fixed, moving, options=SMALL, **how):
    return engine.register(fixed, moving, MPP, options, folder, **how)


def points(count=500):
    rng = np.random.default_rng(6)
    centre = np.array(FIXED_UM) / 2
    return centre + rng.uniform(-0.3, 0.3, (count, 2)) * np.array(FIXED_UM)


def median_error(d):
    return np.median(np.linalg.norm(dp.map_points(d, points()) - to_moving(points()), axis=1))


@pytest.fixture(scope="module")
def pair():
    return sections()


class TestRegister:
    def test_the_initial_stage_finds_the_similarity(self, pair, tmp_path):
        """A small run: one iteration afterwards, and the mirror image is not probed."""
        found = register(tmp_path, *pair, SMALL.replace(levels=1, iterations=1), probe=False)
        assert (found.mirrored_match_count, found.reason) == (None, None)
        assert found.rigid.affine.anisotropy == pytest.approx(1, abs=1e-3)
        assert found.rigid.affine.rotation_deg == pytest.approx(11, abs=1)
        assert median_error(found.rigid) < 3 * MPP
        # The matches are of the slides, not of the map: closer to the truth than a similarity.
        here, there = np.moveaxis(found.keypoints_um, 1, 0)
        assert len(here) > 30
        assert np.median(np.linalg.norm(there - to_moving(here), axis=1)) < 1.5 * MPP

    @pytest.mark.slow
    def test_the_nonrigid_displacement_is_better(self, pair, tmp_path):
        found = register(tmp_path, *pair)
        assert found.reason is None
        assert found.match_count > 30
        assert found.match_fraction > 0.9
        assert found.match_count > 1.5 * found.mirrored_match_count
        for d in (found.rigid, found.nonrigid):
            assert d.vectors_um.shape == (FIXED_PX[1], FIXED_PX[0], 2)
            assert d.mpp == MPP
        initial = np.median(np.linalg.norm(points() - to_moving(points()), axis=1))
        assert median_error(found.nonrigid) < min(MPP, initial / 10, median_error(found.rigid))

    @pytest.mark.slow
    def test_the_mirror_image_is_found_and_not_refined(self, pair, tmp_path):
        mirrored = np.ascontiguousarray(pair[1][:, ::-1])
        found = register(tmp_path, pair[0], mirrored)
        assert found.mirrored_match_count > 1.5 * found.match_count
        assert (found.nonrigid, found.reason) == (None, None)

    @pytest.mark.slow
    def test_a_blank_slide_gives_no_map_or_no_match(self, pair, tmp_path):
        blank = register(tmp_path, pair[0], np.full_like(pair[1], 246))
        assert blank.reason or blank.match_count == 0

    @pytest.mark.slow
    def test_a_gpu_that_is_not_there_is_an_error_and_no_verdict(self, pair, tmp_path, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        with pytest.raises(RegistrationError, match="no GPU"):
            register(tmp_path, *pair, SMALL.replace(device="cuda"))


class TestEndings:
    """The child process replaced by one that ends as the engine may."""

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("raise ValueError('of 9 points')", "failed (ValueError: of 9 points)"),
            ("raise SystemExit(1)", "failed (no message)"),
        ],
    )
    def test_an_exception_is_a_reason_with_a_log(
        self, code, words, pair, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(engine, "_COMMAND", (sys.executable, "-c", code))
        caplog.set_level("INFO")
        ended = register(tmp_path, *pair)
        assert words in ended.reason
        assert ended.rigid is None
        assert "Traceback" in caplog.text or "no message" in words

    @pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
    def test_a_killed_engine_fails_the_job(self, name, pair, tmp_path, monkeypatch):
        """No verdict: the job can be tried again with more memory."""
        code = f"import os, signal; os.kill(os.getpid(), signal.{name})"
        monkeypatch.setattr(engine, "_COMMAND", (sys.executable, "-c", code))
        with pytest.raises(RegistrationError, match=f"ended by {name}"):
            register(tmp_path, *pair)

    @pytest.mark.parametrize(
        "error",
        [
            "MemoryError('of 9 GB')",
            "RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes')",
            "RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')",
            "OSError(28, 'No space left on device')",
        ],
    )
    def test_a_lack_of_memory_or_disk_fails_the_job(self, error, pair, tmp_path, monkeypatch):
        monkeypatch.setattr(engine, "_COMMAND", (sys.executable, "-c", f"raise {error}"))
        with pytest.raises(RegistrationError, match=r"lacked memory or its disk .*more memory"):
            register(tmp_path, *pair)

    @pytest.mark.parametrize("where", ["field", "rigid"])
    def test_values_that_are_no_numbers_are_a_reason(self, where, pair, tmp_path, monkeypatch):
        value = {"field": "0", "rigid": "0"} | {where: "float('nan')"}
        code = (
            "import json, sys, pathlib, numpy as np; p = pathlib.Path(sys.argv[1]).parent;"
            f"np.save(p / 'field.npy', np.full((2, 338, 452), {value['field']}, np.float32));"
            f"rigid = [[1, 0, {value['rigid']}], [0, 1, 0]];"
            "(p / 'answer.json').write_text(json.dumps(dict(rigid=rigid, refined=True)))"
        )
        monkeypatch.setattr(engine, "_COMMAND", (sys.executable, "-c", code))
        assert "not numbers" in register(tmp_path, *pair).reason

    def test_the_child_ends_with_its_parent(self):
        code = "from hemera.registration import deeperhistreg as e; e._leave_with_parent()"
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=False, timeout=60
        )
        assert done.returncode == 1


class TestParameters:
    @pytest.fixture
    def configs(self):
        """The engine's presets, read from their file: importing the engine changes `sys.path`."""
        package = importlib.util.find_spec("deeperhistreg").submodule_search_locations[0]
        path = f"{package}/dhr_pipeline/registration_params.py"
        spec = importlib.util.spec_from_file_location("presets_under_test", path)
        module = importlib.util.module_from_spec(spec)
        before = list(sys.path)
        spec.loader.exec_module(module)
        sys.path[:] = before
        return module

    @pytest.mark.parametrize("preset", CANVAS_PX)
    def test_every_preset_runs_on_the_device_at_its_own_size(self, configs, preset):
        own = getattr(configs, preset)()
        assert own["nonrigid_registration_params"]["registration_size"] == CANVAS_PX[preset]
        options = RegisterOptions(preset=preset)
        usual = engine._parameters(configs, options, "cpu", thorough=False, size_px=2048)
        assert "cuda" not in repr(usual).replace("'cuda': False", "")
        thorough = engine._parameters(configs, options, "cuda:0", True, 2048)
        assert repr(thorough).count("'device': 'cuda:0'") == 3
        usual, more = (made["initial_registration_params"] for made in (usual, thorough))
        assert more["angle_step"] <= usual["angle_step"]
        assert max(more["registration_sizes"]) > max(usual["registration_sizes"])

    @pytest.mark.parametrize(
        ("preset", "size_px", "levels"),
        [
            # 2^4 times 32 px is 512 px: five levels from there on, up to those of the preset.
            (FAST, 511, 4), (FAST, 512, 5), (FAST, 787, 5), (FAST, 2048, 7), (FAST, 8192, 7),
            (FULL, 787, 5), (FULL, 4096, 8), (FAST, 20, 1),
        ],
    )  # fmt: skip
    def test_the_coarsest_level_is_no_smaller_than_32_px(self, configs, preset, size_px, levels):
        options = RegisterOptions(preset=preset)
        made = engine._parameters(configs, options, "cpu", thorough=False, size_px=size_px)
        made = made["nonrigid_registration_params"]
        assert (made["num_levels"], made["used_levels"]) == (levels, levels)
        assert len(made["learning_rates"]) == len(made["alphas"]) == levels
        assert made["iterations"] == [60] * levels

    def test_levels_and_iterations(self, configs):
        def nonrigid(**changes):
            options = RegisterOptions(preset=FULL, **changes)
            made = engine._parameters(configs, options, "cpu", thorough=False, size_px=4096)
            return made["nonrigid_registration_params"]

        made = nonrigid(levels=3, iterations=60)
        assert (made["num_levels"], made["used_levels"]) == (3, 3)
        assert made["iterations"] == [60, 60, 60]
        assert made["learning_rates"] == [0.005, 0.0025, 0.0025]
        assert made["alphas"] == [1.5, 1.5, 1.5]
        # More levels than the preset has: its last one is repeated.
        made = nonrigid(levels=10, iterations=None)
        assert made["iterations"] == [100] * 7 + [200] * 3
        assert len(made["learning_rates"]) == len(made["alphas"]) == 10
