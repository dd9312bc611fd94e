import hashlib
import json
import re
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image

from hemera import tables
from hemera.config import DescribeOptions, FilterOptions, TileOptions
from hemera.dataset.criteria import refusals
from hemera.dataset.shards import read_member
from hemera.errors import SheetError
from hemera.imaging.codecs import decode
from hemera.registration.displacement import Displacement, mirrored, none
from hemera.registration.displacement_files import write_displacement
from hemera.stages import tile
from tests.small_displacements import field_of
from tests.small_geojson import geometry, rectangle
from tests.small_registration import plain_errors
from tests.small_sheets import describe_unit, write_certificate, write_sheet
from tests.small_slides import damage_tile, write_pyramid


def tissue(rng, height, width, colours=((235, 190, 215), (95, 60, 140))):
    # In whole numbers, which no processor rounds its own way.
    noise = rng.integers(0, 256, (height, width), dtype=np.uint8)
    share = cv2.blur(cv2.blur(noise, (5, 5)), (5, 5)).astype(float)
    share = (share - share.min()) / np.ptp(share)
    pale, dark = np.array(colours, float)
    return np.rint(pale + share[..., None] * (dark - pale)).astype(np.uint8)


HER2_COLOURS = ((225, 215, 205), (120, 70, 40))


def cut(image, row):
    """The place of a tile in an image of the same resolution."""
    return image[row["y_px"] : row["y_px"] + 128, row["x_px"] : row["x_px"] + 128]


class Unit:
    """One unit in a folder: its sheet, what describe says, and what tile makes of it."""

    def __init__(self, folder, rows, unit="bci.000"):
        self.folder, self.unit = folder, unit
        self.results = folder / "results"
        self.sheet = write_sheet(folder, rows, case="c", dataset="bci", he_mpp=0.5, her2_mpp=0.5)
        self.images_table = self.results / "describe" / f"{unit}.parquet"
        self.shard = self.results / "tile" / f"{unit}.tar"
        describe_unit(folder, unit, self.images_table)

    def tile(self, *, workers=1, registration_quality=None, **options):
        """Run tile, with the displacement and certificate in the folder, if there are any."""
        displacement, certificate = (self.folder / name for name in ("d.npz", "c.parquet"))
        tiles, pairs = (self.shard.with_suffix(s) for s in (".parquet", ".pairs.parquet"))
        tile.run(
            sheet=self.sheet,
            unit=self.unit,
            block_count=1,
            images_table=self.images_table,
            displacement=displacement if displacement.exists() else None,
            certificate=certificate if certificate.exists() else None,
            registration_quality=registration_quality,
            shard=self.shard,
            tiles=tiles,
            pairs=pairs,
            workers=workers,
            options=TileOptions(**{"size_px": 128, "codec": "png", **options}),
        )
        self.rows = tables.read(tiles, tables.TILE).to_pylist()
        [*states] = tables.read(pairs, tables.PAIRS).to_pylist()
        self.states = {state["pair"]: state for state in states}
        return self.rows

    def pixels(self, row, stain):
        data = read_member(
            self.shard.parent.parent / row["shard"], row[f"{stain}_offset"], row[f"{stain}_length"]
        )
        assert hashlib.sha256(data).hexdigest() == row[f"{stain}_sha256"]
        return decode(data)

    @property
    def state(self):
        [state] = self.states.values()
        return state


def registered(name, **changes):
    return {
        "pair": name, "he": f"{name}.he.png", "her2": f"{name}.her2.png", "registered": "true",
        **changes,
    }  # fmt: skip


@pytest.fixture
def images_of_pair(rng, tmp_path):
    """A registered pair of 300 x 420 px."""
    he, her2 = tissue(rng, 300, 420), tissue(rng, 300, 420, HER2_COLOURS)
    Image.fromarray(he).save(tmp_path / "p1.he.png")
    Image.fromarray(her2).save(tmp_path / "p1.her2.png")
    return tmp_path, he, her2


@pytest.fixture
def unit(images_of_pair):
    return Unit(images_of_pair[0], [registered("p1")])


