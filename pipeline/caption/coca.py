"""open_clip's CoCa with key/value caches: what a captioner computes per token is computed once.

Model: CoCa (Yu et al., 2022, arXiv 2205.01917) as open_clip builds it; its modules and weights are used as they are.
What differs from open_clip's ``generate``: an image is encoded once and shared by its N captions, every token is
computed once (keys and values of both text stacks are kept), the image's cross-attention keys and values are computed
once, the start token and the prompt are computed once per image, and rows can leave the batch. A text tower that is
not causal (`coca_roberta-ViT-B-32`: RoBERTa attends to the whole text from every position) changes all its outputs
with each token; there open_clip's own forward pass runs again, and only the image's share is kept.

Shapes: P images, R rows (captions being written, sorted by image), T tokens, C width, H heads, D head width,
Q image tokens, V vocabulary, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.caption.kernels import attention_kernel, norm_kernel
from pipeline.caption.prepacked_linear import prepack_linear
from shards_spec.files import UserError

NO_COCA = "caption needs an open_clip CoCa model, such as coca_ViT-L-14: this has no text decoder"


Residual = tuple[Tensor, Tensor | None]  # what a block gives: the sum of both (B, T, C)


def add_and_norm(residual: Residual, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The sum x (B, T, C) and its layer norm; the parts of the sum may be overwritten."""
    x, delta = residual
    if delta is None:
        return x, norm(x)
    kernel = norm_kernel(x.device)
    if kernel and x.is_contiguous() and delta.is_contiguous():
        return x, kernel(x, delta, norm.weight, norm.bias, norm.eps)
    x = x + delta
    return x, norm(x)


class DecodingBlock:
    """A pre-norm transformer block of open_clip with prepacked weights, for self- or cross-attention.

    ``project_query`` maps (.., C) to (.., 3C), queries, keys and values, in self-attention, and to (.., C) in
    cross-attention, where ``project_key_value`` maps to (.., 2C).
    """

    def __init__(self, block: Any) -> None:
        attention, mlp = block.attn, block.mlp
        self.block = block
        self.heads: int = attention.num_heads
        self.head_width: int = attention.head_dim
        is_cross = hasattr(block, "ln_1_kv")
        queries = attention.embed_dim if is_cross else 3 * attention.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.project_query = prepack_linear(weight[:queries], bias[:queries])
        if is_cross:
            self.project_key_value = prepack_linear(weight[queries:], bias[queries:])
        self.project_out = prepack_linear(attention.out_proj.weight, attention.out_proj.bias)
        self.mlp_in = prepack_linear(mlp.c_fc.weight, mlp.c_fc.bias)
        self.mlp_out = prepack_linear(mlp.c_proj.weight, mlp.c_proj.bias)
        self.attend = attention_kernel(self.head_width, weight.dtype, weight.device)

    def split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, T, parts·C) as ``parts`` tensors (B, H, T, D)."""
        split = x.view(*x.shape[:2], parts, self.heads, self.head_width)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def after_attention(self, x: Tensor, attended: Tensor) -> Residual:
        """The rest of the block: ``attended`` (B, T, C) are the heads' values side by side, x (B, T, C) its input."""
        x, normed = add_and_norm((x, self.block.ls_1(self.project_out(attended))), self.block.ln_2)
        hidden = self.block.mlp.gelu(self.mlp_in(normed))
        return x, self.block.ls_2(self.mlp_out(hidden))


