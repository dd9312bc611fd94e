import pytest
import torch

from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import TrainingError
from hemera.training.batches import TrainingSampler, training_loader, validation_loader
from tests.small_index import write_index
from tests.small_networks import cpu_compute


def test_every_epoch_sees_every_tile_once_in_another_order():
    sampler = TrainingSampler(5, 2, seed=3, epochs=4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12
    epochs = [[key for batch in batches[i : i + 3] for key in batch] for i in range(0, 12, 3)]
    for number, epoch in enumerate(epochs, 1):
        assert {key[0] for key in epoch} == {number}
        assert sorted(key[1] for key in epoch) == list(range(5))
    assert len({tuple(key[1] for key in epoch) for epoch in epochs}) > 1


def test_a_sampler_begins_at_any_step():
    whole = list(TrainingSampler(5, 2, seed=3, epochs=4))
    rest = TrainingSampler(5, 2, seed=3, epochs=4, epoch=2, step=2)
    assert list(rest) == whole[5:]
    assert len(rest) == 7
    assert list(TrainingSampler(5, 2, seed=3, epochs=4, epoch=5)) == []


def test_parts_and_ranks_divide_the_batches_of_a_single_rank():
    """All parts together are the batches of one rank, without the smaller last one."""
    whole = list(TrainingSampler(14, 4, seed=3, epochs=2))
    assert [len(batch) for batch in whole[:4]] == [4, 4, 4, 2]
    divided = {"seed": 3, "epochs": 2, "accumulate": 2, "ranks": 2}
    samplers = [TrainingSampler(14, 4, rank=rank, **divided) for rank in (0, 1)]
    assert [(sampler.steps, len(sampler)) for sampler in samplers] == [(3, 12)] * 2
    parts = [list(sampler) for sampler in samplers]
    assert all(len(part) == 1 for of_rank in parts for part in of_rank)
    together = [
        sorted(key for of_rank in parts for part in of_rank[at : at + 2] for key in part)
        for at in range(0, 12, 2)
    ]
    assert together == [sorted(batch) for batch in whole if len(batch) == 4]
    assert list(TrainingSampler(14, 4, rank=1, step=2, **divided)) == parts[1][4:]


def test_fewer_tiles_than_a_whole_batch():
    with pytest.raises(TrainingError, match=r"batch_size: 4 tiles make a step and there are 3;"):
        TrainingSampler(3, 4, seed=0, epochs=1, drop_last=True)
    assert TrainingSampler(3, 4, seed=0, epochs=1).steps == 1


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    """Nor do they draw anything from the generator of the run."""
    tiles = TileDataset(
        write_index(tmp_path, train=5), network="generation", split="train",
        images=("he", "weight"), crop_px=64, flips=(0, 1), seed=3,
    )  # fmt: skip

    def read(workers):
        sampler = TrainingSampler(5, 2, seed=3, epochs=2)
        return list(training_loader(tiles, sampler, workers, cpu_compute()))

    torch.manual_seed(1)
    none = read(0)
    state = torch.get_rng_state()
    two = read(2)
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(none, two, strict=True):
        assert first["tile"] == second["tile"]
        assert torch.equal(first["he"], second["he"])
        assert torch.equal(first["weight"], second["weight"])


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_sees_all_tiles_once_in_order_every_epoch(tmp_path, workers):
    tiles = TileDataset(
        write_index(tmp_path, val=5), network="segmentation", split="val", images=["he"],
        crop_px=64, flips=(0, 1), seed=3,
    )  # fmt: skip
    batches = validation_loader(tiles, 2, workers, cpu_compute())
    for _ in range(2):
        seen = [(tile, he) for batch in batches for tile, he in zip(*batch.values(), strict=True)]
        assert [tile for tile, _ in seen] == tiles.tiles
        assert all(torch.equal(he, tiles[0, i]["he"]) for i, (_, he) in enumerate(seen))