def test_registered_pairs_are_cut_not_resampled(unit, images_of_pair):
    _, he, her2 = images_of_pair
    rows = unit.tile()
    assert [(row["x_px"], row["y_px"]) for row in rows] == [
        (x, y) for y in (0, 128) for x in (0, 128, 256)
    ]
    assert rows[1]["tile"] == "p1_000128_000000"
    for row in rows:
        assert (unit.pixels(row, "he") == cut(he, row)).all()
        assert (unit.pixels(row, "her2") == cut(her2, row)).all()
        assert (row["her2_x_px"], row["her2_y_px"]) == (row["x_px"], row["y_px"])
        assert (row["size_px"], row["mpp"], row["he_mpp"], row["her2_mpp"]) == (128, 0.5, 0.5, 0.5)
        assert row["her2_coverage_fraction"] == 1
        assert row["shard"] == "tile/bci.000.tar"
        gray = cv2.cvtColor(cut(he, row), cv2.COLOR_RGB2GRAY)
        assert row["he_sharpness"] == pytest.approx(cv2.Laplacian(gray, cv2.CV_64F).var())
        assert row["tissue_fraction"] > 0.95
    assert unit.state == {
        "pair": "p1", "state": "tiled", "reason": None, "registration": "registered",
        "tiles_grid": 6, "tiles_tissue": 6, "tiles_artefact": 0, "tiles_unreadable": 0,
        "tiles_written": 6,
    }  # fmt: skip
    with tarfile.open(unit.shard) as archive:
        assert archive.getnames()[:2] == [
            "p1_000000_000000.he.png", "p1_000000_000000.her2.png",
        ]  # fmt: skip


def test_tiles_of_a_registered_pair_have_evidence_of_alignment(rng, tmp_path):
    """The same nuclei in two colours match in place; those of another section do not."""
    names = {"same": 1, "other": 2}
    for name, seed in names.items():
        for stain, color in (("he", (0.2, 0.9, 0.2)), ("her2", (0.3, 0.6, 0.8))):
            own = np.random.default_rng(1 if stain == "he" else seed)
            noise = own.integers(0, 256, (256, 384), dtype=np.uint8).astype(np.float32)
            dark = cv2.GaussianBlur(noise, (0, 0), 5) > np.median(noise)
            rgb = np.rint(245 * 10 ** -(np.where(dark, 0.5, 0.1)[..., None] * color))
            Image.fromarray(rgb.astype(np.uint8)).save(tmp_path / f"{name}.{stain}.png")
    rows = Unit(tmp_path, [registered(name) for name in names]).tile()
    margins = {name: [r["alignment_margin"] for r in rows if r["pair"] == name] for name in names}
    assert {name: len(found) for name, found in margins.items()} == {"same": 6, "other": 6}
    assert min(margins["same"]) > 0.3
    assert np.median(margins["other"]) < 0


def test_mirrored_pairs(images_of_pair):
    folder, _, her2 = images_of_pair
    Image.fromarray(her2[:, ::-1]).save(folder / "p1.her2.png")
    unit = Unit(folder, [registered("p1", mirrored="true")])
    for row in unit.tile():
        assert (unit.pixels(row, "her2") == cut(her2, row)).all()
        assert row["her2_x_px"] == 420 - row["x_px"]
        assert row["her2_coverage_fraction"] == 1


def test_registered_images_of_unequal_mpp_meet_in_micrometres(images_of_pair, rng):
    folder, _, _ = images_of_pair
    fine = tissue(rng, 600, 840, HER2_COLOURS)
    Image.fromarray(fine).save(folder / "p1.her2.png")
    unit = Unit(folder, [registered("p1", her2_mpp=0.25)])
    expected = np.rint(fine.reshape(300, 2, 420, 2, 3).mean(axis=(1, 3)))
    for row in unit.tile():
        assert (row["her2_x_px"], row["her2_y_px"]) == (2 * row["x_px"], 2 * row["y_px"])
        assert np.abs(unit.pixels(row, "her2") - cut(expected, row)).max() <= 1


