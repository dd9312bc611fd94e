import cv2
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hemera.training.logging import TrainingLog, image_grid


def picture(value: int, height: int = 6, width: int = 10):
    image = np.full((height, width, 3), value, np.uint8)
    image[0, 0] = (255, 10, 20)
    return image


def scalars(folder):
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_losses_epochs_and_pictures(tmp_path):
    with TrainingLog(tmp_path, 0, 2) as log:
        for _ in range(2):
            log.step()
        log.losses({"total": 1.5})
        log.picture(1, picture(90))
        log.epoch(1, 3, {"train/total": 1.5, "val/ssim": 0.25})
    assert scalars(tmp_path) == {
        "step/total": [(2, 1.5)], "train/total": [(2, 1.5)], "val/ssim": [(2, 0.25)],
    }  # fmt: skip
    stored = cv2.imread(str(tmp_path / "samples" / "0001.png"))[..., ::-1]
    assert np.array_equal(stored, picture(90))


def test_what_an_interrupted_run_logged_after_its_checkpoint_is_discarded(tmp_path):
    for done, value in ((0, 1.0), (10, 5.0)):
        with TrainingLog(tmp_path, done, 20) as log:
            for step in range(done + 1, 21):
                log.step()
                if step % 5 == 0:
                    log.losses({"total": value})
    assert scalars(tmp_path) == {"step/total": [(5, 1), (10, 1), (15, 5), (20, 5)]}


def test_a_grid_has_rows_downwards_and_gaps_between():
    rows = [[picture(40 + row) for _ in range(3)] for row in range(2)]
    image = image_grid(rows)
    assert image.shape == (2 * 6 + 4, 3 * 10 + 2 * 4, 3)
    assert np.array_equal(image[:6, 14:24], rows[0][1])
    assert np.array_equal(image[10:, 14:24], rows[1][1])
    assert (image[6:10] == 255).all()
    assert (image[:6, 10:14] == 255).all()
