"""The pieces that recipes compose their configs of. Field names are unique: the command line shows them flat."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.models import Trust
from shards_spec.precision import PrecisionOption
from shards_spec.unused_options import Unused
from shards_spec.views import ViewOptions, ViewSpec

MOST_SEED = 1 << 62  # torch takes 64 bits, of which the number of a process and a step take some
# What may change when a run is resumed, beside the number of processes: another machine may have less memory. The last
# five change roundings only, unless a trained BatchNorm normalises over each chunk: then the chunk's size is maths.
FREE_ON_RESUME = frozenset(
    {
        "out",
        "workers",
        "scratch",
        "scratch_gb",
        "log_every",
        "report_to",
        "checkpoint_minutes",
        "checkpoint_steps",
        "keep_checkpoints",
        "resume",
        "device",
        "max_nonfinite",
        "eval_every_steps",
        "eval_every_epochs",
        "fit",
        "trust_checkpoint",
        "trust_remote_code",
        "chunk_size",
        "checkpoint_activations",
        "frozen_precision",
        "compile",
        "channels_last",
    }
)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how."""

    data: str = ""
    """ROOT of the dataset, a folder or URL"""
    folder: Literal["shards", "raw"] = "shards"
    """shards: packed, with synthetic captions; raw: as ingested (or img2dataset's)"""
    shards: int | None = None
    """read only the first that many shards; None reads all"""
    captions: Literal["all", "original"] = "all"
    """all: one of original and synthetic captions per epoch, by chance; original: only that"""
    select: str | None = None
    """folder below ROOT/select that `clipmill select` filled: an epoch has its samples only; None: all"""
    batch_size: int = 1024
    """pairs per step over all processes together: a global batch (open_clip's --batch-size is per GPU)"""
    workers: int = 2
    """processes that read and decode; 0 does it in the main process"""
    streams: int = 8
    """parts of an epoch read side by side; a multiple of the processes lets each of them read its own shards only"""
    window: int = 2
    """shards mixed at a time in each stream; more mixes better and keeps more open"""
    scratch: str = ""
    """folder for copies of remote shards and caches, shared by all processes of a machine; default: a temporary one"""
    scratch_gb: float = 50.0
    """gigabytes of copies that stay there from epoch to epoch"""

    def __post_init__(self) -> None:
        require(self.shards is None or self.shards >= 1, "shards", self.shards, "1 or more, or None")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.workers >= 0, "workers", self.workers, "0 or more")
        require(self.streams >= 1, "streams", self.streams, "1 or more")
        require(self.window >= 1, "window", self.window, "1 or more")
        require(self.scratch_gb > 0, "scratch_gb", self.scratch_gb, "above 0")


@dataclass(frozen=True)
class LabelConfig:
    """Labels of the images: the WordNet synsets of their captions that are in a vocabulary."""

    vocabulary: str = "all"
    """NAME of ROOT/vocab/NAME.tsv, as `clipmill vocab` wrote it; its ranks are the classes"""
    label_captions: Literal["original", "all"] = "original"
    """captions whose synsets are an image's labels: the original's, or those of all its captions together"""
    drop_empty: bool = False
    """images without a label do not count in the loss; otherwise all their classes are to be off"""


@dataclass(frozen=True)
class SideConfig:
    """Batches of images of several sizes."""

    sides: tuple[int, ...] = ()
    """pixels a side, one of these per step, by chance; the batch grows as they shrink; none: the model's own"""
    base_side: int = 224
    """pixels a side of images of which a step takes exactly batch_size"""
    batch_parts: int = 1
    """equal parts that a batch of any side is rounded to; the number of processes must divide it"""

    def __post_init__(self) -> None:
        require(all(side >= 1 for side in self.sides), "sides", self.sides, "1 or more each")
        require(self.base_side >= 1, "base_side", self.base_side, "1 or more")
        require(self.batch_parts >= 1, "batch_parts", self.batch_parts, "1 or more")

    def unused(self) -> Iterator[Unused]:
        """Yield the options that only several sides make use of."""
        if not self.sides:
            yield Unused(("base_side",), "without --sides")