def test_a_chosen_mpp_gives_tiles_of_that_mpp(unit, images_of_pair):
    _, he, _ = images_of_pair
    rows = unit.tile(mpp=1.0)
    assert [(row["x_px"], row["y_px"]) for row in rows] == [(0, 0)]
    assert rows[0]["mpp"] == 1.0
    halved = np.rint(he[:256, :256].reshape(128, 2, 128, 2, 3).mean(axis=(1, 3)))
    assert np.abs(unit.pixels(rows[0], "he") - halved).max() <= 1
    rows = unit.tile(mpp=0.7, stride_px=64)
    assert {row["x_px"] for row in rows} == {0, 90, 179}  # 64 x 1.4 = 89.6, rounded once


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mpp": 0.25}, "0.5 um/px is coarser than the tiles' 0.25; set tile.mpp"),
        ({"size_px": 512}, "smaller than a tile of 512 px"),
    ],
)
def test_images_too_coarse_or_too_small_are_a_state(unit, options, reason):
    assert unit.tile(**options) == []
    assert unit.state["state"] == "refused"
    assert reason in unit.state["reason"]
    with tarfile.open(unit.shard) as archive:
        assert archive.getnames() == []
    assert len(unit.tile(mpp=0.25, upsample=True)) == 6 * 4


def test_tiles_without_tissue_are_not_written(rng, tmp_path):
    he = np.full((400, 700, 3), 241, np.uint8)
    he[:, :300] = tissue(rng, 400, 300)
    Image.fromarray(he).save(tmp_path / "p1.he.png")
    Image.fromarray(tissue(rng, 400, 700, HER2_COLOURS)).save(tmp_path / "p1.her2.png")
    unit = Unit(tmp_path, [registered("p1")])
    rows = unit.tile(tissue_floor=0.5)
    assert {row["x_px"] for row in rows} == {0, 128}
    assert (unit.state["tiles_grid"], unit.state["tiles_tissue"]) == (15, 6)
    rows = unit.tile(tissue_floor=0.05)
    assert {row["x_px"] for row in rows} == {0, 128, 256}
    part = [row["tissue_fraction"] for row in rows if row["x_px"] == 256]
    assert part == pytest.approx([44 / 128] * 3, abs=0.03)


def test_refused_images_and_verdicts_are_states(images_of_pair):
    folder, he, _ = images_of_pair
    Image.fromarray(np.full_like(he, 240)).save(folder / "blank.he.png")
    (folder / "cut.he.png").write_bytes((folder / "p1.he.png").read_bytes()[:3000])
    (folder / "person.he.png").write_bytes((folder / "p1.he.png").read_bytes())
    (folder / "wide.he.png").write_bytes((folder / "p1.he.png").read_bytes())
    changes = {"blank": {}, "cut": {"her2": "lost.png"}, "p1": {}, "person": {"verdict": "refuse"}}
    changes["wide"] = {"her2_mpp": 0.7}
    unit = Unit(folder, [registered(k, **{"her2": "p1.her2.png"} | v) for k, v in changes.items()])
    rows = unit.tile()
    assert {row["pair"] for row in rows} == {"p1"}
    assert {name: state["state"] for name, state in unit.states.items()} == {
        "blank": "no_tissue", "cut": "unreadable", "p1": "tiled", "person": "refused",
        "wide": "refused",
    }  # fmt: skip
    assert unit.states["person"]["registration"] == "refused"
    for words in ("cut.he.png: cannot be read", "lost.png: no such file"):
        assert words in unit.states["cut"]["reason"]


def test_a_wrong_stain_is_a_state_unless_a_person_accepts_it(images_of_pair):
    folder, _, _ = images_of_pair
    swapped = {"he": "p1.her2.png", "her2": "p1.he.png"}
    unit = Unit(folder, [registered("p1", **swapped)])
    assert unit.tile() == []
    assert unit.state["state"] == "wrong_stain"
    assert "is IHC by its colours" in unit.state["reason"]
    unit = Unit(folder, [registered("p1", verdict="accept", **swapped)])
    assert len(unit.tile()) == 6
    assert unit.state["state"] == "tiled"


def test_any_number_of_workers_gives_the_same_bytes(images_of_pair):
    folder, he, _ = images_of_pair
    Image.fromarray(he[::-1]).save(folder / "p2.he.png")
    unit = Unit(folder, [registered("p1"), registered("p2", her2="p1.her2.png")])
    names = ("bci.000.tar", "bci.000.parquet", "bci.000.pairs.parquet")
    outputs = []
    for workers in (1, 2, 5):
        unit.tile(workers=workers, size_px=64, codec="jpeg")
        outputs.append([(unit.shard.parent / name).read_bytes() for name in names])
    assert len(unit.rows) == 48
    assert outputs[0] == outputs[1] == outputs[2]


