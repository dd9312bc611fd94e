"""Zarr stores of pairs: read as the specifications of OME-Zarr and SpatialData have it."""

import collections
import json
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import zarr
from scipy.ndimage import map_coordinates

from hemera import tables
from hemera.__main__ import main
from hemera.interop import spatialdata
from hemera.registration.displacement_files import write_displacement
from tests.small_displacements import field_of
from tests.small_units import HE_MPP, HER2_MPP, HER2_SIZE, field_at, truth

HE_SIZE = 700, 500
SCENE = "scene.ome.zarr"


def export(unit, *words, code=0, out="out"):
    given = ("--configfile", str(unit.folder / "config.yaml"), "--results", str(unit.results))
    assert main(["export", "spatialdata", str(unit.folder / out), *given, *words]) == code
    return unit.folder / out


@pytest.fixture
def store(study, monkeypatch):
    """A store with several chunks and levels; 0.44 um/px, that of HER2 and finer than H&E."""
    monkeypatch.setattr(spatialdata, "_CHUNK_PX", 256)
    monkeypatch.setattr(spatialdata, "_FIELD_NODES", 50)
    return export(study, "--mpp", "0.44") / "case1.zarr"


def scale_and_shift(dataset):
    """Return scale and translation of the axes of a dataset of OME-Zarr 0.6."""
    (whole,) = dataset["coordinateTransformations"]
    assert whole["input"] == {"path": dataset["path"]}
    parts = {part["type"]: part for part in whole.get("transformations", [whole])}
    scale = parts["scale"]["scale"]
    return np.array(scale), np.array(
        parts.get("translation", {"translation": [0] * 3})["translation"]
    )


def through_scene(store, points):
    """Map (x, y), um, by the transformation of the scene and nothing else."""
    scene = zarr.open_group(store / SCENE, mode="r")
    ome = scene.attrs["ome"]
    assert ome["version"] == "0.6"
    systems = {system["name"]: system["axes"] for system in ome["scene"]["coordinateSystems"]}
    (found,) = [
        each for each in ome["scene"]["coordinateTransformations"]
        if (each["input"], each["output"]) == ({"name": "he"}, {"name": "her2"})
    ]  # fmt: skip
    assert (found["type"], found["interpolation"]) == ("displacements", "linear")
    names = [axis["name"] for axis in systems["he"]]
    assert systems["he"] == systems["her2"]
    assert {axis["unit"] for axis in systems["he"]} == {"micrometer"}
    field = scene[found["path"]]
    (image,) = field.attrs["ome"]["multiscales"]
    (system,) = image["coordinateSystems"]
    component, *axes = system["axes"]
    assert (component["type"], component["discrete"]) == ("displacement", True)
    assert [axis["name"] for axis in axes] == names
    (dataset,) = image["datasets"]
    scale, shift = scale_and_shift(dataset)
    values = field[dataset["path"]][:].astype(float)
    # Coordinates in the order of the axes.
    ordered = np.stack([points["xy".index(name)] for name in names])
    at = (ordered - shift[1:, None]) / scale[1:, None]
    moved = [map_coordinates(part, at, order=1, mode="constant", cval=np.nan) for part in values]
    moved = ordered + np.stack(moved)
    return np.stack([moved[names.index(name)] for name in "xy"])


def test_points_through_the_scene_are_those_of_warp(study, store):
    """Over the whole slide of H&E, up to its edges."""
    rng = np.random.default_rng(4)
    points = rng.random((400, 2)) * HE_SIZE
    points[:4] = [(0, 0), (700, 0), (0, 500), (700, 500)]
    source, warped = study.folder / "points.csv", study.folder / "warped.csv"
    pd.DataFrame(points, columns=["X", "Y"]).to_csv(source, index=False)
    given = ("--configfile", str(study.folder / "config.yaml"), "--results", str(study.results))
    words = ("--to", "her2", "--pair", "case1", *given)
    assert main(["warp", "points", str(source), str(warped), *words]) == 0
    moved = through_scene(store, points.T * HE_MPP).T / HER2_MPP
    assert np.abs(moved - pd.read_csv(warped)).max(axis=None) < 0.002
    assert np.abs(moved - field_at(points * HE_MPP) / HER2_MPP).max() < 0.3


def test_pixels_of_both_hierarchies_are_where_the_slides_have_them(store):
    scene = zarr.open_group(store / SCENE, mode="r")
    root = zarr.open_group(store, mode="r")
    for stain, size, finest in (("he", HE_SIZE, HE_MPP), ("her2", HER2_SIZE, 0.44)):
        (image,) = scene[stain].attrs["ome"]["multiscales"]
        (other,) = root[f"images/{stain}"].attrs["ome"]["multiscales"]
        paths = [dataset["path"] for dataset in image["datasets"]]
        assert len(paths) == 3
        assert paths == [dataset["path"] for dataset in other["datasets"]]
        for level, dataset in enumerate(image["datasets"]):
            pixels = scene[stain][dataset["path"]][:]
            assert (pixels == root[f"images/{stain}"][dataset["path"]][:]).all()
            assert pixels.shape == (3, size[1] >> level, size[0] >> level)
            scale, shift = scale_and_shift(dataset)
            assert scale.tolist() == [1, finest * 2**level, finest * 2**level]
            if stain == "her2":
                y, x = np.indices(pixels.shape[1:]) * scale[1] + shift[1]
                off = np.moveaxis(pixels, 0, -1) - truth(x, y)
                # Without the shift 0.7, 1.4 and 2.7.
                assert np.sqrt((off**2).mean()) < (0.4, 0.5, 0.7)[level]


