"""What TinyMIM (arXiv 2301.01296) reads of vision transformers, and what it changes in its student.

A `VisionTower` runs a transformer block by block and stops within the block that is asked for, so nothing behind it is
computed: timm's ViTs, which MAE's encoders are, and open_clip's image towers. Blocks are numbered from 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Attention, Block, VisionTransformer  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.choices import Target

Reading = dict[str, Tensor]
WITHIN_ATTENTION = ("relations", "qkv")  # targets for which a block is left before its attention is computed
TEMPERATURE = 10_000.0  # of sine and cosine positions


class NoTower(ValueError):
    """A model is no transformer whose blocks can be read; says why."""


class VisionTower:
    """A vision transformer, run block by block.

    Attributes:
        model: The transformer.
        blocks: Its blocks.
        width: Numbers of a token, D.
        grid: Rows and columns of patches.
        prefix: Tokens before the patches': the class token and what else there is.
    """

    model: Any
    blocks: Sequence[Any]
    width: int
    grid: tuple[int, int]
    prefix: int

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def checkpoints(self) -> bool:
        """Whether only each block's input is kept for the backward pass."""
        return False

    def heads(self, block: int) -> int:
        """Return the number of heads of a block."""
        heads: int = self.blocks[block - 1].attn.num_heads
        return heads

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens (B, T, D) that the first block takes, of normalised images (B, 3, S, S)."""
        raise NotImplementedError

    def queries_keys_values(self, block: Any, tokens: Tensor) -> Sequence[Tensor]:
        """Return a block's three (B, T, D) of its input, as its attention multiplies them, heads side by side."""
        raise NotImplementedError

    def attention(self, block: Any, tokens: Tensor) -> Tensor:
        """Return what a block's attention adds to its input (B, T, D), before any drop path."""
        raise NotImplementedError

    def ffn(self, block: Any, tokens: Tensor) -> Tensor:
        """Return what a block's FFN adds to its own input (B, T, D), before any drop path."""
        raise NotImplementedError

    def class_token(self, tokens: Tensor) -> Tensor:
        """Return the class token (B, D) after the final norm, of the last block's output."""
        raise NotImplementedError

    def drop(self, block: Any, branch: Tensor, which: int) -> Tensor:
        """Return what a block's drop path leaves of its first or second branch."""
        return branch


class TimmTower(VisionTower):
    """timm's VisionTransformer and its subclasses, with plain pre-norm blocks."""

    def __init__(self, model: VisionTransformer) -> None:
        for block in model.blocks:
            if type(block) is not Block or type(block.attn) is not Attention:
                kind = type(block) if type(block) is not Block else type(block.attn)
                raise NoTower(f"its blocks are no plain pre-norm ones, but {kind.__name__}")
        self.model = model
        self.blocks = list(model.blocks)
        self.width = model.embed_dim
        self.grid = tuple(model.patch_embed.grid_size)
        self.prefix = model.num_prefix_tokens

    @property
    def checkpoints(self) -> bool:
        """Whether only each block's input is kept for the backward pass."""
        return bool(self.model.grad_checkpointing)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens (B, T, D) that the first block takes, of normalised images (B, 3, S, S)."""
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        embedded: Tensor = self.model.norm_pre(self.model.patch_drop(tokens))
        return embedded

    def queries_keys_values(self, block: Any, tokens: Tensor) -> Sequence[Tensor]:
        """Return a block's three (B, T, D) of its input, as its attention multiplies them, heads side by side."""
        attention = block.attn
        query, key, value = attention.qkv(block.norm1(tokens)).chunk(3, dim=-1)

        def normed(norm: nn.Module, part: Tensor) -> Tensor:
            if isinstance(norm, nn.Identity):
                return part
            heads: Tensor = norm(part.reshape(*part.shape[:-1], attention.num_heads, -1))
            return heads.flatten(-2)

        return normed(attention.q_norm, query), normed(attention.k_norm, key), value

    def attention(self, block: Any, tokens: Tensor) -> Tensor:
        """Return what a block's attention adds to its input (B, T, D), before any drop path."""
        branch: Tensor = block.ls1(block.attn(block.norm1(tokens)))
        return branch

    def ffn(self, block: Any, tokens: Tensor) -> Tensor:
        """Return what a block's FFN adds to its own input (B, T, D), before any drop path."""
        branch: Tensor = block.ls2(block.mlp(block.norm2(tokens)))
        return branch

    def class_token(self, tokens: Tensor) -> Tensor:
        """Return the class token (B, D) after the final norm, of the last block's output.

        Raises NoTower for a model without one.
        """
        if not self.model.has_class_token or isinstance(self.model.norm, nn.Identity):
            raise NoTower("it has no class token with a norm behind the last block")
        normed: Tensor = self.model.norm(tokens)
        return normed[:, 0]

    def drop(self, block: Any, branch: Tensor, which: int) -> Tensor:
        """Return what a block's drop path leaves of its first or second branch."""
        left: Tensor = (block.drop_path1 if which == 1 else block.drop_path2)(branch)
        return left


