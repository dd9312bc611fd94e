"""The stage on one pair and on the cohort: tables, reasons and predictions."""

import csv
import hashlib
import json

import numpy as np
import pytest

from hemera import tables
from hemera.config import LandmarksOptions
from hemera.errors import SheetError, TableError
from hemera.registration.displacement import Displacement, none
from hemera.registration.displacement_files import write_displacement
from hemera.registration.landmarks import ACROBAT_COLUMNS
from hemera.sheet import write_rows
from hemera.stages import landmarks
from tests.small_displacements import field_of
from tests.small_sheets import describe_unit, write_sheet

HE_MPP, HER2_MPP = 0.5, 0.8
HEADER = ",".join(ACROBAT_COLUMNS)

SHIFT = Displacement(np.full((40, 30, 2), (30.0, -40.0), np.float32), 50.0)
"""Every point moves by 50 um."""


@pytest.fixture
def folder(tmp_path):
    row = dict.fromkeys(tables.DESCRIBE.names) | {"pair": "case1", "verdict": "accept"}
    he = {"stain": "he", "file": "7_HE_val.tif", "mpp": HE_MPP}
    he |= {"width_px": 3000, "height_px": 4000}
    her2 = {"stain": "her2", "file": "7_HER2_val.tif", "mpp": HER2_MPP}
    her2 |= {"width_px": 2000, "height_px": 2600}
    tables.write(tmp_path / "describe.parquet", [row | he, row | her2], tables.DESCRIBE)
    write_displacement(tmp_path / "case1.npz", SHIFT)
    return tmp_path


def sheet(folder, he_landmarks, her2_landmarks):
    images = {"he": "7_HE_val.tif", "her2": "7_HER2_val.tif"}
    points = {"he_landmarks": he_landmarks, "her2_landmarks": her2_landmarks}
    write_sheet(folder, [images | points], pair="case1", case="case1", dataset="acrobat")


