"""Peak memory of training, predicted from a forward pass of a few samples on the CPU.

Weights, gradients and optimizer state are counted. Activations are what autograd saves for the backward pass, each
storage once, measured at two small batches and extrapolated by a line; those of the losses, which hold matrices of all
pairs, at three and by a parabola. Left out: kernels' workspaces, the allocator's rounding, the gradient of the
activations in flight, what a checkpointed block computes again.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards_spec.precision import Precision
from training.engine.gradients import Batch, split
from training.engine.sync_batch_norm import kept_statistics
from training.losses.similarity import BLOCK_ROWS, MAX_WHOLE

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
        parts = ", ".join(f"{name} {count / MIB:,.1f}" for name, count in self.parts.items())
        chunks = f", in chunks of {self.chunk_size:,} samples" if self.chunk_size else ""
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
        """Of one of ``ranks`` processes. ``as_bytes``: images lie as uint8 until their chunk's turn."""
        share = batch_size // ranks
        own = min(chunk_size or share, share)
        activations = max(0, round(_line(self.activations)(own)))
        losses = max(0, round(self._losses_at(batch_size)))
        if own < share:  # the losses' graph is gone before the chunks' second pass
            activations, losses = max(activations, losses), 0
        images = self.pixels / 4 * share + self.pixels * own if as_bytes else self.pixels * share
        return Memory(
            self.weights, self.trained, 2 * self.trained, self.average, int(images + self.others * share), activations,
            losses, chunk_size,
        )  # fmt: skip

    def _losses_at(self, size: int) -> float:
        """Matrices of all pairs above `MAX_WHOLE` rows are there a block of `BLOCK_ROWS` at a time."""
        sizes, found = np.array(self.losses, float).T
        squared, linear, constant = np.polyfit(sizes, found, 2)
        return float(squared * size * (size if size <= MAX_WHOLE else BLOCK_ROWS) + linear * size + constant)


def predict_memory(
    task: Any,
    batch: Batch,
    batch_size: int,
    ranks: int = 1,
    chunk_size: int | None = None,
    precision: Precision = "fp32",
    average: bool = False,
) -> Memory:
    """Of a task on the CPU in training mode, from a batch of at least two samples ready for its forward pass.

    The random stream and the norms' running statistics are left as they are.
    """
    return profile(task, batch, precision, average).at(batch_size, ranks, chunk_size)


def profile(task: Any, batch: Batch, precision: Precision = "fp32", average: bool = False) -> Profile:
    """Measure a task as `predict_memory` does."""
    count, few = len(batch["keys"]), split(batch, 2)[0]
    trained = _bytes(parameter for parameter in task.parameters() if parameter.requires_grad)
    inputs = {id(v.untyped_storage()): v for v in batch.values() if isinstance(v, Tensor)}
    kept = {tensor.untyped_storage().data_ptr() for tensor in [*task.parameters(), *task.buffers(), *inputs.values()]}
    half = precision != "fp32"  # bf16 for both: a CPU takes long over fp16, and the bytes are the same
    with (
        torch.random.fork_rng(devices=[]),
        kept_statistics(task),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        few_saved, _ = saved_bytes(partial(task, few), kept)
        saved, features = saved_bytes(partial(task, batch), kept)
        pairs = [saved_bytes(partial(_losses, task, features, times), kept)[0] for times in (1, 2, 3)]
    per_sample = {id(v): v.nbytes / count for v in inputs.values() if len(v) == count}
    pixels = per_sample.pop(id(batch.get("images")), 0.0)
    averaged = _bytes(v for v in task.student.state_dict().values() if v.is_floating_point()) if average else 0
    return Profile(
        _bytes([*task.parameters(), *task.buffers()]), trained, averaged, pixels, sum(per_sample.values()),
        ((len(few["keys"]), few_saved), (count, saved)),
        tuple((times * count, found) for times, found in zip((1, 2, 3), pairs, strict=True)),
    )  # fmt: skip


def saved_bytes(function: Callable[[], dict[str, Tensor]], but: set[int]) -> tuple[int, dict[str, Tensor]]:
    """Bytes that autograd saves in a call, each storage once, without the storages at the addresses ``but``.

    Also what the call returned, without its graph.
    """
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in but:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outcome = function()
    bare = {name: value.detach() for name, value in outcome.items()}
    return sum(storage.nbytes() for storage in found.values()), bare


def _losses(task: Any, features: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    more = {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in features.items()}
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in more.items()}
    losses: dict[str, Tensor] = task.losses(leaves, 0)
    return losses


def _line(points: tuple[tuple[int, int], ...]) -> np.poly1d:
    """The line through two points."""
    sizes, found = np.array(points, float).T
    return np.poly1d(np.polyfit(sizes, found, 1))


def _bytes(tensors: Any) -> int:
    """Each storage once: tied weights count as one."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
