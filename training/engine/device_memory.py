"""Peak memory of training on a GPU, predicted from passes of a few samples on that GPU.

A GPU's kernels save other tensors for the backward pass than a CPU's (of attention, norms, dropout, autocast), and take
workspaces while they run. So nothing is worked out on paper: the task runs forward and backward where it will be
trained, and the allocator tells the most it had given in each span of these passes, from one module's end or one
parameter's gradient to the next. A span's peak is a line in the number of samples: gradients do not depend on it,
activations are proportional to it. The lines cross, so the worst span of a few samples need not be that of a batch, and
each is extrapolated by itself. The losses, which hold matrices of all pairs, run with as many features as a batch has,
and over the rows that one process computes.

Left out: the allocator's rounding, up to 1 MiB of a tensor above 1 MiB, its fragments, and what torch.compile saves.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from shards_spec.precision import Precision, dtype_of
from training.engine.gradients import total
from training.engine.memory_estimate import Memory, bytes_of, bytes_of_average, bytes_per_sample
from training.engine.sync_batch_norm import kept_statistics
from training.losses.similarity import ALL_ROWS, RowShare
from training.task import Batch, Features, Task

Autocast = Callable[[], AbstractContextManager[Any]]


class Meter(Protocol):
    """Counts the bytes that a device's allocator has given, as they were asked for."""

    def held(self) -> int:
        """Return those that are held now."""
        ...

    def peak(self) -> int:
        """Return the most that were held since the last call."""
        ...

    def clear(self) -> None:
        """Give back what is held by nobody, and forget the peak."""
        ...


class CudaMeter:
    """What torch's allocator says of a CUDA device. It knows without waiting for the device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def _requested(self) -> dict[str, int]:
        stats = torch.cuda.memory.memory_stats_as_nested_dict(self.device)
        requested: dict[str, int] = stats["requested_bytes"]["all"]
        return requested

    def held(self) -> int:
        """Return the bytes of all tensors."""
        return self._requested()["current"]

    def peak(self) -> int:
        """Return the most since the last call."""
        most = self._requested()["peak"]
        torch.cuda.reset_peak_memory_stats(self.device)
        return most

    def clear(self) -> None:
        """Empty the allocator's cache and forget the peak."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


