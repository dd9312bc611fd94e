"""Predict the HER2 status of an H&E slide by the models of `snakemake status`."""

import collections
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hemera.commands import Positive
from hemera.errors import LeakageError, SlideError, TrainingError

if TYPE_CHECKING:
    from hemera.dataset.bags import Bags
    from hemera.inference.status import StatusModel

log = logging.getLogger(__name__)

SLIDE = "slide"
"""The name of the only pair and case."""
MPP_TOLERANCE = 0.10
"""Resolutions that differ by no more are the same to a model."""
MEMORY_MB = 8000
"""Features up to this size are read into memory once."""


def status(
    slide: Path,
    /,
    *,
    model: Path,
    out: Path = Path("results/status"),
    mpp: Positive | None = None,
    weights: Path | None = None,
    any_stain: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Predict the HER2 status of an H&E slide from H&E alone.

    Writes a new directory, OUT/NAME: NAME.json (status with calibrated probability and its range
    over the folds, score, tiles, model), NAME.contributions.geojson (what each part of the slide
    contributes, for QuPath) and NAME.overlay.png. The slide is tiled and embedded with the options
    of the training.

    Args:
        slide: an H&E slide or image that the model was not trained on.
        model: folder of a method of stage aggregate, such as results/aggregate/floor.
        out: where to write the directory.
        mpp: resolution of the slide, um per pixel, where its file does not state it.
        weights: of the encoder, where they are elsewhere than they were for the training; of an
            encoder of stage train_encoder, its folder.
        any_stain: predict also on a slide whose colours are not those of H&E.
        device: where the encoder runs; auto is the GPU where there is one.
    """
    from hemera.config import has_demo_sizes
    from hemera.files.atomic import new_folder
    from hemera.imaging.codecs import encode
    from hemera.imaging.identity import check_he, identify
    from hemera.imaging.slide import open_slide
    from hemera.inference import demo
    from hemera.inference import status as inference
    from hemera.networks import storage

    loaded = inference.load_status_model(model)
    name = re.sub(r"(?<=.)\.ome$", "", slide.stem, flags=re.IGNORECASE)
    with (
        open_slide(slide, mpp=mpp, mpp_column="--mpp") as opened,
        new_folder(out / name) as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        if not any_stain:
            check_he(identify(opened))
        encoder = _encoder(loaded, model, weights)
        bags, tiles = _features(opened.path, mpp, loaded, encoder, device, Path(temporary))
        views = bags.views[SLIDE]
        facts, found = inference.status_of(loaded, bags.load(SLIDE))
        own = loaded.described
        toy = has_demo_sizes("aggregate", own["options"])
        recorded = ("method", "encoder", "encoder_sha256", "pretraining", "weights_sha256", "cases")
        facts |= {
            "slide": {"file": slide.name, "width_px": opened.size_px[0],
                      "height_px": opened.size_px[1], "mpp": opened.mpp},
            "tiles": {**tiles, "views": len(views)},
            "model": {"demo_sizes": toy, **{key: own.get(key) for key in recorded}},
            "versions": storage.versions(),
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
        text = inference.contributions_geojson(views, found.contribution)
        (folder / f"{name}.contributions.geojson").write_text(text)
        overlay = inference.contributions_overlay(opened, views, found.contribution)
        overlay = demo.labelled(overlay) if toy else overlay
        (folder / f"{name}.overlay.png").write_bytes(encode(overlay, "png", 0))
    if toy:
        log.warning("%s: %s", out / name, demo.WORDS)
    if (facts["distance"] or 0.0) > inference.DISTANCE_MAX:
        log.warning(
            "%s: its features are %.0f standard deviations from those of the training, of which at "
            "most %.0f are plausible: another stain, scanner or tissue, for which the "
            "probability means nothing",
            slide.name, facts["distance"], inference.DISTANCE_MAX,
        )  # fmt: skip
    log.info(
        "%s: %s, calibrated probability of positive %.2f (%.2f to %.2f over %d folds)",
        out / name, facts["status"]["predicted"], facts["status"]["calibrated"],
        facts["status"]["calibrated_low"], facts["status"]["calibrated_high"],
        facts["status"]["folds"],
    )  # fmt: skip


def _encoder(model: "StatusModel", folder: Path, weights: Path | None) -> dict[str, Any]:
    """Return files and options of stage embed that name the weights of the encoder."""
    from hemera.config import NETWORKS, SEGMENTER
    from hemera.files import layout

    name = str(model.described["encoder"])
    if name == SEGMENTER:
        results = folder.parents[1]
        patterns = {"encoder_weights": layout.SEGMENTER, "index": layout.INDEX,
                    "encoder_metadata": layout.SEGMENTER_METADATA}  # fmt: skip
        return {"files": {key: layout.path(value, results) for key, value in patterns.items()}}
    if name not in NETWORKS:
        return {"options": {"weights": (f"{name}={weights}",)}} if weights else {}
    # Beside the results of aggregate, unless given.
    own = weights or layout.path(layout.ENCODER, folder.parents[1], network=name).parent
    return {
        "files": {
            "encoder_weights": own / Path(layout.ENCODER).name,
            "encoder_metadata": own / Path(layout.ENCODER_METADATA).name,
        }
    }


def _features(
    slide: Path,
    mpp: float | None,
    model: "StatusModel",
    encoder: Mapping[str, Any],
    device: Literal["auto", "cpu", "cuda"],
    folder: Path,
) -> tuple["Bags", dict[str, Any]]:
    """Describe, tile and embed a slide by the stages, as for the training; count its tiles.

    Raises:
        LeakageError: when the models have seen the slide.
        SlideError: when it has no tile that the training would accept.
        TrainingError: when the encoder has other weights than in the training.
    """
    from hemera import tables
    from hemera.config import CasesOptions, DescribeOptions, EmbedOptions, TileOptions
    from hemera.dataset.bags import Bags
    from hemera.files import layout
    from hemera.files.atomic import write_text
    from hemera.sheet import read_sheet, units, write_rows
    from hemera.stages import cases, describe, embed, tile

    made_with = {
        stage: {name: value for name, value in values.items() if name != "version"}
        for stage, values in model.described["stages"].items()
    }
    sheet, name = folder / "sheet.tsv", str(model.described["encoder"])
    row = {"pair": SLIDE, "case": SLIDE, "dataset": SLIDE, "he": str(slide.absolute()),
           "he_mpp": "" if mpp is None else repr(float(mpp)),
           "verdict": "accept"}  # fmt: skip
    write_text(sheet, write_rows([row]))
    (unit,) = units(read_sheet(sheet), 1)
    paths = {pattern: layout.path(getattr(layout, pattern), folder, unit=unit, encoder=name)
             for pattern in ("IMAGES_TABLE", "TILE_SHARD", "TILES", "PAIRS", "FEATURES",
                          "STATUS_CASES", "STATUS_TILES")}  # fmt: skip
    of_unit: dict[str, Any] = {"sheet": sheet, "unit": unit, "block_count": 1}
    of_unit["images_table"] = paths["IMAGES_TABLE"]
    describe.run(**of_unit, options=DescribeOptions(**made_with["describe"]))
    tile.run(
        **of_unit, shard=paths["TILE_SHARD"], tiles=paths["TILES"], pairs=paths["PAIRS"],
        options=TileOptions(**made_with["tile"]),
    )  # fmt: skip
    cases.run(
        sheet=sheet, block_count=1, results=folder, cases=paths["STATUS_CASES"],
        case_tiles=paths["STATUS_TILES"], options=CasesOptions(**made_with["cases"]),
    )  # fmt: skip
    rows = tables.read(paths["STATUS_TILES"], tables.STATUS_TILES).to_pylist()
    _check_unseen(slide, {row["he_sha256"] for row in rows}, model)
    rejected = dict(collections.Counter(row["reason"] for row in rows if not row["accepted"]))
    accepted = len(rows) - sum(rejected.values())
    if not accepted:
        (state,) = tables.read(paths["PAIRS"], tables.PAIRS).to_pylist()
        reason = state["reason"] or f"all {len(rows)} tiles are rejected: {rejected}"
        raise SlideError(f"{slide.name}: no tile for a status: {reason}")
    if accepted < made_with["cases"]["min_tiles"]:
        log.warning(
            "%s: %d accepted tiles, fewer than the %d of each case of the training",
            slide.name, accepted, made_with["cases"]["min_tiles"],
        )  # fmt: skip
    options = EmbedOptions(**made_with["embed"]).replace(device=device)
    options = options.replace(**encoder.get("options", {}))
    embed.run(
        tiles=paths["TILES"], tile_shard=paths["TILE_SHARD"], images_table=paths["IMAGES_TABLE"],
        encoder=name, features=paths["FEATURES"], options=options, **encoder.get("files", {}),
    )  # fmt: skip
    bags = Bags({unit: paths["FEATURES"]}, rows, MEMORY_MB)
    _check_features(slide, bags, model)
    return bags, {"tissue": len(rows), "accepted": accepted, "rejected": rejected}


def _check_unseen(slide: Path, tiles: set[str], model: "StatusModel") -> None:
    """Raise LeakageError where a tile of the slide is that of a case that the models have seen."""
    runs = [run for run in model.described["runs"] if run["part"] == "oof"]
    seen = {case for run in runs for case in run["trained_on"]}
    seen |= {*model.described["encoder_trained_on"]}
    for case, digest in model.described["tile_sha256"].items():
        if case in seen and digest in tiles:
            raise LeakageError(
                f"{slide.name}: is of case {case}, which these models were trained on; its "
                "prediction by models that have not seen it is in predictions.parquet beside them"
            )


def _check_features(slide: Path, bags: "Bags", model: "StatusModel") -> None:
    """Raise an error where features are not of the encoder and resolution of the training."""
    name = model.described["encoder"]
    expected = str(model.described["encoder_sha256"])
    if bags.encoder_sha256 != expected:
        raise TrainingError(
            f"{name}: its weights have the SHA-256 {bags.encoder_sha256[:12]}, and those of the "
            f"training {expected[:12]}; give the same with --weights"
        )
    (own,), known = bags.mpps, model.described["mpps"]
    if not any(abs(own / mpp - 1) <= MPP_TOLERANCE for mpp in known):
        raise SlideError(
            f"{slide.name}: its tiles have {own:.3g} um/px, and those of the training "
            f"{', '.join(f'{mpp:.3g}' for mpp in known)}; train with tile: {{mpp: ...}}, to which "
            "every slide is brought, or give a slide of that resolution"
        )
    if not bags.views.get(SLIDE):
        raise SlideError(f"{slide.name}: no view has the least tissue of embed.min_view_tissue")
