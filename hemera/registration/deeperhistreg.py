"""DeeperHistReg in its own process: from two images to displacements or a reason of failure.

The engine is driven step by step instead of through its `run_registration`, which discards every
exception. It runs in a child process (``python -m hemera.registration.deeperhistreg
request.json``), because importing it changes `sys.path` for good.

Licences: DeeperHistReg's metadata names GPLv3, its licence file CC BY-SA 4.0; the SuperPoint and
SuperGlue weights in it are for non-commercial research.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from hemera.config import RegisterOptions
from hemera.errors import RegistrationError
from hemera.files.faults import translated
from hemera.registration.displacement import Displacement, from_engine_field, map_points
from hemera.registration.signals import MATCH_RADIUS

log = logging.getLogger(__name__)

COARSEST_PX = 32
"""Least shortest side of the coarsest level: local correlation has a window of 7 px, which should
cover a small part of the image."""

_COMMAND = (sys.executable, "-u", "-m", "hemera.registration.deeperhistreg")
_ENVIRONMENT = {
    # Threads that wait by spinning take the processor from the threads that they wait for: twenty
    # times the time where other jobs run.
    "OMP_WAIT_POLICY": "passive",
    # glibc reuses the memory of freed tensors; mapped and cleared again in each iteration, it
    # costs a quarter of the processor time.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
_SETUP_ERROR = 3
"""Exit status of the child for errors that the pair did not cause."""
_TRANSIENT = re.compile(
    "MemoryError|out of memory|not enough memory|bad_alloc|No space left|Input/output error"
)
"""What the log of the child has where the pair is not the cause."""
_LOG_LINES = 40
_SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """Displacements and matches of one run, or the reason of its failure."""

    nonrigid: Displacement | None = None
    rigid: Displacement | None = None
    """The displacement before the nonrigid stage, a similarity."""
    match_count: int | None = None
    """Matches behind the rigid displacement; 0: the engine returned the identity."""
    mirrored_match_count: int | None = None
    match_fraction: float | None = None
    """Fraction of SuperGlue's matches between H&E and the rigidly warped HER2 that agree."""
    keypoints_um: npt.NDArray[np.float64] | None = None
    """These matches, (N, 2, 2): (x, y) on H&E and on HER2. No displacement was fitted to them."""
    reason: str | None = None


def version() -> str:
    """Return the installed version of DeeperHistReg."""
    with translated(RegistrationError, "DeeperHistReg: not installed; install requirements.lock"):
        return importlib.metadata.version("deeperhistreg")


def register(
    fixed: npt.NDArray[np.uint8],
    moving: npt.NDArray[np.uint8],
    mpp: float,
    options: RegisterOptions,
    folder: Path,
    *,
    thorough: bool = False,
    probe: bool = True,
) -> Outcome:
    """Register one RGB image onto another, both on white and of any size.

    Args:
        mpp: um per pixel of both.
        options: the nonrigid stage does not run where fewer matches agree than `match_fraction`.
        folder: an empty folder for the files of the child process; not cleared afterwards.
        thorough: match at more angles and sizes than the preset does.
        probe: match the mirror image of HER2 too, and stop there when it matches better.

    Raises:
        RegistrationError: when the cause is not the pair: no engine, no GPU, or a killed process.
    """
    folder = folder.resolve()
    Image.fromarray(fixed).save(folder / "fixed.ppm")
    Image.fromarray(moving).save(folder / "moving.ppm")
    request = folder / "request.json"
    # The engine pads both images to one canvas.
    size_px = int(np.maximum(fixed.shape[:2], moving.shape[:2]).min())
    arguments = {
        "options": options.model_dump(), "thorough": thorough, "probe": probe, "size_px": size_px,
    }  # fmt: skip
    request.write_text(json.dumps(arguments))
    reason = _run(request)
    if reason is not None:
        return Outcome(reason=reason)
    answer = json.loads((folder / "answer.json").read_text())
    field = np.load(folder / "field.npy") if answer["refined"] else None
    if not (np.isfinite(answer["rigid"]).all() and (field is None or np.isfinite(field).all())):
        return Outcome(
            reason="DeeperHistReg returned values that are not numbers; one of the slides may be "
            "blank"
        )
    size = fixed.shape[1], fixed.shape[0]
    geometry: dict[str, Any] = {"fixed_size": size, "mpp": mpp, **answer["padding"]}
    # In order, because each is as large as the image: the field is released before the next.
    nonrigid = None if field is None else from_engine_field(field, **geometry)
    del field
    rigid = from_engine_field(_affine_field(answer["rigid"], answer["canvas"]), **geometry)
    (left, top), scale = answer["padding"]["fixed_pad"], answer["keypoint_scale"]
    # Both ends of a match are on the canvas of H&E, HER2 warped by the rigid displacement.
    places = (np.array(answer["keypoints"]).reshape(-1, 2, 2) + 0.5) * scale - (left, top)
    keypoints_um = places * mpp
    keypoints_um[:, 1] = map_points(rigid, keypoints_um[:, 1])
    return Outcome(nonrigid, rigid, **answer["matches"], keypoints_um=keypoints_um)


