"""Pair matching (SiCLIP, arXiv 2411.14789): does this image belong to this text? Hard negatives, a linear head.

N pairs of the whole batch, n of which a process computes (its `RowShare`), D feature dimensions. Each image is paired
with one wrong text and each text with one wrong image, drawn by the softmax of their similarities. A hyperplane over
the product of the two features then separates the N matching pairs from the 2N others. The paper's formulas were not
available: the combination by product, the normalisation and the draw by the student's own similarity are
interpretations. (A hyperplane over [image; text] would be additive, g(i) + h(t): it would give two swapped pairs
together the same sum as the two matching ones.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards_spec.content_id import content_ids
from shards_spec.counter_rng import raw_draws, uniform_draws
from training.losses.similarity import ALL_ROWS, RowShare, upcast


class Negatives(NamedTuple):
    """Per pair the index of a wrong text for its image and of a wrong image for its text, (n,) int64 each.

    -1 means that there is none: every other pair of the batch is a duplicate.
    """

    texts: Tensor
    images: Tensor


class PairHead(nn.Module):
    """Logits of an image's and a text's features: W (D v^ * s^) + b, with v^ and s^ of unit length.

    The factor D makes the inputs O(1); without it they are about 1/D.

    Args:
        dim: D.
        logits: 2 (no match, match), or 1.
        raw: Use v * s as they are instead.
    """

    def __init__(self, dim: int, logits: int = 2, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.linear = nn.Linear(dim, logits)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the logits (M, logits) of M images (M, D) and texts (M, D)."""
        with torch.autocast(image.device.type, enabled=False):
            image, text = upcast(image), upcast(text)
            if self.raw:
                product = image * text
            else:
                product = image.shape[-1] * F.normalize(image, dim=-1) * F.normalize(text, dim=-1)
            logits: Tensor = self.linear(product)
            return logits


def pair_loss(
    head: PairHead, image: Tensor, text: Tensor, negatives: Negatives, *, share: RowShare = ALL_ROWS
) -> Tensor:
    """Return the mean cross-entropy over 3N pairs: N matching ones, N with a wrong text, N with a wrong image.

    Args:
        head: The classifier of pairs.
        image: (N, D) features of any length.
        text: (N, D) features of any length.
        negatives: The wrong texts and images of this process's pairs; missing ones do not count.
        share: Which pairs these are.
    """
    own = share.rows(len(image))
    exists = torch.cat([torch.ones_like(negatives.texts), *negatives]) >= 0
    wrong_texts = negatives.texts.clamp(min=0)
    wrong_images = negatives.images.clamp(min=0)
    logits = head(
        torch.cat([image[own], image[own], image[wrong_images]]),
        torch.cat([text[own], text[wrong_texts], text[own]]),
    )
    labels = (torch.arange(len(logits), device=image.device) < len(wrong_texts)).long()
    if logits.shape[1] == 1:
        losses = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    total = share.sum_over_processes((losses * exists).sum())
    return total / share.sum_over_processes(exists.sum())


@torch.no_grad()
def sample_negatives(
    by_image: Tensor, by_text: Tensor, ids: Sequence[Tensor], *, seed: int, step: int, start: int = 0
) -> Negatives:
    """Draw the wrong texts and images of some pairs of a batch, by the softmax over all texts and over all images.

    A pure function of its arguments: pair n of the batch uses the draws 2n and 2n + 1 of (seed, step), whichever
    process computes it.

    Args:
        by_image: (n, N) logits of the pairs' images with all texts.
        by_text: (n, N) logits of the pairs' texts with all images.
        ids: (N,) int64 each; two pairs with the same id in any of them are no negatives of each other.
        seed: Seed of the run.
        step: The step.
        start: Which pair of the batch the first one is.
    """
    count = by_image.shape[1]
    rows = slice(start, start + len(by_image))
    pairs = torch.arange(count, device=by_image.device)
    blocked = pairs[rows, None] == pairs
    for same in ids:
        blocked |= same[rows, None] == same
    uniforms = torch.from_numpy(uniform_draws(f"pairs/{seed}/{step}", 2 * count)).view(count, 2)[rows]
    uniforms = uniforms.to(by_image.device, non_blocking=True)  # a copy that blocks waits for the forward pass
    return Negatives(_draw(by_image, blocked, uniforms[:, 0]), _draw(by_text, blocked, uniforms[:, 1]))


def _draw(logits: Tensor, blocked: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one allowed column per row by inverse transform sampling.

    Args:
        logits: (N, M); a row's distribution is their softmax over the allowed columns.
        blocked: (N, M) bool, columns that are not allowed. They are masked before the softmax: if they were removed
            after it, nothing might be left of the others in float32.
        uniforms: (N,) in [0, 1).

    Returns:
        (N,) int64, -1 where no column is allowed.
    """
    weights = upcast(logits).masked_fill(blocked, -torch.inf).softmax(dim=1).double()
    weights = weights.nan_to_num(0)  # a row without an allowed column is 0 / 0
    # a blocked column has width 0: it takes the bound before it, however a parallel cumulative sum rounds
    bounds = weights.cumsum(dim=1).masked_fill(weights == 0, 0).cummax(dim=1).values
    total = bounds[:, -1]
    below = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(bounds, below[:, None], right=True)[:, 0]
    return torch.where(total > 0, drawn, -1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def text_ids(tokens: Tensor) -> Tensor:
    """Return a number per text, equal for equal rows: (B, T) -> (B,) int64, a random linear hash modulo 2**64."""
    factors = raw_draws("text ids", tokens.shape[1]).view(np.int64)
    return (tokens.long() * torch.from_numpy(factors).to(tokens.device, non_blocking=True)).sum(dim=1)


def key_ids(keys: Sequence[str], device: torch.device) -> Tensor:
    """Return a number per sample key, (B,) int64."""
    return torch.from_numpy(content_ids(keys).view(np.int64)).to(device, non_blocking=True)
