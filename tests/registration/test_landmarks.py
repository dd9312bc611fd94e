"""Landmark files of both forms, and the rows that ACROBAT takes back."""

import csv
import io

import numpy as np
import pytest

from hemera.errors import SheetError, TableError
from hemera.registration.landmarks import (
    ACROBAT_COLUMNS,
    REQUIRED,
    join_predictions,
    predictions_csv,
    read_landmarks,
)
from hemera.sheet import Pair

HEADER = ",".join(ACROBAT_COLUMNS)
HE_MPP, HER2_MPP = 0.5, 0.8
NOWHERE = (np.nan, np.nan)


def row(point, he, ihc, names=("7_HE_val.ndpi", "7_HER2_val.ndpi"), mpps=("0.8", "0.5")):
    return ",".join(map(str, ["7", *names, point, *ihc, *mpps, "HER2", *he]))


def pair(folder, he="points.csv", her2="points.csv"):
    return Pair(
        pair="case1", case="case1", dataset="acrobat", he="7_HE_val.tif", her2="7_HER2_val.tif",
        he_landmarks=he and folder / he, her2_landmarks=her2 and folder / her2,
    )  # fmt: skip


def read(folder, text, coordinates="um", mpps=(HE_MPP, HER2_MPP), sizes_px=()):
    """Read one ACROBAT file, or two plain ones."""
    if isinstance(text, tuple):
        for name, one in zip(("he.csv", "her2.csv"), text, strict=True):
            (folder / name).write_text(one)
        return read_landmarks(pair(folder, "he.csv", "her2.csv"), *mpps, coordinates, *sizes_px)
    (folder / "points.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_landmarks(pair(folder), *mpps, coordinates)


def bent():
    """Return 20 points of each slide: a turn, a scale, and a bend of several landmark distances."""
    he = np.random.default_rng(2).uniform(0, 4000, (20, 2))
    bend = 400 * np.sin(he[:, ::-1] / 900)
    turn = np.array([[0.5, -0.9], [0.8, 0.6]]) * HE_MPP / HER2_MPP
    return he, (he + bend) @ turn + (3000, 3000)


def numbered(points, header, first=1):
    """Return a plain file whose rows are numbered where its header has three columns."""
    rows = [f"{n + first},{x},{y}" for n, (x, y) in enumerate(points)]
    if header.count(",") < 2:
        rows = [row.split(",", 1)[1] for row in rows]
    return "\n".join([header, *rows])


def written(landmarks, *places):
    return csv.DictReader(io.StringIO(predictions_csv(landmarks, np.array(places))))


def lines(*rows, header=HEADER):
    return "\n".join([header, *rows]) + "\n"


class TestAcrobat:
    def test_rows_of_the_pair_in_um(self, tmp_path):
        other = ("8_HE_val.ndpi", "8_HER2_val.ndpi")
        text = lines(row(0, (100, 200), (133, 164)), row(1, (1, 2), (3, 4), other))
        found = read(tmp_path, text)
        assert (found.points, found.he_scale) == (["0"], 1)
        np.testing.assert_array_equal(found.he, [[(100, 200)]])
        np.testing.assert_array_equal(found.her2, [(133, 164)])

    @pytest.mark.parametrize("mpps", [("0.8", "0.5"), ("", "")])
    def test_pixels_are_of_the_rows_resolution_or_the_slides(self, tmp_path, mpps):
        text = lines(row(0, (200, 400), (50, 60), mpps=mpps))
        found = read(tmp_path, text, "px")
        np.testing.assert_allclose(found.he, [[(100, 200)]])
        np.testing.assert_allclose(found.her2, [(40, 48)])
        assert found.he_scale == 0.5

    def test_annotators_in_columns_of_their_own(self, tmp_path):
        header = ",".join([*REQUIRED, "he_1_x", "he_1_y", "he_2_x", "he_2_y"])
        text = lines("7_HE_val.ndpi,7_HER2_val.ndpi,3,130,160,103,204,,", header=header)
        found = read(tmp_path, text)
        np.testing.assert_array_equal(found.he, [[(103, 204), NOWHERE]])
        # Nothing of the truth is in the predictions.
        (line,) = written(found, (100.0, 200.0))
        assert list(line) == [*REQUIRED, "he_x", "he_y"]
        assert (line["he_x"], line["he_y"]) == ("100.0000", "200.0000")

    @pytest.mark.parametrize("withheld", ["", "nan", "NaN"])
    def test_a_side_may_be_withheld(self, tmp_path, withheld):
        text = lines(row(0, (withheld, withheld), (50, 60)), row(1, (3, ""), (7, 8)))
        found = read(tmp_path, text)
        np.testing.assert_array_equal(found.he, [[NOWHERE], [NOWHERE]])
        np.testing.assert_array_equal(found.her2, [(50, 60), (7, 8)])

    def test_a_byte_order_mark_and_line_ends_of_windows(self, tmp_path):
        text = lines(row(0, (100, 200), (133, 164))).replace("\n", "\r\n")
        found = read(tmp_path, b"\xef\xbb\xbf" + text.encode())
        assert found.rows.columns[0] == "anon_id"
        np.testing.assert_array_equal(found.he, [[(100, 200)]])

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("X,Y\n1,2\n", "points.csv: lacks the columns anon_filename_he"),
            ("", "points.csv: cannot be read"),
            (lines(), "points.csv: no landmarks of 7_HE_val.tif and 7_HER2_val.tif"),
            (
                lines("", row(0, (1, 2), (3, 4)), row(1, ("here", 2), (3, 4))),
                "points.csv: line 4, he_x: 'here' is no coordinate",
            ),
            (lines(row(0, (1, 2), ("1e308", 4))), "line 2, ihc_x: '1e308' is no coordinate"),
            (b"\xff\xfe\x00\x01" * 50, "points.csv: cannot be read"),
        ],
    )
    def test_a_file_that_is_none(self, tmp_path, text, words):
        with pytest.raises(TableError, match=words):
            read(tmp_path, text)

    def test_an_image_without_resolution(self, tmp_path):
        text = lines(row(0, (1, 2), (3, 4), mpps=("", "")))
        with pytest.raises(TableError, match="no resolution; give um per pixel"):
            read(tmp_path, text, "px", (None, HER2_MPP))

    @pytest.mark.parametrize(
        ("mpps", "column"),
        [(("0.8", "-1"), "mpp_he_10X"), (("0", "0.5"), "mpp_ihc_10X")],
    )
    def test_a_resolution_that_is_not_positive(self, tmp_path, mpps, column):
        with pytest.raises(TableError, match=f"line 2, {column}: no resolution"):
            read(tmp_path, lines(row(0, (1, 2), (3, 4), mpps=mpps)), "px")


