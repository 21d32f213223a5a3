"""Classification losses with several labels per image, on lists of label indices.

Labels are (B, L) int64 class indices, each at most once per row, padded with `PAD`. The dense 0/1 target (B, K) is
never built: its product with the logits is a gather, whose gradient is a scatter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = -1


def sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy per image, summed over all classes (CatLIP, arXiv 2404.15653).

    This is the released code's "batch_mean" before the mean over the batch:
    sum_k BCE(z_k, t_k) = sum_k log(1 + e^z_k) - sum of z_k over the image's labels.

    Args:
        logits: (B, K).
        labels: (B, L), padded with `PAD`.

    Returns:
        (B,) float32, under autocast too.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        return F.softplus(logits, threshold=80.0).sum(dim=1) - _label_logits(logits, labels).sum(dim=1)


def softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy per image with the uniform distribution over its labels (SuperClass, arXiv 2411.03313).

    Args:
        logits: (B, K).
        labels: (B, L), padded with `PAD`.

    Returns:
        (B,) float32, under autocast too; 0 for an image without labels.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        count = (labels != PAD).sum(dim=1)
        label_mean = _label_logits(logits, labels).sum(dim=1) / count.clamp(min=1)
        return torch.where(count > 0, torch.logsumexp(logits, dim=1) - label_mean, 0.0)


def _label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, L) logits of the labels, 0 at the padding."""
    return logits.gather(1, labels.clamp(min=0)) * (labels != PAD)


def mean_loss(losses: Tensor, counts: Tensor, drop_empty: bool) -> Tensor:
    """Return the mean loss of a batch.

    Args:
        losses: (B,) loss per image.
        counts: (B,) number of labels per image.
        drop_empty: Leave images without labels out of the mean.
    """
    if not drop_empty:
        return losses.mean()
    return losses[counts > 0].sum() / (counts > 0).sum().clamp(min=1)


def pad_labels(rows: list[list[int]]) -> Tensor:
    """Return lists of class indices as one tensor (B, L) int64, L being the length of the longest."""
    longest = max((len(row) for row in rows), default=0)
    padded = [row + [PAD] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest)


def frequency_bias(documents: list[int], captions: int) -> Tensor:
    """Return initial biases of a head: the log-odds that a class occurs in a caption, (K,).

    This is SigLIP's idea, not CatLIP's: sigmoid and softmax then start from the classes' frequencies instead of from
    one half each.

    Args:
        documents: Number of captions that contain each class, K of them.
        captions: Number of all captions.
    """
    frequency = torch.tensor(documents, dtype=torch.float64) / captions
    return torch.logit(frequency, eps=0.5 / captions).float()
