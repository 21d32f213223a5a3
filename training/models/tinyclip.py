"""TinyCLIP's students (arXiv 2309.12314) as open_clip models: importing this module makes their names known.

They are plain CLIPs of open_clip's own towers, so a folder that `clipmill export` wrote of one loads without this
package, and timm has the image towers of the ViTs. Their activation is the exact GELU, as in all released
configurations; a name with ``-quickgelu`` is the same student for weights that were trained with QuickGELU (OpenAI's).

The released checkpoints are state dicts of the authors' own modules, often in fp16, with a training's optimizer beside
them; `from_released` gives them open_clip's names.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from shards_spec.checkpoints import strip_wrappers
from shards_spec.open_clip_plugins import ModelPlugin, register_models

State = dict[str, Tensor]  # a state dict
CONFIGS = Path(__file__).parent / "configs" / "tinyclip"
QUICK_GELU = "-quickgelu"  # ending of the names of students with QuickGELU, as of open_clip's own models

# the authors' modules around a tower or the logit scale, under the name that is registered or the other that they have;
# plain ``image_encoder.`` is Apple's
RELEASED = re.compile(r"(?=_|[a-z_]+_without_ddp\.)_?(image_encoder|text_encoder|logit_scale)(?:_without_ddp)?\.(.+)")
TOWERS = {"image_encoder": "image", "text_encoder": "text"}
MASKS = "l0_module."  # the learned masks of a training that has not yet cut its model to them
BLOCK = re.compile(r"(visual\.)?(transformer\.resblocks|layer\d)\.(\d+)\.(.+)")
MLP_RATIO = 4  # neurons of an MLP per dimension, in every student that was cut by hand


def from_released(released: State) -> State | None:
    """Return a released checkpoint's tensors under open_clip's names, in fp32.

    The authors' names have ``_image_encoder.``, ``_text_encoder.`` and ``_logit_scale.`` (or
    ``image_encoder_without_ddp.``, ...) in front, and ``module.`` anywhere. A tensor may stand there under both names.

    Args:
        released: A state dict.

    Returns:
        open_clip's state dict, or None when no name is the authors'.

    Raises:
        ValueError: The file holds another model's tensors beside them, one twice with different values, one tower only,
            or masks that were not yet applied.
    """
    places: dict[str, str] = {}  # open_clip's name: the file's
    towers = set[str]()
    others = list[str]()
    for name in released:
        bare = strip_wrappers(name)
        match = RELEASED.fullmatch(bare)
        if match is None and bare != "logit_scale":
            others.append(name)
            continue
        own = bare
        if match is not None:
            towers.add(match[1])
            own = match[2]
        if own in places and not torch.equal(released[places[own]], released[name]):
            raise ValueError(f"{places[own]} and {name} differ and are one tensor; take a file of one model")
        places.setdefault(own, name)
    if not towers & TOWERS.keys():
        return None
    _check_whole(places, towers, others)
    state = {own: released[name] for own, name in places.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _check_whole(places: dict[str, str], towers: set[str], others: list[str]) -> None:
    """Raise ValueError unless a released file holds both towers of one trained model and nothing else."""
    example = next(iter(places.values()))
    if others:
        raise ValueError(f"{others[0]} stands beside TinyCLIP's {example}; take a file of one model")
    for tower, side in TOWERS.items():
        if tower not in towers:
            raise ValueError(
                f"its names, as {example}, are of one tower; the {side} tower is missing, take a whole model"
            )
    for own, name in places.items():
        if own.startswith(MASKS):
            raise ValueError(f"{name} is a mask that was not yet applied; take a checkpoint from after its prune_step")


def irregular_tensor(state: State) -> str | None:
    """Return the name of a tensor that no width, head width 64 and MLP ratio 4 describe; None for a regular CLIP.

    Learned masks leave each layer its own number of heads and neurons, and none where a layer lost them all.
    """
    parts: dict[str, set[str]] = {}
    for name, value in state.items():
        match = BLOCK.fullmatch(name)
        if match is None or match[2] != "transformer.resblocks":
            continue
        parts.setdefault(name.removesuffix(match[4]), set()).add(match[4])
        rows = {"attn.in_proj_weight": 3, "mlp.c_fc.weight": MLP_RATIO}.get(match[4])
        if rows is not None and len(value) != rows * value.shape[1]:
            return name
    fullest = max(parts.values(), key=len, default=set())
    return next((block + min(fullest - held) for block, held in parts.items() if held != fullest), None)


def student_name(state: State) -> str | None:
    """Return the name of the released student that a state dict is of (with GELU), or None."""
    for path in sorted(CONFIGS.glob("*.json")):
        if not path.stem.endswith(QUICK_GELU) and _sizes_of_config(json.loads(path.read_text())) == _sizes(state):
            return path.stem
    return None


def _sizes(state: State) -> tuple[Any, ...]:
    """What tells the students apart: shape of the first convolution, image blocks, text width, text blocks."""
    blocks = {True: set[str](), False: set[str]()}
    for name in state:
        match = BLOCK.fullmatch(name)
        if match is not None:
            blocks[match[1] is not None].add(f"{match[2]}.{match[3]}")
    shapes = [tuple(state[name].shape) if name in state else () for name in ("visual.conv1.weight", "ln_final.weight")]
    return (shapes[0], len(blocks[True]), shapes[1], len(blocks[False]))


def _sizes_of_config(config: dict[str, Any]) -> tuple[Any, ...]:
    """The `_sizes` of a description's model."""
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    if isinstance(vision["layers"], list):
        first, blocks = (vision["width"] // 2, 3, 3, 3), sum(vision["layers"])
    else:
        first, blocks = (vision["width"], 3, vision["patch_size"], vision["patch_size"]), vision["layers"]
    return (first, blocks, (text["width"],), text["layers"])


def _convert_state_dict(model: nn.Module, state: State) -> State | None:
    """A released checkpoint for one of open_clip's CLIPs; None when it is none, so that others may know it."""
    if not isinstance(model, CLIP):
        return None
    converted = from_released(state)
    if converted is None:
        return None
    if _sizes(converted) == _sizes(model.state_dict()) and irregular_tensor(converted) is None:
        return converted  # what else may not fit, `load_state_dict` names
    if name := irregular_tensor(converted):
        raise ValueError(
            f"by {name} learned masks cut this model, layer by layer; a name that begins with TinyCLIP-auto takes it"
        )
    if name := student_name(converted):
        raise ValueError(
            f"it is {name} (visual.conv1.weight {list(converted['visual.conv1.weight'].shape)}); name that model"
        )
    return converted


register_models(ModelPlugin(configs=CONFIGS, convert_state_dict=_convert_state_dict))
