"""What recipes with a teacher, cached or live, have in common: CLIP-KD's further losses, and what has no effect."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from shards_spec.messages import flag, require
from shards_spec.unused_options import Unused, field_values
from training.config import ViewConfig


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

    def unused(self) -> Iterator[Unused]:
        """Yield the options of losses without a weight."""
        if not self.mfd_weight:
            yield Unused(("mask_ratio",), "with --mfd-weight 0")
        if not self.gd_weight:
            yield Unused(("gd_inverse_scale",), "with --gd-weight 0")

    @property
    def is_used(self) -> bool:
        """Whether any of the losses has a weight."""
        return bool(self.gd_weight or self.afd_weight or self.mfd_weight)


def unused_of_source(teacher_from: Literal["cache", "live"], drawn_views: ViewConfig) -> Iterator[Unused]:
    """Yield the options of the other source of views and of a teacher's features.

    Args:
        teacher_from: The source.
        drawn_views: Views that only a live teacher needs.
    """
    if teacher_from == "live":
        yield Unused(("teacher",), "with --teacher-from live: say --teacher-from cache")
    else:
        yield Unused(field_values(drawn_views), "with --teacher-from cache: the views are the cache's")


def unused_of_teachers(teachers: int, weights: Mapping[str, float]) -> Iterator[Unused]:
    """Yield the options of several teachers, or of their scales, that have no effect.

    Args:
        teachers: How many teachers there are.
        weights: Those of all losses that take a teacher's logit scale, by the names of their options.
    """
    if teachers == 1:
        yield Unused(("ensemble",), "with one teacher")
    if not any(weights.values()):
        zero = " and ".join(f"{flag(name)} 0" for name in weights)
        yield Unused(("teacher_scale",), f"with {zero}: no other loss takes a teacher's scale")
