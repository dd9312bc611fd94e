"""Training of the network that finds nuclei, on synthetic tissue alone."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from hemera.demo.blocks import grow_block
from hemera.demo.samples import draw_sample
from hemera.demo.variants import draw_variant
from hemera.networks.nuclei import MPP, NucleusNet, encode
from hemera.training.nuclei import Batch, train

_BLOCKS = 24
_BATCH = 12
_SIDE_PX = 128
_RATE = 3e-3


def train_on_tissue(steps: int, seed: int) -> tuple[NucleusNet, dict[str, str | int]]:
    """Train the network on one processor core.

    Args:
        steps: weight updates.
        seed: of the tissue, its variants and the initial weights.

    Returns:
        The network; the number of its training images, and the SHA-256 of them and their truth.
    """
    torch.set_num_threads(1)
    digest = hashlib.sha256()
    net = train(_batches(seed, digest), steps, seed=seed, rate=_RATE)
    return net, {"images": steps * _BATCH, "images_sha256": digest.hexdigest()}


def _batches(seed: int, digest: "hashlib._Hash") -> Iterator[Batch]:
    """Yield batches without end; their images and truth are added to `digest`."""
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
