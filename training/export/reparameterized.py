"""MobileCLIP's and SiCLIP's towers with parallel branches fused into one convolution each (FastViT, arXiv 2303.14189).

It computes the same in eval mode, faster, and cannot be trained further. The timm names ``NAME_fused`` and
``"fused": true`` in the text tower's config (`training.models.mobileclip`) build what the fused weights fit.
"""

from dataclasses import replace
from typing import Any

from timm.models.fastvit import FastVit
from timm.utils.model import reparameterize_model

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.models.mobileclip import FUSED
from training.models.text_tower import RepMixerBlock, TextTower


def has_branches(student: LoadedModel) -> bool:
    """Return whether there is anything to fuse."""
    model: Any = student.model
    text = getattr(model, "text", None)
    has_mixer = isinstance(text, TextTower) and isinstance(text.first, RepMixerBlock)
    return has_mixer or isinstance(getattr(getattr(model, "visual", None), "trunk", None), FastVit)


def reparameterized(student: LoadedModel) -> LoadedModel:
    """Return a copy of a student with its branches fused, and the config that builds it.

    Raises UserError when it has no branches.
    """
    if not has_branches(student):
        raise UserError("--reparameterize: the student has no parallel branches; they are MobileCLIP's and SiCLIP's")
    model: Any = reparameterize_model(student.model.eval())
    config = dict(student.config)
    if isinstance(getattr(model.visual, "trunk", None), FastVit):
        name = config["vision_cfg"]["timm_model_name"]
        config["vision_cfg"] = config["vision_cfg"] | {"timm_model_name": f"{name}{FUSED}"}
    if isinstance(getattr(model, "text", None), TextTower):
        config["text_cfg"] = config["text_cfg"] | {"fused": True}
    return replace(student, model=model, config=config)
