"""Captions token by token over `pipeline/caption/coca.py`: greedy, top-k and nucleus sampling.

Beam search is in `pipeline/caption/beam_search.py`.

The order is Hugging Face's: repetition penalty, suppressed tokens, temperature, then top-k or nucleus. Every row (a
caption being written) has random numbers that belong to its own name, so a caption does not depend on its neighbours,
on the shard or on what was sampled before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.caption.coca import Coca, DecoderState, EncodedImages
from pipeline.caption.decoding import Decoding
from pipeline.caption.kernels import log_totals_kernel
from shards_spec.counter_rng import raw_draws
from shards_spec.files import UserError

COMPACT_BELOW = 0.75  # of the rows still running: copying the caches pays once a quarter is done
FIRST_CANDIDATES = 128  # likeliest tokens looked at first
GROUPS = (64, 32, 16, 8)  # neighbours in the vocabulary
MORE_CANDIDATES = 16  # times as many in the next round


@dataclass(frozen=True)
class DecodedTokens:
    """A caption as token ids.

    ``tokens`` are without start, prefix and end; ``logprob`` is the sum over them and the end token under the model as
    it is, whatever temperature or penalty chose them; ``ended``: the model closed the caption itself.
    """

    tokens: list[int]
    logprob: float
    ended: bool


@torch.inference_mode()
def generate(
    coca: Coca, images: EncodedImages, owners: Sequence[int], names: Sequence[str], decoding: Decoding
) -> list[DecodedTokens]:
    """A caption per row: row r describes image ``owners[r]``, with random numbers that belong to ``names[r]``.

    ``owners`` ascend and have every image at least once. Raises UserError when the model's logits are not finite.
    """
    state, logits, longest = prefill(coca, images, decoding)
    image_of_row = torch.tensor(owners, device=coca.device)
    state.select(image_of_row)  # several captions of an image share what was computed so far
    logits = logits[image_of_row]
    seeds = noise_seeds(names, decoding, longest).to(coca.device)
    tokens = torch.full((len(names), longest), coca.end, device=coca.device)
    logprobs = torch.zeros(len(names), dtype=torch.float64, device=coca.device)
    active = torch.arange(len(names), device=coca.device)  # the result that each row of the state belongs to
    running = torch.ones(len(names), dtype=torch.bool, device=coca.device)
    for position in range(longest):
        totals = log_totals(logits)
        scores = process_logits(logits, state.tokens[:, 1 : state.position], coca, decoding, position)
        newest = sample_token(scores, decoding, seeds[active, position])
        gained = log_probability(logits, newest, totals)
        logprobs[active] += torch.where(running, gained, 0.0)
        tokens[active, position] = torch.where(running, newest, coca.end)
        running = running & (newest != coca.end)
        still_running = int(running.sum())
        if not still_running or position == longest - 1:
            break
        if still_running <= COMPACT_BELOW * len(running):
            kept = running.nonzero()[:, 0]
            state.select(kept)
            active = active[kept]
            newest = newest[kept]
            running = running[kept]
        logits = state.step(newest[:, None])
    rows = zip(tokens.tolist(), logprobs.tolist(), strict=True)
    return [truncate_at_eos(row, logprob, coca.end) for row, logprob in rows]


def prefill(coca: Coca, images: EncodedImages, decoding: Decoding) -> tuple[DecoderState, Tensor, int]:
    """Begin a caption per image with start token and prefix.

    Returns the state, the logits (P, V) of the next token, and how many tokens may follow. Raises UserError when the
    logits are not finite or the prefix leaves no room.
    """
    prompt = coca.prompt_tokens(decoding.prefix)
    longest = decoding.longest_caption(coca.context_length, len(prompt))
    state = DecoderState.empty(coca, images, 1 + len(prompt) + longest)
    logits = state.step(torch.tensor([[coca.start, *prompt]], device=coca.device).expand(len(state.tokens), -1))
    if not torch.isfinite(logits).all():
        raise not_finite()
    return state, logits, longest


def not_finite() -> UserError:
    """The error of a model whose logits are no numbers."""
    return UserError("the captioner gives logits that are not finite: its weights are broken or were not loaded")


def truncate_at_eos(tokens: list[int], logprob: float, end: int) -> DecodedTokens:
    """A caption from its row of tokens, which may hold the end token ``end``."""
    ended = end in tokens
    return DecodedTokens(tokens[: tokens.index(end)] if ended else tokens, logprob, ended)


def process_logits(
    logits: Tensor, before: Tensor, coca: Coca, decoding: Decoding, position: int, *, keep: bool = True
) -> Tensor:
    """Scores (R, V) to choose from at this ``position``; forbidden tokens have -inf.

    Repetition penalty (Keskar et al. 2019): the logit of a token in ``before`` (R, T), prefix and caption so far, is
    divided by it, multiplied when negative. Forbidden are the suppressed tokens, and the end before ``min_tokens``.
    Without ``keep`` the logits of forbidden tokens are lost.
    """
    scores = logits.clone() if keep or decoding.repetition_penalty != 1 else logits
    if decoding.repetition_penalty != 1 and before.shape[1]:
        seen = scores.gather(1, before)
        penalty = decoding.repetition_penalty
        scores.scatter_(1, before, torch.where(seen < 0, seen * penalty, seen / penalty))
    scores.index_fill_(1, coca.suppressed_ids, -torch.inf)
    if position < decoding.min_tokens:
        scores[:, coca.end].fill_(-torch.inf)
    return scores


def log_totals(logits: Tensor) -> Tensor:
    """(R,): logarithm of the sum of exponentials of logits (R, V) float32."""
    kernel = log_totals_kernel(logits.device)
    return logits.logsumexp(-1) if kernel is None else kernel(logits)


def log_probability(logits: Tensor, tokens: Tensor, totals: Tensor) -> Tensor:
    """(R,) float64 of the ``tokens`` (R,) under ``logits`` (R, V), with their `log_totals` (R,)."""
    return logits.gather(1, tokens[:, None])[:, 0].double() - totals.double()


def noise_seeds(names: Sequence[str], decoding: Decoding, length: int) -> Tensor:
    """(R, length) int64: a seed per row and position, from the row's name alone."""
    if not decoding.is_sampling:
        return torch.zeros(len(names), length, dtype=torch.long)
    return torch.from_numpy(np.stack([raw_draws(name, length).view(np.int64) for name in names]))


