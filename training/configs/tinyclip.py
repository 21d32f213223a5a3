"""Options and numbers of the recipe tinyclip (`training.recipes.tinyclip`), and the runs that one config stands for."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.messages import counted, require
from shards_spec.unused_options import Unused, field_values
from training.choices import Layers, Rank
from training.config import (
    DataConfig,
    EnsembleConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherCacheConfig,
    ViewConfig,
    check_stage,
)
from training.configs.teaching import ClipKdConfig, unused_of_source, unused_of_teachers

STUDENT = "ViT-M-32"


@dataclass(frozen=True)
class InheritanceConfig:
    """Which weights the student starts from."""

    inherit: Literal["none", "manual", "auto"] = "none"
    """none: the student's own or random weights; manual: those layers and units of the teacher that it has room for;
    auto: all of the teacher, with masks that are learned and then applied"""
    teacher_weights: str = ""
    """the teacher, to inherit from and to run live: NAME:TAG_OR_FILE (ViT-B-32:laion2b_e16), local-dir:PATH,
    hf-hub:ORG/NAME or a RUN folder; NAME:random for a try"""
    more_teachers: tuple[str, ...] = ()
    """--teacher-from live: further teachers that run beside it, named in the same way"""
    teacher_weights_text: str = ""
    """manual: source of the text tower where it is another"""
    from_run: str = ""
    """RUN of the former stage, whose student is inherited from in place of the teacher"""
    layers: Layers = "interval"
    """manual: every so-many-th layer as released, evenly spread ones, or the first ones"""
    rank: Rank = "leading"
    """manual: heads, neurons and dimensions that are kept: the first ones as released, those of the largest weights, or
    those that the contrastive loss depends on most"""
    rank_samples: int = 256
    """pairs that rank taylor computes that loss of"""

    def __post_init__(self) -> None:
        least = 2
        require(self.rank_samples >= least, "rank_samples", self.rank_samples, f"{least} or more")

    def after(self, run: str) -> "InheritanceConfig":
        """Return the same for the stage after ``run``: both towers are its student's."""
        return replace(self, from_run=run, teacher_weights_text="")

    def check(self, *, is_live: bool) -> None:
        """Raise UserError where something is missing, or named twice.

        Args:
            is_live: Whether the teacher's weights teach.
        """
        if self.inherit != "none" and not self.source:
            raise UserError(
                f"--inherit {self.inherit} needs --teacher-weights: NAME:TAG_OR_FILE, local-dir:PATH, hf-hub:ORG/NAME "
                "or a RUN folder"
            )
        if is_live and not self.teacher_weights:
            raise UserError("--teacher-from live needs --teacher-weights, the weights that teach")
        if len({self.teacher_weights, *self.more_teachers}) <= len(self.more_teachers):
            raise UserError(f"--more-teachers {' '.join(self.more_teachers)}: name each teacher once")

    def unused(self) -> Iterator[Unused]:
        """Yield the options of other ways to inherit."""
        why = f"with --inherit {self.inherit}"
        if self.inherit != "manual":
            yield Unused(("layers", "rank", "rank_samples", "teacher_weights_text"), why)
        if self.inherit == "none":
            yield Unused(("from_run",), why)
        if self.rank != "taylor":
            yield Unused(("rank_samples",), f"with --rank {self.rank}")

    @property
    def source(self) -> str:
        """What the student inherits from; of its text tower it may be another."""
        return self.from_run or self.teacher_weights


