"""Errors and predictions by hand: a known shift, read from both forms of landmark files."""

import csv
import hashlib
import json
import logging
import math

import numpy as np
import pytest

from hemera import tables
from hemera.config import DescribeOptions, LandmarksOptions
from hemera.errors import SheetError, TableError
from hemera.registration.displacement import Displacement, inverse_points, node_points, none
from hemera.registration.displacement_files import write_displacement
from hemera.registration.landmark_errors import official_error
from hemera.registration.landmarks import check_landmarks
from hemera.sheet import read_sheet
from hemera.stages import describe, landmarks

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


def several(folder, rows):
    """Write a file in which two annotators marked H&E: (point, HER2, H&E of each)."""
    names = "anon_filename_he,anon_filename_ihc,point_id,ihc_x,ihc_y"
    header = f"{names},he_1_x,he_1_y,he_2_x,he_2_y"
    lines = [
        ",".join(map(str, ["7_HE_val.ndpi", "7_HER2_val.ndpi", point, *ihc, *first, *second]))
        for point, ihc, first, second in rows
    ]
    acrobat(folder, lines, header)


def run(folder, unit="case1", displacement="case1.npz", **options):
    landmarks.run(
        sheet=folder / "pairs.tsv",
        unit=unit,
        images_table=folder / "describe.parquet",
        displacement=None if displacement is None else folder / displacement,
        errors=folder / "out" / "case1.parquet",
        predictions=folder / "out" / "case1.csv",
        options=LandmarksOptions(**options),
    )
    return tables.read(folder / "out" / "case1.parquet", tables.LANDMARKS).to_pylist()


def reason(folder):
    return tables.read_metadata(folder / "out" / "case1.parquet").get("reason")


def predictions(folder):
    with open(folder / "out" / "case1.csv", newline="") as file:
        return list(csv.DictReader(file))


