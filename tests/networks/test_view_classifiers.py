"""The networks of Oyelade et al.: sizes, shapes, areas."""

import pytest
import torch

from hemera.networks.view_classifiers import StainMap, ViewClassifier, area_fractions


def test_the_classifier_of_the_tumour_has_the_size_of_the_paper():
    net = ViewClassifier(2)
    assert sum(each.numel() for each in net.parameters()) == 21_666_434


@torch.no_grad()
def test_views_of_any_side_are_classified():
    net = ViewClassifier(4, "vit_tiny_patch16_224", 32).eval()
    views = torch.rand(2, 3, 48, 48)
    assert net(views).shape == (2, 4)


@torch.no_grad()
def test_a_view_is_shifted_and_scaled_by_one_half():
    net = ViewClassifier(2, "vit_tiny_patch16_224", 32).eval()
    seen = []
    net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.tensor([0.0, 0.5, 1.0])[None, :, None, None].expand(1, 3, 32, 32))
    assert seen[0].amin((0, 2, 3)).tolist() == seen[0].amax((0, 2, 3)).tolist() == [-1, 0, 1]


@torch.no_grad()
def test_a_map_has_the_size_of_the_view():
    assert StainMap().eval()(torch.rand(1, 3, 64, 96)).shape == (1, 5, 64, 96)
    assert StainMap(input_px=32).eval()(torch.rand(1, 3, 60, 60)).shape == (1, 5, 60, 60)


def test_areas_are_the_fractions_of_the_likeliest_class():
    classes = torch.tensor([[[0, 1, 2, 2], [3, 3, 3, 4]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    logits = torch.nn.functional.one_hot(classes, 5).permute(0, 3, 1, 2).float()
    found = area_fractions(logits).tolist()
    assert found[0] == pytest.approx([1 / 8, 2 / 8, 3 / 8, 1 / 8]) and found[1] == [0, 0, 0, 0]
