"""One training step of both networks against a plain pix2pix-style loop with the same arithmetic.

Both sides have the same networks, losses, batches and optimisers' formulas, and begin with the same
weights; their losses on one batch are printed beside each other. The plain loop is what a training
script does: a folder of PNG, flips and distance maps per sample on the processor, single precision,
tensors channels first, two pyramids where one would do. Losses of both sides are read once a round,
as the public loop reads them every hundred steps. HEMERA's side is what its stages run with
`deterministic: false`, or what its name states. Both run in one session: kernels need not be
deterministic, cuDNN tries which is fastest, TF32 is as in torch's defaults. On a GPU its peak
memory, the kernels of a step, and the fraction of the time in which kernels ran are printed too.
Goal: at least twice as fast on a GPU (stretch 3), busy above .9.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _plain_training import PlainTiles, plain_generation_step, plain_segmentation_step
from _synthetic import ratio
from access import write_tiles
from torch import nn
from torch.utils.data import DataLoader

from hemera.config import TrainGenerationOptions, TrainSegmentationOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.networks.discriminator import PatchGAN
from hemera.networks.generation import build_generator, initialise
from hemera.networks.segmentation import SegmentationNet
from hemera.stages import train_generation, train_segmentation
from hemera.training import session
from hemera.training.batches import TrainingSampler, prefetch_to_device, training_loader
from hemera.training.checkpoint import TrainingState
from hemera.training.cuda_graph import WARM_UP, repeated_step

ROUNDS = 5


def forever(make: Callable[[int], DataLoader[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield batches, epoch after epoch."""
    for epoch in itertools.count(1):
        yield from make(epoch)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network with the same initial weights for both sides."""
    torch.manual_seed(0)
    return build()


class Side:
    """One contestant: its batches and its step."""

    def __init__(
        self,
        name: str,
        batches: Iterator[dict[str, Any]],
        step: Callable[[dict[str, Any]], object],
        finish: Callable[[], object],
        deterministic: bool = False,
    ) -> None:
        """Store the arguments."""
        self.name = name
        self.deterministic = deterministic
        self.memory_bytes = 0
        self.batches = batches
        self.step = step
        self.finish = finish

    def run(self, steps: int) -> float:
        """Take so many steps; return the seconds they took."""
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not self.deterministic
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        found = [self.step(next(self.batches)) for _ in range(steps)]
        if isinstance(found[-1], dict):
            # Losses are read once a round.
            [float(value) for value in found[-1].values()]
        self.finish()
        took = time.perf_counter() - started
        if gpu:
            self.memory_bytes = max(self.memory_bytes, torch.cuda.max_memory_allocated())
        return took

    def profiled(self, steps: int) -> tuple[float, float]:
        """Return the kernels of a step, and the fraction of the time in which one ran."""
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as seen:
            took = self.run(steps)
        kernels = [each for each in seen.events() if each.device_type.name == "CUDA"]
        busy_s = sum(each.time_range.elapsed_us() for each in kernels) / 1e6
        return len(kernels) / steps, busy_s / took


class Contest:
    """Both sides of one network, on one device."""

    def __init__(self, index: Path, network: str, batch: int, given: argparse.Namespace) -> None:
        """Return the network and its size as text."""
        self.index = index
        self.network = network
        self.device = session.find_device("auto")
        self.gpu = self.device.type == "cuda"
        self.side = given.side or (512 if self.gpu else 256)
        self.batch = batch
        self.workers = given.workers if given.workers is not None else (6 if self.gpu else 0)
        stained = ("he", "her2", "weight", "valid", "her2_background")
        self.images = stained if network == "generation" else ("he", "positive", "valid")
        self.crop_px = None if self.side == 512 else self.side

    def finish(self) -> None:
        """Wait for the GPU."""
        if self.gpu:
            torch.cuda.synchronize()

    def ours(self, name: str, **changes: Any) -> Side:
        """Return HEMERA's side."""
        deterministic = changes.pop("deterministic", False)
        own: dict[str, Any] = {"batch_size": self.batch, "workers": self.workers, **changes}
        if self.network == "generation":
            options: Any = TrainGenerationOptions(
                crop_px=self.crop_px, network=self.generator, **own
            )
        else:
            options = TrainSegmentationOptions(crop_px=self.crop_px, encoder_weights=None, **own)
        graphed = options.cuda_graph and self.gpu
        compute = session.Compute(
            self.device, precision=session.PRECISIONS[options.precision], compile=options.compile,
            graphed=graphed,
        )  # fmt: skip
        tiles = TileDataset(
            self.index, images=self.images, crop_px=self.crop_px,
            flips=(1,), seed=0,
        )  # fmt: skip
        sampler = TrainingSampler(len(tiles), options.replace(epochs=10_000))
        batches = prefetch_to_device(
            training_loader(tiles, sampler, self.workers, compute), self.device
        )
        modules = self.modules()
        for module in modules.values():
            compute.prepare(module)
        optimisers = self.optimisers(modules, fused=True)
        if graphed:
            for group in (group for each in optimisers.values() for group in each.param_groups):
                group |= {"capturable": True, "lr": compute.learning_rate(group["lr"])}
        unused: Any = None
        state = TrainingState(Path("unused"), options, unused, compute, modules, optimisers, {})
        stage: Any = train_generation if self.network == "generation" else train_segmentation
        take_step = repeated_step(
            lambda batches: stage.train_step(batches, state, options), compute
        )
        return Side(
            name, iter(batches), lambda batch: take_step([batch], None), self.finish, deterministic
        )

    def plain(self) -> Side:
        """Return the plain loop."""
        tiles = PlainTiles(self.index.parent.parent / "png", self.side)
        modules = self.modules()
        for module in modules.values():
            module.to(self.device).train()
        optimisers = self.optimisers(modules, fused=False)
        options = TrainGenerationOptions()

        def step(batch: dict[str, Any]) -> object:
            if self.network == "generation":
                return plain_generation_step(batch, modules, optimisers, self.device, options)
            net, optimiser = modules["segmenter"], optimisers["segmenter"]
            return plain_segmentation_step(batch, net, optimiser, self.device)

        def make(epoch: int) -> DataLoader[dict[str, Any]]:
            return DataLoader(
                tiles, self.batch, shuffle=True, drop_last=True, num_workers=self.workers,
                pin_memory=self.gpu,
            )  # fmt: skip

        return Side("plain loop", forever(make), step, self.finish)

    @property
    def generator(self) -> str:
        """The U-Net that fits the side."""
        return next(f"unet_{step}" for step in (512, 256, 128) if self.side % step == 0)

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks, drawn from the same numbers."""

        def generator() -> nn.Module:
            net = build_generator(self.generator)
            initialise(net)
            return net

        def discriminator() -> nn.Module:
            net = PatchGAN()
            initialise(net)
            return net

        if self.network == "generation":
            return {"generator": seeded(generator), "discriminator": seeded(discriminator)}
        return {"segmenter": seeded(lambda: SegmentationNet(generator()))}

    def optimisers(
        self, modules: dict[str, nn.Module], fused: bool
    ) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers of the paper."""
        if self.network == "segmentation":
            own = [p for p in modules["segmenter"].parameters() if p.requires_grad]
            return {"segmenter": torch.optim.AdamW(own, 2e-4, fused=fused)}
        return {
            name: torch.optim.Adam(module.parameters(), 2e-4, (0.5, 0.999), fused=fused)
            for name, module in modules.items()
        }

    def agree(self) -> None:
        """Print the losses of both sides on one batch."""
        tiles = PlainTiles(self.index.parent.parent / "png", self.side)
        places = torch.utils.data.default_collate([tiles[i] for i in range(self.batch)])
        he, her2 = (((places[k] + 1) * 127.5).round().to(torch.uint8) for k in ("he", "her2"))
        same = {
            "he": he, "her2": her2, "weight": places["weight"], "positive": places["positive"] > 0,
            "valid": places["valid"], "her2_background": places["her2_background"],
        }  # fmt: skip
        found = [
            self.plain().step(places),
            self.ours("once").step({name: value.to(self.device) for name, value in same.items()}),
        ]
        assert isinstance(found[0], dict)
        assert isinstance(found[1], dict)
        shown = ", ".join(
            f"{name} {float(value):.5f} and {float(found[1][name]):.5f}"
            for name, value in found[0].items()
        )
        sys.stdout.write(f"  losses on one batch, plain and HEMERA: {shown}\n")

    def measure(self, sides: list[Side], steps: int) -> None:
        """Let the sides take steps in turn and print samples per second and ratios."""
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        for side in sides:
            # Fills caches, chooses kernels, compiles, captures.
            side.run(WARM_UP + 1)
        for _ in range(ROUNDS):
            for side in sides:
                times[side.name].append(side.run(steps))
        for name, each in times.items():
            speed = steps * self.batch / statistics.median(each)
            line = f"  {name:<26} {speed:8.2f} samples/s"
            if name != "plain loop":
                middle, least, most = ratio(times, "plain loop", name)
                line += f", {middle:.2f} x the plain loop ({least:.2f} to {most:.2f})"
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def profile(self, sides: list[Side], steps: int) -> None:
        """Print the kernels of each side's steps, how busy they keep a GPU, and its memory."""
        for side in sides:
            kernels, busy = side.profiled(steps)
            sys.stdout.write(
                f"  {side.name:<26} {kernels:8.0f} kernels a step, busy {busy:.2f}, at most "
                f"{side.memory_bytes / 2**30:.2f} GiB\n"
            )


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Open the session that both sides run in, and print its settings."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    threads = torch.get_num_threads()
    with session.session(seed=0, threads=threads, device="auto", deterministic=False):
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        settings = {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "cuDNN tries kernels": torch.backends.cudnn.benchmark,
            "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
            "TF32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
        }
        shown = ", ".join(f"{name}: {'yes' if on else 'no'}" for name, on in settings.items())
        sys.stdout.write(f"both sides, {threads} threads; {shown}\n")
        yield


