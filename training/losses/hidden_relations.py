"""MiniViT's weight distillation (arXiv 2204.07154, section 3.3): relations of attention and of hidden states.

    L = L_pred + beta L_attn + gamma L_hddn,   beta = 1, gamma = 0.1

L_pred is `training.losses.relations.soft_ce` of the logits. All losses here are per sample or, where tokens come in
windows, per window: the mean over them is the caller's. At a perfect match a cross-entropy is the teacher's entropy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.choices import HiddenMode
from training.losses.relations import Pair, soft_kl, token_relation_loss
from training.losses.similarity import upcast

RELEASE_FACTOR = 49  # of the released loss of hidden states


def attention_relation_loss(student: Tensor, teacher: Tensor, heads: int = 1) -> Tensor:
    """Return L_attn (B,): the mean over the nine ordered pairs of Q, K and V, the relation heads and the rows.

    R_ij = softmax(S_i S_j^T / sqrt(width of a relation head)), and the loss is the cross-entropy of the student's rows
    with the teacher's as targets. What goes in are the raw projections: no positions, no mask, no head maps. Relation
    heads cut the channels anew, whatever heads the models have.

    Args:
        student: (B, N, 3 C), queries, keys and values side by side, as timm's ``qkv`` gives them.
        teacher: (B, N, 3 C'); no gradient reaches it.
        heads: A_r, which divides both widths.

    Raises:
        ValueError: The heads do not divide a width, or the numbers of tokens differ.
    """
    pairs = zip(product(student.chunk(3, -1), repeat=2), product(teacher.chunk(3, -1), repeat=2), strict=True)
    losses = [token_relation_loss(Pair(*own), Pair(*theirs), heads, "cross_entropy") for own, theirs in pairs]
    return torch.stack(losses).mean(0)


def hidden_relation_loss(student: Tensor, teacher: Tensor, mode: HiddenMode = "release") -> Tensor:
    """Return L_hddn (B,) of hidden states.

    "paper" is the cross-entropy of softmax(H H^T / sqrt(C)), the mean over rows. "release", which the published models
    were trained with, is 49 times the mean squared difference of the cosines between tokens, without a softmax.

    Args:
        student: (B, N, C).
        teacher: (B, N, C'); no gradient reaches it.
        mode: Which of them.

    Raises:
        ValueError: The numbers of tokens differ.
    """
    if mode == "paper":
        return token_relation_loss(Pair(student, student), Pair(teacher, teacher), 1, "cross_entropy")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"hidden states of {tuple(student.shape[:2])} tokens cannot follow {tuple(teacher.shape[:2])}")
    with torch.autocast(student.device.type, enabled=False):
        own = F.normalize(upcast(student), dim=-1)
        theirs = F.normalize(upcast(teacher.detach()), dim=-1)
        return RELEASE_FACTOR * gram_distance(own, theirs) / student.shape[1] ** 2


def gram_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return ||X X^T - Y Y^T||_F^2 (B,) of X (B, N, C) and Y (B, N, D).

    With more tokens than channels it is ||X^T X||^2 - 2 ||X^T Y||^2 + ||Y^T Y||^2, which needs no matrix of all pairs
    of tokens: 3,136^2 numbers for each image of a Swin's first stage. The terms cancel where the two are alike, so its
    products, also those of the gradient, are never TF32, which the trainer allows elsewhere.

    Args:
        one: X, which gets a gradient.
        other: Y, which gets none.
    """
    distances: Tensor = _GramDistance.apply(one, other)
    return distances


class _GramDistance(torch.autograd.Function):
    """`gram_distance`; its gradient at X is 4 (X X^T - Y Y^T) X."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        with _full_precision():
            if one.shape[1] <= max(one.shape[2], other.shape[2]):
                difference = one @ one.mT - other @ other.mT
                ctx.save_for_backward(one, difference)
                return difference.square().sum((1, 2))
            own, cross, theirs = (x.mT @ y for x, y in ((one, one), (other, one), (other, other)))
        ctx.save_for_backward(one, other, own, cross)
        norms = [each.square().sum((1, 2)) for each in (own, cross, theirs)]
        return norms[0] - 2 * norms[1] + norms[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        one, *products = ctx.saved_tensors
        with _full_precision():
            if len(products) == 1:
                slope = products[0] @ one
            else:
                other, own, cross = products
                slope = one @ own - other @ cross
        return 4 * gradients[0].view(-1, 1, 1) * slope, None


@contextmanager
def _full_precision() -> Iterator[None]:
    """Within, products of float32 matrices are not TF32."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def deit_soft_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the released Mini-DeiT's loss (B,): KL(teacher || student) T^2 / K, a mean over the classes.

    That is 1 / K of an image's KL. It is harmless alone under AdamW, and too small beside other losses.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K); no gradient reaches them.
        temperature: T, which divides both.
    """
    return soft_kl(student_logits, teacher_logits, temperature) * deit_factor(temperature, student_logits.shape[-1])


def deit_factor(temperature: float, classes: int) -> float:
    """Return what the released Mini-DeiT's loss is of an image's KL."""
    return temperature**2 / classes
