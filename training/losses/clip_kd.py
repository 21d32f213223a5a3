"""CLIP-KD's further losses (Yang et al., arXiv 2307.12732) as functions of features, as its released code has them.

FD, CRD and ICL are in `training.losses.distillation`. Here are GD, gradient distillation, and AFD, augmented feature
distillation. MFD, masked feature distillation, is FD of a student that sees a part of the patches:
`training.models.masked_image`.

Shapes: N pairs of the whole batch, D numbers of a student's feature, D' of a teacher's. The teacher's features and
scale are constants.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.losses.contrastive import clip_loss
from training.losses.similarity import ALL_ROWS, RowShare, Similarity, for_rows, mean_over_rows, upcast


def gradient_loss(student: Similarity, teacher: Similarity, *, share: RowShare = ALL_ROWS) -> Tensor:
    """Return GD: how far apart the contrastive losses' gradients at the student's and the teacher's features are.

    For each direction, image to text and text to image, the gradients of its cross-entropy (a mean over N) at both
    features, in closed form; mean squared differences over the N * D elements, the four added. They shrink with N: a
    weight belongs to a batch size. The paper's weight of 1e8 belongs to its released code, which divides similarities
    by the scale, where CLIP multiplies: give both similarities 1 / scale for that.

    Args:
        student: Unit features (N, D) of images and texts, and the scale.
        teacher: Those of a teacher of the same width (N, D).
        share: The rows that this process computes.
    """
    back = _one_direction(student.transposed(), teacher.transposed(), share)
    return _one_direction(student, teacher, share) + back


def _one_direction(student: Similarity, teacher: Similarity, share: RowShare) -> Tensor:
    """The loss of the gradients of the rows' cross-entropy."""
    count = len(student.rows)
    ours = _log_normalisers(student, share)
    with torch.no_grad():
        theirs = _log_normalisers(teacher, share)

    def of_rows(rows: slice) -> Tensor:
        with torch.no_grad():
            targets = contrastive_gradients(teacher, theirs, rows)
        pairs = zip(contrastive_gradients(student, ours, rows), targets, strict=True)
        return torch.stack([F.mse_loss(own, target) for own, target in pairs]).sum()

    return mean_over_rows(of_rows, count, share)


def contrastive_gradients(similarity: Similarity, log_normalisers: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows' mean cross-entropy at a part of the row and the column features, (n, D) each.

    With P the softmax of the logits s R C^T over columns, the cross-entropy of R's rows with the columns of the same
    index has the gradients s/N (P - I) C at R and s/N (P - I)^T R at C.

    Args:
        similarity: R (N, D), C (N, D) and the scale s.
        log_normalisers: (N,) logarithm of the sum of the exponentials of each row of logits.
        part: Which rows of R and of C.
    """
    rows, columns = upcast(similarity.rows), upcast(similarity.columns)
    with torch.autocast(rows.device.type, enabled=False):
        factor = similarity.scale / len(rows)
        shares = (similarity.logits(part) - log_normalisers[part, None]).exp()
        at_rows = factor * (shares @ columns - columns[part])
        shares = (similarity.transposed().logits(part) - log_normalisers).exp()
        at_columns = factor * (shares @ rows - rows[part])
    return at_rows, at_columns


def _log_normalisers(similarity: Similarity, share: RowShare) -> Tensor:
    """The (N,) logarithms of the rows' softmax denominators."""
    return for_rows(lambda rows: similarity.logits(rows).logsumexp(dim=1), len(similarity.rows), share)


class FeatureProjection(nn.Module):
    """Linear maps of a student's image and text features to a teacher's width, for a teacher of another width.

    As in the released code they take features of any length; what they return is made a unit vector.

    Args:
        width: Numbers of a student's feature, D.
        teacher_width: Numbers of the teacher's, D'.
    """

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, teacher_width)
        self.text = nn.Linear(width, teacher_width)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit features (N, D') of images and texts (N, D)."""
        with torch.autocast(image.device.type, enabled=False):
            return F.normalize(self.image(upcast(image)), dim=-1), F.normalize(self.text(upcast(text)), dim=-1)


class FeatureFusion(nn.Module):
    """AFD: a student's and a teacher's features fused by a linear map, and contrasted.

    The scale is the exponential of a parameter, as CLIP's and `siclip`'s ICL's are. The released code takes the
    parameter as it is, and cannot run where the widths differ: its maps expect the student's own width, and get the
    projected one.

    Args:
        width: Numbers of a student's feature, D.
        teacher_width: Numbers of the teacher's, D'.
    """

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.image = nn.Linear(width + teacher_width, width)
        self.text = nn.Linear(width + teacher_width, width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], *, share: RowShare = ALL_ROWS
    ) -> Tensor:
        """Return the contrastive loss of fused features, of unit image and text features (N, D) and (N, D').

        Of its similarities this process computes its share of rows.
        """
        with torch.autocast(student[0].device.type, enabled=False):
            image = self.image(torch.cat([upcast(student[0]), upcast(teacher[0].detach())], dim=-1))
            text = self.text(torch.cat([upcast(student[1]), upcast(teacher[1].detach())], dim=-1))
            unit = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return clip_loss(*unit, self.logit_scale.exp(), share=share)
