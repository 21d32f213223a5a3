"""Tied blocks of timm's ViT and Swin and of open_clip's towers: identity, state dicts, surgery, and untying."""

import copy
import pickle

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shards_spec.files import UserError
from training.engine.ema import ModelEma
from training.models.weight_tying import (
    UntiedError,
    check_tied,
    group_map,
    part_of,
    tie,
    tied_blocks,
    tying_of,
    untie,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = ("attn.qkv", "attn.proj", "mlp")


def vit(seed=0, depth=4):
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=depth, num_classes=5
    ).eval()


def tied_vit(groups=2, source="first", shared=SHARED):
    model = vit()
    tie(model.blocks, group_map(4, groups), shared, source)
    return model


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("depth", "groups", "expected"),
    [(4, 2, (0, 0, 1, 1)), (3, 3, (0, 1, 2)), (3, 1, (0, 0, 0)), (5, (2, 2, 1), (0, 0, 1, 1, 2))],
)
def test_maps_of_groups(depth, groups, expected):
    assert group_map(depth, groups) == expected


@pytest.mark.parametrize("groups", [0, 3, 5, (2, 1), (4, 0), (2, 2, 1), (5, -1)])
def test_groups_that_do_not_fit(groups):
    with pytest.raises(ValueError, match="groups"):
        group_map(4, groups)


# fact 2
def test_a_group_shares_objects_and_nothing_else():
    model = tied_vit()
    for name in SHARED:
        parts = [part_of(block, name) for block in model.blocks]
        assert parts[0] is parts[1]
        assert parts[2] is parts[3]
        assert parts[1] is not parts[2]
    for name in ("norm1", "norm2", "attn"):
        assert len({id(part_of(block, name)) for block in model.blocks}) == 4
    assert count(vit()) - count(model) == 2 * (12 * 32**2 + 9 * 32)
    names = [name for name, _ in model.named_parameters()]
    assert "blocks.1.attn.qkv.weight" not in names
    assert "blocks.1.norm1.weight" in names


# fact 4
def test_a_shared_weight_changes_its_group_and_a_norm_one_block():
    tokens = torch.randn(2, 16, 32)
    model = tied_vit()

    def outputs():
        return [block(tokens).detach() for block in model.blocks]

    before = outputs()
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight.add_(1)
    changed = [not torch.equal(one, other) for one, other in zip(before, outputs(), strict=True)]
    assert changed == [False, False, True, True]
    before = outputs()
    with torch.no_grad():
        model.blocks[1].norm1.bias.add_(1)
    changed = [not torch.equal(one, other) for one, other in zip(before, outputs(), strict=True)]
    assert changed == [False, True, False, False]


# fact 5
def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_uses():
    model = tied_vit().double()
    apart = copy.deepcopy(model)
    untie(apart.blocks)
    for each in (model, apart):
        each(images().double()).square().sum().backward()
    for name in ("attn.qkv.weight", "mlp.fc2.bias"):
        uses = [block.get_parameter(name).grad for block in apart.blocks]
        assert torch.allclose(model.blocks[0].get_parameter(name).grad, uses[0] + uses[1], rtol=1e-10)
        assert torch.allclose(model.blocks[3].get_parameter(name).grad, uses[2] + uses[3], rtol=1e-10)


# fact 6
def test_an_untied_copy_is_equal_until_it_is_trained():
    model = tied_vit()
    apart = copy.deepcopy(model)
    untie(apart.blocks)
    assert tying_of(apart.blocks) is None
    assert apart.state_dict().keys() == vit().state_dict().keys()
    assert torch.equal(apart(images()), model(images()))
    for each in (model, apart):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(images()).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(apart(images()), model(images()), atol=1e-4)
    with pytest.raises(ValueError, match=r"other weights in attn\.qkv.weight"):
        tie(apart.blocks, group_map(4, 2), SHARED)


def test_tying_what_is_equal_is_the_inverse_of_untying():
    model = tied_vit()
    before = model.state_dict()
    untie(model.blocks)
    tie(model.blocks, group_map(4, 2), SHARED)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("source", "share"), [("first", (1, 0)), ("last", (0, 1)), ("mean", (0.5, 0.5))])
def test_whose_weights_a_group_takes(source, share):
    model, tied = vit(), tied_vit(source=source)
    for name in ("attn.qkv.weight", "mlp.fc1.bias"):
        first, last = (model.blocks[index].get_parameter(name) for index in (2, 3))
        assert torch.allclose(tied.blocks[3].get_parameter(name), share[0] * first + share[1] * last, atol=1e-7)
    assert torch.equal(tied.blocks[3].norm1.weight, model.blocks[3].norm1.weight)


def test_a_state_dict_has_each_tensor_once_and_the_map():
    model = tied_vit()
    state = model.state_dict()
    assert "blocks.1.attn.qkv.weight" not in state
    assert state["blocks.groups"].tolist() == [0, 0, 1, 1]
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert sum(tensor.numel() for tensor in state.values()) == count(model) + 4


def test_safetensors_holds_a_tied_model(tmp_path):
    model, other = tied_vit(), tied_vit()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    check_tied(other)
    assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("shared", [SHARED, ("attn.qkv.weight", "mlp.fc1.bias")])
def test_loading_keeps_the_ties(assign, shared):
    model, other = tied_vit(shared=shared), tied_vit(shared=shared)
    with torch.no_grad():
        model.blocks[2].get_parameter("attn.qkv.weight").add_(1)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    check_tied(other)
    assert part_of(other.blocks[2], shared[0]) is part_of(other.blocks[3], shared[0])
    assert torch.equal(other(images()), model(images()))


