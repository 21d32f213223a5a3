"""What stages with a model share: a worker process per device, and the errors of full memory."""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import Any


def worker_initializer(devices: list[str], load: Callable[[str], None]) -> Callable[[], None]:
    """An initializer for as many worker processes as devices: each takes one of them and calls ``load(device)``."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    for device in devices:
        queue.put(device)
    return partial(_load_on_next_device, queue, len(devices), load)


def _load_on_next_device(queue: Any, workers: int, load: Callable[[str], None]) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    load(queue.get())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory, or the host's for a CPU, did not suffice.

    CUDA's error has a class of its own; torch's CPU allocator and oneDNN can be told by their messages alone.
    """
    import torch

    messages = ("can't allocate memory", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)
