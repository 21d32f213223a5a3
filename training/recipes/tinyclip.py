"""TinyCLIP (Wu et al., arXiv 2309.12314): a CLIP of a part of the parameters, by three parts that go together.

- Affinity mimicking (section 3.1): the student's softmax over image-text similarities follows the teacher's, rows and
  columns.
- Weight inheritance (section 3.2): the student starts from a part of the teacher, chosen by hand (every second layer,
  the first units of each kind) or by masks that are learned with the weights for some steps and then applied.
- Stages (section 3.3): small students are made in steps of about a quarter of the parameters; the teacher stays the
  whole model throughout.

    L = L_affinity + lambda (q - p)+ + beta (q - p)+^2     with masks; p: their sparsity, q: its target

Targets: ImageNet zero-shot 62.4 (61M/32, by hand) and 59.8 (40M/32), 63.9, 61.4 and 53.7 (75, 50 and 25 % of ViT-B/32,
by masks), on LAION-400M; distillation with inherited weights reaches what a student from random weights does 1.4 to
7.8 times as fast. Cost: 6 epochs of 400 million pairs per stage.

    clipmill train tinyclip --data ROOT --out RUN                                        distillation alone
      --inherit manual --teacher-weights ViT-B-32:laion2b_e16
        --model TinyCLIP-ViT-61M-32-Text-29M                                             one stage by hand
        --stage-models TinyCLIP-ViT-61M-32-Text-29M,TinyCLIP-ViT-40M-32-Text-19M         two
      --inherit auto --teacher-weights ViT-B-32:laion2b_e16
        --sparsity 0.25 --prune-step 3000                                                one stage by masks, 75 %
        --stages 1,0.75,0.5,0.25 --stage-prune-steps 3000,5000,8000                      three

Numbers are those of the released LAION-400M scripts: batch 32,768, lr 1e-4, weight decay 0.2, betas (0.9, 0.98), eps
1e-6, clip 5, warm-up 2000 (with masks: --warmup as --prune-step), 6 epochs, scale 50 on both sides and frozen, no
hard-label loss; log-alphas at +0.02, lambda and beta by ascent at 0.02, AdamW's own betas, no decay. Readings, each the
default here where paper and code disagree or have a defect:
- The affinity loss is the mean of both directions (code), not their sum (paper).
- The scale is 50 before the first step, too; the released student begins at 14.3.
- The sparsity loss is one-sided (code); --sparsity-form two-sided is the paper's, with a lambda that takes either sign.
- Cutting the student is exact: see `training.models.tinyclip_pruning`.
- Masks of a later stage are on the units that are left; p still counts the whole model's weights.
- The target starts at the sparsity that the former stage's student has, not at the one that it was asked for.
- Teacher features come from a cache and views are the cache's, which costs nothing per step; --teacher-from live runs
  the teacher on the batch, as the scripts do.
- fp16 is bf16 here. CLIP-KD's losses (arXiv 2307.12732) can be added: see `training.recipes.clip_kd`.

The default student, ViT-M-32, has the image tower of TinyCLIP-ViT-40M/32 and a text tower of 12 layers instead of 6.
"""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shards_spec.files import UserError
from training.config import total_steps
from training.configs.tinyclip import TinyclipConfig
from training.data.paired_views import KEEP
from training.engine.optim import ParamGroup
from training.losses.contrastive import clip_loss
from training.losses.distillation import ensemble_affinity_loss, feature_loss
from training.losses.similarity import Similarity
from training.models.tinyclip_table import markdown, model_table, parameters_left
from training.recipes.clip_kd import ClipKd, MaskedStudent
from training.recipes.pairs import clamp_logit_scale, open_pairs
from training.recipes.tinyclip_masks import MaskedPhase, check_length, masked_copy
from training.recipes.tinyclip_weights import (
    NamedModels,
    check_activation,
    inherit_by_hand,
    open_teachers,
)
from training.runs.run_folder import RunFolder
from training.runs.student import StartWeights, parse_model
from training.task import Batch, Features, Losses, Prepared, Task

log = logging.getLogger(__name__)


