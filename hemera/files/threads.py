"""Work in threads with results in order: reading, OpenCV and the codecs release the GIL."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Most results per thread that are computed in advance."""


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``work(item)`` for each item, in order, at most `AHEAD` results per thread in advance.

    Closing the generator ends the work; an error of `work` is raised where its result would come.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        ahead: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > AHEAD * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
