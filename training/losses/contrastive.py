"""CLIP's contrastive loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses.similarity import Similarity, is_whole, pair_cross_entropy


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Return the contrastive loss of CLIP (arXiv 2103.00020, figure 3): the mean cross-entropy of both directions.

    Args:
        image_features: (N, D), of unit length.
        text_features: (N, D), of unit length.
        logit_scale: The scale itself, not its logarithm.
    """
    similarity = Similarity(image_features, text_features, logit_scale)
    if not is_whole(len(image_features)):
        return (pair_cross_entropy(similarity) + pair_cross_entropy(similarity.transposed())) / 2
    logits = similarity.logits()  # once for both directions
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