def made(function):
    """Return the displacement that leads each node to function(node)."""
    nodes = node_points(SHIFT)
    return Displacement((function(nodes) - nodes).astype(np.float32), SHIFT.mpp)


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

    def test_rows_of_other_slides_are_left_out(self, folder):
        other = ("8_HE_val.ndpi", "8_HER2_val.ndpi")
        acrobat(folder, [row(0, (1, 2), (3, 4), other), row(1, (1, 2), (31, -38))])
        assert [line["point"] for line in run(folder)] == ["1"]

    def test_a_byte_order_mark_and_line_ends_of_windows(self, folder):
        acrobat(folder, [row(0, (100, 200), (133, 164))])
        text = (folder / "points.csv").read_text().replace("\n", "\r\n")
        (folder / "points.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert run(folder)[0]["error_um"] == pytest.approx(5)
        assert (folder / "out" / "case1.csv").read_text().splitlines()[0] == ACROBAT


class TestOfficial:
    """The distance on H&E, from where HER2's point is predicted to where it was marked."""

    def test_the_prediction_is_the_way_back(self, folder):
        # HER2 (133, 164) comes from (103, 204); H&E was marked at (100, 200).
        acrobat(folder, [row(0, (100, 200), (133, 164))])
        found = run(folder)[0]
        predicted = found["predicted_x_um"], found["predicted_y_um"]
        assert predicted == pytest.approx((103, 204), abs=1e-3)
        assert found["official_error_um"] == pytest.approx(5, abs=1e-3)
        assert found["official_initial_error_um"] == pytest.approx(math.hypot(33, 36))

    def test_where_the_map_scales_it_is_not_the_error_on_her2(self, folder):
        write_displacement(folder / "case1.npz", made(lambda p: p * 2))
        # On HER2 (200, 400) and (206, 408) are 10 um apart; on H&E (100, 200), (103, 204): 5.
        acrobat(folder, [row(0, (100, 200), (206, 408))])
        found = run(folder)[0]
        assert found["error_um"] == pytest.approx(10, abs=1e-2)
        assert found["official_error_um"] == pytest.approx(5, abs=1e-2)

    def test_two_annotators_in_columns_of_their_own(self, folder):
        # (130, 160) comes from (100, 200): 5 um from one mark, 10 from the other.
        several(folder, [(3, (130, 160), (103, 204), (100, 190))])
        found = run(folder)[0]
        assert found["official_error_um"] == pytest.approx(7.5, abs=1e-3)
        assert found["error_um"] == pytest.approx(7.5, abs=1e-3)
        assert found["official_initial_error_um"] == pytest.approx(
            (math.hypot(27, 44) + math.hypot(30, 30)) / 2
        )
        assert (found["he_x_um"], found["he_y_um"]) == (101.5, 197)

    def test_two_annotators_in_rows_of_their_own(self, folder):
        acrobat(folder, [row(3, (103, 204), (130, 160)), row(3, (100, 190), (130, 160))])
        (found,) = run(folder)
        assert found["official_error_um"] == pytest.approx(7.5, abs=1e-3)

    def test_a_point_that_one_annotator_lacks_is_left_out(self, folder):
        """As the official evaluation does; the target registration error takes what there is."""
        several(folder, [(3, (130, 160), (103, 204), ("", "")), (4, (130, 160), *[(100, 200)] * 2)])
        first, second = run(folder)
        assert first["official_error_um"] is None
        assert first["official_initial_error_um"] is None
        assert first["error_um"] == pytest.approx(5, abs=1e-3)
        assert second["official_error_um"] == pytest.approx(0, abs=1e-3)

    def test_what_lies_outside_of_the_slide_is_moved_to_its_edge(self, folder):
        # H&E is 1500 x 2000 um. From (-20, 200) to (0, 200); from (1530, 2030) to (1500, 2000);
        # a y of 1740 would be outside of a slide that lies on its side.
        acrobat(
            folder,
            [
                row(0, (0, 200), (10, 160)),
                row(1, (1497, 1996), (1560, 1990)),
                row(2, (100, 1740), (130, 1700)),
            ],
        )
        left, low, tall = run(folder)
        assert left["predicted_x_um"] == pytest.approx(-20, abs=1e-3), "kept as it is"
        assert left["official_error_um"] == pytest.approx(0, abs=1e-3)
        assert left["error_um"] == pytest.approx(20, abs=1e-3)
        assert low["official_error_um"] == pytest.approx(5, abs=1e-3)
        assert low["error_um"] == pytest.approx(math.hypot(33, 34), abs=1e-3)
        assert low["official_initial_error_um"] == pytest.approx(math.hypot(3, 6))
        assert tall["official_error_um"] == pytest.approx(0, abs=1e-3)

    def test_a_point_without_a_way_back_counts_unregistered(self, folder, caplog):
        # All of x between 450 and 1050 falls on 750.
        crushed = made(
            lambda p: np.stack(
                [np.where(np.abs(p[..., 0] - 750) < 300, 750, p[..., 0]), p[..., 1]], axis=-1
            )
        )
        lost = (640.0, 100.0)
        assert np.isnan(inverse_points(crushed, [lost])).all(), "or the test says nothing"
        write_displacement(folder / "case1.npz", crushed)
        acrobat(folder, [row(0, (637, 104), lost), row(1, (200, 300), (200, 300))])
        first, second = run(folder)
        assert (first["predicted_x_um"], first["predicted_y_um"]) == (None, None)
        assert first["official_error_um"] == pytest.approx(5)
        assert first["error_um"] is not None, "the way forth there is"
        assert second["official_error_um"] == pytest.approx(0, abs=0.1)
        assert "1 points of HER2 have no corresponding point" in caplog.text
        assert predictions(folder)[0]["he_x"] == ""

    def test_a_map_that_flattens_the_slide_has_no_way_back(self, folder, caplog):
        flat = made(lambda p: np.stack([np.full_like(p[..., 0], 750), p[..., 1]], axis=-1))
        write_displacement(folder / "case1.npz", flat)
        acrobat(folder, [row(0, (100, 200), (103, 204))])
        found = run(folder)[0]
        assert found["predicted_x_um"] is None
        assert found["official_error_um"] == pytest.approx(5)
        assert "no way back" in caplog.text

    def test_the_formula_alone(self):
        """No map: HER2's coordinates; (120, 50) is moved to (100, 50) of 100 x 60 um."""
        size = np.array([100.0, 60.0])
        here = [(100.0, 60.0), (100.0, 20.0)]
        assert official_error(None, (120.0, 50.0), here, size) == pytest.approx(20)
        assert official_error((-3.0, -9.0), (1.0, 1.0), [(4.0, 3.0)], size) == 5
        assert official_error(None, (120.0, 50.0), here, None) == pytest.approx(
            (math.hypot(20, 10) + math.hypot(20, 30)) / 2
        )


class TestPredictions:
    """The rows of an ACROBAT file, its H&E side predicted, as the challenge takes them."""

    def test_the_files_own_columns_are_kept_and_the_truth_is_not(self, folder):
        rows = [row(0, ("", ""), (133, 164)), row(1, (1, 2), (230, 60))]
        other = row(2, (1, 2), (3, 4), ("7_HE_val.ndpi", "7_ER_val.ndpi"))
        acrobat(folder, [*(f"{line},a b" for line in (*rows, other))], f"{ACROBAT},note")
        run(folder)
        first, second = predictions(folder)
        assert ",".join(first) == f"{ACROBAT},note"
        assert (first["he_x"], first["he_y"]) == ("103.0000", "204.0000")
        assert (second["he_x"], second["he_y"]) == ("200.0000", "100.0000")
        assert (first["anon_filename_he"], first["ihc_x"], first["note"]) == (
            "7_HE_val.ndpi", "133", "a b",
        )  # fmt: skip

    def test_a_withheld_side_is_predicted_too(self, folder):
        acrobat(folder, [row(0, ("", ""), (133, 164))])
        found = run(folder)[0]
        assert found["predicted_x_um"] == pytest.approx(103, abs=1e-3)
        assert (found["official_error_um"], found["error_um"]) == (None, None)

    def test_in_pixels_where_the_file_is_in_pixels(self, folder):
        # HER2 (133, 164) um; H&E (103, 204) um at 0.5 um/px.
        acrobat(folder, [row(0, ("", ""), (133 / 0.8, 164 / 0.8), mpps=("0.8", "0.5"))])
        run(folder, coordinates="px")
        line = predictions(folder)[0]
        assert (line["he_x"], line["he_y"]) == ("206.0000", "408.0000")

    def test_annotators_columns_stay_at_home(self, folder):
        several(folder, [(3, (130, 160), (103, 204), (100, 190))])
        run(folder)
        line = predictions(folder)[0]
        assert list(line) == [
            *("anon_filename_he", "anon_filename_ihc", "point_id", "ihc_x", "ihc_y", "he_x", "he_y")
        ]
        assert (line["he_x"], line["he_y"]) == ("100.0000", "200.0000")

    @pytest.mark.parametrize("coordinates", ["um", "px"])
    def test_read_back_as_landmarks_they_have_no_error(self, folder, coordinates):
        rng = np.random.default_rng(3)
        write_displacement(
            folder / "case1.npz",
            made(lambda p: p * (1.02, 0.97) + 40 * np.sin(p[..., ::-1] / 300) + (12, -7)),
        )
        scale = 1 if coordinates == "um" else 1 / HER2_MPP
        points = rng.uniform((100, 100), (1400, 1900), (50, 2)) * scale
        acrobat(folder, [row(n, (1, 2), point) for n, point in enumerate(points)])
        assert min(line["official_error_um"] for line in run(folder, coordinates=coordinates)) > 50
        (folder / "points.csv").write_bytes((folder / "out" / "case1.csv").read_bytes())
        for line in run(folder, coordinates=coordinates):
            assert line["error_um"] < 0.011
            assert line["official_error_um"] < 1e-3

    def test_plain_files_give_the_header_alone(self, folder):
        for name in ("he.csv", "her2.csv"):
            (folder / name).write_text("X,Y\n1,2\n")
        sheet(folder, "he.csv", "her2.csv")
        run(folder)
        assert (folder / "out" / "case1.csv").read_text() == ACROBAT + "\n"


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
        assert "3 landmarks on H&E and 1 on HER2; only the first 1" in caplog.text

    def test_a_row_with_one_side_empty_has_no_error(self, folder):
        self.plain(folder, [("", ""), (200, 400)], [(1, 2), (130 / 0.8, 160 / 0.8)])
        first, second = run(folder)
        assert (first["error_um"], first["initial_error_um"]) == (None, None)
        assert first["predicted_x_um"] == pytest.approx(0.8 - 30, abs=1e-3)
        assert second["error_um"] == pytest.approx(0, abs=1e-4)


class TestBroken:
    """No landmark file fails a job: no rows, and why; `hemera sheet check` finds it before."""

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("X,Y\n1,2\n", "points.csv: lacks the columns anon_filename_he"),
            (ACROBAT.replace("he_y", "he_z") + "\n" + ",".join("1" * 11), "lacks the columns he_y"),
            ("", "points.csv: no landmarks of 7_HE_val.tif and 7_HER2_val.tif"),
            (ACROBAT + "\n", "points.csv: no landmarks of 7_HE_val.tif and 7_HER2_val.tif"),
            (
                "\n".join([ACROBAT, row(0, (1, 2), (3, 4), ("8_HE_val.ndpi", "8_HER2_val.ndpi"))]),
                "no landmarks of 7_HE_val.tif and 7_HER2_val.tif",
            ),
            (
                "\n".join([ACROBAT, "", row(0, (1, 2), (3, 4)), row(1, ("here", 2), (3, 4))]),
                "points.csv: line 4, he_x: 'here' is no number",
            ),
            (
                f"{ACROBAT}\n{row(0, (1, 2), ('1e308', 4))}",
                "line 2, ihc_x: 1e308 is outside",
            ),
            (
                f"{ACROBAT}\n{row(0, (1, '-inf'), (3, 4))}",
                "line 2, he_y: -inf is outside",
            ),
            (b"\xff\xfe\x00\x01" * 50, "points.csv: cannot be read"),
            ("a\n" + "b" * 200_000, "points.csv: cannot be read (field larger than field limit"),
        ],
    )
    def test_an_acrobat_file(self, folder, text, words, caplog):
        sheet(folder, "points.csv", "points.csv")
        (folder / "points.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert run(folder) == []
        assert words in reason(folder)
        assert ";" in reason(folder)
        assert "\n" not in reason(folder)
        assert str(folder) not in reason(folder)
        assert words in caplog.text
        assert (folder / "out" / "case1.csv").read_text() == ACROBAT + "\n"
        with pytest.raises(TableError, match=r"points\.csv"):
            check_landmarks(read_sheet(folder / "pairs.tsv").pairs[0])

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("n,a,b\n1,2,3\n", "he.csv: no columns X and Y"),
            ("", "he.csv: no landmarks"),
            ("X,Y\n", "he.csv: no landmarks"),
            ("X,Y\n1,two\n", "he.csv: line 2, y: 'two' is no number"),
        ],
    )
    def test_a_plain_file(self, folder, text, words):
        sheet(folder, "he.csv", "her2.csv")
        (folder / "he.csv").write_text(text)
        (folder / "her2.csv").write_text("X,Y\n1,2\n")
        assert run(folder) == []
        assert words in reason(folder)
        with pytest.raises(TableError, match=r"he\.csv"):
            check_landmarks(read_sheet(folder / "pairs.tsv").pairs[0])

    def test_a_good_file_has_no_reason(self, folder):
        acrobat(folder, [row(0, (100, 200), (133, 164))])
        run(folder)
        assert reason(folder) is None

    @pytest.mark.parametrize("column", ["mpp_he_10X", "mpp_ihc_10X"])
    def test_a_resolution_that_cannot_be(self, folder, column):
        mpps = ("0.8", "-1") if column == "mpp_he_10X" else ("-1", "0.5")
        acrobat(folder, [row(0, (1, 2), (3, 4), mpps=mpps)])
        assert run(folder, coordinates="px") == []
        assert f"line 2, {column}: no resolution" in reason(folder)


