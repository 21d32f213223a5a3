"""MiniViT's models: the sheet's counts, equality with timm's ViT and Swin, head maps, masks, iRPE, convolution."""

import copy

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import training.models.minivit  # noqa: F401  registers the names
from training.models.minivit_parts import (
    ContextualPositions,
    DepthwiseTokens,
    HeadMap,
    LocalTransform,
    MappedAttention,
    mapped_attention,
    piecewise_index,
    position_buckets,
)
from training.models.weight_tying import check_tied, tied_blocks, untie

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {  # parameters, billions of multiplications
    "mini_deit_tiny_patch16_224": (3_090_304, 1.277),
    "mini_deit_small_patch16_224": (11_450_824, 4.651),
    "mini_deit_base_patch16_224": (44_098_408, 17.69),
    "mini_deit_base_patch16_384": (44_390_248, 56.78),
    "mini_swin_tiny_patch4_window7_224": (12_001_765, 4.594),
    "mini_swin_small_patch4_window7_224": (26_463_205, 8.922),
    "mini_swin_base_patch4_window7_224": (46_444_852, 15.70),
    "mini_swin_base_patch4_window12_384": (46_512_532, 48.55),
}
OTHER_GROUPS = [  # millions of parameters, to the digits published
    ("mini_deit_base_patch16_224", 4, 29.93),
    ("mini_deit_base_patch16_224", 3, 22.84),
    ("mini_deit_base_patch16_224", 2, 15.76),
    ("mini_deit_base_patch16_224", 1, 8.67),
    ("mini_deit_small_patch16_224", 1, 2.59),
    ("mini_deit_tiny_patch16_224", 1, 0.87),
    ("mini_swin_tiny_patch4_window7_224", (1, 1, 3, 1), 15.55),
    ("mini_swin_base_patch4_window7_224", (1, 1, 1, 1), 21.22),
]


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


def made(name, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **options).eval()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def shaken(model, seed=0):
    """The model with nothing left at 0 or 1, but its head maps."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".before." not in name and ".after." not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def images(side=32, number=2):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1))


# fact 1
@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiplications(name):
    model = on_meta(name)
    parameters, multiplications = SIZES[name]
    assert count(model) == parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiplications, rel=0.001)


# fact 1
@pytest.mark.parametrize(("name", "groups", "millions"), OTHER_GROUPS)
def test_parameters_of_other_groups(name, groups, millions):
    assert count(on_meta(name, groups=groups)) / 1e6 == pytest.approx(millions, abs=0.005)


# fact 1
@pytest.mark.parametrize(
    ("dim", "heads", "depth", "groups"), [(32, 2, 4, 2), (48, 3, 6, 3), (64, 8, 5, 1), (40, 5, 3, 3)]
)
def test_the_closed_form_of_mini_deit(dim, heads, depth, groups):
    model = on_meta("mini_deit_test", embed_dim=dim, num_heads=heads, depth=depth, groups=groups, num_classes=1000)
    patch = 8 * 8 * 3 + 1
    expected = groups * (12 * dim**2 + 9 * dim) + depth * (4 * dim + 2 * heads**2 + 49 * dim // heads)
    assert count(model) == expected + patch * dim + 16 * dim + 2 * dim + 1000 * dim + 1000


# fact 1
@pytest.mark.parametrize(
    ("dim", "heads", "window", "groups"), [(16, 2, 4, (1, 2)), (24, 3, 2, (2, 1)), (32, 4, 4, (2, 4))]
)
def test_the_closed_form_of_mini_swin(dim, heads, window, groups):
    model = on_meta(
        "mini_swin_test", embed_dim=dim, num_heads=(heads, 2 * heads), window_size=window, groups=groups, num_classes=7
    )
    expected = 16 * 3 * dim + dim + 2 * dim  # patch embedding and its norm
    expected += 2 * 4 * dim + 4 * dim * 2 * dim  # merging
    expected += 2 * 2 * dim + 7 * 2 * dim + 7  # last norm and head
    for stage, depth in enumerate((2, 4)):
        width, maps = dim * 2**stage, heads * 2**stage
        expected += groups[stage] * (12 * width**2 + 9 * width + (2 * window - 1) ** 2 * maps)
        expected += depth * (4 * width + 2 * (maps**2 + maps) + 2 * width + 50 * width)
    assert count(model) == expected


# fact 2
@pytest.mark.parametrize("name", ["mini_deit_test", "mini_swin_test"])
def test_what_blocks_share_and_what_they_do_not(name):
    model = made(name)
    check_tied(model)
    own = ["norm1", "norm2", "attn.before", "attn.after"]
    own += ["attn.positions.table"] if name == "mini_deit_test" else ["local.norm", "local.conv"]
    for blocks in tied_blocks(model).values():
        for index in range(0, len(blocks), 2):
            one, other = blocks[index], blocks[index + 1]
            assert one.attn.qkv is other.attn.qkv
            assert one.attn.proj is other.attn.proj
            assert one.mlp is other.mlp
            if name == "mini_swin_test":
                assert one.attn.relative_position_bias_table is other.attn.relative_position_bias_table
        assert len({id(block.mlp) for block in blocks}) == len(blocks) // 2
        for part in own:
            parts = [getattr(block.get_submodule(part.rpartition(".")[0]), part.rpartition(".")[2]) for block in blocks]
            assert len({id(each) for each in parts}) == len(blocks), part
    assert len({tensor.data_ptr() for tensor in model.state_dict().values()}) == len(model.state_dict())


def test_drop_path_follows_the_block_and_not_its_group():
    model = made("mini_deit_test", drop_path_rate=0.3)
    assert [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    model = made("mini_swin_test", drop_path_rate=0.5)
    rates = [getattr(block.drop_path2, "drop_prob", 0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def ordinary_vit(model):
    """timm's ViT with the weights of a Mini-DeiT, copied block by block."""
    ordinary = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=4,
        num_heads=2,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    ).eval()
    weights = _untied_weights(model)
    ordinary.load_state_dict({name: weights[name] for name in ordinary.state_dict()})
    return ordinary


