"""compare: the generators of several presets on the same test tiles, beside what papers report.

Reads the index, GenerationNet's test tiles and one generator per preset, each trained on the same
index and split; writes one table, as Parquet and as text for a paper, and a page. They are judged
as evaluate judges, by `hemera.judging`. No test tile is no error: the page says so.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hemera import tables
from hemera.config import CompareOptions
from hemera.dataset.index import TileIndex
from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import ConfigError
from hemera.evaluation import image_quality
from hemera.evaluation.published import PAPERS
from hemera.io import atomic
from hemera.networks import storage
from hemera.reports import ComparedTile, comparison_page
from hemera.training import session

log = logging.getLogger(__name__)

TILES_PER_STEP = 4
"""Go through a network together; the result does not depend on it."""


def run(
    *,
    index: Path,
    generators: tuple[Path, ...],
    generator_metadata: tuple[Path, ...],
    benchmarks: tuple[Path, ...] = (),
    report: Path,
    preset: str,
    table: Path,
    tsv: Path,
    page: Path,
    options: CompareOptions,
) -> None:
    """Compare generators.

    Args:
        index: the index that all of them were trained on.
        generators: weights, one file for each of options.presets, in their order.
        generator_metadata: the JSON beside each.
        benchmarks: Snakemake's benchmark file of each training, for its time; none: not shown.
        report: the page about the data, to which the page links.
        preset: preset of the cohort, shown on the page.
        table: written: `tables.COMPARISON`.
        tsv: written: the same as text, cells separated by tabs.
        page: written: the page.
        options: the options.

    Raises:
        ConfigError: another number of files than of presets.
        TrainingError: weights that do not fit; a network of another index than this one.
    """
    for name, given in (
        ("--generators", generators),
        ("--generator-metadata", generator_metadata),
        ("--benchmarks", benchmarks or generators),
    ):
        if len(given) != len(options.presets):
            raise ConfigError(
                f"{name}: {len(given)} files for {len(options.presets)} presets; give one for "
                "each, in the order of --presets"
            )
    opened = TileIndex(index)
    nets: dict[str, nn.Module] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, weights, metadata in zip(
        options.presets, generators, generator_metadata, strict=True
    ):
        nets[name], described[name] = storage.load_generation(weights, metadata)
        storage.check_index(name, described[name], opened.fingerprint)
    seconds = dict(zip(options.presets, map(_seconds, benchmarks), strict=bool(benchmarks)))
    test = TileDataset(opened, network="generation", split="test", images=("he", "her2"))
    rows: list[dict[str, Any]] = []
    features = image_quality.Features()
    examples: list[ComparedTile] = []
    with session.session(
        seed=options.seed, threads=options.torch_threads, device=options.device
    ) as device:
        judges = image_quality.Judges.load(options, device)
        for net in nets.values():
            net.to(device)
        facts = opened.facts("generation", "test")
        if len(test):
            colours = image_quality.measure_colours(index, options.blur_sigma_px)
            rows, features = image_quality.judge_generation(
                nets,
                test,
                facts,
                colours=colours,
                judges=judges,
                device=device,
                batch_size=TILES_PER_STEP,
                sigma_px=options.blur_sigma_px,
            )
            # Spread over the index, chosen by nobody's success.
            places = np.linspace(0, len(test) - 1, min(options.gallery_tiles, len(test)))
            for place in np.unique(places.round().astype(int)):
                item = test.stored(int(place))
                examples.append(_show(item, facts[item["tile"]], nets, device, rows))
        else:
            log.warning("no test tiles for GenerationNet: nothing is compared")
    found = _table(rows, features, described, seconds, options)
    provenance = {
        **tables.provenance(options),
        "fingerprint": opened.fingerprint,
        **judges.provenance(),
    }
    tables.write(table, found, tables.COMPARISON, provenance)
    atomic.write_text(tsv, _text(found))
    comparison_page(
        page,
        preset=preset,
        table=pa.Table.from_pylist(found, schema=tables.COMPARISON),
        cases=len({row["case"] for row in rows}),
        metadata=described,
        index_metadata=opened.metadata,
        examples=examples,
        options=options,
        report=Path(os.path.relpath(report, page.parent)).as_posix(),
    )


def _table(
    rows: Sequence[Mapping[str, Any]],
    features: image_quality.Features,
    described: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float | None],
    options: CompareOptions,
) -> list[dict[str, Any]]:
    """Return the rows of `tables.COMPARISON`: presets, baselines, papers."""
    summaries = {
        (row["method"], row["metric"]): row
        for row in image_quality.summarise(rows, features, options)
        if row["group"] == "all"
    }
    found: list[dict[str, Any]] = []
    for method in (*options.presets, *image_quality.BASELINES):
        made: dict[str, Any] = {
            "method": method,
            "kind": "network" if method in described else "baseline",
            "tiles": sum(row["method"] == method for row in rows),
        }
        if method in described:
            about = described[method]
            made |= {
                "generator": about["model"]["generator"],
                "parameters": about.get("parameters"),
                "epochs": about.get("options", {}).get("epochs"),
                "training_s": seconds.get(method),
            }
        for metric in image_quality.IMAGE_METRICS:
            if (method, metric) in summaries:
                summary = summaries[method, metric]
                made[metric] = summary["value"]
                made |= {f"{metric}_{part}": summary[part] for part in ("deviation", "low", "high")}
        if (method, "psnr_infinite") in summaries:
            made["psnr_infinite"] = int(summaries[method, "psnr_infinite"]["value"])
        for metric in image_quality.SET_METRICS:
            if (method, metric) in summaries:
                made[metric] = summaries[method, metric]["value"]
        if (method, "kid") in summaries:
            made["kid_deviation"] = summaries[method, "kid"]["deviation"]
        found.append(made)
    for figure in PAPERS["generation"]:
        made = {
            metric: float(value)
            for metric, value in zip(("psnr_db", "ssim", "fid"), figure.values, strict=True)
            if value
        }
        found.append(
            {
                "method": figure.method,
                "kind": "paper",
                "source": figure.source,
                "comparable": figure.comparable,
                **made,
            }
        )
    return found


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of `tables.COMPARISON` as text: a header, six digits, empty where there is none.

    Columns that are empty in every row are left out.
    """
    names = [
        name for name in tables.COMPARISON.names if any(row.get(name) is not None for row in rows)
    ]
    written = io.StringIO()
    writer = csv.writer(written, delimiter="\t", lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells)
    return written.getvalue()


def _seconds(benchmark: Path) -> float | None:
    """Return the wall time that a benchmark file of Snakemake says, None where it says none."""
    try:
        (*_, last) = csv.DictReader(benchmark.read_text().splitlines(), delimiter="\t")
        seconds = float(last["s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s: no benchmark file (%s); the time of training is not shown", benchmark, error
        )
        return None
    return seconds if math.isfinite(seconds) else None


def _show(
    item: Mapping[str, Any],
    fact: Mapping[str, str],
    nets: Mapping[str, nn.Module],
    device: torch.device,
    rows: Sequence[Mapping[str, Any]],
) -> ComparedTile:
    """Return one tile as the page shows it."""
    image = item["he"][None]
    return ComparedTile(
        tile=fact["tile"],
        case=fact["case"],
        dataset=fact["dataset"],
        score=fact["score"],
        he=item["he"],
        her2=item["her2"],
        generated={
            name: image_quality.to_image(image_quality.predict(net, image, "generation", device)[0])
            for name, net in nets.items()
        },
        ssim={row["method"]: row["ssim"] for row in rows if row["tile"] == fact["tile"]},
    )
