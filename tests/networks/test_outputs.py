import pytest
import torch

from hemera.networks.outputs import copied, one_ahead


@pytest.mark.parametrize("count", [0, 1, 5])
def test_each_item_comes_after_the_next_one_was_made(count):
    made = []

    def make():
        for number in range(count):
            made.append(number)
            yield number

    found = []
    for number in one_ahead(make()):
        assert len(made) == min(number + 2, count)
        found.append(number)
    assert found == list(range(count))


def test_an_output_on_the_processor_is_not_copied():
    output = torch.rand(2, 3)
    assert copied(output)() is output