class MemorySpan(NamedTuple):
    """The most that a pass held in a part of it, beyond what was there before; ``gradients`` of it are gradients."""

    peak: float
    gradients: int


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass of some samples: its spans, and what it held between the two."""

    samples: int
    held: float
    spans: tuple[MemorySpan, ...]


@dataclass(frozen=True)
class Passes:
    """Passes of few samples and of more, from which those of many are extrapolated."""

    few: Pass
    more: Pass

    def _line(self, few: float, more: float, samples: int) -> float:
        slope = (more - few) / (self.more.samples - self.few.samples)
        return more + slope * (samples - self.more.samples)

    def held(self, samples: int) -> float:
        """Return the bytes between the forward and the backward pass."""
        return self._line(self.few.held, self.more.held, samples)

    def worst(self, samples: int) -> MemorySpan:
        """Return the worst span of a pass."""
        few, more = self.few.spans, self.more.spans
        if len(few) != len(more):  # the model does something else for other sizes
            few, more = (max(few),), (max(more),)
        spans = [
            MemorySpan(self._line(one.peak, other.peak, samples), other.gradients)
            for one, other in zip(few, more, strict=True)
        ]
        return max(spans)


@dataclass(frozen=True)
class DeviceProfile:
    """What a task takes on a device, measured, from which `at` extrapolates.

    Attributes:
        memory: What does not depend on the samples: weights, optimizer and average.
        trained: Bytes of a gradient of all trained parameters.
        workspaces: Bytes that libraries keep from their first call on.
        pixels: Bytes of a sample's images as floats.
        others: Bytes of the rest of a sample.
        features: Bytes of a sample's features.
        losses: The most that one process's share of the whole batch's losses and their backward pass hold.
        first: Passes that begin without gradients.
        later: Passes that add to gradients which are there already.
    """

    memory: Memory
    trained: int
    workspaces: int
    pixels: float
    others: float
    features: float
    losses: int
    first: Passes
    later: Passes

    def at(self, batch_size: int, ranks: int = 1, chunk_size: int | None = None, as_bytes: bool = False) -> Memory:
        """Return the memory of a step at its worst moment.

        That is a span of the towers' passes or the losses. The optimizer's step holds less than the end of a backward
        pass does, because fused AdamW takes nothing of its own.

        Args:
            batch_size: Samples of the global batch, the number that was measured with.
            ranks: Processes that share it, as measured, too.
            chunk_size: Samples per forward pass of a process; None: its whole share.
            as_bytes: Images are kept as uint8 until their chunk's turn.
        """
        share = batch_size // ranks
        at_once = min(chunk_size or share, share)
        in_chunks = at_once < share
        has_gradients = in_chunks or ranks > 1  # of the chunks before; DDP's buckets stay from step to step
        passes = self.later if has_gradients else self.first
        span = passes.worst(at_once)
        features = 2 * share * self.features if in_chunks else 0.0  # of all chunks, and the losses' gradient at them
        gathered = 3 * batch_size * self.features if ranks > 1 else 0.0  # as bytes, joined, and by name
        in_towers = (
            self.trained if has_gradients else span.gradients,
            span.peak + features - (0 if has_gradients else span.gradients),
            0.0,
        )
        in_losses = (
            self.trained if ranks > 1 else 0,
            features if in_chunks else passes.held(at_once),
            self.losses + gathered,
        )
        gradients, activations, losses = max(in_towers, in_losses, key=sum)
        images = self.pixels / 4 * share + self.pixels * at_once if as_bytes else self.pixels * share
        ahead = (self.pixels / 4 + self.others) * share  # of the next batch, which is on its way
        return replace(
            self.memory,
            gradients=gradients,
            batch=int(images + self.others * share + ahead),
            activations=round(activations) + self.workspaces,
            losses=round(losses),
            chunk_size=chunk_size,
        )


def measure(
    task: Task,
    batch: Batch,
    batch_size: int,
    meter: Meter,
    *,
    precision: Precision = "fp32",
    average: bool = False,
    most: int = 64,
    ranks: int = 1,
) -> DeviceProfile:
    """Measure a task on its device, in training mode.

    Random streams and the norms' running statistics are left as they are, gradients are gone afterwards.

    Args:
        task: The task, where it will be trained.
        batch: Some samples there, ready for the forward pass. They are repeated as often as needed.
        batch_size: Samples of the global batch.
        meter: That of the device.
        precision: That of the forward pass.
        average: Whether an average of the weights is kept.
        most: Samples of the larger of the two passes, at least 2.
        ranks: Processes that share the batch.
    """
    device = next(task.parameters()).device
    given = sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))
    resident = meter.held() - given  # weights, those of live teachers too, and whatever else the process has there

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=dtype_of(precision), enabled=precision != "fp32")

    few, more = repeated(batch, most // 2), repeated(batch, most)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), kept_statistics(task):
        before = meter.held()
        _run_pass(task, few, meter, autocast)
        task.zero_grad(set_to_none=True)
        workspaces = meter.held() - before
        (few_first, _), (few_later, _) = (_run_pass(task, few, meter, autocast) for _ in range(2))
        task.zero_grad(set_to_none=True)
        (first, _), (later, features) = (_run_pass(task, more, meter, autocast) for _ in range(2))
        task.zero_grad(set_to_none=True)
        task.row_share = RowShare(size=ranks)  # alone: what the others would add to sums takes no memory
        try:
            losses = _peak_of_losses(task, features, batch_size, meter, autocast)
        finally:
            task.row_share = ALL_ROWS
    pixels, others = bytes_per_sample(batch)
    trained = bytes_of(parameter for parameter in task.parameters() if parameter.requires_grad)
    return DeviceProfile(
        memory=Memory(weights=resident, optimizer=2 * trained, average=bytes_of_average(task) if average else 0),
        trained=trained,
        workspaces=workspaces,
        pixels=pixels,
        others=others,
        features=sum(value.nbytes for value in features.values()) / most,
        losses=losses,
        first=Passes(few_first, first),
        later=Passes(few_later, later),
    )


def repeated(batch: Batch, count: int) -> Batch:
    """Return ``count`` samples: those of a batch, from the start again where they end."""
    own = len(batch["keys"])
    rows = [number % own for number in range(count)]

    def of_rows(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.ndim > 0 and len(value) == own else value
        return [value[row] for row in rows] if isinstance(value, list) and len(value) == own else value

    return {name: of_rows(value) for name, value in batch.items()}


class _Recorder:
    """Ends a span wherever it is called, while a pass runs."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.spans: list[MemorySpan] = []
        self.gradients = 0
        self.start = meter.held()
        meter.peak()

    def end_span(self) -> None:
        self.spans.append(MemorySpan(self.meter.peak() - self.start, self.gradients))

    def after_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.end_span()

    def after_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.gradients += parameter.grad.nbytes
        self.end_span()


@contextmanager
def _recording(task: Task, meter: Meter) -> Iterator[_Recorder]:
    """Within, spans end with each module's forward pass and with each parameter's gradient."""
    recorder = _Recorder(meter)
    with ExitStack() as hooks:
        hooks.callback(register_module_forward_hook(recorder.after_module).remove)
        for parameter in task.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(recorder.after_gradient)  # type: ignore[no-untyped-call]
                hooks.callback(hook.remove)
        yield recorder


def _run_pass(task: Task, batch: Batch, meter: Meter, autocast: Autocast) -> tuple[Pass, Features]:
    """Run both passes of a batch as those of a chunk are; return what they held, and the features without a graph."""
    with _recording(task, meter) as recorder:
        with autocast():
            features = task(task.draw(batch))
        held = meter.held() - recorder.start
        recorder.end_span()
        outputs = [value for value in features.values() if value.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(value) for value in outputs])
        recorder.end_span()
    bare = {name: value.detach() for name, value in features.items()}
    return Pass(len(batch["keys"]), held, tuple(recorder.spans)), bare


def _peak_of_losses(task: Task, features: Features, count: int, meter: Meter, autocast: Autocast) -> int:
    """Return the most that losses of ``count`` samples hold beyond the features, in both passes."""
    own = len(next(iter(features.values())))
    rows = torch.arange(count, device=next(iter(features.values())).device) % own
    leaves = {name: value[rows] for name, value in features.items()}
    wanted = [value.requires_grad_() for value in leaves.values() if value.is_floating_point()]
    wanted += [parameter for parameter in task.parameters() if parameter.requires_grad]
    start = meter.held()
    meter.peak()
    with autocast():
        losses = task.losses(leaves, 0)
    torch.autograd.grad(total(losses), wanted, allow_unused=True)
    return meter.peak() - start
