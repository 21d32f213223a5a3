"""A command to submit, and how its words are parsed: the flags of the command itself, and those of `Options`."""

import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core.command_line import EXAMPLES, HELP, Root, parse_several, print_help, words_of_others
from shards_spec.files import UserError
from shards_spec.layout import SUBMITTED
from shards_spec.messages import flag
from shards_spec.suggest import did_you_mean
from shards_spec.unused_options import Unused
from slurm.jobs import StageFunction
from slurm.options import Options

COMMANDS = (*SUBMITTED, "train")  # that can be submitted
# the option that makes a stage one job: what it does is not divided by shard
ONE_JOB = {"ingest": "retry_failed", "dedup": "overwrite", "pack": "shard_size", "cache": "export_lists"}
OF_ARRAYS = ("array", "parallel", "recheck", "claim_s")  # fields of `Options`
OF_PIPELINES = ("cluster", "after", "wait", "dry_run")  # fields of `Options` that hold for all commands of a pipeline
USAGE = """usage: clipmill submit STAGE ROOT ...          a stage as an array over its shards
       clipmill submit train RECIPE --out RUN ...   nodes x GPUs, one process each
       clipmill submit pipeline ROOT [options] -- ingest --source LIST -- caption ... -- pack -- vocab -- cache ...
                                -- train RECIPE --out RUN ...   one after the other

The flags are those of the command itself; clipmill submit STAGE --help, submit train RECIPE --help and
submit pipeline --help show them with submit's own."""


@dataclass(frozen=True)
class Pipeline:
    """Submit several commands, each of which starts when the one before has succeeded.

    Each stands behind a -- of its own, without ROOT, after the options of all: ingest, dedup, caption, pack, vocab,
    cache, check, or train RECIPE with an --out, whose --data is ROOT if it has none. clipmill submit COMMAND --help
    shows the options of one.
    """

    root: Root
    """the dataset that all commands work on"""


@dataclass(frozen=True)
class TrainOptions(Options):
    """Submit train RECIPE as one job of nodes x GPUs, one process each.

    clipmill submit train RECIPE --help shows the recipe's options, too.
    """

    def unused(self) -> Iterator[Unused]:
        """Yield the options of arrays, too."""
        yield from super().unused()
        yield Unused(OF_ARRAYS, "by a training, which is one job")


@dataclass(frozen=True)
class StageOptions(Options):
    """Submit a stage as an array over its shards."""

    def unused(self) -> Iterator[Unused]:
        """Yield the options of trainings, too."""
        yield from super().unused()
        yield Unused(("nodes", "tasks_per_node"), "by a stage, whose tasks are one process each; say --array")
        yield Unused(("save_s",), "by a stage, whose finished shards are saved at once; it is for trainings")


@dataclass(frozen=True)
class SummaryOptions(StageOptions):
    """Submit a stage as an array over its shards."""

    def unused(self) -> Iterator[Unused]:
        """Yield what only stages that leave shards make use of, too."""
        yield from super().unused()
        yield Unused(("recheck",), "by a stage that leaves no shards: each time it looks at all that it is made from")


@dataclass(frozen=True)
class OneJobOptions(StageOptions):
    """Submit a stage as one job."""

    def unused(self) -> Iterator[Unused]:
        """Yield the options of arrays, too."""
        yield from super().unused()
        forms = ", ".join(f"{command} {flag(field)}" for command, field in ONE_JOB.items())
        yield Unused(OF_ARRAYS, f"by a stage that is one job, as these are: {forms}")


@dataclass(frozen=True)
class Step:
    """A command to submit; ``config`` has its options, ``function`` is a stage's, ``words`` are a training's."""

    command: str
    options: Options
    function: Callable[..., Any] | None = None
    config: Any = None
    words: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """The dataset, or the run's folder."""
        root: str = self.config.run.out if self.command == "train" else self.config.root
        return root

    @property
    def array_folder(self) -> str | None:
        """The folder below ROOT whose shards an array makes; None for what one job does. Of a check: of its run."""
        stage = SUBMITTED.get(self.command)
        if stage is None or not stage.array or self.is_one_job:
            return None
        return stage.array_folder(self.config.label if stage.is_named else "")

    @property
    def is_one_job(self) -> bool:
        """Whether an option makes the stage one job."""
        return self.command in ONE_JOB and bool(getattr(self.config, ONE_JOB[self.command]))


