"""Released students with learned sizes: read by their shapes, under the authors' names, wherever a model is named."""

import json

import open_clip
import pytest
import torch
from small_pruned import features, largest_difference, masked_clip, pruned_clip

from shards_spec.files import UserError
from shards_spec.models import load_model
from training.losses.sparsity import TowerSize
from training.models.tinyclip_auto import CONFIGS, VIT_B, from_learned_sizes
from training.models.tinyclip_convert import from_open_clip
from training.models.tinyclip_pruned import PrunedImageTower
from training.models.tinyclip_pruning import materialise

SMALL = (TowerSize(48, 6, 192, 3), TowerSize(32, 4, 128, 3))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def cut_clip():
    """A cut model in fp16's numbers without the constant that the released code loses, and its config."""
    model, config = masked_clip()
    materialise(model, config)
    for tower in (model.visual, model.text):
        tower.transformer.resblocks[1].attn.out_proj.bias.zero_()
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    return model, config


def released(model, names="authors"):
    """A cut model's state dict as the released code writes it: no attention where no head is left, fp16."""
    state = {name: value.half() for name, value in model.state_dict().items() if "resblocks.1.attn" not in name}
    for prefix, tower in (("visual.", model.visual), ("text.", model.text)):
        block = f"{prefix}transformer.resblocks.2."
        width = tower.description["width"]
        state[block + "mlp.c_fc.weight"] = torch.zeros(0, width).half()
        state[block + "mlp.c_fc.bias"] = torch.zeros(0).half()
        state[block + "mlp.c_proj.weight"] = torch.zeros(width, 0).half()
        state[block + "ln_2.weight"] = state[block + "ln_2.bias"] = torch.ones(width).half()
    if names == "open_clip":
        return {name.removeprefix("text."): value for name, value in state.items()}
    if names == "authors":
        return {authors_name(name): value for name, value in state.items()}
    return state


def authors_name(name):
    if name == "logit_scale":
        return "module._logit_scale.module.logit_scale"
    if name.startswith("visual."):
        return f"module._image_encoder.module.{name}"
    return f"module.text_encoder_without_ddp.{name.removeprefix('text.')}"


@pytest.mark.parametrize("names", ["authors", "open_clip", "ours"])
def test_a_released_checkpoint_is_read_by_its_shapes(names):
    model, config = cut_clip()
    loaded, read = from_learned_sizes(released(model, names), original=SMALL)
    assert largest_difference(features(loaded), features(model)) == 0
    assert {key: read[key] for key in ("embed_dim", "quick_gelu")} == {"embed_dim": 16, "quick_gelu": False}
    assert read["vision_cfg"] == config["vision_cfg"]
    assert read["text_cfg"] == config["text_cfg"]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert from_learned_sizes(released(model, names), original=SMALL, quick_gelu=True)[0].visual.quick_gelu


def test_a_checkpoint_that_is_none_is_refused():
    state = released(cut_clip()[0], "ours")
    del state["visual.transformer.resblocks.0.mlp.c_proj.bias"]
    with pytest.raises(UserError, match=r"no checkpoint of a pruned CLIP: .*resblocks.0.mlp.c_proj.bias"):
        from_learned_sizes(state, original=SMALL)
    with pytest.raises(UserError, match=r"no checkpoint of a pruned CLIP: .*visual.conv1.weight"):
        from_learned_sizes({"logit_scale": torch.ones(())})
    masked = {"_image_encoder.l0_module.hidden_loga": torch.ones(3), "_text_encoder.ln_final.weight": torch.ones(3)}
    with pytest.raises(UserError, match="a mask that was not yet applied"):
        from_learned_sizes(masked)


def folder_of(path, state, **options):
    """An open_clip folder that describes the whole model and has these weights."""
    path.mkdir()
    torch.save(state, path / "open_clip_pytorch_model.bin")
    config = pruned_clip(**options)[1]
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{path}"


def test_a_released_file_gives_a_model_its_sizes(tmp_path):
    """The description is of the whole model, the loaded one and its config are as the file."""
    model, config = cut_clip()
    content = {"epoch": 6, "state_dict": released(model), "optimizer": {"state": {}}}
    loaded = load_model(folder_of(tmp_path / "authors", content))
    assert largest_difference(features(loaded.model), features(model)) == 0
    assert loaded.config == config
    assert loaded.model.visual.image_mean == loaded.mean
    again, _ = from_open_clip(loaded.model, loaded.config)
    assert largest_difference(features(again), features(model)) == 0


def test_a_file_under_our_names_must_have_the_sizes_of_its_description(tmp_path):
    with pytest.raises(UserError, match="width changed"):
        load_model(folder_of(tmp_path / "ours", released(cut_clip()[0], "ours")))


def test_a_released_file_of_another_model_is_refused(tmp_path):
    state = released(cut_clip()[0])
    state["module._image_encoder.visual.proj"] = torch.zeros(48, 17)
    del state["module._image_encoder.module.visual.proj"]
    with pytest.raises(UserError, match=r"does not fit .*proj is \[48, 17\], the model's \[33, 16\]"):
        load_model(folder_of(tmp_path / "other", state))


def test_the_names_stand_for_the_whole_vit_b_32():
    for path in CONFIGS.glob("*.json"):
        config = open_clip.get_model_config(path.stem)
        with torch.device("meta"):
            model = open_clip.model.CustomTextCLIP(**{key: config[key] for key in config if key != "custom_text"})
        assert sum(parameter.numel() for parameter in model.parameters()) == 151_277_313
        assert (model.visual.original, model.text.original) == VIT_B
        assert isinstance(model.visual, PrunedImageTower)
    assert len(list(CONFIGS.glob("*.json"))) == 3
