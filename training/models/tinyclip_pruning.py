"""Masks on a student, and a student cut to its masks (TinyCLIP, arXiv 2309.12314).

The functions change a model of `tinyclip_pruned` and its config in place: its two towers are replaced, the model stays
the same object. Cutting is exact: the smaller model computes what the masked one does in evaluation. Two things differ
from the released code, which is not exact there: projections are not multiplied by the mask of dimensions, and a layer
that loses all heads keeps the constant that its out_proj.bias adds.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shards_spec.files import UserError
from training.losses.sparsity import expected_sparsity
from training.models.tinyclip_convert import Config, State, resize
from training.models.tinyclip_masks import INITIAL, MaskValues, TowerMasks, masked_weight
from training.models.tinyclip_pruned import PrunedTower

TOWERS = (("visual", "vision_cfg"), ("text", "text_cfg"))  # a tower's name in the model, and in its config
EMBEDDINGS = ("class_embedding", "positional_embedding", "token_embedding.weight")
NORMS = ("ln_pre", "ln_post", "ln_final")
PROJECTIONS = ("proj", "text_projection")


def masks_of(model: nn.Module) -> list[TowerMasks]:
    """Return the masks of image and text tower; none when the model has none."""
    towers: list[Any] = [getattr(model, name) for name, _ in TOWERS]
    return [tower.masks for tower in towers if tower.masks is not None]


def mask_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the log-alphas of both towers."""
    return list(itertools.chain.from_iterable(masks.parameters() for masks in masks_of(model)))


def expected_model_sparsity(model: nn.Module) -> Tensor:
    """Return p of both towers of a masked model together, a scalar with a graph."""
    masks = masks_of(model)
    return expected_sparsity([own.expected_size() for own in masks], [own.original for own in masks])


def expected_sparsities(model: nn.Module) -> dict[str, float]:
    """Return p of a masked model's towers, ``image`` and ``text``, and of both together, ``sparsity``."""
    image, text = (expected_sparsity([own.expected_size()], [own.original]).item() for own in masks_of(model))
    return {"image": image, "text": text, "sparsity": expected_model_sparsity(model).item()}


def kept_units(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what evaluation keeps of ``image`` and ``text`` tower, with masks or without: their sizes once cut.

    Each has ``width``, and ``heads`` and ``neurons`` of each layer.
    """
    towers: dict[str, Any] = {"image": model.visual, "text": model.text}
    return {name: _kept_sizes(tower) for name, tower in towers.items()}


@torch.no_grad()
def _kept_sizes(tower: PrunedTower) -> dict[str, Any]:
    if tower.masks is None:
        return {name: tower.description[name] for name in ("width", "heads", "neurons")}
    values = tower.masks.deterministic()
    return {
        "width": int(values.dims.count_nonzero()),
        "heads": [int(layer.count_nonzero()) for layer in values.heads],
        "neurons": [int(layer.count_nonzero()) for layer in values.neurons],
    }


def attach_masks(model: nn.Module, config: Config) -> None:
    """Give both towers masks with all units on; those that they had begin anew.

    A model that was cut before has masks on the units that are left, and its sparsity is still that of the whole.
    """
    for name, part in TOWERS:
        tower: PrunedTower = getattr(model, name)
        own = tower.description
        device = next(tower.parameters()).device
        tower.masks = TowerMasks(own["width"], own["heads"], own["neurons"], tower.original).to(device)
        tower.masks.train(tower.training)
        tower.description = own | {"masks": True}
        config[part] = config[part] | {"masks": True}


@torch.no_grad()
def materialise(model: nn.Module, config: Config) -> None:
    """Cut a masked model to the units that its masks of evaluation keep, and drop the masks.

    All parameters of the towers are new, so an optimizer begins without state; the logit scale stays.

    Raises:
        UserError: The masks of a tower keep no dimension at all.
    """
    for name, part in TOWERS:
        tower: PrunedTower = getattr(model, name)
        if tower.masks is None:
            continue
        description = tower.description | _kept_sizes(tower) | {"masks": False}
        if not description["width"]:
            raise UserError(f"the masks keep nothing of the tower {name!r}: give a lower --sparsity")
        setattr(model, name, tower.rebuilt(description, _cut(tower, tower.masks.deterministic())))
        config[part] = config[part] | description


def _cut(tower: PrunedTower, values: MaskValues) -> State:
    """The state dict of a tower of the kept units, with the masks' values in its weights."""
    state: State = dict(tower.state_dict())
    kept = values.dims.nonzero().flatten()
    cut: State = {}
    for name in EMBEDDINGS:
        if name in state:
            cut[name] = (state[name] * values.dims)[..., kept]
    if "conv1.weight" in state:
        cut["conv1.weight"] = (state["conv1.weight"] * values.dims.view(-1, 1, 1, 1))[kept]
    if "attn_pool.query" in state:
        cut |= _cut_pooler(state, kept)
        state = {name: value for name, value in state.items() if name not in cut}
    for norm in NORMS:
        cut |= _part(state, f"{norm}.", kept)
    for name in PROJECTIONS:
        if name in state:
            cut[name] = state[name][kept]
    for layer, (heads, neurons) in enumerate(zip(values.heads, values.neurons, strict=True)):
        block = f"transformer.resblocks.{layer}."
        own = {name.removeprefix(block): value for name, value in state.items() if name.startswith(block)}
        smaller = _cut_attention(own, values.dims, heads, tower.description["head_width"]) | _cut_mlp(
            own, values.dims, neurons
        )
        cut |= {block + name: value for name, value in smaller.items()}
    return cut


def _cut_pooler(state: State, kept: Tensor) -> State:
    """An attentional pooling, which reads the kept dimensions, and what follows it, which is all features."""
    cut = {name: value for name, value in state.items() if name.startswith(("attn_pool.", "ln_post.", "proj"))}
    cut |= _part(state, "attn_pool.ln_k.", kept)
    for name in ("attn_pool.attn.k_proj_weight", "attn_pool.attn.v_proj_weight"):
        cut[name] = state[name][:, kept]
    return cut


def _part(state: State, prefix: str, kept: Tensor) -> State:
    """Vectors of a LayerNorm, not multiplied: a LayerNorm's output is not masked."""
    return {name: value[kept] for name, value in state.items() if name.startswith(prefix)}


def _cut_attention(block: State, dims: Tensor, heads: Tensor, head_width: int) -> State:
    """The attention of a block and the norm before it, of the kept heads and dimensions."""
    kept = dims.nonzero().flatten()
    kept_heads = heads.nonzero().flatten()
    cut = {"attn.out_proj.bias": (block["attn.out_proj.bias"] * dims)[kept]}
    if not len(kept_heads):
        return cut
    per_column = heads.repeat_interleave(head_width)
    packed = block["attn.in_proj_weight"].view(3, len(heads), head_width, len(dims))
    biases = block["attn.in_proj_bias"].view(3, len(heads), head_width)
    cut["attn.in_proj_weight"] = packed[:, kept_heads][..., kept].flatten(0, 2)
    cut["attn.in_proj_bias"] = biases[:, kept_heads].flatten()
    folded = masked_weight(block["attn.out_proj.weight"], dims, per_column)
    cut["attn.out_proj.weight"] = folded[kept][:, per_column.nonzero().flatten()]
    return cut | _part(block, "ln_1.", kept)


def _cut_mlp(block: State, dims: Tensor, neurons: Tensor) -> State:
    """The MLP of a block and the norm before it, of the kept neurons and dimensions."""
    kept = dims.nonzero().flatten()
    kept_neurons = neurons.nonzero().flatten()
    cut = {"mlp.c_proj.bias": (block["mlp.c_proj.bias"] * dims)[kept]}
    if not len(kept_neurons):
        return cut
    cut["mlp.c_fc.weight"] = block["mlp.c_fc.weight"][kept_neurons][:, kept]
    cut["mlp.c_fc.bias"] = block["mlp.c_fc.bias"][kept_neurons]
    cut["mlp.c_proj.weight"] = masked_weight(block["mlp.c_proj.weight"], dims, neurons)[kept][:, kept_neurons]
    return cut | _part(block, "ln_2.", kept)


@torch.no_grad()
def reshape_like(model: nn.Module, config: Config, state: Mapping[str, Tensor]) -> bool:
    """Give a model the sizes, and the masks or none, of a state dict, and its weights; return whether it had others.

    Args:
        model: The model.
        config: Its config.
        state: A state dict of the same model with other sizes.
    """
    resized = resize(config, state)
    if resized == config:
        return False
    for name, part in TOWERS:
        tower: PrunedTower = getattr(model, name)
        device = next(tower.parameters()).device
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value.to(device) for key, value in state.items() if key.startswith(prefix)}
        description = {key: resized[part][key] for key in tower.description}
        setattr(model, name, tower.rebuilt(description, own))
        config[part] = resized[part]
    return True


