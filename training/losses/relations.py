"""Relations between tokens, and losses of a student's relations against a teacher's (TinyMIM, MiniViT).

A relation is a matrix of scaled products between two sets of token vectors, in each of some heads: of queries and keys
it is the attention map before its softmax. TinyMIM (arXiv 2301.01296) compares QK and VV by KL in the heads of an
adaptive block; MiniViT (arXiv 2204.07154) all nine pairs of Q, K and V by cross-entropy, by default in one head.

Losses are computed in float32 (float64 where the features are), whatever the autocast. The matrices of all samples and
heads are never there together: each loss is computed a block of matrices at a time, and its gradient with it, so the
backward pass computes nothing again.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses.similarity import upcast
from training.losses.soft_labels import target_cross_entropy

BETA = 2.0  # of smooth L1: errors up to it count squared
# Numbers of the relation matrices that a block holds; a block has about five such buffers. On a CPU seven matrices of
# 197 x 197, which stay in its caches, take half the time of all at once (tests/bench/tinymim.py); CUDA's is a guess.
CUDA_BLOCK = 1 << 24
CPU_BLOCK = 1 << 18

Distance = Literal["kl", "cross_entropy", "smooth_l1"]


class Pair(NamedTuple):
    """Token vectors whose products are a relation: all heads side by side, (B, N, C) and (B, M, C)."""

    rows: Tensor
    columns: Tensor


def soft_ce(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the cross-entropy of each row with the teacher's softmax as the target: ``-sum p_t log p_s``.

    At a perfect match it is the teacher's entropy; its gradient is that of KL(teacher || student).

    Args:
        student_logits: (..., K).
        teacher_logits: (..., K); no gradient reaches them.
        temperature: Divides both.

    Returns:
        (...) in float32 or float64.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        target = (upcast(teacher_logits.detach()) / temperature).softmax(dim=-1)
        return target_cross_entropy(student_logits, target, temperature)


def soft_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of each row: `soft_ce` less the teacher's entropy, 0 at a perfect match."""
    with torch.autocast(student_logits.device.type, enabled=False):
        target = (upcast(teacher_logits.detach()) / temperature).log_softmax(dim=-1)
        predicted = (upcast(student_logits) / temperature).log_softmax(dim=-1)
        return F.kl_div(predicted, target, reduction="none", log_target=True).sum(dim=-1)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Return (B, H, N, C/H) of tokens (B, N, C), whose heads lie side by side.

    Raises ValueError when the heads do not divide the width.
    """
    width = tokens.shape[-1]
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    return tokens.reshape(*tokens.shape[:-1], heads, width // heads).transpose(-2, -3)


def token_relation(rows: Tensor, columns: Tensor, heads: int = 1, scale: float | None = None) -> Tensor:
    """Return the logits of a relation, (B, H, N, M): of each head the products of its vectors.

    The softmax over the last axis makes it a distribution; of queries and keys that is the attention map.

    Args:
        rows: (B, N, C).
        columns: (B, M, C).
        heads: H; the vectors are cut into so many parts, whatever heads their model has.
        scale: Factor of the products; None is 1 / sqrt(C / H), by the width of these vectors' own heads.

    Raises:
        ValueError: The heads do not divide the width.
    """
    with torch.autocast(rows.device.type, enabled=False):
        parts = split_heads(upcast(rows), heads)
        scale = parts.shape[-1] ** -0.5 if scale is None else scale
        return scale * parts @ split_heads(upcast(columns), heads).mT


def token_relation_loss(student: Pair, teacher: Pair, heads: int = 1, distance: Distance = "kl") -> Tensor:
    """Return the loss (B,) of each sample's relations: the mean over heads and rows.

    "kl" is KL(teacher || student) of the rows' softmax and "cross_entropy" is `soft_ce` of them, summed over a row.
    "smooth_l1" compares the scaled products themselves (beta 2), the mean over a row. Each side is scaled by its own
    width of a head, so the widths of student and teacher may differ; heads pair up by their index.

    Args:
        student: (B, N, C) and (B, M, C).
        teacher: (B, N, C') and (B, M, C'); no gradient reaches them.
        heads: Number of heads, which divides both widths.
        distance: How the relations are compared.

    Raises:
        ValueError: The heads do not divide a width, or the numbers of tokens differ.
    """
    if any(mine.shape[:2] != theirs.shape[:2] for mine, theirs in zip(student, teacher, strict=True)):
        shapes = [tuple(tokens.shape[:2]) for tokens in (student.rows, teacher.rows)]
        raise ValueError(f"relations of {shapes[0][1]} tokens cannot follow relations of {shapes[1][1]}: {shapes}")
    with torch.autocast(student.rows.device.type, enabled=False):
        mine = [_matrices(tokens, heads) for tokens in student]
        with torch.no_grad():
            theirs = [_matrices(tokens, heads) for tokens in teacher]
        losses: Tensor = _BlockwiseLoss.apply(*mine, *theirs, distance)
    return losses.view(-1, heads).mean(dim=1)


def _matrices(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B * H, N, C/H), contiguous."""
    return split_heads(upcast(tokens), heads).flatten(0, 1).contiguous()


