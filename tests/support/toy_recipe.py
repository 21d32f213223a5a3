"""A recipe that uses all of the contract: own rates, gradient ascent, and a student that loses a layer in mid-run."""

import sys
from types import ModuleType

import torch
from torch import nn

from training.configs import clip
from training.engine.optim import ParamGroup, decays
from training.losses.contrastive import clip_loss
from training.recipes import RECIPES
from training.recipes.pairs import open_pairs
from training.task import Prepared, Task

NAME = "toy"
LAST_BLOCK = "student.visual.transformer.resblocks.1.ln_1.weight"
REBUILD_AT = 3  # the step after which the student is smaller


class ToyTask(Task):
    """CLIP with a multiplier that is maximised; the image tower's first block goes, the other one gets narrower."""

    def __init__(self, student, config, item_fields=("images", "tokens")):
        super().__init__(student, item_fields)
        self.config = config
        self.multiplier = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        return {
            "image": self.student.encode_image(batch["images"], normalize=True),
            "text": self.student.encode_text(batch["tokens"], normalize=True),
        }

    def losses(self, features, step):
        losses = {"contrastive": clip_loss(features["image"], features["text"], self.student.logit_scale.exp())}
        if self.multiplier is not None:
            losses["constraint"] = self.multiplier * features["image"].mean(0).square().sum()
        return losses

    def param_groups(self, weight_decay):
        groups = []
        for name, parameter in self.named_parameters():
            if name == "multiplier":
                group = ParamGroup([parameter], fixed_lr=0.02, maximize=True, betas=(0.9, 0.999), eps=1e-8)
            else:
                factor = 1.0 if ".visual." in name else 0.5
                group = ParamGroup([parameter], weight_decay if decays(name, parameter) else 0.0, lr_factor=factor)
            groups.append(group)
        return groups

    def after_step(self, step):
        if step >= REBUILD_AT and self.multiplier is not None:
            self._shrink()

    def reshape_like(self, weights):
        if LAST_BLOCK not in weights and self.multiplier is not None:
            self._shrink()

    def _shrink(self):
        """Drop the first block, keep the other one's parameters, but those of its MLP's, which get half as wide."""
        tower = self.student.visual.transformer
        (block,) = tower.resblocks[1:]
        tower.resblocks = nn.ModuleList([block])
        wide, narrow = block.mlp.c_fc, block.mlp.c_proj
        half = wide.out_features // 2
        wide.weight = nn.Parameter(wide.weight.detach()[:half].clone())
        wide.bias = nn.Parameter(wide.bias.detach()[:half].clone())
        wide.out_features = half
        narrow.weight = nn.Parameter(narrow.weight.detach()[:, :half].clone())
        narrow.in_features = half
        tower.layers = 1
        self.multiplier = None
        self.config["vision_cfg"] |= {"layers": 1, "mlp_ratio": self.config["vision_cfg"].get("mlp_ratio", 4.0) / 2}
        self.rebuilt = True


def prepare(config):
    """Student, samples and task."""
    student, samples = open_pairs(config.data, config.views, config.student, config.run.seed)
    student.config["vision_cfg"] = dict(student.config["vision_cfg"])
    return Prepared(student, samples, ToyTask(student.model, student.config))


def register():
    """Make the recipe known."""
    recipe, configs = (ModuleType(f"training.{package}.{NAME}") for package in ("recipes", "configs"))
    recipe.prepare, configs.config = prepare, clip.config
    RECIPES[NAME] = "a toy"
    sys.modules.update({module.__name__: module for module in (recipe, configs)})


def unregister():
    """Forget it again."""
    RECIPES.pop(NAME, None)
    for package in ("recipes", "configs"):
        sys.modules.pop(f"training.{package}.{NAME}", None)