@dataclass(frozen=True)
class StageConfig:
    """Several runs, each of which starts from the student of the one before."""

    stages: str = ""
    """auto: shares of the teacher's parameters that stages end with, as 1,0.75,0.5,0.25; RUN/stage-1 ... are their
    runs; the teacher is the same in all"""
    stage_models: str = ""
    """manual: the student of each stage, with commas"""
    stage_prune_steps: str = ""
    """auto: steps with masks of each stage, with commas; empty: those of prune_step in all"""
    stage: int | None = None
    """train this stage alone, from 1; the one before must have finished"""

    def check(self, inherit: str) -> None:
        """Raise UserError where an option would not be used with --inherit, or does not fit the others."""
        for option, value, wanted in (
            ("--stages", self.stages, "auto"),
            ("--stage-models", self.stage_models, "manual"),
            ("--stage-prune-steps", self.stage_prune_steps, "auto"),
        ):
            if value and inherit != wanted:
                raise UserError(f"{option} {value!r} is for --inherit {wanted}, not {inherit}")
        shares, steps = self.shares(), self.prune_steps()
        if steps and len(steps) != len(shares) - 1:
            raise UserError(
                f"--stage-prune-steps {self.stage_prune_steps!r}: {counted(len(steps), 'number')} for "
                f"{counted(max(0, len(shares) - 1), 'stage')}"
            )
        check_stage(self.stage, self.number, "--stages or --stage-models")

    @property
    def number(self) -> int:
        """How many stages there are; 0 for a run of its own. Raises UserError."""
        return max(len(self.shares()) - 1, len(self.models()))

    def shares(self) -> list[float]:
        """Return the shares of parameters, the whole first; empty without --stages. Raises UserError."""
        if not self.stages:
            return []
        try:
            shares = [float(word) for word in self.stages.split(",")]
        except ValueError:
            shares = []
        whole = shares if shares[:1] == [1.0] else [1.0, *shares]
        if len(whole) < 2 or not whole[-1] > 0 or any(not before > after for before, after in pairwise(whole)):
            raise UserError(
                f"--stages {self.stages!r}: must be shares of the parameters, each smaller than the one before, such "
                "as 1,0.75,0.5,0.25"
            )
        return whole

    def models(self) -> list[str]:
        """Return the names of the students; empty without --stage-models."""
        return [word for word in self.stage_models.split(",") if word]

    def prune_steps(self) -> list[int]:
        """Return the steps with masks of each stage; empty without --stage-prune-steps. Raises UserError."""
        try:
            steps = [int(word) for word in self.stage_prune_steps.split(",") if word]
        except ValueError:
            steps = [0]
        if any(number < 1 for number in steps):
            raise UserError(f"--stage-prune-steps {self.stage_prune_steps!r}: must be whole numbers of 1 or more")
        return steps


@dataclass(frozen=True)
class TinyclipConfig:
    """Distil a student from a teacher, from whose weights it may start: TinyCLIP."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    drawn_views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    cached_views: OmitArgPrefixes[TeacherCacheConfig] = field(default_factory=TeacherCacheConfig)
    ensemble: OmitArgPrefixes[EnsembleConfig] = field(default_factory=EnsembleConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    inheritance: OmitArgPrefixes[InheritanceConfig] = field(default_factory=InheritanceConfig)
    masks: OmitArgPrefixes[MaskConfig] = field(default_factory=MaskConfig)
    stages: OmitArgPrefixes[StageConfig] = field(default_factory=StageConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    clip_kd: OmitArgPrefixes[ClipKdConfig] = field(default_factory=ClipKdConfig)
    teacher_from: Literal["cache", "live"] = "cache"
    """cache: a teacher cache's features and views; live: the teacher runs on views drawn now"""
    affinity_weight: float = 1.0
    """weight of affinity mimicking"""
    feature_weight: float = 0.0
    """weight of feature distillation, the mean over pairs of 2 - 2 cos; CLIP-KD has the element mean, 2 / D of it"""
    contrastive_weight: float = 0.0
    """weight of the hard-label loss; 0 in all released TinyCLIP recipes"""
    fixed_logit_scale: float | None = 50.0
    """scale of student and teacher; None: the student learns its own, the teacher keeps its own; --teacher-scale is
    stronger for teachers"""

    @property
    def views(self) -> ViewConfig | TeacherCacheConfig:
        """Where views, and with a cache the teacher's features, come from."""
        return self.drawn_views if self.teacher_from == "live" else self.cached_views

    @property
    def num_teachers(self) -> int:
        """How many teachers there are."""
        return len(self.cached_views.names) if self.teacher_from == "cache" else 1 + len(self.inheritance.more_teachers)

    @property
    def taught_by(self) -> EnsembleConfig:
        """How the teachers teach: at the fixed scale where they were given none of their own."""
        ensemble = self.ensemble
        if self.fixed_logit_scale is None or ensemble.teacher_scale:
            return ensemble
        return replace(ensemble, teacher_scale=(self.fixed_logit_scale,) * self.num_teachers)

    def __post_init__(self) -> None:
        weights = ("affinity_weight", "feature_weight", "contrastive_weight")
        for name in weights:
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        is_any = any(getattr(self, name) for name in weights) or self.clip_kd.is_used
        require(is_any, "affinity_weight", 0.0, "above 0 when the others are 0")
        scale = self.fixed_logit_scale
        require(scale is None or scale > 0, "fixed_logit_scale", scale, "above 0 or None")
        self.stages.check(self.inheritance.inherit)
        self.inheritance.check(is_live=self.teacher_from == "live")

    def unused(self) -> Iterator[Unused]:
        """Yield the options without effect beside --teacher-from, --inherit and the stages."""
        inherit, chain = self.inheritance.inherit, self.stages
        with_inherit = f"with --inherit {inherit}"
        yield from unused_of_source(self.teacher_from, self.drawn_views)
        yield from self.run.unused_without_eval_data()
        if self.teacher_from == "cache":
            yield Unused(("more_teachers",), "with --teacher-from cache")
            if inherit == "none":
                yield Unused(("teacher_weights",), with_inherit)
        if inherit != "none":
            yield Unused(("pretrained",), f"{with_inherit}: the student's weights are inherited")
        if inherit == "auto":
            copied = "the student is a copy of --teacher-weights, or of --from-run's student"
            yield Unused(("model",), f"{with_inherit}: {copied}")
        else:
            yield Unused(field_values(self.masks), with_inherit)
        if chain.stage_models:
            yield Unused(("model",), "with --stage-models, which names the students")
        if chain.stages:
            yield Unused(("sparsity",), "with --stages, which name each stage's")
        if chain.stage_prune_steps:
            yield Unused(("prune_step",), "with --stage-prune-steps")
        weights = {"affinity_weight": self.affinity_weight, "gd_weight": self.clip_kd.gd_weight}
        yield from unused_of_teachers(self.num_teachers, weights)