class TestPlain:
    def test_point_n_here_is_point_n_there_in_level_0_pixels(self, tmp_path):
        found = read(tmp_path, ("n,X,Y\n1,200,400\n2,,\n", " x ,Y\n50,60\n5,6\n"))
        assert (found.points, found.rows) == (["1", "2"], None)
        np.testing.assert_allclose(found.he, [[(100, 200)], [NOWHERE]])
        np.testing.assert_allclose(found.her2, [(40, 48), (4, 4.8)])

    def test_points_correspond_by_id(self, tmp_path, caplog):
        he = ",X,Y\n1,2,4\n2,6,8\n4,20,22\n3,10,12\n"
        found = read(tmp_path, (he, "y,x,id\n10,5,3\n30,15,7\n2,1,1\n6,4,4\n"))
        assert found.points == ["1", "4", "3"]
        np.testing.assert_allclose(found.he[:, 0], [(1, 2), (10, 11), (5, 6)])
        np.testing.assert_allclose(found.her2, [(0.8, 1.6), (3.2, 4.8), (4, 8)])
        assert "without a point of the same id on the other slide: 2, 7" in caplog.text

    @pytest.mark.parametrize(
        ("he", "her2", "words"),
        [
            ("X,Y\n1,2\n3,4\n5,6\n", "X,Y\n1,2\n", "he.csv: 3 landmarks, 1 in her2.csv"),
            # An id in one file alone identifies nothing.
            ("id,X,Y\na,1,2\nb,3,4\n", "X,Y\n1,2\n", "he.csv: 2 landmarks, 1 in her2.csv"),
            ("id,X,Y\na,1,2\n", "id,X,Y\nb,1,2\n", "no id is in both"),
            ("id,X,Y\na,1,2\na,3,4\n", "id,X,Y\na,1,2\n", "he.csv: id 'a' is not of one point"),
            ("id,X,Y\n,1,2\na,3,4\n", "id,X,Y\na,1,2\n", "he.csv: id '' is not of one point"),
        ],
    )
    def test_points_that_cannot_be_paired(self, tmp_path, he, her2, words):
        with pytest.raises(TableError, match=words):
            read(tmp_path, (he, her2))

    @pytest.mark.parametrize("header", ["X,Y", ",X,Y", "n,X,Y", "id,X,Y"])
    @pytest.mark.parametrize(
        ("change", "right"),
        [
            (lambda he, her2: (he, her2), True),
            (lambda he, her2: (he, her2 * (-1, 1) + (9000, 0)), True),
            (lambda he, her2: (he[::-1], her2), False),
            (lambda he, her2: (np.delete(he, 4, 0), np.delete(her2, 15, 0)), False),
            (lambda he, her2: (np.delete(he, 4, 0), np.delete(her2, 8, 0)), False),
        ],
        ids=["right", "mirrored", "reversed", "far rows missing", "near rows missing"],
    )
    def test_numbers_of_the_rows_are_no_ids(self, tmp_path, header, change, right):
        he, her2 = change(*bent())
        texts = [numbered(points, header) for points in (he, her2)]
        if right:
            assert len(read(tmp_path, tuple(texts)).points) == 20
            return
        words = r"he.csv: \d+ of (19|20) landmarks do not correspond.*\(first: row \d+\).*column id"
        with pytest.raises(TableError, match=words):
            read(tmp_path, tuple(texts))

    def test_the_points_of_one_slide_for_both(self, tmp_path):
        he, _ = bent()
        texts = (numbered(he, "id,X,Y"),) * 2
        with pytest.raises(TableError, match=r"he\.csv, her2\.csv: the same points; give"):
            read(tmp_path, texts)

    def test_mirror_images_are_named(self, tmp_path, caplog):
        """X and Y that are exchanged on one slide are a mirror image too."""
        he, her2 = bent()
        right, exchanged = (
            tuple(numbered(side, "id,X,Y") for side in (he, points))
            for points in (her2, her2[:, ::-1])
        )
        read(tmp_path, right)
        assert not caplog.records
        assert len(read(tmp_path, exchanged).points) == 20
        assert "mirror images of each other; X and Y are exchanged, or write true" in caplog.text

    @pytest.mark.parametrize(("factor", "right"), [(0.5, False), (0.9, True), (2, False)])
    def test_points_of_another_resolution(self, tmp_path, factor, right):
        """Those of `bent` are 1.04 times as far apart on HER2."""
        he, her2 = bent()
        texts = tuple(numbered(points, "id,X,Y") for points in (he, her2 * factor))
        if right:
            read(tmp_path, texts)
            return
        words = (
            rf"he\.csv, her2\.csv: the points of HER2 are {factor * 1.0376:.2f} times as far apart"
        )
        with pytest.raises(TableError, match=words):
            read(tmp_path, texts)

    def test_points_outside_the_slide_and_without_coordinates(self, tmp_path, caplog):
        he, her2 = bent()
        her2[9] = 1e7, 3
        texts = [numbered(points, "id,X,Y") for points in (he, her2)]
        words = (
            r"her2\.csv: 1 of 20 landmarks are outside .*\.tif, 9000 x 9000 px \(first: line 11\)"
        )
        with pytest.raises(TableError, match=words):
            read(tmp_path, tuple(texts), sizes_px=((9000, 9000),) * 2)
        her2[9] = np.nan
        texts[1] = numbered(her2, "id,X,Y")
        found = read(tmp_path, tuple(texts), sizes_px=((9000, 9000),) * 2)
        assert np.isnan(found.her2[9]).all()
        assert "1 of 20 landmarks have no coordinates on one of the slides" in caplog.text

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("side", [0, 1])
    def test_a_row_that_is_removed_before_the_rows_are_numbered(self, tmp_path, side, first):
        """A point more at the end of one file is right; one in its middle moves the rows below."""
        for row in (4, 15, 18, 19):
            points = list(bent())
            points[side] = np.delete(points[side], row, axis=0)
            texts = tuple(numbered(each, ",X,Y", first) for each in points)
            if row == 19:
                found = read(tmp_path, texts)
                assert found.points == [str(n + first) for n in range(19)]
                continue
            with pytest.raises(TableError, match=r"\(first: row \d+\); a row is missing"):
                read(tmp_path, texts)

    def test_rows_that_are_counted_from_0_and_from_1(self, tmp_path):
        """Row n of both files is one point; their common numbers are those of neighbours."""
        he, her2 = bent()
        with pytest.raises(TableError, match="count the rows from 0 and from 1; count both from"):
            read(tmp_path, (numbered(he, ",X,Y", 0), numbered(her2, ",X,Y", 1)))

    def test_ids_that_are_no_numbers_of_rows_need_no_check(self, tmp_path, caplog):
        """One row of each file is missing, and the ids of the others are kept."""
        he, her2 = bent()
        ids = [np.delete(np.arange(1, 21), row) for row in (4, 15)]
        texts = tuple(
            "n,X,Y\n" + "\n".join(f"{n},{points[n - 1, 0]},{points[n - 1, 1]}" for n in of)
            for of, points in zip(ids, (he, her2), strict=True)
        )
        found = read(tmp_path, texts)
        rows = [n - 1 for n in range(1, 21) if n not in (5, 16)]
        np.testing.assert_allclose(found.he[:, 0], he[rows] * HE_MPP)
        np.testing.assert_allclose(found.her2, her2[rows] * HER2_MPP)

    def test_the_order_of_few_landmarks_is_not_checked(self, tmp_path, caplog):
        he, her2 = (points[:7] for points in bent())
        texts = numbered(he[::-1], "n,X,Y"), numbered(her2, "n,X,Y")
        assert len(read(tmp_path, texts).points) == 7
        assert "he.csv: too few landmarks (7) to check that their order is right" in caplog.text
        with pytest.raises(TableError, match="6 landmarks, 7 on HER2, too few to check their"):
            read(tmp_path, (numbered(he[1:], "n,X,Y"), texts[1]))

    def test_points_with_ids_are_not_compared_by_place(self, tmp_path):
        """A section that bends by more than the distance of two landmarks, in another order."""
        rng = np.random.default_rng(4)
        he = rng.uniform(0, 4000, (300, 2))
        her2 = (he + 400 * np.sin(he[:, ::-1] / 500)) * HE_MPP / HER2_MPP
        order = rng.permutation(300)
        texts = [
            "id,X,Y\n" + "\n".join(f"{n},{x},{y}" for n, (x, y) in zip(ids, points, strict=True))
            for ids, points in ((range(300), he), (order, her2[order]))
        ]
        found = read(tmp_path, tuple(texts))
        np.testing.assert_allclose(found.he[:, 0], he * HE_MPP)
        np.testing.assert_allclose(found.her2, her2 * HER2_MPP)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("n,a,b\n1,2,3\n", "he.csv: no columns X and Y"),
            ("x,X,Y\n1,2,3\n", "he.csv: several columns x; keep one"),
            ("", "he.csv: cannot be read"),
            # A decimal comma: not x 1, y 5.
            ("n,X,Y\n0,1,5,2,5\n1,2,5,3,5\n", "he.csv: cannot be read .*no more cells in a line"),
            ("X,Y\n", "he.csv: no landmarks"),
            ("X,Y\n1,two\n", "he.csv: line 2, y: 'two' is no coordinate"),
        ],
    )
    def test_a_file_that_is_none(self, tmp_path, text, words):
        with pytest.raises(TableError, match=words):
            read(tmp_path, (text, "X,Y\n1,2\n"))


