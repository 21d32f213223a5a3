"""Losses with distributions over classes as targets, and such distributions from soft labels that were stored."""

import torch
from torch import Tensor

from training.losses.similarity import upcast


def spread_rest(classes: Tensor, probabilities: Tensor, rest: Tensor, count: int) -> Tensor:
    """Return distributions (n, K) of which the largest probabilities are known (TinyViT, arXiv 2207.10666).

    What is left is spread evenly over the classes that are not kept. What rounding left of the sum is divided out.

    Args:
        classes: (n, k) int64, fewer than K.
        probabilities: (n, k) of these.
        rest: (n,) the sum of all others.
        count: K.
    """
    full = (rest / (count - classes.shape[1])).unsqueeze(1).repeat(1, count)
    full = full.scatter(1, classes, probabilities)
    return full / full.sum(dim=1, keepdim=True)


def target_cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``-sum targets log softmax(logits / temperature)`` (...,) in float32 or float64.

    Args:
        logits: (..., K).
        targets: (..., K) distributions; no gradient reaches them.
        temperature: Divides the logits; the targets have theirs.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return -(upcast(targets.detach()) * (upcast(logits) / temperature).log_softmax(dim=-1)).sum(dim=-1)


def target_kl(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(targets || softmax(logits / temperature)) (...,): the cross-entropy less the targets' entropy."""
    with torch.autocast(logits.device.type, enabled=False):
        wide = upcast(targets.detach())
        return target_cross_entropy(logits, wide, temperature) + torch.xlogy(wide, wide).sum(dim=-1)
