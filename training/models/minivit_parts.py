"""MiniViT's weight transformations (arXiv 2204.07154), the parts of a block that tied blocks have of their own.

    attention   A_n = softmax(sum_m F2[n, m] (Q_m K_m^T / sqrt(d) + position)),  out_k = (sum_n F1[k, n] A_n) V_k
    MLP         z = y + DW(y), a depth-wise convolution over the map of tokens, in front of the MLP

F2 (``before`` the softmax) and F1 (``after`` it) are linear maps across the heads; a head uses its own values.
Mini-DeiT has image relative position encoding on keys (iRPE, "product") where Mini-Swin has the convolution.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from training.choices import HeadMaps, Local

STD = 0.02  # of random head maps
ALPHA = 1.9  # of iRPE's piecewise index, in patches: up to here it is the distance itself
BETA = 3.8  # its largest value
GAMMA = 15.2  # the distance where it reaches that
REACH = int(BETA)  # the largest index
BUCKETS = (2 * REACH + 1) ** 2
KERNEL = 7  # of the depth-wise convolution


class HeadMap(nn.Module):
    """A linear map across heads, ``out[n] = sum_m weight[n, m] x[m] + bias[n]``.

    Args:
        heads: M.
        bias: Whether there is a bias.
        identity: Start as the identity, not from a truncated normal of standard deviation 0.02.
    """

    def __init__(self, heads: int, *, bias: bool, identity: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, heads))
        self.bias = nn.Parameter(torch.zeros(heads)) if bias else None
        if identity:
            nn.init.eye_(self.weight)
        else:
            nn.init.trunc_normal_(self.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, M, N, N) of (B, M, N, N)."""
        mixed = torch.matmul(self.weight, x.flatten(2)).view_as(x)
        return mixed if self.bias is None else mixed + self.bias.view(-1, 1, 1)


def head_map(heads: int, kind: HeadMaps, *, bias: bool) -> nn.Module:
    """Return a head map that starts as ``kind`` says; for "none" it is no map at all."""
    return nn.Identity() if kind == "none" else HeadMap(heads, bias=bias, identity=kind == "identity")


def mapped_attention(
    logits: Tensor,
    value: Tensor,
    *,
    before: nn.Module,
    after: nn.Module,
    drop: nn.Module,
    mask: Tensor | None = None,
) -> Tensor:
    """Return attention with maps across the heads, (B, N, M d).

    Args:
        logits: (B, M, N, N), positions included.
        value: (B, M, N, d).
        before: The map before the softmax.
        after: The map of the probabilities.
        drop: Dropout of the mapped probabilities.
        mask: (W, N, N), added behind ``before``, so that heads do not mix it; B is a multiple of W windows.
    """
    logits = before(logits)
    if mask is not None:
        shape = logits.shape
        logits = (logits.view(-1, len(mask), *shape[1:]) + mask.unsqueeze(1)).view(shape)
    mapped = drop(after(logits.softmax(-1)))
    attended: Tensor = (mapped @ value).transpose(1, 2).flatten(2)
    return attended


def piecewise_index(offsets: Tensor) -> Tensor:
    """Return iRPE's index of a distance, int64: exact near by, logarithmic further away, at most `REACH` (odd in it).

    Args:
        offsets: Query position minus key position, in patches, int64 of any shape.
    """
    distance = offsets.abs().double()
    far = ALPHA + (distance / ALPHA).clamp(min=1).log() / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
    index = torch.where(distance <= ALPHA, distance, far.round().clamp(max=BETA))
    return (offsets.sign() * index).trunc().long()


