"""A plain training loop of both networks, as of pix2pix: the other side of `training.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision.transforms import functional as transforms

from hemera.config import TrainGenerationOptions
from hemera.masks import label_format
from hemera.networks import losses


class PlainTiles(Dataset[dict[str, Any]]):
    """Three PNG per tile, each flipped and scaled by itself, as in the public training scripts."""

    def __init__(self, folder: Path, side: int) -> None:
        """List the tiles."""
        self.folder = folder
        self.side = side
        self.tiles = sorted(path.name.split(".")[0] for path in folder.glob("*.he.png"))

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tiles)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return a tile as both networks take it."""
        flip = torch.rand(()).item() < 0.5
        images = {}
        for name in ("he", "her2", "mask"):
            with PIL.Image.open(self.folder / f"{self.tiles[i]}.{name}.png") as image:
                seen = transforms.center_crop(image, [self.side])
                images[name] = transforms.hflip(seen) if flip else seen
        label = np.array(images["mask"])
        distance = distance_transform_edt(label_format.nuclei(label))
        return {
            "he": transforms.normalize(transforms.to_tensor(images["he"]), [0.5] * 3, [0.5] * 3),
            "her2": transforms.normalize(
                transforms.to_tensor(images["her2"]), [0.5] * 3, [0.5] * 3
            ),
            "weight": torch.from_numpy((distance + 1) / (distance + 1).max()).float()[None],
            "positive": torch.from_numpy(label_format.positive(label)).float()[None],
            "valid": torch.ones(1, *label.shape, dtype=torch.bool),
            "her2_background": torch.ones(3, 1, 1),
        }


def plain_pyramid(image: Tensor) -> list[Tensor]:
    """Blur by grouped convolutions, four times a level, as the public code does."""
    side = np.exp(-0.5) / (1 + 2 * np.exp(-0.5))
    taps = torch.tensor([side, 1 - 2 * side, side], dtype=image.dtype, device=image.device)
    kernel = torch.outer(taps, taps).expand(image.shape[1], 1, 3, 3)
    found = [image]
    for _ in range(3):
        for _ in range(4):
            padded = functional.pad(image, (1, 1, 1, 1), mode="reflect")
            image = functional.conv2d(padded, kernel, groups=image.shape[1])
        image = image[..., ::2, ::2]
        found.append(image)
    return found


def plain_generation_step(
    batch: dict[str, Any],
    modules: dict[str, nn.Module],
    optimisers: dict[str, torch.optim.Optimizer],
    device: torch.device,
    options: TrainGenerationOptions,
) -> dict[str, Tensor]:
    """Take one step of GenerationNet."""
    net, discriminator = modules["generator"], modules["discriminator"]
    names = ("he", "her2", "weight", "her2_background")
    source, target, weight, background = (batch[name].to(device) for name in names)
    entropy = nn.BCEWithLogitsLoss()

    def loss_of(image: Tensor, real: bool) -> Tensor:
        logits = discriminator(torch.cat((source, image), 1))
        return entropy(logits, torch.full_like(logits, float(real)))

    generated = net(source)
    discriminator.requires_grad_(True)
    optimisers["discriminator"].zero_grad()
    discriminator_loss = 0.5 * (loss_of(generated.detach(), False) + loss_of(target, True))
    discriminator_loss.backward()
    optimisers["discriminator"].step()
    discriminator.requires_grad_(False)
    optimisers["generator"].zero_grad()
    fooled = loss_of(generated, True)
    pyramids = (plain_pyramid(generated * weight), plain_pyramid(target * weight))
    levels = [functional.l1_loss(a, b) for a, b in zip(*pyramids, strict=True)]
    maps = [
        losses.soft_dab((image + 1) / 2, background, options.dice_slope, options.dice_threshold)
        for image in (generated, target)
    ]
    dice = losses.balanced_dice(maps[0], maps[1], weight)
    total = fooled + dice
    for factor, level in zip(options.l1_weights, levels, strict=True):
        total = total + factor * level
    total.backward()
    optimisers["generator"].step()
    found = {"total": total, "discriminator": discriminator_loss, "dice": dice}
    return {name: value.detach() for name, value in found.items()}


def plain_segmentation_step(
    batch: dict[str, Any], net: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> dict[str, Tensor]:
    """Take one step of SegmentationNet."""
    image, truth = ((batch["he"].to(device) + 1) / 2, batch["positive"].to(device))
    optimiser.zero_grad()
    logits = net(image)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth)
    probability = torch.sigmoid(logits)
    dice = 1 - (2 * (probability * truth).sum() + 1e-6) / (probability.sum() + truth.sum() + 1e-6)
    total = 0.5 * entropy + 0.5 * dice
    total.backward()
    optimiser.step()
    return {"total": total.detach(), "dice": dice.detach()}
