"""Losses that teach a student the features and similarities of a teacher.

Shapes: N pairs of the whole batch (gathering is the caller's), D feature dimensions. Features have unit length unless
said otherwise. The teacher's features and scale are constants: only the student gets a gradient. Losses over the
similarities of all pairs take the `RowShare` that this process computes; FD costs little, and each process computes all
of it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses.similarity import (
    ALL_ROWS,
    RowShare,
    Similarity,
    mean_of_directions,
    pair_cross_entropy,
    upcast,
)


def affinity_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    student_scale: Tensor | float = 50.0,
    teacher_scale: Tensor | float = 50.0,
) -> Tensor:
    """Return the affinity mimicking loss of TinyCLIP (arXiv 2309.12314, section 3.1), as in its released code.

    That is half the paper's sum: CE(A_I2T^s, A_I2T^t) + CE(A_T2I^s, A_T2I^t) over 2. The teacher's affinities are the
    constant target, so at a perfect match the loss is the teacher's entropy, not 0.

    Args:
        student_image: (N, D).
        student_text: (N, D).
        teacher_image: (N, D'); student and teacher may differ in D.
        teacher_text: (N, D').
        student_scale: The scale itself; 50 on both sides is the released scripts'.
        teacher_scale: The scale itself.
    """
    student = Similarity(student_image, student_text, student_scale)
    teacher = Similarity(teacher_image, teacher_text, teacher_scale)
    return ensemble_affinity_loss(student, [teacher])


def relation_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    """Return the contrastive relational distillation loss (CRD of CLIP-KD, arXiv 2307.12732), as in its released code.

    The mean over both directions (the paper adds them) of KL(teacher || student) between the softmaxes over the batch,
    each model at its own scale: `affinity_loss` less the teacher's entropy, so 0 at a perfect match.

    Args:
        student_image: (N, D).
        student_text: (N, D).
        teacher_image: (N, D'); student and teacher may differ in D.
        teacher_text: (N, D').
        student_scale: The scale itself.
        teacher_scale: The scale itself.
    """
    student = Similarity(student_image, student_text, student_scale)
    teacher = Similarity(teacher_image, teacher_text, teacher_scale)
    return ensemble_relation_loss(student, [teacher])


def ensemble_affinity_loss(
    student: Similarity, teachers: Sequence[Similarity], *, share: RowShare = ALL_ROWS
) -> Tensor:
    """Return `affinity_loss` with the mean of several teachers' distributions as the target.

    That is the mean of the teachers' own losses: cross-entropy is linear in its target. MobileCLIP (arXiv 2311.17049)
    and MobileCLIP2 (arXiv 2508.20691, scales 70 and 60) average distributions, too.
    """
    return mean_of_directions(_soft_cross_entropy, student, teachers, share=share)


def ensemble_relation_loss(
    student: Similarity, teachers: Sequence[Similarity], *, share: RowShare = ALL_ROWS
) -> Tensor:
    """Return `relation_loss` with the mean of several teachers' distributions as the target.

    It is smaller than the mean of the teachers' own losses by a constant, their Jensen-Shannon divergence: the gradient
    is the same.
    """
    return mean_of_directions(_kl_divergence, student, teachers, share=share)


def _soft_cross_entropy(logits: Tensor, targets: list[Tensor], _: slice) -> Tensor:
    """Cross-entropy of rows (N, M) with the mean of the targets' softmaxes (N, M), averaged."""
    mean = targets[0].softmax(dim=1)
    for target in targets[1:]:
        mean = mean + target.softmax(dim=1)
    return F.cross_entropy(logits, mean / len(targets))


def _kl_divergence(logits: Tensor, targets: list[Tensor], _: slice) -> Tensor:
    """KL(mean of the targets' softmaxes || softmax(logits)) of rows (N, M), averaged."""
    mean = targets[0].log_softmax(dim=1)
    for target in targets[1:]:
        mean = torch.logaddexp(mean, target.log_softmax(dim=1))
    if len(targets) > 1:
        mean = mean - math.log(len(targets))
    return F.kl_div(logits.log_softmax(dim=1), mean, reduction="batchmean", log_target=True)


def interactive_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor | float,
    *,
    share: RowShare = ALL_ROWS,
) -> Tensor:
    """Return the interactive contrastive loss (ICL of CLIP-KD, arXiv 2307.12732).

    Student anchors among teacher candidates: the mean of the cross-entropies of student image to teacher text and of
    student text to teacher image, with hard labels. Four times (N, D), the scale itself, and the rows to compute.
    """
    image_to_text = Similarity(student_image, teacher_text.detach(), scale)
    text_to_image = Similarity(student_text, teacher_image.detach(), scale)
    return (pair_cross_entropy(image_to_text, share) + pair_cross_entropy(text_to_image, share)) / 2


def feature_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Return the feature distillation loss: squared L2 distance of unit features (FD of CLIP-KD, arXiv 2307.12732).

    Summed over D, averaged over N, and over image and text (CLIP-KD adds them): the mean of 2 - 2 cos. Four times
    (N, D), of any length: the features are normalised here.
    """
    with torch.autocast(student_image.device.type, enabled=False):
        return (_squared_distance(student_image, teacher_image) + _squared_distance(student_text, teacher_text)) / 2


def element_feature_loss(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor
) -> Tensor:
    """Return FD as in CLIP-KD's code: the mean over the N * D elements of unit features, image and text added.

    2 / D times `feature_loss`: the weights of 2000 (CLIP-KD) and 4000 (SiCLIP) belong to this one.
    """
    return 2 / student_image.shape[-1] * feature_loss(student_image, student_text, teacher_image, teacher_text)


def _squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    difference = F.normalize(upcast(student), dim=-1) - F.normalize(upcast(teacher.detach()), dim=-1)
    return difference.square().sum(dim=-1).mean()
