"""The cohort's figures by hand, and the predictions of all pairs in one file."""

import csv
import hashlib
import logging
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from hemera import tables
from hemera.config import DescribeOptions, LandmarksOptions
from hemera.errors import SheetError, TableError
from hemera.registration.displacement import Displacement, none
from hemera.registration.displacement_files import write_displacement
from hemera.stages import describe, landmarks

HEADER = (
    "anon_id,anon_filename_he,anon_filename_ihc,point_id,ihc_x,ihc_y,mpp_ihc_10X,mpp_he_10X,"
    "ihc_antibody,he_x,he_y"
)
DIAGONAL_UM = 2000.0


@pytest.fixture
def cohort(tmp_path):
    """A cohort of which nothing is there yet; `add` gives it pairs."""
    (tmp_path / "landmarks").mkdir()
    columns = "pair\tcase\tdataset\the\ther2\tregistered\the_landmarks\ther2_landmarks"
    (tmp_path / "pairs.tsv").write_text(f"{columns}\n")
    return tmp_path


def points(errors, initial, official=None, official_initial=None):
    """Rows of a table of landmarks; None in `errors`: there is no map."""
    official = errors if official is None else official
    official_initial = initial if official_initial is None else official_initial
    return [
        {
            "point": str(number),
            "error_um": error,
            "error_diagonal_fraction": None if error is None else error / DIAGONAL_UM,
            "initial_error_um": before,
            "official_error_um": there,
            "official_initial_error_um": there_before,
        }
        for number, (error, before, there, there_before) in enumerate(
            zip(errors, initial, official, official_initial, strict=True)
        )
    ]


def add(cohort, pair, rows, lines=(), *, header=HEADER, dataset="acrobat", reason=None):
    with open(cohort / "pairs.tsv", "a") as file:
        file.write(f"{pair}\t{pair}\t{dataset}\t{pair}_HE.tif\t{pair}_HER2.tif\t\tp.csv\tp.csv\n")
    tables.write(
        cohort / "landmarks" / f"{pair}.parquet",
        [row | {"pair": pair} for row in rows],
        tables.LANDMARKS,
        tables.provenance(LandmarksOptions()) | ({} if reason is None else {"reason": reason}),
    )
    (cohort / "landmarks" / f"{pair}.csv").write_text("\n".join([header, *lines]) + "\n")


def line(number, point, he, note=""):
    """One row of an ACROBAT file."""
    x, y = he
    return f"{number},{number}_HE.ndpi,{number}_HER2.ndpi,{point},1,2,0.9,0.9,HER2,{x},{y}{note}"


def run(cohort):
    landmarks.run(
        sheet=cohort / "pairs.tsv",
        folder=cohort / "landmarks",
        errors=cohort / "landmarks" / "cohort.errors.parquet",
        predictions=cohort / "landmarks" / "cohort.predictions.csv",
        options=LandmarksOptions(),
    )
    path = cohort / "landmarks" / "cohort.errors.parquet"
    return tables.read(path, tables.LANDMARKS_COHORT).to_pylist()


