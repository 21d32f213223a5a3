"""TinyCLIP's phase with masks: what is trained with the student in it, and how it ends."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.config import MaskConfig
from training.engine.optim import ParamGroup
from training.losses.sparsity import SparsityConstraint, target_sparsity
from training.models.tinyclip_convert import Config, from_open_clip, is_pruned
from training.models.tinyclip_masks import TowerMasks
from training.models.tinyclip_pruning import (
    attach_masks,
    expected_model_sparsity,
    mask_parameters,
    masks_of,
    materialise,
    reshape_like,
)
from training.models.tinyclip_table import model_table
from training.runs.model_folder import with_absolute_bpe
from training.runs.student import STUDENT

BETAS = (0.9, 0.999)  # of AdamW for masks and multipliers, as PyTorch has them
EPS = 1e-8
CERTAIN = 30.0  # a log-alpha that keeps a unit for sure, and its negative one that does not


@dataclass(frozen=True)
class MaskedPhase:
    """The masks of a run.

    Attributes:
        config: When they are applied, and how sparse the student is to be then.
        start: The target of the first step: the sparsity of the former stage's student.
        description: The student's model config, which changes with its sizes.
    """

    config: MaskConfig
    start: float
    description: Config

    def constraint(self) -> SparsityConstraint:
        """Return the sparsity loss with its multipliers."""
        return SparsityConstraint(self.config.sparsity_form == "two-sided")

    def target(self, step: int) -> float:
        """Return q of a step, from 0."""
        return target_sparsity(step, self.start, self.config.sparsity, self.config.sparsity_ramp)

    def sparsity(self, student: nn.Module) -> Tensor:
        """Return p, a scalar with a graph."""
        return expected_model_sparsity(student)

    def split(self, groups: list[ParamGroup], student: nn.Module, constraint: SparsityConstraint) -> list[ParamGroup]:
        """Return the groups without masks and multipliers, and a group of each of these.

        The multipliers go up their gradient. Neither has weight decay.
        """
        masks, multipliers = mask_parameters(student), list(constraint.parameters())
        own = {id(parameter) for parameter in (*masks, *multipliers)}
        others = [
            replace(group, params=[parameter for parameter in group.params if id(parameter) not in own])
            for group in groups
        ]
        rate = self.config.mask_lr
        return [
            *others,
            ParamGroup(masks, fixed_lr=rate, betas=BETAS, eps=EPS),
            ParamGroup(multipliers, fixed_lr=rate, maximize=True, betas=BETAS, eps=EPS),
        ]

    def clamp(self, student: nn.Module) -> None:
        """Keep the log-alphas in their range."""
        for masks in masks_of(student):
            masks.clamp()

    def apply(self, student: nn.Module) -> None:
        """Cut the student to its masks. Raises UserError when they keep nothing of a tower."""
        materialise(student, self.description)

    def reshape_like(self, student: nn.Module, weights: Mapping[str, Tensor]) -> bool:
        """Give the student the sizes of a task's state dict; return whether that has no masks any more."""
        own = {name.removeprefix(STUDENT): value for name, value in weights.items() if name.startswith(STUDENT)}
        return reshape_like(student, self.description, own)

    @torch.no_grad()
    def foresee(self, student: nn.Module) -> None:
        """Set the masks so that the student has its final sparsity: the same share of dimensions, heads and neurons.

        Which share each of them will have is learned, so this is a guess.
        """
        share = ((1 - self.config.sparsity) / (1 - self.start)) ** 0.5
        for masks in masks_of(student):
            _keep_share(masks, share)


def _keep_share(masks: TowerMasks, share: float) -> None:
    """Keep the first units of each group."""
    groups = [
        masks.dims,
        *torch.split(masks.heads, masks.head_counts),
        *torch.split(masks.neurons, masks.neuron_counts),
    ]
    for units in groups:
        units.fill_(-CERTAIN)
        units[: max(1, round(share * len(units)))] = CERTAIN


def masked_copy(loaded: LoadedModel, name: str, config: MaskConfig) -> tuple[LoadedModel, MaskedPhase]:
    """Return a model with masks on all of its units as the student, and its phase.

    Args:
        loaded: The teacher, or the student of the former stage.
        name: What it was loaded by, for messages and its files.
        config: The masks'.

    Raises:
        UserError: Its architecture cannot have masks, it has some that were not applied, or it is sparser already.
    """
    if is_pruned(loaded.model) and masks_of(loaded.model):
        raise UserError(
            f"{name} still has masks, the next stage begins with a student that was cut to them: train it past its "
            "--prune-step"
        )
    loaded = with_absolute_bpe(loaded, name)
    model, description = from_open_clip(loaded.model, loaded.config)
    start: float = model_table(model)["sparsity"]
    if config.sparsity < start:
        raise UserError(
            f"--sparsity {config.sparsity:g}: {name} has a sparsity of {start:.3f} already; give at least that"
        )
    attach_masks(model, description)
    return replace(loaded, model=model, config=description), MaskedPhase(config, start, description)


def check_length(config: MaskConfig, steps: int) -> None:
    """Raise UserError where a run ends before its masks are applied."""
    if config.prune_step > steps:
        raise UserError(
            f"--prune-step {config.prune_step}: the run has {steps} steps, so its masks would never be applied; give "
            "fewer, or more --steps or --epochs"
        )