@dataclass(frozen=True)
class ViewConfig(ViewOptions):
    """Views drawn while training, a new one each epoch."""

    scale: tuple[float, float] | None = (0.9, 1.0)
    """share of the image that a crop covers, low and high; None is the plain centre crop without anything else"""
    flip: float = 0.0
    """probability of a horizontal flip"""

    def spec(self, seed: int) -> ViewSpec:
        """Return what the views are drawn from. Raises UserError naming the field that is out of range."""
        return ViewSpec(seed=seed, **{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Views and features of a teacher cache; its metadata says how the views were drawn."""

    teacher: tuple[str, ...] = ()
    """folders below ROOT/teacher that `clipmill cache` filled, one for each teacher, of the same views; may stay empty
    when there is only one"""

    @property
    def names(self) -> tuple[str, ...]:
        """The folders' names; a single empty one where the only one there is to be taken."""
        return teacher_names(self.teacher) or ("",)


@dataclass(frozen=True)
class EnsembleConfig:
    """Several teachers of one student."""

    ensemble: Literal["mean", "sum"] = "mean"
    """several teachers: mean: their distributions are averaged, and losses without distributions; sum: each one's
    losses are added"""
    teacher_scale: tuple[float, ...] = ()
    """logit scale of each teacher, in their order, in place of its own"""

    def __post_init__(self) -> None:
        is_scale = all(0 < scale < math.inf for scale in self.teacher_scale)
        require(is_scale, "teacher_scale", self.teacher_scale, "above 0 each")


def teacher_names(value: Any) -> tuple[str, ...]:
    """Return the names of teacher caches as a config has them: several, or one string as configs had before."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * bool(value)


@dataclass(frozen=True)
class ModelConfig:
    """The student."""

    model: str = "ViT-B-32"
    """open_clip name, local-dir:PATH or hf-hub:ORG/NAME; catlip, minivit, tinymim: timm:NAME; probe, finetune: any of
    these or a RUN"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file to start from; None starts from random weights"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)


@dataclass(frozen=True)
class MaskConfig:
    """Masks that are learned with the student and then applied."""

    sparsity: float = 0.25
    """share of the weights in the teacher's blocks, of both towers together, that are to go"""
    prune_step: int = 3000
    """steps with masks; then the student is cut to them"""
    sparsity_form: Literal["one-sided", "two-sided"] = "one-sided"
    """one-sided: only a sparsity below its target costs (released code); two-sided: also one above it (paper)"""
    sparsity_ramp: int = 1000
    """steps in which the target goes from the former stage's sparsity (0 for the first) to the final one"""
    mask_lr: float = 0.02
    """learning rate of the masks and of the two multipliers, constant"""

    def __post_init__(self) -> None:
        require(0 < self.sparsity < 1, "sparsity", self.sparsity, "in (0, 1)")
        require(self.prune_step >= 1, "prune_step", self.prune_step, "1 or more")
        require(self.sparsity_ramp >= 0, "sparsity_ramp", self.sparsity_ramp, "0 or more")
        require(self.mask_lr > 0, "mask_lr", self.mask_lr, "above 0")


@dataclass(frozen=True)
class LabelledImageConfig:
    """Which labelled images, and how many at a time."""

    data: str = ""
    """folder with train/ and test/: ROOTs of labelled images, class folders, or a CLIP_benchmark WebDataset
    (classnames.txt, train/0.tar ...)"""
    fraction: float = 1.0
    """share of each class's training images that is used, at least one of each"""
    batch_size: int = 256
    """images per step over all processes together: a global batch (open_clip's --batch-size is per GPU)"""
    workers: int = 2
    """processes that read and decode; 0 does it in the main process"""

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "fraction", self.fraction, "in (0, 1]")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.workers >= 0, "workers", self.workers, "0 or more")


@dataclass(frozen=True)
class SoftLabelConfig:
    """A classifier's labels of cached views, in place of a live teacher or of the true labels."""

    soft_labels: str | None = None
    """folder below teacher/ of the training ROOT that `clipmill cache --soft-labels` filled; its views are trained on,
    its labels are the targets"""


