"""Images decoded and views rendered ahead of the device, in order, by processes or threads."""

import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pipeline.core.workers import die_with_parent
from shards_spec.files import DataError
from shards_spec.images import decode_rgb
from shards_spec.views import ViewSpec, render_views


@dataclass(frozen=True)
class Job:
    """Views of one sample to render, from its encoded image."""

    key: str
    image: bytes
    views: tuple[int, ...]


def render(spec: ViewSpec, size: int, job: Job) -> np.ndarray | DataError:
    """(V, size, size, 3) uint8, or why the picture does not decode."""
    try:
        return render_views(decode_rgb(job.image), spec, job.key, job.views, size)
    except DataError as error:
        return error


def rendering_pool(processes: int, threads: int) -> Executor:
    """``processes`` processes of their own, or for 0 of them ``threads`` threads of this one."""
    if not processes:
        return ThreadPoolExecutor(threads)
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=die_with_parent)


class Rendering:
    """What `render` gives for each job, in order, at most ``depth`` jobs ahead; work begins at once.

    ``waited_s`` is how long whoever iterates had to wait.
    """

    def __init__(self, pool: Executor, jobs: Iterable[Job], depth: int, spec: ViewSpec, size: int) -> None:
        self.waited_s = 0.0
        self._running = deque[Future[np.ndarray | DataError]]()
        self._left = (pool.submit(render, spec, size, job) for job in jobs)
        self._running.extend(islice(self._left, depth))

    def __iter__(self) -> Iterator[np.ndarray | DataError]:
        try:
            while self._running:
                start = time.monotonic()
                rendered = self._running.popleft().result()
                self.waited_s += time.monotonic() - start
                self._running.extend(islice(self._left, 1))
                yield rendered
        finally:
            for future in self._running:
                future.cancel()
