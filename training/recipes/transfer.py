"""Transfer of an image tower to labelled images: its linear probe, its fine-tuning, and CatLIP's Transfer Init.

The recipes `probe` and `finetune` are two sets of numbers for what is here.
"""

import logging
from dataclasses import replace
from itertools import chain

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from shards_spec.class_map import ClassMap, read_class_map
from shards_spec.class_names import describe_difference
from shards_spec.files import UserError
from shards_spec.messages import counted
from shards_spec.models import LoadedModel, pick_device
from shards_spec.vocab import Vocabulary
from training.config import ModelConfig, is_run, total_steps
from training.configs.transfer import VIEWS, TransferConfig
from training.data.batches import load_batches
from training.data.labelled_images import open_train_and_test
from training.data.labelled_rows import FeatureRows, LabelledImageRows, subset
from training.data.samples import batch_plan
from training.engine.optim import ParamGroup
from training.evaluation.classification import batch_ranges, classification_metrics, no_image_decodes, plain_rows
from training.losses.soft_labels import target_cross_entropy
from training.models.class_teacher import load_class_teacher
from training.models.classifier import Classifier, class_heads, init_head
from training.models.clip_classifier import classifier_of_clip
from training.models.minivit import MiniDeiT
from training.models.mixing import draw_mix, mixed_images, mixed_targets
from training.models.range_augment import RangeAugment, curriculum_loss
from training.models.soft_targets import mixed_soft_targets
from training.recipes.hard_distillation import (
    HardTeacher,
    cached_loss,
    check_distillation,
    is_distilled,
    logits_of_both,
)
from training.recipes.soft_labels import open_soft_labels
from training.recipes.tuning import (
    check_sides,
    exempting_groups,
    layer_groups,
    pool_patches,
    resize_input,
    set_linear_drop_path,
)
from training.runs.run_folder import RunFolder
from training.runs.student import load_student
from training.task import Batch, Features, Losses, Prepared, Task

log = logging.getLogger(__name__)


