"""The page of the cohort against the tables, and the outputs of networks against the networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from hemera import tables
from hemera.errors import TableError
from hemera.files import layout
from hemera.imaging.codecs import encode
from hemera.networks import storage
from hemera.reports import pictures
from hemera.view import networks
from tests.small_networks import write_networks
from tests.view.test_thresholds import client, results

__all__ = ["client", "results"]
"""Fixtures."""


def test_the_overview_counts_what_the_tables_have(
    client: TestClient, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = client.get("api/cohort").json()
    assert found["states"] == {
        "tiled": 9, "refused": 0, "wrong_stain": 0, "no_tissue": 0, "unreadable": 0,
    }  # fmt: skip
    assert found["steps"]["tiles_written"] == found["tiles"] == 69
    index = tables.read(results / layout.INDEX, tables.index(("stain",))).to_pandas()
    accepted = index[index["accepted"]]
    assert found["accepted"] == len(accepted)
    for row in found["staining"]["stain"]:
        own = accepted[accepted["score"] == row["score"].replace("unknown", "")]
        fractions = own["stain_positive_fraction"].to_numpy()
        assert row["tiles"] == len(own)
        assert np.allclose(row["percentiles"], np.percentile(fractions, [5, 25, 50, 75, 95]))
    names = [row["tile"] for row in found["examples"]]
    assert len(set(names)) == len(names) == min(48, len(accepted))
    assert set(names) <= set(accepted["tile"])
    assert {row["score"] for row in found["examples"]} == {"1+", "3+", "unknown"}
    # A refused tile too: no network uses it, whatever the split of its case.
    refused = index[~index["accepted"]]
    for _, row in [*accepted.iloc[:3].iterrows(), *refused.iloc[:1].iterrows()]:
        found = client.get(f"api/split/{row['tile']}").json()
        own = {
            "GenerationNet": row["generation_split"],
            "SegmentationNet": row["segmentation_split"],
        }
        assert found == (own if row["accepted"] else dict.fromkeys(own))
    assert client.get("api/split/none").status_code == 403
    monkeypatch.setattr(layout, "INDEX", "results/none.parquet")
    assert client.get(f"api/split/{names[0]}").json() == {}


def test_the_outputs_of_the_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.chdir(tmp_path)
    he, her2 = (rng.integers(0, 256, (128, 128, 3), np.uint8) for _ in range(2))
    stored = {"he": encode(he, "png"), "her2": encode(her2, "png")}
    row = {"tile": "t", "he_background": [240, 230, 235], "her2_background": [241, 238, 236]}
    mask = np.zeros((128, 128), np.uint8)

    def drawn(name: str) -> Any:
        return networks.picture(name, "demo", row, stored.__getitem__, mask).astype(int)

    assert networks.trained("demo") == {}
    with pytest.raises(TableError, match="not trained"):
        drawn("virtual")
    paths = write_networks(tmp_path / "results")
    assert set(networks.trained("demo")) == {"virtual", "prediction"}
    generator, _ = storage.load_generation(paths["generator"], paths["generator_metadata"])
    segmenter, _ = storage.load_segmentation(paths["segmenter"], paths["segmenter_metadata"])
    unit = torch.from_numpy(he).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        image = generator.eval()(unit * 2 - 1)[0].permute(1, 2, 0).numpy()
        probability = torch.sigmoid(segmenter.eval()(unit))[0, 0].numpy()
    # Shown over white, as HER2 in the lightbox of the evaluation.
    expected = (image + 1) / 2 * 255 / np.array(row["her2_background"]) * 255
    assert np.abs(drawn("virtual") - np.clip(expected, 0, 255)).max() <= 2
    assert np.abs(drawn("prediction") - pictures.heat(probability)).max() <= 2
