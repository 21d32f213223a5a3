"""SAS-P blocks (He & Hofmann, ICLR 2024, arXiv 2311.01906) as SiCLIP (arXiv 2411.14789) puts them into MobileCLIP-S0.

With X the block's normalised input, X_h its h-th slice of channels, T tokens and d_k channels per head:

    A_h   = softmax(X Wq_h (X Wk_h)^T / sqrt(d_k))
    S_h   = alpha_h I + beta_h A_h - gamma_h C        shaped attention (Noci et al. 2023); C is A for zero logits
    x_out = beta_sa concat_h(S_h X_h) + beta_ff FFN(X)   in parallel, no skip, no values, no output projection

Wq = 0 at the start, so A = C and S = I. Adjacent blocks share Wq and Wk and nothing else: of all readings of SiCLIP's
text only this one gives its 14 % fewer parameters in the image tower. A group's matrices exist once, in `SasStack`, so
that state dict, optimizer, gradient all-reduce and safetensors hold them once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.fastvit import FastVit, fastvit_mci0
from torch import Tensor, nn

BETA_FF = 0.1  # He & Hofmann, section 4.2, for 18 layers
QK_STD = 0.02


def uniform_attention(mask: Tensor) -> Tensor:
    """What softmax gives for zero logits: (T, T), rows uniform over the keys that ``mask`` (T, T) bool shows them."""
    return mask / mask.sum(-1, keepdim=True)


def shaped_matrices(
    query: Tensor, key: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, mask: Tensor | None = None
) -> Tensor:
    """S (B, H, T, T) of query and key (B, H, T, d_k), gains (H,) and a mask (T, T), True where a key is seen."""
    tokens = query.shape[-2]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    logits = (query @ key.mT) / query.shape[-1] ** 0.5
    attention = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    identity = torch.eye(tokens, dtype=query.dtype, device=query.device)
    a, b, c = (gain.view(-1, 1, 1) for gain in (alpha, beta, gamma))
    return a * identity + b * attention - c * uniform_attention(mask).to(query.dtype)


def conv_ffn(ffn: Any, x: Tensor) -> Tensor:
    """timm's ConvMlp of (B, C, H, W) as tokens (B, T, C).

    Its 1x1 convolutions are one matrix product each here: on one thread torch does them image by image, which is
    7 % slower at batch 8.
    """
    inner = F.linear(ffn.conv(x).flatten(2).mT.contiguous(), ffn.fc1.weight.flatten(1), ffn.fc1.bias)
    return F.linear(ffn.act(inner), ffn.fc2.weight.flatten(1), ffn.fc2.bias)


class SasBlock(nn.Module):
    """One SAS-P block on (B, T, C), or, with BatchNorm2d and ConvMlp, on (B, C, H, W); Wq and Wk are passed in."""

    def __init__(self, norm: nn.Module, ffn: nn.Module, heads: int) -> None:
        super().__init__()
        self.norm, self.ffn = norm, ffn
        self.alpha, self.beta, self.gamma = (nn.Parameter(torch.ones(heads)) for _ in range(3))
        self.beta_sa = nn.Parameter(torch.ones(()))
        self.beta_ff = nn.Parameter(torch.tensor(BETA_FF))

    def forward(self, x: Tensor, qk: nn.Linear, mask: Tensor | None = None) -> Tensor:
        """Same shape as ``x``; ``mask`` (T, T) is True where a key is seen."""
        normed = self.norm(x)
        if x.ndim == 3:
            return torch.addcmul(self.mix(normed, qk, mask), self.beta_ff, self.ffn(normed))
        tokens = normed.flatten(2).mT.contiguous()
        mixed = torch.addcmul(self.mix(tokens, qk, mask), self.beta_ff, conv_ffn(self.ffn, normed))
        return mixed.mT.unflatten(-1, x.shape[2:])

    def mix(self, x: Tensor, qk: nn.Linear, mask: Tensor | None = None) -> Tensor:
        """beta_sa concat_h(S_h X_h) of normalised tokens (B, T, C), without making S."""
        heads = len(self.alpha)
        query, key = qk(x).unflatten(-1, (2 * heads, -1)).transpose(1, 2).chunk(2, 1)
        values = x.unflatten(-1, (heads, -1))  # (B, T, H, d_k)
        seen = F.scaled_dot_product_attention(query, key, values.transpose(1, 2), attn_mask=mask).transpose(1, 2)
        if mask is None:
            uniform = values.mean(1, keepdim=True)
        else:
            uniform = (uniform_attention(mask).to(x.dtype) @ x).view_as(values)
        alpha, beta, gamma = (self.beta_sa * torch.stack((self.alpha, self.beta, self.gamma))).unsqueeze(-1)
        return (alpha * values + beta * seen - gamma * uniform).flatten(2)


class SasStack(nn.Module):
    """Adjacent SAS-P blocks; each ``share`` of them have one Wq and Wk, the two halves of the rows of a ``qk``."""

    def __init__(self, blocks: list[SasBlock], dim: int, bias: bool, share: int) -> None:
        super().__init__()
        if share < 1 or len(blocks) % share:
            raise ValueError(f"share {share!r}: must divide the {len(blocks)} attention blocks")
        self.blocks, self.share, self.heads = nn.ModuleList(blocks), share, len(blocks[0].alpha)
        self.qk = nn.ModuleList(nn.Linear(dim, 2 * dim, bias=bias) for _ in range(len(blocks) // share))
        for name, parameter in self.qk.named_parameters():
            nn.init.zeros_(parameter)
            if name.endswith("weight"):
                nn.init.normal_(parameter[dim:], std=QK_STD)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Same shape as ``x``."""
        for index, block in enumerate(self.blocks):
            x = block(x, self.qk[index // self.share], mask)
        return x


def with_sas(trunk: FastVit, share: int) -> FastVit:
    """A FastViT whose last stage's attention blocks became SAS-P blocks that keep their norm (BatchNorm2d) and FFN."""
    stage: Any = trunk.stages[-1]
    mixer = stage.blocks[0].token_mixer
    dim, heads = mixer.qkv.in_features, mixer.num_heads
    blocks = [SasBlock(block.norm, block.mlp, heads) for block in stage.blocks]
    stage.blocks = nn.Sequential(SasStack(blocks, dim, bias=False, share=share))
    return trunk


@register_model
def siclip_mci0(pretrained: bool = False, share: int = 2, **options: Any) -> FastVit:
    """SiCLIP's image tower for timm: MCi0 with SAS-P blocks; ``share`` 1 gives each block its own Wq and Wk."""
    if pretrained:
        raise ValueError("siclip_mci0 has no published weights")
    return with_sas(fastvit_mci0(**options), share)


@register_model
def mci_tiny(pretrained: bool = False, **options: Any) -> FastVit:
    """MCi0 with one RepMixer block per stage and an eighth of the width, for tests and studies on a CPU."""
    if pretrained:
        raise ValueError("mci_tiny has no published weights")
    return fastvit_mci0(layers=(1, 1, 1, 2), embed_dims=(16, 32, 64, 128), **options)


@register_model
def siclip_tiny(pretrained: bool = False, share: int = 2, **options: Any) -> FastVit:
    """`mci_tiny` with SAS-P blocks."""
    return with_sas(mci_tiny(pretrained, **options), share)