def test_stored_tiles_are_copied_where_they_are_tiles(rng, tmp_path):
    for name in ("he", "her2"):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", tissue(rng, 300, 420), tile=(128, 128), photometric="rgb",
            compression="jpeg", compressionargs={"level": 80}, resolution=(2e4, 2e4),
            resolutionunit="CENTIMETER",
        )  # fmt: skip
    row = {"pair": "case1", "dataset": "acrobat", "he": "he.tif", "her2": "her2.tif"}
    unit = Unit(tmp_path, [{**row, "he_mpp": "", "her2_mpp": "", "registered": "true"}], "case1")
    copied = unit.tile(codec="jpeg")
    pixels = [unit.pixels(row, stain) for row in copied for stain in ("he", "her2")]
    assert len(copied) == 6
    plain = unit.tile(codec="png")
    for number, row in enumerate(plain):
        for k, stain in enumerate(("he", "her2")):
            # To the bit what the slide holds: nothing was encoded a second time.
            np.testing.assert_array_equal(pixels[2 * number + k], unit.pixels(row, stain))
    again = unit.tile(codec="jpeg", copy_stored=False)
    assert sum(row["he_length"] for row in again) > 1.2 * sum(row["he_length"] for row in copied)
    location = ("offset", "length", "sha256")
    measured = [name for name in tables.TILE.names if not name.endswith(location)]
    assert [[row[name] for name in measured] for row in copied] == [
        [row[name] for name in measured] for row in plain
    ]


def test_artefacts_of_a_file_replace_those_that_are_detected(images_of_pair):
    """Three columns of two tiles; the file covers the first and a quarter of the second."""
    folder, _, _ = images_of_pair
    mask = folder / "mask.png"
    classes = np.ones((75, 105), np.uint8)
    classes[:, :40] = 4
    Image.fromarray(classes).save(mask)
    for stain, mirror in (("he", ""), ("her2", ""), ("her2", "true")):
        changes = {f"{stain}_artefacts": mask.name, "mirrored": mirror}
        rows = Unit(folder, [registered("p1", **changes)]).tile(artefact_max=1)
        assert len(rows) == 6
        for row in rows:
            left, right = row["x_px"], row["x_px"] + 128
            if mirror:
                left, right = 420 - right, 420 - left
            pen = np.clip(160 - left, 0, 128) / 128
            # The overview has pixels of 8 um, a tile is 64 um wide.
            assert row[f"{stain}_pen_fraction"] == pytest.approx(pen, abs=0.07)
            others = {"he", "her2"} - {stain}
            assert [row[f"{other}_pen_fraction"] for other in others] == [0]
            assert (row["artefacts"] is None) == (pen == 0)
    unit = Unit(folder, [registered("p1", he_artefacts=mask.name)])
    assert {row["x_px"] for row in unit.tile()} == {128, 256}
    assert unit.state["tiles_artefact"] == 2
    assert {row["x_px"] for row in unit.tile(artefact_max=0.2)} == {256}


@pytest.mark.parametrize(
    ("shape", "value", "reason"),
    [
        ((75, 105), 4, "artefacts cover more than 50% of each of 6 positions with tissue"),
        ((75, 75), 1, "he_artefacts: mask.png has 75 x 75 px, which are not the proportions of"),
    ],
)
def test_artefacts_of_a_file_can_refuse_a_pair(images_of_pair, shape, value, reason):
    folder, _, _ = images_of_pair
    Image.fromarray(np.full(shape, value, np.uint8)).save(folder / "mask.png")
    unit = Unit(folder, [registered("p1", he_artefacts="mask.png")])
    assert unit.tile() == []
    assert unit.state["state"] == "refused"
    assert reason in unit.state["reason"]


def test_only_inside_the_region_of_interest(images_of_pair):
    folder, _, _ = images_of_pair
    roi = folder / "roi.geojson"
    unit = Unit(folder, [registered("p1", roi=roi.name)])
    roi.write_text(polygon(0, 0, 200, 300))
    # Columns at 0 (whole), 128 (72 of 128 px: over half) and 256 (none).
    assert {row["x_px"] for row in unit.tile()} == {0, 128}
    assert {row["x_px"] for row in unit.tile(size_px=150)} == {0}


def polygon(*corners):
    return json.dumps(geometry("Polygon", [rectangle(*corners)]))


