"""From a batch to exact gradients: over ranks, in chunks, in any precision.

Chunks (gradient caching, Gao et al., arXiv 2101.06983) keep the full contrastive batch: features of all chunks without
a graph, the loss of all features, then each chunk again with its graph and the loss's gradient at its features. The
second pass draws the same random numbers and leaves the running statistics of norms alone; a BatchNorm in training
mode normalises over a chunk (of all ranks), so with it the chunk's size is part of the mathematics.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shards_spec.precision import Precision, dtype_of
from training.engine.distributed import Ranks, gather
from training.engine.sync_batch_norm import kept_statistics

Batch = dict[str, Any]
Features = dict[str, Tensor]
RngState = tuple[Tensor, Tensor | None]


class LossAndBackward(NamedTuple):
    """Losses of the global batch, the same on every rank, and what adds their gradients to ``.grad``."""

    losses: dict[str, Tensor]
    backward: Callable[[], None]


class _Whole(nn.Module):
    """What DDP wraps: a batch's features and whatever becomes of them, in one forward, so that DDP sees all of it."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Batch, then: Callable[[Features], Features]) -> Features:
        return then(self.task(batch))


def _distributed(whole: nn.Module) -> DistributedDataParallel:
    """The losses are within, so a parameter that none of them uses is found: it keeps no gradient, as in one process.

    Buffers are not sent around: synchronised norms have equal ones, of others rank 0's are saved.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name in newer releases
        return DistributedDataParallel(
            whole, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )


class Gradients:
    """Losses and gradients of a task. ``chunk_size`` is samples per forward pass and process; None takes all."""

    def __init__(
        self, task: Any, ranks: Ranks, device: str, precision: Precision, chunk_size: int | None,
        normalise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.task, self.ranks, self.device, self.chunk_size = task, ranks, device, chunk_size
        self.type, self.precision = torch.device(device).type, precision
        self.scaler = torch.amp.GradScaler(self.type, enabled=precision == "fp16")
        self.normalise = normalise  # of images that come as bytes
        self.whole: nn.Module = _Whole(task)
        if ranks.size > 1:
            self.whole = _distributed(self.whole)

    def losses(self, batch: Batch, step: int, sizes: list[int]) -> LossAndBackward:
        """Losses of a step. ``sizes`` are the samples of each rank's share; all ranks call this together."""
        chunks = 1
        if self.chunk_size is not None:  # as many on every rank, whatever each of them had to leave out
            chunks = min(math.ceil(max(sizes) / self.chunk_size), *sizes)
        return self._cached(batch, step, sizes, chunks) if chunks > 1 else self._at_once(batch, step, sizes)

    def _at_once(self, batch: Batch, step: int, sizes: list[int]) -> LossAndBackward:
        ready = self._ready(batch)
        with self._autocast():
            losses = self.whole(ready, lambda own: self.task.losses(self._gather_features(own, batch, sizes), step))

        def backward() -> None:
            with kept_statistics(self.task):  # recomputed activations are a second pass, too
                self.scaler.scale(total(losses)).backward()

        return LossAndBackward(losses, backward)

    def _gather_features(self, own: Features, batch: Batch, sizes: list[int]) -> Features:
        """Features of the global batch in the order of its positions, as one process would have them."""
        if self.ranks.size == 1:
            return own
        gathered = gather({**own, "positions": batch["positions"]}, self.ranks, sizes)
        order = gathered.pop("positions").argsort()
        return {name: value[order] for name, value in gathered.items()}

    def _cached(self, batch: Batch, step: int, sizes: list[int], chunks: int) -> LossAndBackward:
        if hasattr(self.task, "draw"):
            batch = self.task.draw(batch)
        pieces = split(batch, chunks)
        states, kept = list[RngState](), list[Features]()
        with torch.no_grad(), self._autocast():
            for piece in pieces:
                states.append(rng_state(self.device))
                kept.append(self.task(self._ready(piece)))
        own = {name: torch.cat([features[name] for features in kept]) for name in kept[0]}
        leaves = {name: value.requires_grad_() for name, value in own.items() if value.is_floating_point()}
        with self._autocast():
            losses = self.task.losses(self._gather_features(own, batch, sizes), step)

        def backward() -> None:
            parameters = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
            inputs = [*leaves.values(), *parameters]
            found = torch.autograd.grad(self.scaler.scale(total(losses)), inputs, allow_unused=True)
            cached = {
                name: gradient.tensor_split(chunks)
                for name, gradient in zip(leaves, found, strict=False)
                if gradient is not None
            }
            direct = [pair for pair in zip(parameters, found[len(leaves) :], strict=True) if pair[1] is not None]
            with kept_statistics(self.task):
                for number, piece in enumerate(pieces):
                    set_rng_state(states[number], self.device)
                    gradients = {name: parts[number] for name, parts in cached.items()}
                    self._backward_chunk(piece, gradients, direct if number == chunks - 1 else None)

        return LossAndBackward(losses, backward)

    def _backward_chunk(
        self, piece: Batch, gradients: Features, direct: list[tuple[nn.Parameter, Tensor]] | None
    ) -> None:
        """A chunk's second pass; the last one adds what the losses gave to parameters themselves, and DDP's mean."""
        used = {f"parameter {index}": pair for index, pair in enumerate(direct or [])}
        wanted = gradients | {name: gradient for name, (_, gradient) in used.items()}

        def then(own: Features) -> Features:
            features = {name: value for name, value in own.items() if name in gradients and value.requires_grad}
            return features | {name: parameter.view_as(parameter) for name, (parameter, _) in used.items()}

        ddp = self.whole if isinstance(self.whole, DistributedDataParallel) else None
        with ddp.no_sync() if ddp and direct is None else nullcontext():
            with self._autocast():
                outputs = self.whole(self._ready(piece), then)
            torch.autograd.backward(list(outputs.values()), [wanted[name] for name in outputs])

    def _ready(self, batch: Batch) -> Batch:
        """A batch, or a chunk of one, with images as the task takes them."""
        images = batch.get("images")
        if images is None or images.dtype != torch.uint8 or self.normalise is None:
            return batch
        return {**batch, "images": self.normalise(images)}

    def _autocast(self) -> torch.autocast:
        """A fresh one per pass: casts made without a graph must not be found again by a pass with one."""
        return torch.autocast(self.type, dtype=dtype_of(self.precision), enabled=self.precision != "fp32")


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum that is minimised."""
    return torch.stack(list(losses.values())).sum()


def split(batch: Batch, chunks: int) -> list[Batch]:
    """A batch in ``chunks`` parts of nearly equal size: tensors and lists with one entry per sample are cut."""
    count = len(batch["keys"])
    spans = [slice(int(part[0]), int(part[-1]) + 1) for part in torch.arange(count).tensor_split(chunks)]

    def part(value: Any, span: slice) -> Any:
        per_sample = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, list)
        return value[span] if per_sample and len(value) == count else value

    return [{name: part(value, span) for name, value in batch.items()} for span in spans]


def rng_state(device: str) -> RngState:
    """The random streams of this process: the CPU's, and its CUDA device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.startswith("cuda") else None


def set_rng_state(state: RngState, device: str) -> None:
    """Go back to `rng_state`; a CUDA stream that is missing on either side is left alone."""
    torch.set_rng_state(state[0])
    if state[1] is not None and device.startswith("cuda"):
        torch.cuda.set_rng_state(state[1], device)