class TinyclipTask(Task):
    """A student that follows its teachers' similarities, and may have masks that are learned with it.

    Args:
        student: The student.
        weights: Weights of ``affinity``, ``feature`` and ``contrastive``; a term of weight 0 is not computed.
        scale: The student's logit scale; None: it learns its own.
        clip_kd: The teachers with their scales, linear maps to their widths, and CLIP-KD's losses.
        phase: The masks of a student that has some, until they are applied.
        masked: The student's pass over a part of the patches, where there is one.
    """

    def __init__(
        self,
        student: Any,
        weights: dict[str, float],
        scale: float | None,
        clip_kd: ClipKd,
        *,
        phase: MaskedPhase | None = None,
        masked: MaskedStudent | None = None,
    ) -> None:
        drawn = (KEEP,) if masked is not None else ()
        super().__init__(student, ("images", "tokens", *clip_kd.teachers.item_fields, *drawn))
        self.weights = weights
        self.scale = scale
        self.teacher = clip_kd.teachers
        self.clip_kd = clip_kd
        self.masked = masked
        self.phase = phase
        self.constraint = None if phase is None else phase.constraint()
        if scale is not None:
            with torch.no_grad():
                self.student.logit_scale.fill_(math.log(scale)).requires_grad_(False)

    @property
    def changes_shape(self) -> bool:
        """Whether the student is cut to its masks in this run."""
        return self.phase is not None

    def draw(self, batch: Batch) -> Batch:
        """Return the batch with the random numbers of the step's masks: one sample for all of a process's pairs."""
        if self.constraint is None:
            return batch
        return {**batch, "masks": {name: getattr(self.student, name).masks.draw() for name in ("visual", "text")}}

    def forward(self, batch: Batch) -> Features:
        """Return ``image``, ``text`` (n, D) and the teachers' features (n, D'), all normalised.

        As they are, ``raw_image`` and ``raw_text`` (n, D) for linear maps to other widths, and ``masked_image`` (n, D)
        of a part of the patches.
        """
        taught = self.teacher.features(batch)
        image, text = self._encode(batch)
        features = {"image": F.normalize(image, dim=-1), "text": F.normalize(text, dim=-1)}
        features |= {name: F.normalize(value.float(), dim=-1) for name, value in taught.items()}
        if self.clip_kd.projects:
            features |= {"raw_image": image, "raw_text": text}
        if self.masked is not None:
            features["masked_image"] = self.masked.encode(self.student, batch)
        return features

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's features, of any length."""
        images, tokens = batch["images"], batch["tokens"]
        if "masks" not in batch:
            image = self.student.encode_image(images, normalize=False)
            return image, self.student.encode_text(tokens, normalize=False)
        return self.student.visual(images, batch["masks"]["visual"]), self.student.text(tokens, batch["masks"]["text"])

    def losses(self, features: Features, step: int) -> Losses:
        """Return ``affinity``, ``feature``, ``contrastive``: those whose weight is not 0; with masks ``sparsity``.

        Further ones are those of `ClipKd.losses`.
        """
        image, text = features["image"], features["text"]
        scale = self.student.logit_scale.exp() if self.scale is None else self.scale
        students = self.clip_kd.towards_teachers(
            (image, text), (features.get("raw_image", image), features.get("raw_text", text))
        )
        terms = {
            "affinity": lambda: self.teacher.relational(
                partial(ensemble_affinity_loss, Similarity(image, text, scale), share=self.row_share), features
            ),
            "feature": lambda: self.clip_kd.compared(feature_loss, students, features),
            "contrastive": lambda: clip_loss(image, text, scale, share=self.row_share),
        }
        losses = {name: weight * terms[name]() for name, weight in self.weights.items() if weight}
        losses |= self.clip_kd.losses(features, features, students, scale, share=self.row_share)
        if self.phase is not None and self.constraint is not None:
            losses["sparsity"] = self.constraint(self.phase.sparsity(self.student), self.phase.target(step))
        return losses

    def param_groups(self, weight_decay: float) -> list[ParamGroup]:
        """Return those of the weights; masks and multipliers have two of their own, at a constant rate."""
        groups = super().param_groups(weight_decay)
        if self.phase is None or self.constraint is None:
            return groups
        return self.phase.split(groups, self.student, self.constraint)

    def after_step(self, step: int) -> None:
        """Keep a learned logit scale at 100 at most and the masks in their range; cut the student when it is time."""
        if self.scale is None:
            clamp_logit_scale(self.student)
        self.clip_kd.clamp()
        if self.phase is None or self.constraint is None:
            return
        self.phase.clamp(self.student)
        if step + 1 >= self.phase.config.prune_step:
            self._apply_masks()
            log.info("cut to its masks after step %d:\n%s", step + 1, markdown(self.student))
            self.rebuilt = True

    def _apply_masks(self) -> None:
        assert self.phase is not None
        self.phase.apply(self.student)
        self.constraint = None

    def reshape_like(self, weights: Mapping[str, Tensor]) -> None:
        """Cut the student as it is in a checkpoint."""
        if self.phase is not None and self.phase.reshape_like(self.student, weights):
            self.constraint = None
            self.rebuilt = True

    def metrics(self, step: int) -> dict[str, float]:
        """Return ``sparsity`` and ``parameters``, and with masks ``sparsity_target``, ``lambda`` and ``beta``.

        With masks the sparsity is the expected one, p, and the parameters are those that would be left.
        """
        if self.phase is None:
            return {}
        if self.constraint is None:
            return {"sparsity": model_table(self.student)["sparsity"], "parameters": parameters_left(self.student)}
        return {
            "sparsity": self.phase.sparsity(self.student).item(),
            "sparsity_target": self.phase.target(step),
            "lambda": self.constraint.linear.item(),
            "beta": self.constraint.quadratic.item(),
            "parameters": parameters_left(self.student),
        }

    def table(self) -> dict[str, Any]:
        """Return the sizes of a student that has or had masks: dims per tower, heads and neurons per layer."""
        return {} if self.phase is None else {"masks": self.constraint is not None, **model_table(self.student)}

    def take_final_shape(self) -> bool:
        """Cut a student with masks to the sparsity that is asked for, alike in all layers."""
        if self.phase is None or self.constraint is None:
            return False
        self.phase.foresee(self.student)
        self._apply_masks()
        return True


