"""The route of Oyelade et al. from training to page, on small networks and drawn tiles."""

import json

import numpy as np
import pytest

from hemera import tables
from hemera.config import OYELADE_NETWORKS, TrainEncoderOptions, load
from hemera.dataset.features import FeatureFile
from hemera.dataset.readings import SEEN
from hemera.errors import LeakageError, TrainingError
from hemera.files import layout
from hemera.stages import embed, evaluate_status, train_encoder
from tests.small_encoder import (
    encoder_inputs,
    encoder_paths,
    write_annotations,
    write_cohort,
    write_masks,
)
from tests.stages.test_train_encoder import described, run_method, write_images

pytestmark = pytest.mark.slow

QUICK = {
    "architecture": "vit_tiny_patch16_224", "input_px": 32, "epochs": 6, "batch_size": 8,
    "learning_rate": 0.0005, "device": "cpu", "torch_threads": 1, "held_out_folds": 2,
    "cells_min": 9,
}  # fmt: skip
DEFAULTS = load({"sheet": "x.tsv", "evaluate_status": {"routes": ["oyelade"]}})


def train(results, network, **options):
    paths = encoder_paths(results, network)
    train_encoder.run(
        network=network,
        **encoder_inputs(results),
        sheet=results / "pairs.tsv",
        engine="stain",
        **paths,
        options=TrainEncoderOptions(**{**QUICK, **options}).of_network(network),
    )
    return paths


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """28 cases: 24 with HER2, of which about ten are held out, and 4 of the test split."""
    results = tmp_path_factory.mktemp("oyelade")
    rows = write_cohort(results, 28, test=4, halves=True)
    write_masks(results, rows)
    write_annotations(results, rows)
    write_images(results, rows)
    for network in OYELADE_NETWORKS:
        epochs = {"stain_map": 3, "tumour": 12}.get(network, QUICK["epochs"])
        paths = train(results, network, epochs=epochs)
        for row in rows:
            case = row["case"]
            embed.run(
                tiles=layout.path(layout.TILES, results, unit=case),
                tile_shard=layout.path(layout.TILE_SHARD, results, unit=case),
                images_table=layout.path(layout.IMAGES_TABLE, results, unit=case),
                encoder=network,
                encoder_weights=paths["weights"],
                encoder_metadata=paths["metadata"],
                features=layout.path(layout.FEATURES, results, encoder=network, unit=case),
                options=DEFAULTS.stages["embed"].replace(torch_threads=1, device="cpu"),
            )
    return results, rows


def held_out(rows):
    return {row["case"] for row in rows if row["fold"] is not None and row["fold"] < 2}


def test_no_network_has_seen_a_held_out_or_a_test_case(trained):
    results, rows = trained
    unseen = held_out(rows) | {row["case"] for row in rows if row["split"] == "test"}
    for network in OYELADE_NETWORKS:
        found = described(encoder_paths(results, network))
        assert found["trained_on"] == sorted({row["case"] for row in rows} - unseen)
        assert found["options"]["weight_decay"] == 0.01 and found["options"]["augment"]
        expected = {"tumour": "annotations", "stain": "cells of engine stain (silver)",
                    "stain_map": "masks of engine stain (silver)"}  # fmt: skip
        assert found["labels"] == expected[network]


def features(results, network, case):
    with FeatureFile(layout.path(layout.FEATURES, results, encoder=network, unit=case)) as file:
        return file.views(), file.read(slice(None)).astype(float)


def test_the_views_of_the_three_networks_are_the_same(trained):
    results, rows = trained
    case = rows[0]["case"]
    found = [features(results, network, case) for network in OYELADE_NETWORKS]
    for views, _ in found[1:]:
        assert views.coords.tolist() == found[0][0].coords.tolist()
        assert list(views.tiles) == list(found[0][0].tiles)
    assert [values.shape for _, values in found] == [(4, 2), (4, 4), (4, 4)]


def test_the_tumour_is_found_in_cases_that_were_not_seen(trained):
    results, rows = trained
    right = []
    for case in sorted(held_out(rows)):
        views, values = features(results, "tumour", case)
        left = views.coords[:, 0] == views.coords[:, 0].min()
        right += ((values[:, 1] >= 0.5) == left).tolist()
    assert np.mean(right) >= 0.9


def methods(**aggregate):
    own = {"torch_threads": 1, "device": "cpu", "shuffles": 1, **aggregate}
    routes = {"routes": ["oyelade"]}
    return load({"sheet": "x.tsv", "evaluate_status": routes, "aggregate": own}).methods


