"""Hard distillation (DeiT, Touvron et al., arXiv 2012.12877) of a student with a distillation token.

A second head on the distillation token learns the class that a teacher finds most probable:

    L = CE(class head, label) / 2 + CE(distillation head, argmax of the teacher) / 2

Evaluation takes the mean of both heads' logits. A live teacher sees the student's images, mixed ones too, as in DeiT. A
cache of soft labels has seen neither mixing nor erasing, so of mixed images the distillation head learns both images'
classes by their shares. Labels of the class head are mixed and smoothed, the teacher's are not smoothed.
"""

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from shards_spec.files import UserError
from shards_spec.library_errors import short
from shards_spec.models import TIMM, LoadedModel
from training.configs.transfer import HardDistillationConfig
from training.models.class_teacher import ClassTeacher
from training.models.mixing import PARTNERS
from training.models.soft_targets import hard_targets
from training.models.tinymim_star import TinymimStar
from training.task import Batch


def is_distilled(student: LoadedModel) -> bool:
    """Return whether a classifier has a distillation token with a head of its own."""
    return isinstance(student.model.trunk, VisionTransformerDistilled)


def check_distillation(
    config: HardDistillationConfig, student: LoadedModel, soft_labels: str | None, *, is_frozen: bool
) -> None:
    """Raise UserError where the student's heads and what they learn from do not go together."""
    if not is_distilled(student):
        if config.teacher is not None:
            raise UserError(
                f"--teacher {config.teacher!r}: the student has no distillation token to teach; take one of "
                f"{TIMM}tinymim_star_tiny_patch16_224, {TIMM}deit_*_distilled_*, or --soft-labels for all of its logits"
            )
        return
    if is_frozen:
        raise UserError("a student with a distillation token has two heads, which a probe does not train: `finetune`")
    if config.teacher is not None and soft_labels is not None:
        raise UserError(f"--teacher {config.teacher!r} and --soft-labels {soft_labels!r}: one of them is the teacher")
    if config.teacher is None and soft_labels is None:
        raise UserError(
            f"--model {student.model.name!r} has a distillation token: give its --teacher, or --soft-labels of a cache"
        )


def logits_of_both(trunk: VisionTransformerDistilled, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (n, K) of the class head and of the distillation head, float32.

    Args:
        trunk: The student's.
        images: (n, 3, S, S), normalised.
    """
    tokens = trunk.forward_features(images)
    if isinstance(trunk, TinymimStar):
        logits, distilled = trunk.logits_of_both(tokens)
    else:
        features = trunk.head_drop(tokens[:, :2])
        logits, distilled = trunk.head(features[:, 0]), trunk.head_dist(features[:, 1])
    return logits.float(), distilled.float()


def cached_loss(distilled: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy (n,) of logits (n, K) with the most probable classes in a batch's soft labels.

    Of mixed images it is the mean of both images' by their shares.
    """
    loss = F.cross_entropy(distilled, hard_targets(batch), reduction="none")
    if "share" not in batch:
        return loss
    partners = F.cross_entropy(distilled, hard_targets(batch, PARTNERS), reduction="none")
    share: Tensor = batch["share"]
    return share * loss + (1 - share) * partners


class HardTeacher(torch.nn.Module):
    """A live teacher of the distillation head, for images that are normalised for the student.

    Args:
        teacher: The classifier.
        student: Whose images it sees.
    """

    def __init__(self, teacher: ClassTeacher, student: LoadedModel) -> None:
        super().__init__()
        self.frozen = teacher.frozen
        theirs, own = (torch.tensor([model.mean, model.std]).view(2, 3, 1, 1) for model in (teacher, student))
        self.register_buffer("factor", own[1] / theirs[1], persistent=False)
        self.register_buffer("offset", (own[0] - theirs[0]) / theirs[1], persistent=False)
        self.factor: Tensor
        self.offset: Tensor

    def classes(self, images: Tensor) -> Tensor:
        """Return the most probable classes (n,) of images (n, 3, S, S) that are normalised for the student."""
        seen = images * self.factor + self.offset
        logits = self.frozen.intermediate(lambda model: model(seen), ()).output
        most_probable: Tensor = logits.argmax(dim=1)
        return most_probable

    def check_sides(self, sides: tuple[int, ...]) -> None:
        """Raise UserError where the teacher does not take images of one of the sides."""
        for side in sides:
            try:
                self.classes(torch.zeros(1, 3, side, side))
            except (RuntimeError, AssertionError, ValueError) as error:
                raise UserError(
                    f"--teacher {self.frozen.name!r} does not take images of {side} pixels ({short(error)}): take a "
                    f"teacher of that size, or other --sides"
                ) from error
