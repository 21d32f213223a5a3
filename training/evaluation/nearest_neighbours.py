"""Classification by the nearest neighbours among training images, as DINO has it (arXiv 2104.14294, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07  # of the votes (Wu et al., arXiv 1805.01978)
CHUNK = 1024  # images whose cosines with all training images are computed at a time


def neighbour_scores(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, neighbours: int) -> Tensor:
    """Return the votes (M, K) of each query's nearest training images, weighed by exp(cosine / 0.07).

    Args:
        bank: (N, D) features of training images.
        labels: (N,) int64, their classes.
        queries: (M, D) features.
        classes: Their number K.
        neighbours: How many training images vote; all where there are fewer.
    """
    bank = F.normalize(bank, dim=-1)
    scores = []
    for some in torch.split(F.normalize(queries, dim=-1), CHUNK):
        best = (some @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = torch.zeros(len(some), classes, dtype=some.dtype)
        scores.append(votes.scatter_add_(1, labels[best.indices], (best.values / TEMPERATURE).exp()))
    return torch.cat(scores)
