"""Which units the dimensions of a tower's tensors count: dims of the residual stream, heads, neurons, channels.

A unit that is dropped from a tower leaves every tensor that counts it, so the tensors of a tower are described by one
table: tensor name -> an axis per dimension. The towers are open_clip's ViT, CLIP-ResNet and text transformer, and
names are those within the tower.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

State = dict[str, Tensor]  # a state dict


@dataclass(frozen=True)
class Units:
    """A dimension that counts units, of which some may be dropped.

    Attributes:
        group: Units of one group are the same in all tensors that count them: ``width``, ``layers.3.heads``, ...
        parts: The units' rows are there that many times, one part after the other (3: queries, keys, values).
        size: Consecutive rows of one unit in a part (the head width).
        reads: The tensor is linear in the units' values, so weight times gradient is value times gradient.
    """

    group: str
    parts: int = 1
    size: int = 1
    reads: bool = False

    def count(self, rows: int) -> int:
        """Return the number of units of a dimension of that many rows. Raises ValueError when it is not whole."""
        units, rest = divmod(rows, self.parts * self.size)
        if rest:
            raise ValueError(f"{rows} rows are not {self.parts} times a multiple of {self.size}")
        return units

    def rows(self, kept: Tensor, rows: int) -> Tensor:
        """Return the row numbers of units ``kept`` (K,), in their order, in a dimension of that many rows."""
        table = torch.arange(rows).view(self.parts, self.count(rows), self.size)
        return table[:, kept].flatten()

    def per_unit(self, values: Tensor) -> Tensor:
        """Return the sums over the rows of each unit, (units,), of values per row (rows,)."""
        return values.view(self.parts, self.count(len(values)), self.size).sum((0, 2))


@dataclass(frozen=True)
class Fixed:
    """A dimension that no unit may be dropped from; ``what`` it counts, in words."""

    what: str


Axis = Units | Fixed
Axes = tuple[Axis, ...]
Rules = Sequence[tuple[str, Axes]]

EMBEDDING = Fixed("embedding width")
PATCH = Fixed("patch size")
KERNEL = Fixed("kernel size")
COLOURS = Fixed("number of colour channels")
WIDTH = Units("width")
WIDTH_READ = Units("width", reads=True)
AFFINE = r"\.(?:weight|bias)"
BATCH_NORM = r"\.(?:weight|bias|running_mean|running_var)"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of a BatchNorm: no weights


def block_rules(head_width: int) -> Rules:
    """Return the rules of pre-norm attention blocks, of either tower."""
    block = r"transformer\.resblocks\.(\d+)\."
    heads = Units("layers.{0}.heads", size=head_width)
    neurons = Units("layers.{0}.neurons")
    packed = replace(heads, parts=3)
    return (
        (block + r"ln_[12]" + AFFINE, (WIDTH,)),
        (block + r"attn\.in_proj_weight", (packed, WIDTH_READ)),
        (block + r"attn\.in_proj_bias", (packed,)),
        (block + r"attn\.out_proj\.weight", (WIDTH, replace(heads, reads=True))),
        (block + r"attn\.out_proj\.bias", (WIDTH,)),
        (block + r"mlp\.c_fc\.weight", (neurons, WIDTH_READ)),
        (block + r"mlp\.c_fc\.bias", (neurons,)),
        (block + r"mlp\.c_proj\.weight", (WIDTH, replace(neurons, reads=True))),
        (block + r"mlp\.c_proj\.bias", (WIDTH,)),
    )


def vit_rules(head_width: int) -> Rules:
    """Return the rules of a ViT image tower."""
    return (
        (r"conv1\.weight", (WIDTH, COLOURS, PATCH, PATCH)),
        (r"class_embedding", (WIDTH,)),
        (r"positional_embedding", (Fixed("number of image positions"), WIDTH)),
        (r"ln_(?:pre|post)" + AFFINE, (WIDTH,)),
        (r"proj", (WIDTH_READ, EMBEDDING)),
        *block_rules(head_width),
    )


def text_rules(head_width: int) -> Rules:
    """Return the rules of a text transformer."""
    return (
        (r"token_embedding\.weight", (Fixed("vocabulary"), WIDTH)),
        (r"positional_embedding", (Fixed("context length"), WIDTH)),
        (r"ln_final" + AFFINE, (WIDTH,)),
        (r"text_projection", (WIDTH_READ, EMBEDDING)),
        *block_rules(head_width),
    )


def resnet_rules(head_width: int) -> Rules:
    """Return the rules of a CLIP-ResNet: the channels of a stage's skip connections are one group."""
    stage = Units("stages.{0}")
    stage_read = replace(stage, reads=True)
    before_read = Units("stages.{before}", reads=True)
    first = Units("stages.{0}.{1}.first")
    second = Units("stages.{0}.{1}.second")
    block = r"layer(\d)\.(\d+)\."
    heads = Units("pool.heads", size=head_width)
    last_read = Units("stages.4", reads=True)
    kernel = (KERNEL, KERNEL)
    return (
        (r"conv1\.weight", (Units("stem.1"), COLOURS, *kernel)),
        (r"bn1" + BATCH_NORM, (Units("stem.1"),)),
        (r"conv2\.weight", (Units("stem.2"), Units("stem.1", reads=True), *kernel)),
        (r"bn2" + BATCH_NORM, (Units("stem.2"),)),
        (r"conv3\.weight", (Units("stages.0"), Units("stem.2", reads=True), *kernel)),
        (r"bn3" + BATCH_NORM, (Units("stages.0"),)),
        (r"layer(\d)\.(0)\.conv1\.weight", (first, before_read, *kernel)),
        (block + r"conv1\.weight", (first, stage_read, *kernel)),
        (block + r"bn1" + BATCH_NORM, (first,)),
        (block + r"conv2\.weight", (second, replace(first, reads=True), *kernel)),
        (block + r"bn2" + BATCH_NORM, (second,)),
        (block + r"conv3\.weight", (stage, replace(second, reads=True), *kernel)),
        (block + r"bn3" + BATCH_NORM, (stage,)),
        (block + r"downsample\.0\.weight", (stage, before_read, *kernel)),
        (block + r"downsample\.1" + BATCH_NORM, (stage,)),
        (r"(?:.+\.)?num_batches_tracked", ()),
        (r"attnpool\.positional_embedding", (Fixed("number of image positions"), Units("stages.4"))),
        (r"attnpool\.[qkv]_proj\.weight", (heads, last_read)),
        (r"attnpool\.[qkv]_proj\.bias", (heads,)),
        (r"attnpool\.c_proj\.weight", (EMBEDDING, replace(heads, reads=True))),
        (r"attnpool\.c_proj\.bias", (EMBEDDING,)),
    )


def axes_of(name: str, rules: Rules) -> Axes | None:
    """Return the axes of a tensor by the first rule for its name, or None."""
    for pattern, axes in rules:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return tuple(_in_place(axis, match.groups()) for axis in axes)
    return None


def _in_place(axis: Axis, numbers: tuple[str, ...]) -> Axis:
    """The axis with the numbers of its stage and block in the group's name."""
    if isinstance(axis, Fixed) or not numbers:
        return axis
    return replace(axis, group=axis.group.format(*numbers, before=int(numbers[0]) - 1))
