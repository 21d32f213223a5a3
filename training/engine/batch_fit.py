"""How many samples at a time fit the memory there is: chosen by prediction before the first step."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from shards_spec.files import UserError
from shards_spec.library_errors import short
from training.config import RunConfig
from training.data.batches import first_batch
from training.data.samples import Samples
from training.engine.gradients import split
from training.engine.memory_estimate import Memory, Profile, profile
from training.engine.sync_batch_norm import moving

log = logging.getLogger(__name__)
GB = 1e9
SHARE = 0.9  # of the memory that a prediction may fill: it leaves workspaces and the allocator's rounding out
MEND = "take a smaller --chunk-size, --batch-size or --model, or --checkpoint-activations"
Sized = tuple[Profile, int]  # with the global batch that it is of
NO_MEMORY = (  # what else says so, as RuntimeError: torch's allocators, C++, cuBLAS and cuDNN; oneDNN gives no reason
    "can't allocate memory", "DefaultCPUAllocator", "out of memory", "std::bad_alloc", "bad allocation",
    "STATUS_ALLOC_FAILED", "could not create a primitive", "could not create a memory object",
)  # fmt: skip
CGROUPS = (  # its limit and what is used of it for good, of versions 2 and 1
    ("memory.max", "memory.stat", "anon"),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
)


def room(fit: float | None, device: str) -> tuple[float, str]:
    """Bytes that this process may take, and who says so."""
    if fit is not None:
        return fit * GB, f"of --fit {fit:g}"
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0], "that are free on the device"
    return available_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "that are free on this machine"


def available_bytes(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> float:
    """Memory that the machine, or the container around this process, can still give."""
    found = list[float]()
    with suppress(OSError, ValueError, IndexError, AttributeError):
        lines = Path(proc, "meminfo").read_text().splitlines()
        found += [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, statistics, used in CGROUPS:
        with suppress(OSError, ValueError):  # another version, or "max"
            lines = Path(cgroup, statistics).read_text().splitlines()
            taken = sum(float(line.split()[1]) for line in lines if line.split()[:1] == [used])
            found.append(float(Path(cgroup, limit).read_text()) - taken)
    return min(found) if found else float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def profiles(config: Any, samples: Samples, task: Any) -> list[Sized]:
    """What the smallest and the largest images of a run take, with their global batches."""
    plan, average = samples.plan, config.optim.ema_decay is not None
    found = []
    for side in sorted({min(plan.sides), max(plan.sides)}) if plan.sides else (None,):
        batch = first_batch(samples, 16, side)
        few = split(batch, max(1, len(batch["keys"]) // 4))[0]
        found.append((profile(task.train(), few, config.run.precision, average), plan.of_side(side)))
    return found


def choose(batches: list[Sized], ranks: int, bytes_there: float, asked: int | None) -> Memory:
    """The largest equal chunks of the batches that fit, as the memory they take; ``asked`` ones are not changed.

    Where nothing fits it is that of one sample at a time.
    """
    share, parts = max(size // ranks for _, size in batches), 1
    while True:
        chunk = asked if asked is not None else None if parts == 1 else -(-share // parts)
        as_bytes = chunk is not None and chunk < share
        memory = max((one.at(size, ranks, chunk, as_bytes) for one, size in batches), key=lambda found: found.total)
        if asked is not None or memory.total <= SHARE * bytes_there or chunk == 1 or share <= 1:
            return memory
        parts *= 2


def fitted(run: RunConfig, batches: list[Sized], ranks: int, device: str, only_said: bool = False) -> Memory:
    """The memory of a step and its chunks, those of the config or the largest that fit.

    Raises UserError when they do not; where chunks are asked for without --fit, or with ``only_said``, a warning.
    """
    bytes_there, who = room(run.fit, device)
    memory = choose(batches, ranks, bytes_there, run.chunk_size)
    if memory.total <= SHARE * bytes_there:
        return memory
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    message = (
        f"a step takes about {memory.total / GB:,.1f} GB (most of it {largest}: {memory.parts[largest] / GB:,.1f}), "
        f"which is over nine tenths of the {bytes_there / GB:,.1f} GB {who}"
    )
    if run.chunk_size is not None:
        message = f"{message}: take a --chunk-size below {run.chunk_size}, or leave it to --fit"
    else:
        message = (
            f"{message}, even one sample at a time: take a smaller --batch-size or --model, --checkpoint-activations, "
            "or more processes; --fit GB says that there is more"
        )
    if only_said or (run.chunk_size is not None and run.fit is None):
        log.warning("%s", message)
        return memory
    raise UserError(message)


def halved(chunk_size: int | None, share: int, ranks: int, reason: str) -> int:
    """The next smaller chunk size after one that did not fit.

    Raises UserError at one sample, and of several processes, since the others are within the step.
    """
    size = min(chunk_size or share, share)
    if ranks > 1 or size <= 1:
        raise UserError(f"out of memory with {size} samples at a time ({reason}): {MEND}")
    half = -(-size // 2)
    log.warning("out of memory with %d samples at a time (%s): --chunk-size %d from here on", size, reason, half)
    return half


def warn_of_norms(task: torch.nn.Module, chunk_size: int | None) -> None:
    """Say that chunks are not the mathematics of the whole batch, where they are not."""
    if chunk_size is not None and moving(task):
        log.warning(
            "trained BatchNorms normalise over a chunk of %d samples and not over the batch; "
            "--checkpoint-activations saves memory without that", chunk_size,
        )  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether CUDA's or the CPU's allocator had no more."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in NO_MEMORY)


@contextmanager
def out_of_memory(device: str) -> Iterator[None]:
    """Within, an allocator without memory is a UserError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device} ({short(error)}): {MEND}") from error