class _BlockwiseLoss(torch.autograd.Function):
    """Mean loss (G,) over rows of relations, of vectors (G, N, d), (G, M, d) and the teacher's (G, N, e), (G, M, e).

    The loss of a block is differentiated at once: what stays for the backward pass has the vectors' size.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, target_rows: Tensor, target_columns: Tensor, distance: Distance
    ) -> Tensor:
        count = rows.shape[1]
        scale = rows.shape[-1] ** -0.5
        target_scale = target_rows.shape[-1] ** -0.5
        wanted = any(ctx.needs_input_grad[:2])
        losses = rows.new_zeros(len(rows))
        row_gradient = torch.empty_like(rows) if wanted else None
        column_gradient = torch.zeros_like(columns) if wanted else None
        for matrices, part in _blocks(len(rows), count, columns.shape[1], rows.device.type):
            own_rows = rows[matrices, part]
            own_columns = columns[matrices]
            logits = (scale * own_rows) @ own_columns.mT
            targets = (target_scale * target_rows[matrices, part]) @ target_columns[matrices].mT
            row_losses, gradient = _compare(logits, targets, distance, wanted)
            losses[matrices] += row_losses.sum(dim=1) / count
            if row_gradient is not None and column_gradient is not None:
                gradient *= scale / count
                row_gradient[matrices, part] = gradient @ own_columns
                column_gradient[matrices] += gradient.mT @ own_rows
        if row_gradient is not None and column_gradient is not None:
            ctx.save_for_backward(row_gradient, column_gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        row_gradient, column_gradient = ctx.saved_tensors
        factor = gradients[0][:, None, None]
        return factor * row_gradient, factor * column_gradient, None, None, None


def _blocks(matrices: int, rows: int, columns: int, device: str) -> Iterator[tuple[slice, slice]]:
    """Yield slices of matrices and of their rows: whole matrices, where one of them is not too large already."""
    numbers = CUDA_BLOCK if device == "cuda" else CPU_BLOCK
    most_rows = min(rows, max(1, numbers // columns))
    most_matrices = max(1, numbers // (most_rows * columns))
    for start in range(0, matrices, most_matrices):
        for row in range(0, rows, most_rows):
            yield slice(start, start + most_matrices), slice(row, row + most_rows)


def _compare(logits: Tensor, targets: Tensor, distance: Distance, wanted: bool) -> tuple[Tensor, Tensor]:
    """Return the loss of each row (G, N) and, if ``wanted``, its gradient (G, N, M) at the logits.

    Overwrites both arguments.
    """
    if distance == "smooth_l1":
        error = logits.sub_(targets)
        losses = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=BETA).mean(dim=-1)
        return losses, error.div_(BETA).clamp_(-1, 1).div_(error.shape[-1])
    predicted = logits.log_softmax(dim=-1)
    target = targets.log_softmax(dim=-1)
    shares = target.exp()
    if distance == "cross_entropy":
        losses = -(shares * predicted).sum(dim=-1)
    else:
        losses = (target.sub_(predicted).mul_(shares)).sum(dim=-1).clamp_(min=0)  # rounding can leave -1e-9
    return losses, predicted.exp_().sub_(shares) if wanted else predicted


def whiten(features: Tensor) -> Tensor:
    """Return features (..., C) of zero mean and unit variance over their channels: LayerNorm without an affine part."""
    with torch.autocast(features.device.type, enabled=False):
        return F.layer_norm(upcast(features), features.shape[-1:])


def whitened_feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return smooth L1 (beta 2) of features (B, N, C) and the whitened teacher's, the mean over each sample: (B,)."""
    with torch.autocast(student.device.type, enabled=False):
        losses = F.smooth_l1_loss(upcast(student), whiten(teacher.detach()), reduction="none", beta=BETA)
        return losses.flatten(1).mean(dim=1)
