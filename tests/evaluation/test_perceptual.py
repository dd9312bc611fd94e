"""InceptionV3 and LPIPS from files: what is loaded, and what is an error."""

import socket

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchvision.models import alexnet

from hemera.errors import TrainingError
from hemera.evaluation import perceptual
from hemera.evaluation.perceptual import Inception, Lpips, frechet_distance, kernel_distance
from tests.small_index import draw_tile
from tests.small_weights import bare_inception, write_alexnet, write_inception

CPU = torch.device("cpu")
EXTRACTORS = (Inception, Lpips)


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Make any use of the network fail."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args, **kwargs):
            raise AssertionError("the network was used")

        patch.setattr(socket, "create_connection", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {
        Inception: write_inception(folder / "inception.pth"),
        Lpips: write_alexnet(folder / "alexnet.pth"),
    }


@pytest.fixture(scope="module")
def pictures():
    """A real tile, one somewhat blurred, one much, of 96 x 160."""
    _, her2, _ = draw_tile(3, 96, 160)
    return [her2, *(cv2.GaussianBlur(her2, (0, 0), sigma) for sigma in (1.5, 6))]


def test_features_are_those_of_the_package_with_these_weights(files, pictures):
    found = Inception(files[Inception], CPU)(np.stack(pictures))
    net = bare_inception()
    nn.Module.load_state_dict(net, torch.load(files[Inception], weights_only=True))
    planes = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    assert found.shape == (3, 2048)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, net(planes)[0].numpy(), rtol=1e-4, atol=1e-4)
    near, far = (np.abs(found[0] - found[k]).mean() for k in (1, 2))
    assert 0 < near < far


def test_lpips_uses_these_weights_and_increases_with_the_blur(files, pictures):
    lpips = Lpips(files[Lpips], CPU)
    real, *generated = pictures
    assert lpips(real[None], real) == [0.0]
    found = lpips(np.stack(generated), real)
    assert 0 < found[0] < found[1]

    net = alexnet(weights=None)
    net.load_state_dict(torch.load(files[Lpips], weights_only=True), strict=False)
    image = torch.from_numpy(real).permute(2, 0, 1)[None].float()
    expected, layer = [], image
    for number, module in enumerate(net.features):
        layer = module(layer)
        if number in (1, 4, 7, 9, 11):
            expected.append(layer.clone())
    for mine, theirs in zip(lpips._net.net(image), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, or not plain weights"),
        (b"<html>404</html>", "not plain weights"),
        ("truncated", "damaged, or not plain weights"),
        ([1, 2], "contains a list, not the weights of a network"),
        ({}, "weights of another network"),
        ({1: torch.zeros(3)}, "weights of another network"),
        ("the other's", "weights of another network"),
        ("none", "no such file"),
    ],
    ids=str,
)
def test_a_wrong_file_is_an_error_of_one_line(extractor, content, message, files, tmp_path):
    path = tmp_path / "weights.pth"
    other = files[Lpips if extractor is Inception else Inception]
    if content == "truncated":
        path.write_bytes(files[extractor].read_bytes()[:100_000])
    elif content == "the other's":
        path.write_bytes(other.read_bytes())
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content != "none":
        torch.save(content, path)
    with pytest.raises(TrainingError) as error:
        extractor(path, CPU)
    words = str(error.value)
    assert message in words and str(path) in words
    assert "\n" not in words and len(words) < 600
    assert ("fid_weights" if extractor is Inception else "lpips_weights") in words


def test_weights_that_are_not_finite_are_an_error(files, pictures, tmp_path):
    state = torch.load(files[Inception], weights_only=True)
    name = "Mixed_7c.branch1x1.conv.weight"
    state[name] = torch.full_like(state[name].contiguous(), float("nan"))
    torch.save(state, tmp_path / "weights.pth")
    inception = Inception(tmp_path / "weights.pth", CPU)
    with pytest.raises(TrainingError, match="features are not finite"):
        inception(np.stack(pictures))


# --- distances of sets ---------------------------------------------------------------------------


def test_the_frechet_distance_of_two_gaussians_by_hand():
    """Variances 8/3 and 2/3 against 6 and 54, correlated nowhere, means 3 and 4 apart.

    25 + (sqrt(8/3) - sqrt(6))^2 + (sqrt(2/3) - sqrt(54))^2 = 25 + 2/3 + 128/3 = 205/3.
    """
    x = np.array([[2, 0], [-2, 0], [0, 1], [0, -1]], np.float32)
    y = np.array([[6, 4], [0, 4], [3, 13], [3, -5]], np.float32)
    assert frechet_distance(x, y) == pytest.approx(205 / 3)
    assert frechet_distance(y, x) == pytest.approx(205 / 3)


@pytest.mark.parametrize("counts", [(300, 170), (20, 15)], ids=["many", "fewer than features"])
def test_the_frechet_distance_is_that_of_torch_fidelity(counts):
    rng = np.random.default_rng(4)
    x, y = (
        torch.from_numpy(rng.gamma(2, size=(n, 40)) @ rng.normal(size=(40, 40))) for n in counts
    )
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(x), fid_features_to_statistics(y), False
    )["frechet_inception_distance"]
    assert frechet_distance(x.numpy(), y.numpy()) == pytest.approx(expected, rel=1e-5)


def test_the_kernel_distance_by_hand():
    """x = 0, 2 and y = 1, 3 on a line: k(0,2) = 1, k(1,3) = 64, k(x,y) = 1, 1, 27, 343."""
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]])
    found = kernel_distance(x, y, seed=0)
    assert found.value == pytest.approx(1 + 64 - 2 * (1 + 1 + 27 + 343) / 4)
    assert (found.deviation, found.tiles) == (None, 2)


def test_the_kernel_distance_of_many_is_a_mean_over_subsets(monkeypatch):
    rng = np.random.default_rng(4)
    x, y = (rng.normal(shift, 1, (90, 12)).astype(np.float32) for shift in (0, 0.3))
    found = kernel_distance(x, y, seed=0)
    monkeypatch.setattr(perceptual, "KID_SUBSET_SIZE", 30)
    parts = kernel_distance(x, y, seed=0)
    assert parts.deviation > 0
    assert parts.value == pytest.approx(found.value, abs=3 * parts.deviation / 10)
    assert parts == kernel_distance(x, y, seed=0) != kernel_distance(x, y, seed=1)


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_is_no_set(count):
    few, many = np.zeros((count, 8), np.float32), np.ones((9, 8), np.float32)
    assert frechet_distance(few, many) is None
    assert frechet_distance(many, few) is None
    assert kernel_distance(few, many, seed=0) == (None, None, count, None, None)


def test_lpips_as_a_loss_is_the_distance_of_the_package_with_a_gradient(files):
    lpips = Lpips(files[Lpips], CPU)
    images = np.random.default_rng(6).integers(0, 256, (3, 64, 40, 3)).astype(np.uint8)
    planes = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    found = lpips.distance(planes[:2].requires_grad_(), planes[2:].expand(2, -1, -1, -1))
    assert found.tolist() == pytest.approx(lpips(images[:2], images[2]), rel=1e-4)
    # Places where no feature is active, for which the package has no gradient.
    with torch.no_grad():
        for layer in lpips._net.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None:
                layer.bias.fill_(-1e4)
    generated = planes[:1].detach().requires_grad_()
    lpips.distance(generated, planes[2:]).sum().backward()
    assert bool(torch.isfinite(generated.grad).all())