class TransferTask(Task):
    """A classifier, of which all or only the head is trained.

    Args:
        config: The recipe's config.
        student: The classifier.
        test: The images it is evaluated on.
        total: Steps of the run.
        item_fields: ``images`` or, where they were computed before, ``features``; and ``targets``.
        hard_teacher: What a distillation head learns from; None where there is none, or the samples have soft labels.
    """

    evaluates = True

    def __init__(
        self,
        config: TransferConfig,
        student: LoadedModel,
        test: LabelledImageRows,
        total: int,
        item_fields: tuple[str, ...] = ("images", "targets"),
        hard_teacher: HardTeacher | None = None,
    ) -> None:
        super().__init__(student.model, item_fields)
        self.config = config
        self.is_distilled = is_distilled(student)
        self.hard_teacher = hard_teacher
        self.frozen = None if hard_teacher is None else hard_teacher.frozen
        self.test = test
        self.total = total
        self.augment = RangeAugment(student.mean, student.std) if config.range_augment else None
        if config.freeze:
            self.student.requires_grad_(False)
            self.student.head.requires_grad_(True)

    def train(self, mode: bool = True) -> "TransferTask":
        """Set the training mode; a frozen trunk stays in eval mode."""
        super().train(mode)
        if self.config.freeze:
            self.student.eval()
        return self

    def draw(self, batch: Batch) -> Batch:
        """Return the batch with RangeAugment's draws, and with its images' partners and boxes."""
        if self.augment is not None:
            batch = {**batch, "drawn": self.augment.draw(len(batch["keys"]))}
        return draw_mix(self.config.mix, batch) if self.config.mixes else batch

    def forward(self, batch: Batch) -> Features:
        """Return (n,) ``loss``, ``distillation`` of a distillation head, and RangeAugment's ``error`` of its images."""
        outputs: Features = {}
        features = batch.get("features")
        if features is None:
            images = mixed_images(batch)
            if self.augment is not None and self.training:
                images, outputs["error"] = self.augment(images, batch.get("drawn"))
            if self.is_distilled:
                logits, distilled = logits_of_both(self.student.trunk, images)
                if self.hard_teacher is None:
                    outputs["distillation"] = cached_loss(distilled, batch)
                else:
                    taught = self.hard_teacher.classes(images)
                    outputs["distillation"] = F.cross_entropy(distilled, taught, reduction="none")
                outputs["loss"] = self._label_loss(logits, batch)
                return outputs
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze):
                features = self.student.encode_image(images)
        logits = self.student.head(features).float()
        if self.config.soft.soft_labels is not None:
            outputs["loss"] = target_cross_entropy(logits, mixed_soft_targets(batch, logits.shape[-1]))
        else:
            outputs["loss"] = self._label_loss(logits, batch)
        return outputs

    def _label_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """(n,) cross-entropy of logits (n, K) with the true labels, mixed as the images are."""
        smoothing = self.config.smoothing
        if "share" in batch:
            targets = mixed_targets(batch, logits.shape[-1], smoothing)
            return F.cross_entropy(logits, targets, reduction="none")
        return F.cross_entropy(logits, batch["targets"], reduction="none", label_smoothing=smoothing)

    def losses(self, features: Features, step: int) -> Losses:
        """Return ``classes``, ``augment`` with RangeAugment, and ``distillation``, which has half the weight then."""
        losses = {"classes": features["loss"].mean()}
        if "distillation" in features:
            losses = {"classes": losses["classes"] / 2, "distillation": features["distillation"].mean() / 2}
        if "error" in features:
            losses["augment"] = curriculum_loss(features["error"], step, self.total)
        return losses

    def param_groups(self, weight_decay: float) -> list[ParamGroup]:
        """Return two groups, or with a layer decay two of each layer."""
        decay, trunk = self.config.tuning.layer_decay, self.student.trunk
        if decay != 1:
            return layer_groups(self, trunk, decay, weight_decay)
        if self.is_distilled or isinstance(
            trunk, SwinTransformer | MiniDeiT
        ):  # of a plain ViT all matrices decay, as for CatLIP
            return exempting_groups(self, trunk, weight_decay)
        return super().param_groups(weight_decay)

    def evaluate(self, device: str) -> dict[str, float]:
        """Return acc1, acc5 and mean_per_class_recall on the test images."""
        workers, bf16 = self.config.data.workers, self.config.run.precision == "bf16"
        return classification_metrics(self.student, self.test, device=device, workers=workers, bf16=bf16)


def prepare(config: TransferConfig) -> Prepared:
    """Return student, rows and task. Raises UserError and DataError when data, model or class map do not serve."""
    if config.run.eval_data:
        raise UserError("--eval-data: a classifier is measured on the test images of --data")
    train, test = open_train_and_test(config.data.data)
    base = load_classifier_base(config.student, config.run.seed)
    if config.tuning.pooling == "mean":
        base = pool_patches(base)
    if config.tuning.image_size is not None:
        base = resize_input(base, config.tuning.image_size)
    if config.tuning.drop_path is not None:
        set_linear_drop_path(base.model.trunk, config.tuning.drop_path)
    if config.augment:
        check_sides(base.model, config.sides.sides)
    student = with_new_head(base, config, train.classes)
    check_distillation(config.distillation, student, config.soft.soft_labels, is_frozen=config.freeze)
    plan = batch_plan(config.data.batch_size, config.sides if config.augment else None, config.run.seed)
    chosen = subset(train.labels, config.data.fraction, config.run.seed)
    images, classes = counted(len(train.labels), "image"), counted(len(train.classes), "class", "classes")
    log.info("%d of %s of %s", len(chosen), images, classes)
    total = total_steps(config.run, plan.mean, len(chosen))
    measured = plain_rows(test, student)
    if config.soft.soft_labels is not None:
        asked = (config.views, VIEWS)
        cache = open_soft_labels(config.soft.soft_labels, train, views=asked, side=student.image_size)
        rows = LabelledImageRows(train, student, plan, cache.views, chosen, repeats=config.repeats, soft=cache)
        item_fields = ("images", "targets", *cache.item_fields)
        return Prepared(student, rows, TransferTask(config, student, measured, total, item_fields))
    if config.augment:
        views = config.views.spec(config.run.seed)
        rows = LabelledImageRows(train, student, plan, views, chosen, repeats=config.repeats)
        task = TransferTask(config, student, measured, total, hard_teacher=load_hard_teacher(config, student))
        return Prepared(student, rows, task)
    plain = LabelledImageRows(train, student, plan, None, chosen)
    features = feature_rows(plain, config.run.device, config.data.workers)
    task = TransferTask(config, student, measured, total, ("features", "targets"))
    return Prepared(student, features, task)


