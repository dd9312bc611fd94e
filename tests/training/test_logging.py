import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hemera.training.logging import Journal, sheet


def picture(value: int, height: int = 6, width: int = 10):
    image = np.full((height, width, 3), value, np.uint8)
    image[0, 0] = (255, 10, 20)
    return image


def test_tensorboard_reads_losses_epochs_and_pictures(tmp_path):
    steps = [({"total": torch.tensor(value)}, ["a"]) for value in (1.0, 2.0)]
    with Journal(tmp_path, 0) as journal:
        journal.losses(2, steps)
        journal.epoch(2, {"train/total": 1.5, "val/ssim": 0.25})
        journal.picture(1, 2, picture(90))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)]
               for tag in found.Tags()["scalars"]}  # fmt: skip
    assert scalars == {
        "step/total": [(2, 1.5)], "train/total": [(2, 1.5)], "val/ssim": [(2, 0.25)],
    }  # fmt: skip
    assert found.Tags()["images"] == ["samples"]
    kept = cv2.imread(str(tmp_path / "samples" / "0001.png"))[..., ::-1]
    assert np.array_equal(kept, picture(90))


def test_what_a_broken_run_logged_after_its_checkpoint_does_not_count(tmp_path):
    for done, value in ((0, 1.0), (10, 5.0)):
        with Journal(tmp_path, done) as journal:
            for step in range(done + 5, 21, 5):
                journal.losses(step, [({"total": torch.tensor(value)}, ["a"])])
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("step/total")
    assert [(event.step, event.value) for event in found] == [(5, 1), (10, 1), (15, 5), (20, 5)]


def test_a_silent_journal_leaves_nothing(tmp_path):
    with Journal(tmp_path / "run", 0, silent=True) as journal:
        journal.losses(1, [({"total": torch.tensor(1.0)}, ["a"])])
        journal.epoch(1, {"total": 1.0})
        journal.picture(1, 1, picture(3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("widths", [(10, 10), (10, 7)])
def test_pictures_stand_side_by_side_and_rows_below_each_other(widths):
    rows = [[picture(40 + row, 6 + row, width) for _ in range(3)]
            for row, width in enumerate(widths)]  # fmt: skip
    image = sheet(rows)
    assert image.shape == (6 + 4 + 7, 3 * 10 + 2 * 4, 3)
    assert np.array_equal(image[:6, 14:24], rows[0][1])
    second = widths[1] + 4
    assert np.array_equal(image[10:, second : second + widths[1]], rows[1][1])
    assert (image[6:10] == 255).all()
    assert (image[:6, 10:14] == 255).all()