def test_weights_of_another_grouping_and_untied_ones():
    model = tied_vit()
    with pytest.raises(UserError, match=r"tied in groups \[4\], the model's blocks blocks are tied in groups \[2, 2\]"):
        model.load_state_dict(tied_vit(1).state_dict())
    with pytest.raises(UserError, match=r"untied: blocks.1.attn.qkv.weight and blocks.0.attn.qkv.weight differ"):
        model.load_state_dict(vit().state_dict())
    apart = tied_vit()
    untie(apart.blocks)
    model.load_state_dict(apart.state_dict())  # untied, and equal in each group
    assert torch.equal(model(images()), apart(images()))


def test_missing_and_left_over_weights_are_named():
    state = dict(tied_vit().state_dict())
    del state["blocks.2.attn.qkv.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks.2.attn.qkv.weight"):
        tied_vit().load_state_dict(state)


def test_copies_and_averages_keep_the_ties():
    model = tied_vit()
    twin = copy.deepcopy(model)
    check_tied(twin)
    assert twin.blocks[1].mlp is twin.blocks[0].mlp
    assert twin.blocks[1].mlp is not model.blocks[1].mlp
    assert twin.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():  # the copy's hooks look at the copy
        twin.blocks[0].mlp.fc1.weight.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    average = ModelEma(model, 0.5)
    assert "blocks.1.mlp.fc1.weight" not in average.weights
    start = model.blocks[0].mlp.fc1.weight.detach().clone()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(2)
    average.update(model)
    with average.swap_in(model):
        check_tied(model)
        assert torch.allclose(model.blocks[1].mlp.fc1.weight, start + 1, atol=1e-6)
    assert torch.allclose(model.blocks[1].mlp.fc1.weight, start + 2, atol=1e-6)
    pickled = pickle.loads(pickle.dumps(model))
    check_tied(pickled)
    assert pickled.state_dict().keys() == model.state_dict().keys()
    assert model.half().blocks[1].mlp.fc1.weight is model.blocks[0].mlp.fc1.weight


def prune(block):
    block.mlp = nn.Identity()


def quantise(block):
    block.attn.qkv = nn.Linear(32, 96)


def replace_attention(block):
    block.attn = nn.MultiheadAttention(32, 2)


@pytest.mark.parametrize("surgery", [prune, quantise, replace_attention])
@pytest.mark.parametrize("index", [2, 3])
def test_surgery_on_one_block_is_found(surgery, index):
    model = tied_vit()
    average, state = ModelEma(model, 0.5), model.state_dict()
    surgery(model.blocks[index])
    message = r"block 3 no longer shares (attn\.qkv|mlp) with block 2"
    for use in (model.state_dict, lambda: model.load_state_dict(state), lambda: average.update(model)):
        with pytest.raises(UntiedError, match=message):
            use()
    with pytest.raises(UntiedError, match=message):
        check_tied(copy.deepcopy(model))
    with pytest.raises(UntiedError, match=message):
        untie(model.blocks)


def test_what_cannot_be_tied_is_named():
    model = vit()
    with pytest.raises(ValueError, match=r"has no attn\.kqv"):
        tie(model.blocks, group_map(4, 2), ("attn.kqv",), "first")
    with pytest.raises(ValueError, match="neither a module nor a parameter"):
        tie(model.blocks, group_map(4, 2), ("attn.scale",), "first")
    for shared in (("attn", "attn.qkv"), ("mlp.fc1", "mlp.fc1")):
        with pytest.raises(ValueError, match=f"{shared[1]} is in it twice, or within another part"):
            tie(model.blocks, group_map(4, 2), shared, "first")
    for groups in ((0, 1, 0, 1), (1, 1, 2, 2), (0, 0, 1), (0, 0, 2, 2)):
        with pytest.raises(ValueError, match="ascending from 0"):
            tie(model.blocks, groups, SHARED, "first")
    model.blocks[1].mlp.fc1 = nn.Linear(32, 64)
    with pytest.raises(ValueError, match=r"blocks 0 and 1 cannot share mlp.fc1.weight: their shapes differ"):
        tie(model.blocks, group_map(4, 2), SHARED, "first")
    with pytest.raises(ValueError, match="tied already"):
        tie(tied_vit().blocks, group_map(4, 2), SHARED)


def test_swin_and_both_towers_of_a_clip():
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 4), num_heads=(2, 4)
    ).eval()
    for stage in swin.layers:
        tie(stage.blocks, group_map(len(stage.blocks), 1), (*SHARED, "attn.relative_position_bias_table"), "mean")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 4}
    clip = open_clip.CLIP(16, vision, text).eval()
    tie(clip.visual.transformer.resblocks, (0, 0), ("attn", "mlp"), "first")
    tie(clip.transformer.resblocks, (0, 0, 0, 1), ("attn.in_proj_weight", "mlp"), "last")
    assert list(tied_blocks(clip)) == ["visual.transformer.resblocks", "transformer.resblocks"]
    tokens = torch.randint(1, 64, (3, 8))
    for model, inputs in ((swin, (images(),)), (clip, (images(), tokens))):
        before = count(model)
        apart = copy.deepcopy(model)
        for blocks in tied_blocks(apart).values():
            untie(blocks)
        assert before < count(apart)
        one, other = model(*inputs), apart(*inputs)
        same = zip(
            one if isinstance(one, tuple) else [one], other if isinstance(other, tuple) else [other], strict=True
        )
        assert all(torch.equal(a, b) for a, b in same)
        model.load_state_dict(model.state_dict())
        apart.load_state_dict(apart.state_dict())
        check_tied(model)
        model.train()
        result = model(*inputs)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