def ordinary_swin(model):
    ordinary = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 4), num_heads=(2, 4)
    ).eval()
    weights = _untied_weights(model)
    ordinary.load_state_dict({name: weights[name] for name in ordinary.state_dict()})
    return ordinary


def _untied_weights(model):
    apart = copy.deepcopy(model)
    for blocks in tied_blocks(apart).values():
        untie(blocks)
    return apart.state_dict()


# fact 3
def test_identity_maps_are_the_ordinary_vit():
    model = made("mini_deit_test", head_maps="identity")
    table = [block.attn.positions.table for block in model.blocks]
    shaken(model)
    assert all(each.abs().max() > 0 for each in table)
    assert (ordinary_vit(model)(images()) - model(images())).abs().max() > 1e-4
    for each in table:
        nn.init.zeros_(each)
    assert (ordinary_vit(model)(images()) - model(images())).abs().max() < 1e-6
    none = made("mini_deit_test", head_maps="none", irpe=False)
    none.load_state_dict({name: model.state_dict()[name] for name in none.state_dict()})
    assert (none(images()) - model(images())).abs().max() < 1e-6


# fact 3
@pytest.mark.parametrize("local", ["none", "residual"])
def test_identity_maps_are_the_ordinary_swin(local):
    model = shaken(made("mini_swin_test", head_maps="identity", local=local))
    for stage in model.layers:
        for block in stage.blocks if local == "residual" else []:
            nn.init.zeros_(block.local.conv.weight)
            nn.init.zeros_(block.local.conv.bias)
    ordinary = ordinary_swin(model)
    assert ordinary.layers[0].blocks[1].shift_size == (2, 2)  # 8 x 8 patches, windows of 4
    assert torch.equal(ordinary(images()), model(images()))
    always = made("mini_swin_test", head_maps="identity", local=local, mask_always=True)
    always.load_state_dict(model.state_dict())
    assert always.layers[0].blocks[0].attn_mask is not None
    assert always.layers[1].blocks[0].attn_mask is None  # one window
    assert (always(images()) - model(images())).abs().max() > 1e-3


