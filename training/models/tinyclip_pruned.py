"""CLIPs whose layers have their own numbers of heads and neurons, with or without masks (TinyCLIP, arXiv 2309.12314).

The two towers are open_clip's ViT and text transformer with names and numbers kept: with the sizes of a plain model
they have its state dict (the text tower's names begin with ``text.``) and compute the same. A tower's description has
the width D, the heads and the neurons of each layer, and the size before any pruning, by which the sparsity is counted;
``masks`` gives it the log-alphas of `TowerMasks`, which act at each forward pass.

A layer that has lost all heads adds a constant, its out_proj.bias, and one without neurons its c_proj.bias; the norms
before them are gone. Importing this module makes the towers known to `open_clip.create_model`.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, text_global_pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shards_spec.open_clip_plugins import register_towers
from training.losses.sparsity import TowerSize
from training.models.tinyclip_masks import KeptDims, TowerMasks, kept_dims, masked_layer_norm, masked_weight

TOWER = "tinyclip"  # "tower" of vision_cfg and text_cfg; the rest of them are the towers' arguments
EMBEDDING_STD = 0.02
PREPROCESSING = ("image_mean", "image_std", "preprocess_cfg")  # what open_clip notes on an image tower


class LayerMasks(NamedTuple):
    """What a block needs of `MaskValues`."""

    dims: Tensor
    """(D,)"""
    kept: KeptDims
    """those whose mask is not 0"""
    heads: Tensor
    """(H,) of the layer"""
    neurons: Tensor
    """(F,) of the layer"""


class ConstantLinear(nn.Module):
    """What is left of a linear layer without inputs: its bias (D,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))


class PrunedAttention(nn.Module):
    """Attention of some heads over tokens of any width, with the names of torch's.

    Args:
        width: D.
        heads: H; without heads there is a constant output.
        head_width: Of one head; the scale of the similarities is head_width**-0.5.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = head_width
        inner = heads * head_width
        if heads:
            self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * inner, width)))
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner))
        self.out_proj: Any = nn.Linear(inner, width) if heads else ConstantLinear(width)

    def forward(self, x: Tensor, causal: bool, masks: LayerMasks | None) -> Tensor:
        """Return attention over tokens (B, T, D), of that shape."""
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = packed.view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)
        weight, bias = self.out_proj.weight, self.out_proj.bias
        if masks is not None:
            per_column = masks.heads.unsqueeze(1).expand(-1, self.head_dim).flatten()
            weight, bias = masked_weight(weight, masks.dims, per_column), bias * masks.dims
        return F.linear(mixed, weight, bias)


class PrunedBlock(nn.Module):
    """A pre-norm transformer block with its own numbers of heads and neurons.

    Args:
        width: D.
        heads: H.
        neurons: F.
        head_width: Of one head.
        activation: Makes the MLP's activation.
        norm_eps: Of the LayerNorms.
    """

    def __init__(
        self, width: int, heads: int, neurons: int, *, head_width: int, activation: Any, norm_eps: float
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, norm_eps) if heads else None
        self.attn = PrunedAttention(width, heads, head_width)
        self.ln_2 = nn.LayerNorm(width, norm_eps) if neurons else None
        layers = OrderedDict[str, nn.Module]()
        if neurons:
            layers |= {"c_fc": nn.Linear(width, neurons), "gelu": activation()}
        layers["c_proj"] = nn.Linear(neurons, width) if neurons else ConstantLinear(width)
        self.mlp: Any = nn.Sequential(layers)

    def forward(self, x: Tensor, causal: bool, masks: LayerMasks | None = None) -> Tensor:
        """Return the block's output for tokens (B, T, D), of that shape."""
        kept = None if masks is None else masks.kept
        if self.ln_1 is None:
            x = x + constant(self.attn.out_proj, masks).to(x.dtype)
        else:
            x = x + self.attn(normed(x, self.ln_1, kept), causal, masks)
        if self.ln_2 is None:
            return x + constant(self.mlp.c_proj, masks).to(x.dtype)
        inner = self.mlp.gelu(self.mlp.c_fc(normed(x, self.ln_2, kept)))
        weight, bias = self.mlp.c_proj.weight, self.mlp.c_proj.bias
        if masks is not None:
            weight, bias = masked_weight(weight, masks.dims, masks.neurons), bias * masks.dims
        return x + F.linear(inner, weight, bias)


def constant(layer: nn.Module, masks: LayerMasks | None) -> Tensor:
    """Return the output (D,) of a linear layer without inputs."""
    bias: Tensor = layer.bias  # type: ignore[assignment]
    return bias if masks is None else bias * masks.dims


def normed(x: Tensor, norm: nn.LayerNorm, kept: KeptDims | None) -> Tensor:
    """Return the LayerNorm of x (..., D), over the kept dimensions where there are masks, in the dtype of x."""
    if kept is not None:
        return masked_layer_norm(x, norm, kept)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


