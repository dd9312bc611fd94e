import pytest
import torch

from hemera.errors import TrainingError
from hemera.models.discriminator import PatchGAN


@pytest.mark.parametrize(
    ("channels", "width", "layers", "norm", "expected"),
    [
        (6, 32, 3, "batch", 696_225),
        (6, 64, 3, "batch", 2_768_705),
        (6, 32, 3, "instance", 695_777),
        (6, 64, 3, "instance", 2_767_809),
        (3, 32, 3, "batch", 694_689),
        (3, 64, 3, "instance", 2_764_737),
        (6, 32, 4, "batch", 1_745_313),
        (6, 64, 4, "batch", 6_964_033),
        (6, 64, 4, "instance", 6_962_625),
    ],
)
def test_parameter_counts_are_those_of_the_reference(channels, width, layers, norm, expected):
    with torch.device("meta"):
        net = PatchGAN(channels, width, layers, norm)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


@pytest.mark.parametrize(
    ("layers", "given", "patches"),
    [
        (3, (256, 512), (30, 62)),
        (3, (512, 1024), (62, 126)),
        (4, (512, 256), (30, 14)),
    ],
)
def test_output_shapes(layers, given, patches):
    with torch.device("meta"):
        assert PatchGAN(6, 8, layers)(torch.empty(2, 6, *given)).shape == (
            2,
            1,
            *patches,
        )


def test_too_small_an_image_names_side_and_bound():
    assert PatchGAN(6, 4)(torch.zeros(2, 6, 24, 40)).shape == (2, 1, 1, 3)
    with pytest.raises(TrainingError, match="side 16 px is below 24, what 3 layers need"):
        PatchGAN(6, 4)(torch.zeros(1, 6, 16, 64))
