"""Options of CLIP-KD's further losses (`training.recipes.clip_kd`), which several recipes have."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shards_spec.messages import flag, require
from training.config import EnsembleConfig, refuse_given


@dataclass(frozen=True)
class ClipKdConfig:
    """Further losses of CLIP-KD."""

    gd_weight: float = 0.0
    """weight of gradient distillation, which shrinks with the square of the batch size"""
    gd_inverse_scale: bool = False
    """gradient distillation divides similarities by the scale, as CLIP-KD's code; to this its weight of 1e8 belongs"""
    afd_weight: float = 0.0
    """weight of augmented feature distillation: features of student and teacher, fused and contrasted"""
    mfd_weight: float = 0.0
    """weight of masked feature distillation (the element mean: CLIP-KD has 2000), for which a ViT student sees its
    images once more, in part"""
    mask_ratio: float = 0.75
    """share of the patches that masked feature distillation leaves out"""

    def __post_init__(self) -> None:
        for name in ("gd_weight", "afd_weight", "mfd_weight"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        require(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "in (0, 1)")

    @property
    def is_used(self) -> bool:
        """Whether any of the losses has a weight."""
        return bool(self.gd_weight or self.afd_weight or self.mfd_weight)


def check_teaching(ensemble: EnsembleConfig, clip_kd: ClipKdConfig, teachers: int, scaled: Mapping[str, float]) -> None:
    """Raise UserError for an option of teachers, or of CLIP-KD's losses, that was given and would not be used.

    Args:
        ensemble: How several teachers teach.
        clip_kd: CLIP-KD's losses.
        teachers: How many teachers there are.
        scaled: The recipe's own weights of losses that take a teacher's logit scale, by their names.
    """
    if not clip_kd.mfd_weight:
        refuse_given(clip_kd, ("mask_ratio",), "with --mfd-weight 0")
    if not clip_kd.gd_weight:
        refuse_given(clip_kd, ("gd_inverse_scale",), "with --gd-weight 0")
    if teachers == 1:
        refuse_given(ensemble, ("ensemble",), "with one teacher")
    weights = {**scaled, "gd_weight": clip_kd.gd_weight}
    if not any(weights.values()):
        zero = " and ".join(f"{flag(name)} 0" for name in weights)
        refuse_given(ensemble, ("teacher_scale",), f"with {zero}: no other loss takes a teacher's scale")