class OpenClipTower(VisionTower):
    """open_clip's own VisionTransformer: OpenAI's CLIP and what is built like it."""

    def __init__(self, model: OpenClipViT) -> None:
        self.blocks = model.transformer.resblocks
        for block in self.blocks:
            if type(block) is not ResidualAttentionBlock:
                raise NoTower(f"its blocks are no plain pre-norm ones, but {type(block).__name__}")
        if not model.transformer.batch_first:
            raise NoTower("its attention takes the batch second; load it with open_clip 3")
        self.model = model
        self.width = model.transformer.width
        self.grid = model.grid_size
        self.prefix = 1

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens (B, T, D) that the first block takes, of normalised images (B, 3, S, S)."""
        embedded: Tensor = self.model._embeds(images)
        return embedded

    def queries_keys_values(self, block: Any, tokens: Tensor) -> Sequence[Tensor]:
        """Return a block's three (B, T, D) of its input, as its attention multiplies them, heads side by side."""
        attention = block.attn
        projected = nn.functional.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
        return projected.chunk(3, dim=-1)

    def attention(self, block: Any, tokens: Tensor) -> Tensor:
        """Return what a block's attention adds to its input (B, T, D), before any drop path."""
        branch: Tensor = block.ls_1(block.attention(q_x=block.ln_1(tokens)))
        return branch

    def ffn(self, block: Any, tokens: Tensor) -> Tensor:
        """Return what a block's FFN adds to its own input (B, T, D), before any drop path."""
        branch: Tensor = block.ls_2(block.mlp(block.ln_2(tokens)))
        return branch

    def class_token(self, tokens: Tensor) -> Tensor:
        """Return the class token (B, D) after the final norm, of the last block's output.

        Raises NoTower for a model that pools otherwise.
        """
        if self.model.attn_pool is not None or self.model.pool_type != "tok":
            raise NoTower("it pools its tokens and has no class token at its end")
        normed: Tensor = self.model.ln_post(tokens)
        return normed[:, 0]


def tower_of(model: nn.Module) -> VisionTower:
    """Return the tower of a timm ViT, of open_clip's image tower, or of a model that holds one of them.

    Those are a CLIP model (``visual``) and a classifier or open_clip's wrapper of timm's models (``trunk``). Raises
    NoTower, which says what the model is.
    """
    inner: Any = model
    for name in ("visual", "trunk"):
        inner = getattr(inner, name, inner)
    if isinstance(inner, VisionTransformer):
        return TimmTower(inner)
    if isinstance(inner, OpenClipViT):
        return OpenClipTower(inner)
    raise NoTower(f"it is a {type(inner).__name__}, without blocks that have queries, keys and values of each patch")


def keep_patches(tokens: Tensor, keep: Tensor | None, prefix: int) -> Tensor:
    """Return the tokens (B, prefix + K, D) of the patches to keep, after those in front of the patches.

    Args:
        tokens: (B, T, D).
        keep: (B, K) indices of patches, from 0; None keeps all.
        prefix: Number of tokens before the patches.
    """
    if keep is None:
        return tokens
    patches = tokens[:, prefix:]
    kept = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[-1]))
    return torch.cat([tokens[:, :prefix], kept], dim=1)


def read(tower: VisionTower, images: Tensor, target: Target, block: int, keep: Tensor | None = None) -> Reading:
    """Run a tower and return what a target compares; nothing behind it is computed.

    Args:
        tower: The tower.
        images: (B, 3, S, S), normalised.
        target: What is read: ``q``, ``k`` and ``v`` (B, T, D) for "relations" and "qkv", otherwise ``feature``, which
            is (B, T, D), and (B, D) of the class token. "before" and "after" are sides of the residual sum.
        block: The block, from 1; for the class token the last one.
        keep: (B, K) indices of the patches that the blocks see; None is all.
    """
    tokens = keep_patches(tower.embed(images), keep, tower.prefix)
    for earlier in tower.blocks[: block - 1]:
        tokens = _whole_block(tower, earlier, tokens)
    last = tower.blocks[block - 1]
    if target in WITHIN_ATTENTION:
        query, key, value = tower.queries_keys_values(last, tokens)
        return {"q": query, "k": key, "v": value}
    if target in ("output", "ffn-after"):
        return {"feature": _whole_block(tower, last, tokens)}
    if target == "class-token":
        return {"feature": tower.class_token(_whole_block(tower, last, tokens))}
    branch = tower.attention(last, tokens)
    if target == "attention-before":
        return {"feature": branch}
    tokens = tokens + tower.drop(last, branch, 1)
    return {"feature": tokens if target == "attention-after" else tower.ffn(last, tokens)}