def compete(contest: Contest, given: argparse.Namespace) -> None:
    """Measure the steps and the loaders of one network with one size of the batch."""
    steps = given.steps or (40 if contest.gpu else 3)
    where = torch.cuda.get_device_name() if contest.gpu else (
        f"{torch.get_num_threads()} threads of the processor"
    )  # fmt: skip
    sys.stdout.write(
        f"{contest.network}, {contest.side} px, {contest.batch} tiles a step, {where}\n"
    )
    contest.agree()
    sides = [contest.plain(), contest.ours("HEMERA, float32")]
    if contest.gpu or given.all:
        sides += [
            contest.ours("HEMERA, deterministic", deterministic=True),
            contest.ours("HEMERA, bf16", precision="bf16"),
            contest.ours("HEMERA, bf16, compiled", precision="bf16", compile=True),
            contest.ours("HEMERA, CUDA graph", cuda_graph=True),
            contest.ours("HEMERA, bf16, CUDA graph", precision="bf16", cuda_graph=True),
        ]
    contest.measure(sides, steps)
    if contest.gpu or given.all:
        contest.profile(sides, steps)
    loaders = [
        Side("plain loop", contest.plain().batches, lambda batch: None, lambda: None),
        Side("HEMERA", contest.ours("loader").batches, lambda batch: None, lambda: None),
    ]
    sys.stdout.write(f"{contest.network}, the loader alone, {contest.workers} workers\n")
    contest.measure(loaders, max(steps, 10))


