"""Errors by hand: a known shift, read from both forms of landmark files."""

import hashlib
import json
import logging
import math

import numpy as np
import pytest

from hemera import tables
from hemera.config import LandmarksOptions
from hemera.displacement import Displacement, none
from hemera.errors import SheetError, TableError
from hemera.files import write_displacement
from hemera.stages import landmarks

HE_MPP, HER2_MPP = 0.5, 0.8
WIDTH, HEIGHT = 3000, 4000
DIAGONAL_UM = 2500.0

SHIFT = Displacement(np.full((40, 30, 2), (30.0, -40.0), np.float32), 50.0)
"""Every point moves by 50 um."""

ACROBAT = (
    "anon_id,anon_filename_he,anon_filename_ihc,point_id,ihc_x,ihc_y,mpp_ihc_10X,mpp_he_10X,"
    "ihc_antibody,he_x,he_y"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "case1").mkdir()
    row = dict.fromkeys(tables.DESCRIBE.names) | {"pair": "case1", "verdict": "accept"}
    he = row | {
        "stain": "he", "file": "7_HE_val.tif", "mpp": HE_MPP, "width_px": WIDTH,
        "height_px": HEIGHT,
    }  # fmt: skip
    her2 = row | {
        "stain": "her2", "file": "7_HER2_val.tif", "mpp": HER2_MPP, "width_px": 2000,
        "height_px": 2600,
    }  # fmt: skip
    tables.write(tmp_path / "describe.parquet", [he, her2], tables.DESCRIBE)
    write_displacement(tmp_path / "case1.npz", SHIFT)
    return tmp_path


def sheet(folder, he_landmarks, her2_landmarks):
    (folder / "pairs.tsv").write_text(
        "pair\tcase\tdataset\the\ther2\the_landmarks\ther2_landmarks\n"
        f"case1\tcase1\tacrobat\t7_HE_val.tif\t7_HER2_val.tif\t{he_landmarks}\t{her2_landmarks}\n"
    )


def acrobat(folder, rows, header=ACROBAT):
    (folder / "points.csv").write_text("\n".join([header, *rows]) + "\n")
    sheet(folder, "points.csv", "points.csv")


def row(point, he, ihc, names=("7_HE_val.ndpi", "7_HER2_val.ndpi"), mpps=("0.8", "0.5")):
    return ",".join(
        ["7", *names, str(point), str(ihc[0]), str(ihc[1]), *mpps, "HER2", str(he[0]), str(he[1])]
    )


def run(folder, unit="case1", displacement="case1.npz", **options):
    landmarks.run(
        sheet=folder / "pairs.tsv",
        unit=unit,
        images_table=folder / "describe.parquet",
        displacement=None if displacement is None else folder / displacement,
        errors=folder / "out" / "case1.parquet",
        options=LandmarksOptions(**options),
    )
    return tables.read(folder / "out" / "case1.parquet", tables.LANDMARKS).to_pylist()


class TestAcrobat:
    def test_the_error_is_the_distance_on_her2(self, folder):
        # (100, 200) is mapped to (130, 160); 3-4-5 beside it.
        acrobat(folder, [row(0, (100, 200), (133, 164)), row(1, (700, 900), (730, 860))])
        first, second = run(folder)
        assert first["point"] == "0"
        assert first["error_um"] == pytest.approx(5)
        assert first["error_diagonal_fraction"] == pytest.approx(5 / DIAGONAL_UM)
        assert first["initial_error_um"] == pytest.approx(math.hypot(33, 36))
        assert (first["he_x_um"], first["her2_y_um"]) == (100, 164)
        assert second["error_um"] == pytest.approx(0, abs=1e-6)

    def test_pixels_are_taken_times_the_files_own_resolution(self, folder):
        acrobat(folder, [row(0, (200, 400), (163 / 0.8, 164 / 0.8), mpps=("0.8", "0.5"))])
        # H&E (100, 200) um -> (130, 160); HER2 (163, 164) um.
        assert run(folder, coordinates="px")[0]["error_um"] == pytest.approx(math.hypot(33, 4))

    def test_without_a_resolution_the_slides_own_is_taken(self, folder):
        acrobat(folder, [row(0, (200, 400), (200, 205), mpps=("", ""))])
        # (100, 200) -> (130, 160); (160, 164).
        found = run(folder, coordinates="px")[0]["error_um"]
        assert found == pytest.approx(math.hypot(30, 4))

    def test_distances_of_several_annotators_are_averaged(self, folder):
        # 6 and 2 um on opposite sides: the mean of the points would be 2 um off.
        rows = [row(4, (100, 200), (136, 160)), row(4, (100, 200), (128, 160))]
        acrobat(folder, rows)
        found = run(folder)
        assert len(found) == 1
        assert found[0]["error_um"] == pytest.approx(4)
        assert found[0]["her2_x_um"] == pytest.approx(132)

    @pytest.mark.parametrize("withheld", ["", "nan", "NaN"])
    def test_a_side_that_is_withheld_has_no_error(self, folder, withheld):
        acrobat(folder, [row(0, (withheld, withheld), (50, 60)), row(1, (10, 20), (40, -20))])
        first, second = run(folder)
        assert (first["he_x_um"], first["error_um"], first["initial_error_um"]) == (None,) * 3
        assert first["her2_x_um"] == 50
        assert second["error_um"] == pytest.approx(0, abs=1e-6)

    def test_rows_of_other_slides_are_left_out(self, folder, caplog):
        other = ("8_HE_val.ndpi", "8_HER2_val.ndpi")
        acrobat(folder, [row(0, (1, 2), (3, 4), other), row(1, (1, 2), (31, -38))])
        assert [line["point"] for line in run(folder)] == ["1"]
        acrobat(folder, [row(0, (1, 2), (3, 4), other)])
        assert run(folder) == []
        assert "no landmarks of 7_HE_val.tif" in caplog.text

    def test_another_file_is_an_error_that_names_the_columns(self, folder):
        acrobat(folder, ["1,2"], header="X,Y")
        with pytest.raises(TableError, match=r"points.csv: lacks the columns anon_filename_he"):
            run(folder)

    def test_a_word_for_a_number_is_an_error_that_names_the_line(self, folder):
        acrobat(folder, [row(0, (1, 2), (3, 4)), row(1, ("here", 2), (3, 4))])
        with pytest.raises(TableError, match=r"points.csv: line 3, he_x: 'here' is no number"):
            run(folder)


