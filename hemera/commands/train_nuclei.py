"""Train the network that finds nuclei, on synthetic tissue alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hemera import __version__
from hemera.config.base import Count, Seed

if TYPE_CHECKING:
    from hemera.training.nuclei import Batch

_BLOCKS = 24
_BATCH = 12
_SIDE_PX = 128
_RATE = 3e-3


def train_nuclei(*, weights: Path, steps: Count = 2200, seed: Seed = 0) -> None:
    """Train the network that finds nuclei, on synthetic tissue alone, on one processor core.

    The same steps, seed, machine and versions give the same bytes. The metadata of the file state
    them, and a digest of all images that the network was trained on.

    Args:
        weights: written: safetensors, for option nuclei of the mask engine stain.
        steps: weight updates; the default takes some minutes.
        seed: of the tissue, its variants and the initial weights.
    """
    import torch

    from hemera.networks.storage import write_weights
    from hemera.training.nuclei import train

    torch.set_num_threads(1)
    digest = hashlib.sha256()
    net = train(_batches(seed, digest), steps, seed=seed, rate=_RATE)
    provenance = {
        "command": f"hemera train-nuclei --steps {steps} --seed {seed}",
        "seed": seed,
        "steps": steps,
        "images": steps * _BATCH,
        "images_sha256": digest.hexdigest(),
        "hemera": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")},
        "opencv-python-headless": importlib.metadata.version("opencv-python-headless"),
    }
    write_weights(weights, net.state_dict(), {"hemera": json.dumps(provenance, sort_keys=True)})


def _batches(seed: int, digest: hashlib._Hash) -> Iterator[Batch]:
    """Yield batches without end; their images and truth are added to `digest`."""
    import numpy as np
    import torch

    from hemera.demo.blocks import grow_block
    from hemera.demo.samples import draw_sample
    from hemera.demo.variants import draw_variant
    from hemera.networks.nuclei import MPP, encode
    from hemera.training.nuclei import Batch

    blocks = [grow_block(np.random.default_rng([seed, 1, k])) for k in range(_BLOCKS)]
    rng = np.random.default_rng([seed, 2])
    while True:
        samples = [
            draw_sample(rng, blocks[rng.integers(_BLOCKS)], draw_variant(rng), _SIDE_PX, MPP)
            for _ in range(_BATCH)
        ]
        for sample in samples:
            for array in (sample.rgb, sample.centre, sample.nucleus, sample.weight):
                digest.update(array.tobytes())
        densities = np.stack([encode(s.rgb, s.background).transpose(2, 0, 1) for s in samples])
        yield Batch(
            torch.from_numpy(densities),
            torch.from_numpy(np.stack([s.centre for s in samples])),
            torch.from_numpy(np.stack([s.nucleus for s in samples])),
            torch.from_numpy(np.stack([s.weight for s in samples])),
        )
