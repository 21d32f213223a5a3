"""TinyCLIP's manual weight inheritance (arXiv 2309.12314, section 3.2) as functions state dict -> state dict.

A student takes layers of a larger CLIP of the same style, and of each of their tensors the rows and columns of the
units that it has room for: dims of the residual stream, whole heads of width 64 in each of queries, keys and values,
neurons of the MLPs, channels. Nothing is rescaled, resized or interpolated. The logit scale is not inherited.

By default it is the rule of the released code: layers by integer division, and the first units of each kind. Beyond it,
layers can be spread evenly, and units can be the ones that matter most (`unit_importance`). Which units are kept is
decided once per group for all tensors that count them, and they stay in their order, so that a student of the source's
own sizes is the source.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shards_spec.files import UserError
from training.choices import Layers, Rank
from training.models.tower_axes import Axes, Fixed, Rules, State, Units, axes_of, resnet_rules, text_rules, vit_rules
from training.models.unit_importance import Scores, first_order_scores, first_order_terms, magnitude_scores

Side = Literal["image", "text"]

SIDES: tuple[Side, Side] = ("image", "text")
SCALES = ("logit_scale", "logit_bias")  # not inherited
LAYER = re.compile(r"(transformer\.resblocks|layer\d)\.(\d+)\.(.+)")  # stack, number, rest of the name
HEAD_WIDTH = 64  # open_clip's, where a description has none
ACTIVATIONS = {False: "GELU", True: "QuickGELU"}


@dataclass(frozen=True)
class ClipWeights:
    """A CLIP's weights with what they do not tell themselves.

    Attributes:
        name: Of the model or its file, for messages.
        config: open_clip's description, as `LoadedModel.config`.
        state: The state dict.
        quick_gelu: The activation that the weights were trained with is QuickGELU.
    """

    name: str
    config: Mapping[str, Any]
    state: State
    quick_gelu: bool


def clip_weights(model: str, pretrained: str | None, config: Mapping[str, Any], state: State) -> ClipWeights:
    """Return the `ClipWeights` of a model by the name and the tag, file or None that it was loaded with.

    The activation is what the tag's weights were trained with, where open_clip knows the tag: it also loads OpenAI's
    weights into a model with GELU, with a warning only. Otherwise it is the description's.
    """
    import open_clip

    tag = open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained) if pretrained else {}
    quick_gelu = bool((tag or config).get("quick_gelu", False))
    name = f"{model} ({pretrained})" if pretrained else model
    return ClipWeights(name, config, state, quick_gelu)


def layer_map(source: int, student: int, layers: Layers = "interval") -> list[int]:
    """Return the source's layer, counted from 0, for each layer of the student.

    - interval: every ``source // student``-th, from the first on, as in the released code. That is 1 where the source
      has less than twice the layers: the last ones are cut off.
    - spread: ``i * source // student``, the same where the student's number divides the source's.
    - first: the first ones.

    Raises:
        ValueError: The student has more layers than the source, or none.
    """
    if not 1 <= student <= source:
        raise ValueError(f"{student} layers of {source}")
    if layers == "spread":
        return [i * source // student for i in range(student)]
    step = source // student if layers == "interval" else 1
    return [i * step for i in range(student)]


def inherit_manual(
    student: ClipWeights,
    image: ClipWeights,
    text: ClipWeights,
    *,
    layers: Layers = "interval",
    rank: Rank = "leading",
    terms: Mapping[Side, Sequence[State]] | None = None,
) -> State:
    """Return the student's state dict with all tensors of its towers inherited, in the student's dtypes.

    Args:
        student: The student; of its own weights only the logit scale stays.
        image: The source of the image tower.
        text: The source of the text tower; it may be the same.
        layers: Which layers are inherited (`layer_map`); in a ResNet within each stage.
        rank: Which units are: the first ones, those with the largest weights, or those whose loss would be missed most.
        terms: For "taylor", the `taylor_terms` of each side's source, one per batch.

    Raises:
        UserError: A source has another activation, patch size, embedding width or head width, another kind of tower, or
            is smaller than the student somewhere; or a tensor has no counterpart.
    """
    state = dict(student.state)
    sources: dict[Side, ClipWeights] = {"image": image, "text": text}
    for side, source in sources.items():
        own = Tower.of(student, side)
        tower = Tower.of(source, side)
        batches = [] if terms is None else [_names_within(batch, side) for batch in terms[side]]
        for name, value in inherit_tower(own, tower, layers=layers, rank=rank, terms=batches).items():
            state[own.prefix + name] = value
    return state


def taylor_terms(source: ClipWeights, gradients: State) -> State:
    """Return one batch's `first_order_terms` of both towers, under the names of the source's state dict.

    Args:
        source: The model.
        gradients: Of the batch's loss, by the names of the state dict (`gradients_of`).
    """
    found: State = {}
    for side in SIDES:
        tower = Tower.of(source, side)
        terms = first_order_terms(tower.state, _names_within(gradients, side), tower.axes())
        found |= {tower.prefix + name: value for name, value in terms.items()}
    return found


def inherit_tower(
    student: "Tower",
    source: "Tower",
    *,
    layers: Layers = "interval",
    rank: Rank = "leading",
    terms: Sequence[State] = (),
) -> State:
    """Return a tower's tensors, all inherited, under the names within the tower; arguments as of `inherit_manual`.

    Args:
        student: The tower that inherits.
        source: The tower that is inherited from.
        layers: Which layers are inherited.
        rank: Which units are.
        terms: For "taylor", one batch's `first_order_terms` each, under the source's names within the tower.

    Raises:
        UserError: As `inherit_manual`.
    """
    _check_alike(student, source)
    names = _names_in_source(student, source, layers)
    axes = student.axes()
    selected = {name: source.state[names[name]] for name in names}
    sizes = _unit_counts(student, source, names, axes)
    scores: Scores = {}
    if rank == "magnitude":
        scores = magnitude_scores(selected, axes)
    elif rank == "taylor":
        if not terms:
            raise ValueError("the rank taylor needs terms of at least one batch")
        batches = [{name: batch[names[name]] for name in names if names[name] in batch} for batch in terms]
        scores = first_order_scores(batches, axes)
    kept = {group: _kept_units(scores.get(group), *counts) for group, counts in sizes.items()}
    return {name: _cut(value, axes[name], kept).to(student.state[name].dtype) for name, value in selected.items()}


@dataclass(frozen=True)
class Tower:
    """One tower's weights, under their names within the tower.

    Attributes:
        model: Name of the model, for messages.
        side: Which tower.
        prefix: What stands before the names in the model's state dict.
        kind: What it is, in words.
        head_width: Rows of a head in queries, keys and values each.
        quick_gelu: It was trained with QuickGELU; None where the tower has neither.
        state: The weights.
    """

    model: str
    side: Side
    prefix: str
    kind: str
    head_width: int
    quick_gelu: bool | None
    state: State

    @classmethod
    def of(cls, weights: ClipWeights, side: Side) -> "Tower":
        """Return a tower of a CLIP. Raises UserError when it is of a kind that cannot inherit by hand."""
        config = weights.config.get("vision_cfg" if side == "image" else "text_cfg") or {}
        state = _names_within(weights.state, side)
        kind = _kind(state, side)
        if kind is None:
            raise UserError(
                f"{weights.name}: its {side} tower is of a kind that weights cannot be inherited of by hand (it has "
                f"{next(iter(state), 'no tensors')}); take open_clip's ViT or CLIP-ResNet with its text transformer"
            )
        if side == "image":
            prefix, head_width = "visual.", config.get("head_width", HEAD_WIDTH)
        else:
            prefix = "text." if "text.ln_final.weight" in weights.state else ""
            head_width = len(state["ln_final.weight"]) // config.get("heads", 8)
        quick_gelu = None if kind == "CLIP-ResNet" else weights.quick_gelu
        return cls(weights.name, side, prefix, kind, head_width, quick_gelu, state)

    def axes(self) -> dict[str, Axes]:
        """Return the axes of each tensor. Raises UserError for a tensor that no rule is for."""
        rules = KINDS[self.kind](self.head_width)
        return {name: self._axes(name, rules) for name in self.state}

    def _axes(self, name: str, rules: Rules) -> Axes:
        axes = axes_of(name, rules)
        if axes is None or len(axes) != self.state[name].ndim:
            raise UserError(
                f"{self.model}: {self.prefix}{name} {list(self.state[name].shape)} is no tensor of a plain "
                f"{self.kind}; weights cannot be inherited by hand with it"
            )
        return axes

    def depths(self) -> dict[str, int]:
        """Return the number of layers of each stack: one in a transformer, four stages in a ResNet."""
        numbers: dict[str, set[int]] = {}
        for name in self.state:
            if match := LAYER.fullmatch(name):
                numbers.setdefault(match[1], set()).add(int(match[2]))
        return {stack: len(found) for stack, found in numbers.items()}


KINDS = {"ViT": vit_rules, "CLIP-ResNet": resnet_rules, "text transformer": text_rules}


def _kind(state: State, side: Side) -> str | None:
    if side == "text":
        needed = {"token_embedding.weight", "transformer.resblocks.0.ln_1.weight", "ln_final.weight"}
        return "text transformer" if needed <= state.keys() else None
    if "class_embedding" in state:
        return "ViT"
    return "CLIP-ResNet" if "layer1.0.conv1.weight" in state else None


def _names_within(state: State, side: Side) -> State:
    """One tower's part of a CLIP's tensors, under the names within the tower."""
    if side == "image":
        return {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    others = [name for name in state if not name.startswith("visual.") and name not in SCALES]
    return {name.removeprefix("text."): state[name] for name in others}


def _check_alike(student: Tower, source: Tower) -> None:
    """Raise UserError when two towers are of other kinds, activations or head widths."""
    whose = f"the {student.side} tower of {student.model}"
    if student.kind != source.kind:
        raise UserError(
            f"{whose} is a {student.kind}, that of {source.model} a {source.kind}; take a source of the student's kind"
        )
    if student.head_width != source.head_width:
        raise UserError(
            f"{whose} has heads of width {student.head_width}, that of {source.model} of {source.head_width}; only "
            "whole heads are inherited, take a source with the student's head width"
        )
    if student.quick_gelu is not None and student.quick_gelu != source.quick_gelu:
        theirs = ACTIVATIONS[bool(source.quick_gelu)]
        raise UserError(
            f"{whose} computes {ACTIVATIONS[student.quick_gelu]}, and the weights of {source.model} were trained with "
            f"{theirs}; take the student with {theirs} (the names of TinyCLIP's with QuickGELU end in -quickgelu)"
        )


def _names_in_source(student: Tower, source: Tower, layers: Layers) -> dict[str, str]:
    """The source's name for each of the student's tensors. Raises UserError where one has no counterpart."""
    maps: dict[str, list[int]] = {}
    source_depths = source.depths()
    for stack, depth in student.depths().items():
        try:
            maps[stack] = layer_map(source_depths.get(stack, 0), depth, layers)
        except ValueError as error:
            raise UserError(
                f"{student.model} has {depth} {student.side} layers in {student.prefix}{stack}, {source.model} "
                f"{source_depths.get(stack, 0)}; take a source that is at least as deep"
            ) from error
    names = {}
    for name in student.state:
        match = LAYER.fullmatch(name)
        names[name] = name if match is None else f"{match[1]}.{maps[match[1]][int(match[2])]}.{match[3]}"
        if names[name] not in source.state:
            raise UserError(
                f"{student.model}: nothing to inherit for {student.prefix}{name}, {source.model} has no "
                f"{source.prefix}{names[name]}; take a source of the student's architecture"
            )
    used = set(names.values())
    for name in source.state:
        match = LAYER.fullmatch(name)
        is_dropped = match is not None and int(match[2]) not in maps.get(match[1], [])
        if name not in used and not is_dropped:
            raise UserError(
                f"{source.model} computes with {source.prefix}{name}, which {student.model} has no room for; take a "
                "source of the student's architecture"
            )
    return names


def _unit_counts(
    student: Tower, source: Tower, names: Mapping[str, str], axes: Mapping[str, Axes]
) -> dict[str, tuple[int, int]]:
    """How many units of each group student and source have. Raises UserError where the student does not fit."""
    counts: dict[str, tuple[int, int]] = {}
    for name in sorted(student.state, key=lambda name: name != "conv1.weight"):  # first: it tells a patch size
        own = student.state[name]
        theirs = source.state[names[name]]
        place = f"{student.prefix}{name} {list(own.shape)}, {source.prefix}{names[name]} {list(theirs.shape)}"
        if own.ndim != theirs.ndim:
            raise UserError(f"{student.model} and {source.model} do not fit: {place}")
        for axis, rows, source_rows in zip(axes[name], own.shape, theirs.shape, strict=True):
            if isinstance(axis, Fixed):
                if rows != source_rows:
                    raise UserError(
                        f"{student.model} has another {axis.what} than {source.model}, {rows} and {source_rows} "
                        f"({place}); nothing is interpolated, take a source with the student's"
                    )
                continue
            found = _units_of_both(axis, rows, source_rows, place)
            if found[0] > found[1]:
                raise UserError(
                    f"{student.model} is wider than {source.model}, {found[0]} {_unit_noun(axis.group)} and {found[1]} "
                    f"({place}); take a source that is at least as wide"
                )
            if counts.setdefault(axis.group, found) != found:
                raise UserError(
                    f"{place}: other {_unit_noun(axis.group)} than in the tensors beside it; take a whole model"
                )
    return counts


def _units_of_both(axis: Units, rows: int, source_rows: int, place: str) -> tuple[int, int]:
    try:
        return axis.count(rows), axis.count(source_rows)
    except ValueError as error:
        raise UserError(f"{place}: {error}; take a model whose head width is the described one") from error


def _unit_noun(group: str) -> str:
    kind = group.rpartition(".")[2]
    return {"width": "dims", "heads": "heads", "neurons": "neurons"}.get(kind, "channels")


def _kept_units(scores: Tensor | None, count: int, source_count: int) -> Tensor:
    """Numbers (count,) of the units that stay, ascending: the first ones, or those of the highest scores."""
    if scores is None or count == source_count:
        return torch.arange(count)
    return scores.cpu().argsort(descending=True, stable=True)[:count].sort().values


def _cut(value: Tensor, axes: Axes, kept: Mapping[str, Tensor]) -> Tensor:
    """A copy of a tensor with the rows and columns of the units that stay."""
    cut = value.detach()
    for dim, axis in enumerate(axes):
        if isinstance(axis, Units):
            rows = axis.rows(kept[axis.group], value.shape[dim])
            cut = cut.index_select(dim, rows.to(cut.device))
    return cut.clone()
