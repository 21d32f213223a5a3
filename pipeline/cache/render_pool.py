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
class RenderJob:
    """Views of one sample to render, from its encoded image."""

    key: str
    image: bytes
    views: tuple[int, ...]


def render(spec: ViewSpec, size: int, job: RenderJob) -> np.ndarray | DataError:
    """(V, size, size, 3) uint8, or why the image does not decode."""
    try:
        return render_views(decode_rgb(job.image), spec, job.key, job.views, size)
    except DataError as error:
        return error


def create_render_pool(processes: int, threads: int) -> Executor:
    """A pool of ``processes`` processes, or, where that is 0, of ``threads`` threads of this process."""
    if not processes:
        return ThreadPoolExecutor(threads)
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=die_with_parent)


class RenderQueue:
    """Iterates over the results of `render` for each job, in order, with at most ``depth`` jobs submitted ahead.

    Work begins when it is made. ``waited_s`` is how long the consumer had to wait.
    """

    def __init__(self, pool: Executor, jobs: Iterable[RenderJob], *, depth: int, spec: ViewSpec, size: int) -> None:
        self.waited_s = 0.0
        self._submitted = deque[Future[np.ndarray | DataError]]()
        self._submissions = (pool.submit(render, spec, size, job) for job in jobs)  # lazily, job by job
        self._submitted.extend(islice(self._submissions, depth))

    def __iter__(self) -> Iterator[np.ndarray | DataError]:
        try:
            while self._submitted:
                start = time.monotonic()
                rendered = self._submitted.popleft().result()
                self.waited_s += time.monotonic() - start
                self._submitted.extend(islice(self._submissions, 1))
                yield rendered
        finally:
            for future in self._submitted:
                future.cancel()
