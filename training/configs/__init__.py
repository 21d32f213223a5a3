"""What a command line can say to a recipe: ``training.configs.NAME`` has the config of recipe NAME and its numbers.

Nothing here imports torch, timm or open_clip, so a command line is read, and a submission checked, in a moment. What
takes a model, a dataset or a device to know is checked by the recipe's ``prepare``.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from training.config import TrialOptions, smoke


def default_config(recipe: str) -> Any:
    """Return a recipe's own numbers, as its ``config()`` has them."""
    return import_module(f"training.configs.{recipe}").config()


def command_line_parts(recipe: str, words: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Return the parts of a recipe's command line, each a dataclass and its defaults, by the name of their group.

    Args:
        recipe: The recipe.
        words: What is to be parsed; with ``--smoke`` the defaults are those of a trial.
    """
    default = smoke(default_config(recipe)) if "--smoke" in words else default_config(recipe)
    return {recipe: (type(default), default), "trial": (TrialOptions, None)}
