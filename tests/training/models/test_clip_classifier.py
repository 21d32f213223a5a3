"""Image towers of open_clip's as classifiers: their features, other sides, gradients, what is refused."""

import json
import tomllib
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from small_pruned import inputs, masked_clip, plain_clip, shake
from torch import nn

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.models.clip_classifier import classifier_of_clip
from training.models.clip_image_tower import NAME, ClipImageTower
from training.models.tinyclip_convert import from_open_clip
from training.models.tinyclip_pruning import materialise

pytestmark = pytest.mark.usefixtures("one_thread")
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64, "patch_size": None}
TOWERS = {  # the image tower's description, the model's options, and whether timm has it
    "plain": ({}, {}, True),
    "QuickGELU": ({}, {"quick_gelu": True}, True),
    "eps": ({"norm_kwargs": {"eps": 1e-2}}, {"quick_gelu": True}, False),
    "mean": ({"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}, {}, False),
    "attention": ({"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}, {}, False),
    "scales": ({"ls_init_value": 0.5, "patch_dropout": 0.5}, {}, False),
    "ResNet": (RESNET, {}, False),
}


def as_loaded(model: nn.Module, config: dict) -> LoadedModel:
    side = model.visual.image_size
    side = side if isinstance(side, int) else side[0]
    return LoadedModel(model.eval(), None, config, side, (0.5,) * 3, (0.25,) * 3)


def small(vision: dict, **options) -> LoadedModel:
    model, config = plain_clip(vision, **options)
    return as_loaded(model, config)


def projected(visual: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """What the CLIP makes of the features that the head sees."""
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return visual.attnpool.c_proj(features)
    return features @ visual.proj


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_the_features_are_those_of_the_clip(name):
    """The projection of what the head sees is what encode_image gives: QuickGELU and the norms' eps are kept."""
    vision, options, is_timms = TOWERS[name]
    loaded = small(vision, **options)
    classifier = classifier_of_clip(loaded, name)
    assert isinstance(classifier.model.trunk, timm.models.vision_transformer.VisionTransformer) == is_timms
    images = torch.randn(2, 3, loaded.image_size, loaded.image_size)
    features = classifier.model.encode_image(images)
    wanted = loaded.model.visual(images)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(projected(loaded.model.visual, features), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier.model(images), classifier.model.head(features))


@torch.no_grad()
def test_a_student_with_masks_is_cut():
    model, config = masked_clip()
    cut, cut_config = masked_clip()
    materialise(cut, cut_config)
    classifier = classifier_of_clip(as_loaded(model, config), "masked")
    features = classifier.model.encode_image(inputs()[0])
    torch.testing.assert_close(features @ cut.visual.proj, cut.visual(inputs()[0]), rtol=1e-5, atol=1e-5)
    heads = [block.attn.num_heads for block in classifier.model.trunk.tower.transformer.resblocks]
    assert heads == cut_config["vision_cfg"]["heads"]
    assert heads[1] == 0


def test_positions_of_other_sides():
    """The same tower with positions of timm's, and of its own: other sides agree, and positions are trained there."""
    model, config = plain_clip()
    as_timms = classifier_of_clip(as_loaded(model, config), "plain").model
    pruned, described = from_open_clip(model, config)
    own = classifier_of_clip(as_loaded(pruned, described), "pruned").model
    assert isinstance(own.trunk, ClipImageTower)
    for side in (24, 32, 48):
        images = torch.randn(2, 3, side, side)
        torch.testing.assert_close(own.encode_image(images), as_timms.encode_image(images), rtol=1e-5, atol=1e-5)
    positions = own.trunk.tower.positional_embedding
    plain = own.encode_image(images)
    plain.square().sum().backward()
    gradient = positions.grad.clone()
    assert gradient.abs().min() > 0
    own.zero_grad()
    own.set_grad_checkpointing()
    own.encode_image(images).square().sum().backward()
    torch.testing.assert_close(positions.grad, gradient)


def test_a_resnet_of_other_sides():
    model = classifier_of_clip(small(RESNET), "resnet").model
    shake(model)
    assert {tuple(model.encode_image(torch.randn(2, 3, side, side)).shape) for side in (32, 64, 96)} == {(2, 256)}
    model.encode_image(torch.randn(2, 3, 96, 96)).sum().backward()
    assert model.trunk.tower.attnpool.positional_embedding.grad.abs().sum() > 0


def test_timm_rebuilds_it_from_its_options():
    classifier = classifier_of_clip(small({"ls_init_value": 0.5}, quick_gelu=True), "scales").model
    options = json.loads(json.dumps(classifier.options))
    again = timm.create_model("clip_image_tower", num_classes=1, **options)
    again.load_state_dict(classifier.trunk.state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again.eval()(images), classifier(images))
    fixed = timm.create_model("clip_image_tower", num_classes=0, dynamic_img_size=False, **options).eval()
    assert fixed(images).shape == (1, 48)
    with pytest.raises(ValueError, match="dynamic_img_size is off"):
        fixed(torch.zeros(1, 3, 64, 64))


def test_other_stages_know_it_by_its_entry_point():
    """`cache --soft-labels` loads an export by timm, without this package's recipes."""
    described = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    points = described["project"]["entry-points"]["clipmill.models"]
    assert timm.models.model_entrypoint(NAME).__module__ == points[NAME]


def test_what_is_refused():
    with pytest.raises(UserError, match=r"--model 'all': its image tower does not serve .* in place of one feature"):
        classifier_of_clip(small({"pool_type": "none"}), "all")
    with pytest.raises(UserError, match="name the CLIP's RUN or local-dir:PATH"):
        timm.create_model("clip_image_tower")
