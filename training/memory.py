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

from training.batch_norm import kept_statistics
from training.step import Batch, Precision, split

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the worst moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    batch: int
    activations: int
    losses: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / MIB:,.1f}" for field in fields(self))
        return f"peak memory of a process: about {self.total / MIB:,.1f} MiB ({parts})"


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
    share, count = batch_size // ranks, len(batch["keys"])
    own = min(chunk_size or share, share)
    few = split(batch, 2)[0]
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
    activations = _extrapolate([len(few["keys"]), count], [few_saved, saved], own)
    losses = _extrapolate([count, 2 * count, 3 * count], pairs, batch_size)
    if own < share:  # the losses' graph is gone before the chunks' second pass
        activations, losses = max(activations, losses), 0
    per_sample = sum(value.nbytes / count for value in inputs.values() if len(value) == count)
    weights = _bytes([*task.parameters(), *task.buffers()])
    averaged = _bytes(v for v in task.student.state_dict().values() if v.is_floating_point()) if average else 0
    return Memory(weights, trained, 2 * trained, averaged, int(per_sample * share), activations, losses)


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


def _extrapolate(sizes: list[int], found: list[int], size: int) -> int:
    """The polynomial through the points, at ``size``."""
    return max(0, int(np.polyval(np.polyfit(sizes, found, len(sizes) - 1), size)))


def _bytes(tensors: Any) -> int:
    """Each storage once: tied weights count as one."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
