"""Towers that stop early, adaptive heads, masks, and the weights of MAE and TinyMIM: facts of the sheet, section 12."""

import copy

import open_clip
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shards_spec.files import UserError
from training.losses.relations import Pair, token_relation, token_relation_loss
from training.models.classifier import new_classifier
from training.models.tinymim import (
    NoTower,
    OpenClipTower,
    TimmTower,
    fix_positions,
    freeze_unread,
    initialise,
    keep_patches,
    read,
    set_drop_path,
    set_heads,
    sincos_positions,
    tower_of,
)
from training.models.vit_teacher import load_encoder, load_vit_teacher

pytestmark = pytest.mark.usefixtures("one_thread")
FEATURES = ("output", "attention-before", "attention-after", "ffn-before", "ffn-after", "class-token")


def vit(**options):
    """A small ViT of 4 x 4 patches: 4 blocks of width 48 with 4 heads."""
    torch.manual_seed(options.pop("seed", 0))
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 0}
    return timm.models.VisionTransformer(**{**shape, **options}).eval()


def clip_tower(**options):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 4, "mlp_ratio": 2.0}
    return open_clip.transformer.VisionTransformer(**{**shape, **options}).eval()


def images(count=2, side=32, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def relation_losses(student, teacher, block, teacher_block, keep=None):
    """QK and VV of each sample."""
    mine = read(student, images(), "relations", block, keep)
    theirs = read(teacher, images(), "relations", teacher_block, keep)
    heads = teacher.heads(teacher_block)
    pairs = (("q", "k"), ("v", "v"))
    return sum(
        token_relation_loss(Pair(mine[one], mine[two]), Pair(theirs[one], theirs[two]), heads) for one, two in pairs
    )


def test_shapes_of_real_sizes():  # fact 1
    with torch.device("meta"):
        student = TimmTower(timm.create_model("vit_tiny_patch16_224", num_classes=0))
        teacher = TimmTower(timm.create_model("vit_large_patch16_224", num_classes=0))
        set_heads(student, 12, 12)
        found = [
            read(tower, torch.zeros(2, 3, 224, 224), "relations", block)["q"].shape
            for tower, block in ((student, 12), (teacher, 18))
        ]
    assert [shape[-1] for shape in found] == [192, 1024]
    for shape, heads in zip(found, (12, 16), strict=True):
        assert token_relation(torch.zeros(shape), torch.zeros(shape), heads).shape == (2, heads, 197, 197)


@pytest.mark.parametrize("tower", [TimmTower(vit()), TimmTower(vit(qk_norm=True))], ids=["plain", "qk_norm"])
def test_queries_and_keys_give_the_modules_own_attention(tower):  # fact 2
    attention = tower.blocks[2].attn
    attention.fused_attn = False
    seen = []
    handle = attention.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        tower.model(images())
        found = read(tower, images(), "qkv", 3)
    handle.remove()
    ours = token_relation(found["q"], found["k"], attention.num_heads).softmax(-1)
    torch.testing.assert_close(ours, seen[0], rtol=1e-5, atol=1e-6)


def test_queries_and_keys_give_open_clips_own_attention():  # fact 2
    tower = OpenClipTower(clip_tower())
    seen = []
    block = tower.blocks[2]
    handle = block.ln_1.register_forward_hook(lambda *found: seen.append(found[2]))
    with torch.no_grad():
        tower.model(images())
        _, weights = block.attn(seen[0], seen[0], seen[0], need_weights=True, average_attn_weights=False)
        found = read(tower, images(), "relations", 3)
    handle.remove()
    torch.testing.assert_close(token_relation(found["q"], found["k"], 4).softmax(-1), weights, rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_teacher_has_no_loss():  # fact 3
    teacher = TimmTower(vit())
    student = TimmTower(copy.deepcopy(teacher.model))
    assert relation_losses(student, teacher, 3, 3).max() < 1e-6
    assert relation_losses(student, teacher, 4, 3).min() > 1e-6


def test_other_heads_change_no_parameter():  # fact 7
    model = vit()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tower = TimmTower(model)
    set_heads(tower, 4, 12)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    attention = model.blocks[-1].attn
    assert (attention.num_heads, attention.head_dim, attention.scale) == (12, 4, 0.5)
    vit(seed=1).load_state_dict(model.state_dict(), strict=True)
    assert tower.heads(3) == 4


UNREAD = {
    "blocks.3.attn.proj.weight",
    "blocks.3.attn.proj.bias",
    "blocks.3.norm2.weight",
    "blocks.3.norm2.bias",
    "blocks.3.mlp.fc1.weight",
    "blocks.3.mlp.fc1.bias",
    "blocks.3.mlp.fc2.weight",
    "blocks.3.mlp.fc2.bias",
    "norm.weight",
    "norm.bias",
}


def test_ten_tensors_have_no_gradient():  # fact 8
    student, teacher = TimmTower(vit()), TimmTower(vit(seed=1).requires_grad_(False))
    relation_losses(student, teacher, 4, 3).sum().backward()
    without = {name for name, value in student.model.named_parameters() if value.grad is None}
    assert without == UNREAD
    assert all(value.grad is None for value in teacher.model.parameters())
    gradient = student.model.blocks[-1].attn.qkv.weight.grad
    assert all(part.abs().max() > 0 for part in gradient.chunk(3))
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    assert set(freeze_unread(student, "relations", 4, 32)) == UNREAD
    assert {name for name, value in student.model.named_parameters() if not value.requires_grad} == UNREAD
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"])
def test_parameters_without_gradient(name):  # section 7
    with torch.device("meta"):
        tower = TimmTower(timm.create_model(name, num_classes=0))
        unread = set(freeze_unread(tower, "relations", 12, 224))
    assert len(unread) == 10
    count = sum(value.numel() for key, value in tower.model.named_parameters() if key in unread)
    assert count == {192: 333_696, 384: 1_330_944, 768: 5_316_096}[tower.width]


@pytest.mark.parametrize("target", FEATURES)
def test_what_a_feature_target_leaves_out(target):
    tower = TimmTower(vit())
    unread = set(freeze_unread(tower, target, 4, 32))
    ffn = {name for name in UNREAD if "norm2" in name or "mlp" in name}
    norm = {"norm.weight", "norm.bias"}
    behind = {"class-token": set(), "attention-before": ffn | norm, "attention-after": ffn | norm}
    assert unread == behind.get(target, norm)


def final_norm(tower):
    return [tower.model.norm if isinstance(tower, TimmTower) else tower.model.ln_post]


@pytest.mark.parametrize("target", ["relations", *FEATURES])
@pytest.mark.parametrize("build", [vit, clip_tower], ids=["timm", "open_clip"])
def test_nothing_behind_the_target_is_computed(target, build):  # fact 9
    tower = tower_of(build())
    block = 4 if target == "class-token" else 2
    with torch.no_grad():
        before = read(tower, images(), target, block)
        for later in tower.blocks[block:]:
            for value in later.parameters():
                value.fill_(float("nan"))
        after = read(tower, images(), target, block)
        for later in (*tower.blocks[block:], *([] if target == "class-token" else final_norm(tower))):
            later.register_forward_hook(lambda *_: pytest.fail("it is run"))
        read(tower, images(), target, block)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("build", [vit, clip_tower], ids=["timm", "open_clip"])
def test_features_are_those_of_the_whole_model(build):
    """Before and after each residual sum, and behind the final norm."""
    tower = tower_of(build())
    with torch.no_grad():
        found = {target: read(tower, images(), target, 4)["feature"] for target in FEATURES}
        earlier = read(tower, images(), "output", 3)["feature"]
        whole = tower.model.forward_features(images()) if isinstance(tower, TimmTower) else None
    torch.testing.assert_close(earlier + found["attention-before"], found["attention-after"])
    torch.testing.assert_close(found["attention-after"] + found["ffn-before"], found["output"])
    assert torch.equal(found["ffn-after"], found["output"])
    if whole is not None:
        torch.testing.assert_close(whole[:, 0], found["class-token"])
        torch.testing.assert_close(tower.model.norm(found["output"]), whole)
    else:
        torch.testing.assert_close(found["class-token"] @ tower.model.proj, tower.model(images()))


def test_masks_keep_the_same_patches():  # fact 10
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2).eval()
    teacher = OpenClipTower(clip_tower(image_size=224, patch_size=16))
    keep = torch.stack([torch.randperm(196, generator=torch.Generator().manual_seed(n))[:49] for n in range(2)])
    with torch.no_grad():
        for tower in (TimmTower(model), teacher):
            found = read(tower, images(side=224), "relations", 2, keep)
            assert found["q"].shape == (2, 1 + 49, tower.width)
            whole = read(tower, images(side=224), "output", 1)["feature"]  # the first block's input is per patch
            assert whole.shape == (2, 197, tower.width)
    tokens = torch.arange(2 * 5).view(2, 5, 1)
    kept = keep_patches(tokens, torch.tensor([[0, 3], [1, 2]]), 1)
    assert kept[:, :, 0].tolist() == [[0, 1, 4], [5, 7, 8]]


def test_what_is_masked_is_not_seen():  # fact 10
    tower = TimmTower(vit())
    keep = torch.tensor([[0, 5, 15], [1, 2, 3]])
    changed = images()
    changed[0, :, :8, 8:16] += 5.0  # patch 1, which the first image has not kept
    with torch.no_grad():
        one, two = (read(tower, shown, "relations", 4, keep) for shown in (images(), changed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed[0, :, :8, :8] += 5.0
    with torch.no_grad():
        assert not torch.equal(read(tower, changed, "relations", 4, keep)["q"], one["q"])


def test_drop_path():  # fact 11
    student = TimmTower(vit())
    set_drop_path(student, 0.1, 4)
    rates = [(one.drop_path1, one.drop_path2) for one in student.blocks]
    assert all(isinstance(part, DropPath) and part.drop_prob == 0.1 for pair in rates[:3] for part in pair)
    assert all(isinstance(part, nn.Identity) for part in rates[3])
    student.model.train()
    torch.manual_seed(0)
    one, two = (read(student, images(8), "relations", 4)["q"] for _ in range(2))
    assert not torch.equal(one, two)
    teacher = load_vit_teacher("timm:test_vit", "random", 0)
    with torch.no_grad():
        first, second = (read(teacher.tower, images(side=160), "relations", 4)["q"] for _ in range(2))
    assert torch.equal(first, second)
    assert not teacher.frozen.model.training
    assert not any(value.requires_grad for value in teacher.frozen.model.parameters())


SIZES = {
    "vit_tiny_patch16_224": (5_717_416, 5_524_416, 1.25),
    "vit_small_patch16_224": (22_050_664, 21_665_664, 4.60),
    "vit_base_patch16_224": (86_567_656, 85_798_656, 17.56),
    "vit_large_patch16_224": (None, 303_301_632, 61.6),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):  # fact 13
    with_head, without, products = SIZES[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
        assert sum(value.numel() for value in model.parameters()) == without
        if with_head is not None:
            whole = timm.create_model(name, num_classes=1000)
            assert sum(value.numel() for value in whole.parameters()) == with_head
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for block in model.blocks:
                block.attn.fused_attn = False
            model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(products, abs=0.06 if products > 50 else 0.006)


@pytest.mark.parametrize(("width", "heads", "each"), [(192, 12, 16), (768, 16, 48), (192, 16, 12)])
def test_widths_of_heads(width, heads, each):  # fact 14
    tower = TimmTower(vit(embed_dim=width, depth=1))
    set_heads(tower, 1, heads)
    assert tower.blocks[0].attn.head_dim == each


def test_heads_that_do_not_divide():  # fact 14
    with pytest.raises(ValueError, match="12 heads do not divide a width of 200"):
        set_heads(TimmTower(vit(embed_dim=200)), 4, 12)
    with pytest.raises(ValueError, match="norms of a head's width"):
        set_heads(TimmTower(vit(qk_norm=True)), 4, 12)
    set_heads(TimmTower(vit(qk_norm=True)), 4, 4)


def test_positions_of_mae():
    positions = sincos_positions((3, 5), 8).view(3, 5, 8)
    assert torch.equal(positions[0, :, :4], positions[2, :, :4]), "first half: the column"
    assert torch.equal(positions[:, 0, 4:], positions[:, 4, 4:]), "second half: the row"
    expected = [2.0, 0.02]
    torch.testing.assert_close(positions[0, 2, :2], torch.tensor(expected).sin())
    torch.testing.assert_close(positions[0, 2, 2:4], torch.tensor(expected).cos())
    tower = TimmTower(vit())
    fix_positions(tower)
    assert not tower.model.pos_embed.requires_grad
    assert (tower.model.pos_embed[0, 0] == 0).all()
    torch.testing.assert_close(tower.model.pos_embed[0, 1:], sincos_positions((4, 4), 48))


def test_initial_weights():
    tower = TimmTower(vit())
    initialise(tower)
    qkv = tower.blocks[0].attn.qkv
    bound = (6 / (48 + 3 * 48)) ** 0.5
    assert 0.9 * bound < qkv.weight.abs().max() <= bound
    assert (qkv.bias == 0).all()
    patches = tower.model.patch_embed.proj.weight
    bound = (6 / (48 + 3 * 64)) ** 0.5
    assert 0.9 * bound < patches.abs().max() <= bound
    assert tower.model.cls_token.std().item() == pytest.approx(0.02, rel=0.4)


def test_activations_that_are_computed_again():
    """The same loss and gradients, with early exit within a block and block inputs alone kept."""
    teacher = TimmTower(vit(seed=1))
    found = []
    for again in (False, True):
        student = TimmTower(vit())
        student.model.set_grad_checkpointing(again)
        loss = relation_losses(student, teacher, 4, 3).sum()
        loss.backward()
        found.append((loss, student.model.blocks[0].attn.qkv.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def mae_file(path, model, **extra):
    torch.save({"model": {**model.state_dict(), **extra}, "epoch": 1599}, path)
    return str(path)


def assert_loads(file, model, expected):
    load_encoder(model, file)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_checkpoints_of_mae(tmp_path):
    """The encoder's own file, and the one that reconstructs, with its decoder."""
    model = vit()
    assert_loads(mae_file(tmp_path / "mae.pth", model), vit(seed=1), model.state_dict())
    decoder = {
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_pos_embed": torch.zeros(1, 17, 32),
        "decoder_embed.weight": torch.zeros(32, 48),
        "decoder_blocks.0.norm1.weight": torch.zeros(32),
        "decoder_pred.bias": torch.zeros(192),
    }
    assert_loads(mae_file(tmp_path / "whole.pth", model, **decoder), vit(seed=1), model.state_dict())


def test_checkpoints_of_tinymim(tmp_path):
    """Fine-tuned ones have a norm behind the pooling and a head; T* a distillation token at the second of 198."""
    model = vit()
    state = model.state_dict()
    tuned = {name: value for name, value in state.items() if not name.startswith("norm.")}
    tuned |= {name: torch.ones(48) for name in ("fc_norm.weight", "fc_norm.bias")}
    tuned |= {"head.weight": torch.ones(1000, 48), "head.bias": torch.ones(1000)}
    torch.save({"model": tuned}, tmp_path / "tuned.pth")
    other = vit(seed=1)
    own_norm = other.state_dict()["norm.weight"].clone()
    assert_loads(str(tmp_path / "tuned.pth"), other, {**state, "norm.weight": own_norm})
    pooled = vit(seed=1, global_pool="avg", num_classes=1000)
    assert_loads(str(tmp_path / "tuned.pth"), pooled, tuned)
    extra = {
        "dist_token": torch.full((1, 1, 48), 7.0),
        "head_dist.weight": torch.ones(1000, 48),
        "head_dist.bias": torch.ones(1000),
        "conv1x1.0.weight": torch.ones(48),
        "conv1x1.1.weight": torch.ones(1280, 48),
        "pos_embed": torch.cat([state["pos_embed"][:, :1], torch.full((1, 1, 48), 9.0), state["pos_embed"][:, 1:]], 1),
    }
    assert_loads(mae_file(tmp_path / "star.pth", model, **extra), vit(seed=1), state)


def test_checkpoints_that_do_not_fit(tmp_path):
    model = vit()
    file = mae_file(tmp_path / "more.pth", model, surprise=torch.zeros(1))
    with pytest.raises(UserError, match=r"0 weights missing \[\], 1 left over \['surprise'\]"):
        load_encoder(vit(), file)
    with pytest.raises(UserError, match=r"does not fit: .*of another shape"):
        load_encoder(vit(embed_dim=24), mae_file(tmp_path / "mae.pth", model))
    with pytest.raises(UserError, match="does not fit: 12 weights missing"):
        load_encoder(vit(depth=5), mae_file(tmp_path / "mae.pth", model))


def test_models_that_cannot_be_read():
    for model, said in (
        (timm.create_model("test_resnet", num_classes=0), "it is a ResNet, without blocks that have queries"),
        (timm.create_model("test_vit_relpos", num_classes=0), "it is a VisionTransformerRelPos, without"),
        (vit(block_fn=timm.models.vision_transformer.ResPostBlock), "no plain pre-norm ones, but ResPostBlock"),
        (clip_tower(qk_norm=True), "no plain pre-norm ones, but CustomResidualAttentionBlock"),
    ):
        with pytest.raises(NoTower, match=said):
            tower_of(model)
    classifier = new_classifier("timm:test_vit", 3).model
    assert tower_of(classifier).model is classifier.trunk
    with pytest.raises(NoTower, match="no class token"):
        read(TimmTower(vit(global_pool="avg")), images(), "class-token", 4)


def test_star():  # fact 13
    model = timm.create_model("tinymim_star_tiny_patch16_224", num_classes=0)
    assert sum(value.numel() for value in model.parameters()) == 5_772_224
    assert model.pos_embed.shape == (1, 198, 192)
    assert {block.attn.num_heads for block in model.blocks} == {12}
    model.reset_classifier(10)
    tokens = torch.randn(2, 198, 192)
    features = model.neck(tokens[:, :2])
    expected = (model.head(features[:, 0]) + model.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(model.eval().forward_head(tokens), expected)
    model.set_distilled_training(True)
    both = model.train().forward_head(tokens)
    torch.testing.assert_close(both[1], model.head_dist(features[:, 1]))
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 1280)
    assert model.eval()(images(side=224)).shape == (2, 10)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("tinymim_star_tiny_patch16_224", pretrained=True)


def test_star_loads_the_authors_names():
    """They call the neck conv1x1."""
    model, other = (timm.create_model("tinymim_star_tiny_patch16_224", num_classes=3) for _ in range(2))
    theirs = {name.replace("neck.", "conv1x1."): value for name, value in model.state_dict().items()}
    assert {name for name in theirs if name.startswith("conv1x1.")} == {
        f"conv1x1.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")
    }
    other.load_state_dict(theirs)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_star_starts_from_an_encoder():
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    model = timm.create_model("tinymim_star_tiny_patch16_224", num_classes=10)
    token, neck = model.dist_token.clone(), model.neck[1].weight.clone()
    heads = {name: value for name, value in model.state_dict().items() if name.startswith("head")}
    own = {name: value for name, value in encoder.items() if not name.startswith("head")}
    model.load_state_dict(own | heads)
    assert torch.equal(model.blocks[3].attn.qkv.weight, encoder["blocks.3.attn.qkv.weight"])
    assert torch.equal(model.pos_embed[:, 2:], encoder["pos_embed"][:, 1:])
    assert torch.equal(model.pos_embed[:, 0], encoder["pos_embed"][:, 0])
    assert torch.equal(model.dist_token, token)
    assert torch.equal(model.neck[1].weight, neck)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: value for name, value in (own | heads).items() if not name.startswith("norm.")})