class TestWithoutAMap:
    """The points are there, and how far off they are unregistered; no more can be said."""

    def test_an_empty_displacement(self, folder, caplog):
        acrobat(folder, [row(0, (103, 204), (100, 200)), row(1, ("", ""), (100, 200))])
        write_displacement(folder / "case1.npz", none())
        first, second = run(folder)
        assert (first["error_um"], first["error_diagonal_fraction"]) == (None, None)
        assert (first["predicted_x_um"], first["predicted_y_um"]) == (None, None)
        assert first["initial_error_um"] == pytest.approx(5)
        assert first["official_error_um"] == first["official_initial_error_um"]
        assert first["official_error_um"] == pytest.approx(5)
        assert second["official_error_um"] is None
        assert "no map" in caplog.text
        assert "no map" in reason(folder)
        assert [line["he_x"] for line in predictions(folder)] == ["", ""], "nor the expert's"

    def test_a_displacement_that_cannot_be_read(self, folder):
        name = "own.npz"
        acrobat(folder, [row(0, (103, 204), (100, 200))])
        (folder / name).write_bytes(b"PK\x03\x04 no displacement" * 9)
        assert run(folder, displacement=name)[0]["official_error_um"] == pytest.approx(5)
        assert reason(folder).startswith(f"{name}: cannot be read")
        assert str(folder) not in reason(folder)

    @pytest.mark.parametrize("stain", ["he", "her2"])
    def test_an_image_without_resolution(self, folder, stain):
        """In um the points are known all the same, and count unregistered; in pixels nothing is."""
        lines = tables.read(folder / "describe.parquet", tables.DESCRIBE).to_pylist()
        for line in lines:
            if line["stain"] == stain:
                line |= {"mpp": None, "verdict": "refuse", "width_px": None, "height_px": None}
        tables.write(folder / "describe.parquet", lines, tables.DESCRIBE)
        write_displacement(folder / "case1.npz", none())
        acrobat(folder, [row(0, (103, 204), (100, 200), mpps=("", ""))])
        assert run(folder)[0]["official_error_um"] == pytest.approx(5)
        assert run(folder, displacement=None)[0]["official_error_um"] == pytest.approx(5)
        assert "without resolution" in reason(folder)
        assert run(folder, coordinates="px") == []
        assert "no resolution" in reason(folder)
        for name in ("he.csv", "her2.csv"):
            (folder / name).write_text("X,Y\n1,2\n")
        sheet(folder, "he.csv", "her2.csv")
        assert run(folder) == []
        assert "without resolution" in reason(folder)


