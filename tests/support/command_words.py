"""Command lines of pages and scripts, parsed as the product parses them; nothing is run."""

import importlib
import pkgutil
from collections.abc import Sequence

import clipmill
from pipeline.core.command_line import TrialOptions, parse, parse_several
from slurm.step import parse_steps


def parse_command(words: Sequence[str]) -> None:
    """Parse what stands after ``clipmill``. Raises UserError, and KeyError for no command."""
    command, *rest = words
    if command == "train":
        parse_training(rest)
    elif command == "submit":
        for step in parse_steps(rest):
            if step.command == "train":
                parse_training(step.words)
    else:
        parse(command, pkgutil.resolve_name(clipmill.COMMANDS[command].config), rest)


def parse_training(words: Sequence[str]) -> None:
    """Parse what stands after ``clipmill train``. Raises UserError."""
    recipe, *flags = words
    default = importlib.import_module(f"training.recipes.{recipe}").config()
    parse_several(f"train {recipe}", {recipe: (type(default), default), "trial": (TrialOptions, None)}, flags)
