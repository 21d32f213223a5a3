"""Images decoded and rendered ahead of the device, in order, by processes or threads, into memory that is reused.

Pickling what is rendered takes longer than a GPU does to use it, so processes write into memory that they share with
this one; only jobs and errors are pickled. The memory is an unlinked file, which goes with its last process however
that ends.
"""

import ctypes
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.workers import die_with_parent, usable_cores
from shards_spec.files import DataError
from shards_spec.images import decode_rgb

MAX_BYTES = 2**29  # of what a pool has rendered
_worker_slots: list[np.ndarray] = []  # of a rendering process


@dataclass(frozen=True)
class RenderJob:
    """An encoded image, or why there is none, and what makes (V, S, S, 3) uint8 of the decoded one.

    ``render`` is pickled with every job, so it should be small.
    """

    image: bytes | DataError
    render: Callable[[Image.Image], np.ndarray]


def render(slots: np.ndarray, slot: int, job: RenderJob) -> int | DataError:
    """Render a job's V images into ``slots[slot, :V]``; returns V, or why the image does not decode.

    ``slots`` is (slots, most images of a job, S, S, 3) uint8.
    """
    if isinstance(job.image, DataError):
        return job.image
    try:
        image = decode_rgb(job.image)
    except DataError as error:
        return error
    rendered = job.render(image)
    slots[slot, : len(rendered)] = rendered
    return len(rendered)


def _render_in_worker(slot: int, job: RenderJob) -> int | DataError:
    return render(_worker_slots[0], slot, job)


def _start_worker(memory: Any, shape: tuple[int, ...]) -> None:
    die_with_parent()
    _worker_slots.append(_as_slots(memory, shape))


def _as_slots(memory: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, np.uint8).reshape(shape)


def rendering_processes(given: int | None, device: str, devices: int) -> int:
    """How many render for ``device``, one of ``devices`` that share the cores: as ``given``, or as many as suit it.

    Threads hold back the one that feeds a GPU. A CPU that runs a model has nothing else to do meanwhile.
    """
    if given is not None:
        return given
    return max(1, usable_cores() // devices) if device.startswith("cuda") else 0


class RenderPool:
    """``processes`` processes, or, where that is 0, ``threads`` threads of this one, and places for what they render.

    ``slots`` is (slots, most, size, size, 3) uint8, a job of at most ``most`` images in each: two jobs per worker, and
    two passes of ``rows`` images, as far as `MAX_BYTES` go. ``preload`` names the module that takes longest to import:
    the processes share it. Linux ends them with the thread that makes this.
    """

    def __init__(
        self, processes: int, threads: int, *, rows: int, most: int, size: int, preload: str = "torch"
    ) -> None:
        ahead = 2 * (processes or threads) + 2 * math.ceil(rows / most)
        slots = max(2, min(ahead, MAX_BYTES // (most * size * size * 3)))
        shape = (slots, most, size, size, 3)
        self._executor: Executor
        if processes:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([preload])  # hundreds of MB that all of them share, loaded once
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

    def submit(self, slot: int, job: RenderJob) -> Future[int | DataError]:
        """Begin to `render` into a slot that nothing else uses."""
        if self._in_processes:
            return self._executor.submit(_render_in_worker, slot, job)
        return self._executor.submit(render, self.slots, slot, job)

    def shutdown(self) -> None:
        """End the workers, after the jobs that they have begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class RenderQueue:
    """Iterates over what each job renders, (V, S, S, 3) uint8, in order, or the DataError of what does not decode.

    Work begins when it is made; as many jobs are submitted ahead as the pool has slots. What an iteration returns is
    overwritten once the next is asked for. A pool serves one queue at a time.
    """

    def __init__(self, pool: RenderPool, jobs: Iterable[RenderJob]) -> None:
        self._submitted = deque[tuple[np.ndarray, Future[int | DataError]]]()
        self._submissions = self._submit(pool, jobs)
        try:
            self._submitted.extend(islice(self._submissions, len(pool.slots)))
        except BaseException:  # of the jobs, such as the end of a broken tar
            self._leave()
            raise

    @staticmethod
    def _submit(pool: RenderPool, jobs: Iterable[RenderJob]) -> Iterator[tuple[np.ndarray, Future[int | DataError]]]:
        """Submit job by job as it is iterated over; each slot is taken in turn."""
        for number, job in enumerate(jobs):
            slot = number % len(pool.slots)
            yield pool.slots[slot], pool.submit(slot, job)

    def __iter__(self) -> Iterator[np.ndarray | DataError]:
        try:
            while self._submitted:
                slot, future = self._submitted.popleft()
                result = future.result()
                yield result if isinstance(result, DataError) else slot[:result]
                self._submitted.extend(islice(self._submissions, 1))  # into the slot that the consumer has left
        finally:
            self._leave()

    def _leave(self) -> None:
        """Let nothing go on that would write into slots of the next queue."""
        wait([future for _, future in self._submitted if not future.cancel()])
