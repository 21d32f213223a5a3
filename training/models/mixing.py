"""Mixup, CutMix and random erasing on the device, as timm has them (``timm.data.Mixup``, ``RandomErasing``).

A batch's random numbers are drawn once, as fields with an entry per sample, so that a batch in chunks is mixed like a
whole one. They come from torch's stream and not from numpy's and Python's, as timm's do: that one is part of a
checkpoint. As in timm all samples of a process's batch have the same share and box, and a sample's partner stands as
far from the batch's end as it stands from its beginning.
"""

import math
from typing import Any

import torch
from torch import Tensor

from training.config import MixConfig
from training.data.soft_label_cache import SOFT_FIELDS

PARTNERS = "partner_"  # before the names of fields of the images that are mixed in
PARTNER = f"{PARTNERS}images"
ATTEMPTS = 10  # boxes that timm draws until one fits into the image
LEAST_AREA, MOST_AREA = 0.02, 1 / 3  # share of the image that is erased
LEAST_ASPECT = 0.3


def draw_mix(config: MixConfig, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with what `mixed_images` and `mixed_targets` need, for ``images`` (n, 3, S, S) and ``targets``.

    Adds ``share`` (n,), the image's own share; ``mix_box`` (n, 4), top, left, bottom and right of what CutMix takes
    from the partner, empty for mixup; ``partner_images`` and ``partner_targets``, and soft labels of the partners where
    images have them; and ``erased_boxes`` and ``partner_erased`` (n, 4).
    """
    images: Tensor = batch["images"]
    count, side = len(images), images.shape[-1]
    added: dict[str, Any] = {}
    if config.erasing:
        boxes = torch.tensor([_erased_box(config.erasing, side) for _ in range(count)], device=images.device)
        added |= {"erased_boxes": boxes, "partner_erased": boxes.flip(0)}
    if config.mixup or config.cutmix:
        share, box = _draw_share(config, side)
        added |= {
            "share": torch.full((count,), share, device=images.device),
            "mix_box": torch.tensor(box, device=images.device).expand(count, 4),
            PARTNER: images.flip(0),
        }
        added |= {f"{PARTNERS}{name}": batch[name].flip(0) for name in ("targets", *SOFT_FIELDS) if name in batch}
    return {**batch, **added}


def mixed_images(batch: dict[str, Any]) -> Tensor:
    """Return the images (n, 3, S, S) of a batch or of a chunk of one, normalised: erased, then mixed."""
    images = _erase(batch["images"], batch.get("erased_boxes"))
    if "share" not in batch:
        return images
    partners = _erase(batch[PARTNER], batch.get("partner_erased"))
    box: Tensor = batch["mix_box"]
    inside = _inside(box, images.shape[-1])
    cut = torch.where(inside, partners, images)
    share = batch["share"].view(-1, 1, 1, 1).to(images.dtype)
    is_cut = (box[:, 2] > box[:, 0]).view(-1, 1, 1, 1)
    return torch.where(is_cut, cut, share * images + (1 - share) * partners)


def mixed_targets(batch: dict[str, Any], classes: int, smoothing: float) -> Tensor:
    """Return the distributions over classes (n, K) of the mixed images, smoothed."""
    targets = _smoothed(batch["targets"], classes, smoothing)
    if "share" not in batch:
        return targets
    share = batch["share"].unsqueeze(1)
    mixed: Tensor = share * targets + (1 - share) * _smoothed(batch["partner_targets"], classes, smoothing)
    return mixed


def _smoothed(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """(n, K) of classes (n,): 1 - smoothing on the class, and smoothing over all."""
    rows = torch.full((len(targets), classes), smoothing / classes, device=targets.device)
    return rows.scatter_(1, targets.unsqueeze(1), 1 - smoothing + smoothing / classes)


def _draw_share(config: MixConfig, side: int) -> tuple[float, tuple[int, int, int, int]]:
    """The image's share, and the box of CutMix: of its true size, since borders clip it."""
    is_cut = not config.mixup or (config.cutmix > 0 and torch.rand(()).item() < 0.5)
    alpha = torch.tensor(config.cutmix if is_cut else config.mixup)
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    if not is_cut:
        return share, (0, 0, 0, 0)
    size = int(side * math.sqrt(1 - share))
    row, column = torch.randint(side, (2,)).tolist()
    top, bottom = (min(max(row + step, 0), side) for step in (-(size // 2), (size + 1) // 2))
    left, right = (min(max(column + step, 0), side) for step in (-(size // 2), (size + 1) // 2))
    if bottom == top or right == left:
        return 1.0, (0, 0, 0, 0)
    return 1 - (bottom - top) * (right - left) / side**2, (top, left, bottom, right)


def _erased_box(probability: float, side: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of what is erased of an image; empty for most images."""
    if torch.rand(()).item() >= probability:
        return (0, 0, 0, 0)
    for _ in range(ATTEMPTS):
        size, shape, row, column = torch.rand(4).tolist()
        area = (LEAST_AREA + (MOST_AREA - LEAST_AREA) * size) * side**2
        aspect = math.exp((2 * shape - 1) * math.log(1 / LEAST_ASPECT))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if height < side and width < side:
            top = int(row * (side - height + 1))
            left = int(column * (side - width + 1))
            return (top, left, top + height, left + width)
    return (0, 0, 0, 0)


def _inside(boxes: Tensor, side: int) -> Tensor:
    """(n, 1, S, S) whether a pixel is in its image's box (n, 4)."""
    places = torch.arange(side, device=boxes.device)
    in_rows = (places >= boxes[:, :1]) & (places < boxes[:, 2:3])
    in_columns = (places >= boxes[:, 1:2]) & (places < boxes[:, 3:])
    return (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)


def _erase(images: Tensor, boxes: Tensor | None) -> Tensor:
    """Replace each image's box by normal noise, a number per pixel and channel."""
    if boxes is None:
        return images
    return torch.where(_inside(boxes, images.shape[-1]), torch.randn_like(images), images)