def config() -> TinyclipConfig:
    """Return the paper's numbers (released scripts)."""
    return TinyclipConfig(
        data=DataConfig(batch_size=32768, workers=8),
        student=ModelConfig(model=STUDENT),
        optim=OptimConfig(lr=1e-4, weight_decay=0.2, warmup=2000, clip_norm=5.0),
        run=RunConfig(out="runs/tinyclip", epochs=6),
    )


def stages(config: TinyclipConfig) -> list[TinyclipConfig]:
    """Return the configs of a chain's runs, each in a folder of its own below the config's RUN, or the one config.

    Raises UserError when a stage's numbers are out of range.
    """
    starts = stage_starts(config.stages, config.run.out)
    if not starts:
        return [config]
    alone = replace(config, stages=StageConfig())
    runs = []
    for start in starts:
        inheritance = config.inheritance if start.from_run is None else config.inheritance.after(start.from_run)
        masks = config.masks
        if start.sparsity is not None:
            masks = replace(masks, sparsity=start.sparsity)
        if start.prune_step is not None:
            if config.run.steps is not None and start.prune_step > config.run.steps:
                raise UserError(
                    f"--stage-prune-steps {config.stages.stage_prune_steps!r}: a stage has {config.run.steps} steps, "
                    f"so masks of {start.prune_step} would never be applied; give fewer, or more --steps"
                )
            masks = replace(masks, prune_step=start.prune_step)
        student = config.student if start.model is None else replace(config.student, model=start.model)
        run = replace(config.run, out=start.out)
        runs.append(replace(alone, inheritance=inheritance, masks=masks, student=student, run=run))
    return runs


class StageStart(NamedTuple):
    """What is particular to a stage; None is as the command has it."""

    out: str
    """its RUN folder"""
    from_run: str | None
    """that of the stage before"""
    sparsity: float | None = None
    prune_step: int | None = None
    model: str | None = None


def stage_starts(config: StageConfig, out: str) -> list[StageStart]:
    """Return the stages of a chain whose folders lie in ``out``; none where there is no chain.

    With ``--stage`` it is that one alone.
    """
    sparsities = [round(1 - share, 6) for share in config.shares()[1:]]
    models, steps = config.models(), config.prune_steps()
    starts = []
    for index in range(config.number):
        starts.append(
            StageStart(
                out=str(Path(out, f"stage-{index + 1}")),
                from_run=str(Path(out, f"stage-{index}")) if index else None,
                sparsity=sparsities[index] if sparsities else None,
                prune_step=steps[index] if steps else None,
                model=models[index] if models else None,
            )
        )
    return starts if config.stage is None else starts[config.stage - 1 : config.stage]