def test_the_route_predicts_what_no_network_has_seen_up_to_the_page(trained):
    results, rows = trained
    found = run_method(results, "oyelade", methods()["oyelade"])
    test = {row["case"] for row in rows if row["split"] == "test"}
    for target in ("status", "score"):
        judged = {row["case"]: row for row in found if row["target"] == target}
        assert {*judged} <= held_out(rows) | test
    path = layout.path(layout.AGGREGATOR_METADATA, results, method="oyelade")
    metadata = json.loads(path.read_text())
    of_score = [row for row in metadata["refused"] if row["target"] == "score"]
    reasons = {row["case"]: row["reason"] for row in of_score}
    # Each labelled case is predicted, or refused with the reason.
    assert {*reasons} | {row["case"] for row in found if row["target"] == "score"} == {
        row["case"] for row in rows
    }
    seen = {row["case"] for row in rows} - held_out(rows) - test
    assert {case for case, reason in reasons.items() if reason == SEEN} == seen
    own = metadata["read"]
    assert {*own} == held_out(rows) | test
    assert all(each["voting"] <= each["tumour"] <= 4 for each in own.values())
    floor_needs = methods()
    write_statistics(results, rows)
    run_method(results, "floor", floor_needs["floor"])
    page = results / "status.html"
    evaluate_status.run(
        cases=layout.path(layout.STATUS_CASES, results), results=results, preset="hemera",
        metrics=results / "metrics.parquet", page=page,
        options=DEFAULTS.stages["evaluate_status"],
    )  # fmt: skip
    text = page.read_text()
    for words in ("oyelade", SEEN, "silver", ".9148", "endometrial"):
        assert words in text


def write_statistics(results, rows):
    for row in rows:
        case = row["case"]
        embed.run(
            tiles=layout.path(layout.TILES, results, unit=case),
            tile_shard=layout.path(layout.TILE_SHARD, results, unit=case),
            images_table=layout.path(layout.IMAGES_TABLE, results, unit=case),
            encoder="statistics",
            features=layout.path(layout.FEATURES, results, encoder="statistics", unit=case),
            options=DEFAULTS.stages["embed"].replace(torch_threads=1, device="cpu"),
        )


def test_without_a_gate_the_network_of_the_tumour_is_not_read(trained):
    results, _ = trained
    options = methods(tumour_min=0.0, fusion="map")["oyelade"]
    assert options.encoders == ("stain_map",)
    run_method(results, "open", options)
    path = layout.path(layout.AGGREGATOR_METADATA, results, method="open")
    own = json.loads(path.read_text())["read"]
    # All views count, also those without tumour.
    views = {case: len(features(results, "stain_map", case)[1]) for case in own}
    assert {case: each["tumour"] for case, each in own.items()} == views


def test_a_case_that_moves_to_the_test_split_after_training_is_a_leak(trained, tmp_path):
    results, rows = trained
    seen = described(encoder_paths(results, "stain"))["trained_on"][0]
    path = layout.path(layout.STATUS_CASES, results)
    metadata = tables.read_metadata(path)
    changed = [{**row, "split": "test", "fold": None} if row["case"] == seen else row
               for row in rows]  # fmt: skip
    kept = {name: metadata[name] for name in ("options", "fingerprint")}
    moved = tmp_path / "cases.parquet"
    tables.write(moved, changed, tables.STATUS_CASES, kept)
    with pytest.raises(LeakageError, match=f"test split: was trained on {seen}"):
        run_method(results, "late", methods()["oyelade"], cases=moved)


def test_without_annotations_or_masks_the_error_names_the_remedy(tmp_path):
    rows = write_cohort(tmp_path, 8)
    sheet = tmp_path / "pairs.tsv"
    sheet.write_text("pair\tcase\tdataset\the\ther2\nc000\tc000\td\tx.png\t\n")
    with pytest.raises(TrainingError, match=r"tumour: no H&E tile .*tumour_min: 0"):
        train(tmp_path, "tumour", epochs=1)
    write_masks(tmp_path, rows)
    with pytest.raises(TrainingError, match="stain: no HER2 tile with cells"):
        train(tmp_path, "stain", epochs=1, cells_min=1000)
    with pytest.raises(TrainingError, match="needs --engine"):
        train_encoder.run(
            network="stain", **encoder_inputs(tmp_path), **encoder_paths(tmp_path, "stain"),
            options=TrainEncoderOptions(),
        )  # fmt: skip
