"""CLIP's contrastive loss."""

from torch import Tensor

from training.losses.similarity import ALL_ROWS, RowShare, Similarity, hard_cross_entropy, mean_of_directions


def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, *, share: RowShare = ALL_ROWS
) -> Tensor:
    """Return the contrastive loss of CLIP (arXiv 2103.00020, figure 3): the mean cross-entropy of both directions.

    Args:
        image_features: (N, D), of unit length.
        text_features: (N, D), of unit length.
        logit_scale: The scale itself, not its logarithm.
        share: The rows that this process computes.
    """

    def loss(logits: Tensor, _: list[Tensor], rows: slice) -> Tensor:
        return hard_cross_entropy(logits, rows)

    return mean_of_directions(loss, Similarity(image_features, text_features, logit_scale), share=share)