def _run(request: Path) -> str | None:
    """Run the child process; return why it gave no result, or None."""
    engine_log = request.with_name("engine.log")
    with (
        engine_log.open("wb") as output,
        subprocess.Popen(
            [*_COMMAND, str(request)],
            # The child ends when its standard input does, so that it never outlives a killed job.
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, **_ENVIRONMENT},
        ) as child,
    ):
        status = child.wait()
    if status == 0:
        return None
    lines = [line for line in engine_log.read_text(errors="replace").splitlines() if line.strip()]
    for line in lines[-_LOG_LINES:]:
        log.info("DeeperHistReg: %s", line)
    last = lines[-1] if lines else "no message"
    if status == _SETUP_ERROR:
        raise RegistrationError(last)
    if _TRANSIENT.search("\n".join(lines[-_LOG_LINES:])):
        raise RegistrationError(
            f"DeeperHistReg lacked memory or its disk ({last}); give the job more memory, or "
            "choose a smaller register.size_px"
        )
    if status < 0:
        raise RegistrationError(
            f"DeeperHistReg was ended by {signal.Signals(-status).name}, most often for lack of "
            "memory; give the job more memory or choose a smaller register.size_px"
        )
    return f"DeeperHistReg failed ({last}); see the job's log"


def _affine_field(theta: list[list[float]], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Turn the engine's transform, in coordinates from -1 to 1, into a field in pixels."""
    height, width = shape
    (a, b, c), (d, e, f) = theta
    x = (2 * np.arange(width) + 1) / width - 1
    y = ((2 * np.arange(height) + 1) / height - 1)[:, None]
    field = np.empty((2, height, width), np.float32)
    field[0] = (a * x + b * y + c - x) * width / 2
    field[1] = (d * x + e * y + f - y) * height / 2
    return field


# What follows runs in the child process.


def main(request: Path) -> None:
    """Register the two images beside `request` and write the answer beside them."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    arguments = json.loads(request.read_text())
    options = RegisterOptions(**arguments["options"])
    folder = request.parent
    try:
        import cv2
        import deeperhistreg
        import torch
    except ImportError as error:
        _setup_error(f"DeeperHistReg: cannot be imported ({error}); install requirements.lock")
    if options.device == "cuda" and not torch.cuda.is_available():
        _setup_error("register.device: cuda, but PyTorch finds no GPU; give cpu or auto")
    use_gpu = options.device != "cpu" and torch.cuda.is_available()
    for set_threads in (torch.set_num_threads, cv2.setNumThreads):
        set_threads(options.torch_threads)
    # OpenCV's nearest-neighbour search, behind the SIFT matches, draws random numbers too.
    for seed in (np.random.seed, torch.manual_seed, cv2.setRNGSeed):
        seed(_SEED)
    device = "cuda:0" if use_gpu else "cpu"
    parameters = _parameters(
        deeperhistreg.configs, options, device, arguments["thorough"], arguments["size_px"]
    )
    pipeline = deeperhistreg.direct_registration.DeeperHistReg_FullResolution(parameters)
    pipeline.source_path = str(folder / "moving.ppm")
    pipeline.target_path = str(folder / "fixed.ppm")
    pipeline.save_path = str(folder)
    pipeline.load_images()
    pipeline.preprocessing()
    found = _match(pipeline, torch, folder / "engine.log", probe=arguments["probe"])
    match_fraction = found["matches"]["match_fraction"]
    refined = (match_fraction or 0.0) >= max(options.match_fraction[1], 1e-9)
    if refined:
        pipeline.nonrigid_registration()
        utils = importlib.import_module("dhr_utils.utils")
        field = utils.tc_df_to_np_df(pipeline.current_displacement_field)
        np.save(folder / "field.npy", np.ascontiguousarray(field, np.float32))
    # Padding is ((top, bottom), (left, right)); 1 is the moving image, 2 the fixed one.
    pads = pipeline.padding_params
    answer = {
        "refined": refined,
        "rigid": pipeline.initial_transform[0].detach().cpu().double().tolist(),
        "canvas": list(pipeline.pre_target.shape[2:]),
        "padding": {
            "moving_pad": [pads["pad_1"][1][0], pads["pad_1"][0][0]],
            "fixed_pad": [pads["pad_2"][1][0], pads["pad_2"][0][0]],
        },
        **found,
    }
    (folder / "answer.json").write_text(json.dumps(answer))


def _match(pipeline: Any, torch: Any, engine_log: Path, *, probe: bool) -> dict[str, Any]:
    """Register by matches; return their figures, keypoints, and canvas px per px of these."""
    # Matching needs no gradients; with them, each match keeps gigabytes.
    with torch.no_grad():
        pipeline.initial_registration()
    match_count = _final_matches(engine_log)
    mirrored_match_count = match_fraction = None
    keypoints, keypoint_scale = np.zeros((0, 2, 2)), 1.0
    if probe:
        with torch.no_grad():
            _match_mirrored(pipeline)
        mirrored_match_count = _final_matches(engine_log)
    if mirrored_match_count is None or mirrored_match_count <= match_count:
        keypoints, size = _match_warped(pipeline, torch)
        canvas = pipeline.pre_target.shape[2:]
        keypoint_scale = canvas[0] / size[0]
        if len(keypoints):
            distances = np.linalg.norm(keypoints[:, 0] - keypoints[:, 1], axis=1)
            match_fraction = float((distances <= MATCH_RADIUS * math.hypot(*size)).mean())
    return {
        "matches": {
            "match_count": match_count,
            "mirrored_match_count": mirrored_match_count,
            "match_fraction": match_fraction,
        },
        "keypoints": keypoints.tolist(),
        "keypoint_scale": keypoint_scale,
    }


def _parameters(
    configs: Any, options: RegisterOptions, device: str, thorough: bool, size_px: int
) -> dict[str, Any]:
    """Return the preset's parameters as HEMERA runs them on a canvas with this shortest side."""
    parameters: dict[str, Any] = getattr(configs, options.preset)()
    parameters.update(
        device=device,
        case_name="pair",
        logging_path=None,
        save_final_images=False,
        save_final_displacement_field=False,
    )
    # The images are at the resolution of registration already.
    parameters["loading_params"].update(
        loader="pil", source_resample_ratio=1.0, target_resample_ratio=1.0
    )
    parameters["preprocessing_params"].update(initial_resampling=False, save_results=False)
    # The number of matches is only in the standard output.
    parameters["initial_registration_params"].update(
        device=device, cuda=device != "cpu", save_results=False, echo=True
    )
    if thorough:
        parameters["initial_registration_params"].update(
            angle_step=60,
            registration_size=800,
            registration_sizes=[200, 350, 500, 700],
            run_sift_ransac=True,
        )
    nonrigid = parameters["nonrigid_registration_params"]
    nonrigid.update(device=device, save_results=False, registration_size=2**31)
    levels = options.levels
    if levels is None:
        levels = min(nonrigid["num_levels"], 1 + max(0, int(math.log2(size_px / COARSEST_PX))))
    for key in ("learning_rates", "alphas", "iterations"):
        # The preset's first levels; its last one is repeated where more are wanted.
        values = nonrigid[key]
        nonrigid[key] = [values[min(k, len(values) - 1)] for k in range(levels)]
    nonrigid.update(num_levels=levels, used_levels=levels)
    if options.iterations is not None:
        nonrigid["iterations"] = [options.iterations] * levels
    return parameters


def _match_mirrored(pipeline: Any) -> None:
    """Match H&E with the mirror image of HER2; the number of matches is in the log."""
    methods = importlib.import_module("dhr_registration.initial_alignment_methods")
    parameters = pipeline.registration_parameters["initial_registration_params"]
    function = methods.get_function(parameters["initial_registration_function"])
    function(pipeline.pre_source.flip(3), pipeline.pre_target, parameters)


def _final_matches(path: Path) -> int:
    found = re.findall(r"^Final matches: (\d+)", path.read_text(errors="replace"), re.MULTILINE)
    if not found:
        _setup_error("DeeperHistReg: no number of matches in its output; install requirements.lock")
    return int(found[-1])


def _match_warped(pipeline: Any, torch: Any) -> tuple[npt.NDArray[np.float64], tuple[int, int]]:
    """Match H&E with rigidly warped HER2 by SuperGlue on smaller images.

    Returns (N, 2, 2), pixels (x, y) on H&E and on warped HER2, and (height, width) of the images.
    """
    utils = importlib.import_module("dhr_utils.utils")
    warping = importlib.import_module("dhr_utils.warping")
    paths = importlib.import_module("dhr_paths.model_paths")
    superglue = importlib.import_module("dhr_networks.superglue")
    parameters = pipeline.registration_parameters["initial_registration_params"]
    superpoint = {
        "nms_radius": 4,
        "keypoint_threshold": parameters["keypoint_threshold"],
        "max_keypoints": 3000,
    }
    matching = {
        "weights": "outdoor",
        "sinkhorn_iterations": parameters["sinkhorn_iterations"],
        "match_threshold": parameters["match_threshold"],
    }
    model = superglue.Matching({"superpoint": superpoint, "superglue": matching}).eval()
    model.superpoint.load_state_dict(torch.load(paths.superpoint_model_path, map_location="cpu"))
    model.superglue.load_state_dict(torch.load(paths.superglue_model_path, map_location="cpu"))
    model.to(pipeline.device)
    with torch.no_grad():
        warped = warping.warp_tensor(pipeline.pre_source, pipeline.initial_displacement_field)
        source, target = utils.initial_resampling(
            warped, pipeline.pre_target, max(parameters["registration_sizes"])
        )
        found = model({"image0": source, "image1": target})
    matches = found["matches0"][0].cpu().numpy()
    kept = matches > -1
    here = found["keypoints0"][0].cpu().numpy()[kept]
    there = found["keypoints1"][0].cpu().numpy()[matches[kept]]
    pairs = np.stack([there, here], axis=1).astype(np.float64)
    return pairs, (target.shape[2], target.shape[3])


def _leave_with_parent() -> None:
    # Straight from the descriptor: the interpreter would wait for a buffered reader as it ends.
    while os.read(0, 4096):
        pass
    os._exit(1)


def _setup_error(message: str) -> NoReturn:
    sys.stderr.write(message + "\n")
    raise SystemExit(_SETUP_ERROR)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
