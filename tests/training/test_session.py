import shutil

import pytest
import torch
import torch.utils.deterministic

from hemera.errors import TrainingError
from hemera.training import session
from tests.small_networks import cpu_compute


def settings():
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_session_seeds_and_restores_every_setting(deterministic):
    torch.manual_seed(11)
    before = (torch.get_rng_state(), settings())
    drawn = []
    for seed in (5, 5, 6):
        with session.session(
            seed=seed, threads=1, device="cpu", deterministic=deterministic, tf32=True
        ) as device:
            assert device.type == "cpu"
            assert settings() == (1, deterministic, False, not deterministic, True, True)
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert settings() == before[1]


def test_settings_are_restored_after_an_exception():
    before = (torch.get_rng_state(), settings())
    with (
        pytest.raises(ValueError, match="inside"),
        session.session(seed=5, threads=1, device="cpu", deterministic=True, tf32=True),
    ):
        torch.rand(3)
        raise ValueError("inside")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert settings() == before[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_with_a_remedy():
    with pytest.raises(TrainingError, match=r"PyTorch finds no GPU; set device: auto or cpu"):
        session.find_device("cuda")
    assert session.find_device("auto").type == "cpu"


def test_compiling_without_a_compiler_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(TrainingError, match=r"compile: true, .* install g\+\+ or set"):
        cpu_compute(compile=True).prepare(torch.nn.Linear(2, 1))


@pytest.mark.parametrize(("clip_norm", "expected"), [(0, (3, 4)), (10, (3, 4)), (0.5, (0.3, 0.4))])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_a_long_gradient_is_scaled_to_the_largest_norm(clip_norm, expected, precision):
    """A gradient (3, 4) of norm 5; the scale of fp16 is removed before."""
    compute = cpu_compute(precision)
    net = torch.nn.Linear(2, 1, bias=False)
    before = net.weight.detach().clone()
    compute.backward((net.weight * torch.tensor([3.0, 4.0])).sum(), 1)
    compute.update(torch.optim.SGD(net.parameters(), 1.0), net, clip_norm)
    assert (before - net.weight)[0].tolist() == pytest.approx(expected, rel=1e-5)