def sample_token(scores: Tensor, decoding: Decoding, seeds: Tensor) -> Tensor:
    """Next token (R,) from scores (R, V): the greatest, or sampled with ``seeds`` (R,).

    Top-k (Fan et al. 2018) keeps the k likeliest, nucleus (Holtzman et al. 2020) the smallest set of likeliest tokens
    that reaches top_p; tokens as likely as the last one kept are kept too, so that half precision, in which many are
    equal, has no hidden order. A few likeliest tokens are looked at first; rows that need more are done again.
    """
    if not decoding.is_sampling:
        return scores.argmax(-1)
    scores = with_temperature(scores, decoding)
    vocabulary = scores.shape[-1]
    chosen = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    size = min(FIRST_CANDIDATES, vocabulary)
    while True:
        tokens, complete = sample_among(scores, decoding, seeds, size)
        chosen[rows] = tokens
        if size == vocabulary or complete.all():
            return chosen
        scores = scores[~complete]
        seeds = seeds[~complete]
        rows = rows[~complete]
        size = min(MORE_CANDIDATES * size, vocabulary)


def with_temperature(scores: Tensor, decoding: Decoding) -> Tensor:
    """Scores (R, V) divided by the temperature."""
    return scores if decoding.temperature == 1 else scores / decoding.temperature


def sample_among(scores: Tensor, decoding: Decoding, seeds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Tokens (R,) sampled from the likeliest ``size``, and whether those hold all that can be sampled (R,).

    The greatest of score + Gumbel noise is a sample by probability. The noise belongs to (seed, token): a last bit of
    difference in the scores changes the token only where two sums are that close, however many tokens there are.
    """
    values, ids = likeliest(scores, size)
    if decoding.method == "top_k":
        least = values[:, min(decoding.top_k, size) - 1, None]
    else:
        probabilities = (values - log_totals(scores)[:, None]).double().exp()
        reached = (probabilities.cumsum(-1) < decoding.top_p).sum(-1, keepdim=True).clamp(max=size - 1)
        least = values.gather(1, reached)
    noisy = (values.double() + _gumbel_noise(seeds[:, None], ids)).masked_fill(~(values >= least), -torch.inf)
    return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0], values[:, -1] < least[:, 0]


def likeliest(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The greatest ``size`` of scores (R, V), in order, and their ids; of equal ones at the end any.

    They are in the ``size`` groups of neighbours with the greatest maxima, and a sort of these groups alone takes a
    fraction of the time.
    """
    rows, vocabulary = scores.shape
    group = next((group for group in GROUPS if vocabulary % group == 0 and vocabulary >= 2 * group * size), None)
    if group is None:
        values, ids = scores.topk(size)
        return values, ids
    grouped = scores.view(rows, -1, group)
    chosen = grouped.amax(-1).topk(size, sorted=False).indices[:, :, None]
    values, places = grouped.gather(1, chosen.expand(-1, -1, group)).flatten(1).topk(size)
    return values, (chosen * group + torch.arange(group, device=scores.device)).flatten(1).gather(1, places)


def _gumbel_noise(seeds: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise in float64 for int64 seeds and token ids, by the finaliser of SplitMix64."""
    x = seeds + ids * -0x61C8864680B583EB  # the golden ratio of 2^64, as a signed number
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    uniform = (((x >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()
