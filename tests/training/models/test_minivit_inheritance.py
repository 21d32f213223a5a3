"""Inheritance of MiniViT's models from ordinary ones, and their expansion; facts are of the sheet's section 13."""

import pytest
import timm
import torch

import training.models.minivit  # noqa: F401  registers the names
from training.models.minivit import DEIT_SHARED, SWIN_SHARED
from training.models.minivit_inheritance import expand, inherit_minivit
from training.models.weight_tying import check_tied, tie, tied_blocks, untie

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCES = ("first", "last", "mean")


def vit(seed=0, **options):
    torch.manual_seed(seed)
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_heads": 2, **options}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_classes": 5}
    return shaken(timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}))


def swin(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 4), "num_heads": (2, 4), "num_classes": 5}
    return shaken(timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0, **{**sizes, **options}))


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def mini(name, seed=1, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5, head_maps="identity", **options).eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def with_equal_groups(model, student):
    """The model with what a group of the student shares equal in it: tied and untied."""
    lists = dict(model.named_modules())
    for name, blocks in tied_blocks(student).items():
        tie(lists[name], blocks.tying.groups, blocks.tying.shared, "first")
        untie(lists[name])
    return model


# fact 16
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("groups", [1, 2, 4, (3, 1)])
def test_a_vit_with_equal_layers_is_reproduced(source, groups):
    student = mini("mini_deit_test", groups=groups)
    teacher = with_equal_groups(vit(), student)
    assert (student(images()) - teacher(images())).abs().max() > 1e-3
    inherit_minivit(student, teacher, source)
    check_tied(student)
    assert (student(images()) - teacher(images())).abs().max() < 1e-6


# fact 16
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("groups", "local"), [((1, 2), "none"), ((1, 1), "residual"), ((2, (1, 3)), "residual")])
def test_a_swin_with_equal_layers_is_reproduced(source, groups, local):
    student = mini("mini_swin_test", groups=groups, local=local)
    teacher = with_equal_groups(swin(), student)
    inherit_minivit(student, teacher, source)
    check_tied(student)
    assert (student(images()) - teacher(images())).abs().max() < 1e-6


@pytest.mark.parametrize(("source", "shares"), [("first", (1, 0)), ("last", (0, 1)), ("mean", (0.5, 0.5))])
def test_whose_weights_a_group_takes_and_what_stays_a_layers_own(source, shares):
    student, teacher = mini("mini_deit_test"), vit()
    inherit_minivit(student, teacher, source)
    for index in (1, 3):
        pair = [teacher.blocks[layer].mlp.fc2.weight for layer in (index - 1, index)]
        expected = shares[0] * pair[0] + shares[1] * pair[1]
        assert torch.allclose(student.blocks[index].mlp.fc2.weight, expected, atol=1e-6)
        assert torch.equal(student.blocks[index].norm2.bias, teacher.blocks[index].norm2.bias)
    assert torch.equal(student.head.weight, teacher.head.weight)


def test_a_teacher_with_a_cls_token_and_other_classes():
    student, teacher = mini("mini_deit_test"), vit(class_token=True, global_pool="token", num_classes=7)
    before = student.head.weight.detach().clone()
    inherit_minivit(student, teacher, "last")
    assert torch.equal(student.pos_embed, teacher.pos_embed[:, 1:])
    assert torch.equal(student.norm.weight, teacher.norm.weight)
    assert torch.equal(student.head.weight, before)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: vit(embed_dim=48), r"has shape \[1, 16, 32\], pos_embed of the source \[1, 16, 48\]"),
        (lambda: vit(depth=6), "a teacher of 6 blocks"),
        (lambda: vit(img_size=48), r"pos_embed has shape"),
        (swin, "a teacher of 6 blocks"),
    ],
)
def test_teachers_that_do_not_serve_are_named(teacher, message):
    with pytest.raises(ValueError, match=message):
        inherit_minivit(mini("mini_deit_test"), teacher(), "first")


def test_a_swin_of_another_width_or_window():
    for teacher in (swin(embed_dim=32), swin(window_size=2)):
        with pytest.raises(ValueError, match="of the source"):
            inherit_minivit(mini("mini_swin_test"), teacher, "first")


# fact 6
@pytest.mark.parametrize("name", ["mini_deit_test", "mini_swin_test"])
def test_expanding_is_the_inverse_of_tying(name):
    options = {"local": "residual"} if name == "mini_swin_test" else {}
    student = mini(name, drop_path_rate=0.2, **options)
    inherit_minivit(student, swin() if options else vit(), "mean")
    ordinary = expand(student)
    assert type(ordinary).__module__.startswith("timm.")
    assert not tied_blocks(ordinary)
    assert torch.allclose(ordinary(images()), student(images()), atol=1e-6)
    lists = dict(ordinary.named_modules())
    for path, blocks in tied_blocks(student).items():
        rates = [getattr(block.drop_path1, "drop_prob", 0) for block in lists[path]]
        assert rates == pytest.approx([getattr(block.drop_path1, "drop_prob", 0) for block in blocks])
        tie(lists[path], blocks.tying.groups, SWIN_SHARED if options else DEIT_SHARED)  # equal
    state, tied = student.state_dict(), ordinary.state_dict()
    own = {key for key in state if any(part in key for part in (".before.", ".after.", ".positions.", ".local."))}
    assert set(tied) == set(state) - own
    assert all(torch.equal(value, state[key]) for key, value in tied.items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mini_deit_test", {"head_maps": "random"}, r"blocks.0.attn.before is not the identity"),
        ("mini_swin_test", {}, r"layers.0.blocks.0.local is not the identity"),
        ("mini_swin_test", {"local": "none", "mask_always": True}, r"masked, too"),
    ],
)
def test_what_no_ordinary_model_computes(name, options, message):
    torch.manual_seed(0)
    model = timm.create_model(name, **{"head_maps": "identity", **options})
    with pytest.raises(ValueError, match=message):
        expand(model)


def test_positions_that_have_learnt_are_no_ordinary_models():
    model = mini("mini_deit_test")
    with torch.no_grad():
        model.blocks[2].attn.positions.table[0, 0] = 1
    with pytest.raises(ValueError, match=r"blocks.2.attn.positions is not the identity"):
        expand(model)
