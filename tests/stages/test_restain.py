"""Stage restain, and the routes that read what the two networks make of H&E."""

import json

import numpy as np
import pytest
import torch

from hemera import tables
from hemera.__main__ import main
from hemera.config import EmbedOptions, MaskOptions, RestainOptions, load
from hemera.dataset.features import FeatureFile
from hemera.dataset.readings import SEEN
from hemera.dataset.shards import read_member
from hemera.errors import LeakageError, TrainingError
from hemera.evaluation.metrics import to_uint8
from hemera.files import layout
from hemera.imaging.codecs import decode
from hemera.imaging.color import normalise_background
from hemera.networks import storage
from hemera.stages import embed, mask, restain
from tests import small_encoder
from tests.command_line import words
from tests.small_encoder import write_cohort, write_masks
from tests.small_networks import write_generator, write_networks
from tests.small_tables import tile_row
from tests.stages.test_train_encoder import run_method, write_images

BACKGROUND = [230, 240, 250]
SPLITS = {"c000": "train", "c001": "train", "c002": "val", "c004": "test"}
"""Of the tiles that the generator was trained on, or evaluated."""


def write_index(results):
    """Write an index of five cases with HER2, of which the generator has seen three."""
    rows = [
        tile_row(
            f"c{number:03d}", 0, shard="tile/u.tar", dataset="d", score="", registration="pass",
            accepted=True, case=f"c{number:03d}", split=SPLITS.get(f"c{number:03d}", "test"),
            generation_split=SPLITS.get(f"c{number:03d}"), her2_background=BACKGROUND,
        )
        for number in range(5)
    ]  # fmt: skip
    for row in rows:
        row["segmentation_split"] = row["generation_split"]
    made = tables.provenance(MaskOptions(engines={"stain": {}}))["options"]
    metadata = {"fingerprint": "f" * 64, "mask_target": "stain", "options_mask": made,
                "mask_engines": '["stain"]'}  # fmt: skip
    tables.write(layout.path(layout.INDEX, results), rows, tables.index(("stain",)), metadata)


def given(results, case):
    return {
        "tiles": layout.path(layout.TILES, results, unit=case),
        "tile_shard": layout.path(layout.TILE_SHARD, results, unit=case),
        "case_tiles": layout.path(layout.STATUS_TILES, results),
        "index": layout.path(layout.INDEX, results),
        "generator": layout.path(layout.GENERATOR, results, generator="demo"),
        "generator_metadata": layout.path(layout.GENERATOR_METADATA, results, generator="demo"),
        "shard": layout.path(layout.VIRTUAL_SHARD, results, unit=case),
        "virtual_tiles": layout.path(layout.VIRTUAL_TILES, results, unit=case),
    }


OPTIONS = RestainOptions(codec="png", device="cpu", torch_threads=1)


@pytest.fixture
def made(tmp_path):
    """Twelve cases, the last four without HER2, and a generator that has seen three."""
    rows = write_cohort(tmp_path, 12, alone=4)
    write_index(tmp_path)
    write_generator(tmp_path, model={"generator": "unet_32", "base_width": 4})
    weights = layout.path(layout.GENERATOR, tmp_path, generator="demo")
    path = layout.path(layout.GENERATOR_METADATA, tmp_path, generator="demo")
    storage.write_metadata(path, json.loads(path.read_text()), weights)
    for row in rows:
        restain.run(**given(tmp_path, row["case"]), options=OPTIONS)
    return tmp_path, rows


def virtual(results, case):
    path = layout.path(layout.VIRTUAL_TILES, results, unit=case)
    return tables.read(path, tables.TILE).to_pylist(), tables.read_metadata(path)


def test_her2_is_generated_for_cases_that_the_generator_has_not_seen(made):
    results, rows = made
    for row in rows:
        found, metadata = virtual(results, row["case"])
        assert json.loads(metadata["trained_on"]) == ["c000", "c001", "c002"]
        assert len(found) == (0 if row["case"] in ("c000", "c001", "c002") else 1)
    assert virtual(results, "c011")[0][0]["her2_offset"] is not None, "H&E alone"


def test_the_shard_has_the_output_of_the_generator_over_white(made):
    results, _ = made
    (row,), _ = virtual(results, "c004")
    paths = given(results, "c004")
    net, _ = storage.load_generation(paths["generator"], paths["generator_metadata"])
    he, her2 = (
        decode(read_member(paths["shard"], *(row[f"{stain}_{name}"]
               for name in ("offset", "length", "sha256"))))
        for stain in ("he", "her2")
    )  # fmt: skip
    image = torch.from_numpy(he).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        expected = to_uint8(net(2 * image - 1)[0].permute(1, 2, 0).numpy())
    assert np.array_equal(her2, normalise_background(expected, tuple(BACKGROUND)))
    assert row["her2_background"] == [255, 255, 255] and row["her2_sharpness"] is None


