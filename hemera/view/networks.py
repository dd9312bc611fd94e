"""What the trained networks of a study make of a tile, computed when it is shown."""

import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hemera.errors import TableError
from hemera.files import layout
from hemera.imaging.codecs import decode
from hemera.reports import pictures

if TYPE_CHECKING:
    from hemera.evaluation.image_quality import Network

VIRTUAL, PREDICTION = "virtual", "prediction"

_lock = threading.Lock()


def trained(generator: str) -> dict[str, Path]:
    """Return the weights of the networks that exist, by the name of their picture."""
    paths = {
        VIRTUAL: layout.path(layout.GENERATOR, generator=generator),
        PREDICTION: layout.path(layout.SEGMENTER),
    }
    return {name: path for name, path in paths.items() if path.exists()}


def picture(
    name: str, generator: str, row: Mapping[str, Any], read: Callable[[str], bytes], mask: Any
) -> Any:
    """Return the virtual HER2 or the predicted probability of a tile as a picture (H, W, 3).

    Args:
        row: of the table of tiles.
        read: returns the stored image of a stain.
        mask: label image (H, W) of the tile.

    Raises:
        TableError: when the network is not trained.
    """
    from hemera.evaluation import image_quality

    weights = trained(generator).get(name)
    if weights is None:
        raise TableError(f"{name}: its network is not trained; run `hemera run`")
    backgrounds = (tuple(row[f"{stain}_background"]) for stain in ("he", "her2"))
    item = image_quality.Item(
        row["tile"], decode(read("he")), decode(read("her2")), mask, *backgrounds
    )
    # One at a time: a network keeps all processors busy.
    with _lock:
        net, device = _load(name, weights, weights.stat().st_mtime_ns)
        kind = "generation" if name == VIRTUAL else "segmentation"
        image = image_quality.input_image(net, item)[None]
        output = image_quality.predict(net, image, kind, device)[0]
    if name == VIRTUAL:
        return image_quality.to_image(net, output, item)
    return pictures.heat(image_quality.to_probability(output))


@functools.lru_cache(maxsize=2)
def _load(name: str, weights: Path, changed_ns: int) -> tuple["Network", Any]:
    """Load a network; `changed_ns` is that of its file."""
    import torch

    from hemera.evaluation.image_quality import Network
    from hemera.networks import storage

    load = storage.load_generation if name == VIRTUAL else storage.load_segmentation
    metadata = layout.GENERATOR_METADATA if name == VIRTUAL else layout.SEGMENTER_METADATA
    net, described = load(weights, weights.parent / Path(metadata).name)
    net.requires_grad_(False).eval()
    return Network(net, storage.background_is_white(described)), torch.device("cpu")
