"""SAS-P blocks (He & Hofmann, ICLR 2024, arXiv 2311.01906) as SiCLIP (arXiv 2411.14789) uses them in MobileCLIP-S0.

With X the block's normalised input, X_h its h-th slice of channels, T tokens and d_k channels per head:

    A_h   = softmax(X Wq_h (X Wk_h)^T / sqrt(d_k))
    S_h   = alpha_h I + beta_h A_h - gamma_h C        shaped attention (Noci et al. 2023); C is A for zero logits
    x_out = beta_sa concat_h(S_h X_h) + beta_ff FFN(X)   in parallel, no skip, no values, no output projection

Wq = 0 at the start, so A = C and S = I. Adjacent blocks share Wq and Wk and nothing else: of all interpretations of
SiCLIP's text only this one gives its 14 % fewer parameters in the image tower. A group's matrices exist once, in
`SasStack`, so that state dict, optimizer, gradient all-reduce and safetensors hold them once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import load_pretrained, register_model
from timm.models.fastvit import FastVit, fastvit_mci0
from torch import Tensor, nn

BETA_FF = 0.1  # He & Hofmann, section 4.2, for 18 layers
QK_STD = 0.02  # standard deviation of Wk at the start


def uniform_attention(mask: Tensor) -> Tensor:
    """Return the softmax of zero logits, (T, T): rows are uniform over the keys that are visible to them.

    Args:
        mask: (T, T) bool, True where a key is visible.
    """
    return mask / mask.sum(-1, keepdim=True)


def shaped_matrices(
    query: Tensor, key: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Return the shaped attention matrices S, (B, H, T, T). The definition; blocks apply S without building it.

    Args:
        query: (B, H, T, d_k).
        key: (B, H, T, d_k).
        alpha: (H,) gain of the identity.
        beta: (H,) gain of the attention.
        gamma: (H,) gain of the uniform attention.
        mask: (T, T) bool, True where a key is visible; None shows all.
    """
    tokens = query.shape[-2]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    logits = (query @ key.mT) / query.shape[-1] ** 0.5
    attention = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    identity = torch.eye(tokens, dtype=query.dtype, device=query.device)
    uniform = uniform_attention(mask).to(query.dtype)
    shaped: Tensor = alpha.view(-1, 1, 1) * identity + beta.view(-1, 1, 1) * attention - gamma.view(-1, 1, 1) * uniform
    return shaped


def conv_ffn(ffn: Any, x: Tensor) -> Tensor:
    """Apply timm's ConvMlp ``ffn`` to (B, C, H, W); return tokens (B, T, C).

    Its 1x1 convolutions are one matrix product each here: on one thread torch computes them image by image, which is
    7 % slower at batch 8.
    """
    inner = F.linear(ffn.conv(x).flatten(2).mT.contiguous(), ffn.fc1.weight.flatten(1), ffn.fc1.bias)
    return F.linear(ffn.act(inner), ffn.fc2.weight.flatten(1), ffn.fc2.bias)


class SasBlock(nn.Module):
    """One SAS-P block on (B, T, C), or, with BatchNorm2d and ConvMlp, on (B, C, H, W).

    Args:
        norm: The block's normalisation.
        ffn: The block's feed-forward network.
        heads: H, of the shaped attention.
    """

    def __init__(self, norm: nn.Module, ffn: nn.Module, heads: int) -> None:
        super().__init__()
        self.norm = norm
        self.ffn = ffn
        self.alpha = nn.Parameter(torch.ones(heads))
        self.beta = nn.Parameter(torch.ones(heads))
        self.gamma = nn.Parameter(torch.ones(heads))
        self.beta_sa = nn.Parameter(torch.ones(()))
        self.beta_ff = nn.Parameter(torch.tensor(BETA_FF))

    def forward(self, x: Tensor, qk: nn.Linear, mask: Tensor | None = None) -> Tensor:
        """Return the block's output, of the shape of ``x``.

        Args:
            x: (B, T, C) or (B, C, H, W).
            qk: The projection to queries and keys, which blocks share.
            mask: (T, T) bool, True where a key is visible; None shows all.
        """
        normed = self.norm(x)
        if x.ndim == 3:
            return torch.addcmul(self.mix(normed, qk, mask), self.beta_ff, self.ffn(normed))
        tokens = normed.flatten(2).mT.contiguous()
        mixed = torch.addcmul(self.mix(tokens, qk, mask), self.beta_ff, conv_ffn(self.ffn, normed))
        return mixed.mT.reshape(x.shape)

    def mix(self, x: Tensor, qk: nn.Linear, mask: Tensor | None = None) -> Tensor:
        """Return beta_sa concat_h(S_h X_h) of normalised tokens (B, T, C), without building S."""
        heads = len(self.alpha)
        query, key = qk(x).unflatten(-1, (2 * heads, -1)).transpose(1, 2).chunk(2, 1)
        values = x.view(*x.shape[:-1], heads, -1)  # (B, T, H, d_k)
        attended = F.scaled_dot_product_attention(query, key, values.transpose(1, 2), attn_mask=mask).transpose(1, 2)
        if mask is None:
            uniform = values.mean(1, keepdim=True)
        else:
            uniform = (uniform_attention(mask).to(x.dtype) @ x).view_as(values)
        alpha, beta, gamma = (self.beta_sa * torch.stack((self.alpha, self.beta, self.gamma))).unsqueeze(-1)
        mixed: Tensor = (alpha * values + beta * attended - gamma * uniform).flatten(2)
        return mixed


