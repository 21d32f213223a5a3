"""Command lines of pages and scripts, parsed as the product parses them; nothing is run."""

import pkgutil
from collections.abc import Sequence

import clipmill
from pipeline.core.command_line import parse, parse_several
from slurm.step import parse_steps
from training.configs import command_line_parts


def parse_command(words: Sequence[str]) -> None:
    """Parse what stands after ``clipmill``. Raises UserError, and KeyError for no command."""
    command, *rest = words
    if command == "train":
        recipe, *flags = rest
        parse_several(f"train {recipe}", command_line_parts(recipe, flags), flags)
    elif command == "submit":
        parse_steps(rest)
    else:
        parse(command, pkgutil.resolve_name(clipmill.COMMANDS[command].config), rest)
