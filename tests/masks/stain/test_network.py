"""Nuclei by the network: from maps of known shape, and on drawn cells with the shipped weights."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from scipy import ndimage

from hemera.demo.blocks import grow_block
from hemera.demo.samples import draw_sample
from hemera.demo.variants import draw_variant
from hemera.errors import EngineError
from hemera.masks import label_format
from hemera.masks.stain import Options, nucleus_files
from hemera.masks.stain.engine import StainEngine
from hemera.masks.stain.network import NetworkDetector
from hemera.masks.stain.nuclei import Tile
from hemera.masks.stain.numbering import numbered
from hemera.masks.stain.stains import Stains, separate
from tests.small_cells import BACKGROUND, MEASURED, RGB, SHARED, STRENGTHS, draw, read

Map = npt.NDArray[np.uint8]

GOLDEN = Path(__file__).with_name("golden_nuclei.png")


def discs(
    *places: tuple[float, float, float], height: float = 1.0, shape: tuple[int, int] = (80, 120)
) -> tuple[Map, Map]:
    """Return maps of centres and insides of discs (x, y, radius), px."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    centre, inside = np.zeros(shape), np.zeros(shape)
    for x0, y0, radius in places:
        away = np.hypot(x - x0, y - y0) / radius
        centre = np.maximum(centre, height * np.exp(-2.2 * away**2) * (away < 1))
        inside = np.maximum(inside, away < 1)
    return np.rint(255 * centre).astype(np.uint8), np.rint(255 * inside).astype(np.uint8)


def test_each_maximum_is_a_nucleus_and_touching_ones_are_cut_between_them() -> None:
    labels = numbered(*discs((30, 40, 12), (50, 40, 12), (90, 40, 10)), 0.5)
    assert sorted(np.unique(labels)) == [0, 1, 2, 3]
    assert len({labels[40, 30], labels[40, 50], labels[40, 90]}) == 3
    row = labels[40, 30:51]
    assert abs(int((row == row[0]).sum()) - 10) <= 2, "half way"
    assert abs((labels == labels[40, 90]).sum() - np.pi * 100) < 25


def test_low_maxima_small_pieces_and_insides_without_a_centre_are_none() -> None:
    centre, inside = discs((30, 40, 12), height=0.2)
    assert not numbered(centre, inside, 0.5, centre_min=0.3).any()
    assert numbered(centre, inside, 0.5, centre_min=0.1).max() == 1
    assert not numbered(np.zeros_like(centre), inside, 0.5).any()
    centre, inside = discs((30, 40, 12), (80, 40, 4))
    assert numbered(centre, inside, 0.5, area_min_um2=20).max() == 1
    assert numbered(centre, inside, 0.5, area_min_um2=5).max() == 2


@pytest.mark.parametrize(("saddle", "count"), [(0.95, 1), (0.5, 2)])
def test_maxima_with_a_high_saddle_between_them_are_one_nucleus(saddle: float, count: int) -> None:
    centre, inside = discs((30, 40, 14), (50, 40, 14))
    between = np.hypot(*np.ogrid[-40:40, -40:80]) < 9
    centre[between] = np.maximum(centre[between], round(255 * saddle))
    assert numbered(centre, inside, 0.5).max() == count


def test_every_nucleus_is_one_piece_with_what_is_connected_to_its_centre() -> None:
    centre, inside = discs((40, 40, 14))
    inside[10:70, 60:66] = 255
    labels = numbered(centre, inside, 0.5)
    assert labels.max() == 1
    assert not labels[:, 60:66].any()
    assert ndimage.label(labels)[1] == 1


@pytest.fixture(scope="module")
def shipped() -> NetworkDetector:
    return NetworkDetector(nucleus_files.SHIPPED, Options())


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.92])
@pytest.mark.parametrize("background", [BACKGROUND, (180, 178, 175)])
def test_drawn_nuclei_are_found_at_any_resolution_and_on_a_gray_background(
    mpp: float, background: tuple[int, int, int]
) -> None:
    slide = draw(STRENGTHS, mpp=mpp, background=background)
    engine = StainEngine(Options(nuclei="network"), SHARED)
    found = engine.segment(slide.rgb, mpp, Stains(background, estimated=("haematoxylin", "dab")))
    apart = np.hypot(slide.x_px[:, None] - found.cells.x_px, slide.y_px[:, None] - found.cells.y_px)
    assert (apart.min(axis=1) * mpp < 2).mean() >= 0.9
    assert len(found.cells) <= 1.2 * STRENGTHS.size
    nuclei = label_format.nuclei(found.mask)
    assert (nuclei & slide.nuclei).sum() / (nuclei | slide.nuclei).sum() > 0.6
    assert found.mask.shape == slide.rgb.shape[:2]


def tile_of(rgb: RGB, mpp: float, excluded: npt.NDArray[np.bool_] | None = None) -> Tile:
    haematoxylin = np.ascontiguousarray(separate(rgb, MEASURED)[..., 0])
    return Tile(rgb, mpp, MEASURED, haematoxylin, excluded)