@dataclass
class KeyValueCache:
    """Keys and values of one self-attention layer, preallocated: (R, H, T_max, D) each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, block: DecodingBlock, rows: int, length: int, like: Tensor) -> "KeyValueCache":
        """Room for ``length`` tokens of each row in ``block``, with the type and device of ``like``."""
        shape = (rows, block.heads, length, block.head_width)
        return cls(like.new_empty(shape), like.new_empty(shape))

    def first(self, rows: int) -> "KeyValueCache":
        """The first rows, in the same memory."""
        return KeyValueCache(self.keys[:rows], self.values[:rows])

    def select(self, rows: Tensor, filled: int) -> "KeyValueCache":
        """A cache of these rows, also several times the same; the first ``filled`` tokens are copied."""

        def selected(old: Tensor) -> Tensor:
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, :filled] = old[rows, :, :filled]
            return new

        return KeyValueCache(selected(self.keys), selected(self.values))


@dataclass
class EncodedImages:
    """P encoded images: ``features`` (P, E), L2-normalised, and per decoder layer keys and values (P, H, Q, D)."""

    features: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def select(self, images: Tensor) -> "EncodedImages":
        """These images only."""
        keys = [layer[images] for layer in self.keys]
        values = [layer[images] for layer in self.values]
        return EncodedImages(self.features[images], keys, values)

    def first(self, count: int) -> "EncodedImages":
        """The first images, in the same memory."""
        keys = [layer[:count] for layer in self.keys]
        values = [layer[:count] for layer in self.values]
        return EncodedImages(self.features[:count], keys, values)

    def room(self, count: int) -> "EncodedImages":
        """Zeros for ``count`` images of the same model."""

        def zeros(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(count, *tensor.shape[1:])

        keys = [zeros(layer) for layer in self.keys]
        values = [zeros(layer) for layer in self.values]
        return EncodedImages(zeros(self.features), keys, values)


class Coca:
    """An open_clip CoCa ready to write captions; made once per model.

    ``start``, ``end``: token ids. ``suppressed_tokens``: ids that are never written, start and padding: the captioning
    loss leaves padding out (open_clip's `CoCaLoss`), so what the model predicts for it means nothing.
    Raises UserError when the model is no CoCa.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not hasattr(model, "text_decoder"):
            raise UserError(NO_COCA)
        self.model = model
        self.tokenizer = tokenizer
        self.text = model.text
        self.decoder = model.text_decoder
        vocabulary = self._vocabulary()
        self.start = int(vocabulary.bos_token_id if hasattr(vocabulary, "bos_token_id") else vocabulary.sot_token_id)
        self.end = int(vocabulary.eos_token_id if hasattr(vocabulary, "eos_token_id") else vocabulary.eot_token_id)
        self._tokenizer_end = self.end
        hugging_face = getattr(self.text, "config", None)
        self.pad = int(self.text.pad_id if hugging_face is None else hugging_face.pad_token_id)
        self.suppressed_tokens = sorted({self.start, self.pad} - {self.end})
        weight = self.decoder.text_projection
        self.dtype = weight.dtype
        self.device = weight.device
        self.suppressed_ids = torch.tensor(self.suppressed_tokens, dtype=torch.long, device=self.device)
        self.logits = prepack_linear(weight.t(), None)
        self.text_blocks: list[DecodingBlock] | None = None
        if _is_causal(self.text):
            self.text_blocks = [DecodingBlock(block) for block in self.text.transformer.resblocks]
        self.blocks = [DecodingBlock(block) for block in self.decoder.resblocks]
        self.cross_blocks = [DecodingBlock(block) for block in self.decoder.cross_attn]
        self.context_length: int = min(self.text.context_length, self.decoder.context_length)

    def _vocabulary(self) -> Any:
        """The tokenizer that knows ids and words; Hugging Face's is wrapped by open_clip's."""
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)

    def prompt_tokens(self, prefix: str) -> list[int]:
        """Token ids of the words that every caption begins with. Raises UserError when they leave no room."""
        if not prefix:
            return []
        tokens = [int(token) for token in self.tokenizer([prefix])[0]]
        tokens = tokens[1 : tokens.index(self._tokenizer_end, 1)]
        if self.pad in tokens or len(tokens) + 2 >= self.context_length:
            raise UserError(f"prefix {prefix!r} leaves no room for a caption among {self.context_length} places")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as one line of text."""
        return " ".join(self._vocabulary().decode(list(tokens)).split())

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> EncodedImages:
        """Encode preprocessed images (P, 3, S, S), once for all their captions."""
        features, tokens = self.model.visual(images.to(self.device, self.dtype, non_blocking=True))
        keys = []
        values = []
        for block in self.cross_blocks:
            key, value = block.split_heads(block.project_key_value(block.block.ln_1_kv(tokens)), 2)
            keys.append(key.contiguous())
            values.append(value.contiguous())
        return EncodedImages(F.normalize(features, dim=-1), keys, values)

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> Tensor:
        """(len(texts), E) float32, L2-normalised: the model's ``encode_text``, without the work on padding.

        open_clip appends the class token behind the padding; what stands between is masked, except for one position in
        its released weights (``correct_cls_mask``).
        """
        tokens = self.tokenizer(texts).to(self.device)
        text = self.text
        if self.text_blocks is None or text.cls_emb is None:
            encoded: Tensor = self.model.encode_text(tokens, normalize=True)
            return encoded.float()
        longest = int((tokens != self.pad).sum(1).max())
        kept = min(longest + 1, tokens.shape[1])
        positions = [*range(kept), tokens.shape[1]]  # and the class token's
        words = text.token_embedding(tokens[:, :kept])
        x = torch.cat([words, text.cls_emb.expand(len(texts), 1, -1)], 1) + text.positional_embedding[positions]
        mask = self._class_token_mask(tokens, positions).to(x.dtype)
        x = text.transformer(x, attn_mask=mask.repeat_interleave(text.heads, 0))
        pooled = text.ln_final(x[:, -1])
        projection = text.text_projection
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return F.normalize(pooled.float(), dim=-1)

    def _class_token_mask(self, tokens: Tensor, positions: list[int]) -> Tensor:
        """Additive attention mask (B, T, T) of the text tower for tokens (B, T_full) cut to ``positions``."""
        valid = tokens != self.pad
        class_token = valid.new_ones(len(tokens), 1)
        columns = [valid, class_token] if self.text.correct_cls_mask else [class_token, valid]
        visible = torch.cat(columns, 1)[:, None, positions]
        count = len(positions)
        causal = torch.ones(count, count, dtype=torch.bool, device=self.device).tril()
        mask = torch.zeros(len(tokens), count, count, device=self.device)
        return mask.masked_fill_(~(causal & visible), -torch.inf)


def _is_causal(text: Any) -> bool:
    """Whether the tower's output at a token depends on earlier tokens alone, by blocks that `DecodingBlock` knows."""
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and all(type(block) is ResidualAttentionBlock for block in text.transformer.resblocks)
    )