def test_a_pair_without_landmarks(tmp_path):
    with pytest.raises(SheetError, match="give he_landmarks and her2_landmarks"):
        read_landmarks(pair(tmp_path, None, None), HE_MPP, HER2_MPP, "um")


class TestPredictions:
    def test_the_files_own_columns_and_unit_are_kept(self, tmp_path):
        rows = [row(0, ("", ""), (133, 164)), row(1, (1, 2), (230, 60))]
        text = lines(*(f"{line},a b" for line in rows), header=f"{HEADER},note")
        found = read(tmp_path, text, "px")
        first, second = written(found, (103.0, 204.0), NOWHERE)
        assert ",".join(first) == f"{HEADER},note"
        # 0.5 um per pixel.
        assert (first["he_x"], first["he_y"]) == ("206.0000", "408.0000")
        assert (first["anon_filename_he"], first["ihc_x"]) == ("7_HE_val.ndpi", "133")
        assert first["note"] == "a b"
        assert (second["he_x"], second["he_y"]) == ("", ""), "not the annotator's either"

    def test_plain_files_give_the_header_alone(self, tmp_path):
        found = read(tmp_path, ("X,Y\n1,2\n", "X,Y\n1,2\n"))
        assert predictions_csv(found, np.array([(1.0, 2.0)])) == HEADER + "\n"


class TestJoin:
    def join(self, folder, *texts):
        paths = [folder / f"{number}.csv" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return join_predictions(paths)

    def test_rows_of_all_pairs_below_one_header(self, tmp_path):
        first, second = row(3, (8, 9), (1, 2)), row(1, ("", ""), (1, 2))
        text = self.join(tmp_path, lines(first), lines(second), lines(header="x,y"))
        assert text == lines(first, second)
        assert self.join(tmp_path, lines()) == lines()

    def test_columns_of_one_file_are_empty_in_the_rows_of_others(self, tmp_path):
        noted = lines(row(1, (3, 4), (1, 2)) + ',"x, ""y"""', header=f"{HEADER},note")
        text = self.join(tmp_path, noted, lines(row(1, (8, 9), (1, 2))))
        assert [one["note"] for one in csv.DictReader(io.StringIO(text))] == ['x, "y"', ""]