def load_hard_teacher(config: TransferConfig, student: LoadedModel) -> HardTeacher | None:
    """Return the live teacher of the distillation head, None without one. Raises UserError, DataError."""
    name, weights = config.distillation.teacher, config.distillation.teacher_weights
    if name is None:
        return None
    teacher = HardTeacher(
        load_class_teacher(name, weights, student.model.names, config.run.seed, config.student.trust), student
    )
    teacher.check_sides(config.sides.sides or (student.image_size,))
    return teacher


def load_classifier_base(config: ModelConfig, seed: int) -> LoadedModel:
    """Return the classifier that one starts from: a run's, timm's, or a CLIP's image tower, which has no classes then.

    The CLIP is a RUN of `clipmill train`, or open_clip's by a folder or by a name with its weights. Raises UserError.
    """
    if not config.model:
        raise UserError("--model: name what to start from, a RUN of `clipmill train`, local-dir:PATH or timm:NAME")
    if not is_run(config.model) and (hint := RunFolder(config.model).stages_hint()):
        raise UserError(f"--model {config.model!r} is no RUN{hint}")
    loaded = load_student(config, seed, random_weights=False)
    return loaded if isinstance(loaded.model, Classifier) else classifier_of_clip(loaded, config.model)


def with_new_head(base: LoadedModel, config: TransferConfig, classes: list[str]) -> LoadedModel:
    """Return a classifier of ``classes`` with the base's trunk.

    Its heads are random, what the class map says, or the base's. Raises UserError where those have other classes.
    """
    if config.tuning.keep_head:
        return _with_own_head(base, config, classes)
    torch.manual_seed(config.run.seed)
    heads = [new_head(base, old, config, classes) for old in base.model.heads]
    trunk = base.model.trunk
    trunk.reset_classifier(len(classes))
    for own, head in zip(class_heads(trunk), heads, strict=True):
        own.load_state_dict(head.state_dict())
    student = Classifier(base.model.name, trunk, None, classes, base.model.options)
    return LoadedModel(student.eval(), None, base.config, base.image_size, base.mean, base.std)


def new_head(base: LoadedModel, old: nn.Linear, config: TransferConfig, classes: list[str]) -> nn.Linear:
    """Return a head over ``classes`` in place of the base's ``old`` one. Raises UserError."""
    head = nn.Linear(old.in_features, len(classes))
    init_head(head, config.tuning.head_std)
    if config.class_map:
        if base.model.vocabulary is None:
            raise UserError(f"--class-map {config.class_map}: --model {config.student.model!r} has no vocabulary")
        class_map = load_class_map(config.class_map, classes, base.model.vocabulary)
        transfer_head(head, old, base.model.vocabulary, class_map, copy_bias=config.copy_bias)
    return head