@dataclass
class DecoderState:
    """R captions being written side by side. Rows of an image are neighbours.

    ``tokens`` (R, T_max) holds the tokens so far, ``position`` is their number, ``image`` (R,) is each row's image.
    Cross-attention takes the rows of an image as its queries: each row has a place in a grid (P, ``slots``), ``grid``
    (R,), None where the rows in their order fill it.
    """

    coca: Coca
    images: EncodedImages
    tokens: Tensor
    text_caches: list[KeyValueCache]
    caches: list[KeyValueCache]
    image: Tensor
    grid: Tensor | None = None
    slots: int = 1
    position: int = 0

    @classmethod
    def empty(cls, coca: Coca, images: EncodedImages, length: int) -> "DecoderState":
        """A caption per image, with room for ``length`` tokens, start token and prompt counted."""
        rows = len(images.features)
        image = torch.arange(rows, device=coca.device)
        weight = coca.decoder.text_projection

        def caches(blocks: Sequence[DecodingBlock]) -> list[KeyValueCache]:
            return [KeyValueCache.empty(block, rows, length, weight) for block in blocks]

        tokens = image.new_zeros(rows, length)
        return cls(coca, images, tokens, caches(coca.text_blocks or ()), caches(coca.blocks), image)

    def _assign_slots(self, image: Tensor) -> None:
        """Give each row its place in the grid."""
        self.image = image
        counts = torch.bincount(image, minlength=len(self.images.features))
        self.slots = int(counts.max())
        first_row = counts.cumsum(0) - counts
        rank = torch.arange(len(image), device=image.device) - first_row[image]
        is_full = len(image) == len(counts) * self.slots
        self.grid = None if is_full else image * self.slots + rank

    def select(self, rows: Tensor) -> None:
        """Keep these rows (R',), sorted by image; a row may be kept several times. Images without a row are dropped."""
        self.tokens = self.tokens[rows]
        for caches in (self.text_caches, self.caches):
            for layer, cache in enumerate(caches):  # one by one: there are never two copies of them all
                caches[layer] = cache.select(rows, self.position)
        kept, image = torch.unique(self.image[rows], return_inverse=True)
        if len(kept) < len(self.images.features):
            self.images = self.images.select(kept)
        self._assign_slots(image)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append ``tokens`` (R, T) and return the float32 logits (R, V) of the next token.

        T is 1 but for the first call, which may bring a prompt.
        """
        coca = self.coca
        first = self.position
        last = first + tokens.shape[1]
        self.tokens[:, first:last] = tokens
        residual = self._text_outputs(tokens)
        if coca.text_blocks is None:
            first = 0  # the text tower ran over the whole text, and so does the decoder
        layers = zip(coca.blocks, self.caches, coca.cross_blocks, self.images.keys, self.images.values, strict=True)
        for block, cache, cross_block, keys, values in layers:
            residual = _self_attention(block, cache, residual, first)
            residual = self._cross_attention(cross_block, keys, values, residual)
        self.position = last
        x, delta = residual
        newest = x[:, -1:], None if delta is None else delta[:, -1:]
        return coca.logits(add_and_norm(newest, coca.decoder.ln_final)[1][:, 0]).float()

    def _text_outputs(self, tokens: Tensor) -> Residual:
        """Outputs (R, T, C) of the text tower for the newest tokens, or for all of them where it is not causal."""
        coca = self.coca
        first = self.position
        last = first + tokens.shape[1]
        if coca.text_blocks is None:
            outputs: Tensor = coca.text(self.tokens[:, :last])[1]
            if outputs.shape[1] != last:
                raise UserError("this CoCa's text tower gives no output for one of its tokens: it cannot be decoded")
            return outputs, None
        residual: Residual = (coca.text.token_embedding(tokens) + coca.text.positional_embedding[first:last], None)
        for block, cache in zip(coca.text_blocks, self.text_caches, strict=True):
            residual = _self_attention(block, cache, residual, first)
        if coca.text.cls_emb is None:
            return add_and_norm(residual, coca.text.ln_final)[1], None
        return residual

    def _cross_attention(self, block: DecodingBlock, keys: Tensor, values: Tensor, residual: Residual) -> Residual:
        """A block on (R, T, C) with the images' keys and values (P, H, Q, D), which are not copied for each row."""
        x, normed = add_and_norm(residual, block.block.ln_1)
        query = block.project_query(normed)
        tokens = x.shape[1]
        if self.grid is not None:
            scattered = query.new_zeros(len(keys) * self.slots, tokens, query.shape[-1])
            query = scattered.index_copy_(0, self.grid, query)
        (queries,) = block.split_heads(query.view(len(keys), self.slots * tokens, -1), 1)
        attended = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        attended = attended.reshape(len(keys) * self.slots, tokens, -1)
        return block.after_attention(x, attended if self.grid is None else attended[self.grid])


def _self_attention(block: DecodingBlock, cache: KeyValueCache, residual: Residual, first: int) -> Residual:
    """A causal block on (R, T, C), the tokens from position ``first`` on; T is 1 or ``first`` is 0."""
    x, normed = add_and_norm(residual, block.block.ln_1)
    last = first + x.shape[1]
    projected = block.project_query(normed)
    if block.attend and x.shape[1] == 1:
        return block.after_attention(x, block.attend(projected, cache.keys, cache.values, first))
    query, key, value = block.split_heads(projected, 3)
    cache.keys[:, :, first:last] = key
    cache.values[:, :, first:last] = value
    keys = cache.keys[:, :, :last]
    values = cache.values[:, :, :last]
    attended = F.scaled_dot_product_attention(query, keys, values, is_causal=x.shape[1] > 1)
    return block.after_attention(x, attended.transpose(1, 2).flatten(2))
