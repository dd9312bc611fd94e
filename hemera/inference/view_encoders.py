"""Encoders with a network, applied to the views of tiles."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemera.config import HER2_CNN, NETWORKS, SEGMENTER, EmbedOptions
from hemera.dataset.index import TileIndex
from hemera.errors import TrainingError
from hemera.imaging.color import normalise_background
from hemera.networks import storage
from hemera.networks.her2_cnn import load_score_encoder
from hemera.networks.tile_encoders import RECIPES, PositiveFraction, load_tile_encoder
from hemera.networks.view_classifiers import load_view_encoder
from hemera.training.session import PRECISIONS, session, to_unit

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]
Compute = Callable[[list[RGB], list[dict[str, Any]]], Rows]
Files = tuple[Path | None, Path | None, Path | None]
"""Weights and metadata of an encoder that was trained here, and the index of segmenter."""

UPSAMPLING_MAX = 1.25
"""Magnification of a view to the input of an encoder from which a warning is logged."""


@contextlib.contextmanager
def open_encoder(
    name: str, trained_here: Files, rows: Sequence[dict[str, Any]], options: EmbedOptions
) -> Iterator[tuple[Compute, int, dict[str, Any]]]:
    """Yield what computes the features of views, their number, and what the file records.

    `rows` are those of the tiles that views are cut from.
    """
    with session(seed=0, threads=options.torch_threads, device=options.device) as device:
        net, over_white, described = _network(name, trained_here, options)
        net.to(device)
        precision = PRECISIONS[options.precision]

        def compute(views: list[RGB], own: list[dict[str, Any]]) -> Rows:
            if over_white:
                pairs = zip(views, own, strict=True)
                views = [
                    normalise_background(view, tuple(row["he_background"])) for view, row in pairs
                ]
            batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
            with (
                torch.inference_mode(),
                torch.autocast(device.type, precision, enabled=precision != torch.float32),
            ):
                found: Rows = net(to_unit(batch, device)).float().cpu().numpy()
            return found

        sides = {row["size_px"] // options.split for row in rows}
        factor = net.resize_px / max(sides) if sides and net.resize_px else 1.0
        if factor > UPSAMPLING_MAX:
            log.warning(
                "%s: views of %d px are magnified %.2f times to %d px, which the encoder was not "
                "made for; lower embed.split", name, max(sides), factor, net.resize_px,
            )  # fmt: skip
        yield compute, net.width, {**described, "magnified": factor}


def _network(
    name: str,
    trained_here: Files,
    options: EmbedOptions,
) -> tuple[Any, bool, dict[str, Any]]:
    """Return an encoder with weights, whether views are divided by their background, its record."""
    if name in (SEGMENTER, *NETWORKS):
        weights, metadata, index = trained_here
        stage = "train_segmentation" if name == SEGMENTER else "train_encoder"
        if weights is None or metadata is None or (name == SEGMENTER and index is None):
            raise TrainingError(
                f"encoder {name}: no weights; give --encoder-weights and --encoder-metadata of "
                f"stage {stage}{' and --index' if name == SEGMENTER else ''}"
            )
        if name == SEGMENTER:
            assert index is not None
            segmenter, made = storage.load_segmentation(weights, metadata)
            own: Any = PositiveFraction(segmenter)
            opened = TileIndex(index)
            storage.check_index(name, made, opened.fingerprint)
            seen = opened.cases_seen("generation", "segmentation")
        else:
            load = load_score_encoder if name == HER2_CNN else partial(load_view_encoder, name)
            own, made = load(weights, metadata)
            seen = made["trained_on"]
        sha256 = made.get("pretrained_sha256")
        facts = {"encoder_sha256": made["weights_sha256"],
                 "pretraining": f"weights {sha256[:12]}" if sha256 else "none"}  # fmt: skip
        return own, storage.background_is_white(made), {**facts, "trained_on": seen}
    if missing := options.missing(name):
        raise TrainingError("\n".join(missing))
    path = options.path(name)
    assert path is not None
    net, sha256 = load_tile_encoder(name, path)
    tcga = RECIPES[name].tcga if name in RECIPES else "unknown"
    return net, False, {"encoder_sha256": sha256, "pretraining": f"TCGA: {tcga}"}