class SasStack(nn.Module):
    """Adjacent SAS-P blocks; groups of them share Wq and Wk, the two halves of the rows of a ``qk``.

    Args:
        blocks: The blocks.
        dim: C.
        bias: Whether queries and keys have biases.
        share: Number of adjacent blocks in a group.

    Raises:
        ValueError: ``share`` does not divide the number of blocks.
    """

    def __init__(self, blocks: list[SasBlock], dim: int, bias: bool, share: int) -> None:
        super().__init__()
        if share < 1 or len(blocks) % share:
            raise ValueError(f"share {share!r}: must divide the {len(blocks)} attention blocks")
        self.blocks = nn.ModuleList(blocks)
        self.share = share
        self.heads = len(blocks[0].alpha)
        self.qk = nn.ModuleList(nn.Linear(dim, 2 * dim, bias=bias) for _ in range(len(blocks) // share))
        for name, parameter in self.qk.named_parameters():
            nn.init.zeros_(parameter)
            if name.endswith("weight"):
                nn.init.normal_(parameter[dim:], std=QK_STD)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output of the last block, of the shape of ``x``; ``mask`` as in `SasBlock`."""
        for index, block in enumerate(self.blocks):
            x = block(x, self.qk[index // self.share], mask)
        return x


def with_sas(trunk: FastVit, share: int) -> FastVit:
    """Replace the attention blocks of a FastViT's last stage, in place, by SAS-P blocks.

    The blocks keep their norm (BatchNorm2d) and FFN; groups of ``share`` adjacent ones share Wq and Wk.
    """
    stage: Any = trunk.stages[-1]
    mixer = stage.blocks[0].token_mixer
    dim, heads = mixer.qkv.in_features, mixer.num_heads
    blocks = [SasBlock(block.norm, block.mlp, heads) for block in stage.blocks]
    stage.blocks = nn.Sequential(SasStack(blocks, dim, bias=False, share=share))
    return trunk


def _built(name: str, build: Callable[..., FastVit], pretrained: bool, options: dict[str, Any]) -> FastVit:
    """A model, with the weights of a folder that timm loads as ``local-dir:``: there are no others."""
    source = options.get("pretrained_cfg")
    if pretrained and not (isinstance(source, dict) and source.get("file")):
        raise ValueError(f"{name} has no published weights")
    model = build(**options)
    if pretrained:
        load_pretrained(model, num_classes=model.num_classes, in_chans=3)
    return model


@register_model
def siclip_mci0(pretrained: bool = False, share: int = 2, **options: Any) -> FastVit:
    """Build SiCLIP's image tower: MCi0 with SAS-P blocks. With ``share`` 1 each block has its own Wq and Wk."""
    return _built("siclip_mci0", lambda **rest: with_sas(fastvit_mci0(**rest), share), pretrained, options)


@register_model
def mci_tiny(pretrained: bool = False, **options: Any) -> FastVit:
    """Build MCi0 with one RepMixer block per stage and an eighth of the width, for tests and studies on a CPU."""
    sizes = {"layers": (1, 1, 1, 2), "embed_dims": (16, 32, 64, 128)}
    return _built("mci_tiny", lambda **rest: fastvit_mci0(**sizes, **rest), pretrained, options)


@register_model
def siclip_tiny(pretrained: bool = False, share: int = 2, **options: Any) -> FastVit:
    """Build `mci_tiny` with SAS-P blocks."""
    return _built("siclip_tiny", lambda **rest: with_sas(mci_tiny(**rest), share), pretrained, options)
