"""Refusal of models that a format has no form for: timm and transformers have plain CLIPs only."""

from torch import nn

from shards_spec.files import UserError
from training.models.plain_vit import NotPlain, PlainTransformer, plain_text_sizes, plain_vit_sizes

OTHERS = "use --format open_clip or onnx"


def check_plain_vit(model: nn.Module, target: str) -> PlainTransformer:
    """Return the sizes of the image tower of open_clip's ``model``.

    Raises UserError that names the format ``target`` and the part that is not plain.
    """
    try:
        return plain_vit_sizes(model.visual)
    except NotPlain as reason:
        raise _refusal(target, reason) from reason


def check_plain_text(model: nn.Module, target: str) -> PlainTransformer:
    """As `check_plain_vit`, of the text tower."""
    try:
        return plain_text_sizes(model)
    except NotPlain as reason:
        raise _refusal(target, reason) from reason


def _refusal(target: str, reason: NotPlain) -> UserError:
    return UserError(f"--format {target}: {target} has no such model: {reason}; {OTHERS}")
