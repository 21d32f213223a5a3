"""Captions token by token over `pipeline/caption/coca.py`: greedy, top-k and nucleus sampling.

Beam search is in `pipeline/caption/beam_search.py`.

The order is Hugging Face's: repetition penalty, bars, temperature, then top-k or nucleus. Every row (a caption being
written) draws from a generator keyed by its own name, so a caption does not depend on its neighbours, on the shard or
on what was drawn before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.caption.coca import Coca, EncodedImages, Rows
from pipeline.caption.decoding import Decoding
from shards_spec.counter_rng import raw_draws
from shards_spec.files import UserError


@dataclass(frozen=True)
class Caption:
    """``tokens`` as written, without start, prefix and end; ``logprob``: sum over them and the end token under the
    model as it is, whatever temperature or penalty chose them; ``ended``: the model closed it itself."""

    tokens: list[int]
    logprob: float
    ended: bool


@torch.inference_mode()
def generate(
    coca: Coca, images: EncodedImages, owners: Sequence[int], names: Sequence[str], decoding: Decoding
) -> list[Caption]:
    """A caption per row: row r describes image ``owners[r]`` (ascending, every image at least once) and draws from
    ``names[r]``. Raises UserError when the model's logits are not finite.
    """
    rows, logits, longest = begin(coca, images, decoding)
    owned = torch.tensor(owners, device=coca.device)
    rows.select(owned)  # several captions of an image share what was computed so far
    logits = logits[owned]
    seeds = _seeds(names, decoding, longest).to(coca.device)
    tokens = torch.full((len(names), longest), coca.end, device=coca.device)
    logprobs = torch.zeros(len(names), dtype=torch.float64, device=coca.device)
    active = torch.arange(len(names), device=coca.device)  # result of every row that is left
    running = torch.ones(len(names), dtype=torch.bool, device=coca.device)
    for position in range(longest):
        allowed = adjusted(logits, rows.tokens[:, 1 : rows.position], coca, decoding, position)
        newest = choose(allowed, decoding, seeds[active, position])
        gained = logits.gather(1, newest[:, None])[:, 0].double() - logits.logsumexp(-1).double()
        logprobs[active] += torch.where(running, gained, 0.0)
        tokens[active, position] = torch.where(running, newest, coca.end)
        running = running & (newest != coca.end)
        left = int(running.sum())
        if not left or position == longest - 1:
            break
        if left <= 0.75 * len(running):  # copying the caches pays once a quarter is done
            kept = running.nonzero()[:, 0]
            rows.select(kept)
            active, newest, running = active[kept], newest[kept], running[kept]
        logits = rows.feed(newest[:, None])
    return [written(row, logprob, coca.end) for row, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


def begin(coca: Coca, images: EncodedImages, decoding: Decoding) -> tuple[Rows, Tensor, int]:
    """A row per image with start token and prefix fed, the logits (P, V) after them, and how many tokens may follow.

    Raises UserError when the logits are not finite or the prefix leaves no room.
    """
    prompt = coca.prompt(decoding.prefix) if decoding.prefix else []
    longest = decoding.room(coca.context_length, len(prompt))
    rows = Rows(coca, images, 1 + len(prompt) + longest)
    logits = rows.feed(torch.tensor([[coca.start, *prompt]], device=coca.device).expand(len(rows.tokens), -1))
    if not torch.isfinite(logits).all():
        raise UserError("the captioner gives logits that are not finite: its weights are broken or were not loaded")
    return rows, logits, longest


def written(tokens: list[int], logprob: float, end: int) -> Caption:
    """A caption from its row of tokens, which may hold the end token."""
    ended = end in tokens
    return Caption(tokens[: tokens.index(end)] if ended else tokens, logprob, ended)


def adjusted(scores: Tensor, before: Tensor, coca: Coca, decoding: Decoding, position: int) -> Tensor:
    """Scores (R, V) with the repetition penalty (Keskar et al. 2019: a token of ``before`` (R, T), prefix and written,
    is divided by it, multiplied when negative) and without what may not be written at this ``position``."""
    scores = scores.clone()
    if decoding.repetition_penalty != 1 and before.shape[1]:
        seen = scores.gather(1, before)
        penalty = decoding.repetition_penalty
        scores.scatter_(1, before, torch.where(seen < 0, seen * penalty, seen / penalty))
    scores[:, coca.barred] = -torch.inf
    if position < decoding.min_tokens:
        scores[:, coca.end] = -torch.inf
    return scores


def _seeds(names: Sequence[str], decoding: Decoding, length: int) -> Tensor:
    """(R, length) int64, a row from its name alone."""
    if not decoding.draws:
        return torch.zeros(len(names), length, dtype=torch.long)
    return torch.from_numpy(np.stack([raw_draws(name, length).view(np.int64) for name in names]))


def choose(scores: Tensor, decoding: Decoding, seeds: Tensor) -> Tensor:
    """Next token (R,) from scores (R, V): the greatest, or drawn with ``seeds`` (R,).

    Top-k (Fan et al. 2018) keeps the k likeliest, nucleus (Holtzman et al. 2020) the smallest set of likeliest tokens
    that reaches top_p; tokens as likely as the last one kept are kept too, so that half precision, in which many are
    equal, has no hidden order. The likeliest ``size`` tokens are looked at; rows that need more are done again with
    more.
    """
    if not decoding.draws:
        return scores.argmax(-1)
    scores = scores / decoding.temperature
    chosen = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    rows, size = torch.arange(len(scores), device=scores.device), 128
    while True:
        size = min(size, scores.shape[-1])
        found, done = _draw(scores, decoding, seeds, size)
        chosen[rows] = found
        if size == scores.shape[-1] or done.all():
            return chosen
        scores, seeds, rows, size = scores[~done], seeds[~done], rows[~done], 16 * size


def _draw(scores: Tensor, decoding: Decoding, seeds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Tokens (R,) drawn from the likeliest ``size``, and whether those hold all that can be drawn (R,).

    The greatest of score + Gumbel noise is a draw by probability. The noise belongs to (seed, token): a last bit of
    difference in the scores changes the token only where two sums are that close, however many tokens there are.
    """
    values, ids = scores.topk(size)
    if decoding.method == "top_k":
        least = values[:, min(decoding.top_k, size) - 1, None]
    else:
        probabilities = (values - scores.logsumexp(-1, keepdim=True)).double().exp()
        reached = (probabilities.cumsum(-1) < decoding.top_p).sum(-1, keepdim=True).clamp(max=size - 1)
        least = values.gather(1, reached)
    noisy = torch.where(values >= least, values.double() + _gumbel(seeds[:, None], ids), -torch.inf)
    return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0], values[:, -1] < least[:, 0]


def _gumbel(seeds: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise in float64 for int64 seeds and token ids, by the finaliser of SplitMix64."""
    x = seeds + ids * -0x61C8864680B583EB  # the golden ratio of 2^64, as a signed number
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    uniform = (((x >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()
