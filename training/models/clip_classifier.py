"""The image tower of a CLIP as a classifier that has no classes yet: its pooled features, before the projection."""

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from torch import nn

from shards_spec.files import UserError
from shards_spec.library_errors import short
from shards_spec.models import TIMM, LoadedModel
from training.models.classifier import Classifier, new_classifier
from training.models.clip_image_tower import NAME
from training.models.plain_vit import NotPlain, timm_clip_vit
from training.models.tinyclip_convert import is_pruned
from training.models.tinyclip_pruning import masks_of, materialise

PROJECTIONS = ("proj", "attnpool.c_proj.weight", "attnpool.c_proj.bias")  # of open_clip's towers


def classifier_of_clip(loaded: LoadedModel, name: str) -> LoadedModel:
    """Return a classifier over one class, whose head sees what the CLIP's projection sees.

    A tower of timm's stays what it is, and CLIP's plain ViT becomes timm's; others are a
    `training.models.clip_image_tower.ClipImageTower`. A student that has masks is cut to them.

    Args:
        loaded: A CLIP.
        name: What it was loaded by, for messages.

    Raises:
        UserError: The tower cannot be built alone, or has more than one feature of an image.
    """
    if is_pruned(loaded.model) and masks_of(loaded.model):
        materialise(loaded.model, loaded.config)
    visual: Any = getattr(loaded.model, "visual", None)
    if isinstance(visual, TimmModel):
        base = _of_timms(visual, loaded, name)
    else:
        base = _of_open_clips(visual, loaded.config)
        _check_features(base.model, loaded.image_size, name)
    return LoadedModel(base.model, None, base.config, loaded.image_size, loaded.mean, loaded.std)


def _of_timms(visual: TimmModel, loaded: LoadedModel, name: str) -> LoadedModel:
    """The timm model in open_clip's wrapper, by its own name."""
    architecture = f"{TIMM}{loaded.config['vision_cfg']['timm_model_name']}"
    base = new_classifier(architecture, 1)
    head = {name for name, part in base.model.trunk.named_modules() if part is base.model.head}
    weights = {key: value for key, value in visual.trunk.state_dict().items() if key.rpartition(".")[0] not in head}
    wanted = {key for key in base.model.trunk.state_dict() if key.rpartition(".")[0] not in head}
    if differing := sorted(set(weights) ^ wanted):  # the head is not there, or projects to the embedding
        raise UserError(f"--model {name!r}: its image tower is not {architecture} ({differing[:3]})")
    base.model.trunk.load_state_dict(weights, strict=False)
    return base


def _of_open_clips(visual: nn.Module, config: dict[str, Any]) -> LoadedModel:
    """open_clip's own tower: as timm's ViT where it is plain, else as it is without its projection."""
    try:
        trunk, options = timm_clip_vit(visual)
    except NotPlain:
        # a checkpoint's tag may ask for QuickGELU where the config does not
        quick_gelu = bool(getattr(visual, "quick_gelu", False)) or any(
            isinstance(part, QuickGELU) for part in visual.modules()
        )
        described = {"embed_dim": config["embed_dim"], "vision_cfg": dict(config["vision_cfg"])}
        base = new_classifier(f"{TIMM}{NAME}", 1, options={**described, "quick_gelu": quick_gelu})
        weights = {key: value for key, value in visual.state_dict().items() if key not in PROJECTIONS}
        base.model.trunk.tower.load_state_dict(weights)
        return base
    architecture = trunk.pretrained_cfg["architecture"]
    base = new_classifier(f"{TIMM}{architecture}", 1, options=options)
    trunk.reset_classifier(1)
    base.model.trunk.load_state_dict(trunk.state_dict())
    return base


@torch.no_grad()
def _check_features(model: Classifier, side: int, name: str) -> None:
    """Raise UserError for a tower that does not give one feature (D,) of an image."""
    try:
        shape = tuple(model.encode_image(torch.zeros(1, 3, side, side)).shape)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--model {name!r}: its image tower does not serve as a classifier ({short(error)})") from error
    wanted = (1, model.head.in_features)
    if shape != wanted:
        raise UserError(
            f"--model {name!r}: its image tower does not serve as a classifier, as it gives {shape} of an image in "
            f"place of one feature {wanted}: take one that pools its tokens"
        )
