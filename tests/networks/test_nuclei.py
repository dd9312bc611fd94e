"""The network of nuclei: input, shape, size, and the same output when it is fused."""

import copy

import numpy as np
import torch

from hemera.networks.nuclei import MULTIPLE, NucleusNet, encode, fused


def test_input_is_density_over_the_background_and_bounded() -> None:
    rgb = np.array([[[240, 240, 240], [24, 24, 240], [0, 255, 120]]], np.uint8)
    found = encode(rgb, (240, 240, 240))
    assert found.dtype == np.float32 and found.shape == rgb.shape
    np.testing.assert_allclose(found[0, 0], 0, atol=1e-6)
    np.testing.assert_allclose(found[0, 1], [2.5, 2.5, 0], rtol=1e-6)
    np.testing.assert_allclose(found[0, 2], [2.5, 0, 2.5 * np.log10(2)], rtol=1e-6)


def test_two_maps_of_the_size_of_the_input_and_few_parameters() -> None:
    net = NucleusNet().eval()
    assert sum(p.numel() for p in net.parameters()) <= 440_000
    with torch.inference_mode():
        assert net(torch.zeros(2, 3, 4 * MULTIPLE, 3 * MULTIPLE)).shape == (2, 2, 64, 48)


def test_fused_is_equal_up_to_rounding() -> None:
    torch.manual_seed(0)
    net = NucleusNet()
    drawn = torch.rand(4, 3, 64, 64) * 2.5
    net(drawn)  # other statistics than those it was made with
    net.eval()
    quick = fused(copy.deepcopy(net))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in quick.modules())
    with torch.inference_mode():
        torch.testing.assert_close(quick(drawn), net(drawn), rtol=1e-4, atol=1e-4)