def test_a_norm_in_the_stream_is_no_identity():
    model = made("mini_swin_test", head_maps="identity")
    for stage in model.layers:
        for block in stage.blocks:
            nn.init.zeros_(block.local.conv.weight)
            nn.init.zeros_(block.local.conv.bias)
    assert (ordinary_swin(model)(images()) - model(images())).abs().max() > 1e-3


def test_random_head_maps_make_attention_almost_silent():
    ratios = []
    for kind in ("random", "identity"):
        model = made("mini_deit_small_patch16_224", depth=1, groups=1, head_maps=kind, num_classes=0)
        tokens = torch.randn(2, 196, 384, generator=torch.Generator().manual_seed(0))
        ratios.append(model.blocks[0].attn(tokens).norm().item())
    assert 0.02 < ratios[0] / ratios[1] < 0.08


def random_logits(heads=2, tokens=5, batch=3):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, heads, tokens, tokens, generator=draw, dtype=torch.float64)
    return logits, torch.randn(batch, heads, tokens, 4, generator=draw, dtype=torch.float64)


def map_of(rows, bias=None):
    made_map = HeadMap(len(rows), bias=bias is not None, identity=True).double()
    with torch.no_grad():
        made_map.weight.copy_(torch.tensor(rows))
        if bias is not None:
            made_map.bias.copy_(torch.tensor(bias))
    return made_map


def attend(logits, value, before, after, mask=None):
    return mapped_attention(logits, value, before=before, after=after, drop=nn.Identity(), mask=mask)


def plain(logits, value, value_heads=None):
    """Ordinary attention, head by head."""
    out = logits.softmax(-1) @ (value if value_heads is None else value[:, value_heads])
    return out.transpose(1, 2).flatten(2)


def test_head_maps_are_their_formula():
    logits, value = random_logits(3)
    before, after = torch.randn(3, 3).double(), torch.randn(3, 3).double()
    mixed = torch.einsum("nm,bmij->bnij", before, logits) + torch.tensor([1.0, 2, 3]).double().view(3, 1, 1)
    expected = torch.einsum("kn,bnij,bkjd->bikd", after, mixed.softmax(-1), value).flatten(2)
    found = attend(logits, value, map_of(before.tolist(), [1.0, 2.0, 3.0]), map_of(after.tolist()))
    assert torch.allclose(found, expected, atol=1e-12)