class TestWrongUse:
    def test_a_file_that_is_not_there(self, folder):
        sheet(folder, "points.csv", "points.csv")
        with pytest.raises(TableError, match="no such file"):
            run(folder)
        acrobat(folder, [row(0, (1, 2), (3, 4))])
        with pytest.raises(TableError, match=r"other\.npz: no such file"):
            run(folder, displacement="other.npz")

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
    names = [folder / "out" / f"case1.{suffix}" for suffix in ("parquet", "csv")]
    run(folder)
    before = [path.read_bytes() for path in names]
    run(folder)
    assert [path.read_bytes() for path in names] == before


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
    golden = {2: "0e3d964d49034c7419c1423797dde7732bdedb077904f47aac5b91f1960ad0da"}
    assert {LandmarksOptions.version: digest} == golden


def test_a_pair_that_comes_registered_is_measured_without_a_map(folder):
    acrobat(folder, [row(1, (100, 80), (103, 84)), row(2, (300, 200), (300, 200))])
    found = run(folder, displacement=None)
    assert [point["error_um"] for point in found] == pytest.approx([5.0, 0.0], abs=1e-6)
    assert [point["initial_error_um"] for point in found] == pytest.approx([5.0, 0.0], abs=1e-6)


class TestKidney:
    """Real sections at 4.6 um/px; the figures of other programs stand beside theirs."""

    MPP = 4.6

    @pytest.fixture
    def kidney(self, images, tmp_path):
        birl = images / "registration" / "birl" / "rat-kidney_" / "scale-5pc"
        slides = images / "wsi_derived"
        columns = "pair\tcase\tdataset\the\ther2\the_landmarks\ther2_landmarks"
        (tmp_path / "pairs.tsv").write_text(
            f"{columns}\ncase1\tcase1\tbirl\t{slides / '0_HE_val.tif'}"
            f"\t{slides / '0_PANCK_val.tif'}\t{birl / 'Rat-Kidney_HE.csv'}"
            f"\t{birl / 'Rat-Kidney_PanCytokeratin.csv'}\n"
        )
        describe.run(
            sheet=tmp_path / "pairs.tsv",
            unit="case1",
            block_count=1,
            images_table=tmp_path / "describe.parquet",
            options=DescribeOptions(),
        )
        here, there = (
            np.loadtxt(birl / f"Rat-Kidney_{name}.csv", delimiter=",", skiprows=1, usecols=(1, 2))
            for name in ("HE", "PanCytokeratin")
        )
        return tmp_path, here[: len(there)], there

    def affine(self, folder, matrix):
        """Write the map fixed -> moving (x, y, 1) @ matrix, in pixels."""
        nodes = node_points(Displacement(np.zeros((80, 118, 2), np.float32), 46.0))
        pixels = nodes / self.MPP
        moving = (pixels @ matrix[:2] + matrix[2]) * self.MPP
        write_displacement(
            folder / "case1.npz", Displacement((moving - nodes).astype(np.float32), 46.0)
        )

    def figures(self, found):
        errors = np.array([line["error_um"] for line in found]) / self.MPP
        share = np.median([line["error_diagonal_fraction"] for line in found])
        return round(np.median(errors), 1), round(np.percentile(errors, 90), 1), round(share, 4)

    def test_identity(self, kidney):
        folder, _, _ = kidney
        assert self.figures(run(folder, displacement=None)) == (29.1, 43.5, 0.0207)

    def test_the_best_affine(self, kidney):
        folder, here, there = kidney
        homogeneous = np.column_stack([here, np.ones(len(here))])
        self.affine(folder, np.linalg.lstsq(homogeneous, there, rcond=None)[0])
        found = run(folder)
        assert self.figures(found) == (3.5, 7.8, 0.0025)
        assert len(found) == 69
        official = [line["official_error_um"] for line in found]
        assert 3.5 < np.median(official) / self.MPP < 4.0, "a little more: HER2 is smaller"
        for line in found:
            way = (line[f"predicted_{axis}_um"] - line[f"he_{axis}_um"] for axis in "xy")
            assert math.hypot(*way) == pytest.approx(line["official_error_um"])