def _with_own_head(base: LoadedModel, config: TransferConfig, classes: list[str]) -> LoadedModel:
    """A classifier with the base's own head. Raises UserError where it has other classes, or a class map is given."""
    if config.class_map:
        raise UserError(f"--class-map {config.class_map} and --keep-head: both say what the head is; give one of them")
    if not base.model.names:
        raise UserError(
            f"--keep-head: --model {config.student.model!r} has no head of named classes (a RUN of `clipmill train "
            "finetune` or `minivit` has one, and --pooling mean makes a new one); leave it out"
        )
    if base.model.names != classes:
        difference = describe_difference(base.model.names, classes)
        raise UserError(
            f"--keep-head: --model {config.student.model!r} has other classes than --data ({difference}); leave it out"
        )
    return replace(base, model=base.model.eval())


def load_class_map(path: str, classes: list[str], vocabulary: Vocabulary) -> ClassMap:
    """Return the class map in a file, in the order of ``classes``.

    Raises UserError when it has other classes or was made for another vocabulary.
    """
    class_map = read_class_map(path)
    theirs = class_map.header.get("vocabulary_sha256")
    if theirs != vocabulary.sha256:
        raise UserError(
            f"{path} maps to vocabulary {str(theirs)[:12]}, the model's is {vocabulary.sha256[:12]}: make it again, "
            "`clipmill classes NAMES --vocabulary RUN/vocabulary.tsv`"
        )
    rows = {row.name: row for row in class_map.rows}
    if missing := [name for name in classes if name not in rows]:
        raise UserError(
            f"{path} has no row for {counted(len(missing), 'class', 'classes')}, first {missing[0]!r}: "
            "make it of these classes"
        )
    named = chain.from_iterable(row.wnids for row in class_map.rows)
    if unknown := [wnid for wnid in named if wnid not in vocabulary.index]:
        raise UserError(f"{path} names {unknown[0]}, which is not in the vocabulary; correct that row")
    ordered = ClassMap(tuple(rows[name] for name in classes), class_map.header)
    log.info("Transfer Init of %s", ordered.summary)
    return ordered


@torch.no_grad()
def transfer_head(
    head: nn.Linear, pretrained: nn.Linear, vocabulary: Vocabulary, classes: ClassMap, *, copy_bias: bool = False
) -> None:
    """Initialise a head by CatLIP's Transfer Init (arXiv 2404.15653, section 4.2).

    A class takes the row of its synset in the pre-trained head, several rows are averaged. Classes without any keep
    their random rows, scaled to the mean length of the others, so that none starts ahead. Biases stay 0 unless
    ``copy_bias``.
    """
    mapped = {place: row.wnids for place, row in enumerate(classes.rows) if row.wnids}
    for place, wnids in mapped.items():
        ranks = [vocabulary.index[wnid] for wnid in wnids]
        head.weight[place] = pretrained.weight[ranks].mean(dim=0)
        if copy_bias:
            head.bias[place] = pretrained.bias[ranks].mean()
    others = [place for place in range(len(classes.rows)) if place not in mapped]
    if mapped and others:
        length = head.weight[list(mapped)].norm(dim=1).mean()
        head.weight[others] *= length / head.weight[others].norm(dim=1, keepdim=True)


@torch.no_grad()
def feature_rows(rows: LabelledImageRows, device: str, workers: int) -> FeatureRows:
    """Return the features of the plain crops of all ``rows``, in fp32. Images that do not decode are left out.

    Raises DataError when none decodes.
    """
    device = pick_device(device)
    features = list[Tensor]()
    labels = list[Tensor]()
    model = rows.student.model.to(device)
    positions = batch_ranges(len(rows.chosen))
    for batch in load_batches(rows, positions, workers=workers, device=device, skip_empty=True):
        features.append(model.encode_image(batch["images"]).float().cpu())
        labels.append(batch["targets"].cpu())
    model.to("cpu")
    if not labels:
        raise no_image_decodes(rows)
    return FeatureRows(torch.cat(features), torch.cat(labels), rows.student, rows.plan)
