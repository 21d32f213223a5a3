"""MobileCLIP-S0's text tower (Apple's "mct"; MobileCLIP, arXiv 2311.17049, section 4.2), plain or with SAS-P blocks.

Token and position embeddings, a RepMixer block, pre-LN transformer layers, a RepMixer block, LayerNorm, projection at
the end-of-text token. No mask of any kind: all positions see all. Apple's own code is apple/ml-mobileclip; what differs
here: tokens stay (B, T, C) outside of the depthwise convolutions, which are Conv1d, and 1x1 convolutions are Linear.
LayerNorm is in fp32 there; torch's is too, under autocast and inside its bf16 and fp16 kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models.siclip import SasBlock, SasStack

LAYER_SCALE = 1e-5
STD = 0.02


def fused_bn(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C,), that a BatchNorm applies in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def depthwise(dim: int, kernel_size: int) -> nn.Conv1d:
    """A convolution over tokens (B, C, T) that keeps their number, without a bias."""
    return nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)


def fused_conv(weight: Tensor, bias: Tensor) -> nn.Conv1d:
    """`depthwise` with these weights (C, 1, K) and a bias (C,)."""
    fused = depthwise(len(weight), weight.shape[-1])
    fused.weight, fused.bias = nn.Parameter(weight), nn.Parameter(bias)
    return fused


class RepMixer(nn.Module):
    """Mixes tokens (B, C, T) by a convolution over ``kernel_size`` of them (FastViT, arXiv 2303.14189, section 3.2)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv, self.bn = depthwise(dim, kernel_size), nn.BatchNorm1d(dim)
        self.skip, self.norm = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)
        self.layer_scale = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """x + layer_scale (mixer(x) - norm(x)), where the mixer is convolution and skip, each with a BatchNorm."""
        return x + self.layer_scale.unsqueeze(-1) * (self.bn(self.conv(x)) + self.skip(x) - self.norm(x))

    @torch.no_grad()
    def fuse(self) -> nn.Conv1d:
        """The same in eval mode as one convolution; timm's `reparameterize_model` puts it in this module's place."""
        (kernel, shift), (skip, skip_shift), (norm, norm_shift) = (
            fused_bn(bn) for bn in (self.bn, self.skip, self.norm)
        )
        weight = self.conv.weight * (self.layer_scale * kernel).view(-1, 1, 1)
        weight[:, 0, weight.shape[-1] // 2] += 1 + self.layer_scale * (skip - norm)
        return fused_conv(weight, self.layer_scale * (shift + skip_shift - norm_shift))


class ConvBn(nn.Module):
    """Depthwise convolution over tokens (B, C, T) and BatchNorm."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv, self.bn = depthwise(dim, kernel_size), nn.BatchNorm1d(dim)
        nn.init.trunc_normal_(self.conv.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.bn(self.conv(x))

    @torch.no_grad()
    def fuse(self) -> nn.Conv1d:
        """The same in eval mode as one convolution."""
        scale, shift = fused_bn(self.bn)
        return fused_conv(self.conv.weight * scale.view(-1, 1, 1), shift)


class FeedForward(nn.Module):
    """Linear, GELU, Linear on (B, T, C), four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class RepMixerBlock(nn.Module):
    """RepMixer, then an FFN that begins with a depthwise convolution, on (B, T, C)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.token_mixer, self.conv, self.ffn = RepMixer(dim, kernel_size), ConvBn(dim, kernel_size), FeedForward(dim)
        self.layer_scale = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        mixed = self.token_mixer(x.mT)
        return mixed.mT + self.layer_scale * self.ffn(self.conv(mixed).mT)


class TransformerLayer(nn.Module):
    """Pre-LN self-attention and FFN on (B, T, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        x = x + self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.ffn(self.ffn_norm(x))


class TextTower(nn.Module):
    """Tokens (B, T) to features (B, embed_dim), with the attributes that open_clip's CustomTextCLIP asks for.

    ``share`` 0 has transformer layers (MobileCLIP-S0); else SAS-P blocks (SiCLIP), each ``share`` of them with one Wq
    and Wk. SAS-P blocks have one LayerNorm, and biases in Wq and Wk, as the layers that they replace. ``kernel_size`` 0
    leaves the RepMixer blocks out (MobileCLIP2-S0).
    """

    def __init__(
        self,
        embed_dim: int,
        context_length: int,
        vocab_size: int,
        width: int,
        heads: int,
        layers: int,
        kernel_size: int,
        share: int,
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size, self.grad_checkpointing = context_length, vocab_size, False
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
        """Tokens (B, T) int64 -> (B, embed_dim), not normalised."""
        return self.forward_tail(self.forward_shared(tokens), tokens)

    def forward_shared(self, tokens: Tensor) -> Tensor:
        """Embeddings and first RepMixer block, (B, T, C): the part that SiCLIP has in common with its teacher."""
        return self.first(self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]])

    def forward_tail(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """All after `forward_shared`; the end-of-text token has the highest number."""
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        ends = self.last(hidden)[torch.arange(len(tokens), device=tokens.device), tokens.argmax(-1)]
        return self.ln_final(ends) @ self.text_projection

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep each layer's input only, and compute the layer again for its gradient."""
        self.grad_checkpointing = enable
