"""Frozen weights in bf16: half the memory of a live teacher and of inherited layers that are not trained.

Converted are the weights of linear layers, convolutions, attention projections and embeddings. The first three are what
autocast rounds to bf16 at each use, so their products are the same; an embedding is rounded once more. Norms, scales,
positions and running statistics stay fp32. The exact values of the student's frozen weights stay
on the CPU (`Task.exact_weights`): checkpoints, averages and measurements have those.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from shards_spec.files import UserError
from shards_spec.precision import PrecisionOption
from training.task import Task

ROUNDED = (nn.Linear, nn.Embedding, nn.MultiheadAttention, _ConvNd)


def halve_frozen_weights(task: Task, precision: PrecisionOption) -> None:
    """Convert the frozen weights of a task on the CPU, and those of its live teachers, to bf16 in place.

    Args:
        task: The task, as its recipe prepared it.
        precision: That of the forward pass.

    Raises:
        UserError: The forward pass computes in fp32, which does not mix with bf16, or nothing is frozen.
    """
    if precision == "fp32":
        raise UserError(
            "--frozen-precision bf16: this run computes in fp32, which takes weights of fp32 alone: train with "
            "--precision bf16, or leave it out"
        )
    live = [teacher.model for teacher in task.teachers if teacher.model is not None]
    of_teachers = [weight for _, weight in chain.from_iterable(map(_frozen_weights, live))]
    task.exact_weights = {name: weight.data for name, weight in _frozen_weights(task)}
    if not of_teachers and not task.exact_weights:
        raise UserError(
            "--frozen-precision bf16 would not be used: this run trains all its weights and has no live teacher"
        )
    for weight in [*of_teachers, *(weight for _, weight in _frozen_weights(task))]:
        weight.data = weight.data.bfloat16()


def _frozen_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what is converted, a weight of several names under each of them."""
    for path, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, ROUNDED):
            for name, weight in part.named_parameters(path, recurse=False, remove_duplicate=False):
                if not weight.requires_grad:
                    yield name, weight


def exact_state(task: Task) -> dict[str, Tensor]:
    """Return a task's state dict with the exact values of frozen weights."""
    state: dict[str, Tensor] = task.state_dict()
    return state | task.exact_weights


def load_exact_state(task: Task, state: dict[str, Tensor]) -> None:
    """Load what `exact_state` returned. Raises RuntimeError where it does not fit."""
    task.load_state_dict(state)
    for name, exact in task.exact_weights.items():
        exact.copy_(state[name])


@contextmanager
def exact_weights(task: Task) -> Iterator[None]:
    """Within, frozen weights have their exact values on the task's device, say to measure the student."""
    weights = dict(task.named_parameters(remove_duplicate=False))
    rounded = {name: weights[name].data for name in task.exact_weights}
    for name, exact in task.exact_weights.items():
        weights[name].data = exact.to(weights[name].device)
    try:
        yield
    finally:
        for name, weight in rounded.items():
            weights[name].data = weight
