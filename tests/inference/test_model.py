"""A trained network, loaded and applied: the map is what the network itself returns."""

import json

import cv2
import numpy as np
import pytest
import tifffile
import tiffslide
import torch
from PIL import Image

from hemera.errors import InputFileError, TrainingError
from hemera.inference.model import load_model
from hemera.inference.options import PredictOptions
from hemera.inference.whole_slide import predict
from hemera.networks import storage
from tests.small_networks import write_segmenter_folder

CPU = torch.device("cpu")
TISSUE, DARK = (222, 150, 190), (90, 40, 120)


@pytest.fixture(scope="module")
def texture():
    """Pink and purple blots, of which even an untrained network calls some positive."""
    rng = np.random.default_rng(4)
    depth = cv2.GaussianBlur(rng.random((400, 640)).astype(np.float32), (0, 0), 9)
    depth = ((depth - depth.min()) / (depth.max() - depth.min()))[..., None]
    return np.rint(np.array(TISSUE) * (1 - depth) + np.array(DARK) * depth).astype(np.uint8)


def tiles_by_network(folder, rgb, places, side):
    """What the network itself returns for each tile."""
    net, _ = storage.load_segmentation(folder / "segmenter.safetensors", folder / "metadata.json")
    with torch.inference_mode():
        for x, y in places:
            image = torch.from_numpy(rgb[y : y + side, x : x + side] / np.float32(255))
            yield torch.sigmoid(net(image.permute(2, 0, 1)[None]))[0, 0].numpy()


def test_the_map_is_what_the_network_returns_and_in_overlaps_between_its_values(tmp_path, texture):
    model = write_segmenter_folder(tmp_path / "model")
    path = tmp_path / "case.png"
    Image.fromarray(texture).save(path)
    out = predict(path, model, tmp_path / "out", PredictOptions(mpp=0.5, probability=True))
    assert out == tmp_path / "out" / "case"
    found = tifffile.imread(out / "case.probability.tif") / 255
    # A stride of 192, the last tile at the edge.
    places = [(x, y) for y in (0, 144) for x in (0, 192, 384)]
    low, high = np.full(found.shape, np.inf), np.full(found.shape, -np.inf)
    count = np.zeros(found.shape, int)
    for (x, y), result in zip(places, tiles_by_network(model, texture, places, 256), strict=True):
        place = np.s_[y : y + 256, x : x + 256]
        low[place] = np.minimum(low[place], result)
        high[place] = np.maximum(high[place], result)
        count[place] += 1
    assert (count >= 1).all()
    half = 0.5 / 255 + 1e-4
    assert np.abs(found - low)[count == 1].max() <= half
    assert ((found >= low - half) & (found <= high + half)).all()
    assert found.std() > 0.01, "the network returns more than one value"
    facts = json.loads((out / "case.json").read_text())
    assert facts["slide"]["mpp_source"] == "--mpp"
    assert facts["model"]["weights_sha256"] == storage.file_digest(model / "segmenter.safetensors")
    assert facts["model"]["index_fingerprint"] == "f" * 64
    mask = tifffile.imread(out / "case.mask.tif")
    assert facts["area"]["positive_um2"] == pytest.approx(np.count_nonzero(mask) / 4)


@pytest.mark.slow
def test_a_real_slide_and_a_real_image(tmp_path, images):
    """The network is untrained; size, resolution and areas of its results are checked."""
    model = write_segmenter_folder(tmp_path / "model", tile_px=512)
    svs = images / "wsi" / "CMU-1-Small-Region.svs"
    (png,) = (images / "bci_pairs_1024" / "HE" / "test").glob("00820*")
    for path, size, mpp in ((svs, (2220, 2967), None), (png, (1024, 1024), 0.46)):
        out = predict(path, model, tmp_path / "out", PredictOptions(mpp=mpp))
        facts = json.loads((out / f"{path.stem}.json").read_text())
        with tiffslide.TiffSlide(out / f"{path.stem}.mask.tif") as mask:
            assert mask.dimensions == size
            stated = float(mask.properties["tiffslide.mpp-x"])
        assert stated == pytest.approx(facts["slide"]["mpp"], rel=1e-6)
        assert 0 < facts["area"]["tissue_um2"] <= size[0] * size[1] * facts["map"]["mpp"] ** 2
        assert facts["tiles"]["unreadable"] == 0


def test_the_resolution_comes_from_the_metadata(tmp_path):
    mixed = write_segmenter_folder(tmp_path / "mixed", mpp=0.46, mpp_max=0.92)
    model = load_model(mixed, CPU)
    assert (model.mpp, model.mpp_max, model.tile_px) == (0.46, 0.92, 256)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(
        TrainingError, match=r"none/segmenter.safetensors: no such file; name the output"
    ):
        load_model(tmp_path / "none", CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"segmenter.safetensors: no such file"):
        load_model(tmp_path / "empty", CPU)
    cut = write_segmenter_folder(tmp_path / "cut")
    (cut / "segmenter.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match="damaged"):
        load_model(cut, CPU)
    with pytest.raises(InputFileError, match="no such file"):
        predict(tmp_path / "none.svs", cut, tmp_path / "out")
