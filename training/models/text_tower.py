"""MobileCLIP-S0's text tower (Apple's "mct"; MobileCLIP, arXiv 2311.17049, section 4.2), plain or with SAS-P blocks.

Token and position embeddings, a RepMixer block, pre-LN transformer layers, a RepMixer block, LayerNorm, projection at
the end-of-text token. There is no attention mask. The original is apple/ml-mobileclip; what differs here: tokens stay
(B, T, C) outside of the depthwise convolutions, which are Conv1d, and 1x1 convolutions are Linear. LayerNorm is in
float32 there; torch's is too, under autocast and inside its bf16 and fp16 kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models.siclip import SasBlock, SasStack

LAYER_SCALE = 1e-5
STD = 0.02  # of weights at the start


def fused_bn(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift, each (C,), that a BatchNorm applies in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def depthwise(dim: int, kernel_size: int) -> nn.Conv1d:
    """Return a convolution over tokens (B, C, T) that keeps their number, without a bias."""
    return nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)


def fused_conv(weight: Tensor, bias: Tensor) -> nn.Conv1d:
    """Return `depthwise` with these weights (C, 1, K) and a bias (C,)."""
    fused = depthwise(len(weight), weight.shape[-1])
    fused.weight = nn.Parameter(weight)
    fused.bias = nn.Parameter(bias)
    return fused


class RepMixer(nn.Module):
    """Mixes tokens (B, C, T) by a convolution over ``kernel_size`` of them (FastViT, arXiv 2303.14189, section 3.2).

    The output is x + layer_scale (mixer(x) - norm(x)), where mixer is the sum of convolution and skip, each with a
    BatchNorm.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size)
        self.bn = nn.BatchNorm1d(dim)
        self.skip = nn.BatchNorm1d(dim)
        self.norm = nn.BatchNorm1d(dim)
        self.layer_scale = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """Return mixed tokens, (B, C, T) -> (B, C, T)."""
        change: Tensor = self.bn(self.conv(x)) + self.skip(x) - self.norm(x)
        return x + self.layer_scale.unsqueeze(-1) * change

    @torch.no_grad()
    def fuse(self) -> nn.Conv1d:
        """Return one convolution, equal in eval mode; timm's `reparameterize_model` replaces the module by it."""
        kernel, shift = fused_bn(self.bn)
        skip, skip_shift = fused_bn(self.skip)
        norm, norm_shift = fused_bn(self.norm)
        weight = self.conv.weight * (self.layer_scale * kernel).view(-1, 1, 1)
        weight[:, 0, weight.shape[-1] // 2] += 1 + self.layer_scale * (skip - norm)
        return fused_conv(weight, self.layer_scale * (shift + skip_shift - norm_shift))


class ConvBn(nn.Module):
    """A depthwise convolution over tokens (B, C, T), then a BatchNorm."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size)
        self.bn = nn.BatchNorm1d(dim)
        nn.init.trunc_normal_(self.conv.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, T) of (B, C, T)."""
        normed: Tensor = self.bn(self.conv(x))
        return normed

    @torch.no_grad()
    def fuse(self) -> nn.Conv1d:
        """Return one convolution that is equal in eval mode."""
        scale, shift = fused_bn(self.bn)
        return fused_conv(self.conv.weight * scale.view(-1, 1, 1), shift)


class FeedForward(nn.Module):
    """Linear, GELU, Linear on (B, T, C), four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, C) of (B, T, C)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class RepMixerBlock(nn.Module):
    """A RepMixer, then an FFN that begins with a depthwise convolution, on (B, T, C)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.token_mixer = RepMixer(dim, kernel_size)
        self.conv = ConvBn(dim, kernel_size)
        self.ffn = FeedForward(dim)
        self.layer_scale = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, C) of (B, T, C)."""
        mixed = self.token_mixer(x.mT)
        out: Tensor = mixed.mT + self.layer_scale * self.ffn(self.conv(mixed).mT)
        return out


class TransformerLayer(nn.Module):
    """Pre-LN self-attention and FFN on (B, T, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, C) of (B, T, C)."""
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        x = x + self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class TextTower(nn.Module):
    """Tokens (B, T) to features (B, embed_dim), with the attributes that open_clip's CustomTextCLIP needs.

    SAS-P blocks have one LayerNorm, and biases in Wq and Wk, like the layers that they replace.

    Args:
        embed_dim: Width of the features.
        context_length: T.
        vocab_size: Number of tokens of the tokenizer.
        width: C.
        heads: Attention heads of a layer.
        layers: Number of layers.
        kernel_size: Tokens that a RepMixer mixes; 0 leaves the RepMixer blocks out (MobileCLIP2-S0).
        share: 0 for transformer layers (MobileCLIP-S0); else SAS-P blocks (SiCLIP), of which groups of that many share
            Wq and Wk.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        context_length: int,
        vocab_size: int,
        width: int,
        heads: int,
        layers: int,
        kernel_size: int,
        share: int,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.grad_checkpointing = False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.first = RepMixerBlock(width, kernel_size) if kernel_size else nn.Identity()
        if share:
            blocks = [SasBlock(nn.LayerNorm(width), FeedForward(width), heads) for _ in range(layers)]
            self.layers = nn.Sequential(SasStack(blocks, width, bias=True, share=share))
        else:
            self.layers = nn.Sequential(*(TransformerLayer(width, heads) for _ in range(layers)))
        self.last = RepMixerBlock(width, kernel_size) if kernel_size else nn.Identity()
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=STD)
        nn.init.trunc_normal_(self.positional_embedding, std=width**-0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the features, (B, embed_dim), not normalised, of tokens (B, T) int64."""
        return self.forward_tail(self.forward_shared(tokens), tokens)

    def forward_shared(self, tokens: Tensor) -> Tensor:
        """Return the hidden tokens (B, T, C) after embeddings and first RepMixer block.

        That part is the same in SiCLIP and its teacher.
        """
        embedded = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        hidden: Tensor = self.first(embedded)
        return hidden

    def forward_tail(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the features, (B, embed_dim), of what `forward_shared` returned for ``tokens``."""
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        ends = tokens.argmax(-1)  # the end-of-text token has the highest number
        rows = torch.arange(tokens.shape[0], device=tokens.device)  # len() would fix the batch size of an ONNX graph
        pooled = self.last(hidden)[rows, ends]
        features: Tensor = self.ln_final(pooled) @ self.text_projection
        return features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's input, and compute the layer again for its gradient."""
        self.grad_checkpointing = enable
