"""A check that a model's contrastive heads can rate captions at all."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAX_PAIRS = 4096  # of a shard: enough to judge by, 25 MB
MIN_PAIRS = 3


@dataclass
class ContrastiveHeadCheck:
    """Whether a model's contrastive heads tell images apart by their captions, from a shard's first original pairs."""

    images: "list[Tensor]" = field(default_factory=list)
    texts: "list[Tensor]" = field(default_factory=list)
    captions: list[str] = field(default_factory=list)

    def add(self, images: "Tensor", texts: "Tensor", captions: list[str]) -> None:
        """Add a batch: L2-normalised features (n, D) of images and of their captions, and the n captions."""
        if len(self.captions) < MAX_PAIRS:
            self.images.append(images.cpu())
            self.texts.append(texts.cpu())
            self.captions += captions

    def warning(self) -> str | None:
        """A message when own captions score no better than shuffled ones, by two standard errors; None otherwise.

        None, too, where there are too few pairs or no two different captions. By how much a pair scores above the
        average of its image and of its caption needs no matrix of all pairs: it is the product of the two features
        less their means.
        """
        n = len(self.captions)
        if n < MIN_PAIRS or len(set(self.captions)) < 2:
            return None
        images = np.concatenate([part.float().numpy() for part in self.images])
        texts = np.concatenate([part.float().numpy() for part in self.texts])
        margins = ((images - images.mean(0)) * (texts - texts.mean(0))).sum(-1) * (n / (n - 1))
        if margins.mean() > 2 * margins.std() / n**0.5:
            return None
        cosine = (images * texts).sum(-1).mean()
        return (
            f"original captions are no closer to their images than to others by this model's contrastive heads (mean "
            f"cosine {cosine:.4f}, shuffled {cosine - margins.mean():.4f}, {n} images): its similarities are "
            "meaningless, do not filter by them. Fine-tuning on captions can spoil these heads (open_clip's "
            "mscoco_finetuned tags): use another tag"
        )
