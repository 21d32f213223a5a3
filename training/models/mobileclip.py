"""MobileCLIP-S0 and SiCLIP-S0 as open_clip models: importing this module makes their names known.

`open_clip.create_model` then builds MobileCLIP-S0 (arXiv 2311.17049; image tower timm's fastvit_mci0, text tower
`TextTower`), SiCLIP-S0 (arXiv 2411.14789), SiCLIP2-S0 (the same made from open_clip's MobileCLIP2-S0), and
MobileCLIP-tiny and SiCLIP-tiny for tests and studies on a CPU.
Apple's S0 has 53,847,681 parameters; ours has 512 more, the bias of timm's head, which is 0 after loading Apple's file.

How open_clip is made to build them is in `shards_spec/open_clip_plugins.py`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import register_model
from timm.models.fastvit import FastVit, fastvit_mci0, fastvit_mci1, fastvit_mci2
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from shards_spec.open_clip_plugins import ModelPlugin, register_models
from training.models.siclip import mci_tiny, siclip_mci0, siclip_tiny
from training.models.text_tower import TextTower

State = dict[str, Tensor]  # a state dict
CONFIGS = Path(__file__).parent / "configs" / "mobileclip"
FUSED = "_fused"  # end of the timm names of image towers in inference form
TOWER = "mct"  # text_cfg's "tower"; the rest of text_cfg is TextTower's
PREPROCESS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "shortest"}
APPLE = "image_encoder.model."  # prefix of the image tower's tensors in Apple's file


def forward_shared(model: nn.Module, pixels: Tensor) -> Tensor:
    """Run the image tower up to its attention blocks: the part that is the same in SiCLIP and its teacher.

    It has 85 % of the tower's multiplications.

    Args:
        model: An open_clip model whose image tower is one of timm's FastViTs.
        pixels: (B, 3, S, S).

    Returns:
        (B, C, S/32, S/32), for `forward_tail`.
    """
    visual: Any = model.visual
    trunk = visual.trunk
    stage = trunk.stages[-1]
    hidden: Tensor = stage.pos_emb(stage.downsample(trunk.stages[:-1](trunk.stem(pixels))))
    return hidden


def forward_tail(model: nn.Module, hidden: Tensor) -> Tensor:
    """Run the rest of the image tower on what `forward_shared` returned.

    Returns:
        The features (B, D), not normalised, that ``model.visual`` gives for the same pixels.
    """
    visual: Any = model.visual
    trunk = visual.trunk
    features: Tensor = visual.head(trunk.forward_head(trunk.final_conv(trunk.stages[-1].blocks(hidden))))
    return features


# Apple's names of tensors -> timm's and ours, as regular expressions that are applied one after the other
IMAGE_NAMES = [
    (r"patch_embed\.", "stem."),
    (r"network\.0\.", "stages.0.blocks."),
    (r"network\.([135])\.proj\.", lambda found: f"stages.{(int(found[1]) + 1) // 2}.downsample.proj."),
    (r"network\.([24])\.", lambda found: f"stages.{int(found[1]) // 2}.blocks."),
    (r"network\.6\.pe\.", "stages.3.pos_emb.pos_enc."),
    (r"network\.7\.", "stages.3.blocks."),
    (r"conv_exp\.", "final_conv."),
    (r"head\.proj$", "head.fc.weight"),
    (r"\.rbr_conv\.", ".conv_kxk."),
    (r"\.rbr_scale\.", ".conv_scale."),
    (r"\.rbr_skip\.", ".identity."),
    (r"\.lkb_origin\.", ".large_conv."),
    (r"\.convffn\.", ".mlp."),
    (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."),
    (r"\.(layer_scale(_\d)?)$", r".\1.gamma"),
]
TEXT_NAMES = [
    (r"^embedding_layer\.", "token_embedding."),
    (r"^positional_embedding\.pos_embed\.pos_embed$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^projection_layer$", "text_projection"),
    (r"^transformer\.0\.", "first."),
    (r"^transformer\.([1-4])\.", lambda found: f"layers.{int(found[1]) - 1}."),
    (r"^transformer\.5\.", "last."),
    (r"\.mixer\.rbr_conv\.0\.(conv|bn)\.", r".\1."),
    (r"\.mixer\.rbr_skip\.", ".skip."),
    (r"\.norm\.rbr_skip\.", ".norm."),
    (r"\.convffn\.conv\.", ".conv."),
    (r"\.convffn\.", ".ffn."),
    (r"\.pre_norm_mha\.0\.", ".norm."),
    (r"\.pre_norm_mha\.1\.qkv_proj\.", ".qkv."),
    (r"\.pre_norm_mha\.1\.out_proj\.", ".proj."),
    (r"\.pre_norm_ffn\.0\.", ".ffn_norm."),
    (r"\.pre_norm_ffn\.1\.", ".ffn.fc1."),
    (r"\.pre_norm_ffn\.4\.", ".ffn.fc2."),
]

# names of tensors in open_clip's MobileCLIP2-S0 -> ours
MOBILECLIP2_NAMES = [
    (r"^transformer\.resblocks\.", "layers."),
    (r"\.ln_1\.", ".norm."),
    (r"\.attn\.in_proj_", ".qkv."),
    (r"\.attn\.out_proj\.", ".proj."),
    (r"\.ln_2\.", ".ffn_norm."),
    (r"\.mlp\.c_fc\.", ".ffn.fc1."),
    (r"\.mlp\.c_proj\.", ".ffn.fc2."),
]


def with_text_tower(model: nn.Module) -> nn.Module:
    """Rebuild the text tower of open_clip's MobileCLIP2-S0 as a `TextTower`, in place; return the model.

    It computes the same numbers, can share the first part of its forward pass, and has the names that SiCLIP2-S0
    inherits by. Its image tower is MobileCLIP-S0's; its text tower has 12 layers and no RepMixer, so experiments with
    it are others than SiCLIP's.
    """
    text: Any = model.text
    blocks = text.transformer.resblocks
    tower = TextTower(
        text.text_projection.shape[1],
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.token_embedding.embedding_dim,
        heads=blocks[0].attn.num_heads,
        layers=len(blocks),
        kernel_size=0,
        share=0,
    )
    tower.load_state_dict({_renamed(name, MOBILECLIP2_NAMES): value for name, value in text.state_dict().items()})
    model.text = tower.train(text.training)
    return model


def our_name(name: str) -> str:
    """Return the name that a tensor of Apple's mobileclip_s0.pt has in our MobileCLIP-S0."""
    if name.startswith(APPLE):
        return "visual.trunk." + _renamed(name.removeprefix(APPLE), IMAGE_NAMES)
    if name.startswith("text_encoder."):
        return "text." + _renamed(name.removeprefix("text_encoder."), TEXT_NAMES)
    return name