@pytest.mark.parametrize(
    ("text", "state", "reason"),
    [
        ("not json", "refused", r"^roi\.geojson: not GeoJSON"),
        (None, "refused", "no such file"),
        (polygon(9000, 9000, 9900, 9900), "no_tissue", "none of 6 positions with tissue"),
    ],
)
def test_a_region_without_tiles(images_of_pair, text, state, reason):
    folder, _, _ = images_of_pair
    unit = Unit(folder, [registered("p1", roi="roi.geojson")])
    if text:
        (folder / "roi.geojson").write_text(text)
    assert unit.tile() == []
    assert unit.state["state"] == state
    assert re.search(reason, unit.state["reason"])


# Whole slides with a displacement.

HE_MPP, HER2_MPP = 0.5, 0.44
HER2_SIZE = 880, 640


def truth(x_um, y_um):
    """The HER2 picture as a function of the place: no symmetry, 3 to 6 levels per pixel."""
    red = 150 + 60 * np.sin(x_um / 13 + 0.5) * np.cos(y_um / 17)
    green = 130 + 50 * np.cos(x_um / 11 - y_um / 23)
    blue = 110 + 50 * np.sin(y_um / 9 + 1)
    return np.stack([red, green, blue], axis=-1)


def field_at(points):
    """Where a point (x, y) in um of H&E lies on HER2: turned, shifted and bent."""
    x, y = points[..., 0], points[..., 1]
    angle = np.radians(7)
    return np.stack(
        [
            np.cos(angle) * x - np.sin(angle) * y + 45 + 4 * np.sin(y / 40),
            np.sin(angle) * x + np.cos(angle) * y - 12 + 3 * np.cos(x / 55),
        ],
        axis=-1,
    )


@pytest.fixture
def slides(rng, tmp_path):
    """An unregistered pair with its displacement and certificate."""
    he = tissue(rng, 500, 700)
    x, y = np.meshgrid(*(np.arange(side) + 0.5 for side in HER2_SIZE))
    her2 = np.rint(truth(x * HER2_MPP, y * HER2_MPP)).astype(np.uint8)
    for name, rgb, mpp in (("he", he, HE_MPP), ("her2", her2, HER2_MPP)):
        write_pyramid(tmp_path / f"{name}.tif", [rgb], (mpp, mpp))
    write_displacement(tmp_path / "d.npz", field_of(field_at, 88, 63))
    write_certificate(tmp_path / "c.parquet", "case1", "pass")
    return tmp_path


def whole_slides(folder, **changes):
    row = {"pair": "case1", "dataset": "acrobat", "he": "he.tif", "her2": "her2.tif"}
    return Unit(folder, [{**row, "he_mpp": "", "her2_mpp": "", **changes}], unit="case1")


def test_her2_is_resampled_through_the_displacement(slides):
    unit = whole_slides(slides)
    rows = unit.tile()
    assert len(rows) == 15
    assert unit.state["registration"] == "pass"
    errors = []
    for row in rows:
        x, y = np.meshgrid(np.arange(128) + 0.5, np.arange(128) + 0.5)
        fixed = np.stack([x + row["x_px"], y + row["y_px"]], axis=-1) * HE_MPP
        moving = field_at(fixed)
        inside = (
            (moving[..., 0] > 2) & (moving[..., 0] < HER2_SIZE[0] * HER2_MPP - 2)
            & (moving[..., 1] > 2) & (moving[..., 1] < HER2_SIZE[1] * HER2_MPP - 2)
        )  # fmt: skip
        got = unit.pixels(row, "her2").astype(float)
        errors.append((got - truth(moving[..., 0], moving[..., 1]))[inside])
        corner = field_at(np.array([row["x_px"], row["y_px"]]) * HE_MPP) / HER2_MPP
        assert (row["her2_x_px"], row["her2_y_px"]) == pytest.approx(tuple(corner), abs=0.1)
    assert np.abs(np.concatenate(errors)).mean() < 0.5