class PrunedPooler(nn.Module):
    """open_clip's attentional pooling: a few learned queries over the tokens, (B, T, D) -> (B, Q, E).

    Its names are open_clip's, but queries, keys and values have a matrix each, also where D is E.

    Args:
        width: D.
        embed_dim: E.
        heads: Of the attention.
        queries: Q.
        norm_eps: Of the LayerNorms.
    """

    def __init__(self, width: int, embed_dim: int, *, heads: int, queries: int, norm_eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, embed_dim))
        self.ln_q = nn.LayerNorm(embed_dim, norm_eps)
        self.ln_k = nn.LayerNorm(width, norm_eps)
        self.attn = nn.Module()
        for name, columns in (("q", embed_dim), ("k", width), ("v", width)):
            matrix = nn.Parameter(nn.init.xavier_uniform_(torch.empty(embed_dim, columns)))
            self.attn.register_parameter(f"{name}_proj_weight", matrix)
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.attn.out_proj = nn.Linear(embed_dim, embed_dim)
        self.num_heads = heads

    def forward(self, x: Tensor, kept: KeptDims | None) -> Tensor:
        """Return what the queries find in tokens (B, T, D), (B, Q, E)."""
        attn: Any = self.attn
        biases = attn.in_proj_bias.chunk(3)
        keys = normed(x, self.ln_k, kept)
        query = F.linear(normed(self.query, self.ln_q, None), attn.q_proj_weight, biases[0])
        key = F.linear(keys, attn.k_proj_weight, biases[1])
        value = F.linear(keys, attn.v_proj_weight, biases[2])
        mixed = F.scaled_dot_product_attention(
            self._by_head(query.expand(x.shape[0], -1, -1)), self._by_head(key), self._by_head(value)
        )
        found: Tensor = attn.out_proj(mixed.transpose(1, 2).flatten(2))
        return found

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, N, E) -> (B, H, N, E / H)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class PrunedTransformer(nn.Module):
    """The blocks of a tower.

    Args:
        size: The tower's description: ``width``, ``heads``, ``neurons``, ``head_width``, ``norm_eps``.
        activation: Makes an activation.
    """

    def __init__(self, size: dict[str, Any], activation: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            PrunedBlock(
                size["width"],
                heads,
                neurons,
                head_width=size["head_width"],
                activation=activation,
                norm_eps=size["norm_eps"],
            )
            for heads, neurons in zip(size["heads"], size["neurons"], strict=True)
        )

    def forward(self, x: Tensor, causal: bool, masks: Sequence[LayerMasks | None]) -> Tensor:
        """Return tokens (B, T, D) after all blocks; ``masks`` are those of each block."""
        for block, own in zip(self.resblocks, masks, strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, own, use_reentrant=False)  # masks were sampled outside
            else:
                x = block(x, causal, own)
        return x


