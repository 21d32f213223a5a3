"""A recipe that trains masks with a CLIP and cuts it to them in mid-run: what TinyCLIP asks of the trainer."""

import dataclasses
import sys
from types import ModuleType

import torch.nn.functional as F

from training.engine.optim import ParamGroup, decays
from training.losses.contrastive import clip_loss
from training.losses.sparsity import SparsityConstraint, target_sparsity
from training.models.tinyclip_convert import from_open_clip
from training.models.tinyclip_pruning import (
    attach_masks,
    expected_model_sparsity,
    mask_parameters,
    masks_of,
    materialise,
    reshape_like,
)
from training.recipes import RECIPES, clip
from training.recipes.pairs import open_pairs
from training.task import Prepared, Task

NAME = "masked"
CUT_AFTER = 3  # the step after which the student is cut
TARGET = 0.5
RATE = 0.02 * 60  # of the log-alphas: as far as sixty steps would bring them


class MaskedTask(Task):
    """CLIP with masks on its student until they are applied."""

    def __init__(self, student, config):
        super().__init__(student)
        self.config = config
        self.constraint = SparsityConstraint()

    def draw(self, batch):
        """One sample of the masks per step and process, alike for all chunks."""
        if self.constraint is None:
            return batch
        return {
            **batch,
            "mask_numbers": {name: getattr(self.student, name).masks.draw() for name in ("visual", "text")},
        }

    def forward(self, batch):
        numbers = batch.get("mask_numbers", {"visual": None, "text": None})
        return {
            "image": F.normalize(self.student.visual(batch["images"], numbers["visual"]), dim=-1),
            "text": F.normalize(self.student.text(batch["tokens"], numbers["text"]), dim=-1),
        }

    def losses(self, features, step):
        losses = {"contrastive": clip_loss(features["image"], features["text"], self.student.logit_scale.exp())}
        if self.constraint is not None:
            losses["sparsity"] = self.constraint(
                expected_model_sparsity(self.student), target_sparsity(step, 0, TARGET, 2)
            )
        return losses

    def param_groups(self, weight_decay):
        masks = mask_parameters(self.student)
        multipliers = [] if self.constraint is None else list(self.constraint.parameters())
        own = {id(parameter) for parameter in (*masks, *multipliers)}
        others = [(name, parameter) for name, parameter in self.named_parameters() if id(parameter) not in own]
        groups = [
            ParamGroup([parameter for name, parameter in others if decays(name, parameter)], weight_decay),
            ParamGroup([parameter for name, parameter in others if not decays(name, parameter)]),
        ]
        if self.constraint is not None:
            adam = {"fixed_lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8}
            groups += [ParamGroup(masks, **adam), ParamGroup(multipliers, maximize=True, **adam)]
        return groups

    def after_step(self, step):
        for masks in masks_of(self.student):
            masks.clamp()
        if step >= CUT_AFTER and self.constraint is not None:
            materialise(self.student, self.config)
            self.constraint = None
            self.rebuilt = True

    def reshape_like(self, weights):
        student = {
            name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")
        }
        if reshape_like(self.student, self.config, student):
            self.rebuilt = True
        if "constraint.linear" not in weights:
            self.constraint = None


def prepare(config):
    """Student with masks, samples and task."""
    student, samples = open_pairs(config.data, config.views, config.student, config.run.seed)
    model, model_config = from_open_clip(student.model, student.config)
    attach_masks(model, model_config)
    student = dataclasses.replace(student, model=model, config=model_config)
    return Prepared(student, samples, MaskedTask(model, model_config))


def register():
    """Make the recipe known."""
    module = ModuleType(f"training.recipes.{NAME}")
    module.config, module.prepare = clip.config, prepare
    RECIPES[NAME] = "masks"
    sys.modules[module.__name__] = module


def unregister():
    """Forget it again."""
    RECIPES.pop(NAME, None)
    sys.modules.pop(f"training.recipes.{NAME}", None)
