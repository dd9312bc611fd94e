"""Stage embed: features of H&E tiles, by statistics and by a network of timm."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from hemera.__main__ import main
from hemera.config import EmbedOptions
from hemera.dataset.features import FeatureFile
from hemera.errors import ShardError, TrainingError
from hemera.imaging import texture
from hemera.stages import embed
from tests.command_line import words
from tests.small_networks import write_published
from tests.small_units import Unit, tissue

from PIL import Image  # isort: skip

GOLDEN = {2: "7debeeb3bb1ba099"}


def alone(folder):
    # Blocks of H&E alone come after those of pairs.
    return Unit(folder, [{"pair": "p1", "he": "p1.he.png", "her2_mpp": ""}], unit="bci.001")


@pytest.fixture
def unit(tmp_path, rng):
    """An H&E image alone of 300 x 420 px: six tiles of 128 px."""
    Image.fromarray(tissue(rng, 300, 420)).save(tmp_path / "p1.he.png")
    made = alone(tmp_path)
    made.tile()
    return made


def inputs(unit):
    return {
        "tiles": unit.shard.with_suffix(".parquet"),
        "tile_shard": unit.shard,
        "images_table": unit.images_table,
    }


def run(unit, encoder="statistics", name="f.h5", **options):
    path = unit.folder / name
    values = {"split": 2, "min_view_tissue": 0.0, "torch_threads": 1, "device": "cpu", **options}
    embed.run(**inputs(unit), encoder=encoder, features=path, options=EmbedOptions(**values))
    return FeatureFile(path)


def test_h_and_e_alone_has_tiles_without_her2(unit):
    assert len(unit.rows) == 6
    assert unit.state["registration"] == "he_only" and unit.state["state"] == "tiled"
    assert all(row["her2_offset"] is None and row["her2_sharpness"] is None for row in unit.rows)
    assert all(row["he_sharpness"] > 0 for row in unit.rows)


def test_views_are_the_quarters_of_tiles(unit):
    file = run(unit)
    views = file.views()
    assert file.width == 64 and len(views.tiles) == 24
    found = file.read(slice(None)).astype(np.float32)
    row = unit.rows[1]
    rgb = unit.pixels(row, "he")
    for k, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        part = np.ascontiguousarray(rgb[64 * i : 64 * i + 64, 64 * j : 64 * j + 64])
        expected = texture.statistics(part, tuple(row["he_background"]), 0.5)
        assert found[4 + k] == pytest.approx(expected, rel=2e-3, abs=1e-3)
        assert views.coords[4 + k].tolist() == [row["x_px"] + 64 * j, row["y_px"] + 64 * i]
    assert set(views.pairs) == {"p1"} and views.tiles[4:8] == [row["tile"]] * 4
    assert views.size_px.tolist() == [64.0] * 24


def test_any_readers_and_batches_give_the_same_bytes_but_for_the_options(unit):
    files = [run(unit, name=f"{k}.h5", readers=readers, batch_size=size)
             for k, (readers, size) in enumerate(((1, 1), (4, 7)))]  # fmt: skip
    assert np.array_equal(files[0].read(slice(None)), files[1].read(slice(None)))
    run(unit, name="a.h5"), run(unit, name="b.h5")
    assert (unit.folder / "a.h5").read_bytes() == (unit.folder / "b.h5").read_bytes()


def test_views_without_tissue_have_no_row(tmp_path, rng):
    rgb = tissue(rng, 128, 256)
    rgb[:, 192:] = 240
    Image.fromarray(rgb).save(tmp_path / "p1.he.png")
    made = alone(tmp_path)
    made.tile()
    file = run(made, min_view_tissue=0.25)
    assert file.views().coords[:, 0].tolist() == [0, 64, 0, 64, 128, 128]


def test_a_unit_without_tiles_has_zero_rows_and_a_reason(tmp_path):
    Image.fromarray(np.full((300, 420, 3), 240, np.uint8)).save(tmp_path / "p1.he.png")
    made = alone(tmp_path)
    made.tile()
    file = run(made)
    assert len(file.views().tiles) == 0 and file.attributes["reason"] == "the unit has no tiles"


def test_a_damaged_tile_is_an_error_and_leaves_no_file(unit):
    data = bytearray(unit.shard.read_bytes())
    offset = unit.rows[0]["he_offset"] + 50
    data[offset] ^= 0xFF
    unit.shard.write_bytes(bytes(data))
    with pytest.raises(ShardError, match="SHA-256"):
        run(unit)
    assert not (unit.folder / "f.h5").exists()


@pytest.fixture
def published(tmp_path):
    return tmp_path / "net", write_published(tmp_path / "net")


def test_a_network_of_timm_from_a_folder(unit, published):
    folder, net = published
    file = run(unit, "mine", weights=(f"mine={folder}",), batch_size=5)
    rgb = unit.pixels(unit.rows[0], "he")[:64, :64]
    image = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        expected = net((image - 0.5) / 0.25)[0].numpy()
    assert file.width == 24
    assert file.read(slice(0, 1))[0] == pytest.approx(expected, rel=2e-3, abs=2e-3)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert file.attributes["encoder_sha256"] == digest


def test_weights_that_are_missing_or_of_another_network_are_errors(unit, published):
    folder, _ = published
    with pytest.raises(TrainingError, match="no weights of encoder uni2_h"):
        run(unit, "uni2_h")
    with pytest.raises(TrainingError, match="does not exist"):
        run(unit, "mine", weights=("mine=nowhere",))
    with pytest.raises(TrainingError, match="neither one of uni"):
        (folder / "other").mkdir()
        (folder / "model.safetensors").rename(folder / "other" / "model.safetensors")
        run(unit, "mine", weights=(f"mine={folder / 'other'}",))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["embed_dim"] = 48
    (folder / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match="does not fit the network"):
        run(unit, "mine", weights=(f"mine={folder / 'other'}",))
    with pytest.raises(TrainingError, match=r"none of model\.safetensors"):
        run(unit, "mine", weights=(f"mine={folder}",))


def test_the_command_line_gives_the_same_bytes(unit):
    run(unit, split=1)
    given = {**inputs(unit), "encoder": "statistics", "features": unit.folder / "cli.h5",
             "split": 1, "min_view_tissue": 0.0, "torch_threads": 1, "device": "cpu"}  # fmt: skip
    assert main(["embed", *words(given)]) == 0
    assert (unit.folder / "cli.h5").read_bytes() == (unit.folder / "f.h5").read_bytes()


def test_pytorch_is_imported_for_networks_alone():
    code = "import sys; from hemera.stages import embed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_golden(unit):
    """Fails when the features change and `EmbedOptions.version` does not: raise it then."""
    file = run(unit)
    values = np.round(file.read(slice(None)).astype(float), 1) + 0.0
    text = json.dumps([values.tolist(), file.views().coords.tolist()])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[EmbedOptions.version]
