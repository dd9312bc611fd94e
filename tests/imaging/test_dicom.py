"""DICOM: what OpenSlide refuses, wsidicom reads, without attributes of the patient."""

import json
import shutil
import sys

import imagecodecs
import numpy as np
import pytest

from hemera import tables
from hemera.errors import SlideError
from hemera.imaging.slide import open_slide
from tests.small_sheets import describe_unit, write_sheet

JPEGLS, JPEG = "sm_image_jpegls.dcm", "camelyon_jpeg_1152x700.dcm"


def frames(path):
    """Decode 5 x 5 frames of 10 x 10 px one by one, without wsidicom."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(path)
    assert (data.Rows, data.Columns, data.NumberOfFrames) == (10, 10, 25)
    stored = [
        imagecodecs.jpegls_decode(frame)
        for frame in pydicom.encaps.generate_frames(data.PixelData, number_of_frames=25)
    ]
    rows = [np.concatenate(stored[5 * row : 5 * row + 5], axis=1) for row in range(5)]
    return np.concatenate(rows), data


def test_jpeg_ls_has_the_pixels_of_its_frames(images):
    pytest.importorskip("wsidicom")
    path = images / "dicom" / JPEGLS
    truth, _ = frames(path)
    with open_slide(path) as slide:
        assert (slide.reader, slide.vendor) == ("wsidicom", "dicom")
        assert slide.level_sizes == ((50, 50),)
        assert slide.mpp == pytest.approx(0.499, abs=1e-3)
        assert slide.mpp_source == "dicom.PixelSpacing"
        # Neither square nor on the grid of the frames.
        np.testing.assert_array_equal(slide.read_level(0, 7, 3, 31, 18), truth[3:21, 7:38])


def test_labels_and_patients_are_not_read(images, tmp_path):
    """A label of the same series and a file of another series are beside the slide."""
    pytest.importorskip("wsidicom")
    path = shutil.copy(images / "dicom" / JPEGLS, tmp_path / "slide.dcm")
    _, data = frames(path)
    data.PatientName, data.PatientID = "DOE^JANE", "19610203"
    data.save_as(path)
    for name, change in (
        ("label", {"ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]}),
        ("other", {"SeriesInstanceUID": "1.2.3.4"}),
    ):
        other = frames(path)[1]
        for key, value in change.items():
            setattr(other, key, value)
        # Undecodable, so that opening it as a level would be a fault.
        other.PixelData = other.PixelData[:200]
        other.save_as(tmp_path / f"{name}.dcm")
    rows = [{"pair": "p1", "he": "slide.dcm", "her2": "slide.dcm", "registered": "true"}]
    write_sheet(tmp_path, rows, case="c", dataset="d")
    table = tmp_path / "described.parquet"
    describe_unit(tmp_path, "p1", table)
    (row, *_) = tables.read(table, tables.DESCRIBE).to_pylist()
    assert (row["reader"], row["width_px"]) == ("wsidicom", 50)
    assert not [name for name in (b"DOE", b"19610203") if name in table.read_bytes()]
    assert "JANE" not in json.dumps(row, default=repr)
    with pytest.raises(SlideError, match=r"label\.dcm: wsidicom cannot read it \(an image of kind"):
        open_slide(tmp_path / "label.dcm", reader="wsidicom", mpp=0.5)


def test_what_openslide_reads_is_left_to_it(images):
    # Its own resolution, 29 um/px, is that of an overview.
    with open_slide(images / "dicom" / JPEG, mpp=10.0) as slide:
        assert slide.reader == "openslide"
        assert slide.size_px == (1152, 700)


def test_without_wsidicom_the_remedy_is_named(tmp_path, monkeypatch):
    path = tmp_path / "slide.dcm"
    path.write_bytes(bytes(128) + b"DICM" + bytes(500))
    monkeypatch.setitem(sys.modules, "wsidicom", None)
    with pytest.raises(SlideError, match=r"OpenSlide cannot read; install hemera\[dicom\], or"):
        open_slide(path)