@dataclass(frozen=True)
class MixConfig:
    """What is done to images on the device."""

    mixup: float = 0.0
    """mixup: alpha of the Beta distribution of an image's share; 0 leaves it out"""
    cutmix: float = 0.0
    """CutMix: alpha of the Beta distribution of an image's share; 0 leaves it out; beside mixup, half the steps each"""
    erasing: float = 0.0
    """probability that a box of an image is replaced by noise"""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        require(0 <= self.erasing <= 1, "erasing", self.erasing, "in [0, 1]")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate by the step, and an average of the weights."""

    lr: float = 1e-4
    """peak learning rate"""
    weight_decay: float = 0.2
    """of matrices; biases, norms and the logit scale have none"""
    beta1: float = 0.9
    """AdamW"""
    beta2: float = 0.98
    """AdamW; CLIP takes 0.98 for ViT, 0.999 for ResNet"""
    eps: float = 1e-6
    """AdamW; CLIP takes 1e-6 for ViT, 1e-8 for ResNet"""
    warmup: int = 2000
    """steps of linear warm-up"""
    warmup_lr: float | None = None
    """learning rate that the warm-up begins at; None: its first step has lr / warmup"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """way of the learning rate after the warm-up: down to final_lr in half a cosine or a line, or as it is"""
    final_lr: float = 0.0
    """learning rate that cosine and linear end at"""
    clip_norm: float | None = None
    """clip the gradient's global L2 norm to this; None does not clip"""
    ema_decay: float | None = None
    """keep an exponential moving average of the student's weights, say 0.9998; eval and export then take it"""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "in [0, 1)")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "in [0, 1)")
        require(0 < self.eps < math.inf, "eps", self.eps, "above 0")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        first = self.warmup_lr
        require(first is None or 0 < first <= self.lr, "warmup_lr", first, f"above 0, to --lr ({self.lr:g}), or None")
        require(0 <= self.final_lr <= self.lr, "final_lr", self.final_lr, f"from 0 to --lr ({self.lr:g})")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "ema_decay", decay, "in (0, 1), or None")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0 or None")

    def unused(self) -> Iterator[Unused]:
        """Yield what the schedule does not come to."""
        if not self.warmup:
            yield Unused(("warmup_lr",), "with --warmup 0")
        if self.schedule == "constant":
            yield Unused(("final_lr",), "with --schedule constant")


