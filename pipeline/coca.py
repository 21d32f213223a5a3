"""Caption decoding for open_clip's CoCa with key/value caches.

Model: CoCa (Yu et al., 2022, arXiv 2205.01917) as open_clip builds it; its modules and weights are used as they are.
What differs from open_clip's ``generate``: the image is encoded once and shared by its N captions, every token is
computed once (keys and values of both text stacks are kept), cross-attention keys and values are computed once per
image, and finished rows leave the batch. Sampling draws from a generator keyed by (seed, key, caption index), so a
caption does not depend on its neighbours.

Shapes: B images, N captions each, R rows still running (R <= B·N), T tokens, H heads, D head width, Q image tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shards_spec.draws import uniform_draws
from shards_spec.files import UserError


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. Lengths count generated tokens with the end token, without the start token."""

    method: Literal["greedy", "nucleus"] = "nucleus"
    num_captions: int = 5
    top_p: float = 0.9
    temperature: float = 1.0
    max_tokens: int = 30
    min_tokens: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise UserError(f"top_p {self.top_p} must be in (0, 1] and temperature {self.temperature} above 0")
        if not 0 <= self.min_tokens < self.max_tokens:
            raise UserError(f"min_tokens {self.min_tokens} must be below max_tokens {self.max_tokens}, both >= 0")
        if self.num_captions < 1 or (self.method == "greedy" and self.num_captions > 1):
            raise UserError(f"num_captions {self.num_captions}: at least 1, and greedy gives the same one every time")


@dataclass(frozen=True)
class Caption:
    """``tokens`` without start, end and padding; ``logprob``: sum over them and the end token, under the model."""

    tokens: list[int]
    logprob: float


