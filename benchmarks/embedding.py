"""What stage embed costs beside the forward pass of its network, and how fast a bag is read.

ViT-S/16 with random weights on tiles of 512 px, JPEG of quality 95, cut into 2 x 2 views; one
thread, in turn with the network alone on as many views in memory. Goal: at least .85 of the speed
of the forward pass. A bag of 5,000 views of 1,536 features is read in at most 3 ms of processor
time, and at least 10 times faster than from chunks of one row, as TRIDENT writes them. Peak memory
of the stage with a small ViT (timm's test_vit) and 1,000 or 20,000 tiles, beside that of PyTorch
and timm with the network alone: at most 1 GiB more.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import PIL.Image
import torch
from _synthetic import texture
from safetensors.torch import save_file

from hemera import tables
from hemera.config import DescribeOptions, EmbedOptions, TileOptions
from hemera.dataset.features import FeatureFile, ViewList, write_features
from hemera.networks.encoders import timm_network
from hemera.networks.tile_encoders import load_tile_encoder
from hemera.sheet import read_sheet, units, write_rows
from hemera.stages import describe, embed, tile

SIDE_PX = 2048
TILE_PX = 512
SPLIT = 2
BATCH = 16
ROUNDS = 5
BAG = (5000, 1536)


def seconds(call: Callable[[], Any]) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def write_tiles(folder: Path) -> dict[str, Path]:
    """Describe and tile one H&E image; return the inputs of stage embed."""
    PIL.Image.fromarray(texture(SIDE_PX, 1)).save(folder / "he.png")
    row = {"pair": "p", "case": "c", "dataset": "d", "he": "he.png", "he_mpp": "0.5"}
    (folder / "sheet.tsv").write_text(write_rows([row]))
    (unit,) = units(read_sheet(folder / "sheet.tsv"), 1)
    of_unit: dict[str, Any] = {"sheet": folder / "sheet.tsv", "unit": unit, "block_count": 1}
    of_unit["images_table"] = folder / "images.parquet"
    describe.run(**of_unit, options=DescribeOptions())
    tile.run(
        **of_unit, shard=folder / "p.tar", tiles=folder / "p.parquet",
        pairs=folder / "pairs.parquet", options=TileOptions(size_px=TILE_PX),
    )  # fmt: skip
    images, tiles, shard = (folder / name for name in ("images.parquet", "p.parquet", "p.tar"))
    return {"images_table": images, "tiles": tiles, "tile_shard": shard}


def write_network(folder: Path, architecture: str) -> Path:
    """Write a network of timm with random weights; return its folder."""
    network = folder / "vit"
    network.mkdir()
    save_file(timm_network(architecture, {}).state_dict(), network / "model.safetensors")
    (network / "config.json").write_text(json.dumps({"architecture": architecture}))
    return network


def peak_mib(folder: Path, tiles: int) -> float:
    """Return the peak memory of stage embed with so many tiles, or of its network alone for 0."""
    torch.set_num_threads(1)
    network = folder / "vit"
    if not tiles:
        load_tile_encoder("vit", network)
    else:
        rows = tables.read(folder / "p.parquet", tables.TILE).to_pylist()
        many = folder / f"{tiles}.parquet"
        named = [{**rows[n % len(rows)], "tile": f"t{n}"} for n in range(tiles)]
        tables.write(many, named, tables.TILE, tables.provenance(TileOptions(size_px=TILE_PX)))
        options = EmbedOptions(
            weights=(f"vit={network}",), split=SPLIT, min_view_tissue=0, readers=1, device="cpu",
            torch_threads=1,
        )  # fmt: skip
        embed.run(
            tiles=many, tile_shard=folder / "p.tar", images_table=folder / "images.parquet",
            encoder="vit", features=folder / "m.h5", options=options,
        )  # fmt: skip
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(folder: Path) -> None:
    """Print the peak memory of stage embed, each number in a process of its own."""
    write_tiles(folder)
    write_network(folder, "test_vit")
    context = multiprocessing.get_context("spawn")
    found = []
    for count in (0, 1000, 20000):
        with context.Pool(1) as pool:
            found.append(pool.apply(peak_mib, (folder, count)))
    alone, few, many = found
    print(
        f"peak memory: network alone {alone:.0f} MiB; embed of 1,000 tiles {few - alone:+.0f}, of "
        f"20,000 tiles {many - alone:+.0f}"
    )


def compare_embed(folder: Path) -> None:
    """Print the processor time per view of stage embed and of the forward pass."""
    network = write_network(folder, "vit_small_patch16_224")
    inputs = write_tiles(folder)
    options = EmbedOptions(
        weights=(f"vit={network}",), split=SPLIT, min_view_tissue=0, batch_size=BATCH, readers=1,
        device="cpu", torch_threads=1,
    )  # fmt: skip
    features = folder / "f.h5"

    def run() -> None:
        embed.run(**inputs, encoder="vit", features=features, options=options)

    run()
    with FeatureFile(features) as file:
        count = len(file)
    net, _ = load_tile_encoder("vit", network)
    views = torch.rand(BATCH, 3, TILE_PX // SPLIT, TILE_PX // SPLIT)

    def forward() -> None:
        with torch.inference_mode():
            for start in range(0, count, BATCH):
                net(views[: min(BATCH, count - start)])

    loading = [seconds(lambda: load_tile_encoder("vit", network)) for _ in range(ROUNDS)]
    rounds = [(seconds(run), seconds(forward)) for _ in range(ROUNDS)]
    load = statistics.median(loading)
    ratios = sorted(alone / (whole - load) for whole, alone in rounds)
    print(
        f"embed, {count} views: {1000 * statistics.median(w for w, _ in rounds) / count:.0f} ms "
        f"per view, of which the weights are loaded in {1000 * load / count:.0f}; forward pass "
        f"{1000 * statistics.median(a for _, a in rounds) / count:.0f} ms; of its speed, without "
        f"the loading: {statistics.median(ratios):.2f} [{ratios[0]:.2f} to {ratios[-1]:.2f}]"
    )


def compare_bag(folder: Path) -> None:
    """Print the processor time of reading a bag, and from chunks of one row."""
    values = np.random.default_rng(1).normal(size=BAG).astype(np.float16)
    listed = ViewList()
    for number in range(BAG[0]):
        listed.add(256 * number, 0, 256.0, f"t{number}", "p")
    path, chunked = folder / "bag.h5", folder / "chunked.h5"
    write_features(path, [values], BAG[1], listed, {"encoder": "x"}, {})
    with h5py.File(chunked, "w") as file:
        file.create_dataset("features", data=values, chunks=(1, BAG[1]), maxshape=(None, BAG[1]))

    def own() -> None:
        with FeatureFile(path) as file:
            file.read(slice(None))

    def other() -> None:
        with h5py.File(chunked, "r") as file:
            file["features"][:]

    def plain() -> None:
        path.read_bytes()

    rounds = [(seconds(own), seconds(other), seconds(plain)) for _ in range(4 * ROUNDS)]
    times, others, least = (
        1000 * statistics.median(column) for column in zip(*rounds, strict=True)
    )
    print(
        f"bag of {BAG[0]} x {BAG[1]}: {times:.1f} ms; from chunks of one row {others:.0f} ms; the "
        f"bytes of the file {least:.1f} ms"
    )


def main() -> None:
    """Run all measurements."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        # First: the peak of a process is at least that of its parent when it began.
        measure_memory(Path(name))
    with tempfile.TemporaryDirectory() as name:
        compare_embed(Path(name))
        compare_bag(Path(name))


if __name__ == "__main__":
    main()
