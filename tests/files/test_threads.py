"""Results come in order, and nobody runs far ahead of who takes them."""

import threading
import time

import pytest

from hemera.files.threads import AHEAD, in_order


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(workers):
    def slow_first(n):
        time.sleep(0.02 if n == 0 else 0)
        return n * n

    assert list(in_order(slow_first, range(30), workers)) == [n * n for n in range(30)]
    assert list(in_order(slow_first, [], workers)) == []


def test_work_waits_for_who_takes_the_results():
    done = []
    results = in_order(lambda n: done.append(n) or n, range(1000), 2)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(done) <= AHEAD * 2 + 1
    results.close()
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count
    assert threading.active_count() < 50


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_where_its_result_would(workers):
    results = in_order(lambda n: 6 // n, [3, 2, 0, 1], workers)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
