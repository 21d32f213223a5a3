"""Results computed ahead of their use by threads, in order and in bounded memory.

Threads suffice: Pillow, numpy and network clients release the GIL while they work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch_map(function: Callable[[T], R], items: Iterable[T], threads: int, depth: int) -> Iterator[R]:
    """``map(function, items)`` with up to ``depth`` results computed ahead by ``threads`` threads.

    Results come in the order of the items. An exception of ``function`` is raised in its result's place; calls that
    have not begun when the iterator is closed are cancelled.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
