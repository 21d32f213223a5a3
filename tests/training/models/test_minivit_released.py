"""Checkpoints with the authors' names (microsoft/Cream): every tensor comes where it belongs."""

import pytest
import timm
import torch
from torch import nn

import training.models.minivit  # noqa: F401  registers the names
from shards_spec.files import UserError
from shards_spec.models import load_backbone
from training.models.class_teacher import load_class_teacher
from training.models.minivit_released import rename_released
from training.models.weight_tying import check_tied

pytestmark = pytest.mark.usefixtures("one_thread")


def shaken(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def put(state, name, module):
    """The tensors of a module, or a tensor, under a released name."""
    if not isinstance(module, nn.Module):
        state[name] = module
        return
    for rest, tensor in module.state_dict().items():
        state[f"{name}.{rest}"] = tensor


def released_deit(model):
    """A Mini-DeiT's weights by the names of mini_vision_transformer.py: RepeatedMiniBlock.block, RepeatedModuleList."""
    state = {"pos_embed": model.pos_embed.data}
    for part in ("patch_embed", "norm", "head"):
        put(state, part, getattr(model, part))
    groups = model.blocks.tying.groups
    for index, block in enumerate(model.blocks):
        group, use = groups[index], index - groups.index(groups[index])
        own = f"blocks.{group}.block"
        for norm in ("norm1", "norm2"):
            put(state, f"{own}.{norm}.instances.{use}", getattr(block, norm))
        put(state, f"{own}.attn.conv_l.instances.{use}.weight", block.attn.before.weight.data[..., None, None])
        put(state, f"{own}.attn.conv_w.instances.{use}.weight", block.attn.after.weight.data[..., None, None])
        put(state, f"{own}.attn.rpe_k.instances.{use}.lookup_table_weight", block.attn.positions.table.data[None])
        if use == 0:
            put(state, f"{own}.attn.qkv", block.attn.qkv)
            put(state, f"{own}.attn.proj", block.attn.proj)
            put(state, f"{own}.mlp", block.mlp)
    return state


def released_swin(model):
    """A Mini-Swin's weights by the names of swin_transformer_minivit_distill.py."""
    state = {}
    put(state, "patch_embed", model.patch_embed)
    put(state, "norm", model.norm)
    put(state, "head", model.head.fc)
    for number, stage in enumerate(model.layers):
        if number:
            put(state, f"layers.{number - 1}.downsample", stage.downsample)
        groups = stage.blocks.tying.groups
        for index, block in enumerate(stage.blocks):
            group, use = groups[index], index - groups.index(groups[index])
            own = f"layers.{number}.blocks.{group}"
            put(state, f"{own}.norm1_list.{use}", block.norm1)
            put(state, f"{own}.norm2_list.{use}", block.norm2)
            put(state, f"{own}.proj_l.{use}", block.attn.before)
            put(state, f"{own}.proj_w.{use}", block.attn.after)
            put(state, f"{own}.local_norm_list.{use}", block.local.norm)
            put(state, f"{own}.local_conv_list.{use}", block.local.conv)
            if use == 0:
                put(state, f"{own}.attn.qkv", block.attn.qkv)
                put(state, f"{own}.attn.proj", block.attn.proj)
                put(state, f"{own}.mlp", block.mlp)
                table = "attn.relative_position_bias_table"
                put(state, f"{own}.{table}", block.attn.relative_position_bias_table.data)
                put(state, f"{own}.attn.relative_position_index", block.attn.relative_position_index)
                put(state, f"{own}.attn_mask", torch.zeros(4, 16, 16))
    state["fit_dense_C.0.weight"] = torch.zeros(3, 3)
    return state


CASES = [
    ("mini_deit_test", {"groups": 2}, released_deit),
    ("mini_deit_test", {"groups": 1}, released_deit),
    ("mini_swin_test", {"groups": (1, 2), "mask_always": True}, released_swin),
    ("mini_swin_test", {"groups": (2, 4), "mask_always": True}, released_swin),  # groups of one block
]


@pytest.mark.parametrize(("name", "options", "released"), CASES)
def test_a_released_checkpoint_is_the_model(name, options, released, tmp_path):
    model = shaken(name, **options)
    state = released(model)
    other = timm.create_model(name, num_classes=5, **options).eval()
    expected = model(images())
    assert (other(images()) - expected).abs().max() > 1e-2
    before = dict(state)
    other.load_state_dict(state)
    assert state == before, "the caller's state dict stays as it is"
    assert torch.equal(other(images()), expected)
    check_tied(other)
    torch.save({"model": state}, tmp_path / "model.pth")
    headless = timm.create_model(name, num_classes=0, **options).eval()
    load_backbone(headless, str(tmp_path / "model.pth"))
    torch.testing.assert_close(
        headless(images()), model.forward_head(model.forward_features(images()), pre_logits=True)
    )


def test_names_by_hand():
    deit = {
        "blocks.1.block.norm2.instances.1.bias": torch.zeros(8),
        "blocks.1.block.attn.rpe_k.instances.0.lookup_table_weight": torch.zeros(1, 4, 49),
        "blocks.1.block.attn.conv_w.instances.1.weight": torch.zeros(2, 2, 1, 1),
        "blocks.0.block.attn.qkv.weight": torch.zeros(24, 8),
        "blocks.1.block.mlp.fc2.bias": torch.zeros(8),
        "head.weight": torch.zeros(5, 8),
    }
    rename_released(deit)
    assert {name: list(tensor.shape) for name, tensor in deit.items()} == {
        "blocks.groups": [4],
        "blocks.3.norm2.bias": [8],
        "blocks.2.attn.positions.table": [4, 49],
        "blocks.3.attn.after.weight": [2, 2],
        "blocks.0.attn.qkv.weight": [24, 8],
        "blocks.2.mlp.fc2.bias": [8],
        "head.weight": [5, 8],
    }
    assert deit["blocks.groups"].tolist() == [0, 0, 1, 1]
    swin = dict.fromkeys(
        (
            "trunk.layers.2.blocks.0.norm1_list.5.weight",
            "trunk.layers.2.blocks.0.attn.relative_position_bias_table",
            "trunk.layers.1.downsample.reduction.weight",
            "trunk.head.bias",
            "other.head.bias",
        ),
        torch.zeros(1),
    )
    rename_released(swin, "trunk.")
    assert sorted(swin) == [
        "other.head.bias",
        "trunk.head.fc.bias",
        "trunk.layers.2.blocks.0.attn.relative_position_bias_table",
        "trunk.layers.2.blocks.5.norm1.weight",
        "trunk.layers.2.blocks.groups",
        "trunk.layers.2.downsample.reduction.weight",
    ]


def test_own_names_stay():
    for name in ("mini_deit_test", "mini_swin_test"):
        state = timm.create_model(name).state_dict()
        names = list(state)
        rename_released(state)
        assert list(state) == names


def test_other_groups_are_named():
    state = released_deit(shaken("mini_deit_test", groups=2))
    with pytest.raises(UserError, match=r"tied in groups \[2, 2\].*in groups \[4\]: build the model with the groups"):
        timm.create_model("mini_deit_test", num_classes=5, groups=1).load_state_dict(state)


def test_the_mask_of_the_released_swins_matters():
    model = shaken("mini_swin_test", mask_always=True)
    other = timm.create_model("mini_swin_test", num_classes=5).eval()
    other.load_state_dict(released_swin(model))
    assert (other(images()) - model(images())).abs().max() > 1e-4


def test_a_released_checkpoint_teaches(tmp_path):
    model = shaken("mini_deit_test")
    torch.save({"model": released_deit(model), "epoch": 299}, tmp_path / "model.pth")
    teacher = load_class_teacher("timm:mini_deit_test", str(tmp_path / "model.pth"), list("abcde"), 0)
    assert torch.equal(teacher.frozen.model(images()), model(images()))