def parse_steps(words: list[str]) -> list[Step]:
    """The steps of ``clipmill submit WORDS``: one, or those of a pipeline. Raises UserError."""
    target, rest = words[0], words[1:]
    if target == "pipeline":
        return _pipeline_steps(rest)
    if target == "train":
        return [_train_step(rest, Options())]
    if target in SUBMITTED:
        return [stage_step(target, rest, Options())]
    raise UserError(f"cannot submit {target!r}; {did_you_mean(target, [*COMMANDS, 'pipeline'])}")


def stage_step(command: str, words: list[str], default: Options) -> Step:
    """A stage's own flags and those of submit, whose defaults are ``default``'s. Raises UserError."""
    stage = SUBMITTED[command]
    options_class = StageOptions if stage.has_shards else SummaryOptions
    parts = {"": (pkgutil.resolve_name(stage.config), None), "submit": (options_class, default)}
    config, options = parse_several(f"submit {command}", parts, words)
    step = Step(command, options, StageFunction(stage.function), config)
    if step.is_one_job:  # which only its options say; once more, to see that none of an array's is given
        parse_several(f"submit {command}", parts | {"submit": (OneJobOptions, default)}, words)
    return step


def _train_step(words: list[str], default: Options) -> Step:
    """A recipe's own flags and those of submit, whose defaults are ``default``'s. Raises UserError.

    The flags are checked as `clipmill train` checks them before it imports torch; what takes the models and the data
    to know is found by the job.
    """
    from training.configs import command_line_parts
    from training.recipes import RECIPES

    recipe, flags = (words[0], words[1:]) if words else ("", [])
    if recipe in HELP:
        print_help("submit train", TrainOptions, f"Recipes: {', '.join(RECIPES)}.")
    if recipe and recipe not in RECIPES:
        raise UserError(f"no recipe {recipe!r}; {did_you_mean(recipe, RECIPES)}")
    if not recipe or ({*HELP}.isdisjoint(flags) and not find_option(flags, "--out")):
        raise UserError("submit train RECIPE --out RUN: name the recipe and the run's folder, the job's files go there")
    parts = {**command_line_parts(recipe, flags), "submit": (TrainOptions, default)}
    config, _, options = parse_several(f"submit train {recipe}", parts, flags)
    return Step("train", options, config=config, words=(recipe, *words_of_others(flags, TrainOptions)))


def by_stage(step: Step) -> list[Step]:
    """A TinyCLIP training of several stages as a step for each, to start after the one before; others as they are.

    Raises UserError for stages that cannot be.
    """
    from training.configs.tinyclip import TinyclipConfig, stages

    if not isinstance(step.config, TinyclipConfig):
        return [step]
    number = len(stages(step.config))
    if number == 1:
        return [step]
    steps = list[Step]()
    for stage in range(1, number + 1):
        config = replace(step.config, stages=replace(step.config.stages, stage=stage))
        steps.append(replace(step, config=config, words=(*step.words, "--stage", str(stage))))
    return steps


def _pipeline_steps(words: list[str]) -> list[Step]:
    """ROOT and common options, then each command after a ``--`` of its own."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    common, *commands = parts
    pipeline, options = parse_several("submit pipeline", {"": (Pipeline, None), "submit": (Options, None)}, common)
    if not commands or not all(commands):
        example = f"clipmill submit pipeline {EXAMPLES['submit pipeline']}"
        raise UserError(f"submit pipeline: a command behind each -- is needed; for example: {example}")
    steps = []
    for command, *rest in commands:
        if command == "train":
            data = [] if find_option(rest, "--data") else ["--data", pipeline.root]
            steps.append(_train_step([*rest, *data], options))
        elif command in SUBMITTED:
            steps.append(stage_step(command, [pipeline.root, *rest], options))
        else:
            raise UserError(f"cannot submit {command!r}; {did_you_mean(command, COMMANDS)}")
        for name in OF_PIPELINES:
            if getattr(steps[-1].options, name) != getattr(options, name):
                raise UserError(
                    f"{flag(name)} behind -- {command}: it holds for all commands, say it before the first --"
                )
    return steps


def find_option(words: Iterable[str], name: str) -> str | None:
    """The value of a flag among words that are not parsed here; the last one counts."""
    value, before = None, ""
    for word in words:
        if before == name:
            value = word
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
        before = word
    return value
