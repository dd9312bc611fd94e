"""The subsets of both networks; stage index draws them from whole tables."""

import numpy as np
import pytest

from hemera.dataset.subsets import check_subsets
from hemera.errors import LeakageError


def test_a_case_that_both_networks_meet_is_an_error() -> None:
    cases = np.array(["a", "a", "b", "c"])
    check_subsets(cases, np.array(["train", "", "val", "test"]), np.array(["", "", "val", "test"]))
    with pytest.raises(LeakageError, match="case b: GenerationNet saw it"):
        check_subsets(cases, np.array(["", "", "val", "test"]), np.array(["", "", "test", "test"]))