class TestPlain:
    def plain(self, folder, he, her2, header=",X,Y"):
        for name, points in (("he.csv", he), ("her2.csv", her2)):
            lines = [f"{n},{x},{y}" for n, (x, y) in enumerate(points, 1)]
            (folder / name).write_text("\n".join([header, *lines]) + "\n")
        sheet(folder, "he.csv", "her2.csv")

    def test_point_n_here_is_point_n_there_in_level_0_pixels(self, folder):
        # H&E (100, 200), (700, 900) um; HER2 (133, 164), (730, 860) um.
        he, her2 = [(200, 400), (1400, 1800)], [(133 / 0.8, 164 / 0.8), (730 / 0.8, 860 / 0.8)]
        self.plain(folder, he, her2)
        first, second = run(folder)
        assert (first["point"], second["point"]) == ("1", "2")
        assert first["error_um"] == pytest.approx(5)
        assert second["error_um"] == pytest.approx(0, abs=1e-6)

    def test_unequal_lengths_take_the_first_of_both(self, folder, caplog):
        self.plain(folder, [(1, 2), (3, 4), (5, 6)], [(1, 2)], header="n,x,y")
        assert len(run(folder)) == 1
        assert "3 landmarks on H&E and 1 on HER2; the first 1" in caplog.text

    def test_other_columns_are_an_error(self, folder):
        self.plain(folder, [(1, 2)], [(1, 2)], header="n,a,b")
        with pytest.raises(TableError, match="no columns X and Y"):
            run(folder)


class TestEmptyAndBad:
    def test_no_map_gives_no_rows(self, folder, caplog):
        acrobat(folder, [row(0, (100, 200), (133, 164))])
        write_displacement(folder / "case1.npz", none())
        assert run(folder) == []
        assert "no map" in caplog.text

    def test_an_image_without_resolution_gives_no_rows(self, folder):
        acrobat(folder, [row(0, (100, 200), (133, 164))])
        lines = tables.read(folder / "describe.parquet", tables.DESCRIBE).to_pylist()
        lines[1] |= {"mpp": None, "verdict": "refuse"}
        tables.write(folder / "describe.parquet", lines, tables.DESCRIBE)
        assert run(folder) == []

    @pytest.mark.parametrize("names", [("points.csv", "points.csv"), ("a.csv", "b.csv")])
    def test_an_empty_file_gives_no_rows(self, folder, names):
        for name in names:
            (folder / name).write_text("")
        sheet(folder, *names)
        assert run(folder) == []

    def test_a_file_that_is_not_there(self, folder):
        sheet(folder, "points.csv", "points.csv")
        with pytest.raises(TableError, match="no such landmark file"):
            run(folder)

    def test_a_file_that_is_no_text(self, folder):
        (folder / "points.csv").write_bytes(b"\xff\xfe\x00\x01" * 50)
        sheet(folder, "points.csv", "points.csv")
        with pytest.raises(TableError, match="cannot be read"):
            run(folder)

    def test_a_pair_without_landmarks(self, folder):
        sheet(folder, "", "")
        with pytest.raises(SheetError, match="give he_landmarks and her2_landmarks"):
            run(folder)

    def test_an_unknown_pair(self, folder):
        acrobat(folder, [])
        with pytest.raises(SheetError, match="no pair another"):
            run(folder, unit="another")


def test_the_log_tells_median_and_percentile(folder, caplog):
    caplog.set_level(logging.INFO)
    acrobat(folder, [row(n, (100, 200), (130 + n, 160)) for n in range(11)])
    run(folder)
    assert "11 points, median 5.0 um, 90th percentile 9.0 um" in caplog.text


def test_the_same_bytes_twice(folder):
    acrobat(folder, [row(0, (100, 200), (133, 164))])
    run(folder)
    before = (folder / "out" / "case1.parquet").read_bytes()
    run(folder)
    assert (folder / "out" / "case1.parquet").read_bytes() == before


def test_golden(folder):
    acrobat(folder, [row(0, (100, 200), (133, 164)), row(1, ("", ""), (730, 860))])
    rounded = [
        {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in line.items()
        }
        for line in run(folder)
    ]
    digest = hashlib.sha256(json.dumps(rounded).encode()).hexdigest()
    golden = {1: "8d6d3a98f0e3a5f4c79605ed82094b86e34ff2eccad0d2f48a4ae13ed5860b89"}
    assert {LandmarksOptions.version: digest} == golden


def test_a_pair_that_comes_registered_is_measured_without_a_map(folder):
    acrobat(folder, [row(1, (100, 80), (103, 84)), row(2, (300, 200), (300, 200))])
    found = run(folder, displacement=None)
    assert [point["error_um"] for point in found] == pytest.approx([5.0, 0.0], abs=1e-6)
    assert [point["initial_error_um"] for point in found] == pytest.approx([5.0, 0.0], abs=1e-6)
