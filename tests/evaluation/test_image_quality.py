import numpy as np
import pytest
import torch
from torch import nn

from hemera.evaluation import image_quality
from hemera.evaluation.image_quality import Network
from hemera.evaluation.metrics import Confusion
from tests.small_rows import generated, row

CPU = torch.device("cpu")


class Tiles:
    """Five tiles of two sizes, mixed, each of one gray value that is its number."""

    sizes = ((8, 16), (12, 4), (8, 16), (12, 4), (8, 16))

    def __len__(self):
        return len(self.sizes)

    def stored(self, place):
        gray = np.full((*self.sizes[place], 3), 10 * place, np.uint8)
        return {"tile": f"t{place}", "he": gray, "her2": gray, "mask": gray[..., 0]}

    def background(self, place, stain):
        return (128, 128, 128) if stain == "he" else (250, 250, 250)


class Add(nn.Module):
    """Adds a number, and records the shapes of its inputs."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.shapes = []

    def forward(self, image):
        self.shapes.append(tuple(image.shape))
        return image + self.number


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 1), (3, 4), (9, 2)])
def test_every_network_is_applied_to_every_tile_whatever_its_size(batch_size, workers):
    modules = {"a": Add(0.25), "b": Add(-0.5)}
    nets = {name: Network(net, name == "b") for name, net in modules.items()}
    found = list(image_quality.predict_tiles(nets, Tiles(), "generation", CPU, batch_size, workers))
    assert [item.tile for item, _ in found] == ["t0", "t1", "t2", "t3", "t4"]
    for place, (item, outputs) in enumerate(found):
        assert list(outputs) == ["a", "b"]
        for name, number in (("a", 0.25), ("b", -0.5)):
            assert outputs[name].shape == (3, *item.he.shape[:2])
            # The second divides by its background.
            shown = 10 * place if name == "a" else round(10 * place * 255 / 128)
            value = shown / 255 * 2 - 1 + number
            assert torch.allclose(outputs[name], torch.tensor(value), atol=1e-6)
    assert sum(shape[0] for shape in modules["a"].shapes) == 5


def test_a_batch_is_begun_before_the_former_is_used():
    net = Add(0.25)
    found = image_quality.predict_tiles({"a": Network(net, False)}, Tiles(), "generation", CPU, 1)
    next(found)
    assert len(net.shapes) == 2


def test_the_precision_is_that_of_each_network_and_results_are_float32():
    """With eight bits of mantissa, 1/3 of 255 differs from that in float32."""
    layer = nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
    nn.init.constant_(layer.weight, 1 / 3)
    images = np.full((1, 4, 6, 3), 85, np.uint8)
    full, half = (
        image_quality.predict(Network(layer, True, kind), images, "segmentation", CPU)
        for kind in (torch.float32, torch.bfloat16)
    )
    assert full.dtype == half.dtype == torch.float32
    assert full.numpy() == pytest.approx(1 / 3, rel=1e-6)
    assert half.numpy() == pytest.approx(1 / 3, rel=2**-7)
    assert half.ne(full).all()


def test_the_segmenter_gets_images_in_0_to_1():
    ((_, found), *_) = image_quality.predict_tiles(
        {"x": Network(Add(0), False)}, Tiles(), "segmentation", CPU, 1
    )
    assert found["x"].unique().tolist() == [0]


def test_examples_go_from_the_best_to_the_worst():
    counts = {
        "a": Confusion(1, 9, 9, 81), "b": Confusion(9, 1, 1, 89), "c": Confusion(0, 0, 0, 100),
        "d": Confusion(5, 5, 5, 85), "e": Confusion(0, 5, 5, 90), "f": Confusion(0, 25, 0, 75),
    }  # fmt: skip
    rows = [
        row("segmentation", tile, **dict(zip(image_quality.COUNTS, count, strict=True)))
        for tile, count in counts.items()
    ]
    rows += [generated(tile, ssim=0.9) for tile in counts]
    found = dict(image_quality.choose_examples(rows, "hemera", 99))
    assert list(found) == list("bdaecf")
    assert found["f"] == "none positive in truth, 25.0 % predicted"
    few = image_quality.choose_examples(rows, "hemera", 3)
    assert few[:2] == [("b", "best: F1 0.900"), ("a", "F1 0.100")] and few[2][0] == "f"
    assert image_quality.choose_examples([], "hemera", 3) == []
    only = [generated("x", ssim=0.2), generated("y", ssim=0.7)]
    assert [tile for tile, _ in image_quality.choose_examples(only, "hemera", 5)] == ["y", "x"]