def main() -> None:
    """Measure both networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--side",
        type=int,
        help="side of a tile, px, 128 times a whole number; 512 on a GPU, else 256",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        help="tiles a step, one or more; on a GPU 1, 2, 4, 8 and 16, and 16 for SegmentationNet, "
        "else 2",
    )
    parser.add_argument(
        "--all", action="store_true", help="on a processor too: every precision, compiled, profiled"
    )
    parser.add_argument("--workers", type=int, help="reading processes; 6 with a GPU, else none")
    parser.add_argument("--steps", type=int, help="steps a round; 40 on a GPU, else 3")
    given = parser.parse_args()
    if given.side is not None and (given.side < 1 or given.side % 128):
        parser.error(f"--side {given.side}: give a multiple of 128")
    with tempfile.TemporaryDirectory() as name, alike():
        index = write_tiles(Path(name))
        gpu = session.find_device("auto").type == "cuda"
        batches = {"generation": (1, 2, 4, 8, 16), "segmentation": (16,)}
        for network, usual in batches.items():
            for batch in given.batch or (usual if gpu else (2,)):
                compete(Contest(index, network, batch, given), given)
    if session.find_device("auto").type != "cuda":
        sys.stdout.write("no GPU: the goal, 2 x on a GPU, is left open\n")


if __name__ == "__main__":
    main()