@dataclass(frozen=True)
class RunConfig:
    """How long, where to, and on what."""

    out: str = "runs/train"
    """RUN folder; one that has checkpoints is continued"""
    steps: int | None = None
    """steps to train; when given, epochs is not used"""
    epochs: float = 1.0
    """passes over the dataset; used when steps is None"""
    seed: int = 0
    """of weights, order, captions and (without a cache) views"""
    precision: PrecisionOption = "auto"
    """auto: bf16 on a CUDA device that has it, else fp32; bf16 and fp16 are autocast, weights stay fp32"""
    chunk_size: int | None = None
    """samples per forward pass and process: less memory, a pass more, the same loss of the full batch; None: by fit"""
    fit: float | None = None
    """gigabytes that a process may take, say 24: chunk_size is chosen by prediction; None: what the device has free"""
    checkpoint_activations: bool = False
    """keep only each block's input for the backward pass and compute the rest again"""
    frozen_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: weights that are not trained (a live teacher's, inherited layers') take half the memory; with --precision
    bf16 or fp16; what is saved stays fp32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the forward pass; auto: on a GPU, for recipes that were measured to gain by it (tinyclip)"""
    channels_last: bool = False
    """images and convolutions with the channels innermost: faster in convolutional towers on CUDA"""
    sync_bn: bool = True
    """with several processes, trained BatchNorms take their statistics over all of them"""
    max_nonfinite: int = 3
    """stop after that many steps in a row whose loss is not finite; they are skipped, their batches kept"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    report_to: Literal["tensorboard", "wandb"] = "tensorboard"
    """tensorboard: curves in RUN/tensorboard; wandb: to Weights & Biases, too, where its package is installed"""
    checkpoint_minutes: float = 10.0
    """minutes between checkpoints"""
    checkpoint_steps: int | None = None
    """steps between checkpoints, besides the minutes"""
    keep_checkpoints: int = 2
    """the newest ones that stay"""
    eval_data: str = ""
    """EVAL root, as `clipmill eval` takes it, to measure on while training; the best checkpoint is kept"""
    eval_every_epochs: float = 1.0
    """epochs between measurements, besides the one at the end"""
    eval_every_steps: int | None = None
    """steps between measurements; when given, eval_every_epochs is not used"""
    resume: bool = True
    """resume from RUN's newest checkpoint"""

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_steps", "chunk_size", "eval_every_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more, or None")
        for name in ("log_every", "max_nonfinite", "keep_checkpoints"):
            value = getattr(self, name)
            require(value >= 1, name, value, "1 or more")
        for name in ("epochs", "checkpoint_minutes", "eval_every_epochs"):
            value = getattr(self, name)
            require(value > 0, name, value, "above 0")
        require(self.epochs < math.inf, "epochs", self.epochs, "a number; --steps counts steps instead")
        require(self.fit is None or self.fit > 0, "fit", self.fit, "above 0, or None")
        require(abs(self.seed) < MOST_SEED, "seed", self.seed, "a whole number of less than 63 bits")

    def unused(self) -> Iterator[Unused]:
        """Yield the lengths in epochs that a number of steps takes the place of."""
        if self.steps is not None:
            yield Unused(("epochs",), f"with --steps {self.steps} (--smoke sets 4): leave one of them out")
        if self.eval_every_steps is not None:
            yield Unused(
                ("eval_every_epochs",), f"with --eval-every-steps {self.eval_every_steps}: leave one of them out"
            )

    def unused_without_eval_data(self) -> Iterator[Unused]:
        """Yield what only a measured run makes use of; for recipes that measure nothing of themselves."""
        if not self.eval_data:
            yield Unused(("eval_every_epochs", "eval_every_steps"), "without --eval-data")

    def unused_without_frozen_weights(self, why: str) -> Iterator[Unused]:
        """Yield what only a run with weights that are not trained makes use of; ``why`` this one has none."""
        if self.frozen_precision != "fp32":
            yield Unused(("frozen_precision",), why)


@dataclass(frozen=True)
class TrialOptions:
    """What a recipe can do besides training."""

    smoke: bool = False
    """train four small steps of eight pairs, to see that all fits together"""
    predict_memory: bool = False
    """only say what memory a step takes"""


def is_run(path: str) -> bool:
    """Return whether a path is a folder with a config.json, as a RUN of `clipmill train` is.

    What the file is of another program's folder, `RunFolder.config` says.
    """
    return bool(path) and Path(path, "config.json").is_file()


def check_stage(stage: int | None, count: int, options: str) -> None:
    """Raise UserError for a ``--stage`` that is none of ``count`` stages, which the ``options`` make."""
    if stage is not None and not 1 <= stage <= count:
        advice = f"must be from 1 to {count}" if count else f"there are no stages, give {options}"
        raise UserError(f"--stage {stage}: {advice}")


def smoke(config: Any) -> Any:
    """Return a recipe's config cut to four steps of eight pairs.

    The model stays; with a small one it runs in seconds on a CPU. Masks are applied half way.
    """
    masks = getattr(config, "masks", None)
    parts = {"masks": replace(masks, prune_step=2, sparsity_ramp=1)} if isinstance(masks, MaskConfig) else {}
    return replace(
        config,
        data=replace(config.data, batch_size=8, workers=0),
        optim=replace(config.optim, warmup=2),
        run=replace(config.run, steps=4, log_every=1),
        **parts,
    )


def flat(config: Any) -> dict[str, Any]:
    """Return all fields of a composed config by name, as JSON has them (tuples become lists)."""
    values: dict[str, Any] = {}
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            piece = flat(value)
        elif isinstance(value, tuple):
            piece = {part.name: list(value)}
        else:
            piece = {part.name: value}
        assert not set(piece) & set(values), (set(piece), set(values))
        values |= piece
    return values


def total_steps(config: RunConfig, batch_size: float, samples: int) -> int:
    """Return the steps of a run over ``samples`` samples: ``steps``, or whole batches in ``epochs`` (at least 1)."""
    return config.steps if config.steps is not None else max(1, int(config.epochs * samples / batch_size))
