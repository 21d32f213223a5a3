"""What a student and its teacher see of an image, where that is not the same."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shards_spec.augment import jitter
from shards_spec.counter_rng import uniform_draws
from shards_spec.views import RecordedView, View, ViewSpec, apply_view
from training.data.batches import to_pixels

CLEAN = "clean_images"
KEEP = "keep"
DROPS = "drop_draws"


@dataclass(frozen=True)
class PairedViews:
    """Renders a view for the student and, where it differs, without colour jitter or larger for the teacher.

    Both have the same crop and flip. It may also draw which patches both of them see, and what a drop path of the
    student's compares with its rate, by (seed, key, epoch): so samples do not depend on the process that has them.
    """

    teacher_side: int | None
    """pixels a side of the teacher's images; None: the teacher has none"""
    patches: int = 0
    """patches of an image"""
    mask_ratio: float = 0.0
    """share of them that is left out"""
    drops: int = 0
    """drop paths of the student"""
    seed: int = 0
    """of the draws"""

    def fields(self, jitter_strengths: tuple[float, ...], side: int) -> tuple[str, ...]:
        """Return the fields that `render` gives."""
        has_copy = self.teacher_side is not None and (any(jitter_strengths) or side != self.teacher_side)
        used = {CLEAN: has_copy, KEEP: self.mask_ratio > 0, DROPS: self.drops > 0}
        return ("images", *(name for name, is_used in used.items() if is_used))

    def render(
        self, image: Image.Image, spec: ViewSpec, view: View | RecordedView, side: int, draw_name: str
    ) -> dict[str, Tensor]:
        """Return ``images``, uint8 (3, S, S), and what `fields` names besides.

        Args:
            image: The decoded image.
            spec: What views are drawn from.
            view: The view.
            side: Pixels a side of the student's images.
            draw_name: Key and epoch of the sample.

        Returns:
            ``images`` (3, S, S) and ``clean_images`` (3, S', S'), uint8; ``keep``, int64 indices of patches, ascending;
            ``drop_draws``, float32 in [0, 1), one per drop path.
        """
        plain = replace(view, jitter=())
        clean = apply_view(image, spec, plain, side)
        shown = jitter(clean, spec.jitter, view.jitter[0], view.jitter[1:]) if view.jitter else clean
        item = {"images": to_pixels(shown)}
        if self.teacher_side is not None and side != self.teacher_side:
            clean = apply_view(image, spec, plain, self.teacher_side)
        if CLEAN in self.fields(spec.jitter, side):
            item[CLEAN] = to_pixels(clean)
        if self.mask_ratio:
            item[KEEP] = self._draw_patches(draw_name)
        if self.drops:
            draws = uniform_draws(f"drop-path/{self.seed}/{draw_name}", self.drops)
            item[DROPS] = torch.from_numpy(draws.astype(np.float32))
        return item

    def _draw_patches(self, draw_name: str) -> Tensor:
        noise = uniform_draws(f"mask/{self.seed}/{draw_name}", self.patches)
        kept = int(self.patches * (1 - self.mask_ratio))
        return torch.from_numpy(np.sort(np.argsort(noise, kind="stable")[:kept]).astype(np.int64))