def test_the_command_line_gives_the_same_bytes(made):
    results, _ = made
    paths = given(results, "c005")
    before = [paths[name].read_bytes() for name in ("shard", "virtual_tiles")]
    assert main(["restain", *words({**paths, **OPTIONS.model_dump()})]) == 0
    assert [paths[name].read_bytes() for name in ("shard", "virtual_tiles")] == before


def test_stage_mask_labels_generated_her2(made, tmp_path):
    results, _ = made
    paths = given(results, "c005")
    names = {name: tmp_path / name for name in ("shard", "masks", "cells")}
    mask.run(
        tiles=paths["virtual_tiles"], tile_shard=paths["shard"], **names,
        options=MaskOptions(engines={"stain": {"nuclei": "classical"}}),
    )  # fmt: skip
    assert len(tables.read(names["masks"], tables.MASK)) == 1


def test_another_index_is_refused(made):
    results, _ = made
    path = layout.path(layout.GENERATOR_METADATA, results, generator="demo")
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "index_fingerprint": "0" * 64}))
    with pytest.raises(TrainingError, match="train on this index"):
        restain.run(**given(results, "c005"), options=OPTIONS)


def methods(name):
    own = {"torch_threads": 1, "device": "cpu", "shuffles": 1, "cells_min": 20}
    routes = {"routes": [name]}
    return load({"sheet": "x.tsv", "evaluate_status": routes, "aggregate": own}).methods


def test_method_virtual_reads_generated_cells_of_unseen_cases(made):
    results, rows = made
    write_masks(results, rows, virtual=True)
    found = run_method(results, "virtual", methods("virtual")["virtual"], engine="stain")
    scores = {row["case"]: row for row in found if row["target"] == "score"}
    assert {*scores} == {row["case"] for row in rows} - {"c000", "c001", "c002"}
    assert all(row["predicted"] == row["truth"] for row in scores.values())
    path = layout.path(layout.AGGREGATOR_METADATA, results, method="virtual")
    metadata = json.loads(path.read_text())
    assert metadata["encoder_trained_on"] == ["c000", "c001", "c002"]
    refused = {row["case"]: row["reason"] for row in metadata["refused"]}
    assert refused["c000"] == SEEN
    with pytest.raises(TrainingError, match="needs --engine"):
        run_method(results, "virtual", methods("virtual")["virtual"])


def test_a_test_case_that_the_generator_has_seen_is_a_leak(made, tmp_path):
    results, rows = made
    write_masks(results, rows, virtual=True)
    path = layout.path(layout.STATUS_CASES, results)
    metadata = tables.read_metadata(path)
    changed = [{**row, "split": "test", "fold": None} if row["case"] == "c002" else row
               for row in rows]  # fmt: skip
    moved = tmp_path / "moved.parquet"
    kept = {name: metadata[name] for name in ("options", "fingerprint")}
    tables.write(moved, changed, tables.STATUS_CASES, kept)
    with pytest.raises(LeakageError, match="test split: was trained on c002"):
        run_method(
            results, "virtual", methods("virtual")["virtual"], cases=moved, engine="stain"
        )  # fmt: skip


def test_the_positive_fraction_is_that_of_segmentation_net(tmp_path, monkeypatch):
    monkeypatch.setattr(small_encoder, "SIDE", 128)
    (row, *_) = rows = write_cohort(tmp_path, 5)
    write_images(tmp_path, rows)
    write_index(tmp_path)
    paths = write_networks(tmp_path)
    described = json.loads(paths["segmenter_metadata"].read_text())
    storage.write_metadata(paths["segmenter_metadata"], described, paths["segmenter"])
    features = tmp_path / "f.h5"
    inputs = {
        "tiles": layout.path(layout.TILES, tmp_path, unit=row["case"]),
        "tile_shard": layout.path(layout.TILE_SHARD, tmp_path, unit=row["case"]),
        "images_table": layout.path(layout.IMAGES_TABLE, tmp_path, unit=row["case"]),
        "encoder": "segmenter", "features": features,
        "options": EmbedOptions(split=1, torch_threads=1, device="cpu"),
        "encoder_weights": paths["segmenter"], "encoder_metadata": paths["segmenter_metadata"],
    }  # fmt: skip
    embed.run(**inputs, index=layout.path(layout.INDEX, tmp_path))
    net, _ = storage.load_segmentation(paths["segmenter"], paths["segmenter_metadata"])
    (tile,) = tables.read(inputs["tiles"], tables.TILE).to_pylist()
    place = (tile[f"he_{name}"] for name in ("offset", "length", "sha256"))
    he = torch.from_numpy(decode(read_member(inputs["tile_shard"], *place)))
    with torch.inference_mode():
        logits = net(he.permute(2, 0, 1)[None].float() / 255)
    with FeatureFile(features) as file:
        found = file.read(slice(None))
        seen = json.loads(file.attributes["trained_on"])
    assert found.tolist() == [[pytest.approx(float((logits > 0).float().mean()), abs=1e-3)]]
    assert seen == ["c000", "c001", "c002"]
    with pytest.raises(TrainingError, match="and --index"):
        embed.run(**inputs)
