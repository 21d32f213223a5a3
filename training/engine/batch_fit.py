"""How many samples at a time fit the memory there is: chosen by prediction before the first step."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from shards_spec.files import UserError
from shards_spec.library_errors import is_out_of_memory, short
from shards_spec.messages import counted
from shards_spec.precision import resolve_precision
from training.config import RunConfig
from training.data.batches import TrainingRows, first_batch, lay_out_images
from training.engine.device_memory import CudaMeter, DeviceProfile, Meter, measure
from training.engine.gradients import split
from training.engine.memory_estimate import Memory, Profile, profile
from training.engine.sync_batch_norm import moving
from training.task import Batch, RecipeConfig, Task, check_item_fields

log = logging.getLogger(__name__)
GB = 1e9
SHARE = 0.9  # of the memory that a prediction may fill: it leaves workspaces and the allocator's rounding out
ADVICE = "take a smaller --chunk-size, --batch-size or --model, or --checkpoint-activations"
PROFILED = 16  # samples read to measure what one takes
MOST_MEASURED = 64  # samples of a pass on a GPU, whose kernels for a few samples take other workspaces than for many
# a cgroup's limit and what is used of it for good, of versions 2 and 1
CGROUPS = (
    ("memory.max", "memory.stat", "anon"),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
)


class SizedProfile(NamedTuple):
    """What a task takes per sample, and the global batch for which that holds."""

    profile: Profile | DeviceProfile
    batch_size: int


def memory_limit(fit: float | None, device: str) -> tuple[float, str]:
    """Return the bytes that this process may take, and who says so.

    Args:
        fit: ``--fit``, in gigabytes.
        device: The device.
    """
    if fit is not None:
        return fit * GB, f"of --fit {fit:g}"
    if device.startswith("cuda"):  # what this process holds already is part of the prediction
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return free, "that are free on the device"
    return available_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "that are free on this machine"


def available_bytes(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> float:
    """Return the bytes that the machine, or the container around this process, can still give."""
    limits = list[float]()
    with suppress(OSError, ValueError, IndexError, AttributeError):
        lines = Path(proc, "meminfo").read_text().splitlines()
        limits += [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, statistics, used in CGROUPS:
        with suppress(OSError, ValueError):  # another version, or "max"
            lines = Path(cgroup, statistics).read_text().splitlines()
            taken = sum(float(line.split()[1]) for line in lines if line.split()[:1] == [used])
            limits.append(float(Path(cgroup, limit).read_text()) - taken)
    return min(limits) if limits else float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def profiles(
    config: RecipeConfig,
    rows: TrainingRows,
    task: Task,
    device: str = "cpu",
    *,
    meter: Meter | None = None,
    ranks: int = 1,
) -> list[SizedProfile]:
    """Measure what the smallest and the largest images of a run take.

    On CUDA, or with a meter, by passes on the device where the task is, of one of ``ranks`` processes; otherwise by
    what a CPU saves. Raises UserError where the samples lack a field that the task reads.
    """
    if device.startswith("cuda"):
        meter = CudaMeter(device)
    plan, measured = rows.plan, []
    task.train()
    for side in sorted({min(plan.sides), max(plan.sides)}) if plan.sides else (None,):
        batch, batch_size = first_batch(rows, PROFILED, side), plan.of_side(side)
        check_item_fields(task, batch)
        one: Profile | DeviceProfile
        if meter is not None:
            one = _measured_on_device(
                config, task, batch, batch_size=batch_size, device=device, meter=meter, ranks=ranks
            )
        else:
            few = split(batch, max(1, len(batch["keys"]) // 4))[0]
            one = profile(task, few, config.run.precision, config.optim.ema_decay is not None)
        measured.append(SizedProfile(one, batch_size))
    return measured


def _measured_on_device(
    config: RecipeConfig, task: Task, batch: Batch, *, batch_size: int, device: str, meter: Meter, ranks: int
) -> DeviceProfile:
    """Measure with as many samples as the device has room for, up to the batch and to `MOST_MEASURED`."""
    run = config.run
    if run.channels_last:
        task.to(memory_format=torch.channels_last)
        lay_out_images(batch)
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    precision = resolve_precision(run.precision, device, emulated=False)
    average = config.optim.ema_decay is not None
    most = max(2, min(MOST_MEASURED, batch_size))
    while True:
        try:
            return measure(task, moved, batch_size, meter, precision=precision, average=average, most=most, ranks=ranks)
        except (RuntimeError, MemoryError) as error:
            if most == 2 or not is_out_of_memory(error):
                raise
        finally:
            task.zero_grad(set_to_none=True)
            meter.clear()  # a run's own peak is that of its steps
        most = max(2, most // 2)


def choose(batches: list[SizedProfile], ranks: int, available: float, asked: int | None) -> Memory:
    """Return the memory of the largest equal chunks that fit; of one sample at a time where nothing fits.

    Args:
        batches: What samples take.
        ranks: How many processes share a batch.
        available: Bytes that a process may take.
        asked: The config's chunk size, which is kept; None chooses one.
    """
    share = max(batch_size // ranks for _, batch_size in batches)
    parts = 1
    while True:
        chunk = asked
        if asked is None and parts > 1:
            chunk = -(-share // parts)
        as_bytes = chunk is not None and chunk < share
        candidates = [one.at(batch_size, ranks, chunk, as_bytes) for one, batch_size in batches]
        memory = max(candidates, key=lambda candidate: candidate.total)
        if asked is not None or memory.total <= SHARE * available or chunk == 1 or share <= 1:
            return memory
        parts *= 2


def fitted(run: RunConfig, batches: list[SizedProfile], ranks: int, device: str, *, warn_only: bool = False) -> Memory:
    """Return the memory of a step with the config's chunks, or with the largest that fit.

    Raises UserError when they do not; a warning only where chunks are asked for without ``--fit``, or ``warn_only``.
    """
    available, limited_by = memory_limit(run.fit, device)
    memory = choose(batches, ranks, available, run.chunk_size)
    if memory.total <= SHARE * available:
        return memory
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    message = (
        f"a step takes about {memory.total / GB:,.1f} GB (most of it {largest}: {memory.parts[largest] / GB:,.1f}), "
        f"which is over nine tenths of the {available / GB:,.1f} GB {limited_by}"
    )
    if run.chunk_size is not None:
        message = f"{message}: take a --chunk-size below {run.chunk_size}, or leave it to --fit"
    else:
        message = (
            f"{message}, even one sample at a time: take a smaller --batch-size or --model, --checkpoint-activations, "
            "or more processes; --fit GB says that there is more"
        )
    if warn_only or (run.chunk_size is not None and run.fit is None):
        log.warning("%s", message)
        return memory
    raise UserError(message)


def halved(chunk_size: int | None, share: int, ranks: int, reason: str) -> int:
    """Return the next smaller chunk size after one that did not fit.

    Args:
        chunk_size: The one that did not fit; None: the whole share.
        share: Samples of a process's share of the batch.
        ranks: How many processes there are.
        reason: What the allocator said.

    Raises:
        UserError: It is one sample already, or there are several processes: the others are within the step.
    """
    size = min(chunk_size or share, share)
    if ranks > 1 or size <= 1:
        raise UserError(f"out of memory with {counted(size, 'sample')} at a time ({reason}): {ADVICE}")
    half = -(-size // 2)
    log.warning("out of memory with %d samples at a time (%s): --chunk-size %d from here on", size, reason, half)
    return half


def warn_of_norms(task: torch.nn.Module, chunk_size: int | None) -> None:
    """Warn where chunks are not the mathematics of the whole batch."""
    if chunk_size is not None and moving(task):
        log.warning(
            "trained BatchNorms normalise over a chunk of %s and not over the batch; "
            "--checkpoint-activations saves memory without that",
            counted(chunk_size, "sample"),
        )


@contextmanager
def out_of_memory(device: str) -> Iterator[None]:
    """Within, an allocator without memory is a UserError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device} ({short(error)}): {ADVICE}") from error
