"""MiniViT (Zhang et al., arXiv 2204.07154): tied blocks with transformations of their own, taught by a large model.

Consecutive blocks share their weights, each has its own norms, head maps and convolution or relative positions
(`training.models.minivit`), and a classifier of the same images teaches labels, attention and hidden states:

    L = CE(p_t, p_s) + beta L_attn + gamma L_hddn,  beta = 1, gamma = 0.1, no ground truth

Target (ImageNet-1k, the release): Mini-Swin-T 81.3 (12.0 M parameters), -S 83.9, -B 84.5; Mini-DeiT-Ti 73.0, -S 80.9,
-B 83.2. Cost: 300 epochs, with a forward pass of the teacher. Parameters shrink; time and memory of a step do not.

    clipmill train minivit --data IMAGES --teacher RUN --out runs/mini-swin-t            Mini-Swin-T, teacher a Swin
      --model timm:mini_swin_base_patch4_window7_224 --groups 1 1 1 1                    another size, other groups
      --inherit mean                                                                     from the teacher's weights
      --model timm:mini_deit_small_patch16_224 --teacher timm:regnety_160.deit_in1k      Mini-DeiT-S, by labels alone
        --attention-weight 0 --hidden-weight 0 --prediction deit --repeats 3
        --warmup 6255 --clip-norm None --ema-decay 0.99996
      --soft-labels NAME --attention-weight 0 --hidden-weight 0                          a cache's labels, no teacher

From the released code, Mini-Swin's column: batch 1024, AdamW (0.9, 0.999), lr 1e-3 after 20 epochs of warm-up (25,020
steps of ImageNet-1k) from 1e-6, cosine to 1e-5, weight decay 0.05, clip 5, crops of (0.08, 1), RandAugment
m9-mstd0.5-inc1, mixup 0.8, CutMix 1, erasing 0.25, smoothing 0.1. Readings:
- The Swin teacher of the published students is not named; a student of Swin's shape takes any of its stages' shapes.
- The student's images have the teacher's mean and std, since both see the same.
- Head maps do not decay, since those that start as the identity would be pulled to 0. With ``--inherit`` they do start
  as the identity.
- RandAugment takes the place of colour jitter, as in timm.
- Cached soft labels: mixed images have the mixed labels of both, where a live teacher sees the mixed image.
- Repeated augmentation: the views of an image stand next to each other, an epoch is as many views as there are images.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from shards_spec.files import UserError
from shards_spec.models import TIMM, LoadedModel
from training.config import is_run
from training.configs.minivit import NO_TEACHER, VIEWS, MinivitConfig
from training.data.labelled_images import open_train_and_test
from training.data.labelled_rows import LabelledImageRows, subset
from training.data.order import BatchPlan
from training.engine.optim import ParamGroup
from training.evaluation.classification import classification_metrics, plain_rows
from training.losses.hidden_relations import (
    attention_relation_loss,
    deit_factor,
    deit_soft_distillation,
    hidden_relation_loss,
)
from training.losses.relations import soft_ce
from training.losses.similarity import upcast
from training.losses.soft_labels import target_cross_entropy, target_kl
from training.models.block_reader import BlockReader, stage_pairs
from training.models.class_teacher import load_class_teacher
from training.models.classifier import Classifier, new_classifier
from training.models.minivit import MiniDeiT, MiniSwin
from training.models.minivit_inheritance import inherit_minivit
from training.models.mixing import draw_mix, mixed_images, mixed_targets
from training.models.soft_targets import mixed_soft_targets
from training.models.taps import run_with_taps
from training.models.teacher import FrozenTeacher
from training.recipes.minivit_analysis import LayerAnalysis
from training.recipes.soft_labels import open_soft_labels
from training.recipes.tuning import exempting_groups
from training.runs.student import load_student
from training.task import Batch, Features, Losses, Prepared, Task


class MinivitTask(Task):
    """A classifier that learns from another one.

    Args:
        config: The recipe's config.
        student: The classifier.
        teacher: The model that teaches; gives logits. None where the true labels alone are learnt, or soft labels.
        test: The images that the student is measured on.
        pairs: Blocks of student and teacher that are compared.
        soft_fields: Fields of the samples' soft labels, where they have any.
    """

    evaluates = True

    def __init__(
        self,
        config: MinivitConfig,
        student: Classifier,
        teacher: FrozenTeacher | None,
        test: LabelledImageRows,
        pairs: list[tuple[int, int]],
        soft_fields: tuple[str, ...] = (),
    ) -> None:
        super().__init__(student, ("images", "targets", *soft_fields))
        self.config = config
        self.frozen = teacher
        self.test = test
        self.pairs = pairs
        self.readers = (BlockReader(student.trunk), BlockReader(teacher.model)) if pairs and teacher else None
        self.analysis = None
        if config.log_analysis is not None:
            self.analysis = LayerAnalysis(config.log_analysis, student.trunk, teacher)

    def draw(self, batch: Batch) -> Batch:
        """Return the batch with its images' partners and boxes."""
        if self.analysis is not None:
            self.analysis.start_step()
        return draw_mix(self.config.mix, batch)

    def forward(self, batch: Batch) -> Features:
        """Return the losses (n,) of each sample, by name."""
        if self.analysis is not None:
            self.analysis.keep(batch)
        reader = None if self.readers is None else self.readers[0]
        return self._features(batch, self.student, reader)

    def _features(self, batch: Batch, student: Classifier, reader: BlockReader | None) -> Features:
        """The losses of a student, whose blocks ``reader`` reads."""
        config = self.config.distillation
        images = mixed_images(batch)
        features: Features = {}
        theirs: Tensor | None = None
        if reader is not None and self.readers is not None and self.frozen is not None:
            own = reader.read(partial(run_with_taps, student.trunk), images, [s for s, _ in self.pairs])
            taught = self.readers[1].read(self.frozen.intermediate, images, [t for _, t in self.pairs])
            logits, theirs = own.logits, taught.logits
            if config.attention_weight:
                features["attention"] = self._attention(own.projections, taught.projections, len(images))
            if config.hidden_weight:
                features["hidden"] = self._hidden(own.hidden, taught.hidden)
        else:
            logits = student(images)
            if self.frozen is not None:
                theirs = self.frozen.intermediate(lambda model: model(images), ()).output
        if theirs is not None:
            predict = soft_ce if config.prediction == "cross-entropy" else deit_soft_distillation
            features["prediction"] = predict(logits, theirs, config.temperature)
        elif self.config.soft.soft_labels is not None:
            features["prediction"] = self._stored_prediction(batch, logits)
        if config.label_weight:
            targets = mixed_targets(batch, logits.shape[-1], config.smoothing)
            features["labels"] = -(targets * upcast(logits).log_softmax(-1)).sum(-1)
        return features

    def _stored_prediction(self, batch: Batch, logits: Tensor) -> Tensor:
        """(n,) of the batch's soft labels."""
        config, classes = self.config.distillation, logits.shape[-1]
        targets = mixed_soft_targets(batch, classes, config.temperature)
        if config.prediction == "cross-entropy":
            return target_cross_entropy(logits, targets, config.temperature)
        return target_kl(logits, targets, config.temperature) * deit_factor(config.temperature, classes)

    def _attention(self, own: list[Tensor], theirs: list[Tensor], count: int) -> Tensor:
        """(n,), means over pairs of blocks and windows."""
        heads = self.config.distillation.relation_heads
        pairs = zip(own, theirs, strict=True)
        losses = [attention_relation_loss(one, other, heads).view(count, -1).mean(1) for one, other in pairs]
        return torch.stack(losses).mean(0)

    def _hidden(self, own: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """(n,), the mean over pairs of blocks."""
        mode = self.config.distillation.hidden_mode
        losses = [hidden_relation_loss(one, other, mode) for one, other in zip(own, theirs, strict=True)]
        return torch.stack(losses).mean(0)

    def losses(self, features: Features, step: int) -> Losses:
        """Return the weighted means: ``prediction``, and as configured ``attention``, ``hidden`` and ``labels``."""
        config = self.config.distillation
        weights = {
            "prediction": 1.0,
            "attention": config.attention_weight,
            "hidden": config.hidden_weight,
            "labels": config.label_weight,
        }
        return {name: weights[name] * values.mean() for name, values in features.items()}

    def metrics(self, step: int) -> dict[str, float]:
        """Return what `LayerAnalysis` measures after every ``log_analysis`` steps."""
        if self.analysis is None:
            return {}

        def loss(batch: Batch, student: Classifier) -> Tensor:
            reader = None if self.readers is None else BlockReader(student.trunk)
            return torch.stack([*self.losses(self._features(batch, student, reader), step).values()]).sum()

        return self.analysis.measure(step, self.student, loss)

    def param_groups(self, weight_decay: float) -> list[ParamGroup]:
        """Return two groups: vectors, positions and head maps do not decay."""
        return exempting_groups(self, self.student.trunk, weight_decay)

    def evaluate(self, device: str) -> dict[str, float]:
        """Return acc1, acc5 and mean_per_class_recall on the test images."""
        workers, bf16 = self.config.data.workers, self.config.run.precision == "bf16"
        return classification_metrics(self.student, self.test, device=device, workers=workers, bf16=bf16)


def prepare(config: MinivitConfig) -> Prepared:
    """Return student, rows and task.

    Raises UserError and DataError, among others where student and teacher do not fit together.
    """
    if config.run.eval_data:
        raise UserError("--eval-data: a classifier is measured on the test images of --data")
    train, test = open_train_and_test(config.data.data)
    distillation, seed = config.distillation, config.run.seed
    trust = config.student.trust
    if config.soft.soft_labels is not None:
        check_labels_alone(config)
    student = load_tied_student(config, train.classes)
    frozen, cache = None, None
    if config.soft.soft_labels is not None:
        cache = open_soft_labels(
            config.soft.soft_labels,
            train,
            views=(config.views, VIEWS),
            side=student.image_size,
            temperature=distillation.temperature,
        )
        student = replace(student, mean=cache.mean, std=cache.std)
    elif distillation.teacher != NO_TEACHER:
        teacher = load_class_teacher(distillation.teacher, distillation.teacher_weights, train.classes, seed, trust)
        student = replace(student, mean=teacher.mean, std=teacher.std)
        frozen = teacher.frozen
    if config.tied.inherit != "none":
        inherit_from(student.model.trunk, frozen, config.tied.inherit)
    pairs = [] if frozen is None else find_pairs(config, student, frozen)
    plan = BatchPlan(config.data.batch_size, seed=seed)
    chosen = subset(train.labels, config.data.fraction, seed)
    views = config.views.spec(seed) if cache is None else cache.views
    rows = LabelledImageRows(train, student, plan, views, chosen, repeats=config.repeats, soft=cache)
    soft_fields = () if cache is None else cache.item_fields
    try:
        task = MinivitTask(config, student.model, frozen, plain_rows(test, student), pairs, soft_fields)
    except ValueError as error:
        raise UserError(f"--log-analysis: {error}; leave it out") from error
    return Prepared(student, rows, task)


def check_labels_alone(config: MinivitConfig) -> None:
    """Raise UserError where a config asks for what cached soft labels do not have."""
    distillation, name = config.distillation, config.soft.soft_labels
    if distillation.reads_blocks:
        raise UserError(
            f"--soft-labels {name!r}: attention and hidden states need a live teacher; give --attention-weight 0 "
            "--hidden-weight 0, or --teacher in place of --soft-labels"
        )
    if config.tied.inherit != "none":
        raise UserError(f"--inherit {config.tied.inherit}: --soft-labels {name!r} has no weights; leave one out")


def load_tied_student(config: MinivitConfig, classes: list[str]) -> LoadedModel:
    """Return the student, by the name of a timm model or of a RUN of the same classes. Raises UserError."""
    model = config.student.model
    options = config.tied.options(model)
    if is_run(model):
        if options:
            raise UserError(f"--model {model}: a RUN keeps its own {', '.join(options)}; leave the options out")
        loaded = load_student(config.student, config.run.seed)
        if not isinstance(loaded.model, Classifier) or loaded.model.names != classes:
            raise UserError(f"--model {model}: it is no classifier of the classes of --data {config.data.data}")
        return loaded
    try:
        loaded = new_classifier(
            model,
            len(classes),
            pretrained=config.student.pretrained,
            seed=config.run.seed,
            trust=config.student.trust,
            options=options,
        )
    except TypeError as error:
        raise UserError(
            f"--model {model!r} has no {' or '.join(options)}: take one of {TIMM}mini_deit_*, mini_swin_*"
        ) from error
    loaded.model.names = classes
    return loaded


def inherit_from(student: Any, teacher: FrozenTeacher | None, source: Literal["first", "last", "mean"]) -> None:
    """Start the student from the teacher's weights. Raises UserError where there are none, or their shapes differ."""
    if teacher is None:
        raise UserError(f"--inherit {source}: there is no teacher to inherit from; give --teacher")
    if not isinstance(student, MiniDeiT | MiniSwin):
        raise UserError(f"--inherit {source}: the student is none of {TIMM}mini_deit_*, mini_swin_*")
    try:
        inherit_minivit(student, teacher.model, source)
    except ValueError as error:
        raise UserError(
            f"--inherit {source}: the student cannot start from --teacher {teacher.name!r} ({error}); take a teacher "
            "of the same shape"
        ) from error


@torch.no_grad()
def find_pairs(config: MinivitConfig, student: LoadedModel, teacher: FrozenTeacher) -> list[tuple[int, int]]:
    """Return the blocks that are compared, after both models ran once on an image.

    Raises UserError where a teacher has no blocks, or not the student's windows and tokens, or the relation heads do
    not divide a width.
    """
    distillation = config.distillation
    image = torch.zeros(1, 3, student.image_size, student.image_size)
    trunk = student.model.trunk
    try:
        if not distillation.reads_blocks:
            teacher.intermediate(lambda model: model(image), ())
            return []
        own, theirs = BlockReader(trunk), BlockReader(teacher.model)
        pairs = list(zip(sorted(distillation.student_blocks), sorted(distillation.teacher_blocks), strict=True))
        pairs = pairs or stage_pairs(own.depths, theirs.depths)
        for block, limit in ((pairs[-1][0], len(own.names)), (pairs[-1][1], len(theirs.names))):
            if block >= limit:
                raise ValueError(f"there is no block {block}, the last is {limit - 1}")
        mine = own.read(partial(run_with_taps, trunk.eval()), image, [block for block, _ in pairs])
        taught = theirs.read(teacher.intermediate, image, [block for _, block in pairs])
        for pair, one, other in zip(pairs, mine.projections, taught.projections, strict=True):
            if one.shape[:2] != other.shape[:2]:
                shapes = [f"{len(tensor)} windows of {tensor.shape[1]} tokens" for tensor in (one, other)]
                raise ValueError(f"block {pair[0]} and the teacher's block {pair[1]} have {' and '.join(shapes)}")
            if distillation.attention_weight:
                attention_relation_loss(one, other, distillation.relation_heads)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"--model {config.student.model!r} cannot follow --teacher {teacher.name!r}: {error}. Of any teacher the "
            "labels alone can be learnt: --attention-weight 0 --hidden-weight 0"
        ) from error
    return pairs
