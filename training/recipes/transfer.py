"""Transfer of an image tower to labelled images: its linear probe, its fine-tuning, and CatLIP's Transfer Init.

The recipes `probe` and `finetune` are two sets of numbers for what is here.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tyro.conf import OmitArgPrefixes

from shards_spec.class_map import ClassMap, read_class_map
from shards_spec.files import UserError
from shards_spec.models import TIMM, LoadedModel, pick_device
from shards_spec.vocab import Vocabulary
from training.config import (
    LabelledImageConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SideConfig,
    ViewConfig,
    require,
    total_steps,
)
from training.data.batches import load_batches
from training.data.labelled_images import open_images
from training.data.labelled_rows import FeatureRows, LabelledImageRows, subset
from training.data.samples import batch_plan
from training.evaluation.classification import batch_ranges, classification_metrics, describe_difference, plain_rows
from training.models.classifier import Classifier, new_classifier, new_rows
from training.models.range_augment import RangeAugment, curriculum_loss
from training.runs.student import load_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransferConfig:
    """Train a classifier of labelled images from a pre-trained image tower."""

    data: OmitArgPrefixes[LabelledImageConfig] = field(default_factory=LabelledImageConfig)
    views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    sides: OmitArgPrefixes[SideConfig] = field(default_factory=SideConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    freeze: bool = True
    """train the head alone, the rest stays as it is, in eval mode"""
    augment: bool = True
    """draw views; off, with freeze, features of the plain crops are computed once: much faster, no augmentation"""
    range_augment: bool = False
    """brightness, contrast and noise of learned ranges, on the device"""
    smoothing: float = 0.1
    """label smoothing of the cross-entropy"""
    class_map: str = ""
    """Transfer Init: class map of `clipmill classes`, whose rows of the pre-trained head the classes start from"""
    copy_bias: bool = False
    """Transfer Init takes the rows' biases, too, which hold how often captions name a synset"""

    def __post_init__(self) -> None:
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "in [0, 1)")
        require(self.augment or self.freeze, "augment", False, "on, unless --freeze")
        require(self.augment or not self.range_augment, "range_augment", True, "off with --no-augment")