# fact 7
def test_zero_maps_and_a_permutation():
    logits, value = random_logits(3)
    one, zero = map_of([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), map_of([[0.0] * 3] * 3)
    uniform = value.mean(2, keepdim=True).expand_as(value).transpose(1, 2).flatten(2)
    assert torch.allclose(attend(logits, value, zero, one), uniform, atol=1e-12)
    mask = torch.zeros(1, 5, 5).double()
    mask[..., 3:] = -100
    allowed = value[:, :, :3].mean(2, keepdim=True).expand_as(value).transpose(1, 2).flatten(2)
    assert torch.allclose(attend(logits, value, zero, one, mask), allowed, atol=1e-12)
    assert attend(logits, value, one, zero).abs().max() == 0
    cyclic = map_of([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert (attend(logits, value, one, cyclic) - plain(logits, value)).abs().max() > 0.1


# fact 7
def test_a_zero_map_after_the_softmax_leaves_the_bias_of_the_projection():
    model = shaken(made("mini_deit_test"))
    attention = model.blocks[0].attn
    nn.init.zeros_(attention.after.weight)
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(attention(tokens), attention.proj.bias.expand(2, 16, 32))


# fact 18
def test_swapping_two_heads():
    logits, value = random_logits(2)
    one, swap = map_of([[1.0, 0], [0, 1]]), map_of([[0.0, 1], [1, 0]])
    others = plain(logits.flip(1), value)
    assert torch.allclose(attend(logits, value, swap, one), others, atol=1e-12)
    assert torch.allclose(attend(logits, value, swap, swap), plain(logits, value), atol=1e-12)
    assert (others - plain(logits, value)).abs().max() > 0.1


# fact 8
def test_no_probability_leaks_across_the_regions_of_a_shifted_window():
    model = shaken(made("mini_swin_test"))
    block = model.layers[0].blocks[1]
    with torch.no_grad():
        for head_map in (block.attn.before, block.attn.after):
            head_map.weight.add_(torch.randn(2, 2))
            head_map.bias.zero_()
    kept = []
    block.attn.after.register_forward_hook(lambda _, inputs, output: kept.extend([*inputs, output]))
    model(images())
    probabilities, mapped = kept
    masked = (block.attn_mask != 0).repeat(2, 1, 1).unsqueeze(1).expand_as(probabilities)
    assert masked.any()
    assert probabilities[masked].max() < 1e-30
    assert mapped[masked].abs().max() < 1e-30
    assert mapped[~masked].abs().max() > 1e-3


# fact 9
def test_the_index_of_relative_positions():
    assert piecewise_index(torch.arange(6)).tolist() == [0, 1, 2, 2, 3, 3]
    offsets = torch.arange(-30, 31)
    assert torch.equal(piecewise_index(offsets), -piecewise_index(-offsets))
    assert piecewise_index(offsets).abs().max() == 3
    buckets = position_buckets(14, 14)
    assert buckets.shape == (196, 196)
    assert len(buckets.unique()) == 49
    assert buckets[0, 0] == 24
    assert buckets[14, 0] == 31  # a row below its key: g(1) = 1
    assert buckets[1, 0] == 25


# fact 9
def test_positions_are_the_sum_of_the_sheet_and_learn_from_zero():
    positions = ContextualPositions(4, (3, 5))
    query = torch.randn(2, 3, 15, 4, requires_grad=True)
    positions(query).square().sum().backward()
    assert positions.table.grad.abs().max() == 0  # a square has no gradient at 0
    (positions(query) * torch.randn(2, 3, 15, 15)).sum().backward()
    assert positions.table.grad.abs().max() > 0
    with torch.no_grad():
        positions.table.normal_()
    added = positions(query)
    for i, j in ((0, 0), (2, 13), (14, 1), (7, 8)):
        row, column = i // 5 - j // 5, i % 5 - j % 5
        bucket = int((piecewise_index(torch.tensor(row)) + 3) * 7 + piecewise_index(torch.tensor(column)) + 3)
        assert torch.allclose(added[..., i, j], query[..., i, :] @ positions.table[:, bucket], atol=1e-6)
    assert positions(torch.randn(1, 1, 16, 4)).shape == (1, 1, 16, 16)  # another grid, square
    with pytest.raises(ValueError, match="17 patches"):
        positions(torch.randn(1, 1, 17, 4))


def test_a_grid_of_another_size_has_its_own_buckets():
    model = shaken(made("mini_deit_test", dynamic_img_size=True))
    attention = model.blocks[0].attn
    tokens = torch.randn(1, 36, 32)
    larger = MappedAttention(attention, "identity", (6, 6))
    larger.before, larger.after = attention.before, attention.after
    larger.positions.table = attention.positions.table
    assert torch.equal(attention(tokens), larger(tokens))
    assert model(images(48)).shape == (2, 1000)
    with pytest.raises(ValueError, match="no mask"):
        attention(tokens, attn_mask=torch.zeros(36, 36))


# fact 15
def test_the_convolution_over_tokens():
    conv = DepthwiseTokens(6)
    tokens = torch.randn(2, 15, 6)
    on_map = tokens.mT.reshape(2, 6, 3, 5)
    expected = F.conv2d(on_map, conv.weight, conv.bias, padding=3, groups=6)
    found = conv(tokens, 3, 5)
    assert found.shape == tokens.shape
    assert torch.allclose(found, expected.flatten(2).mT, atol=1e-6)
    assert not torch.allclose(found, conv(tokens, 5, 3), atol=1e-3)
    with_prefix = conv(torch.cat([torch.randn(2, 2, 6), tokens], 1), 3, 5, prefix=2)
    assert with_prefix.shape == (2, 17, 6)
    assert with_prefix[:, :2].abs().max() == 0
    assert torch.equal(with_prefix[:, 2:], found)


def test_the_order_of_the_local_transform():
    x = torch.randn(2, 3, 5, 6)
    for kind in ("stream", "residual"):
        local = LocalTransform(6, kind)
        nn.init.normal_(local.conv.weight)
        nn.init.normal_(local.norm.weight)
        normed = F.layer_norm(x, (6,), local.norm.weight, local.norm.bias)
        convolved = F.conv2d(normed.permute(0, 3, 1, 2), local.conv.weight, local.conv.bias, padding=3, groups=6)
        expected = (normed if kind == "stream" else x) + convolved.permute(0, 2, 3, 1)
        assert torch.allclose(local(x), expected, atol=1e-5)


def test_a_block_of_mini_swin_is_its_formula():
    model = shaken(made("mini_swin_test"))
    block = model.layers[0].blocks[0]
    x = torch.randn(1, 4, 4, 16)  # one window
    query, key, value = block.attn.qkv(block.norm1(x).flatten(1, 2)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    logits = query @ key.mT / 8**0.5 + block.attn._get_rel_pos_bias()
    before, after = block.attn.before, block.attn.after
    logits = torch.einsum("nm,bmij->bnij", before.weight, logits) + before.bias.view(2, 1, 1)
    mapped = torch.einsum("nm,bmij->bnij", after.weight, logits.softmax(-1)) + after.bias.view(2, 1, 1)
    u = x + block.attn.proj((mapped @ value).transpose(1, 2).flatten(2)).view_as(x)
    y = block.local.norm(u)
    z = y + block.local.conv(y.flatten(1, 2), 4, 4).view_as(y)
    block.attn_mask = None
    assert torch.allclose(block(x), z + block.mlp(block.norm2(z)), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "4 blocks cannot be divided"),
        ({"groups": (3, 2)}, "add up to 4"),
    ],
)
def test_groups_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        made("mini_deit_test", **options)
    with pytest.raises(ValueError, match="one entry for each of the 2 stages"):
        made("mini_swin_test", groups=(1, 1, 1))


@pytest.mark.parametrize(
    "option", [{"class_token": True}, {"reg_tokens": 4}, {"patch_drop_rate": 0.75}, {"qk_norm": True}]
)
def test_options_that_do_not_serve_are_named(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is no option of a Mini-DeiT"):
        made("mini_deit_test", **option)


def test_a_larger_window_keeps_the_tables_shared():
    model = made("mini_swin_test")
    small = model.layers[0].blocks[0].attn.relative_position_bias_table.detach().T.reshape(1, 2, 7, 7)
    expected = F.interpolate(small, (11, 11), mode="bicubic").flatten(2)[0].T
    model.set_input_size(img_size=48, window_size=6)
    check_tied(model)
    table = model.layers[0].blocks[1].attn.relative_position_bias_table
    assert table is model.layers[0].blocks[0].attn.relative_position_bias_table
    assert torch.allclose(table, expected)
    assert model(images(48)).shape == (2, 1000)
    assert "layers.0.blocks.1.attn.relative_position_bias_table" not in model.state_dict()


@pytest.mark.parametrize("name", ["mini_deit_test", "mini_swin_test"])
def test_training_steps_in_mixed_precision_and_with_recomputation(name):
    model = made(name, drop_path_rate=0.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(images()).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad()
    model(images()).square().sum().backward()
    once = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images()).square().sum().backward()
    again = [parameter.grad for parameter in model.parameters()]
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(once, again, strict=True))


def test_what_does_not_decay():
    exempt = made("mini_swin_test").no_weight_decay()
    assert "layers.0.blocks.1.attn.before.weight" in exempt
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in exempt
    assert "layers.0.blocks.0.local.conv.weight" not in exempt
    exempt = made("mini_deit_test").no_weight_decay()
    assert {"pos_embed", "blocks.0.attn.after.weight"} <= exempt
    assert "blocks.0.attn.positions.table" not in exempt


@pytest.mark.parametrize("name", ["mini_deit_test", "mini_swin_test"])
def test_an_image_tower_of_an_open_clip_model(name):
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.CustomTextCLIP(16, vision, text).eval()
    assert clip.encode_image(images()).shape == (2, 16)
    check_tied(clip)
    assert len({value.data_ptr() for value in clip.state_dict().values()}) == len(clip.state_dict())