def test_artefacts_of_a_file_follow_the_displacement(slides):
    """A disc on HER2, drawn in level-0 pixels, is where its corresponding points are."""
    angles = np.linspace(0, 2 * np.pi, 49)
    centre, radius = np.array([430, 300]), 160
    ring = (centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1)).tolist()
    (slides / "marks.geojson").write_text(json.dumps(geometry("Polygon", [ring])))
    rows = whole_slides(slides, her2_artefacts="marks.geojson").tile()
    assert len(rows) == 15
    for row in rows:
        x, y = np.meshgrid(np.arange(128) + 0.5, np.arange(128) + 0.5)
        fixed = np.stack([x + row["x_px"], y + row["y_px"]], axis=-1) * HE_MPP
        inside = np.linalg.norm(field_at(fixed) / HER2_MPP - centre, axis=-1) < radius
        assert row["her2_other_fraction"] == pytest.approx(inside.mean(), abs=0.05)
        assert row["he_other_fraction"] == row["her2_pen_fraction"] == 0
    assert max(row["her2_other_fraction"] for row in rows) > 0.6


def test_a_fold_is_found_in_its_tile(slides):
    vectors = np.zeros((63, 88, 2), np.float32)
    # To the right of x = 40 um on, within 24 um, points run backwards.
    vectors[5:12, 10:16, 0] = -np.arange(6) * 8
    d = Displacement(vectors, 4.0)
    # A mirror that the sheet does not declare does not fold: the registration may have found it.
    for field in (d, mirrored(d, HER2_SIZE[0] * HER2_MPP)):
        write_displacement(slides / "d.npz", field)
        rows = whole_slides(slides).tile()
        folded = {(row["x_px"], row["y_px"]) for row in rows if row["folding_fraction"] > 0}
        assert folded == {(0, 0)}


@pytest.mark.parametrize(
    ("certificate", "manual", "registration", "tiles"),
    [
        ("fail", "", "fail", 0),
        ("fail", "accept", "accepted", 15),
        ("review", "", "review", 15),
    ],
)
def test_the_certificate_decides_unless_a_person_does(
    slides, certificate, manual, registration, tiles
):
    write_certificate(slides / "c.parquet", "case1", certificate, "tiles do not match")
    unit = whole_slides(slides, verdict=manual)
    assert len(unit.tile()) == tiles
    assert unit.state["registration"] == registration
    assert unit.state["state"] == ("tiled" if tiles else "refused")
    assert bool(unit.state["reason"]) == (not tiles)


@pytest.mark.parametrize(("damaged", "words"), [(False, "gave no map"), (True, "d.npz")])
def test_a_missing_or_damaged_map_is_a_state(slides, damaged, words):
    """Also where a person accepts it."""
    write_displacement(slides / "d.npz", none())
    if damaged:
        (slides / "d.npz").write_bytes(b"nothing of the kind")
    unit = whole_slides(slides, verdict="accept")
    assert unit.tile() == []
    assert unit.state["state"] == "refused"
    assert words in unit.state["reason"]


def test_each_tile_has_the_quality_of_the_registration_at_its_centre(slides, monkeypatch):
    """Squares 40 um apart that match in place, with an error that is a formula of the place."""
    plain_errors(monkeypatch)
    unit = whole_slides(slides)
    rows = [
        {
            "pair": "case1", "x_um": x, "y_um": y, "side_um": 80.0, "step_um": 40.0,
            "ncc": 0.2 + x / 1000, "best_shifted_ncc": 0.1,
            "residual_x_um": 3 * (x / 100), "residual_y_um": 4 * (x / 100), "spread_um": 1.0,
        }
        for y in np.arange(20.0, 200, 40) for x in np.arange(20.0, 300, 40)
    ]  # fmt: skip
    tables.write(slides / "q.parquet", rows, tables.QUALITY)
    found = unit.tile(registration_quality=slides / "q.parquet")
    assert len(found) > 10
    for row in found:
        centre = (row["x_px"] + 64) * HE_MPP
        if centre <= 260:
            assert row["registration_error_um"] == pytest.approx(5 * centre / 100)
            assert row["registration_error_low_um"] == pytest.approx(5 * centre / 400)
            assert row["registration_error_high_um"] == pytest.approx(5 * centre / 50)
            assert row["registration_ncc"] == pytest.approx(0.2 + centre / 1000)
            assert row["registration_margin"] == pytest.approx(0.1 + centre / 1000)
        elif centre > 300 + 40:
            assert row["registration_error_um"] is None
    assert {row["registration_error_um"] for row in unit.tile()} == {None}