class TransferTask(nn.Module):
    """A classifier, of which all or only the head is trained; ``test`` are the images it is measured on."""

    def __init__(self, config: TransferConfig, student: LoadedModel, test: LabelledImageRows, total: int) -> None:
        super().__init__()
        self.student: Classifier = student.model
        self.config, self.loaded, self.test, self.total = config, student, test, total
        self.augment = RangeAugment(student.mean, student.std) if config.range_augment else None
        if config.freeze:
            self.student.requires_grad_(False)
            self.student.head.requires_grad_(True)

    def train(self, mode: bool = True) -> "TransferTask":
        """A frozen trunk stays in eval mode."""
        super().train(mode)
        if self.config.freeze:
            self.student.eval()
        return self

    def draw(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with RangeAugment's draws, before it is cut into chunks."""
        return batch if self.augment is None else {**batch, "drawn": self.augment.draw(len(batch["keys"]))}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """(n,) ``loss`` and ``right``; (n,) ``error`` of RangeAugment's images."""
        found = dict[str, Tensor]()
        features = batch.get("features")
        if features is None:
            images = batch["images"]
            if self.augment is not None and self.training:
                images, found["error"] = self.augment(images, batch.get("drawn"))
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze):
                features = self.student.encode_image(images)
        logits, targets = self.student.head(features).float(), batch["targets"]
        found["loss"] = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.config.smoothing)
        return found

    def losses(self, features: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """``classes``, and ``augment`` when there is RangeAugment."""
        losses = {"classes": features["loss"].mean()}
        if "error" in features:
            losses["augment"] = curriculum_loss(features["error"], step, self.total)
        return losses

    def after_step(self) -> None:
        """Nothing."""

    def measure(self, device: str) -> dict[str, float]:
        """acc1, acc5, mean_per_class_recall on the test images."""
        config = self.config
        workers, bf16 = config.data.workers, config.run.precision == "bf16"
        return classification_metrics(self.student, self.test, device=device, workers=workers, bf16=bf16)


def prepare(config: TransferConfig) -> tuple[LoadedModel, LabelledImageRows | FeatureRows, TransferTask]:
    """Student, reader and task. Raises UserError and DataError when data, model or class map do not serve."""
    if config.run.eval_data:
        raise UserError("--eval-data: a classifier is measured on the test images of --data")
    train, test = open_images(config.data.data, True), open_images(config.data.data, False)
    if train.classes != test.classes:
        raise UserError(
            f"{config.data.data}: train and test have other classes: {describe_difference(train.classes, test.classes)}"
        )
    base = load_base(config.student, config.run.seed)
    student = successor(base, config, train.classes)
    plan = batch_plan(config.data.batch_size, config.sides if config.augment else None, config.run.seed)
    chosen = subset(train.labels, config.data.fraction, config.run.seed)
    log.info("%d of %d images of %d classes", len(chosen), len(train.labels), len(train.classes))
    rows: LabelledImageRows | FeatureRows
    if config.augment:
        rows = LabelledImageRows(train, student, plan, config.views.spec(config.run.seed), chosen)
    else:
        rows = feature_rows(
            LabelledImageRows(train, student, plan, None, chosen), config.run.device, config.data.workers
        )
    total = total_steps(config.run, plan.mean, len(chosen))
    return student, rows, TransferTask(config, student, plain_rows(test, student), total)


def load_base(config: ModelConfig, seed: int) -> LoadedModel:
    """A classifier from a RUN folder of `clipmill train`, or ``timm:NAME``.

    Of a CLIP run it is the image tower, which must be one of timm's; it has no classes then. Raises UserError.
    """
    if config.model.startswith(TIMM):
        return new_classifier(config.model, 1, None, config.pretrained, seed, config.trust)
    if not Path(config.model, "config.json").is_file():
        raise UserError(f"--model {config.model!r}: give a RUN folder of `clipmill train`, or {TIMM}NAME")
    if config.pretrained is not None:
        raise UserError(
            f"--pretrained {config.pretrained!r} would not be used: RUN {config.model} brings its own weights"
        )
    loaded, _ = load_run(config.model, trust=config.trust)
    if isinstance(loaded.model, Classifier):
        return loaded
    trunk = getattr(loaded.model.visual, "trunk", None)
    if trunk is None:
        raise UserError(f"--model {config.model!r}: its image tower is none of timm's, which a classifier needs")
    name = f"{TIMM}{loaded.config['vision_cfg']['timm_model_name']}"
    base = new_classifier(name, 1)
    own = {name for name, part in base.model.trunk.named_modules() if part is base.model.head}
    weights = {key: value for key, value in trunk.state_dict().items() if key.rpartition(".")[0] not in own}
    wanted = {key for key in base.model.trunk.state_dict() if key.rpartition(".")[0] not in own}
    if differing := sorted(set(weights) ^ wanted):  # the head is not there, or projects to the embedding
        raise UserError(f"--model {config.model!r}: its image tower is not {name} ({differing[:3]})")
    base.model.trunk.load_state_dict(weights, strict=False)
    return LoadedModel(base.model, None, base.config, loaded.image_size, loaded.mean, loaded.std)


def successor(base: LoadedModel, config: TransferConfig, classes: list[str]) -> LoadedModel:
    """A classifier of ``classes`` with the base's trunk; its head is random, or what the class map says."""
    old = base.model.head
    torch.manual_seed(config.run.seed)
    head = nn.Linear(old.in_features, len(classes))
    new_rows(head)
    if config.class_map:
        if base.model.vocabulary is None:
            raise UserError(f"--class-map {config.class_map}: --model {config.student.model!r} has no vocabulary")
        found = class_map_of(config.class_map, classes, base.model.vocabulary)
        transfer_rows(head, old, base.model.vocabulary, found, config.copy_bias)
    trunk = base.model.trunk
    trunk.reset_classifier(len(classes))
    trunk.get_classifier().load_state_dict(head.state_dict())
    student = Classifier(base.model.name, trunk, None, classes)
    return LoadedModel(student.eval(), None, base.config, base.image_size, base.mean, base.std)


def class_map_of(path: str, classes: list[str], vocabulary: Vocabulary) -> ClassMap:
    """The class map in a file, in the order of ``classes``. Raises UserError when it is of others."""
    found = read_class_map(path)
    theirs = found.header.get("vocabulary_sha256")
    if theirs != vocabulary.sha256:
        raise UserError(
            f"{path} maps to vocabulary {str(theirs)[:12]}, the model's is {vocabulary.sha256[:12]}: make it again, "
            "`clipmill classes NAMES --vocabulary RUN/vocabulary.tsv`"
        )
    rows = {row.name: row for row in found.rows}
    if missing := [name for name in classes if name not in rows]:
        raise UserError(f"{path} has no row for {len(missing)} classes, first {missing[0]!r}: make it of these classes")
    if unknown := [wnid for row in found.rows for wnid in row.wnids if wnid not in vocabulary.index]:
        raise UserError(f"{path} names {unknown[0]}, which is not in the vocabulary; mend that row")
    ordered = ClassMap(tuple(rows[name] for name in classes), found.header)
    log.info("Transfer Init of %s", ordered.summary)
    return ordered


@torch.no_grad()
def transfer_rows(
    head: nn.Linear, pretrained: nn.Linear, vocabulary: Vocabulary, classes: ClassMap, copy_bias: bool = False
) -> None:
    """CatLIP's Transfer Init (arXiv 2404.15653, section 4.2): rows of the pre-trained head, several are averaged.

    Classes without any keep their random rows, brought to the mean length of the others, so that none starts ahead.
    Biases stay 0 unless ``copy_bias``.
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
    """Features of the plain crops of all ``rows``, in fp32. Images that do not decode are left out."""
    device, features, labels = pick_device(device), list[Tensor](), list[Tensor]()
    model = rows.student.model.to(device)
    for batch in load_batches(rows, batch_ranges(len(rows.chosen)), workers=workers, device=device):
        features.append(model.encode_image(batch["images"]).float().cpu())
        labels.append(batch["targets"].cpu())
    model.to("cpu")
    return FeatureRows(torch.cat(features), torch.cat(labels), rows.student, rows.plan)
