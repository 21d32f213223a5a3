"""Losses as functions of tensors, in float32 (float64 when given) whatever the autocast. Gathering is the caller's.

Shapes: N pairs, D feature dimensions. ``image`` and ``text`` features are L2-normalised unless said otherwise. The
teacher's features and scale are constants: gradient reaches the student alone.

Above `WHOLE` pairs the matrices of all pairs are never whole: `ROWS` rows at a time, computed again for the backward
pass. The numbers are the same up to the order of sums; TinyCLIP's batch of 32,768 would take 30 GB otherwise.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WHOLE, ROWS = 8192, 1024
Side = tuple[Tensor, Tensor, Tensor | float]  # rows' features, columns' features, scale


def full(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _similarity(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """(N, N) logits, rows are images, outside autocast."""
    with torch.autocast(image.device.type, enabled=False):
        return scale * full(image) @ full(text).T


def _both_ways(loss: Callable[[Tensor, Tensor], Tensor], student: Side, teacher: Side) -> Tensor:
    """Mean over both directions of ``loss(student logits, teacher logits)``, itself a mean over rows."""
    if len(student[0]) > WHOLE:
        turned = ((side[1], side[0], side[2]) for side in (student, teacher))
        return (_in_blocks(_taught, loss, student, teacher) + _in_blocks(_taught, loss, *turned)) / 2
    logits = _similarity(*student)
    with torch.no_grad():
        targets = _similarity(*teacher)
    return (loss(logits, targets) + loss(logits.T, targets.T)) / 2


def _in_blocks(block: Callable[..., Tensor], *words: object) -> Tensor:
    """Mean over the rows of ``block(rows, *words)``, which is a mean over some; the last word is a `Side`."""
    side = words[-1]
    assert isinstance(side, tuple)
    count = len(side[0])
    spans = [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
    parts = [
        (span.stop - span.start) / count
        * checkpoint(block, span, *words, use_reentrant=False, preserve_rng_state=False)
        for span in spans
    ]  # fmt: skip
    return torch.stack(parts).sum()


def _taught(rows: slice, loss: Callable[[Tensor, Tensor], Tensor], student: Side, teacher: Side) -> Tensor:
    logits = _similarity(student[0][rows], *student[1:])
    with torch.no_grad():
        targets = _similarity(teacher[0][rows], *teacher[1:])
    return loss(logits, targets)


def _own_pairs(rows: slice, side: Side) -> Tensor:
    """Cross-entropy of rows whose class is the column of their own number."""
    labels = torch.arange(rows.start, rows.stop, device=side[0].device)
    return F.cross_entropy(_similarity(side[0][rows], *side[1:]), labels)


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Contrastive loss of CLIP (arXiv 2103.00020, figure 3): cross-entropy of both directions, halved.

    (N, D), (N, D), the scale itself (not its logarithm) -> scalar.
    """
    if len(image_features) > WHOLE:
        sides = (image_features, text_features, logit_scale), (text_features, image_features, logit_scale)
        return (_in_blocks(_own_pairs, sides[0]) + _in_blocks(_own_pairs, sides[1])) / 2
    logits = _similarity(image_features, text_features, logit_scale)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def affinity_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor | float = 50.0,
    teacher_scale: Tensor | float = 50.0,
) -> Tensor:
    """Affinity mimicking of TinyCLIP (arXiv 2309.12314, section 3.1), as its code has it: *half* the paper's sum.

    CE(A_I2T^s, A_I2T^t) + CE(A_T2I^s, A_T2I^t) over 2, the teacher's affinities being the (constant) target:
    at a perfect match the loss is the teacher's entropy, not 0. Scale 50 on both sides is the released scripts'.
    (N, D), (N, D), (N, D'), (N, D') -> scalar; student and teacher may differ in D.
    """
    student, teacher = (student_image, student_text, student_scale), (teacher_image, teacher_text, teacher_scale)
    return _both_ways(lambda logits, targets: F.cross_entropy(logits, targets.softmax(dim=1)), student, teacher)


def relation_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    """Contrastive relational distillation (CRD of CLIP-KD, arXiv 2307.12732), as its code has it.

    Mean over both directions of KL(teacher || student) between the softmaxes over the batch, each model at its own
    scale: `affinity_loss` less the teacher's entropy, 0 at a perfect match. The paper adds the directions.
    (N, D), (N, D), (N, D'), (N, D') -> scalar.
    """
    student, teacher = (student_image, student_text, student_scale), (teacher_image, teacher_text, teacher_scale)
    return _both_ways(_divergence, student, teacher)


def _divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(softmax(targets) || softmax(logits)) over rows, averaged: (N, M), (N, M) -> scalar."""
    return F.kl_div(logits.log_softmax(dim=1), targets.log_softmax(dim=1), reduction="batchmean", log_target=True)


def interactive_loss(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: Tensor | float
) -> Tensor:
    """Interactive contrastive learning (ICL of CLIP-KD, arXiv 2307.12732): student anchors, teacher candidates.

    Mean of the cross-entropies of student image -> teacher text and student text -> teacher image, hard labels.
    Four times (N, D), the scale itself -> scalar.
    """
    sides: tuple[Side, Side] = (
        (student_image, teacher_text.detach(), scale),
        (student_text, teacher_image.detach(), scale),
    )
    rows = slice(0, len(student_image))
    whole = len(student_image) <= WHOLE
    ways = [_own_pairs(rows, side) if whole else _in_blocks(_own_pairs, side) for side in sides]
    return (ways[0] + ways[1]) / 2


def feature_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Feature distillation: squared L2 distance of unit features (FD of CLIP-KD, arXiv 2307.12732).

    Summed over D, averaged over N, image and text halves averaged (CLIP-KD adds them): the mean of 2 - 2 cos.
    Features of any length go in, they are normalised here. Four times (N, D) -> scalar.
    """
    with torch.autocast(student_image.device.type, enabled=False):
        return (_distance(student_image, teacher_image) + _distance(student_text, teacher_text)) / 2


def element_feature_loss(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor
) -> Tensor:
    """FD as CLIP-KD's code has it: the mean over the N * D elements of unit features, image and text added.

    2 / D times `feature_loss`: this is what weights of 2000 (CLIP-KD) and 4000 (SiCLIP) are for.
    """
    return 2 / student_image.shape[-1] * feature_loss(student_image, student_text, teacher_image, teacher_text)


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    difference = F.normalize(full(student), dim=-1) - F.normalize(full(teacher.detach()), dim=-1)
    return difference.square().sum(dim=-1).mean()
