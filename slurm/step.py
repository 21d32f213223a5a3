"""A command to submit, and how its words are parsed: the flags of the command itself, and those of `Options`."""

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.core.command_line import parse, parse_known, parse_several
from shards_spec.files import UserError
from shards_spec.layout import STAGE_COMMANDS, STAGES
from shards_spec.suggest import did_you_mean
from slurm.options import Options

COMMANDS = (*STAGE_COMMANDS, "train")  # that can be submitted
USAGE = """usage: clipmill submit STAGE ROOT ...          a stage as an array over its shards
       clipmill submit train RECIPE --out RUN ...   nodes x GPUs, one process each
       clipmill submit pipeline ROOT [options] -- ingest --source LIST -- caption ... -- pack -- vocab -- cache ...
                                -- train RECIPE --out RUN ...   one after the other

The flags are those of the command itself; clipmill submit STAGE --help shows them with submit's own."""


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

    if words and words[0] not in (*RECIPES, "-h", "--help"):
        raise UserError(f"no recipe {words[0]!r}; {did_you_mean(words[0], RECIPES)}")
    flags = words if words[:1] == ["--help"] else words[1:]
    options, rest = parse_known("submit train RECIPE", Options, default, flags)
    if not words or not find_option(rest, "--out"):
        raise UserError("submit train RECIPE --out RUN: name the recipe and the run's folder, the job's files go there")
    return Step("train", options, words=(words[0], *rest))


def _pipeline_steps(words: list[str]) -> list[Step]:
    """ROOT and common options, then each command after a ``--`` of its own."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    common, *commands = parts
    if not common or not commands or not all(commands):
        raise UserError(f"name ROOT and the commands\n{USAGE}")
    options = parse("submit pipeline ROOT", Options, common[1:])
    steps = []
    for command, *rest in commands:
        if command == "train":
            data = [] if find_option(rest, "--data") else ["--data", common[0]]
            steps.append(_train_step([*rest, *data], options))
        elif command in STAGE_COMMANDS:
            steps.append(stage_step(command, [common[0], *rest], options))
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