def test_the_reader_chosen_for_describe_reads_here_too(slides, monkeypatch):
    unit = whole_slides(slides)
    direct = [row["he_sha256"] for row in unit.tile()]
    describe_unit(slides, "case1", unit.images_table, DescribeOptions(reader="openslide"))
    monkeypatch.delattr("hemera.imaging.tiff.TiffReader.read")
    assert [row["he_sha256"] for row in unit.tile()] == direct


def test_a_tile_that_cannot_be_decoded_costs_that_tile(slides):
    unit = whole_slides(slides)
    whole = {row["tile"]: row["he_sha256"] for row in unit.tile()}
    damage_tile(slides / "he.tif", 8)  # six stored tiles in a row: row 1, column 2
    rows = unit.tile(workers=2)
    assert unit.state["state"] == "tiled"
    assert (unit.state["tiles_unreadable"], unit.state["tiles_written"]) == (1, 14)
    assert {row["tile"] for row in rows} == set(whole) - {"case1_000256_000128"}
    assert all(whole[row["tile"]] == row["he_sha256"] for row in rows)
    damage_tile(slides / "he.tif", 7)
    damage_tile(slides / "he.tif", 9)
    assert unit.tile() == []
    assert unit.state["state"] == "unreadable"
    assert "over 10% (tile.bad_tiles_max)" in unit.state["reason"]
    with tarfile.open(unit.shard) as archive:
        assert archive.getnames() == []
    assert len(unit.tile(bad_tiles_max=0.5)) == 12


def test_a_real_slide_against_itself(images, tmp_path):
    path = images / "wsi" / "CMU-1-Small-Region.svs"
    row = {"pair": "cmu", "dataset": "wsi", "he": path, "her2": path, "registered": "true"}
    unit = Unit(tmp_path, [{**row, "he_mpp": "", "her2_mpp": ""}], unit="cmu")
    assert unit.tile() == []
    assert unit.state["state"] == "refused"
    assert "the same image twice" in unit.state["reason"]
    described = tables.read(unit.images_table, tables.DESCRIBE).to_pylist()
    accepted = [{**row, "verdict": "accept", "reason": None} for row in described]
    tables.write(unit.images_table, accepted, tables.DESCRIBE)
    rows = unit.tile(size_px=512, codec="jpeg", workers=2)
    assert unit.state["tiles_grid"] == 20
    assert 10 <= len(rows) < 20
    for row in rows:
        assert row["he_sha256"] == row["her2_sha256"]
        assert row["histogram_similarity"] == pytest.approx(1.0)
    assert max(row["tissue_fraction"] for row in rows) > 0.7


GOLDEN = {6: "48b8a7732de79303"}


def test_golden(slides):
    unit = whole_slides(slides)
    rows = unit.tile()
    plain = []
    for row in rows:
        pixels = [hashlib.sha256(unit.pixels(row, stain)).hexdigest() for stain in tables.STAINS]
        kept = {k: v for k, v in row.items() if not k.endswith(("offset", "length", "sha256"))}
        kept["artefacts"] = kept["artefacts"] and kept["artefacts"].hex()
        plain.append(
            [pixels, {k: round(v, 5) if isinstance(v, float) else v for k, v in kept.items()}]
        )
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    assert digest == GOLDEN.get(TileOptions.version), (
        "tile's output changed: raise TileOptions.version and add the digest"
    )


def test_an_empty_cohort_is_an_error_of_the_sheet(unit):
    unit.unit = "bci.009"
    with pytest.raises(SheetError, match=r"no unit bci\.009"):
        unit.tile()
    assert not unit.shard.exists()


def test_real_bci_pairs_pass_the_filters(images, tmp_path):
    folder = images / "bci_pairs_1024"
    unit = Unit(
        tmp_path,
        [
            registered(name[:5], he=folder / "HE/test" / name, her2=folder / "IHC/test" / name)
            | {"he_mpp": 0.46, "her2_mpp": 0.46}
            for name in ("00345_test_0.png", "00820_test_2+.png")
        ],
    )
    rows = unit.tile(size_px=512, codec="jpeg")
    assert len(rows) == 8
    facts = {"dataset": "bci", "registration": "registered"}
    reasons = refusals(
        pa.Table.from_pylist([row | facts for row in rows]), FilterOptions().model_dump()
    )
    # Two quarters of a pair are mostly background, as one sees; none is rejected for its histogram.
    assert np.count_nonzero(reasons == "") >= 6
    assert set(reasons) <= {"", "low_tissue"}
