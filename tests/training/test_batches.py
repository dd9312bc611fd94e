import pytest
import torch

from hemera.config import TrainSegmentationOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import TrainingError
from hemera.training.batches import TrainingSampler, training_loader, validation_loader
from hemera.training.distributed import SINGLE, Ranks
from tests.small_index import write_index
from tests.small_networks import cpu_compute


def sampler_of(
    count: int,
    batch_size: int,
    epochs: int,
    *,
    accumulate: int = 1,
    ranks: Ranks = SINGLE,
    epoch: int = 1,
    step: int = 0,
) -> TrainingSampler:
    options = TrainSegmentationOptions(
        batch_size=batch_size, epochs=epochs, accumulate=accumulate, seed=3
    )
    return TrainingSampler(count, options, ranks, epoch, step)


def test_every_epoch_sees_every_tile_once_in_another_order():
    sampler = sampler_of(5, 2, 4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12
    epochs = [[key for batch in batches[i : i + 3] for key in batch] for i in range(0, 12, 3)]
    for number, epoch in enumerate(epochs, 1):
        assert {key[0] for key in epoch} == {number}
        assert sorted(key[1] for key in epoch) == list(range(5))
    assert len({tuple(key[1] for key in epoch) for epoch in epochs}) > 1


def test_a_sampler_begins_at_any_step():
    whole = list(sampler_of(5, 2, 4))
    rest = sampler_of(5, 2, 4, epoch=2, step=2)
    assert list(rest) == whole[5:]
    assert len(rest) == 7
    assert list(sampler_of(5, 2, 4, epoch=5)) == []


def test_parts_and_ranks_divide_the_batches_of_a_single_rank():
    """All parts together are the batches of one rank, without the smaller last one."""
    whole = list(sampler_of(14, 4, 2))
    assert [len(batch) for batch in whole[:4]] == [4, 4, 4, 2]
    ranks = [Ranks(rank, 2) for rank in (0, 1)]
    samplers = [sampler_of(14, 4, 2, ranks=each, accumulate=2) for each in ranks]
    assert [(sampler.steps, len(sampler)) for sampler in samplers] == [(3, 12)] * 2
    parts = [list(sampler) for sampler in samplers]
    assert all(len(part) == 1 for of_rank in parts for part in of_rank)
    together = [
        sorted(key for of_rank in parts for part in of_rank[at : at + 2] for key in part)
        for at in range(0, 12, 2)
    ]
    assert together == [sorted(batch) for batch in whole if len(batch) == 4]
    assert list(sampler_of(14, 4, 2, ranks=ranks[1], step=2, accumulate=2)) == parts[1][4:]


def test_fewer_tiles_than_a_whole_batch():
    with pytest.raises(TrainingError, match=r"batch_size: 4 tiles make a step and there are 3;"):
        sampler_of(3, 4, 1, accumulate=2)
    assert sampler_of(3, 4, 1).steps == 1


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    """Nor do they draw anything from the generator of the run."""
    tiles = TileDataset(
        write_index(tmp_path, train=5), network="generation", split="train",
        images=("he", "weight"), crop_px=64, flips=(0, 1), seed=3,
    )  # fmt: skip

    def read(workers):
        sampler = sampler_of(5, 2, 2)
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