def acrobat(folder, rows):
    (folder / "points.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    sheet(folder, "points.csv", "points.csv")


def row(point, he, ihc, mpps=("0.8", "0.5")):
    names = "7_HE_val.ndpi", "7_HER2_val.ndpi"
    return ",".join(map(str, ["7", *names, point, *ihc, *mpps, "HER2", *he]))


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


def predictions(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class TestPair:
    def test_errors_and_predictions(self, folder):
        acrobat(folder, [row(n, (100, 200), (130 + n, 160)) for n in range(11)])
        found = run(folder)
        assert [line["error_um"] for line in found] == pytest.approx(range(11), abs=1e-4)
        assert reason(folder) is None
        names = [folder / "out" / f"case1.{suffix}" for suffix in ("parquet", "csv")]
        before = [path.read_bytes() for path in names]
        run(folder)
        assert [path.read_bytes() for path in names] == before

    @pytest.mark.parametrize("coordinates", ["um", "px"])
    def test_predictions_read_back_as_landmarks_have_no_error(self, folder, coordinates):
        rng = np.random.default_rng(3)

        def bend(p):
            return p * (1.02, 0.97) + 40 * np.sin(p[..., ::-1] / 300) + (12, -7)

        write_displacement(folder / "case1.npz", field_of(bend, 30, 40, 50.0))
        scale = 1 if coordinates == "um" else 1 / HER2_MPP
        points = rng.uniform((100, 100), (1400, 1900), (50, 2)) * scale
        acrobat(folder, [row(n, (1, 2), point) for n, point in enumerate(points)])
        assert min(line["official_error_um"] for line in run(folder, coordinates=coordinates)) > 50
        (folder / "points.csv").write_bytes((folder / "out" / "case1.csv").read_bytes())
        for line in run(folder, coordinates=coordinates):
            assert line["error_um"] < 0.011
            assert line["official_error_um"] < 1e-3

    def test_a_pair_that_comes_registered_is_measured_without_a_map(self, folder):
        acrobat(folder, [row(1, (100, 80), (103, 84)), row(2, (300, 200), (300, 200))])
        found = run(folder, displacement=None)
        for name in ("error_um", "initial_error_um"):
            assert [point[name] for point in found] == pytest.approx([5.0, 0.0], abs=1e-6)

    def test_a_landmark_file_that_is_none_is_a_reason(self, folder):
        sheet(folder, "points.csv", "points.csv")
        (folder / "points.csv").write_text("X,Y\n1,2\n")
        assert run(folder) == []
        assert reason(folder).startswith("points.csv: lacks the columns")
        assert (folder / "out" / "case1.csv").read_text() == HEADER + "\n"

    @pytest.mark.parametrize("content", ["empty", "damaged", "flat"])
    def test_without_a_map_points_count_unregistered(self, folder, content, caplog):
        acrobat(folder, [row(0, (103, 204), (100, 200)), row(1, ("", ""), (100, 200))])
        write_displacement(folder / "case1.npz", none())
        if content == "damaged":
            (folder / "case1.npz").write_bytes(b"PK\x03\x04 no displacement" * 9)
        if content == "flat":
            write_displacement(folder / "case1.npz", field_of(np.zeros_like, 30, 40, 50.0))
        first, second = run(folder)
        assert first["predicted_x_um"] is None
        assert first["official_error_um"] == first["official_initial_error_um"]
        assert first["official_error_um"] == pytest.approx(5)
        assert second["official_error_um"] is None
        given = predictions(folder / "out" / "case1.csv")
        assert [line["he_x"] for line in given] == ["", ""], "not the annotator's either"
        if content == "flat":
            assert "cannot be inverted" in caplog.text
        else:
            assert first["error_um"] is None
            words = {"empty": "no map", "damaged": "case1.npz: cannot be read"}[content]
            assert words in reason(folder)
            assert str(folder) not in reason(folder)

    def test_wrong_use_is_an_error(self, folder):
        sheet(folder, "points.csv", "points.csv")
        with pytest.raises(TableError, match="no such file"):
            run(folder)
        acrobat(folder, [row(0, (1, 2), (3, 4))])
        with pytest.raises(TableError, match=r"other\.npz: no such file"):
            run(folder, displacement="other.npz")
        with pytest.raises(SheetError, match="no pair another"):
            run(folder, unit="another")
        sheet(folder, "", "")
        with pytest.raises(SheetError, match="give he_landmarks and her2_landmarks"):
            run(folder)

    def test_golden(self, folder):
        acrobat(folder, [row(0, (100, 200), (133, 164)), row(1, ("", ""), (730, 860))])
        rounded = [
            {
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in line.items()
            }
            for line in run(folder)
        ]
        digest = hashlib.sha256(json.dumps(rounded).encode()).hexdigest()
        golden = {6: "0e3d964d49034c7419c1423797dde7732bdedb077904f47aac5b91f1960ad0da"}
        assert {LandmarksOptions.version: digest} == golden


@pytest.fixture
def cohort(tmp_path):
    """A cohort without pairs; `add` adds one."""
    write_sheet(tmp_path, [])
    return tmp_path


def add_row(cohort, pair, dataset="acrobat", suffix="tif", **cells):
    images = {"he": f"{pair}_HE.{suffix}", "her2": f"{pair}_HER2.{suffix}"}
    row = {"pair": pair, "case": pair, "dataset": dataset, **images, **cells}
    with open(cohort / "pairs.tsv", "a") as file:
        file.write(write_rows([row]).partition("\n")[2])


def add(cohort, pair, errors, initial, lines=(), *, dataset="acrobat", reason=None):
    add_row(cohort, pair, dataset, he_landmarks="p.csv", her2_landmarks="p.csv")
    rows = [
        {
            "pair": pair, "point": str(number), "error_um": error,
            "error_diagonal_fraction": None if error is None else error / 2000,
            "initial_error_um": before, "official_error_um": error,
            "official_initial_error_um": before,
        }
        for number, (error, before) in enumerate(zip(errors, initial, strict=True))
    ]  # fmt: skip
    metadata = tables.provenance(LandmarksOptions()) | ({"reason": reason} if reason else {})
    tables.write(cohort / "landmarks" / f"{pair}.parquet", rows, tables.LANDMARKS, metadata)
    (cohort / "landmarks" / f"{pair}.csv").write_text("\n".join([HEADER, *lines]) + "\n")


def acrobat_line(number, point, he):
    names = f"{number}_HE.ndpi,{number}_HER2.ndpi"
    return f"{number},{names},{point},1,2,0.9,0.9,HER2,{he[0]},{he[1]}"


def run_cohort(cohort):
    path = cohort / "landmarks" / "cohort.errors.parquet"
    landmarks.run(
        sheet=cohort / "pairs.tsv",
        results=cohort,
        errors=path,
        predictions=cohort / "landmarks" / "cohort.predictions.csv",
        options=LandmarksOptions(),
    )
    return tables.read(path, tables.LANDMARKS_COHORT).to_pylist()


class TestCohort:
    def test_pairs_in_order_then_all_then_each_data_set(self, cohort):
        add(cohort, "b", [8], [100], dataset="mine")
        add(cohort, "a", [2], [100])
        rows = run_cohort(cohort)
        assert [row["pair"] for row in rows] == ["a", "b", *[None] * 9]
        assert [row["dataset"] for row in rows[2::3]] == [None, "acrobat", "mine"]
        means = {row["dataset"]: row for row in rows if row["aggregation"] == "mean"}
        assert means[None]["error_p90_um"] == pytest.approx(5)
        assert means["acrobat"]["error_p90_um"] == pytest.approx(2)
        assert means["mine"]["official_error_p90_um"] == pytest.approx(8)

    def test_what_is_lacking_is_a_reason(self, cohort):
        add(cohort, "broken", [], [], reason="p.csv: cannot be read (no text); mend it")
        add(cohort, "lost", [None], [70], reason="registration gave no map")
        add(cohort, "withheld", [None] * 3, [None] * 3, [acrobat_line(5, 1, (3, 4))])
        broken, lost, withheld, *_ = run_cohort(cohort)
        assert (broken["pairs"], broken["points"]) == (0, 0)
        assert broken["reason"].startswith("p.csv: cannot be read")
        assert (lost["pairs"], lost["unregistered"]) == (1, 1)
        assert withheld["reason"] == "the H&E side of its 3 landmarks is withheld"
        assert len(predictions(cohort / "landmarks" / "cohort.predictions.csv")) == 1

    def test_no_pair_with_landmarks(self, cohort):
        add_row(cohort, "a")
        # Registered image pairs are processed in blocks, and have no table.
        points = {"he_landmarks": "p.csv", "her2_landmarks": "p.csv"}
        add_row(cohort, "b", "bci", "png", registered="true", **points)
        with pytest.raises(SheetError, match="no pair has landmarks"):
            run_cohort(cohort)

    def test_golden(self, cohort):
        add(cohort, "a", [10, 1, 3, 2], [20, 40, 60, 80], [acrobat_line(5, 1, (3, 4))])
        add(cohort, "b", [None], [70], [acrobat_line(7, 2, ("", ""))], reason="no map")
        text = repr([{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
                     for row in run_cohort(cohort)])  # fmt: skip
        text += (cohort / "landmarks" / "cohort.predictions.csv").read_text()
        golden = {6: "2fc94164a66804474f4ef6323702863b44f602290221c2d7ef35768ecb4d2b23"}
        assert {LandmarksOptions.version: hashlib.sha256(text.encode()).hexdigest()} == golden


class TestKidney:
    """Real sections at 4.6 um/px, and the figures of other programs."""

    MPP = 4.6

    @pytest.fixture
    def kidney(self, images, tmp_path):
        """The folder with its sheet of one pair, its landmarks in pixels, and its row."""
        birl = images / "registration" / "birl" / "rat-kidney_" / "scale-5pc"
        files = [birl / f"Rat-Kidney_{name}.csv" for name in ("HE", "PanCytokeratin")]
        slides = [images / "wsi_derived" / f"0_{name}_val.tif" for name in ("HE", "PANCK")]
        row = dict(zip(("he", "her2"), slides, strict=True))
        row |= dict(zip(("he_landmarks", "her2_landmarks"), files, strict=True))
        write_sheet(tmp_path, [row], pair="case1", case="k", dataset="birl")
        describe_unit(tmp_path, "case1", tmp_path / "describe.parquet")
        here, there = (
            np.loadtxt(file, delimiter=",", skiprows=1, usecols=(1, 2)) for file in files
        )
        return tmp_path, here[: len(there)], there, row | {"case": "k", "dataset": "birl"}

    def figures(self, found):
        errors = np.array([line["error_um"] for line in found]) / self.MPP
        fraction = np.median([line["error_diagonal_fraction"] for line in found])
        return round(np.median(errors), 1), round(np.percentile(errors, 90), 1), round(fraction, 4)

    def test_the_best_affine(self, kidney):
        folder, here, there, _ = kidney
        assert self.figures(run(folder, displacement=None)) == (29.1, 43.5, 0.0207), "identity"
        matrix = np.linalg.lstsq(np.column_stack([here, np.ones(len(here))]), there, rcond=None)[0]
        d = field_of(lambda p: p @ matrix[:2] + matrix[2] * self.MPP, 118, 80, 46.0)
        write_displacement(folder / "case1.npz", d)
        found = run(folder)
        assert self.figures(found) == (3.5, 7.8, 0.0025)
        assert len(found) == 69
        official = [line["official_error_um"] for line in found]
        assert 3.5 < np.median(official) / self.MPP < 4.0, "a little more: HER2 is smaller"

    def test_from_slides_to_the_cohort(self, kidney):
        folder, here, there, row = kidney
        here_um, there_um = here * self.MPP, there * self.MPP
        lines = [
            f"0,0_HE_val.ndpi,0_PANCK_val.ndpi,{number},{x:.4f},{y:.4f},4.6,4.6,PANCK,"
            f"{here_x:.4f},{here_y:.4f}"
            for number, ((here_x, here_y), (x, y)) in enumerate(zip(here_um, there_um, strict=True))
        ]
        (folder / "points.csv").write_text("\n".join([HEADER, *lines]) + "\n")
        official = row | {"he_landmarks": "points.csv", "her2_landmarks": "points.csv"}
        pairs = {"plain": row, "official": official, "failed": official}
        write_sheet(folder, [cells | {"pair": pair} for pair, cells in pairs.items()])
        # As if both slides had one size: HER2 is that much smaller.
        scale = np.array([1123 / 1164, 724 / 787])
        scaled = field_of(lambda p: p * scale, 118, 80, 46.0)
        for pair in pairs:
            write_displacement(folder / f"{pair}.npz", none() if pair == "failed" else scaled)
            landmarks.run(
                sheet=folder / "pairs.tsv",
                unit=pair,
                images_table=describe_unit(folder, pair, folder / f"{pair}.describe.parquet"),
                displacement=folder / f"{pair}.npz",
                errors=folder / "landmarks" / f"{pair}.parquet",
                predictions=folder / "landmarks" / f"{pair}.csv",
                options=LandmarksOptions(),
            )
        failed, *measured = run_cohort(folder)[:3]
        assert [line["pair"] for line in (failed, *measured)] == ["failed", "official", "plain"]
        # The formula written out once more, without HEMERA.
        inverse = np.clip(there_um / scale, 0, (1164 * 4.6, 787 * 4.6))
        distance = np.hypot(*(inverse - here_um).T)
        p90 = np.percentile(distance, 90)
        for found in measured:
            assert found["points"] == 69
            assert found["official_error_p90_um"] == pytest.approx(p90, abs=0.05)
            assert found["official_error_mean_um"] == pytest.approx(distance.mean(), abs=0.05)
            assert found["initial_error_median_um"] / self.MPP == pytest.approx(29.1, abs=0.05)
            assert found["initial_error_p90_um"] / self.MPP == pytest.approx(43.5, abs=0.05)
            assert found["error_median_um"] / self.MPP == pytest.approx(12.7, rel=0.1)
            assert found["error_p90_um"] / self.MPP == pytest.approx(21.9, rel=0.1)
        assert failed["unregistered"] == 1
        assert failed["official_error_p90_um"] / self.MPP == pytest.approx(43.5, abs=0.05)
        given = predictions(folder / "landmarks" / "cohort.predictions.csv")
        assert len(given) == 2 * 69, "those of the pairs with an ACROBAT file"
        assert [line["he_x"] for line in given[:69]] == [""] * 69
        points = np.array([(float(line["he_x"]), float(line["he_y"])) for line in given[69:]])
        # Vectors are stored in steps of 0.18 um.
        np.testing.assert_allclose(points, there_um / scale, atol=0.15)
