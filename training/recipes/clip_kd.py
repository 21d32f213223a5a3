"""What CLIP-KD (Yang et al., arXiv 2307.12732) adds to recipes whose student has a teacher's features beside its own.

    FD, CRD, ICL    the recipes' own terms
    GD              gradients of the contrastive loss at the features follow the teacher's
    AFD             features of student and teacher, fused by a linear map, are contrasted
    MFD             FD of a student that sees a quarter of the patches, in a pass of its own

In the released code MFD masks the student's only pass, so that every other loss sees the part, too; here the others see
the whole image. A teacher of another width than the student's gets a linear map for FD, ICL, GD and MFD. The maps are
parts of the task: a checkpoint has them, the student and what is exported of it have not.

Left out: the released code's "cross KD", CRD's divergence of ICL's similarities.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.messages import counted
from training.configs.teaching import ClipKdConfig
from training.data.paired_views import KEEP, PairedViews
from training.data.samples import Samples
from training.losses.clip_kd import FeatureFusion, FeatureProjection, gradient_loss
from training.losses.distillation import element_feature_loss
from training.losses.similarity import ALL_ROWS, RowShare, Similarity
from training.models.masked_image import encode_kept_patches
from training.models.teacher import TeacherEnsemble
from training.models.tinymim import NoTower, VisionTower, tower_of
from training.recipes.pairs import MAX_LOGIT_SCALE
from training.task import Features

log = logging.getLogger(__name__)
Pair = tuple[Tensor, Tensor]  # features of images and of texts


class ClipKd(nn.Module):
    """The linear maps of a student and its teachers, and the losses that a weight was given for.

    Args:
        config: The weights.
        width: Numbers of a student's feature, D.
        teachers: The teachers.
        compares: Whether a loss of the recipe compares a student's feature with a teacher's, so that they must have one
            width.
    """

    def __init__(self, config: ClipKdConfig, width: int, teachers: TeacherEnsemble, compares: bool) -> None:
        super().__init__()
        self.config = config
        self.teachers = teachers
        self.projections = nn.ModuleDict()
        self.fusions = nn.ModuleList()
        for number, teacher in enumerate(teachers.members):
            if teacher.width != width and (compares or config.gd_weight or config.mfd_weight):
                self.projections[str(number)] = FeatureProjection(width, teacher.width)
                log.info(
                    "the student's features have %d numbers, those of teacher %s %d: linear maps are trained with the "
                    "student for the losses that compare them; they are kept in checkpoints, not in the student",
                    width,
                    teacher.name,
                    teacher.width,
                )
            if config.afd_weight:
                self.fusions.append(FeatureFusion(width, teacher.width))

    @property
    def projects(self) -> bool:
        """Whether a teacher has another width than the student."""
        return len(self.projections) > 0

    def towards_teachers(self, unit: Pair, raw: Pair) -> list[Pair]:
        """Return the student's unit features in the width of each teacher.

        Args:
            unit: Unit features (N, D) of images and texts.
            raw: The same of any length, which the linear maps take.
        """
        pairs = []
        for number in range(len(self.teachers.members)):
            key = str(number)
            pairs.append(self.projections[key](*raw) if key in self.projections else unit)
        return pairs

    def compared(self, loss: Callable[..., Tensor], students: Sequence[Pair], taught: Features) -> Tensor:
        """Return the mean or sum over the teachers of ``loss(student's pair, teacher's pair)``, four tensors.

        Args:
            loss: Called with image and text features of the student and of a teacher.
            students: What `towards_teachers` returned.
            taught: Unit features, with the teachers'.
        """
        pairs = zip(students, self.teachers.pairs(taught), strict=True)
        return self.teachers.combined([loss(*student, *teacher) for student, teacher in pairs])

    def losses(
        self,
        features: Features,
        unit: Features,
        students: Sequence[Pair],
        scale: Tensor | float,
        *,
        share: RowShare = ALL_ROWS,
    ) -> Features:
        """Return ``gradient``, ``augmented`` and ``masked``, weighted: those of weight above 0.

        Args:
            features: The task's, with ``masked_image`` where there is masked feature distillation.
            unit: Its features of unit length.
            students: What `towards_teachers` returned.
            scale: The student's logit scale.
            share: The rows of similarities that this process computes.
        """
        config = self.config
        losses = {}
        if config.gd_weight:
            losses["gradient"] = config.gd_weight * self._gradient_loss(unit, students, scale, share)
        if config.afd_weight:
            pairs = zip(self.fusions, self.teachers.pairs(unit), strict=True)
            own = (unit["image"], unit["text"])
            fused = [fuse(own, pair, share=share) for fuse, pair in pairs]
            losses["augmented"] = config.afd_weight * self.teachers.combined(fused)
        if config.mfd_weight:
            masked = (features["masked_image"], features.get("raw_text", features["text"]))
            seen = self.towards_teachers(masked, masked)
            losses["masked"] = config.mfd_weight * self.compared(element_feature_loss, seen, unit)
        return losses

    def _gradient_loss(
        self, unit: Features, students: Sequence[Pair], scale: Tensor | float, share: RowShare
    ) -> Tensor:
        def at(scale: Tensor | float) -> Tensor | float:
            return 1 / scale if self.config.gd_inverse_scale else scale

        losses = []
        for student, teacher in zip(students, self.teachers.similarities(unit), strict=True):
            own = Similarity(*student, at(scale))
            losses.append(gradient_loss(own, teacher._replace(scale=at(teacher.scale)), share=share))
        return self.teachers.combined(losses)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the scales of fused features at 100 at most."""
        scales: list[Any] = [fusion.logit_scale for fusion in self.fusions]
        for scale in scales:
            scale.clamp_(max=MAX_LOGIT_SCALE)


class MaskedStudent:
    """The student's pass over a part of each image's patches; drawn by (seed, key, epoch).

    Args:
        config: The share that is left out.
        student: The student.
        model: The student's name, for messages.

    Raises:
        UserError: The student's image tower is no transformer of patches, or none would be left.
    """

    def __init__(self, config: ClipKdConfig, student: Any, model: str) -> None:
        try:
            self.tower: VisionTower = tower_of(student)
        except NoTower as error:
            raise UserError(
                f"--mfd-weight {config.mfd_weight}: --model {model!r} cannot leave patches out: {error}; take a "
                "student with a ViT of open_clip's or timm's, or --mfd-weight 0"
            ) from error
        self.mask_ratio = config.mask_ratio
        patches = self.tower.patches
        if not int(patches * (1 - self.mask_ratio)):
            raise UserError(
                f"--mask-ratio {self.mask_ratio}: leaves none of {counted(patches, 'patch', 'patches')} of --model "
                f"{model!r}; give less"
            )

    def draw_in(self, samples: Samples, seed: int) -> None:
        """Let the samples draw which patches are kept."""
        samples.paired = PairedViews(None, self.tower.patches, self.mask_ratio, seed=seed)

    def encode(self, student: Any, batch: dict[str, Any]) -> Tensor:
        """Return the image features (n, D) of the patches that the batch keeps."""
        return encode_kept_patches(student.visual, self.tower, batch["images"], batch[KEEP])