@torch.no_grad()
def to_full_size(model: nn.Module, config: Config) -> None:
    """Put a model that was cut back into the size before any pruning, with masks: the released code's next stage.

    Each tensor is copied to the leading corner, the rest is 0; log-alphas of copied units are 10, of others -10. The
    clamp turns -10 into -4.6, so that units of weight 0 are sampled now and then and disturb the LayerNorms, and p is
    lower than before; `attach_masks` of the smaller model has neither.
    """
    for name, part in TOWERS:
        tower: PrunedTower = getattr(model, name)
        original, layers = tower.original, len(tower.description["heads"])
        description = tower.description | {
            "width": original.width,
            "heads": [original.heads] * layers,
            "neurons": [original.neurons] * layers,
            "masks": True,
        }
        with torch.device("meta"):
            shapes = type(tower)(tower.output_dim, tower.quick_gelu, **description).state_dict()
        device = next(tower.parameters()).device
        state = {key: torch.zeros_like(value, device=device) for key, value in shapes.items()}
        for key, value in tower.state_dict().items():
            if not key.startswith("masks."):
                is_packed = key.startswith("transformer.") and ".attn.in_proj" in key
                _copy_to_corner(state[key], value, tower.description["head_width"] if is_packed else None)
        state |= _corner_masks(tower, device)
        setattr(model, name, tower.rebuilt(description, state))
        config[part] = config[part] | description


def _copy_to_corner(target: Tensor, value: Tensor, head_width: int | None) -> None:
    """Copy a tensor to the leading corner of a larger one; ``head_width`` is given for packed q, k, v."""
    if head_width is not None:
        target = target.view(3, -1, head_width, *target.shape[1:])
        value = value.view(3, -1, head_width, *value.shape[1:])
    target[tuple(slice(length) for length in value.shape)] = value


def _corner_masks(tower: PrunedTower, device: torch.device) -> State:
    """Log-alphas of a tower of full size, on for the units of this one."""
    own = tower.description
    full = tower.original
    heads = [_leading(count, full.heads) for count in own["heads"]]
    neurons = [_leading(count, full.neurons) for count in own["neurons"]]
    masks = {"dims": _leading(own["width"], full.width), "heads": torch.cat(heads), "neurons": torch.cat(neurons)}
    return {f"masks.{name}": value.to(device) for name, value in masks.items()}


def _leading(count: int, total: int) -> Tensor:
    return torch.where(torch.arange(total) < count, INITIAL, -INITIAL)
