"""Losses as functions of tensors, in float32 whatever the autocast. Gathering across ranks is the caller's.

Shapes: N pairs, D feature dimensions. ``image`` and ``text`` features are L2-normalised unless said otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _similarity(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """(N, N) logits, rows are images, outside autocast."""
    with torch.autocast(image.device.type, enabled=False):
        return scale * image.float() @ text.float().T


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
    student = _similarity(student_image, student_text, student_scale)
    with torch.no_grad():
        teacher = _similarity(teacher_image, teacher_text, teacher_scale)
    image_to_text = F.cross_entropy(student, teacher.softmax(dim=1))
    text_to_image = F.cross_entropy(student.T, teacher.T.softmax(dim=1))
    return (image_to_text + text_to_image) / 2


def feature_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Feature distillation: squared L2 distance of unit features (FD of CLIP-KD, arXiv 2307.12732).

    Summed over D, averaged over N, image and text halves averaged (CLIP-KD adds them): the mean of 2 - 2 cos.
    Features of any length go in, they are normalised here. Four times (N, D) -> scalar.
    """
    with torch.autocast(student_image.device.type, enabled=False):
        return (_distance(student_image, teacher_image) + _distance(student_text, teacher_text)) / 2


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    difference = F.normalize(student.float(), dim=-1) - F.normalize(teacher.detach().float(), dim=-1)
    return difference.square().sum(dim=-1).mean()
