"""What stages with a model share: a worker process per device."""

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