def _renamed(name: str, rules: list[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def from_apple(released: State, ours: State) -> State:
    """Convert Apple's MobileCLIP-S0 to the names and shapes of our MobileCLIP-S0.

    All numbers stay: dimensions of size 1 are dropped, the image projection is transposed, the head's bias is 0.

    Args:
        released: Apple's state dict.
        ours: A state dict of our MobileCLIP-S0, for its names and shapes.

    Raises:
        ValueError: Tensors are left over, missing, or of another shape.
    """
    renamed = {our_name(name): value for name, value in released.items()}
    head = "visual.trunk.head.fc.weight"
    bias = "visual.trunk.head.fc.bias"
    if head in renamed and bias in ours:
        renamed |= {head: renamed[head].T, bias: ours[bias].new_zeros(ours[bias].shape)}
    left_over = [name for name in released if our_name(name) not in ours]
    missing = sorted(set(ours) - set(renamed))
    if left_over or missing:
        raise ValueError(
            f"this is no MobileCLIP-S0: {_first_names(left_over)} left over, {_first_names(missing)} missing"
        )
    converted = {}
    for name, value in ours.items():
        if _without_ones(renamed[name]) != _without_ones(value):
            raise ValueError(f"this is no MobileCLIP-S0: {name} has shape {list(renamed[name].shape)}")
        converted[name] = renamed[name].reshape(value.shape)
    return converted


def _without_ones(tensor: Tensor) -> list[int]:
    """The shape without dimensions of size 1."""
    return [size for size in tensor.shape if size != 1]


def _first_names(names: list[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)} tensors ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _build_text_tower(embed_dim: int, fused: bool = False, **config: Any) -> nn.Module:
    """A text tower; ``fused`` is an exported one, whose branches are fused to one convolution each."""
    tower = TextTower(embed_dim, **config)
    return reparameterize_model(tower, inplace=True) if fused else tower


def _register_fused(build: Callable[..., FastVit]) -> None:
    """Make the timm name ``NAME_fused`` known: an exported image tower in inference form."""

    def fused(pretrained: bool = False, **options: Any) -> FastVit:
        return build(pretrained, inference_mode=True, **options)

    fused.__name__ = f"{build.__name__}{FUSED}"
    fused.__module__ = __name__
    register_model(fused)


for _build in (fastvit_mci0, fastvit_mci1, fastvit_mci2, mci_tiny, siclip_mci0, siclip_tiny):
    _register_fused(_build)


def _convert_state_dict(model: nn.Module, state: State) -> State | None:
    """Apple's checkpoint of MobileCLIP-S0 for our text tower; open_clip's own conversion knows S1, S2 and B only."""
    is_apples = any(name.startswith(APPLE) for name in state)
    if not is_apples or not isinstance(getattr(model, "text", None), TextTower):
        return None
    return from_apple(state, model.state_dict())


register_models(
    ModelPlugin(
        configs=CONFIGS,
        tower=TOWER,
        build_text_tower=_build_text_tower,
        convert_state_dict=_convert_state_dict,
        preprocess=PREPROCESS,
        preprocess_also=frozenset({"MobileCLIP2-S0"}),
    )
)
