"""Evaluate generators and SegmentationNet on the test subsets, next to trivial baselines."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.dataset.index import TileIndex
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import baselines, branch_swap, image_quality, stain_quality, summary
from hemera.evaluation.image_quality import SEGMENTER, Features, Network, Rows
from hemera.evaluation.perceptual import FeatureExtractors
from hemera.files import layout
from hemera.masks import label_format
from hemera.networks import storage
from hemera.reports.evaluation import Example, evaluation_page
from hemera.reports.training import Trained
from hemera.training import session

log = logging.getLogger(__name__)


def run(
    *,
    index: Path,
    results: Path = Path(layout.RESULTS),
    preset: str,
    tiles: Path,
    metrics: Path,
    page: Path,
    options: EvaluateOptions,
) -> None:
    """Evaluate generators and SegmentationNet on the test tiles of the index.

    A network without test tiles has no rows.

    Args:
        index: the index; its shards are beside its folder.
        results: folder of results, with the trained networks.
        preset: preset of the cohort, the name of the configured generator.
        tiles: written: table of metrics per tile.
        metrics: written: table of metrics per group of tiles.
        page: written: HTML.

    Raises:
        TrainingError: weights that do not fit, or networks trained on another index.
    """
    opened = TileIndex(index)
    names = options.names(preset)
    precision = session.PRECISIONS[options.precision]
    nets: dict[str, Network] = {}
    trained = []
    for name in names:
        weights, described, history = (
            layout.path(pattern, results, generator=name)
            for pattern in (layout.GENERATOR, layout.GENERATOR_METADATA, layout.GENERATION_HISTORY)
        )
        net, found = storage.load_generation(weights, described)
        nets[name] = Network(net, storage.background_is_white(found), precision)
        trained.append(_trained(name, "generation", found, history, opened))
    weights, described, history = (
        layout.path(pattern, results)
        for pattern in (layout.SEGMENTER, layout.SEGMENTER_METADATA, layout.SEGMENTATION_HISTORY)
    )
    module, found = storage.load_segmentation(weights, described)
    segmenter = Network(module, storage.background_is_white(found), precision)
    trained.append(_trained(SEGMENTER, "segmentation", found, history, opened))
    with session.session(
        seed=options.seed,
        threads=options.torch_threads,
        device=options.device,
        tf32=options.precision == "tf32",
    ) as device:
        extractors = FeatureExtractors.load(options.fid_weights, options.lpips_weights, device)
        for each in (*nets.values(), segmenter):
            each.module.to(device)
        if options.public_mode:
            for each in nets.values():
                each.module.train()
        test = {
            network: TileDataset(opened, network=network, split="test")
            for network in ("generation", "segmentation")
        }
        rows, features = _measure(opened, test, nets, segmenter, extractors, device, options)
        swaps = branch_swap.measure(
            segmenter,
            test["segmentation"],
            opened.facts("segmentation", "test"),
            device,
            options,
        )
        examples = list(_examples(test, nets, segmenter, rows, device, options))
    summaries = summary.summarise(rows, features, options)
    summaries += branch_swap.summarise(swaps, rows, options)
    provenance = {
        **tables.provenance(options),
        "fingerprint": opened.fingerprint,
        "epochs": json.dumps({each.name: each.metadata.get("epoch") for each in trained}),
        **extractors.provenance(),
    }
    names_of_sums = {"stain_sums": json.dumps(stain_quality.SUMS)}
    tables.write(tiles, rows + swaps, tables.EVALUATION_TILES, provenance | names_of_sums)
    tables.write(metrics, summaries, tables.METRICS, provenance)
    evaluation_page(
        page,
        preset=preset,
        metrics=summaries,
        tiles=rows,
        trained=trained,
        index_metadata=opened.metadata,
        examples=examples,
        options=options,
        report=Path(os.path.relpath(layout.path(layout.REPORT, results), page.parent)).as_posix(),
    )


def _trained(
    name: str, network: str, metadata: Mapping[str, Any], history: Path, index: TileIndex
) -> Trained:
    """Return the description of a network that was trained on this index."""
    storage.check_index(name, metadata, index.fingerprint)
    return Trained(name, network, metadata, tables.read(history, tables.HISTORY).to_pandas())


def _measure(
    index: TileIndex,
    test: Mapping[str, TileDataset],
    generators: Mapping[str, Network],
    segmenter: Network,
    extractors: FeatureExtractors,
    device: torch.device,
    options: EvaluateOptions,
) -> tuple[Rows, Features]:
    """Return the rows of all networks and the features of the generated tiles."""
    rows: Rows = []
    features: Features = {}
    for network, tiles in test.items():
        if not len(tiles):
            log.warning("no test tiles for %s: it is not evaluated", network)
    if len(test["generation"]):
        colors = baselines.measure_colors(index)
        facts = index.facts("generation", "test")
        rows, features = image_quality.evaluate_generators(
            generators,
            test["generation"],
            facts,
            colors,
            index.mask_options,
            extractors,
            device,
            options,
        )
    facts = index.facts("segmentation", "test")
    if len(test["segmentation"]):
        darkness = baselines.fit_darkness(index)
        rows += image_quality.evaluate_segmenter(
            segmenter, test["segmentation"], facts, darkness, device, options
        )
    return rows, features


def _examples(
    test: Mapping[str, TileDataset],
    generators: Mapping[str, Network],
    segmenter: Network,
    rows: Sequence[Mapping[str, Any]],
    device: torch.device,
    options: EvaluateOptions,
) -> Iterator[Example]:
    """Yield the tiles of the gallery with the outputs of all networks."""
    facts = {row["tile"]: row for row in rows}
    for tile, label in image_quality.choose_examples(
        rows, next(iter(generators)), options.gallery_tiles
    ):
        tiles = test[facts[tile]["network"]]
        item = image_quality.stored(tiles, tiles.position(tile))

        def output(net: Network, network: str, item: image_quality.Item = item) -> Tensor:
            image = image_quality.input_image(net, item)[None]
            return image_quality.predict(net, image, network, device)[0]

        yield Example(
            **{name: facts[tile][name] for name in ("tile", "case", "dataset", "score")},
            label=label,
            he=item.over_white("he"),
            her2=item.over_white("her2"),
            generated={
                name: image_quality.to_image(net, output(net, "generation"), item)
                for name, net in generators.items()
            },
            truth=label_format.positive(item.mask),
            probability=image_quality.to_probability(output(segmenter, "segmentation")),
        )
