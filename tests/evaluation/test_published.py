"""The figures that stand beside ours are those their sources print (SPEC 1.8, 3 and 9)."""

from hemera.evaluation.published import PAPERS

GENERATION = {
    "HEMERA GenerationNet": (21.669, 0.355, None),
    "Pyramid Pix2pix": (21.16, 0.477, None),
    "Pyramid Pix2pix, rerun by its default test": (18.064, 0.3674, None),
    "Pyramid Pix2pix, rerun at 1024 px": (18.659, 0.4771, None),
    "PSPStain": (18.622, 0.4498, None),
    "PSPStain, rerun": (19.308, 0.4553, None),
    "BCIStainer, submitted": (22.929, 0.5585, None),
    "BCIStainer, its best": (23.394, 0.5833, None),
    "BCIStainer, input not turned": (22.812, 0.5273, None),
    "VP-GAN": (22.16, 0.47, 346.37),
    "Pyramid Pix2pix, by VP-GAN's authors": (21.15, 0.43, 516.75),
    "pix2pix, by VP-GAN's authors": (20.74, 0.44, 472.6),
    "ASP, on MIST": (14.54, 0.216, 66.0),
    "PSPStain, on MIST": (14.32, 0.198, 46.9),
    "Pyramid Pix2pix, on MIST": (15.15, 0.218, 110.9),
}


def test_the_generators_figures():
    found = {
        figure.method: tuple(float(value) if value else None for value in figure.values)
        for figure in PAPERS["generation"]
    }
    assert found == GENERATION


def test_the_segmentations_figures_cannot_be_of_one_aggregation():
    (figure,) = PAPERS["segmentation"]
    precision, recall, f1, iou = map(float, figure.values)
    assert (precision, recall, f1, iou) == (0.771, 0.513, 0.631, 0.487)
    assert round(2 * precision * recall / (precision + recall), 3) == 0.616, "not .631"
    assert "cannot be of one aggregation" in figure.comparable


def test_every_figure_says_where_it_is_from_and_how_far_it_compares():
    for figures in PAPERS.values():
        assert len({figure.method for figure in figures}) == len(figures)
        assert all(figure.source and figure.comparable for figure in figures)
