"""A command to submit, and how its words are parsed: the flags of the command itself, and those of `Options`."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core.command_line import EXAMPLES, HELP, Root, TrialOptions, parse_known, parse_several
from shards_spec.files import UserError
from shards_spec.layout import STAGE_COMMANDS, STAGES
from shards_spec.suggest import did_you_mean
from slurm.options import Options

COMMANDS = (*STAGE_COMMANDS, "train")  # that can be submitted
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
    cache, or train RECIPE with an --out, whose --data is ROOT if it has none. clipmill submit COMMAND --help shows
    the options of one.
    """

    root: Root
    """the dataset that all commands work on"""


@dataclass(frozen=True)
class TrainOptions(Options):
    """Submit train RECIPE as one job of nodes x GPUs, one process each.

    clipmill submit train RECIPE --help shows the recipe's options, too.
    """


@dataclass(frozen=True)
class Step:
    """A command to submit; ``function`` and ``config`` of a stage, ``words`` of a training."""

    command: str
    options: Options
    function: Callable[..., Any] | None = None
    config: Any = None
    words: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """The dataset, or the run's folder."""
        return self.config.root if self.config is not None else find_option(self.words, "--out") or ""


def parse_steps(words: list[str]) -> list[Step]:
    """The steps of ``clipmill submit WORDS``: one, or those of a pipeline. Raises UserError."""
    target, rest = words[0], words[1:]
    if target == "pipeline":
        return _pipeline_steps(rest)
    if target == "train":
        return [_train_step(rest, Options())]
    if target in STAGE_COMMANDS:
        return [stage_step(target, rest, Options())]
    raise UserError(f"cannot submit {target!r}; {did_you_mean(target, [*COMMANDS, 'pipeline'])}")


def stage_step(command: str, words: list[str], default: Options) -> Step:
    """A stage's own flags and those of submit, whose defaults are ``default``'s. Raises UserError."""
    stage = STAGES[command]
    parts = {"": (pkgutil.resolve_name(stage.config), None), "submit": (Options, default)}
    config, options = parse_several(f"submit {command}", parts, words)
    return Step(command, options, pkgutil.resolve_name(stage.function), config)


def _train_step(words: list[str], default: Options) -> Step:
    """The recipe's own flags go to the job unparsed: checking them takes torch, which takes longer than all else."""
    from training.recipes import RECIPES

    recipe, flags = (words[0], words[1:]) if words else ("", [])
    if recipe in HELP:
        parse_known("submit train", TrainOptions, TrainOptions(), ["--help"], f"Recipes: {', '.join(RECIPES)}.")
    if recipe and recipe not in RECIPES:
        raise UserError(f"no recipe {recipe!r}; {did_you_mean(recipe, RECIPES)}")
    if any(flag in HELP for flag in flags):
        _print_help_of_recipe(recipe)
    options, rest = parse_known("submit train RECIPE", Options, default, flags)
    if not recipe or not find_option(rest, "--out"):
        raise UserError("submit train RECIPE --out RUN: name the recipe and the run's folder, the job's files go there")
    return Step("train", options, words=(recipe, *rest))


def by_stage(step: Step) -> list[Step]:
    """A training of several stages as a step for each, to start after the one before; any other step as it is.

    Raises UserError when the stages are none.
    """
    from training.recipes import STAGED
    from training.recipes.tinyclip_stages import StageConfig

    words = step.words
    if step.command != "train" or words[0] not in STAGED or find_option(words, "--stage"):
        return [step]
    shares, models = (find_option(words, name) or "" for name in ("--stages", "--stage-models"))
    number = StageConfig(shares, models).number
    if number < 2:
        return [step]
    return [replace(step, words=(*words, "--stage", str(stage))) for stage in range(1, number + 1)]


def _print_help_of_recipe(recipe: str) -> None:
    """Print the recipe's options and submit's own. Raises SystemExit, as all help does."""
    config = importlib.import_module(f"training.recipes.{recipe}").config()
    parts = {recipe: (type(config), config), "trial": (TrialOptions, None), "submit": (Options, None)}
    parse_several(f"submit train {recipe}", parts, ["--help"])


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
        elif command in STAGE_COMMANDS:
            steps.append(stage_step(command, [pipeline.root, *rest], options))
        else:
            raise UserError(f"cannot submit {command!r}; {did_you_mean(command, COMMANDS)}")
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
