"""A folder of small pairs to register, and stand-ins for the engine whose results are known."""

import math

import cv2
import numpy as np
from PIL import Image

from hemera import tables
from hemera.config import RegisterOptions
from hemera.registration import deeperhistreg as engine
from hemera.registration import displacement as dp
from hemera.registration import local_error
from hemera.registration.displacement_files import read_displacement
from hemera.stages import register
from tests.small_displacements import field_of
from tests.small_sections import FIXED_UM, MOVING_UM, MPP, sections, to_moving
from tests.small_sheets import describe_unit, write_sheet

PLAIN_ERROR = {"median": (0.0, 1, 0), "low": (-math.log(4), 1, 0), "high": (math.log(2), 1, 0)}
"""A model by which the error is the residual, from a quarter to twice of it; see `plain_errors`."""

SMALL = {
    "preset": "default_initial_nonrigid_fast", "size_px": 512, "levels": 5, "iterations": 60,
    "device": "cpu", "retries": 0,
}  # fmt: skip
"""Options small enough for tests."""


def write_pairs(folder):
    """Write pairs: as it is, mirrored and declared so or not, and with files that are no use."""
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
    common = {"case": "case1", "dataset": "own", "he": "he.png", "he_mpp": MPP}
    cells = [
        {"pair": pair, "her2": f"{her2}.png", "mirrored": mirrored, "her2_mpp": mpp}
        for pair, her2, mirrored, mpp in rows
    ]
    cells[-1]["displacement"] = "own.npz"
    write_sheet(folder, cells, **common)
    for pair, *_ in rows:
        describe_pair(folder, pair)
    return folder


def describe_pair(folder, unit, out=None):
    """Describe one pair; return the table."""
    return describe_unit(folder, unit, (out or folder) / f"{unit}.describe.parquet")


def paths(folder, out, unit):
    """Return the arguments of the stage."""
    return {
        "sheet": folder / "pairs.tsv",
        "unit": unit,
        "images_table": folder / f"{unit}.describe.parquet",
        "displacement": out / f"{unit}.displacement.npz",
        "certificate": out / f"{unit}.parquet",
        "quality": out / f"{unit}.quality.parquet",
    }


def run(folder, out, unit="plain", **changes):
    """Register a pair; return the certificate's row and the displacement."""
    named = paths(folder, out, unit) | {
        name: changes.pop(name) for name in ("images_table",) if name in changes
    }
    register.run(**named, options=RegisterOptions(**(SMALL | changes)))
    (row,) = tables.read(named["certificate"], tables.CERTIFICATE).to_pylist()
    return row, read_displacement(named["displacement"])


def given(nonrigid, rigid=None, matches=200, fraction=0.9, reason=None, mirrored_matches=20):
    """Return a stand-in for the engine; what it was given last is in its attributes."""

    def found(fixed, moving, mpp, options, folder, *, thorough, probe):
        given.fixed, given.moving, given.mpp, given.options = fixed, moving, mpp, options
        (folder / "left behind").write_text("by the engine")
        if reason:
            return engine.Outcome(reason=reason)
        maps = [made(function, mpp) for function in (nonrigid, rigid or nonrigid)]
        other = mirrored_matches if probe else None
        return engine.Outcome(*maps, matches, other, fraction)

    return found


def in_turn(monkeypatch, *engines):
    """Replace the engine by one stand-in after the other; return what each was given."""
    calls = []

    def register(fixed, moving, mpp, options, folder, **how):
        result = engines[len(calls)](fixed, moving, mpp, options, folder, **how)
        calls.append({"preset": options.preset, **how})
        return result

    monkeypatch.setattr(engine, "register", register)
    return calls


def plain_errors(monkeypatch):
    """Make the estimated error the length of the residual."""
    monkeypatch.setattr(local_error, "COEFFICIENTS", PLAIN_ERROR)
    for name in ("FLOOR", "ERROR_FLOOR"):
        monkeypatch.setattr(local_error, name, 1e-12)


def made(function, mpp=MPP):
    """Return the displacement that maps each node to function(node)."""
    width, height = (math.ceil(side / mpp) for side in FIXED_UM)
    return field_of(function, width, height, mpp)


def error_um(d, mirrored=False):
    """Return the distance from the true map at points of the slide."""
    points = np.random.default_rng(8).uniform(0.05, 0.95, (300, 2)) * FIXED_UM
    expected = to_moving(points)
    if mirrored:
        expected = expected * (-1, 1) + (MOVING_UM[0], 0)
    return np.linalg.norm(dp.map_points(d, points) - expected, axis=1)
