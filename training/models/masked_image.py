"""An image feature of a part of the patches: the student's view in CLIP-KD's masked feature distillation."""

from typing import Any

from timm.models._manipulate import checkpoint_seq
from torch import Tensor

from training.models.tinymim import OpenClipTower, VisionTower, keep_patches


def encode_kept_patches(visual: Any, tower: VisionTower, images: Tensor, keep: Tensor) -> Tensor:
    """Return the image features (B, D) of a CLIP model that sees some patches; the others are not computed.

    Args:
        visual: The model's image tower.
        tower: The transformer in it (`training.models.tinymim.tower_of`).
        images: (B, 3, S, S), normalised.
        keep: (B, K) indices of the patches that it sees, from 0.
    """
    tokens = keep_patches(tower.embed(images), keep, tower.prefix)
    model = tower.model
    if isinstance(tower, OpenClipTower):
        pooled: Tensor = model._pool(model.transformer(tokens))[0]
        return pooled if model.proj is None else pooled @ model.proj
    tokens = checkpoint_seq(model.blocks, tokens) if tower.checkpoints else model.blocks(tokens)
    features: Tensor = visual.head(model.forward_head(model.norm(tokens)))
    return features
