"""Pair matching (SiCLIP, arXiv 2411.14789): does this image belong to this text? Hard negatives, a linear head.

N pairs of the whole batch, D feature dimensions. Each image takes one wrong text and each text one wrong image,
drawn by the softmax of their similarities; a hyperplane over the product of the two features then tells the N right
pairs from the 2N wrong ones. The paper's formulas could not be seen: the combination by product, the normalisation and
the draw by the student's own similarity are readings. (A hyperplane over [image; text] would be additive, g(i) + h(t):
whatever it gives both right pairs of two together, it gives to both swapped ones.)
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards_spec.counter_rng import raw_draws, uniform_draws
from training.losses.distillation import full


class Negatives(NamedTuple):
    """Per pair the index of a wrong text for its image and of a wrong image for its text, (N,) int64 each.

    -1 where there is none: every other pair of the batch is a duplicate.
    """

    texts: Tensor
    images: Tensor


class PairHead(nn.Module):
    """W (D v^ * s^) + b: logits of an image and a text, v^ and s^ of unit length; ``raw`` takes v * s as they are.

    The factor D makes the inputs O(1), without it they are about 1/D. Two logits (no match, match), or one.
    """

    def __init__(self, dim: int, logits: int = 2, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.linear = nn.Linear(dim, logits)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(M, D), (M, D) -> (M, logits)."""
        with torch.autocast(image.device.type, enabled=False):
            image, text = full(image), full(text)
            if self.raw:
                return self.linear(image * text)
            return self.linear(image.shape[-1] * F.normalize(image, dim=-1) * F.normalize(text, dim=-1))


def pair_loss(head: PairHead, image: Tensor, text: Tensor, negatives: Negatives) -> Tensor:
    """Mean cross-entropy over 3N pairs: N right ones, N with a wrong text, N with a wrong image.

    (N, D) features, of any length -> scalar. Missing negatives leave the mean.
    """
    count = len(image)
    there = torch.cat([torch.ones_like(negatives.texts), *negatives]) >= 0
    wrong_texts, wrong_images = (index.clamp(min=0) for index in negatives)
    logits = head(
        torch.cat([image, image, image[wrong_images]]),
        torch.cat([text, text[wrong_texts], text]),
    )
    labels = (torch.arange(3 * count, device=image.device) < count).long()
    if logits.shape[1] == 1:
        losses = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * there).sum() / there.sum()


@torch.no_grad()
def sample_negatives(similarity: Tensor, ids: Sequence[Tensor], seed: int, step: int) -> Negatives:
    """Draw the wrong partners of a whole batch: probabilities are the softmax over rows and over columns.

    ``similarity`` (N, N) are logits, rows are images; ``ids`` are (N,) int64 each, and no pair is the negative of one
    that has the same id in any of them. Pure in its arguments: pair n takes draws 2n and 2n + 1 of (seed, step), so
    processes that hold the whole batch agree.
    """
    count = len(similarity)
    blocked = torch.eye(count, dtype=torch.bool, device=similarity.device)
    for same in ids:
        blocked |= same[:, None] == same[None, :]
    uniforms = torch.from_numpy(uniform_draws(f"pairs/{seed}/{step}", 2 * count)).to(similarity.device).view(count, 2)
    return Negatives(_draw(similarity, blocked, uniforms[:, 0]), _draw(similarity.T, blocked, uniforms[:, 1]))


def _draw(logits: Tensor, blocked: Tensor, uniforms: Tensor) -> Tensor:
    """One allowed column per row by the inverse of its distribution: (N, M), (N, M) bool, (N,) -> (N,) int64, or -1.

    Blocked ones are masked before the softmax: taken out after it, nothing may be left of the rest in float32.
    """
    weights = full(logits).masked_fill(blocked, -torch.inf).softmax(dim=1).double()
    weights = weights.nan_to_num(0)  # all blocked: 0 / 0
    # steps of width 0 stay so whatever a parallel sum rounds: the running maximum takes over the place before
    bounds = weights.cumsum(dim=1).masked_fill(weights == 0, 0).cummax(dim=1).values
    total = bounds[:, -1]
    below = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(bounds, below[:, None], right=True)[:, 0]
    return torch.where(total > 0, drawn, -1)


@torch.compiler.disable
def text_ids(tokens: Tensor) -> Tensor:
    """Equal rows have equal numbers: (B, T) -> (B,) int64, a random linear hash modulo 2**64."""
    factors = raw_draws("text ids", tokens.shape[1]).view(np.int64)
    return (tokens.long() * torch.from_numpy(factors).to(tokens.device)).sum(dim=1)


@torch.compiler.disable  # hashes are NumPy's and Python's work
def key_ids(keys: Sequence[str], device: torch.device) -> Tensor:
    """A number per sample key: (B,) int64."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return torch.from_numpy(np.frombuffer(digests, "<i8").astype(np.int64)).to(device)