def position_buckets(height: int, width: int) -> Tensor:
    """Return the bucket of each query and key on a grid, (H W, H W) int64 below `BUCKETS`."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    row_index = piecewise_index(rows.unsqueeze(1) - rows) + REACH
    column_index = piecewise_index(columns.unsqueeze(1) - columns) + REACH
    return row_index * (2 * REACH + 1) + column_index


@lru_cache(maxsize=32)
def _square_buckets(side: int, device: torch.device) -> Tensor:
    """`position_buckets` of a square grid on a device, kept: batches of several sizes come back to each of them."""
    with torch.inference_mode(False):
        return position_buckets(side, side).to(device)


class ContextualPositions(nn.Module):
    """iRPE, contextual, "product", on keys: logits of a query with a vector per bucket of relative positions.

    The heads share the table, which starts at zero and serves any grid.

    Args:
        head_dim: d.
        grid: (H, W) of the patches.
    """

    def __init__(self, head_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(head_dim, BUCKETS))
        self.register_buffer("buckets", position_buckets(*grid), persistent=False)
        self.buckets: Tensor

    def forward(self, query: Tensor) -> Tensor:
        """Return what is added to the logits, (B, M, N, N), of scaled queries (B, M, N, d).

        Raises ValueError where N patches are neither those of the grid nor a square.
        """
        tokens = query.shape[2]
        buckets = self.buckets
        if tokens != len(buckets):
            side = math.isqrt(tokens)
            if side * side != tokens:
                raise ValueError(f"{tokens} patches: positions need images of the model's size, or square ones")
            buckets = _square_buckets(side, query.device)
        scores = query @ self.table
        return scores.gather(-1, buckets.expand(*scores.shape[:2], -1, -1))


class MappedAttention(nn.Module):
    """timm's attention of a ViT with its logits written out, head maps and relative positions.

    Args:
        attention: timm's attention, whose projections it takes over.
        head_maps: How the head maps start.
        grid: (H, W) of the patches for iRPE; None leaves it out.
    """

    def __init__(self, attention: Any, head_maps: HeadMaps, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = attention.scale
        self.qkv: nn.Linear = attention.qkv
        self.proj: nn.Linear = attention.proj
        self.attn_drop: nn.Module = attention.attn_drop
        self.proj_drop: nn.Module = attention.proj_drop
        self.before = head_map(self.num_heads, head_maps, bias=False)
        self.after = head_map(self.num_heads, head_maps, bias=False)
        self.positions = None
        if grid is not None:
            self.positions = ContextualPositions(self.qkv.in_features // self.num_heads, grid)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (B, N, C) of (B, N, C). Raises ValueError for a mask."""
        if attn_mask is not None or is_causal:
            raise ValueError("Mini-DeiT's attention takes no mask")
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query = query * self.scale
        logits = query @ key.mT
        if self.positions is not None:
            logits = logits + self.positions(query)
        attended = mapped_attention(logits, value, before=self.before, after=self.after, drop=self.attn_drop)
        out: Tensor = self.proj_drop(self.proj(attended))
        return out


@torch.no_grad()
def resized_table(table: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Return a Swin's table of relative positions for windows of another size, by bicubic interpolation.

    The release takes its tables from 224 to 384 pixels so; timm's way is another one.

    Args:
        table: ((2 h - 1) (2 w - 1), M) of windows of h x w.
        before: h and w.
        after: Those of the new windows.
    """
    height, width = (2 * side - 1 for side in before)
    plane = table.T.reshape(1, -1, height, width).float()
    size = [2 * side - 1 for side in after]
    return F.interpolate(plane, size, mode="bicubic", align_corners=False).flatten(2)[0].T


class MappedWindowAttention(WindowAttention):
    """timm's attention of a Swin's window with head maps, which have biases."""

    def __init__(self, head_maps: HeadMaps, **options: Any) -> None:
        super().__init__(**options)
        self.before = head_map(self.num_heads, head_maps, bias=True)
        self.after = head_map(self.num_heads, head_maps, bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B W, N, C) of B images' windows (B W, N, C); ``mask`` (W, N, N) is 0 or -100."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (query * self.scale) @ key.mT + self._get_rel_pos_bias()
        attended = mapped_attention(logits, value, before=self.before, after=self.after, drop=self.attn_drop, mask=mask)
        out: Tensor = self.proj_drop(self.proj(attended))
        return out

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Take windows of another size. The table is resized by bicubic interpolation, as for the released models."""
        table, before = self.relative_position_bias_table, self.window_size
        super().set_window_size(window_size)
        if self.relative_position_bias_table is table:  # the size has not changed
            return
        with torch.no_grad():
            self.relative_position_bias_table.copy_(resized_table(table, before, self.window_size))


class DepthwiseTokens(nn.Conv2d):
    """A depth-wise convolution over tokens that lie on a map.

    Args:
        dim: C.
        kernel_size: Side of its kernels.
    """

    def __init__(self, dim: int, kernel_size: int = KERNEL) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, tokens: Tensor, height: int, width: int, prefix: int = 0) -> Tensor:  # type: ignore[override]
        """Return what is added to the tokens, (B, P + H W, C) of (B, P + H W, C), row by row.

        The ``prefix`` P tokens in front (CLS, registers) lie on no map: what is added to them is 0.
        """
        patches = tokens[:, prefix:]
        on_map = patches.mT.reshape(patches.shape[0], -1, height, width)
        convolved = super().forward(on_map).flatten(2).mT
        return F.pad(convolved, (0, 0, prefix, 0)) if prefix else convolved


