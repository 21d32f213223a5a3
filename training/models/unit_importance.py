"""How much a tower's units matter: by the size of their weights, or by a first-order estimate of the loss without them.

Scores are by group of units (`tower_axes`), so all tensors that count a unit speak for it together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from training.models.tower_axes import STATISTICS, Axes, State, Units

Scores = dict[str, Tensor]  # group: (units,) float32, larger matters more


def magnitude_scores(weights: State, axes: Mapping[str, Axes]) -> Scores:
    """Return the L2 norm of all weights of each unit: what computes it, what reads it, its biases and norms.

    Args:
        weights: A tower's state dict. Running statistics of BatchNorms are no weights and do not count.
        axes: The axes of each of its tensors.
    """
    squares: Scores = {}
    for name, weight in weights.items():
        if name.endswith(STATISTICS):
            continue
        for dim, axis in enumerate(axes[name]):
            if isinstance(axis, Units):
                total = axis.per_unit(_sum_over_others(weight.float().square(), dim))
                squares[axis.group] = squares.get(axis.group, 0) + total
    return {group: total.sqrt() for group, total in squares.items()}


def first_order_terms(weights: State, gradients: State, axes: Mapping[str, Axes]) -> State:
    """Return, per tensor that reads units, the sum of weight times gradient for each unit, (units,) float32.

    A reading tensor is linear in the units' values, so this sum is also that of value times gradient, over everything
    that the loss was computed of: the derivative of the loss by a factor on what the tensor reads of the unit.

    Args:
        weights: A tower's state dict.
        gradients: The gradients of one loss, by name; a tensor without one had no part in it.
        axes: The axes of each of the tensors.
    """
    terms = {}
    for name, weight in weights.items():
        for dim, axis in enumerate(axes[name]):
            if isinstance(axis, Units) and axis.reads:
                gradient = gradients.get(name, torch.zeros_like(weight))
                terms[name] = axis.per_unit(_sum_over_others(weight.float() * gradient.float(), dim)).cpu()
    return terms


def first_order_scores(batches: Sequence[State], axes: Mapping[str, Axes]) -> Scores:
    """Return the sum over batches of the absolute first-order change of the loss when a unit is no longer read.

    It is the Taylor criterion with a gate per unit (Molchanov et al., CVPR 2019, arXiv 1906.10771, section 3.1). The
    absolute value is taken per batch, not of the sum: at a minimum of the loss the gradients of all data cancel.

    Args:
        batches: The `first_order_terms` of each batch.
        axes: The axes of each of the tensors.
    """
    scores: Scores = {}
    for terms in batches:
        changes: Scores = {}
        for name, term in terms.items():
            for axis in axes[name]:
                if isinstance(axis, Units) and axis.reads:
                    changes[axis.group] = changes.get(axis.group, 0) + term
        for group, change in changes.items():
            scores[group] = scores.get(group, 0) + change.abs()
    return scores


def gradients_of(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> Iterable[State]:
    """Yield the gradients of each loss by all of the model's parameters; the parameters' own ``grad`` stays as it is.

    Args:
        model: A model, whose parameters may be frozen.
        losses: Functions that run the model on a batch and return a scalar. An affinity loss against the model itself
            has no gradient; take one with labels, as `clip_loss`.
    """
    parameters = dict(model.named_parameters())
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for loss in losses:
            with torch.enable_grad():
                found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
            yield {name: value for name, value in zip(parameters, found, strict=True) if value is not None}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _sum_over_others(values: Tensor, dim: int) -> Tensor:
    """The sums over all dimensions but one, (rows,)."""
    return values.movedim(dim, 0).flatten(1).sum(1) if values.ndim > 1 else values