class AttentionCache:
    """Keys and values of one self-attention layer, preallocated: (R, H, T_max, D) each."""

    def __init__(self, rows: int, attention: nn.MultiheadAttention, length: int) -> None:
        shape = (rows, attention.num_heads, length, attention.head_dim)
        self.keys = attention.in_proj_weight.new_zeros(shape)
        self.values = attention.in_proj_weight.new_zeros(shape)

    def append(self, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (R, H, 1, D) at ``position`` and return everything up to it, (R, H, position + 1, D)."""
        self.keys[:, :, position : position + 1] = keys
        self.values[:, :, position : position + 1] = values
        return self.keys[:, :, : position + 1], self.values[:, :, : position + 1]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def _projected(attention: nn.MultiheadAttention, x: Tensor, part: int) -> Tensor:
    """Query (0), key (1) or value (2) of (B, T, C) as (B, H, T, D)."""
    width = attention.embed_dim
    piece = slice(part * width, (part + 1) * width)
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[piece]
    projected = F.linear(x, attention.in_proj_weight[piece], bias)
    return projected.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _merged(attention: nn.MultiheadAttention, heads: Tensor) -> Tensor:
    """(B, H, T, D) through the output projection to (B, T, C)."""
    return attention.out_proj(heads.transpose(1, 2).flatten(2))


def _self_attend(block: Any, cache: AttentionCache, x: Tensor, position: int, mask: Tensor | None) -> Tensor:
    """One pre-norm block on the newest token, x (R, 1, C)."""
    normed = block.ln_1(x)
    keys, values = cache.append(position, _projected(block.attn, normed, 1), _projected(block.attn, normed, 2))
    heads = F.scaled_dot_product_attention(_projected(block.attn, normed, 0), keys, values, attn_mask=mask)
    x = x + block.ls_1(_merged(block.attn, heads))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


class Decoder:
    """Holds the running rows of one batch of images; ``step`` feeds a token and returns the next logits."""

    def __init__(self, model: Any, images: Tensor, num_captions: int, length: int) -> None:
        self.text, self.decoder, self.slots = model.text, model.text_decoder, num_captions
        _, image_tokens = model._encode_image(images)
        rows = images.shape[0] * num_captions
        self.rows = torch.arange(rows, device=images.device)  # slot b·N + n of every running row
        self.position = 0
        self.valid = torch.ones(rows, length + 1, dtype=torch.bool, device=images.device)
        self.text_caches = [AttentionCache(rows, b.attn, length) for b in self.text.transformer.resblocks]
        self.caches = [AttentionCache(rows, b.attn, length) for b in self.decoder.resblocks]
        self.cross = []
        for block in self.decoder.cross_attn:
            normed = block.ln_1_kv(image_tokens)
            self.cross.append((_projected(block.attn, normed, 1), _projected(block.attn, normed, 2)))

    @property
    def images(self) -> int:
        """Images that still have keys and values here."""
        return self.cross[0][0].shape[0]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (R, vocabulary) after the newest token of every running row, ``tokens`` (R,)."""
        x = self.text.token_embedding(tokens)[:, None] + self.text.positional_embedding[self.position]
        mask = self._text_mask(tokens)
        for block, cache in zip(self.text.transformer.resblocks, self.text_caches, strict=True):
            x = _self_attend(block, cache, x, self.position, mask)
        layers = zip(self.decoder.resblocks, self.decoder.cross_attn, self.caches, self.cross, strict=True)
        for block, cross_block, cache, (keys, values) in layers:
            x = _self_attend(block, cache, x, self.position, None)
            x = self._cross_attend(cross_block, keys, values, x)
        self.position += 1
        return (self.decoder.ln_final(x) @ self.decoder.text_projection)[:, 0]

    def _text_mask(self, tokens: Tensor) -> Tensor | None:
        """open_clip masks padding ids among the text keys; in its released weights one place too late."""
        if self.text.cls_emb is None:
            return None
        place = self.position if self.text.correct_cls_mask else self.position + 1
        self.valid[:, place] = tokens != self.text.pad_id
        return self.valid[:, None, None, : self.position + 1]

    def _cross_attend(self, block: Any, keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
        """The rows of an image are its queries: (images, H, N, D) against (images, H, Q, D), nothing is copied."""
        query = _projected(block.attn, block.ln_1(x), 0)[:, :, 0]  # (R, H, D)
        slots = query.new_zeros(self.images * self.slots, *query.shape[1:])
        slots[self.rows] = query
        queries = slots.unflatten(0, (self.images, self.slots)).transpose(1, 2)
        heads = F.scaled_dot_product_attention(queries, keys, values)
        merged = _merged(block.attn, heads).flatten(0, 1)[self.rows][:, None]
        x = x + block.ls_1(merged)
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only; images without any are dropped too."""
        for cache in (*self.text_caches, *self.caches):
            cache.keep(rows)
        self.valid, self.rows = self.valid[rows], self.rows[rows]
        kept, renumbered = torch.unique(self.rows // self.slots, return_inverse=True)
        if len(kept) < self.images:
            self.rows = renumbered * self.slots + self.rows % self.slots
            self.cross = [(keys[kept], values[kept]) for keys, values in self.cross]


def _check_supported(model: Any) -> None:
    text = getattr(model, "text", None)
    if not hasattr(model, "text_decoder") or text is None:
        raise UserError("caption needs an open_clip CoCa model, such as coca_ViT-L-14; this one has no text decoder")
    if not hasattr(text, "transformer") or not hasattr(text.transformer, "resblocks"):
        raise UserError("this CoCa has a Hugging Face text tower, which clipmill does not decode yet")


@torch.no_grad()
def generate(
    model: Any, images: Tensor, keys: Sequence[str], decoding: Decoding, start: int, end: int
) -> list[list[Caption]]:
    """N captions for each of B images (B, 3, S, S); ``start`` and ``end`` are token ids.

    Raises UserError when the model is no CoCa that this can decode.
    """
    _check_supported(model)
    longest = min(decoding.max_tokens, model.text.context_length - 1, model.text_decoder.context_length)
    decoder = Decoder(model, images, decoding.num_captions, longest)
    total = len(images) * decoding.num_captions
    uniforms = _uniforms(keys, decoding, longest).to(images.device)
    tokens = torch.full((total, longest), end, device=images.device)
    logprobs = torch.zeros(total, dtype=torch.float64, device=images.device)
    active = torch.arange(total, device=images.device)  # output row of every decoder row
    running = torch.ones(total, dtype=torch.bool, device=images.device)  # of the decoder's rows
    newest = torch.full((total,), start, device=images.device)
    for position in range(longest):
        logits = decoder.step(newest).float()
        if position == 0 and not torch.isfinite(logits).all():
            raise UserError("the captioner gives logits that are not finite: its weights are broken or were not loaded")
        newest = _choose(logits, decoding, uniforms[active, position], end if position < decoding.min_tokens else None)
        gained = logits.log_softmax(-1).gather(1, newest[:, None])[:, 0]
        logprobs[active] += torch.where(running, gained.double(), 0.0)
        tokens[active, position] = torch.where(running, newest, end)
        running = running & (newest != end)
        if not running.any():
            break
        if running.sum() <= 0.75 * len(running):  # copying the caches pays once a quarter is done
            kept = running.nonzero()[:, 0]
            decoder.keep(kept)
            active, newest, running = active[kept], newest[kept], running[kept]
    return _captions(tokens, logprobs, decoding.num_captions, end)


def _uniforms(keys: Sequence[str], decoding: Decoding, length: int) -> Tensor:
    """(B·N, length) float64 in [0, 1), row b·N + n from (seed, keys[b], n) alone."""
    if decoding.method == "greedy":
        return torch.zeros(len(keys), length, dtype=torch.float64)
    rows = [
        uniform_draws(f"caption/{decoding.seed}/{key}/{caption}", length)
        for key in keys
        for caption in range(decoding.num_captions)
    ]
    return torch.from_numpy(np.stack(rows))


def _choose(logits: Tensor, decoding: Decoding, uniforms: Tensor, banned: int | None) -> Tensor:
    """Next token (R,) from logits (R, V): the greatest, or nucleus sampling (Holtzman et al. 2020) by inverse CDF."""
    if banned is not None:
        logits = logits.clone()
        logits[:, banned] = -torch.inf
    if decoding.method == "greedy":
        return logits.argmax(-1)
    probabilities, order = (logits / decoding.temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    cumulative = probabilities.double().cumsum(-1)
    kept = (cumulative - probabilities) < decoding.top_p  # the smallest set that reaches top_p
    mass = torch.where(kept, cumulative, 0.0).amax(-1)
    picked = (cumulative <= (uniforms * mass)[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
    picked = torch.minimum(picked, kept.sum(-1) - 1)
    return order.gather(1, picked[:, None])[:, 0]


def _captions(tokens: Tensor, logprobs: Tensor, num_captions: int, end: int) -> list[list[Caption]]:
    captions = []
    for row, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        captions.append(Caption(row[: row.index(end)] if end in row else row, logprob))
    return [captions[i : i + num_captions] for i in range(0, len(captions), num_captions)]
