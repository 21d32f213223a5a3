"""Images decoded and views rendered ahead of the device, in order, by processes or threads, into memory that is reused.

Pickling a view takes longer than a GPU does to embed it, so rendering processes write into memory that they share with
this one; only jobs and errors are pickled. The memory is an unlinked file, which goes with its last process however
that ends.
"""

import ctypes
import math
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from pipeline.core.workers import die_with_parent
from shards_spec.files import DataError
from shards_spec.images import decode_rgb
from shards_spec.views import ViewSpec, render_views

MAX_BYTES = 2**29  # of a pool's rendered views
_worker_slots: list[np.ndarray] = []  # of a rendering process


@dataclass(frozen=True)
class RenderJob:
    """Views of one sample to render, from its encoded image."""

    key: str
    image: bytes
    views: tuple[int, ...]


def render(slots: np.ndarray, slot: int, spec: ViewSpec, job: RenderJob) -> DataError | None:
    """Render a sample's V views into ``slots[slot, :V]``; returns why the image does not decode, if it does not.

    ``slots`` is (slots, most views, S, S, 3) uint8.
    """
    try:
        image = decode_rgb(job.image)
    except DataError as error:
        return error
    slots[slot, : len(job.views)] = render_views(image, spec, job.key, job.views, slots.shape[2])
    return None


def _render_in_worker(slot: int, spec: ViewSpec, job: RenderJob) -> DataError | None:
    return render(_worker_slots[0], slot, spec, job)


def _start_worker(memory: Any, shape: tuple[int, ...]) -> None:
    die_with_parent()
    _worker_slots.append(_as_slots(memory, shape))


def _as_slots(memory: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, np.uint8).reshape(shape)


class RenderPool:
    """``processes`` processes, or, where that is 0, ``threads`` threads of this one, and places for what they render.

    ``slots`` is (slots, views, size, size, 3) uint8, a sample in each: two samples per worker, and two passes of
    ``rows`` views, as far as `MAX_BYTES` go.
    """

    def __init__(self, processes: int, threads: int, *, rows: int, views: int, size: int) -> None:
        ahead = 2 * (processes or threads) + 2 * math.ceil(rows / views)
        slots = max(2, min(ahead, MAX_BYTES // (views * size * size * 3)))
        shape = (slots, views, size, size, 3)
        self._executor: Executor
        if processes:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch"])  # it resizes: 300 MB that all of them share, loaded once
            memory = context.RawArray(ctypes.c_uint8, math.prod(shape))
            self.slots = _as_slots(memory, shape)
            self._executor = ProcessPoolExecutor(
                processes, context, initializer=_start_worker, initargs=(memory, shape)
            )
        else:
            self.slots = np.empty(shape, np.uint8)
            self._executor = ThreadPoolExecutor(threads)
        self._in_processes = bool(processes)
        for _ in range(processes):  # they start now, and have imported what they need when there is work
            self._executor.submit(int)

    def submit(self, slot: int, spec: ViewSpec, job: RenderJob) -> Future[DataError | None]:
        """Begin to `render` into a slot that nothing else uses."""
        if self._in_processes:
            return self._executor.submit(_render_in_worker, slot, spec, job)
        return self._executor.submit(render, self.slots, slot, spec, job)

    def shutdown(self) -> None:
        """End the workers, after the jobs that they have begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class RenderQueue:
    """Iterates over the views (V, S, S, 3) uint8 of each job, in order, or the DataError of what does not decode.

    Work begins when it is made; as many jobs are submitted ahead as the pool has slots. What an iteration returns is
    overwritten once the next is asked for. A pool serves one queue at a time.
    """

    def __init__(self, pool: RenderPool, jobs: Iterable[RenderJob], spec: ViewSpec) -> None:
        self._submitted = deque[tuple[np.ndarray, Future[DataError | None]]]()
        self._submissions = self._submit(pool, jobs, spec)
        self._submitted.extend(islice(self._submissions, len(pool.slots)))

    @staticmethod
    def _submit(
        pool: RenderPool, jobs: Iterable[RenderJob], spec: ViewSpec
    ) -> Iterator[tuple[np.ndarray, Future[DataError | None]]]:
        """Submit job by job as it is iterated over; each slot is taken in turn."""
        for number, job in enumerate(jobs):
            slot = number % len(pool.slots)
            yield pool.slots[slot, : len(job.views)], pool.submit(slot, spec, job)

    def __iter__(self) -> Iterator[np.ndarray | DataError]:
        try:
            while self._submitted:
                rendered, future = self._submitted.popleft()
                yield future.result() or rendered
                self._submitted.extend(islice(self._submissions, 1))  # into the slot that the consumer has left
        finally:
            running = [future for _, future in self._submitted if not future.cancel()]
            wait(running)  # else they would write into slots of the next queue