class PrunedTower(nn.Module):
    """What both towers have in common.

    Attributes:
        description: The arguments that rebuild the tower, as its part of open_clip's model config has them.
        quick_gelu: Whether the activation is QuickGELU.
        output_dim: E.
        masks: The log-alphas; None when nothing is masked.
        original: The tower before any pruning.
    """

    description: dict[str, Any]
    quick_gelu: bool
    output_dim: int
    transformer: PrunedTransformer
    masks: TowerMasks | None

    def _describe(self, description: dict[str, Any], quick_gelu: bool) -> None:
        """Keep the description and make the parts that depend on nothing else."""
        self.description = description
        self.quick_gelu = quick_gelu
        activation = QuickGELU if quick_gelu else nn.GELU
        self.transformer = PrunedTransformer(description, partial(activation, **(description["act_kwargs"] or {})))
        self.masks = None
        if description["masks"]:
            sizes = (description["width"], description["heads"], description["neurons"])
            self.masks = TowerMasks(*sizes, self.original)

    @property
    def original(self) -> TowerSize:
        """The tower before any pruning; its number of layers stays."""
        return TowerSize(**self.description["original"], layers=len(self.description["heads"]))

    def rebuilt(self, description: dict[str, Any], state: Mapping[str, Tensor]) -> Self:
        """Return a tower of the same kind, mode and device with other sizes, and copies of these tensors as weights.

        No random numbers are drawn: it may be made in the middle of a training.

        Args:
            description: Of the new tower.
            state: Its state dict.
        """
        with torch.device("meta"):
            tower = type(self)(self.output_dim, self.quick_gelu, **description)
        tower.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
        tower.set_grad_checkpointing(self.transformer.grad_checkpointing)
        for name in PREPROCESSING:
            if hasattr(self, name):
                setattr(tower, name, getattr(self, name))
        return tower.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass in place of keeping their activations."""
        self.transformer.grad_checkpointing = enable

    def _masked(self, x: Tensor, uniform: Tensor | None) -> tuple[Tensor, KeptDims | None, list[LayerMasks | None]]:
        """Return the embedded tokens and the masks of LayerNorms and blocks; all of them None without masks."""
        if self.masks is None:
            return x, None, [None] * len(self.transformer.resblocks)
        values = self.masks(uniform)
        kept = kept_dims(values.dims)
        pairs = zip(values.heads, values.neurons, strict=True)
        layers: list[LayerMasks | None] = [LayerMasks(values.dims, kept, heads, neurons) for heads, neurons in pairs]
        return x * values.dims.to(x.dtype), kept, layers


class PrunedImageTower(PrunedTower):
    """A ViT, pixels (B, 3, S, S) -> features (B, E).

    Args:
        embed_dim: E.
        quick_gelu: Whether the activation is QuickGELU.
        description: Of the tower. ``image_size`` and ``patch_size`` are in pixels, ``pool_type`` is "tok" or "avg",
            ``final_ln_after_pool`` and ``no_ln_pre`` are open_clip's. ``attn_pool``, if there, has the ``heads``,
            ``queries`` and ``norm_eps`` of an attentional pooling.
    """

    def __init__(self, embed_dim: int, quick_gelu: bool = False, **description: Any) -> None:
        super().__init__()
        self._describe(description, quick_gelu)
        width, patch = description["width"], description["patch_size"]
        self.image_size = (description["image_size"],) * 2
        self.patch_size = (patch, patch)
        self.grid_size = (description["image_size"] // patch,) * 2
        self.output_dim = embed_dim
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * EMBEDDING_STD)
        positions = self.grid_size[0] * self.grid_size[1] + 1
        self.positional_embedding = nn.Parameter(torch.randn(positions, width) * EMBEDDING_STD)
        self.ln_pre = None if description["no_ln_pre"] else nn.LayerNorm(width, description["norm_eps"])
        pooler = description.get("attn_pool")
        self.attn_pool = None
        if pooler is not None:
            self.attn_pool = PrunedPooler(width, embed_dim, **pooler)
        pooled = width if pooler is None else embed_dim
        self.ln_post = nn.LayerNorm(pooled, description["norm_eps"])
        self.proj: nn.Parameter | None = nn.Parameter(torch.randn(pooled, embed_dim) * pooled**-0.5)

    def forward(self, pixels: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Return features (B, E), not normalised; without the projection ``proj``, what it is of.

        Args:
            pixels: (B, 3, S, S).
            uniform: Numbers for the sample of masks, as `TowerMasks.draw` returns them; None draws them.
        """
        patches = self.conv1(pixels).flatten(2).mT
        batch = patches.shape[0]  # len() would fix the batch size of an ONNX graph
        first = self.class_embedding.to(patches.dtype).expand(batch, 1, -1)
        x = torch.cat((first, patches), dim=1) + self.positional_embedding.to(patches.dtype)
        x, kept, layers = self._masked(x, uniform)
        if self.ln_pre is not None:
            x = normed(x, self.ln_pre, kept)
        x = self.transformer(x, False, layers)
        pooled = self._pooled(x, kept)
        return pooled if self.proj is None else pooled @ self.proj

    def _pooled(self, x: Tensor, kept: KeptDims | None) -> Tensor:
        """Return the normed and pooled tokens: (B, T, D) -> (B, D), or (B, E) of an attentional pooling."""
        if self.attn_pool is not None:
            return self._pool(normed(self.attn_pool(x, kept), self.ln_post, None))
        if self.description["pool_type"] == "tok" or self.description["final_ln_after_pool"]:
            return normed(self._pool(x), self.ln_post, kept)
        return self._pool(normed(x, self.ln_post, kept))

    def _pool(self, x: Tensor) -> Tensor:
        """Return the first token, or the mean of the others: (B, T, D) -> (B, D)."""
        return x[:, 0] if self.description["pool_type"] == "tok" else x[:, 1:].mean(1)


class PrunedTextTower(PrunedTower):
    """A text transformer, tokens (B, T) int64 -> features (B, E).

    Args:
        embed_dim: E.
        quick_gelu: Whether the activation is QuickGELU.
        description: Of the tower. ``pool_type`` says whose token's feature is taken, as in open_clip: "argmax" (the
            highest id), "first", "last" or "eos" (the first that is ``eos_id``); ``no_causal_mask`` is open_clip's.
    """

    def __init__(self, embed_dim: int, quick_gelu: bool = False, **description: Any) -> None:
        super().__init__()
        self._describe(description, quick_gelu)
        width = description["width"]
        self.context_length = description["context_length"]
        self.vocab_size = description["vocab_size"]
        self.output_dim = embed_dim
        self.token_embedding = nn.Embedding(self.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=EMBEDDING_STD)
        self.positional_embedding = nn.Parameter(torch.randn(self.context_length, width) * EMBEDDING_STD / 2)
        self.ln_final = nn.LayerNorm(width, description["norm_eps"])
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, tokens: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Return features (B, E), not normalised.

        Args:
            tokens: (B, T) int64.
            uniform: Numbers for the sample of masks, as `TowerMasks.draw` returns them; None draws them.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x, kept, layers = self._masked(x, uniform)
        x = self.transformer(x, not self.description["no_causal_mask"], layers)
        pooled = text_global_pool(x, tokens, self.description["pool_type"], self.description["eos_id"])
        return normed(pooled, self.ln_final, kept) @ self.text_projection


register_towers(TOWER, PrunedImageTower, PrunedTextTower)
