from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.evaluation import branch_swap
from hemera.evaluation.image_quality import COUNTS, SEGMENTER, Network
from hemera.evaluation.metrics import confusion
from hemera.networks.generation import Generator, build_generator
from hemera.networks.segmentation import SegmentationNet

CPU = torch.device("cpu")
OPTIONS = EvaluateOptions(bootstrap_samples=100)
CASES = ("a", "a", "b", "b", "c")


@pytest.mark.parametrize(
    "cases", ["aabbc", "abababcc", "aab", "aaaab", "abcd", "aaabbb", "bcaaacb"], ids=str
)
def test_a_partner_is_of_another_case(cases):
    found = branch_swap.partners(cases)
    assert all(cases[place] != cases[other] for place, other in enumerate(found))
    if 2 * max(Counter(cases).values()) <= len(cases):
        assert sorted(found) == list(range(len(cases))), "every tile is a partner once"


def test_one_case_has_no_partners():
    assert branch_swap.partners("aaa") == [None] * 3


class Inverted(Generator):
    """The virtual HER2 image is the negative of H&E."""

    def __init__(self):
        super().__init__("unet_32")

    def forward(self, image):
        return -image

    def decoder_maps(self, image):
        raise AssertionError("the networks of these tests take the virtual image only")


class Maps(nn.Module):
    """An encoder whose maps are all its input."""

    def forward(self, x):
        return [x] * 5


class Red(nn.Module):
    """A decoder whose logit is a channel of its input."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel

    def forward(self, fused, skips):
        return fused[:, self.channel : self.channel + 1]


def network(channel):
    """A SegmentationNet whose answer is a channel of H&E (0) or of the virtual image (3)."""
    net = SegmentationNet(Inverted(), False, 8, "virtual_rgb_input")
    net.encoder, net.decoder = Maps(), Red(channel)
    return net.eval()


class Tiles:
    """Five tiles of 32 x 64 px, one gray each; the left half is positive in truth, or nothing.

    The virtual image is bright where H&E is dark: tiles 0, 2 and 4 are positive to the network.
    """

    grays = (40, 220, 60, 200, 80)
    tiles = tuple(f"t{place}" for place in range(5))

    def __len__(self):
        return 5

    def stored(self, place):
        gray = np.full((32, 64, 3), self.grays[place], np.uint8)
        mask = np.zeros((32, 64), np.uint8)
        if place in (0, 2, 4):
            mask[:, :32] = 2
        # A quarter of the pixels is excluded.
        mask[:16, 32:] = 32
        return {"tile": f"t{place}", "he": gray, "her2": 255 - gray // 2, "mask": mask}

    def background(self, place, stain):
        return 255, 255, 255


FACTS = {
    f"t{place}": {"tile": f"t{place}", "case": case, "dataset": "bci", "score": "2+"}
    for place, case in enumerate(CASES)
}


def measured(net):
    rows = branch_swap.measure(Network(net, True), Tiles(), FACTS, CPU, OPTIONS)
    return rows, {(row["tile"], row["method"]): row for row in rows}


def own_rows(positive):
    """Rows of SegmentationNet whose answer is `positive` for a tile as a whole."""
    rows = []
    for place in range(5):
        item = Tiles().stored(place)
        truth, valid = item["mask"] == 2, item["mask"] != 32
        counts = confusion(np.full(truth.shape, positive[place]), truth, valid)
        rows.append(
            FACTS[f"t{place}"]
            | {"network": "segmentation", "method": SEGMENTER}
            | dict(zip(COUNTS, counts, strict=True))
        )
    return rows


def test_a_network_that_obeys_its_branch_gives_the_answer_of_the_other_tile(tmp_path):
    rows, found = measured(network(3))
    tables.write(tmp_path / "tiles.parquet", rows, tables.EVALUATION_TILES, {})
    others = branch_swap.partners(CASES)
    bright = [gray < 128 for gray in Tiles.grays]
    valid = 32 * 64 * 3 // 4
    for place, other in enumerate(others):
        swapped = found[f"t{place}", "branch_other_tile"]
        assert swapped["changed_px"] == (valid if bright[place] != bright[other] else 0)
        positive = swapped["true_positive_px"] + swapped["false_positive_px"]
        assert positive == (valid if bright[other] else 0)
        # A logit of zero is a probability of a half, from which a pixel is positive.
        zeros = found[f"t{place}", "branch_zeros"]
        assert zeros["changed_px"] == (0 if bright[place] else valid)
        # The real image is bright for every tile: 255 less at most 110.
        real = found[f"t{place}", "branch_real_her2"]
        assert real["true_positive_px"] + real["false_positive_px"] == valid


def test_the_figures_are_those_counted_by_hand():
    """By its own branch tiles 0, 2, 4: 1024 px each true, 512 false; others none: F1 .8."""
    rows, _ = measured(network(3))
    own = own_rows([gray < 128 for gray in Tiles.grays])
    found = {
        (row["metric"], row["aggregation"]): row
        for row in branch_swap.summarise(rows, own, OPTIONS)
    }
    # Sorted by case and shifted by two: tiles 3 and 4 change.
    assert branch_swap.partners(CASES) == [2, 3, 4, 0, 1]
    changed = found["branch_changed", "other_tile"]
    assert (changed["value"], changed["tiles"]) == (2 / 5, 5)
    # 2 x 1024 true, 2 x 512 + 1536 false, 1024 missed, against 3 x 1024 true, 3 x 512 false.
    after, before = 4096 / (4096 + 2560 + 1024), 6144 / (6144 + 1536)
    change = found["branch_f1_change", "other_tile"]
    assert change["value"] == pytest.approx(after - before)
    assert change["low"] <= change["value"] <= change["high"]
    # With zeros every pixel is positive: 3 x 1024 true, 3 x 512 + 2 x 1536 false.
    zeros = 6144 / (6144 + 4608)
    assert found["branch_f1_change", "zeros"]["value"] == pytest.approx(zeros - before)
    assert found["branch_changed", "zeros"]["value"] == 2 / 5
    assert {row["method"] for row in found.values()} == {SEGMENTER}


def test_a_network_that_ignores_its_branch_does_not_change():
    rows, _ = measured(network(0))
    assert {row["method"] for row in rows} == {
        branch_swap.method(name) for name in branch_swap.SWAPS
    }
    assert not any(row["changed_px"] for row in rows)


@pytest.mark.parametrize("branch", ["skip16", "decoder_maps"])
def test_maps_of_layers_have_no_real_her2(branch):
    net = SegmentationNet(build_generator("unet_128", 4), False, 8, branch).eval()
    tiles = Tiles()
    tiles.stored = lambda place: {
        name: value if name == "tile" else np.tile(value, (4, 2, *([1] * (value.ndim - 2))))
        for name, value in Tiles().stored(place).items()
    }
    rows = branch_swap.measure(Network(net, True), tiles, FACTS, CPU, OPTIONS.replace(swap_tiles=2))
    assert [row["method"] for row in rows] == ["branch_other_tile", "branch_zeros"] * 2
    assert {row["tile"] for row in rows} == {"t0", "t4"}


def test_without_a_branch_there_is_nothing_to_exchange():
    net = SegmentationNet(None, False, 8).eval()
    assert measured(net)[0] == []
    assert branch_swap.summarise([], [], OPTIONS) == []