def _whole_block(tower: VisionTower, block: Any, tokens: Tensor) -> Tensor:
    run: Callable[..., Any] = block
    if tower.checkpoints and torch.is_grad_enabled():
        return checkpoint(run, tokens, use_reentrant=False)  # type: ignore[no-any-return]
    output: Tensor = run(tokens)
    return output


def set_heads(tower: VisionTower, block: int, heads: int) -> None:
    """Cut the projections of a timm tower's block into other heads; no parameter changes.

    Raises ValueError when the heads do not divide the width, or the block has parameters of a head's width.
    """
    attention = tower.blocks[block - 1].attn
    width = attention.qkv.out_features // 3
    if heads == attention.num_heads:
        return
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    if not isinstance(attention.q_norm, nn.Identity):
        raise ValueError("its queries and keys have norms of a head's width, so the number of heads cannot change")
    attention.num_heads = heads
    attention.head_dim = width // heads
    attention.scale = attention.head_dim**-0.5


class DrawnDropPath(DropPath):
    """timm's drop path whose random numbers may be given, so that a sample's do not depend on the process it is on.

    Attributes:
        draws: (B,) in [0, 1) of the next batch, a number per sample; None draws from torch's stream.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.draws: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return a branch (B, T, D), 0 for some samples and larger for the others; in eval mode as it is."""
        if self.draws is None or not self.training:
            dropped: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return dropped
        kept = (self.draws >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob)
        return x * kept.view(-1, 1, 1)


def set_drop_path(tower: TimmTower, rate: float, block: int) -> list[DrawnDropPath]:
    """Give all blocks but one the same drop path; the one whose features or relations are compared has none.

    Returns those of the blocks before it, two of each, in the order in which they are run; none where the rate is 0.
    """
    drops = list[DrawnDropPath]()
    for number, one in enumerate(tower.blocks, 1):
        for name in ("drop_path1", "drop_path2"):
            drop = DrawnDropPath(rate) if rate and number != block else nn.Identity()
            setattr(one, name, drop)
            if isinstance(drop, DrawnDropPath) and number < block:
                drops.append(drop)
    return drops


@torch.no_grad()
def initialise(tower: TimmTower) -> None:
    """Draw the weights as MAE's code does: xavier uniform matrices, biases 0, a class token of deviation 0.02."""
    for module in tower.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    projection = getattr(tower.model.patch_embed, "proj", None)
    if isinstance(projection, nn.Conv2d):
        nn.init.xavier_uniform_(projection.weight.flatten(1))  # as the linear layer that it is
    for token in (tower.model.cls_token, getattr(tower.model, "reg_token", None)):
        if token is not None:
            nn.init.normal_(token, std=0.02)


@torch.no_grad()
def fix_positions(tower: TimmTower) -> None:
    """Set the position embeddings to sines and cosines, 0 for tokens before the patches, and freeze them.

    Models without them, or of a width that four does not divide, keep what they have.
    """
    positions = tower.model.pos_embed
    if positions is None or tower.width % 4:
        return
    values = sincos_positions(tower.grid, tower.width)
    positions.zero_()[:, -len(values) :] = values
    positions.requires_grad_(False)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return MAE's positions (rows * columns, D): half of the width for the column, then half for the row.

    Each half has the sines of D / 4 frequencies, then their cosines.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    frequencies = TEMPERATURE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(places: Tensor) -> Tensor:
        angles = places.reshape(-1, 1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    return torch.cat([encode(columns), encode(rows)], dim=1).float()


def freeze_unread(tower: TimmTower, target: Target, block: int, side: int) -> list[str]:
    """Freeze the parameters that get no gradient, and return their names.

    They stay as they are drawn, outside of the optimizer, and are trained from there in fine-tuning.

    Args:
        tower: The student's.
        target: What is read of it.
        block: Where.
        side: Of its images in pixels.
    """
    named = {name: value for name, value in tower.model.named_parameters() if value.requires_grad}
    was_training = tower.model.training
    device = next(iter(named.values())).device
    tower.model.eval()  # draws nothing and moves no statistics
    with torch.enable_grad():
        reading = read(tower, torch.zeros(1, 3, side, side, device=device), target, block)
        total = torch.stack([value.sum() for value in reading.values()]).sum()
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    tower.model.train(was_training)
    unread = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
    for name in unread:
        named[name].requires_grad_(False)
    return unread
