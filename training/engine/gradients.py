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
from training.data.batches import LISTS, is_pixels
from training.engine.distributed import Ranks, gather
from training.engine.sync_batch_norm import kept_statistics
from training.task import Batch, Features, Losses, Task

RngState = tuple[Tensor, Tensor | None]
ParameterGradient = tuple[nn.Parameter, Tensor]


class LossAndBackward(NamedTuple):
    """Losses of the global batch, the same on every rank, and what adds their gradients to ``.grad``."""

    losses: Losses
    backward: Callable[[], None]


class _WholePass(nn.Module):
    """What DDP wraps: a batch's features and what is computed of them, in one forward, so that DDP sees all of it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Batch, then: Callable[[Features], Features]) -> Features:
        return then(self.task(batch))


def _distributed(module: nn.Module) -> DistributedDataParallel:
    """Wrap a module in DDP.

    The losses are computed within, so a parameter that none of them uses is found: it keeps no gradient, as in one
    process. Buffers are not sent around: synchronised norms have equal ones, of others rank 0's are saved.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name in newer releases
        return DistributedDataParallel(
            module, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )


class Gradients:
    """Losses and gradients of a task.

    Args:
        task: The task.
        ranks: The processes that share a batch.
        device: Where the task is.
        precision: That of the forward pass; weights stay fp32.
        chunk_size: Samples per forward pass and process; None takes all at once.
        normalise: Turns images that come as bytes into what the task takes.
    """

    def __init__(
        self,
        task: Task,
        ranks: Ranks,
        device: str,
        *,
        precision: Precision,
        chunk_size: int | None,
        normalise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.task = task
        self.ranks = ranks
        self.device = device
        self.device_type = torch.device(device).type
        self.precision = precision
        self.chunk_size = chunk_size
        self.normalise = normalise
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "fp16")
        self.whole: nn.Module
        task.row_share = ranks.row_share()
        self.wrap()

    def wrap(self) -> None:
        """Wrap the task in DDP where there are several processes; again after its parameters changed."""
        self.whole = _WholePass(self.task)  # first of all: the hooks of a former DDP go with it
        if self.ranks.size > 1:
            self.whole = _distributed(self.whole)

    def losses(self, batch: Batch, step: int, sizes: list[int]) -> LossAndBackward:
        """Return the losses of a step and their backward pass. All ranks call this together.

        Args:
            batch: This rank's share of the global batch.
            step: The step's number.
            sizes: Samples of each rank's share.
        """
        chunks = 1
        if self.chunk_size is not None:  # as many on every rank, whatever each of them had to leave out
            chunks = min(math.ceil(max(sizes) / self.chunk_size), *sizes)
        batch = self.task.draw(batch)
        return self._in_chunks(batch, step, sizes, chunks) if chunks > 1 else self._at_once(batch, step, sizes)

    def _at_once(self, batch: Batch, step: int, sizes: list[int]) -> LossAndBackward:
        def losses_of(features: Features) -> Losses:
            return self.task.losses(self._gather_features(features, batch, sizes), step)

        ready = self._normalised(batch)
        with self._autocast():
            losses = self.whole(ready, losses_of)

        def backward() -> None:
            with kept_statistics(self.task):  # recomputed activations are a second pass, too
                torch.autograd.backward(self.scaler.scale(total(losses)))

        return LossAndBackward(losses, backward)

    def _gather_features(self, features: Features, batch: Batch, sizes: list[int]) -> Features:
        """Return features of the global batch in the order of its positions, as one process would have them."""
        if self.ranks.size == 1:
            return features
        gathered = gather({**features, "positions": batch["positions"]}, self.ranks, sizes)
        order = gathered.pop("positions").argsort()
        return {name: value[order] for name, value in gathered.items()}

    def _in_chunks(self, batch: Batch, step: int, sizes: list[int], chunks: int) -> LossAndBackward:
        pieces = split(batch, chunks)
        states = list[RngState]()
        outputs = list[Features]()
        with torch.no_grad(), self._autocast():
            for piece in pieces:
                states.append(rng_state(self.device))
                outputs.append(self.task(self._normalised(piece)))
        features = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        leaves = {name: value.requires_grad_() for name, value in features.items() if value.is_floating_point()}
        with self._autocast():
            losses = self.task.losses(self._gather_features(features, batch, sizes), step)

        def backward() -> None:
            at_features, at_parameters = self._loss_gradients(losses, leaves)
            by_chunk = {name: gradient.tensor_split(chunks) for name, gradient in at_features.items()}
            with kept_statistics(self.task):
                for number, piece in enumerate(pieces):
                    set_rng_state(states[number], self.device)
                    gradients = {name: parts[number] for name, parts in by_chunk.items()}
                    self._backward_chunk(piece, gradients, at_parameters if number == chunks - 1 else None)

        return LossAndBackward(losses, backward)

    def _loss_gradients(self, losses: Losses, leaves: Features) -> tuple[Features, list[ParameterGradient]]:
        """Return the losses' gradients at the features, and at the parameters that the losses use themselves."""
        parameters = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        scaled = self.scaler.scale(total(losses))
        gradients = torch.autograd.grad(scaled, [*leaves.values(), *parameters], allow_unused=True)
        at_leaves, at_parameters = gradients[: len(leaves)], gradients[len(leaves) :]
        features = {name: gradient for name, gradient in zip(leaves, at_leaves, strict=True) if gradient is not None}
        used = [pair for pair in zip(parameters, at_parameters, strict=True) if pair[1] is not None]
        return features, used

    def _backward_chunk(self, piece: Batch, gradients: Features, direct: list[ParameterGradient] | None) -> None:
        """Run a chunk's second pass and add its gradients to ``.grad``.

        Args:
            piece: The chunk.
            gradients: The losses' gradients at its features.
            direct: For the last chunk, what the losses gave to parameters themselves; with it DDP takes its mean.
        """
        used = {f"parameter {index}": pair for index, pair in enumerate(direct or [])}
        wanted = gradients | {name: gradient for name, (_, gradient) in used.items()}

        def with_used_parameters(outputs: Features) -> Features:
            features = {name: value for name, value in outputs.items() if name in gradients and value.requires_grad}
            return features | {name: parameter.view_as(parameter) for name, (parameter, _) in used.items()}

        ddp = self.whole if isinstance(self.whole, DistributedDataParallel) else None
        with ddp.no_sync() if ddp and direct is None else nullcontext():
            with self._autocast():
                outputs = self.whole(self._normalised(piece), with_used_parameters)
            torch.autograd.backward(list(outputs.values()), [wanted[name] for name in outputs])

    def _normalised(self, batch: Batch) -> Batch:
        """Return what a forward pass sees of a batch, or of a chunk of one, with images that are no longer bytes.

        Lists such as the keys are left out: a compiled pass would be compiled anew for each of their values.
        """
        seen = {name: value for name, value in batch.items() if name not in LISTS}
        if self.normalise is not None:
            seen |= {name: self.normalise(value) for name, value in seen.items() if is_pixels(value)}
        return seen

    def _autocast(self) -> torch.autocast:
        """A fresh one per pass: casts made without a graph must not be found again by a pass with one."""
        return torch.autocast(self.device_type, dtype=dtype_of(self.precision), enabled=self.precision != "fp32")


def total(losses: Losses) -> Tensor:
    """Return the sum that is minimised."""
    return torch.stack(list(losses.values())).sum()


def split(batch: Batch, chunks: int) -> list[Batch]:
    """Cut a batch in parts of nearly equal size: tensors and lists with one entry per sample are cut."""
    count = len(batch["keys"])
    spans = [slice(int(part[0]), int(part[-1]) + 1) for part in torch.arange(count).tensor_split(chunks)]

    def part(value: Any, span: slice) -> Any:
        per_sample = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, list)
        return value[span] if per_sample and len(value) == count else value

    return [{name: part(value, span) for name, value in batch.items()} for span in spans]


def rng_state(device: str) -> RngState:
    """Return the random streams of this process: the CPU's, and its CUDA device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.startswith("cuda") else None


def set_rng_state(state: RngState, device: str) -> None:
    """Go back to what `rng_state` returned; a CUDA stream that is missing on either side is left alone."""
    torch.set_rng_state(state[0])
    if state[1] is not None and device.startswith("cuda"):
        torch.cuda.set_rng_state(state[1], device)
