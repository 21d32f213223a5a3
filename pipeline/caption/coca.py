"""open_clip's CoCa with key/value caches: what a captioner computes per token, once.

Model: CoCa (Yu et al., 2022, arXiv 2205.01917) as open_clip builds it; its modules and weights are used as they are.
What differs from open_clip's ``generate``: an image is encoded once and shared by its N captions, every token is
computed once (keys and values of both text stacks are kept), the image's cross-attention keys and values are computed
once, the start token and the prompt are computed once per image, and rows can leave the batch. A text tower that is
not causal (`coca_roberta-ViT-B-32`: RoBERTa sees the whole prefix from every place) changes all its outputs with each
token, so there it is open_clip's own forward again, and only the image's share is kept.

Shapes: P images, R rows (captions being written, sorted by image), T tokens, C width, H heads, D head width,
Q image tokens, V vocabulary.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from shards_spec.files import UserError

NO_COCA = "caption needs an open_clip CoCa model, such as coca_ViT-L-14: this has no text decoder"

Linear = Callable[[Tensor], Tensor]


def prepared(weight: Tensor, bias: Tensor | None) -> Linear:
    """``x @ weight.T + bias`` for weights (out, in) that are used again and again.

    On an x86 CPU the weight is reordered once for oneDNN: with the few rows of decoding that is two to three times as
    fast as a plain product, which reorders it at every call, and a row's result is the same for any number of rows.
    """
    fits = weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if weight.device.type == "cpu" and fits and platform.machine() in ("x86_64", "AMD64"):
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 32)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")
    return partial(F.linear, weight=weight, bias=bias)


class Block:
    """A pre-norm block of open_clip, its products prepared. ``query``: (.., C) to (.., 3C), or C in cross-attention."""

    def __init__(self, block: Any) -> None:
        self.block, attention, mlp = block, block.attn, block.mlp
        self.heads: int = attention.num_heads
        self.dim: int = attention.head_dim
        cross = hasattr(block, "ln_1_kv")
        share = attention.embed_dim if cross else 3 * attention.embed_dim
        self.query = prepared(attention.in_proj_weight[:share], attention.in_proj_bias[:share])
        if cross:
            self.key_value = prepared(attention.in_proj_weight[share:], attention.in_proj_bias[share:])
        self.out = prepared(attention.out_proj.weight, attention.out_proj.bias)
        self.wide = prepared(mlp.c_fc.weight, mlp.c_fc.bias)
        self.narrow = prepared(mlp.c_proj.weight, mlp.c_proj.bias)

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, T, parts·C) as ``parts`` tensors (B, H, T, D)."""
        return x.unflatten(-1, (parts, self.heads, self.dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block: ``attended`` (B, T, C) are the heads' values side by side, x (B, T, C) its input."""
        x = x + self.block.ls_1(self.out(attended))
        return x + self.block.ls_2(self.narrow(self.block.mlp.gelu(self.wide(self.block.ln_2(x)))))


@dataclass
class Cache:
    """Keys and values of one self-attention layer, preallocated: (R, H, T_max, D) each."""

    keys: Tensor
    values: Tensor

    def select(self, rows: Tensor, filled: int) -> "Cache":
        """A cache of these rows (also several times the same), ``filled`` tokens of it copied."""

        def chosen(old: Tensor) -> Tensor:
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, :filled] = old[rows, :, :filled]
            return new

        return Cache(chosen(self.keys), chosen(self.values))


@dataclass
class EncodedImages:
    """P encoded images: ``features`` (P, E), L2-normalised, and per layer keys and values (P, H, Q, D)."""

    features: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def select(self, images: Tensor) -> "EncodedImages":
        """These images only."""
        keys, values = [k[images] for k in self.keys], [v[images] for v in self.values]
        return EncodedImages(self.features[images], keys, values)


class Coca:
    """An open_clip CoCa ready to write captions; made once per model.

    ``start``, ``end``: token ids. ``barred``: ids that are never written, start and padding: the captioning loss leaves
    padding out (open_clip's `CoCaLoss`), so what the model gives for it means nothing.
    Raises UserError when the model is no CoCa.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not hasattr(model, "text_decoder") or not hasattr(model, "_encode_image"):
            raise UserError(NO_COCA)
        self.model, self.tokenizer, self.text, self.decoder = model, tokenizer, model.text, model.text_decoder
        words = getattr(tokenizer, "tokenizer", tokenizer)  # Hugging Face's stands inside open_clip's
        self.start = int(words.bos_token_id if hasattr(words, "bos_token_id") else words.sot_token_id)
        self.end = int(words.eos_token_id if hasattr(words, "eos_token_id") else words.eot_token_id)
        self._closing = self.end
        config = getattr(self.text, "config", None)
        self.pad = int(self.text.pad_id if config is None else config.pad_token_id)
        self.barred = sorted({self.start, self.pad} - {self.end})
        weight = self.decoder.text_projection
        self.dtype, self.device = weight.dtype, weight.device
        self.logits = prepared(weight.t(), None)
        self.text_blocks = [Block(b) for b in self.text.transformer.resblocks] if _is_causal(self.text) else None
        self.blocks = [Block(block) for block in self.decoder.resblocks]
        self.cross_blocks = [Block(block) for block in self.decoder.cross_attn]
        self.context_length: int = min(self.text.context_length, self.decoder.context_length)

    def prompt(self, prefix: str) -> list[int]:
        """Token ids of the words that every caption begins with. Raises UserError when they leave no room."""
        tokens = [int(token) for token in self.tokenizer([prefix])[0]]
        tokens = tokens[1 : tokens.index(self._closing, 1)]
        if self.pad in tokens or len(tokens) + 2 >= self.context_length:
            raise UserError(f"prefix {prefix!r} leaves no room for a caption among {self.context_length} places")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as one line of text."""
        words = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        return " ".join(words.decode(list(tokens)).split())

    @torch.inference_mode()
    def encode(self, images: Tensor) -> EncodedImages:
        """Images (P, 3, S, S), normalised as the model wants them, once and for all captions."""
        features, tokens = self.model._encode_image(images.to(self.device, self.dtype))
        keys, values = [], []
        for block in self.cross_blocks:
            key, value = block.split(block.key_value(block.block.ln_1_kv(tokens)), 2)
            keys.append(key.contiguous())
            values.append(value.contiguous())
        return EncodedImages(features, keys, values)

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> Tensor:
        """(len(texts), E), L2-normalised, as the model's ``encode_text``, without the work on padding.

        open_clip appends the class token behind the padding; what stands between is masked, except for one place in
        its released weights (``correct_cls_mask``).
        """
        tokens = self.tokenizer(texts).to(self.device)
        if self.text_blocks is None or self.text.cls_emb is None:
            return self.model.encode_text(tokens, normalize=True).float()
        valid, text = tokens != self.pad, self.text
        ones = valid.new_ones(len(texts), 1)
        seen = torch.cat([valid, ones] if text.correct_cls_mask else [ones, valid], 1)  # of the keys, class token last
        kept = min(int(valid.sum(1).max()) + 1, tokens.shape[1])
        places = [*range(kept), tokens.shape[1]]
        x = torch.cat([text.token_embedding(tokens[:, :kept]), text.cls_emb.expand(len(texts), 1, -1)], 1)
        x = x + text.positional_embedding[places]
        causal = torch.ones(kept + 1, kept + 1, dtype=torch.bool, device=self.device).tril()
        mask = torch.zeros(len(texts), kept + 1, kept + 1, dtype=x.dtype, device=self.device)
        mask.masked_fill_(~(causal & seen[:, None, places]), -torch.inf)
        x = text.transformer(x, attn_mask=mask.repeat_interleave(text.heads, 0))
        pooled = text.ln_final(x[:, -1])
        projection = text.text_projection
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return F.normalize(pooled.float(), dim=-1)


def _is_causal(text: Any) -> bool:
    """Whether what the tower gives for a token depends on earlier tokens alone, by blocks that `Block` knows."""
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and all(type(block) is ResidualAttentionBlock for block in text.transformer.resblocks)
    )


