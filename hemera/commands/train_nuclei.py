"""Train the network that finds nuclei, on synthetic tissue alone."""

import importlib.metadata
import json
from pathlib import Path

from hemera import __version__
from hemera.commands import Seed, Steps, check_new
from hemera.errors import ConfigError


def train_nuclei(*, weights: Path, steps: Steps = 2200, seed: Seed = 0) -> None:
    """Train the network that finds nuclei, on synthetic tissue alone, on one processor core.

    The same steps, seed, machine and versions give the same bytes. The metadata of the file state
    them, and a digest of all images that the network was trained on.

    Args:
        weights: a new file, written: safetensors, for option nuclei of the mask engine stain.
        steps: weight updates; the default takes some minutes.
        seed: of the tissue, its variants and the initial weights.
    """
    check_new(weights)
    if weights.suffix != ".safetensors":
        raise ConfigError(
            f"{weights}: option nuclei takes other files for models of InstanSeg; name it "
            f"{weights.with_suffix('.safetensors').name}"
        )
    from hemera.demo.nucleus_training import train_on_tissue
    from hemera.networks.storage import write_weights

    net, images = train_on_tissue(steps, seed)
    packages = "torch", "numpy", "scipy", "opencv-python-headless"
    provenance = {
        "command": f"hemera train-nuclei --steps {steps} --seed {seed}",
        "seed": seed,
        "steps": steps,
        **images,
        "hemera": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }
    write_weights(weights, net.state_dict(), {"hemera": json.dumps(provenance, sort_keys=True)})
