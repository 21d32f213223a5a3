"""Peak memory of training, predicted from a forward pass of a few samples on the CPU.

Weights, gradients and optimizer state are counted. Activations are what autograd saves for the backward pass, each
storage once, measured at two small batches and extrapolated by a line; those of the losses, which hold matrices of all
pairs, at three and by a parabola. Left out: kernels' workspaces, the allocator's rounding, the gradient of the
activations in flight, what a checkpointed block computes again.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards_spec.messages import counted
from shards_spec.precision import PrecisionOption
from training.engine.ema import floating_state
from training.engine.gradients import split
from training.engine.sync_batch_norm import kept_statistics
from training.losses.similarity import BLOCK_ROWS, is_whole
from training.runs.student import STUDENT
from training.task import Batch, Features, Losses, Task

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the worst moment of a step, which takes ``chunk_size`` samples at a time (None: all)."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    batch: int = 0
    activations: int = 0
    losses: int = 0
    chunk_size: int | None = None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "chunk_size"}

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count / MIB:,.1f}" for name, count in self.parts.items() if count)
        chunks = f", in chunks of {counted(self.chunk_size, 'sample', style=',')}" if self.chunk_size else ""
        return f"peak memory of a process: about {self.total / MIB:,.1f} MiB ({parts}){chunks}"


@dataclass(frozen=True)
class Profile:
    """What a task takes per sample, measured at small batches, from which `at` extrapolates.

    ``pixels`` and ``others`` are bytes of a sample's images and of the rest of it; ``activations`` and ``losses`` are
    (samples, bytes) as measured.
    """

    weights: int
    trained: int
    average: int
    pixels: float
    others: float
    activations: tuple[tuple[int, int], ...]
    losses: tuple[tuple[int, int], ...]

    def at(self, batch_size: int, ranks: int = 1, chunk_size: int | None = None, as_bytes: bool = False) -> Memory:
        """Extrapolate to a global batch.

        Args:
            batch_size: Samples of the global batch.
            ranks: Processes that share it.
            chunk_size: Samples per forward pass of a process; None: its whole share.
            as_bytes: Images are kept as uint8 until their chunk's turn.
        """
        share = batch_size // ranks
        at_once = min(chunk_size or share, share)
        activations = max(0, round(_line(self.activations)(at_once)))
        losses = max(0, round(self._losses_at(batch_size, share)))
        if at_once < share:  # the losses' graph is gone before the chunks' second pass
            activations, losses = max(activations, losses), 0
        images = self.pixels / 4 * share + self.pixels * at_once if as_bytes else self.pixels * share
        return Memory(
            weights=self.weights,
            gradients=self.trained,
            optimizer=2 * self.trained,
            average=self.average,
            batch=int(images + self.others * share),
            activations=activations,
            losses=losses,
            chunk_size=chunk_size,
        )

    def _losses_at(self, size: int, share: int) -> float:
        """A process has ``share`` rows of the matrices of all pairs; of large ones `BLOCK_ROWS` are there at a time."""
        sizes, measured = np.array(self.losses, float).T
        squared, linear, constant = np.polyfit(sizes, measured, 2)
        rows = share if is_whole(share, size) else BLOCK_ROWS
        return float(squared * size * rows + linear * size + constant)


def predict_memory(
    task: Task,
    batch: Batch,
    batch_size: int,
    *,
    ranks: int = 1,
    chunk_size: int | None = None,
    precision: PrecisionOption = "fp32",
    average: bool = False,
) -> Memory:
    """Predict the peak memory of a task on the CPU in training mode.

    The random stream and the norms' running statistics are left as they are.

    Args:
        task: The task.
        batch: At least two samples, ready for the forward pass.
        batch_size: Samples of the global batch.
        ranks: Processes that share it.
        chunk_size: Samples per forward pass of a process; None: its whole share.
        precision: That of the forward pass.
        average: Whether an average of the weights is kept.
    """
    return profile(task, batch, precision, average).at(batch_size, ranks, chunk_size)


def profile(task: Task, batch: Batch, precision: PrecisionOption = "fp32", average: bool = False) -> Profile:
    """Measure a task as `predict_memory` does."""
    count = len(batch["keys"])
    few = split(batch, 2)[0]
    trained = bytes_of(parameter for parameter in task.parameters() if parameter.requires_grad)
    inputs = {id(value.untyped_storage()): value for value in batch.values() if isinstance(value, Tensor)}
    kept = {tensor.untyped_storage().data_ptr() for tensor in [*task.parameters(), *task.buffers(), *inputs.values()]}
    is_half = precision != "fp32"  # bf16 for both: a CPU takes long over fp16, and the bytes are the same
    with (
        torch.random.fork_rng(devices=[]),
        kept_statistics(task),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half),
    ):
        few_saved, _ = saved_bytes(partial(task, task.draw(few)), kept)
        saved, features = saved_bytes(partial(task, task.draw(batch)), kept)
        of_losses = [saved_bytes(partial(_losses, task, features, times), kept)[0] for times in (1, 2, 3)]
    pixels, others = bytes_per_sample(batch)
    of_teachers = chain.from_iterable(teacher.tensors() for teacher in task.teachers)
    return Profile(
        weights=bytes_of([*task.parameters(), *task.buffers(), *of_teachers]),
        trained=trained,
        average=bytes_of_average(task) if average else 0,
        pixels=pixels,
        others=others,
        activations=((len(few["keys"]), few_saved), (count, saved)),
        losses=tuple((times * count, taken) for times, taken in zip((1, 2, 3), of_losses, strict=True)),
    )


def saved_bytes(function: Callable[[], dict[str, Tensor]], but: set[int]) -> tuple[int, dict[str, Tensor]]:
    """Return the bytes that autograd saves in a call, each storage once, and what the call returned without its graph.

    Storages at the addresses ``but`` do not count.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in but:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outcome = function()
    bare = {name: value.detach() for name, value in outcome.items()}
    return sum(storage.nbytes() for storage in storages.values()), bare


def _losses(task: Task, features: Features, times: int) -> Losses:
    """Return the losses of a batch's features repeated ``times`` times."""
    repeated = {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in features.items()}
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in repeated.items()}
    return task.losses(leaves, 0)


def _line(points: tuple[tuple[int, int], ...]) -> np.poly1d:
    """The line through two points."""
    sizes, measured = np.array(points, float).T
    return np.poly1d(np.polyfit(sizes, measured, 1))


def bytes_per_sample(batch: Batch) -> tuple[float, float]:
    """Return the bytes of a sample's images, and of its other tensors."""
    count = len(batch["keys"])
    inputs = {id(value.untyped_storage()): value for value in batch.values() if isinstance(value, Tensor)}
    per_sample = {id(value): value.nbytes / count for value in inputs.values() if len(value) == count}
    pixels = per_sample.pop(id(batch.get("images")), 0.0)
    return pixels, sum(per_sample.values())


def bytes_of_average(task: Task) -> int:
    """Return the bytes that an average of the student takes; frozen weights in bf16 have none of their own."""
    state = floating_state(task.student)
    return bytes_of(value for name, value in state.items() if f"{STUDENT}{name}" not in task.exact_weights)


def bytes_of(tensors: Any) -> int:
    """Return the bytes of tensors, each storage once: tied weights count as one."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