@pytest.mark.parametrize(("compartment", "count"), [("nucleus", 2), ("membrane", 1)])
def test_a_very_dark_nucleus_of_a_nuclear_marker_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, compartment: Literal["nucleus", "membrane"], count: int
) -> None:
    """The network sees one of three discs; of the others, one is dark and one is pale."""
    places = ((30, 40), (80, 40), (130, 40))
    density = np.full((80, 160), 0.02, np.float32)
    for (x, y), value in zip(places, (0.5, 0.5, 0.1), strict=True):
        density[np.hypot(*np.ogrid[0.5 - y : 80 - y, 0.5 - x : 160 - x]) < 8] = value
    rgb = np.rint(BACKGROUND * 10 ** -(density[..., None] * np.array(MEASURED.vectors[1])))
    detector = NetworkDetector(nucleus_files.SHIPPED, Options(compartment=compartment))
    monkeypatch.setattr(detector, "maps", lambda *_: discs((30, 40, 8), shape=(80, 160)))
    stains = dataclasses.replace(MEASURED, nuclear_density=0.5)
    labels = detector.find(Tile(rgb.astype(np.uint8), 0.5, stains, density)).labels
    found = [labels[y, x] for x, y in places]
    assert found[0] and not found[2]
    assert (found[1] > 0, labels.max()) == (count == 2, count)
    assert abs((labels == found[0]).sum() - np.pi * 64) < 60


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (17, 33), (101, 64)])
@pytest.mark.parametrize("mpp", [0.1, 0.46, 4.0])
def test_no_tile_is_too_small(shipped: NetworkDetector, shape: tuple[int, int], mpp: float) -> None:
    tile = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    found = shipped.find(tile_of(tile, mpp))
    assert found.labels.shape == shape
    empty = np.full((*shape, 3), 250, np.uint8)
    assert not shipped.find(tile_of(empty, mpp)).labels.any()


def test_excluded_pixels_belong_to_no_nucleus(shipped: NetworkDetector) -> None:
    slide = draw(np.zeros((2, 4)))
    excluded = np.zeros(slide.rgb.shape[:2], bool)
    excluded[:, : slide.rgb.shape[1] // 2] = True
    found = shipped.find(tile_of(slide.rgb, 0.5, excluded))
    assert found.labels.any()
    assert not found.labels[excluded].any()


def test_a_place_as_pale_as_its_surroundings_is_no_nucleus_whatever_the_network_finds(
    shipped: NetworkDetector,
) -> None:
    """The network sees colours, the thresholds only the density of the nuclear stain."""
    slide = draw(np.zeros((2, 4)))
    stained = tile_of(slide.rgb, 0.5)
    pale = dataclasses.replace(stained, nuclear_stain=np.zeros_like(stained.nuclear_stain))
    assert shipped.find(stained).labels.max() >= 6
    assert not shipped.find(pale).labels.any()


def test_the_number_of_threads_changes_nothing_and_is_left_as_it_was(
    shipped: NetworkDetector,
) -> None:
    slide = draw(STRENGTHS)
    before, found = torch.get_num_threads(), []
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(shipped.maps(slide.rgb, 0.5, BACKGROUND))
            assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(found[0], found[1])


def label_image() -> Map:
    """Return the label image of 256 x 256 px of synthetic tissue."""
    block = grow_block(np.random.default_rng(8))
    rng = np.random.default_rng(5)
    sample = draw_sample(rng, block, draw_variant(rng), 256, 0.5)
    engine = StainEngine(Options(nuclei="network"), SHARED)
    return engine.segment(sample.rgb, 0.5, Stains(sample.background)).mask


def test_golden() -> None:
    """Fails when the weights or what is made of them change: then write the image again."""
    assert (label_image() == read(GOLDEN)[..., 0]).mean() >= 0.999


def test_missing_damaged_and_foreign_weights_are_errors_of_one_line(tmp_path: Path) -> None:
    """Of the plan already, which reads headers alone."""
    absent, damaged, foreign, cut, tensors = (
        tmp_path / name for name in ("a.safetensors", "d.safetensors", "f.safetensors",
                                     "c.safetensors", "t.pt")
    )  # fmt: skip
    damaged.write_bytes(b"no weights")
    cut.write_bytes(nucleus_files.SHIPPED.read_bytes()[:-100])
    safetensors.torch.save_file({"stem.0.weight": torch.zeros(1)}, foreign)
    torch.save({"stem.0.weight": torch.zeros(1)}, tensors)
    for path, words in (
        (absent, "no such file"), (damaged, "cannot be read"), (cut, "cannot be read"),
        (foreign, "weights of another network"), (tensors, "not a TorchScript model"),
    ):  # fmt: skip
        fault = nucleus_files.requirements(str(path))[-1]
        assert f"{path}': {words}" in fault and "\n" not in fault
        with pytest.raises(EngineError, match=words):
            _ = StainEngine(Options(nuclei=str(path)), SHARED).find
    assert "a folder, not a file" in nucleus_files.requirements(str(tmp_path))[-1]


def test_the_tables_record_the_digest_of_the_weights() -> None:
    network = StainEngine(Options(nuclei="network"), SHARED).versions
    assert list(network) == ["stain_nuclei_sha256"]
    assert not StainEngine(Options(nuclei="classical"), SHARED).versions
    assert nucleus_files.SHIPPED.stat().st_size < 3e6


def test_auto_is_the_network_for_markers_of_nuclei_and_thresholds_for_membranes() -> None:
    assert Options().detector == "classical"
    assert Options(compartment="nucleus").detector == "network"
    assert Options(compartment="nucleus", nuclei="classical").detector == "classical"
    assert list(StainEngine(Options(compartment="nucleus"), SHARED).versions)
    assert not StainEngine(Options(), SHARED).versions


def test_a_missing_package_is_a_requirement_that_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "model.pt").write_bytes(b"")
    assert nucleus_files.requirements("classical") == []
    assert "hemera[train]" in nucleus_files.requirements("network")[0]
    missing = nucleus_files.requirements(str(tmp_path / "model.pt"))
    assert "hemera[instanseg]" in missing[-1]
    with pytest.raises(EngineError, match=r"needs torch.*pip install"):
        _ = StainEngine(Options(nuclei="network"), SHARED).find
