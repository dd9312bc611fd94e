import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hemera.config import TrainGenerationOptions
from hemera.networks import losses
from hemera.networks.generation import build_generator
from hemera.stages import train_generation
from hemera.training import objectives
from hemera.training.checkpoint import TrainingState
from hemera.training.cuda_graph import WARM_UP, GraphedStep
from tests.small_networks import cpu_compute


class Replays:
    """A recorder for the processor: it executes nothing at the capture, and the run at a replay.

    As of a graph, results are always in the memory of the capture.
    """

    def __init__(self):
        self.captured = 0

    def warm_up(self):
        return contextlib.nullcontext()

    def capture(self, run):
        self.captured += 1
        found = {"loss": torch.full((), torch.nan, dtype=torch.float64)}

        def replay():
            for name, value in run().items():
                found[name].copy_(value)

        return replay, found


def training(rate):
    """Return a parameter, the learning rate of its optimiser, and a step."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimiser = torch.optim.SGD([weight], torch.tensor(rate, dtype=torch.float64), foreach=False)

    def step(batches):
        optimiser.zero_grad()
        found = torch.stack([((batch["x"] @ weight - batch["y"]) ** 2).mean() for batch in batches])
        found.sum().backward()
        optimiser.step()
        return {"loss": found.sum().detach()}

    return weight, optimiser.param_groups[0]["lr"], step


def test_repeated_steps_are_those_without_a_graph():
    """Batches of two shapes, two variants, and a learning rate that falls."""
    torch.manual_seed(0)
    sizes = [4] * 7 + [3] * 2 + [4] * 5
    batches = [
        [{"x": torch.randn(n, 3).double(), "y": torch.randn(n).double(), "tile": ["a"] * n}]
        for n in sizes
    ]
    recorder = Replays()
    (weight, rate, step), (expected, other_rate, plain) = training(0.05), training(0.05)
    graphed = GraphedStep(step, recorder)
    found = []
    for number, batch in enumerate(batches):
        if number == 8:
            rate.fill_(0.01)
            other_rate.fill_(0.01)
        found.append((graphed(batch, number == 10)["loss"], plain(batch)["loss"]))
    # Read only now: each loss has memory of its own.
    assert [float(own) for own, _ in found] == [float(other) for _, other in found]
    assert torch.equal(weight, expected)
    # Only batches of four came more often than WARM_UP times.
    assert recorder.captured == 1


def test_each_variant_has_a_graph_of_its_own():
    recorder = Replays()
    graphed = GraphedStep(training(0.05)[2], recorder)
    batch = [{"x": torch.ones(2, 3).double(), "y": torch.ones(2).double()}]
    for _ in range(WARM_UP + 2):
        graphed(batch, True)
        graphed(batch, False)
    assert recorder.captured == 2


def test_a_learning_rate_that_a_graph_reads_is_changed_in_its_place(tmp_path):
    weight, rate, _ = training(0.05)
    optimisers = {"net": torch.optim.SGD([weight], rate, foreach=False)}
    options = TrainGenerationOptions()
    state = TrainingState(tmp_path, options, None, cpu_compute(), {}, optimisers, {})
    state.set_learning_rate(0.01)
    assert optimisers["net"].param_groups[0]["lr"] is rate
    assert float(rate) == 0.01


class NothingIsRead(TorchDispatchMode):
    """Raises where a value of a tensor, or a number of them, is read: a GPU would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if any(each in name for each in ("_local_scalar_dense", "nonzero", "masked_select")):
            raise AssertionError(f"{name} reads a value")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("updates", [1, objectives.R1_EVERY])
def test_a_step_reads_no_value_of_a_tensor(updates, tmp_path):
    """A value that is read can be neither captured nor repeated; all losses that may be."""
    options = TrainGenerationOptions(
        network="unet_32", base_width=4, discriminator_width=4, crop_px=64, batch_size=2,
        norm="instance", spectral_norm=True, gan_loss="hinge", shift_px=3, variance_weight=1,
        coarse_l1_weight=1, dab_percentile_weight=1, stain_color_weight=1, r1_weight=1,
        feature_matching_weight=1, clip_norm=1,
    )  # fmt: skip
    torch.manual_seed(0)
    modules = {
        "generator": build_generator(options.network, options.base_width, options.norm),
        "discriminator": objectives.discriminator_for(options),
    }
    # The fused optimiser of the processor reads its step; that of a GPU does not.
    optimisers = {
        name: torch.optim.SGD(module.parameters(), 0.1, foreach=False)
        for name, module in modules.items()
    }
    state = TrainingState(tmp_path, options, None, cpu_compute(), modules, optimisers, {})
    state.progress.updates = updates
    images = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    batch = {
        "he": images[0], "her2": images[1], "weight": torch.rand(2, 1, 64, 64),
        "valid": torch.rand(2, 1, 64, 64) > 0.1, "her2_background": torch.full((2, 3, 1, 1), 0.9),
    }  # fmt: skip
    # What warm-up steps compute once.
    losses.pyramid(torch.rand(1, 3, 64, 64), 4)
    losses.best_shifts(*torch.rand(2, 1, 3, 64, 64), options.shift_px)
    with NothingIsRead():
        found = train_generation.train_step([batch], state, options)
    assert (float(found["r1"]) > 0) == (updates == objectives.R1_EVERY)
    assert set(objectives.WEIGHTED) - set(found) == {
        "lpips_half", "lpips_quarter", "nce", "supervised_nce"
    }  # fmt: skip
