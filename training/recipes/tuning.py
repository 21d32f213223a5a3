"""How masked pre-training is fine-tuned (MAE, TinyMIM): rates by layer, drop path, a head on the patches' mean."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from timm.layers.drop import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.models import LoadedModel
from training.engine.optim import ParamGroup
from training.models.classifier import new_classifier

EMBEDDINGS = ("patch_embed.", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre.")
EXEMPT = ("pos_embed", "cls_token", "dist_token", "reg_token")  # from weight decay, as all vectors are
MEAN_POOLING = {"global_pool": "avg"}  # timm's: the mean of the patches, a norm behind it, none before

LEFT_OUT = ("norm.", "attn_pool.", "fc_norm.", "head.")  # of the model's own pooling
NEW = ("fc_norm.", "head.")


@dataclass(frozen=True)
class TuningConfig:
    """What fine-tuning does to a vision transformer besides training it."""

    layer_decay: float = 1.0
    """factor of the learning rate from each block to the one before; the head has the whole rate. MAE: 0.65 to 0.75"""
    drop_path: float = 0.0
    """drop path of the last block, growing linearly from 0 at the first"""
    pooling: Literal["own", "mean"] = "own"
    """mean: the head sees the mean of the patches behind a new norm, not what the model's own head would"""
    head_std: float = 0.02
    """standard deviation of the head's weights at the start. MAE and TinyMIM: 2e-5"""

    def __post_init__(self) -> None:
        require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]")
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "in [0, 1)")
        require(self.head_std > 0, "head_std", self.head_std, "above 0")


def pool_patches(base: LoadedModel) -> LoadedModel:
    """Return a classifier over one class with the base's blocks, and a new norm behind the mean of its patches.

    The base's own last norm and pooling are left out; one that pools so already stays as it is. Raises UserError for a
    model that is no ViT of timm's.
    """
    model = base.model
    if not isinstance(model.trunk, VisionTransformer):
        raise UserError(f"--pooling mean: {model.name!r} is no vision transformer of timm's; leave it out")
    if model.trunk.global_pool == MEAN_POOLING["global_pool"]:
        return base
    pooled = new_classifier(model.name, 1, options={**model.options, **MEAN_POOLING})
    weights = {key: value for key, value in model.trunk.state_dict().items() if not key.startswith(LEFT_OUT)}
    new = {key: value for key, value in pooled.model.trunk.state_dict().items() if key.startswith(NEW)}
    pooled.model.trunk.load_state_dict(weights | new, strict=True)
    return replace(base, model=pooled.model)


def set_linear_drop_path(trunk: Any, rate: float) -> None:
    """Give the blocks a drop path that grows linearly with the depth, up to ``rate``. Raises UserError."""
    blocks = list(getattr(trunk, "blocks", ()))
    if not blocks or not hasattr(blocks[0], "drop_path1"):
        raise UserError("--drop-path is for vision transformers of timm's; leave it out")
    for index, block in enumerate(blocks):
        own = rate * index / max(1, len(blocks) - 1)
        block.drop_path1 = DropPath(own) if own else nn.Identity()
        block.drop_path2 = DropPath(own) if own else nn.Identity()


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter of a ViT's trunk: 0 embeds, blocks follow from 1, the rest is ``depth`` + 1."""
    if name.startswith(EMBEDDINGS):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_groups(task: nn.Module, trunk: Any, decay: float, weight_decay: float) -> list[ParamGroup]:
    """Return a task's trainable parameters by layer of its trunk, each layer's rate ``decay`` times the next one's.

    Vectors, positions and tokens have no weight decay. What is not in the trunk has the whole rate. Raises UserError
    for a trunk without blocks.
    """
    depth = len(getattr(trunk, "blocks", ()))
    if not depth:
        raise UserError("--layer-decay is for vision transformers of timm's; leave it out")
    names = {id(value): name for name, value in trunk.named_parameters()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for value in task.parameters():
        if not value.requires_grad:
            continue
        name = names.get(id(value), "")
        is_exempt = value.ndim <= 1 or name in EXEMPT
        groups.setdefault((layer_of(name, depth), is_exempt), []).append(value)
    return [
        ParamGroup(values, 0.0 if is_exempt else weight_decay, lr_factor=decay ** (depth + 1 - layer))
        for (layer, is_exempt), values in sorted(groups.items(), key=lambda item: item[0])
    ]