class LocalTransform(nn.Module):
    """LayerNorm and depth-wise convolution in front of a Swin's MLP, on (B, H, W, C).

    "stream" is the released order, y + DW(y) with y = norm(u): the norm stands in the residual stream, so that no
    weights make it the identity. "residual" is u + DW(norm(u)) with DW = 0 at the start.
    """

    def __init__(self, dim: int, kind: Local) -> None:
        super().__init__()
        self.in_stream = kind == "stream"
        self.norm = nn.LayerNorm(dim)
        self.conv = DepthwiseTokens(dim)
        if not self.in_stream:
            nn.init.zeros_(self.conv.weight)
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C) of (B, H, W, C)."""
        height, width = x.shape[1:3]
        normed = self.norm(x)
        added: Tensor = self.conv(normed.flatten(1, 2), height, width).view_as(x)
        return added + (normed if self.in_stream else x)


class MiniSwinBlock(SwinTransformerBlock):
    """timm's Swin block with head maps and a local transform.

    Args:
        head_maps: How the head maps start.
        local: What stands in front of the MLP.
        mask_always: Mask unshifted windows as shifted ones, as the released code does. Not where the map is one window.
        options: Those of timm's block.
    """

    mask_always = False

    def __init__(self, head_maps: HeadMaps, local: Local, mask_always: bool, **options: Any) -> None:
        super().__init__(**options)
        self.attn = MappedWindowAttention(
            head_maps,
            dim=self.dim,
            num_heads=options["num_heads"],
            head_dim=options["head_dim"],
            window_size=self.window_size,
            qkv_bias=options["qkv_bias"],
            attn_drop=options["attn_drop"],
            proj_drop=options["proj_drop"],
        )
        self.local = nn.Identity() if local == "none" else LocalTransform(self.dim, local)
        if mask_always:
            self.mask_always = True
            self._init_buffers()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def get_attn_mask(self, *args: Any, **options: Any) -> Tensor | None:
        """Return the mask (W, N, N) of this block's windows, or None where none is needed."""
        shift = self.shift_size
        if self.mask_always:
            sides: Any = zip(self.input_resolution, self.window_size, strict=True)  # type: ignore[arg-type]
            self.shift_size = tuple(0 if side <= window else window // 2 for side, window in sides)  # type: ignore[assignment]
        try:
            mask: Tensor | None = super().get_attn_mask(*args, **options)
        finally:
            self.shift_size = shift
        return mask

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C) of (B, H, W, C)."""
        attended: Tensor = self._attn(self.norm1(x))  # type: ignore[no-untyped-call]
        mixed: Tensor = self.local(x + self.drop_path1(attended))
        tokens = mixed.flatten(1, 2)
        out: Tensor = tokens + self.drop_path2(self.mlp(self.norm2(tokens)))
        return out.view_as(mixed)
