"""Results of worker processes in the order of what they were made of."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from pipeline.core.workers import die_with_parent, spawn_context

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``map(work, items)`` by so many spawned processes, in this one where it is one.

    Twice as many items as processes are given out at a time, so that few results wait. An exception of ``work`` is
    raised in its result's place.
    """
    if workers < 2:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    with ProcessPoolExecutor(workers, spawn_context(), initializer=die_with_parent) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
