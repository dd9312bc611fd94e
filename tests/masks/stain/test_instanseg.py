"""Nuclei by InstanSeg through its own package, with a small scripted model made on the spot."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hemera.errors import EngineError
from hemera.masks import label_format
from hemera.masks.stain import Options
from hemera.masks.stain.engine import StainEngine
from tests.small_cells import MEASURED, SHARED, draw

instanseg = pytest.importorskip("instanseg", reason="extra instanseg is not installed")


BOTH = torch.tensor([1, 1])


class Columns(torch.nn.Module):
    """Numbers blue pixels by column of cells, as InstanSeg numbers its instances."""

    def __init__(self, pixel_size: float, columns: int) -> None:
        super().__init__()
        self.pixel_size = pixel_size
        self.cells_and_nuclei = False
        self.columns = columns

    def forward(self, x: torch.Tensor, target_segmentation: torch.Tensor = BOTH) -> torch.Tensor:
        blue = (x[:, 2:] - x[:, :1] > 0.3).float()
        column = torch.arange(x.shape[3]) * self.columns // x.shape[3] + 1
        return blue * column.float()


def scripted(path: Path, columns: int = 4, pixel_size: float = 0.5) -> Path:
    torch.jit.save(torch.jit.script(Columns(pixel_size, columns)), str(path))
    return path


@pytest.mark.parametrize("mpp", [0.5, 0.4])
def test_a_scripted_model_finds_the_nuclei_and_stain_grades_their_membranes(
    tmp_path: Path, mpp: float
) -> None:
    slide = draw(np.array([[0.0, 0.6, 0.0, 0.3]]), mpp=mpp)
    options = Options(nuclei=str(scripted(tmp_path / "instanseg.pt")))
    engine = StainEngine(options, SHARED)
    found = engine.segment(slide.rgb, mpp, MEASURED)
    at = slide.matched(found.cells)
    assert len(found.cells) == 4
    assert (at >= 0).all()
    assert found.cells.positive[at].tolist() == [False, True, False, True]
    nuclei = label_format.nuclei(found.mask)
    assert (nuclei & slide.nuclei).sum() / (nuclei | slide.nuclei).sum() > 0.6
    assert "stain_nuclei_sha256" in engine.versions


def test_a_file_that_is_no_model_of_instanseg_is_an_error_of_one_line(tmp_path: Path) -> None:
    text, other = tmp_path / "text.pt", tmp_path / "other.pt"
    text.write_text("no model")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(other))
    for path, words in ((text, "not a TorchScript model"), (other, "without pixel_size")):
        with pytest.raises(EngineError, match=words) as caught:
            _ = StainEngine(Options(nuclei=str(path)), SHARED).find
        assert "\n" not in str(caught.value)
