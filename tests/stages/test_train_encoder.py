"""Stage train_encoder: which tiles and cases it sees, what it learns, leaks, through embed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hemera import tables
from hemera.__main__ import main
from hemera.config import AggregateOptions, EmbedOptions, load
from hemera.dataset.cases import digest
from hemera.dataset.features import FeatureFile
from hemera.dataset.readings import SEEN
from hemera.errors import LeakageError, TrainingError
from hemera.files import layout
from hemera.networks.her2_cnn import load_score_encoder
from hemera.stages import aggregate, embed, evaluate_status
from tests.command_line import words
from tests.small_encoder import (
    QUICK,
    encoder_inputs,
    encoder_paths,
    her2_pixels,
    train_her2_cnn,
    write_cohort,
)


def described(paths):
    return json.loads(paths["metadata"].read_text())


def test_the_cases_that_it_saw_are_those_with_her2_outside_of_the_test_split(tmp_path):
    rows = write_cohort(tmp_path, 24, test=4, alone=8)
    found = described(train_her2_cnn(tmp_path, epochs=1))
    expected = [row["case"] for row in rows[:16]]
    assert found["trained_on"] == expected and found["trained_on_sha256"] == digest(expected)
    # A fifth of the cases of each score chose the epoch, and is among those that it has seen.
    assert {*found["validation"]} < {*expected}
    scores = sorted(row["score"] for row in rows if row["case"] in found["validation"])
    assert scores == ["0", "1+", "2+", "3+"]
    # Two more numbers are the shift and the scale of lightness.
    stored = load_file(encoder_paths(tmp_path)["weights"])
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values()) - 2
    # Of each score as many views as of the rarest: four a tile, one tile a case.
    for counts in found["views"].values():
        known = [count for count in counts if count]
        assert len(set(known)) == 1 and known[0] % 4 == 0
    assert len([count for count in found["views"]["train"] if count]) == 4


def test_cases_of_split_val_choose_the_epoch(tmp_path):
    rows = write_cohort(tmp_path, 16)
    path = layout.path(layout.STATUS_CASES, tmp_path)
    metadata = tables.read_metadata(path)
    rows = [{**row, "split": "val" if k in (3, 6) else "train"} for k, row in enumerate(rows)]
    kept = {name: metadata[name] for name in ("options", "fingerprint")}
    tables.write(path, rows, tables.STATUS_CASES, kept)
    assert described(train_her2_cnn(tmp_path, epochs=1))["validation"] == ["c003", "c006"]


def test_a_repetition_and_the_command_line_give_the_same_bytes(tmp_path):
    write_cohort(tmp_path / "a", 12)
    first = train_her2_cnn(tmp_path / "a", epochs=2)
    content = {name: path.read_bytes() for name, path in first.items()}
    given = {"network": "her2_cnn", **encoder_inputs(tmp_path / "a"), **first}
    assert main(["train_encoder", *words({**given, **QUICK, "epochs": 2})]) == 0
    assert {name: path.read_bytes() for name, path in first.items()} == content
    # The buffer of the views is gone.
    assert len(list(first["weights"].parent.iterdir())) == 3


def test_no_her2_and_one_score_are_errors_with_a_remedy(tmp_path):
    write_cohort(tmp_path / "a", 8, alone=8)
    with pytest.raises(TrainingError, match=r"no HER2 tile .* leave oliveira out"):
        train_her2_cnn(tmp_path / "a")
    write_cohort(tmp_path / "b", 8, score="3+")
    with pytest.raises(TrainingError, match=r"views of 3\+ alone"):
        train_her2_cnn(tmp_path / "b")
    write_cohort(tmp_path / "c", 8)
    with pytest.raises(TrainingError, match="no HER2 tile"):
        train_her2_cnn(tmp_path / "c", her2_sharpness_min=60.0)


def test_a_her2_tile_of_a_training_and_a_test_case_is_a_leak(tmp_path):
    # Cases 3 and 15 have the same score; the latter is of the test split.
    write_cohort(tmp_path, 16, test=4, same=(3, 15))
    with pytest.raises(LeakageError, match="give both rows of the sheet the same case"):
        train_her2_cnn(tmp_path)


def oliveira(**values):
    config = load(
        {
            "sheet": "x.tsv",
            "evaluate_status": {"routes": ["oliveira"]},
            "aggregate": {"epochs": 15, "learning_rate": 0.003, "torch_threads": 1,
                          "device": "cpu", "shuffles": 1, **values},
        }
    )  # fmt: skip
    return config.methods


def write_images(results, rows):
    """Write the tables of stage describe."""
    for row in rows:
        image = dict.fromkeys(tables.DESCRIBE.names)
        image |= {"pair": row["case"], "stain": "he", "file": "x", "verdict": "accept",
                  "width_px": 512, "height_px": 512}  # fmt: skip
        path = layout.path(layout.IMAGES_TABLE, results, unit=row["case"])
        tables.write(path, [image], tables.DESCRIBE)


def embed_all(results, rows):
    paths = encoder_paths(results)
    write_images(results, rows)
    for row in rows:
        case = row["case"]
        for encoder, own in (("statistics", (None, None)),
                             ("her2_cnn", (paths["weights"], paths["metadata"]))):  # fmt: skip
            embed.run(
                tiles=layout.path(layout.TILES, results, unit=case),
                tile_shard=layout.path(layout.TILE_SHARD, results, unit=case),
                images_table=layout.path(layout.IMAGES_TABLE, results, unit=case),
                encoder=encoder,
                encoder_weights=own[0],
                encoder_metadata=own[1],
                features=layout.path(layout.FEATURES, results, encoder=encoder, unit=case),
                options=EmbedOptions(torch_threads=1, device="cpu"),
            )


def run_method(results, method, options, **inputs):
    patterns = {
        "weights": layout.AGGREGATOR, "metadata": layout.AGGREGATOR_METADATA,
        "history": layout.AGGREGATOR_HISTORY, "predictions": layout.STATUS_PREDICTIONS,
        "contributions": layout.CONTRIBUTIONS,
    }  # fmt: skip
    paths = {name: layout.path(own, results, method=method) for name, own in patterns.items()}
    aggregate.run(method=method, **{**encoder_inputs(results), **inputs}, **paths, options=options)
    return tables.read(paths["predictions"], tables.STATUS_PREDICTIONS).to_pylist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """40 cases: 16 with HER2, 16 of H&E alone, 8 of the test split."""
    results = tmp_path_factory.mktemp("oliveira")
    rows = write_cohort(results, 40, test=8, alone=24)
    train_her2_cnn(results)
    embed_all(results, rows)
    return results, rows


def test_scores_are_learned_from_her2(trained):
    paths = encoder_paths(trained[0])
    encoder, _ = load_score_encoder(paths["weights"], paths["metadata"])
    images = np.stack([her2_pixels(score, 9000 + score) for score in range(4)])
    views = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert encoder(views).argmax(1).tolist() == [0, 1, 2, 3]
    rows = tables.read(paths["history"], tables.HISTORY).to_pylist()
    accuracy = {row["epoch"]: row["value"] for row in rows if row["quantity"] == "accuracy"}
    assert list(accuracy) == list(range(1, QUICK["epochs"] + 1))
    assert accuracy[described(paths)["epoch"]] == max(accuracy.values())


def test_features_are_probabilities_and_name_the_cases_that_were_seen(trained):
    results, rows = trained
    path = layout.path(layout.FEATURES, results, encoder="her2_cnn", unit="c000")
    with FeatureFile(path) as file:
        features = file.read(slice(None)).astype(float)
        attributes = file.attributes
    assert features.shape == (4, 4) and features.sum(1) == pytest.approx(np.ones(4), abs=2e-3)
    paths = encoder_paths(results)
    assert json.loads(attributes["trained_on"]) == [row["case"] for row in rows[:16]]
    assert attributes["encoder_sha256"] == described(paths)["weights_sha256"]
    assert attributes["magnified"] == 256 / 32


@pytest.mark.slow
def test_oliveira_predicts_only_cases_that_its_network_has_not_seen(trained):
    results, rows = trained
    methods = oliveira()
    found = run_method(results, "oliveira", methods["oliveira"])
    seen = {row["case"] for row in rows[:16]}
    for target in ("status", "score"):
        own = [row for row in found if row["target"] == target]
        judged = {part: sorted(row["case"] for row in own if row["part"] == part)
                  for part in ("oof", "test")}  # fmt: skip
        assert judged["oof"] == [row["case"] for row in rows[16:32]]
        assert judged["test"] == [row["case"] for row in rows[32:]]
        # The lightness of H&E has the score here.
        right = [row["predicted"] == row["truth"] for row in own if row["part"] != "site_out"]
        assert np.mean(right) >= (0.9 if target == "status" else 0.7)
    assert not seen & {row["case"] for row in found}
    # Contributions and bias are the logit.
    table = tables.read(
        layout.path(layout.CONTRIBUTIONS, results, method="oliveira"), tables.CONTRIBUTIONS
    ).to_pandas()
    sums = table.groupby("case")["contribution"].sum()
    for row in found:
        if row["target"] == "status" and row["part"] in ("oof", "test"):
            assert sums[row["case"]] + row["bias"] == pytest.approx(row["logit"], abs=1e-4)
    run_method(results, "floor", methods["floor"])
    options = load({"sheet": "x.tsv", "evaluate_status": {"routes": ["oliveira"]}})
    given = {
        "cases": layout.path(layout.STATUS_CASES, results),
        "results": results,
        "preset": "hemera",
        "metrics": results / "metrics.parquet",
        "page": results / "status.html",
        "options": options.stages["evaluate_status"],
    }
    evaluate_status.run(**given)
    metrics = tables.read(given["metrics"], tables.STATUS_METRICS).to_pylist()
    cases = {
        row["method"]: row["cases"]
        for row in metrics
        if (row["part"], row["target"], row["group"]) == ("oof", "status", "all")
    }
    assert cases["oliveira"] == 16 and cases["floor"] == 32
    page = given["page"].read_text()
    assert "oliveira" in page and SEEN in page and "no prediction" not in page


def test_a_prediction_of_a_case_that_the_network_saw_is_a_leak(trained):
    results, _ = trained
    methods = oliveira(epochs=1)
    refusing = methods["oliveira"].replace(encoder_cases="refuse")
    with pytest.raises(LeakageError, match="was trained on c0"):
        run_method(results, "refusing", refusing)
    predictions = run_method(results, "planted", methods["oliveira"])
    path = layout.path(layout.AGGREGATOR_METADATA, results, method="planted")
    metadata = json.loads(path.read_text())
    evaluate_status.check_leakage("planted", predictions, metadata)
    planted = [{**predictions[0], "case": "c003"}, *predictions]
    with pytest.raises(LeakageError, match="c003"):
        evaluate_status.check_leakage("planted", planted, metadata)


def test_a_network_that_saw_a_test_case_is_a_leak(trained, tmp_path):
    results, rows = trained
    # Afterwards the sheet moves a case to the test split.
    path = layout.path(layout.STATUS_CASES, results)
    metadata = tables.read_metadata(path)
    changed = [{**row, "split": "test", "fold": None} if k == 2 else row
               for k, row in enumerate(rows)]  # fmt: skip
    kept = {name: metadata[name] for name in ("options", "fingerprint")}
    moved = tmp_path / "cases.parquet"
    tables.write(moved, changed, tables.STATUS_CASES, kept)
    inputs = {**encoder_inputs(results), "cases": moved}
    names = ("weights", "metadata", "history", "predictions", "contributions")
    with pytest.raises(LeakageError, match=r"test split: was trained on c002"):
        aggregate.run(
            method="late",
            **inputs,
            **{name: tmp_path / name for name in names},
            options=oliveira(epochs=1)["oliveira"],
        )


def test_other_features_are_refused(trained):
    results, _ = trained
    options = AggregateOptions(encoder="statistics", aggregator="top_scores", device="cpu")
    with pytest.raises(TrainingError, match="64 features"):
        run_method(results, "wrong", options)


def test_the_encoder_needs_its_weights(trained):
    results, _ = trained
    with pytest.raises(TrainingError, match="of stage train_encoder"):
        embed.run(
            tiles=layout.path(layout.TILES, results, unit="c000"),
            tile_shard=layout.path(layout.TILE_SHARD, results, unit="c000"),
            images_table=layout.path(layout.IMAGES_TABLE, results, unit="c000"),
            encoder="her2_cnn",
            features=results / "f.h5",
            options=EmbedOptions(torch_threads=1, device="cpu"),
        )