def prepare(config: TinyclipConfig) -> Prepared:
    """Return student, samples and task.

    Raises UserError and DataError, among others when student and teacher do not fit together.
    """
    inheritance = config.inheritance
    trust, seed = config.student.trust, config.run.seed
    is_auto = inheritance.inherit == "auto"
    if is_auto:
        check_activation(inheritance.source)
    start = parse_model(inheritance.source, trust) if is_auto else StartWeights(config.student, is_random=True)
    student, samples = open_pairs(config.data, config.views, start.config, seed, random_weights=start.is_random)
    models = NamedModels(seed, trust)
    if is_auto:
        models.keep(inheritance.source, student)
    is_new = RunFolder(config.run.out).newest() is None  # else the weights are the checkpoint's
    teacher = open_teachers(inheritance, config.taught_by, student, samples.cache, models, is_new=is_new)
    clip_kd = ClipKd(config.clip_kd, student.config["embed_dim"], teacher, compares=config.feature_weight > 0)
    masked = None
    if config.clip_kd.mfd_weight:
        if is_auto:
            raise UserError("--mfd-weight: a student with learned masks cannot leave patches out: leave it out")
        masked = MaskedStudent(config.clip_kd, student.model, config.student.model)
        masked.draw_in(samples, seed)
    phase = None
    if is_auto:
        check_length(config.masks, total_steps(config.run, samples.plan.mean, samples.order.total))
        student, phase = masked_copy(student, start.config.model, config.masks)
        samples.student = student  # the plain copy is not needed any more
    elif inheritance.inherit == "manual" and is_new:
        inherit_by_hand(inheritance, student, config.student.model, samples, models)
    weights = {
        "affinity": config.affinity_weight,
        "feature": config.feature_weight,
        "contrastive": config.contrastive_weight,
    }
    task = TinyclipTask(student.model, weights, config.fixed_logit_scale, clip_kd, phase=phase, masked=masked)
    return Prepared(student, samples, task)