def test_the_images_of_spatialdata_lie_on_each_other_by_the_affine_part(store):
    images = zarr.open_group(store / "images", mode="r")
    matrices = {}
    for stain in tables.STAINS:
        ome = images[stain].attrs["ome"]
        assert ome["version"] == "0.5-dev-spatialdata"
        (image,) = ome["multiscales"]
        (found,) = image["coordinateTransformations"]
        assert found["output"]["name"] == "global"
        for end in ("input", "output"):
            assert [axis["name"] for axis in found[end]["axes"]] == ["c", "y", "x"]
        matrices[stain] = np.array(found["affine"])
    assert matrices["he"].tolist() == [[1, 0, 0, 0], [0, HE_MPP, 0, 0], [0, 0, HE_MPP, 0]]
    points = np.random.default_rng(5).random((500, 2)) * HE_SIZE * HE_MPP
    there = field_at(points) / 0.44
    back = matrices["her2"] @ [np.zeros(500), there[:, 1], there[:, 0], np.ones(500)]
    # The field is a rotation with waves of 4 and 3 um.
    assert np.abs(back[:0:-1].T - points).max() < 6
    assert np.abs(back[:0:-1].T - points).mean() < 3


def test_tiles_and_cells_are_shapes_in_pixels_of_he(study, store):
    shapes = {}
    for name in ("tiles", "cells"):
        table = pq.read_table(store / "shapes" / name / "shapes.parquet")
        geo = json.loads(table.schema.metadata[b"geo"])
        assert geo["columns"][geo["primary_column"]]["encoding"] == "WKB"
        shapes[name] = table.to_pandas()
        (found,) = zarr.open_group(store / "shapes" / name).attrs["coordinateTransformations"]
        assert found["scale"] == [HE_MPP, HE_MPP]
    rows = tables.read(study.results / "filter" / "tiles.parquet", tables.filtered(("stain",)))
    rows = rows.to_pylist()
    tiles = shapes["tiles"].replace({np.nan: None}).set_index("name")
    assert len(tiles) == len(rows)
    for row in rows:
        tile = tiles.loc[row["tile"]]
        x, y, side = row["x_px"], row["y_px"], row["size_px"]
        assert shapely.from_wkb(tile.geometry).equals(shapely.box(x, y, x + side, y + side))
        assert (tile.accepted, tile.reason) == (row["accepted"], row["reason"])
    cells = tables.read(study.results / "mask" / "case1.cells.parquet", tables.CELLS).to_pandas()
    cells = cells[cells.tile.isin(tiles.index[tiles.accepted])]
    assert len(cells)
    assert collections.Counter(cells.tile) == collections.Counter(shapes["cells"].name)
    points = shapely.from_wkb(shapes["cells"].geometry.to_numpy())
    corner = tiles.geometry.map(lambda wkb: shapely.from_wkb(wkb).bounds[:2])
    expected = np.stack(corner[cells.tile]) + cells[["x_px", "y_px"]].to_numpy()
    assert shapely.get_coordinates(points) == pytest.approx(expected)
    assert np.pi * shapes["cells"].radius.to_numpy() ** 2 == pytest.approx(cells.area_px)


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_bytes_depend_on_no_threads_and_no_links(study, monkeypatch):
    first = contents(export(study, "--workers", "1"))
    linked = study.folder / "out" / "case1.zarr" / "images" / "he" / "0" / "zarr.json"
    assert linked.stat().st_nlink == 2

    def no_links(*_):
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert contents(export(study, "--workers", "3", out="other")) == first
    assert (study.folder / "other" / "case1.zarr" / "images" / "he" / "0").stat()


def test_pairs_without_a_map_are_left_out_unless_they_are_named(study, caplog):
    (study.results / "register" / "case1.displacement.npz").unlink()
    export(study, code=1)
    assert "no pair is registered" in caplog.text
    caplog.clear()
    export(study, "--pair", "case1", code=1)
    assert "pair case1: not registered yet" in caplog.text
    assert not (study.folder / "out").exists()


def test_a_displacement_onto_a_line_is_an_error(study, caplog):
    onto_line = field_of(
        lambda at: np.stack([at[..., 0], np.full(at.shape[:-1], 90.0)], axis=-1), 88, 63
    )
    write_displacement(study.results / "register" / "case1.displacement.npz", onto_line)
    export(study, code=1)
    assert "pair case1: its displacement maps H&E to a line" in caplog.text


def test_accepted_tiles_without_cells_have_no_table_of_cells(study):
    path = study.results / "mask" / "case1.cells.parquet"
    tables.write(path, [], tables.CELLS)
    shapes = export(study) / "case1.zarr" / "shapes"
    assert [each.name for each in shapes.iterdir() if each.is_dir()] == ["tiles"]
