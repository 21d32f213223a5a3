"""What stages with a model share: a process per device, the precision there, and how running out of memory is told."""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from shards_spec.models import Precision


def pick_precision(asked: Literal["auto"] | Precision, device: str) -> Precision:
    """``auto`` becomes bf16 on a CUDA device that has it, else fp32."""
    import torch

    if asked != "auto":
        return asked
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp32"


def begin_on(devices: list[str], load: Callable[[str], None]) -> Callable[[], None]:
    """What each worker process does first: take one of the devices and ``load`` there, with its share of the cores."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    for device in devices:
        queue.put(device)
    return partial(_begin, queue, len(devices), load)


def _begin(queue: Any, workers: int, load: Callable[[str], None]) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    load(queue.get())


def out_of_memory(error: RuntimeError) -> bool:
    """CUDA's error has a class; on a CPU torch's allocator and oneDNN say it in these words."""
    import torch

    words = ("can't allocate memory", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
