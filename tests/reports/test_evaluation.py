"""The page about the networks."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest

from hemera import tables
from hemera.config import EvaluateOptions, TrainGenerationOptions, TrainSegmentationOptions
from hemera.evaluation.image_quality import SEGMENTER
from hemera.reports.evaluation import Example, evaluation_page
from hemera.reports.training import Trained
from tests.reports.test_pages import check_page
from tests.small_results import tissue

PSNR = {"hemera": 19.5, "pix2pix": 18.0, "mean_colour": 16.25, "blurred": 15.0}
F1 = {SEGMENTER: 0.7, "all_positive": 0.4, "all_negative": 0.0, "best_constant": 0.4}


STAIN = {"hemera": (0.6, 0.9, 0.1), "pix2pix": (0.7, 1.1, 0.1), "mean_colour": (None, 1.0, 0.1),
         "blurred": (0.5, 1.0, 0.1)}  # fmt: skip
"""r of DAB, ratio of brown to that of the real images, and its fraction of these."""


def metric_rows(loss: float = 0.0) -> list[dict[str, Any]]:
    """Rows of METRICS; the networks are worse by `loss` dB and a twentieth of it in F1."""
    rows = []

    def add(network: str, method: str, group: str, metric: str, agg: str, value: float) -> None:
        deviation = 0.05 if agg.startswith("mean") else None
        rows.append(
            {"network": network, "method": method, "group": group, "metric": metric,
             "aggregation": agg, "value": value, "deviation": deviation, "tiles": 6,
             "low": value - 0.25, "high": value + 0.75}
        )  # fmt: skip

    for group in ("all", "dataset=bci", "score=3+", "score=", "case=bci_0", "case=bci_1"):
        for method, psnr in PSNR.items():
            value = psnr - loss * (method in ("hemera", "pix2pix"))
            add("generation", method, group, "psnr_db", "mean", value)
            add("generation", method, group, "ssim", "mean", value / 50)
            add("generation", method, group, "ssim_gaussian", "mean", value / 45)
            for name, figure in zip(
                ("dab_r", "brown_ratio", "brown_fraction_real"), STAIN[method], strict=True
            ):
                if figure is not None:
                    add("generation", method, group, name, "pooled", figure)
        for method, f1 in F1.items():
            for metric in ("precision", "recall", "f1", "iou"):
                for aggregation in ("pooled", "mean", "mean_nonempty"):
                    value = f1 - loss / 20 * (method == SEGMENTER)
                    add("segmentation", method, group, metric, aggregation, value)
    return rows


def tile_rows() -> list[dict[str, Any]]:
    rows = []
    for k in range(6):
        base = dict.fromkeys(tables.EVALUATION_TILES.names)
        base |= {"tile": f"bci_{k}", "case": f"bci_{k % 2}", "dataset": "bci", "score": "3+"}
        for place, method in enumerate(("hemera", "pix2pix")):
            image = {"psnr_db": 18.0 + k - place, "ssim": 0.3 + 0.02 * k}
            rows.append(base | {"network": "generation", "method": method, **image})
        counts = {"true_positive_px": 100 * k, "false_positive_px": 50, "false_negative_px": 60,
                  "true_negative_px": 4000}  # fmt: skip
        rows.append(base | {"network": "segmentation", "method": SEGMENTER, **counts})
    return rows


def history(*names: str) -> pd.DataFrame:
    rows = [
        {"epoch": k, "part": part, "quantity": name, "value": 3 / k + (0.2 if part == "val" else 0)}
        for k in range(1, 9)
        for name in names
        for part in ("train", "val")
    ]
    return pd.DataFrame(rows, columns=tables.HISTORY.names)


def example(name: str, **changed: Any) -> Example:
    he, her2 = tissue(3, 128, 128, (110, 60, 150)), tissue(3, 128, 128, (125, 85, 55))
    truth = her2.min(axis=2) < 120
    blurred = cv2.GaussianBlur(her2, (0, 0), 2)
    given = {
        "tile": name, "case": "bci_0", "dataset": "bci", "score": "3+", "label": "worst: F1 0.21",
        "he": he, "her2": her2, "generated": {"hemera": blurred, "pix2pix": her2 // 2},
        "truth": truth, "probability": cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 3),
    }  # fmt: skip
    return Example(**given | changed)


def described(options: Any) -> dict[str, Any]:
    return {
        "parameters": 123456, "epoch": 6, "mask_engine": "stain", "tiles": {"train": 60, "val": 12},
        "model": {"generator": "unet_256"}, "versions": {"torch": "2.13.0"},
        "options": json.loads(tables.provenance(options)["options"]),
    }  # fmt: skip


TRAINED = [
    Trained("hemera", "generation", described(TrainGenerationOptions()),
            history("generator", "discriminator", "psnr_db", "learning_rate")),
    Trained("pix2pix", "generation", described(TrainGenerationOptions(weight_map="none")),
            history("generator")),
    Trained(SEGMENTER, "segmentation", described(TrainSegmentationOptions(epochs=3)),
            history("loss", "f1")),
]  # fmt: skip


def written(path: Path, **changed: Any) -> str:
    given: dict[str, Any] = {
        "preset": "demo",
        "metrics": metric_rows(),
        "tiles": tile_rows(),
        "trained": TRAINED,
        "index_metadata": {"fingerprint": "ab" * 32, "mask_target": "stain", "licences": "[]"},
        "examples": [example(f"bci_{k}") for k in range(3)],
        "options": EvaluateOptions(),
        "report": "../report/report.html",
        **changed,
    }
    evaluation_page(path, **given)
    check_page(path)
    return path.read_text()


def cells(text: str, label: str, section: str) -> list[str]:
    """Return the text of the cells of the first row of a method in a section."""
    body = text[text.index(f'<section id="{section}">') :]
    (row,) = re.findall(rf"<tr[^>]*><td>{label}</td>.*?</tr>", body, re.S)[:1]
    found = re.findall("<td.*?</td>", row, re.S)
    return [re.sub(r"(<[^>]+>|[ \n])+", " ", cell).strip() for cell in found]


def test_all_generators_baselines_and_published_results_are_on_one_page(tmp_path: Path) -> None:
    text = written(tmp_path / "evaluate.html")
    assert cells(text, "hemera", "generation")[1] == "19.50 ± 0.05 19.25 to 20.25"
    assert cells(text, "pix2pix", "generation")[1].startswith("18.00 ± 0.05")
    assert cells(text, "mean colour of the training tiles", "generation")[1].startswith("16.25")
    assert cells(text, "VP-GAN", "generation")[1:4] == ["22.16", ".47", "346.37"]
    assert cells(text, "SegmentationNet", "segmentation")[1:3] == [
        "pooled", "0.700 0.450 to 1.450",
    ]  # fmt: skip
    assert cells(text, "HEMERA SegmentationNet", "segmentation")[1:5] == [
        ".771", ".513", ".631", ".487",
    ]  # fmt: skip
    best = re.findall(r"<strong>([\d.]+)", text[text.index('id="generation"') :])
    assert best[:3] == ["19.50", "0.390", "0.433"]


def test_groups_are_listed_for_every_generator(tmp_path: Path) -> None:
    text = written(tmp_path / "evaluate.html")
    section = text[text.index('id="generation"') : text.index('id="segmentation"')]
    for name in ("bci", "3+", "unknown", "bci_0", "bci_1"):
        rows = re.findall(rf'<td class="name">{re.escape(name)}</td><td>(\w+)</td>', section)
        assert rows == ["hemera", "pix2pix"]


def test_curves_options_and_images_of_every_network_are_shown(tmp_path: Path) -> None:
    text = written(tmp_path / "evaluate.html")
    assert text.count("<svg") == 4 + 1 + 2
    assert text.count("<img") == 3 * 6
    changed = re.findall(r'<tr class="own"><td><code>(\w+)</code>', text)
    assert changed == ["weight_map", "epochs"]
    assert "<dt>PSNR, dB, pix2pix</dt><dd>17.00</dd>" in text


def test_perceptual_metrics_are_columns_where_they_are_measured(tmp_path: Path) -> None:
    rows = metric_rows() + [
        {"network": "generation", "method": "hemera", "group": "all", "metric": metric,
         "aggregation": aggregation, "value": value, "deviation": deviation, "tiles": 1234,
         "low": None, "high": None}
        for metric, aggregation, value, deviation in (
            ("lpips", "mean", 0.3125, 0.0625), ("fid", "set", 123.456, None),
            ("kid", "set", -0.00125, 0.0002),
        )
    ]  # fmt: skip
    text = written(tmp_path / "evaluate.html", metrics=rows)
    found = [cell.partition(" N ")[0] for cell in cells(text, "hemera", "generation")[4:7]]
    assert found == ["0.312 ± 0.062", "123.46", "−0.0013 ± 0.0002"]
    assert cells(text, "pix2pix", "generation")[4:7] == ["–"] * 3


def test_a_network_that_a_baseline_exceeds_is_a_warning(tmp_path: Path) -> None:
    assert "does not exceed" not in written(tmp_path / "evaluate.html")
    text = written(tmp_path / "worse.html", metrics=metric_rows(8.0), preset="hemera")
    assert "hemera: PSNR, dB 11.50 does not exceed the trivial baseline (mean colour of" in text
    assert "pix2pix: PSNR, dB 10.00 does not exceed" in text
    assert "SegmentationNet: F1 0.300 does not exceed" in text
    assert "Demo sizes." not in text


def test_the_difference_to_the_threshold_on_darkness_has_an_interval(tmp_path: Path) -> None:
    def page(name: str, low: float) -> str:
        gain = {"network": "segmentation", "method": SEGMENTER, "metric": "f1_over_dark",
                "group": "all", "aggregation": "pooled", "value": 0.175, "deviation": None,
                "tiles": 6, "low": low, "high": 0.26}  # fmt: skip
        return written(tmp_path / name, metrics=[*metric_rows(), gain])

    above = page("above.html", 0.09)
    assert "darkness: 0.175; 95 % interval of the difference, over cases, 0.090 to 0.260." in above
    assert "−0.090 to 0.260, which includes 0." in page("unsure.html", -0.09)
    assert "minus that of the threshold" not in written(tmp_path / "without.html")


def test_a_group_without_a_positive_pixel_shows_false_positives(tmp_path: Path) -> None:
    def empty(row: dict[str, Any]) -> dict[str, Any]:
        lost = row["group"] == "score=" and row["network"] == "segmentation"
        return row | (dict.fromkeys(("value", "low", "high")) if lost else {})

    alarm = {"network": "segmentation", "method": SEGMENTER, "metric": "false_positive_fraction",
             "group": "score=", "aggregation": "empty", "value": 0.0312, "deviation": None,
             "tiles": 6, "low": None, "high": None}  # fmt: skip
    text = written(tmp_path / "page.html", metrics=[*map(empty, metric_rows()), alarm])
    section = text[text.index('id="segmentation"') :]
    (row,) = re.findall(r'<td class="name">unknown</td>(.*?)</tr>', section, re.S)
    assert re.findall(r">([^<]+)</td>", row)[2:] == ["–", "–", "–", "–", "0.0312", "–"]


def test_a_generator_without_stain_is_named_first_whatever_its_ssim(tmp_path: Path) -> None:
    def changed(name: str, value: float) -> list[dict[str, Any]]:
        return [
            row | ({"value": value} if (row["method"], row["metric"]) == ("hemera", name) else {})
            for row in metric_rows()
        ]

    fine = written(tmp_path / "fine.html")
    assert "no usable stain" not in fine
    assert "Every network exceeds the trivial baselines" in fine
    pale = written(tmp_path / "pale.html", metrics=changed("brown_ratio", 0.24))
    assert "hemera: no usable stain, whatever its SSIM: generates 24% of the brown" in pale
    wrong = written(tmp_path / "wrong.html", metrics=changed("dab_r", 0.5))
    assert "with r 0.500, not more than the best trivial baseline, 0.500" in wrong
    # Where no baseline has any DAB, none has a correlation.
    rows = [row for row in changed("dab_r", -0.01) if row["method"] != "blurred"]
    assert "r -0.010, not more" in written(tmp_path / "alone.html", metrics=rows)
    rows = [row for row in changed("dab_r", 0.01) if row["method"] != "blurred"]
    assert "no usable stain" not in written(tmp_path / "first.html", metrics=rows)
    unknown = written(tmp_path / "unknown.html", metrics=changed("brown_fraction_real", 0.0001))
    assert "hemera: its stain is not assessed: fewer than 0.1 %" in unknown
    assert "Every network exceeds" not in unknown
    for text in (pale, wrong):
        first = re.findall(r'<li class="([^"]*)"', text[text.index('class="warnings"') :])[0]
        assert "stop" in first
        assert text.index("no usable stain") < text.index('class="cards"')
        assert "Every network exceeds" not in text


def swap_rows(changed: float, f1: tuple[float, float | None, float | None]) -> list[dict[str, Any]]:
    shared = {"network": "segmentation", "method": SEGMENTER, "group": "all", "tiles": 6}
    value, low, high = f1
    return [
        shared | {"metric": metric, "aggregation": swap, **figures, "deviation": None}
        for swap in ("other_tile", "zeros")
        for metric, figures in (
            ("branch_changed", {"value": changed, "low": changed / 2, "high": changed * 2}),
            ("branch_f1_change", {"value": value, "low": low, "high": high}),
        )
    ]


@pytest.mark.parametrize(
    ("changed", "f1", "words"),
    [
        (
            0.0003,
            (-0.0001, -0.0004, 0.0002),
            "changes 0.03 % of the answers, and F1 by −0.0001, 95",
        ),
        (0.0003, (-0.0003, -0.0004, -0.0001), "hardly uses GenerationNet"),
        (0.0300, (-0.0200, -0.0400, 0.0001), "interval −0.0400 to 0.0001"),
        (0.0300, (0.0200, None, None), "and F1 by 0.0200."),
        (0.0300, (-0.0200, None, None), ""),
        (0.0300, (-0.0200, -0.0400, -0.0100), ""),
    ],
)
def test_a_segmenter_that_ignores_its_branch_is_a_warning(
    changed: float, f1: tuple[float, float | None, float | None], words: str, tmp_path: Path
) -> None:
    rows = metric_rows() + swap_rows(changed, f1)
    text = written(tmp_path / "evaluate.html", metrics=rows)
    assert words in text
    assert ("hardly uses GenerationNet" in text) == bool(words)
    assert (
        f"{f1[0]:.4f}".replace("-", "−")
        in cells(text, "that of a tile of another case", "segmentation")[2]
    )
    assert "not applicable: this branch takes no image" in text


def test_no_branch_and_no_measurement_are_stated(tmp_path: Path) -> None:
    assert "evaluate.swap_tiles is 0" in written(tmp_path / "none.html")
    model = {"model": {"generation": None}}
    alone = [*TRAINED[:2], Trained(SEGMENTER, "segmentation", model, TRAINED[2].history)]
    text = written(tmp_path / "alone.html", trained=alone)
    assert "SegmentationNet was trained without a generation branch" in text


def test_scores_read_from_cells_are_a_table(tmp_path: Path) -> None:
    """Both cases: 3+ on the real image, 0 on the generated one."""
    counted = {"cells": [9, 0, 0, 0], "cells_real": [1, 0, 0, 8], "positive_cells": 0,
               "positive_cells_real": 8, "matched_cells": 0}  # fmt: skip
    rows = [row | (counted if row["method"] == "hemera" else {}) for row in tile_rows()]
    text = written(tmp_path / "evaluate.html", tiles=rows)
    (line,) = re.findall(r"<tr><th>3\+</th>(.*?)</tr>", text)
    assert re.findall(r">(\d+)<", line) == ["0", "2", "0", "0", "0", "0"]


def test_cells_that_are_not_those_of_the_real_images_are_a_warning(tmp_path: Path) -> None:
    """Cases bci_0 and bci_1 are 3+; what is generated of bci_1 is 3+ or 0."""

    def page(second: list[int], f1: float | None) -> str:
        rows = []
        for row in tile_rows():
            cells = [1, 0, 0, 8] if row["case"] == "bci_0" else second
            counted = {"cells": cells, "cells_real": [1, 0, 0, 8], "positive_cells": 8,
                       "positive_cells_real": 8, "matched_cells": 8}  # fmt: skip
            rows.append(row | (counted if row["method"] == "hemera" else {}))
        measured = {"network": "generation", "method": "hemera", "metric": "cell_f1",
                    "group": "all", "aggregation": "pooled", "value": f1, "deviation": None,
                    "tiles": 6, "low": None, "high": None}  # fmt: skip
        return written(tmp_path / "cells.html", tiles=rows, metrics=[*metric_rows(), measured])

    words = "hemera: its cells are not those of the real images: "
    assert words not in page([1, 0, 0, 8], 0.5)
    # Half of the cases agree.
    assert words not in page([9, 0, 0, 0], None)
    low = page([1, 0, 0, 8], 0.49)
    assert (
        words + "F1 of positive cells is 0.49, 2 of 2 cases have the HER2 score of the real" in low
    )
    assert "Every network exceeds" not in low
    assert low.index(words) < low.index('id="generation"')
    assert "its cells" not in written(tmp_path / "none.html"), "no cells were compared"
    rows = [row | {"case": "bci_1"} for row in tile_rows()]
    none = {"cells": [9, 0, 0, 0], "cells_real": [1, 0, 0, 8], "positive_cells": 0,
            "positive_cells_real": 8, "matched_cells": 0}  # fmt: skip
    rows = [row | (none if row["method"] == "hemera" else {}) for row in rows]
    assert words + "0 of 1 cases" in written(tmp_path / "wrong.html", tiles=rows)


def test_a_page_without_test_tiles(tmp_path: Path) -> None:
    empty = [Trained(each.name, each.network, {}, history()) for each in TRAINED]
    path = tmp_path / "evaluate.html"
    text = written(path, metrics=[], tiles=[], trained=empty, examples=[])
    assert "SegmentationNet was not evaluated: its test split has no tile" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    cases = [row for row in metric_rows() if row["group"] == "case=bci_0"]
    text = written(
        tmp_path / "evaluate.html",
        tiles=[row | {"case": hostile, "tile": hostile} for row in tile_rows()],
        metrics=metric_rows() + [row | {"group": f"case={hostile}"} for row in cases],
        trained=[Trained("hemera", "generation", {}, history(hostile)), *TRAINED[1:]],
        examples=[example(hostile, case=hostile, dataset=hostile, score=hostile, label=hostile)],
        index_metadata=dict.fromkeys(("mask_target", "fingerprint"), hostile)
        | {"licences": json.dumps([hostile])},
    )
    assert "<script>alert" not in text and text.count("<script") == 1


def test_the_page_stays_below_its_size(tmp_path: Path) -> None:
    """200 tiles of noise exceed the limit: some are left out, and the page states it."""
    noise = np.random.default_rng(7).integers(0, 255, (448, 448, 3), np.uint8)
    images = {"he": noise, "her2": noise, "generated": {"hemera": noise}}
    text = written(tmp_path / "a.html", examples=[example("t", **images)] * 200)
    assert 20_000_000 < len(text) < 30_000_000
    assert "of 200 tiles are shown" in text
    first = re.search(r"data:image/jpeg;base64,([^\"]+)", text)
    assert first is not None
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(first.group(1)), np.uint8), 1)
    assert shown.shape == (448, 448, 3)
    assert written(tmp_path / "b.html", examples=[example("t", **images)] * 200) == text