def predictions(cohort):
    with open(cohort / "landmarks" / "cohort.predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def one(rows, aggregation, dataset=None):
    (found,) = [r for r in rows if (r["aggregation"], r["dataset"]) == (aggregation, dataset)]
    return found


class TestFigures:
    def test_of_one_pair(self, cohort):
        """Of 1, 2, 3, 10: the median is 2.5; the 90th percentile lies 0.7 of the way 3 to 10."""
        add(cohort, "a", points([10, 1, 3, 2], [20, 40, 60, 80], [8, 4, 2, 6], [9, 9, 9, 9]))
        found = run(cohort)[0]
        assert (found["aggregation"], found["pair"], found["dataset"]) == ("pair", "a", "acrobat")
        assert (found["pairs"], found["unregistered"], found["points"]) == (1, 0, 4)
        assert found["error_median_um"] == pytest.approx(2.5)
        assert found["error_p90_um"] == pytest.approx(7.9)
        assert found["error_median_diagonal_fraction"] == pytest.approx(2.5 / 2000)
        assert found["error_p90_diagonal_fraction"] == pytest.approx(7.9 / 2000)
        assert found["initial_error_median_um"] == pytest.approx(50)
        assert found["initial_error_p90_um"] == pytest.approx(74)
        assert found["official_error_p90_um"] == pytest.approx(7.4)
        assert found["official_error_mean_um"] == pytest.approx(5)
        assert found["official_initial_error_p90_um"] == pytest.approx(9)
        assert found["reason"] is None

    def test_of_the_cohort(self, cohort):
        """90th percentiles 2, 8, 20: median 8, mean 10, deviation sqrt(56) with n below."""
        add(cohort, "a", points([2], [100]))
        add(cohort, "c", points([20, 20, 20], [300] * 3))
        # Of 0, 0, 10, at rank 1.8: 8; its mean is 10/3.
        add(cohort, "b", points([0, 0, 10], [200] * 3))
        rows = run(cohort)
        assert [row["pair"] for row in rows[:3]] == ["a", "b", "c"]
        median, mean, std = (one(rows, name) for name in ("median", "mean", "std"))
        assert median["official_error_p90_um"] == pytest.approx(8), "ranking of 2022"
        assert mean["official_error_p90_um"] == pytest.approx(10), "ranking of 2023"
        assert std["official_error_p90_um"] == pytest.approx(math.sqrt((64 + 4 + 100) / 3))
        assert mean["official_error_mean_um"] == pytest.approx((2 + 10 / 3 + 20) / 3)
        assert median["official_initial_error_p90_um"] == pytest.approx(200)
        assert mean["official_initial_error_p90_um"] == pytest.approx(200)
        assert median["error_median_um"] == pytest.approx(2)
        assert (median["pairs"], median["points"], median["pair"]) == (3, 7, None)

    def test_each_data_set_has_its_own(self, cohort):
        add(cohort, "a", points([2], [100]))
        add(cohort, "b", points([8], [100]), dataset="mine")
        rows = run(cohort)
        assert len(rows) == 2 + 3 * 3
        assert one(rows, "mean")["error_p90_um"] == pytest.approx(5)
        assert one(rows, "mean", "acrobat")["error_p90_um"] == pytest.approx(2)
        assert one(rows, "mean", "mine")["official_error_p90_um"] == pytest.approx(8)

    def test_a_pair_without_a_map_counts_unregistered(self, cohort, caplog):
        """In ACROBAT's figures; in the others, where it has no error, not at all."""
        caplog.set_level(logging.INFO)
        add(cohort, "good", points([4, 4], [50, 50]))
        add(
            cohort, "lost", points([None] * 2, [70, 70], [60, 60], [60, 60]),
            reason="registration gave no map; see the pair's certificate",
        )  # fmt: skip
        rows = run(cohort)
        lost = rows[1]
        assert (lost["pairs"], lost["unregistered"], lost["points"]) == (1, 1, 2)
        assert lost["error_p90_um"] is None
        assert lost["official_error_p90_um"] == lost["official_initial_error_p90_um"] == 60
        assert "no map" in lost["reason"]
        mean = one(rows, "mean")
        assert (mean["pairs"], mean["unregistered"]) == (2, 1)
        assert mean["official_error_p90_um"] == pytest.approx(32)
        assert mean["error_p90_um"] == pytest.approx(4)
        assert "mean over 2 pairs, 1 of them without displacement" in caplog.text
        assert "pair lost: registration gave no map" in caplog.text

    def test_points_that_not_all_annotators_marked_are_no_part_of_the_official_figure(self, cohort):
        add(cohort, "a", points([1, 9], [50, 50], [1, None], [50, None]))
        found = run(cohort)[0]
        assert (found["points"], found["official_error_p90_um"]) == (2, 1)
        assert found["error_p90_um"] == pytest.approx(8.2)

    def test_a_broken_file_is_a_row_with_its_reason(self, cohort, caplog):
        add(cohort, "a", points([2], [100]))
        add(cohort, "b", [], reason="p.csv: cannot be read (no text); mend it")
        rows = run(cohort)
        assert (rows[1]["pairs"], rows[1]["points"]) == (0, 0)
        assert rows[1]["reason"].startswith("p.csv: cannot be read")
        assert one(rows, "mean")["pairs"] == 1
        assert one(rows, "mean")["official_error_p90_um"] == pytest.approx(2)
        assert "pair b: p.csv: cannot be read" in caplog.text

    def test_withheld_points_are_predicted_and_not_scored(self, cohort, caplog):
        add(cohort, "a", points([None] * 3, [None] * 3), [line(5, 1, (3, 4))])
        rows = run(cohort)
        assert rows[0]["reason"] == "the H&E side of its 3 landmarks is withheld"
        assert one(rows, "median")["official_error_p90_um"] is None
        assert one(rows, "median")["pairs"] == 0
        assert len(predictions(cohort)) == 1


class TestPredictions:
    def test_rows_of_all_pairs_below_one_header(self, cohort, caplog):
        caplog.set_level(logging.INFO)
        add(cohort, "b", points([2], [100]), [line(5, 1, (3, 4)), line(5, 2, ("", ""))])
        add(cohort, "a", points([2], [100]), [line(7, 3, (8, 9))])
        # Of plain files: a header that is that of no file.
        add(cohort, "c", points([2], [100]), header="x,y")
        run(cohort)
        text = (cohort / "landmarks" / "cohort.predictions.csv").read_text().splitlines()
        assert text == [HEADER, line(7, 3, (8, 9)), line(5, 1, (3, 4)), line(5, 2, ("", ""))]
        assert "predictions: 3 points, 1 of them without a prediction" in caplog.text

    def test_the_header_alone_where_no_pair_came_from_an_acrobat_file(self, cohort):
        add(cohort, "a", points([2], [100]))
        run(cohort)
        assert (cohort / "landmarks" / "cohort.predictions.csv").read_text() == HEADER + "\n"

    def test_what_the_challenge_would_drop_is_said(self, cohort, caplog):
        """Its evaluation drops rows with any empty cell, and joins on point_id alone."""
        add(cohort, "a", points([2], [100]), [line(5, 1, (3, 4), ",x")], header=f"{HEADER},note")
        add(cohort, "b", points([2], [100]), [line(7, 1, (8, 9))])
        run(cohort)
        assert [row["note"] for row in predictions(cohort)] == ["x", ""]
        assert "empty cells in note;" in caplog.text
        assert "1 point_id occur in several rows" in caplog.text

    def test_a_file_that_is_right_has_no_warning(self, cohort, caplog):
        add(cohort, "a", points([2, 3], [100, 9]), [line(5, 1, (3, 4)), line(5, 2, ("", ""))])
        run(cohort)
        assert not [record for record in caplog.records if record.levelno > logging.INFO]

    def test_cells_that_csv_must_quote(self, cohort):
        add(cohort, "a", points([2], [100]), [line(5, 1, (3, 4), ',"a ""b"", c"')],
            header=f"{HEADER},note")  # fmt: skip
        run(cohort)
        assert predictions(cohort)[0]["note"] == 'a "b", c'


class TestEmptyAndBad:
    def test_no_pair_with_landmarks(self, cohort):
        with open(cohort / "pairs.tsv", "a") as file:
            file.write("a\ta\tacrobat\ta_HE.tif\ta_HER2.tif\t\t\t\n")
            # Ready-made image pairs are worked on in blocks, and have no table.
            file.write("b\tb\tbci\tb_HE.png\tb_HER2.png\ttrue\tp.csv\tp.csv\n")
        with pytest.raises(SheetError, match="no pair has landmarks"):
            run(cohort)

    @pytest.mark.parametrize("suffix", ["parquet", "csv"])
    def test_a_missing_file_is_named(self, cohort, suffix):
        add(cohort, "a", points([2], [100]))
        (cohort / "landmarks" / f"a.{suffix}").unlink()
        with pytest.raises(TableError, match=rf"a\.{suffix}: no such"):
            run(cohort)

    def test_a_table_of_another_version(self, cohort):
        add(cohort, "a", points([2], [100]))
        path = cohort / "landmarks" / "a.parquet"
        pq.write_table(pq.read_table(path).drop_columns("official_error_um"), path)
        with pytest.raises(TableError, match="lacks the columns official_error_um"):
            run(cohort)


def test_golden(cohort):
    add(cohort, "a", points([10, 1, 3, 2], [20, 40, 60, 80]), [line(5, 1, (3, 4))])
    add(cohort, "b", points([None], [70]), [line(7, 2, ("", ""))], reason="no map")
    text = repr([{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
                 for row in run(cohort)])  # fmt: skip
    text += (cohort / "landmarks" / "cohort.predictions.csv").read_text()
    golden = {2: "9f26b73e6bdf9ad854e63c99c947588823f96072d611de76769eb4bca30bc042"}
    assert {LandmarksOptions.version: hashlib.sha256(text.encode()).hexdigest()} == golden


class TestKidney:
    """Real sections, their landmarks as an ACROBAT file and as plain files of X and Y."""

    MPP = 4.6

    def test_from_slides_to_the_score(self, images, tmp_path):
        birl = images / "registration" / "birl" / "rat-kidney_" / "scale-5pc"
        slides = images / "wsi_derived"
        here, there = (
            np.loadtxt(birl / f"Rat-Kidney_{name}.csv", delimiter=",", skiprows=1, usecols=(1, 2))
            for name in ("HE", "PanCytokeratin")
        )
        here_um, there_um = here[: len(there)] * self.MPP, there * self.MPP
        lines = [
            f"0,0_HE_val.ndpi,0_PANCK_val.ndpi,{number},{x:.4f},{y:.4f},4.6,4.6,PANCK,"
            f"{here_x:.4f},{here_y:.4f}"
            for number, ((here_x, here_y), (x, y)) in enumerate(zip(here_um, there_um, strict=True))
        ]
        (tmp_path / "points.csv").write_text("\n".join([HEADER, *lines]) + "\n")
        plain = [birl / f"Rat-Kidney_{name}.csv" for name in ("HE", "PanCytokeratin")]
        paths = f"birl\t{slides / '0_HE_val.tif'}\t{slides / '0_PANCK_val.tif'}"
        (tmp_path / "pairs.tsv").write_text(
            "pair\tcase\tdataset\the\ther2\the_landmarks\ther2_landmarks\n"
            f"plain\tk\t{paths}\t{plain[0]}\t{plain[1]}\n"
            f"official\tk\t{paths}\tpoints.csv\tpoints.csv\n"
            f"failed\tk\t{paths}\tpoints.csv\tpoints.csv\n"
        )
        # As if both slides had one size: HER2 is that much smaller.
        scale = np.array([1123 / 1164, 724 / 787])
        nodes = (np.stack(np.meshgrid(np.arange(118), np.arange(80)), axis=-1) + 0.5) * 46.0
        scaled = Displacement((nodes * scale - nodes).astype(np.float32), 46.0)
        for pair in ("plain", "official", "failed"):
            describe.run(
                sheet=tmp_path / "pairs.tsv",
                unit=pair,
                block_count=1,
                images_table=tmp_path / f"{pair}.describe.parquet",
                options=DescribeOptions(),
            )
            write_displacement(tmp_path / f"{pair}.npz", none() if pair == "failed" else scaled)
            landmarks.run(
                sheet=tmp_path / "pairs.tsv",
                unit=pair,
                images_table=tmp_path / f"{pair}.describe.parquet",
                displacement=tmp_path / f"{pair}.npz",
                errors=tmp_path / "landmarks" / f"{pair}.parquet",
                predictions=tmp_path / "landmarks" / f"{pair}.csv",
                options=LandmarksOptions(),
            )
        rows = run(tmp_path)
        failed, official, same = rows[:3]
        assert (failed["pair"], official["pair"], same["pair"]) == ("failed", "official", "plain")
        # The formula written out once more, without anything of HEMERA's.
        way_back = np.clip(there_um / scale, 0, (1164 * 4.6, 787 * 4.6))
        distance = np.hypot(*(way_back - here_um).T)
        for found in (official, same):
            assert found["points"] == 69
            assert found["official_error_p90_um"] == pytest.approx(
                np.percentile(distance, 90), abs=0.05
            )
            assert found["official_error_mean_um"] == pytest.approx(distance.mean(), abs=0.05)
            assert found["initial_error_median_um"] / self.MPP == pytest.approx(29.1, abs=0.05)
            assert found["initial_error_p90_um"] / self.MPP == pytest.approx(43.5, abs=0.05)
            assert found["error_median_um"] / self.MPP == pytest.approx(12.7, rel=0.1)
            assert found["error_p90_um"] / self.MPP == pytest.approx(21.9, rel=0.1)
        assert failed["unregistered"] == 1
        assert failed["official_error_p90_um"] / self.MPP == pytest.approx(43.5, abs=0.05)
        given = predictions(tmp_path)
        assert len(given) == 2 * 69, "those of the pairs with an ACROBAT file"
        assert [row["he_x"] for row in given[:69]] == [""] * 69
        found = np.array([(float(row["he_x"]), float(row["he_y"])) for row in given[69:]])
        # Vectors are stored in steps of 0.18 um.
        np.testing.assert_allclose(found, there_um / scale, atol=0.15)
