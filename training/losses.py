"""Losses as functions of tensors, in float32 (float64 when given) whatever the autocast. Gathering is the caller's.

Shapes: N pairs, D feature dimensions. ``image`` and ``text`` features are L2-normalised unless said otherwise. The
teacher's features and scale are constants: gradient reaches the student alone.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def full(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _similarity(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """(N, N) logits, rows are images, outside autocast."""
    with torch.autocast(image.device.type, enabled=False):
        return scale * full(image) @ full(text).T


def _both_ways(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: tuple[Tensor, Tensor, Tensor | float],
    teacher: tuple[Tensor, Tensor, Tensor | float],
) -> Tensor:
    """Mean over both directions of ``loss(student logits, teacher logits)``; each side is (image, text, scale)."""
    logits = _similarity(*student)
    with torch.no_grad():
        targets = _similarity(*teacher)
    return (loss(logits, targets) + loss(logits.T, targets.T)) / 2


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Contrastive loss of CLIP (arXiv 2103.00020, figure 3): cross-entropy of both directions, halved.

    (N, D), (N, D), the scale itself (not its logarithm) -> scalar.
    """
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
    image_to_text = _similarity(student_image, teacher_text.detach(), scale)
    text_to_image = _similarity(student_text, teacher_image.detach(), scale)
    labels = torch.arange(len(image_to_text), device=image_to_text.device)
    return (F.cross_entropy(image_to_text, labels) + F.cross_entropy(text_to_image, labels)) / 2


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
