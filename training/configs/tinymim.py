"""Options and numbers of the recipe tinymim (`training.recipes.tinymim`), and the runs that one config stands for."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.unused_options import Unused
from training.choices import Target
from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig, check_stage, is_run

Relation = Literal["qk", "qq", "kk", "vv"]


@dataclass(frozen=True)
class TinymimConfig:
    """Distil token relations of a vision transformer into a smaller one, on unlabelled images."""

    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    views: OmitArgPrefixes[ViewConfig] = field(default_factory=ViewConfig)
    student: OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    optim: OmitArgPrefixes[OptimConfig] = field(default_factory=OptimConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    teacher: str = "timm:vit_large_patch16_224.mae"
    """timm:NAME, RUN folder of tinymim or another recipe, or a CLIP model as open_clip names it"""
    teacher_weights: str | None = None
    """checkpoint file (of MAE or TinyMIM for timm's names), open_clip's tag, or random; None: timm's or the folder's"""
    teacher_block: int | None = None
    """block that teaches, from 1; None: at 3/4 of the depth, of a tinymim run the one that it trained"""
    student_block: int | None = None
    """block that learns, from 1; None: the last"""
    target: Target = "relations"
    """what is compared: relations of tokens, or features of them, before or after the residual sum"""
    relations: tuple[Relation, ...] = ("qk", "vv")
    """which relations, of queries, keys and values"""
    softmax: bool = True
    """relations are softmaxes compared by KL; otherwise scaled products compared by smooth L1"""
    mask_ratio: float = 0.0
    """share of the patches that neither student nor teacher sees; the paper's ablation has 0.75"""
    drop_path: float = 0.1
    """drop path of all blocks of the student but the one that learns"""
    chain: str = ""
    """students one after another, with commas, as timm:vit_base_patch16_224,timm:vit_small_patch16_224; each teaches
    the next, and RUN/stage-1 ... are their runs"""
    stage: int | None = None
    """train this student of the chain alone, from 1; the run before must have finished"""

    def __post_init__(self) -> None:
        for name in ("teacher_block", "student_block"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more, or None")
        require(bool(self.relations), "relations", self.relations, "at least one of qk, qq, kk, vv")
        require(0 <= self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "in [0, 1)")
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "in [0, 1)")
        check_stage(self.stage, len(self.students()), "--chain")

    def unused(self) -> Iterator[Unused]:
        """Yield the options without effect beside --target and --chain."""
        yield from self.run.unused_without_eval_data()
        if self.target != "relations":
            yield Unused(("relations", "softmax"), f"with --target {self.target}")
        if self.chain:
            yield Unused(("model",), "with --chain, which names the students")

    def students(self) -> list[str]:
        """Return the names of the chain's students; empty without ``--chain``."""
        return [name for name in self.chain.split(",") if name]


def config() -> TinymimConfig:
    """Return the released code's numbers, for ImageNet-1k."""
    return TinymimConfig(
        data=DataConfig(batch_size=4096, workers=8, captions="original"),
        views=ViewConfig(scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.0)),
        student=ModelConfig(model="timm:vit_base_patch16_224"),
        optim=OptimConfig(lr=2.4e-3, weight_decay=0.05, beta2=0.95, eps=1e-8, warmup=4691),
        run=RunConfig(out="runs/tinymim", epochs=300),
    )


def stages(config: TinymimConfig) -> list[TinymimConfig]:
    """Return the configs of a chain's runs, each in a folder of its own below the config's RUN, or the one config.

    The first student learns from the config's teacher, each other from the student of the run before, by the block that
    that one was trained in. Raises UserError when ``--stage`` asks for one whose teacher has not been trained.
    """
    runs = list[TinymimConfig]()
    for number, name in enumerate(config.students(), 1):
        run = replace(config.run, out=str(Path(config.run.out, f"stage-{number}")))
        one = replace(config, chain="", stage=None, run=run, student=replace(config.student, model=name))
        if runs:
            one = replace(one, teacher=runs[-1].run.out, teacher_weights=None, teacher_block=None)
        runs.append(one)
    if config.stage is None:
        return runs or [config]
    alone = runs[config.stage - 1]
    if config.stage > 1 and not is_run(alone.teacher):
        raise UserError(f"--stage {config.stage}: {alone.teacher} is no RUN; train --stage {config.stage - 1} first")
    return [alone]