class Rows:
    """R captions being written side by side; at first one per image. Rows of an image are neighbours.

    ``tokens`` (R, T_max) holds what was fed, ``position`` how many tokens, ``image`` (R,) the row's image.
    """

    def __init__(self, coca: Coca, images: EncodedImages, length: int) -> None:
        """For at most ``length`` tokens, start token and prompt counted."""
        self.coca, self.images, self.position = coca, images, 0
        rows = len(images.features)
        self.tokens = torch.zeros(rows, length, dtype=torch.long, device=coca.device)

        def empty(block: Block) -> Cache:
            shape = (rows, block.heads, length, block.dim)
            return Cache(*(torch.empty(shape, dtype=coca.dtype, device=coca.device) for _ in range(2)))

        self.text_caches = [empty(block) for block in coca.text_blocks or ()]
        self.caches = [empty(block) for block in coca.blocks]
        self._place(torch.arange(rows, device=coca.device))

    def _place(self, image: Tensor) -> None:
        """Give each row its place in a grid (P, slots): cross-attention has the rows of an image as its queries."""
        self.image = image
        counts = torch.bincount(image, minlength=len(self.images.features))
        self.slots = int(counts.max())
        rank = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
        self.grid = None if len(image) == len(counts) * self.slots else image * self.slots + rank

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (R',), sorted by image; a row may stand there several times. Images without a row
        are dropped."""
        self.tokens = self.tokens[rows]
        for caches in (self.text_caches, self.caches):
            for layer, cache in enumerate(caches):  # one by one: never two copies of them all
                caches[layer] = cache.select(rows, self.position)
        kept, image = torch.unique(self.image[rows], return_inverse=True)
        if len(kept) < len(self.images.features):
            self.images = self.images.select(kept)
        self._place(image)

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Append ``tokens`` (R, T) and return the float32 logits (R, V) of what comes next.

        T is 1 but for the first call, which may bring a prompt.
        """
        coca, first, last = self.coca, self.position, self.position + tokens.shape[1]
        self.tokens[:, first:last] = tokens
        if coca.text_blocks is None:
            x = coca.text(self.tokens[:, :last])[1]
            if x.shape[1] != last:
                raise UserError("this CoCa's text tower gives no output for one of its tokens: it cannot be decoded")
            first = 0
        else:
            x = coca.text.token_embedding(tokens) + coca.text.positional_embedding[first:last]
            for block, cache in zip(coca.text_blocks, self.text_caches, strict=True):
                x = _self_attend(block, cache, x, first)
            if coca.text.cls_emb is None:
                x = coca.text.ln_final(x)
        layers = zip(coca.blocks, self.caches, coca.cross_blocks, self.images.keys, self.images.values, strict=True)
        for block, cache, cross_block, keys, values in layers:
            x = _self_attend(block, cache, x, first)
            x = self._cross_attend(cross_block, keys, values, x)
        self.position = last
        return coca.logits(coca.decoder.ln_final(x[:, -1])).float()

    def _cross_attend(self, block: Block, keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
        """x (R, T, C) against the image's (P, H, Q, D), which are not copied for its rows."""
        query, tokens = block.query(block.block.ln_1(x)), x.shape[1]
        if self.grid is not None:
            scattered = query.new_zeros(len(keys) * self.slots, tokens, query.shape[-1])
            query = scattered.index_copy_(0, self.grid, query)
        (queries,) = block.split(query.view(len(keys), self.slots * tokens, -1), 1)
        attended = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        attended = attended.reshape(len(keys) * self.slots, tokens, -1)
        return block.after(x, attended if self.grid is None else attended[self.grid])


def _self_attend(block: Block, cache: Cache, x: Tensor, first: int) -> Tensor:
    """A causal block on x (R, T, C), the tokens from place ``first`` on; T is 1 or ``first`` is 0."""
    last = first + x.shape[1]
    query, key, value = block.split(block.query(block.block.ln_1(x)), 3)
    cache.keys[:, :, first:last], cache.values[:, :, first:last] = key, value
    keys, values = cache.keys[:, :, :last], cache.values[:, :, :last]
    attended = F.scaled_dot_product_attention(query, keys, values, is_causal=x.shape[1] > 1)
    return block.after(x, attended.transpose(1, 2).flatten(2))
