"""The published results are those that their sources print."""

import pytest

from hemera.evaluation import published

GENERATION = {
    "HEMERA GenerationNet": (21.669, 0.355, None),
    "Pyramid Pix2pix": (21.16, 0.477, None),
    "Pyramid Pix2pix, rerun by its default test": (18.064, 0.3674, None),
    "Pyramid Pix2pix, rerun at 1024 px": (18.659, 0.4771, None),
    "PSPStain": (18.622, 0.4498, None),
    "PSPStain, rerun": (19.308, 0.4553, None),
    "BCIStainer, submitted": (22.929, 0.5585, None),
    "BCIStainer, best": (23.394, 0.5833, None),
    "BCIStainer, input not rotated": (22.812, 0.5273, None),
    "VP-GAN": (22.16, 0.47, 346.37),
    "Pyramid Pix2pix, by VP-GAN's authors": (21.15, 0.43, 516.75),
    "pix2pix, by VP-GAN's authors": (20.74, 0.44, 472.6),
    "ASP, on MIST": (14.54, 0.216, 66.0),
    "PSPStain, on MIST": (14.32, 0.198, 46.9),
    "Pyramid Pix2pix, on MIST": (15.15, 0.218, 110.9),
}
SEGMENTATION = {"HEMERA SegmentationNet": (0.771, 0.513, 0.631, 0.487)}


@pytest.mark.parametrize(
    ("network", "expected"), [("generation", GENERATION), ("segmentation", SEGMENTATION)]
)
def test_published_results(network, expected):
    results = published.results(network)
    metrics = published.METRICS[network]
    assert {
        result["method"]: tuple(
            float(result[metric]) if metric in result else None for metric in metrics
        )
        for result in results
    } == expected
    for result in results:
        assert set(result) <= {"method", "source", "comparable", *metrics}
        assert result["source"] and result["comparable"]


def test_the_results_of_segmentation_are_not_of_one_aggregation():
    (result,) = published.results("segmentation")
    precision, recall = float(result["precision"]), float(result["recall"])
    assert round(2 * precision * recall / (precision + recall), 3) == 0.616 != float(result["f1"])
