"""Manual inheritance: what a student takes of a larger CLIP, and that importance drops what does not matter."""

import json
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from shards_spec.files import UserError
from training.losses.contrastive import clip_loss
from training.losses.distillation import affinity_loss
from training.models.tinyclip_inheritance import (
    ClipWeights,
    Tower,
    clip_weights,
    inherit_manual,
    layer_map,
    taylor_terms,
)
from training.models.tower_axes import Units
from training.models.unit_importance import gradients_of

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = 8  # rows of a head in the small towers
CONFIGS = Path(__file__).parents[3] / "training" / "models" / "configs" / "tinyclip"


def vit(width=32, layers=4, **more):
    return {"image_size": 32, "patch_size": 16, "width": width, "layers": layers, "head_width": HEAD, **more}


def resnet(width=8, layers=(2, 1, 1, 2)):
    return {"image_size": 32, "patch_size": None, "width": width, "layers": list(layers), "head_width": 64}


def text(width=32, layers=4, **more):
    return {"context_length": 8, "vocab_size": 50, "width": width, "heads": width // HEAD, "layers": layers, **more}


def described(vision, words, embed_dim=16, **more):
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": words, **more}


def built(config, seed=0, kind=CLIP):
    """A model in eval mode whose norms, biases and statistics are not those of a new one."""
    torch.manual_seed(seed)
    model = kind(**config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and name != "logit_scale":
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def weights(model, config, name="teacher"):
    return ClipWeights(name, config, dict(model.state_dict()), config.get("quick_gelu", False))


def inherited(student_config, source, **options):
    """A student of another seed with inherited weights."""
    student = built(student_config, seed=9)
    state = inherit_manual(weights(student, student_config, "student"), source, source, **options)
    student.load_state_dict(state)
    return student


IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(1, 49, (6, 8), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def features(model):
    return torch.cat((model.encode_image(IMAGES), model.encode_text(TOKENS)))


# fact 6
@pytest.mark.parametrize(
    ("source", "student", "rule", "wanted"),
    [
        (12, 9, "interval", [*range(9)]),
        (12, 6, "interval", [0, 2, 4, 6, 8, 10]),
        (12, 10, "interval", [*range(10)]),
        (12, 3, "interval", [0, 4, 8]),
        (9, 6, "interval", [*range(6)]),
        (12, 9, "spread", [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        (12, 6, "spread", [0, 2, 4, 6, 8, 10]),
        (9, 6, "spread", [0, 1, 3, 4, 6, 7]),
        (12, 3, "first", [0, 1, 2]),
        (5, 5, "spread", [0, 1, 2, 3, 4]),
    ],
)
def test_layer_maps(source, student, rule, wanted):
    assert layer_map(source, student, rule) == wanted


def test_a_map_to_more_layers_does_not_exist():
    for student in (0, 7):
        with pytest.raises(ValueError, match=f"{student} layers of 6"):
            layer_map(6, student)


# fact 6
def test_whole_heads_are_taken_of_queries_keys_and_values_each():
    source = weights(built(config := described(vit(width=192, layers=1, head_width=64), text())), config)
    own = described(vit(width=128, layers=1, head_width=64), text())
    rows = torch.arange(3 * 192.0)
    block = "visual.transformer.resblocks.0.attn."
    source.state[block + "in_proj_bias"] = rows
    source.state[block + "in_proj_weight"] = rows[:, None] + torch.arange(192) / 256
    state = inherited(own, source).state_dict()
    wanted = torch.cat((rows[:128], rows[192:320], rows[384:512]))
    assert torch.equal(state[block + "in_proj_bias"], wanted)
    assert torch.equal(state[block + "in_proj_weight"], wanted[:, None] + torch.arange(128) / 256)


def test_the_release_takes_the_corner_of_every_tensor_and_no_logit_scale():
    """Against the rule written out: leading slices, heads apart, layers 0 and 2 of 4 in the text."""
    config = described(vit(), text())
    source = weights(built(config), config)
    own = described(vit(width=16, layers=3), text(width=24, layers=2))
    fresh = built(own, seed=9).state_dict()
    state = inherit_manual(ClipWeights("student", own, dict.fromkeys(fresh, None) | fresh, False), source, source)
    assert list(state) == list(fresh)
    for name, value in state.items():
        if name == "logit_scale":
            assert torch.equal(value, fresh[name])
            continue
        place = name
        if not name.startswith("visual.") and ".resblocks.1." in name:
            place = name.replace(".resblocks.1.", ".resblocks.2.")
        corner = source.state[place]
        if "in_proj" in name:
            heads = corner.unflatten(0, (3, 4, HEAD))[:, : len(value) // 3 // HEAD].flatten(0, 2)
            corner = heads if value.ndim == 1 else heads[:, : value.shape[1]]
        else:
            corner = corner[tuple(slice(size) for size in value.shape)]
        assert torch.equal(value, corner), name
        assert value.data_ptr() != source.state[place].data_ptr()


def entropy_at_50(image, words):
    targets = [logits.softmax(-1) for logits in (50 * image @ words.T, 50 * words @ image.T)]
    return sum(-(target * target.log()).sum(-1).mean() for target in targets) / 2


# fact 5
@pytest.mark.parametrize("rank", ["leading", "magnitude", "taylor"])
@pytest.mark.parametrize("vision", [vit(), resnet()])
def test_equal_sizes_are_the_identity(vision, rank):
    config = described(vision, text())
    teacher = built(config)
    source = weights(teacher, config)
    student = inherited(config, source, rank=rank, terms=terms_of(teacher, source))
    own = student.state_dict()
    assert all(torch.equal(own[name], value) for name, value in source.state.items() if name != "logit_scale")
    assert torch.equal(features(student), features(teacher))
    with torch.no_grad():
        unit = [teacher.encode_image(IMAGES, normalize=True), teacher.encode_text(TOKENS, normalize=True)]
        mine = [student.encode_image(IMAGES, normalize=True), student.encode_text(TOKENS, normalize=True)]
    assert float(affinity_loss(*mine, *unit)) == pytest.approx(float(entropy_at_50(*unit)), abs=1e-5)


def test_fp16_sources_become_fp32():
    config = described(vit(), text())
    half = ClipWeights(
        "half", config, {name: value.half() for name, value in built(config).state_dict().items()}, False
    )
    state = inherited(described(vit(width=16), text(width=16)), half).state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert torch.equal(state["text_projection"], half.state["text_projection"][:16].float())


def test_towers_of_two_sources_and_names_of_custom_text():
    """The student's text tower lies under text., as in open_clip's CustomTextCLIP, the source's does not."""
    first, second = described(vit(), text()), described(vit(width=16), text(width=40))
    image, words = weights(built(first), first, "one"), weights(built(second, seed=3), second, "two")
    own = described(vit(width=24), text(width=16))
    student = built(own, seed=9, kind=CustomTextCLIP)
    state = inherit_manual(weights(student, own), image, words)
    student.load_state_dict(state)
    assert torch.equal(state["visual.proj"], image.state["visual.proj"][:24])
    assert torch.equal(state["text.token_embedding.weight"], words.state["token_embedding.weight"][:, :16])
    back = inherit_manual(weights(built(own), own), weights(student, own), weights(student, own))
    assert torch.equal(back["token_embedding.weight"], state["text.token_embedding.weight"])


def test_a_resnet_takes_channels_statistics_and_pool_heads():
    config = described(resnet(width=8, layers=(4, 2, 1, 2)), text())
    source = weights(built(config), config)
    source.state["visual.layer1.2.bn1.num_batches_tracked"].fill_(7)
    own = described(resnet(width=4, layers=(2, 1, 1, 2)), text(layers=2))
    state = inherited(own, source).state_dict()
    there, theirs = "visual.layer1.1.", "visual.layer1.2."
    assert torch.equal(state[there + "conv1.weight"], source.state[theirs + "conv1.weight"][:4, :16])
    for part in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(state[f"{there}bn3.{part}"], source.state[f"{theirs}bn3.{part}"][:16])
    assert int(state[there + "bn1.num_batches_tracked"]) == 7
    pool = "visual.attnpool."
    assert torch.equal(state[pool + "positional_embedding"], source.state[pool + "positional_embedding"][:, :128])
    assert torch.equal(state[pool + "k_proj.weight"], source.state[pool + "k_proj.weight"][:128, :128])
    assert torch.equal(state[pool + "c_proj.weight"], source.state[pool + "c_proj.weight"][:, :128])
    assert torch.equal(state[pool + "c_proj.bias"], source.state[pool + "c_proj.bias"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_released_student_is_covered_by_the_source_of_its_paper(path):
    """On torch's meta device: names and shapes alone."""
    own = json.loads(path.read_text())
    quick = "-quickgelu" if own.get("quick_gelu") else ""
    teacher = "RN50" if "ResNet" in path.stem else f"ViT-B-{own['vision_cfg']['patch_size']}"
    config = open_clip.get_model_config(teacher + quick)
    with torch.device("meta"):
        source, student = weights(CLIP(**config), config), CLIP(**own)
    state = inherit_manual(weights(student, own), source, source)
    student.load_state_dict(state)
    # stage 2 of the scripts: the smaller student from the larger
    smaller = json.loads((CONFIGS / f"TinyCLIP-ViT-40M-32-Text-19M{quick}.json").read_text())
    if path.stem.startswith("TinyCLIP-ViT-61M"):
        with torch.device("meta"):
            second = CLIP(**smaller)
        first = ClipWeights("stage 1", own, state, bool(quick))
        second.load_state_dict(inherit_manual(weights(second, smaller), first, first))


# importance


def terms_of(model, source, batches=2):
    """Terms of a contrastive loss, one per batch of 3 pairs."""

    def loss(start):
        image = model.encode_image(IMAGES[start : start + 3], normalize=True)
        words = model.encode_text(TOKENS[start : start + 3], normalize=True)
        return clip_loss(image, words, torch.tensor(10.0))

    gradients = gradients_of(model, [partial(loss, start) for start in (0, 3)[:batches]])
    terms = [taylor_terms(source, found) for found in gradients]
    return {"image": terms, "text": terms}


def permuted(source, seed=4):
    """The same model with the units of each group in another order."""
    draw = torch.Generator().manual_seed(seed)
    state = dict(source.state)
    for side in ("image", "text"):
        tower = Tower.of(source, side)
        orders = {}
        for name, axes in tower.axes().items():
            value = tower.state[name]
            for dim, axis in enumerate(axes):
                if isinstance(axis, Units):
                    count = axis.count(value.shape[dim])
                    order = orders.setdefault(axis.group, torch.randperm(count, generator=draw))
                    value = value.index_select(dim, axis.rows(order, value.shape[dim]))
            state[tower.prefix + name] = value
    return ClipWeights(source.name, source.config, state, source.quick_gelu)


@pytest.mark.parametrize("rank", ["magnitude", "taylor"])
@pytest.mark.parametrize("vision", [vit(), resnet()])
def test_the_order_of_a_teachers_units_changes_nothing(vision, rank):
    config = described(vision, text())
    teacher, moved = built(config), built(config)
    source = weights(teacher, config)
    shuffled = permuted(source)
    moved.load_state_dict(shuffled.state)
    assert not torch.equal(shuffled.state["text_projection"], source.state["text_projection"])
    assert torch.allclose(features(moved), features(teacher), atol=1e-4)
    small = (
        vit(width=16, layers=2) if "head_width" in vision and vision["head_width"] == HEAD else resnet(4, (1, 1, 1, 1))
    )
    own = described(small, text(width=16, layers=2))
    one = inherited(own, source, rank=rank, terms=terms_of(teacher, source))
    other = inherited(own, shuffled, rank=rank, terms=terms_of(moved, shuffled))
    assert torch.allclose(features(one), features(other), atol=1e-4)
    leading = inherited(own, shuffled)
    assert not torch.allclose(features(one), features(leading), atol=1e-2)


def head_rows(head, width=32):
    return torch.cat([torch.arange(HEAD) + part * width + head * HEAD for part in range(3)])


def without_units(source):
    """The weights, of which head 1 and neuron 5 of text layer 0 and dim 3 of the image's stream are exact zeros."""
    state = {name: value.clone() for name, value in source.state.items()}
    block = "transformer.resblocks.0."
    state[block + "attn.in_proj_weight"][head_rows(1)] = 0
    state[block + "attn.in_proj_bias"][head_rows(1)] = 0
    state[block + "attn.out_proj.weight"][:, HEAD : 2 * HEAD] = 0
    state[block + "mlp.c_fc.weight"][5] = 0
    state[block + "mlp.c_fc.bias"][5] = 0
    state[block + "mlp.c_proj.weight"][:, 5] = 0
    for name, dims in width_dims(source).items():
        for dim in dims:
            state["visual." + name].select(dim, 3).zero_()
    return ClipWeights(source.name, source.config, state, source.quick_gelu)


def width_dims(source):
    """The dimensions of each of the image tower's tensors that count dims of the residual stream."""
    axes = Tower.of(source, "image").axes()
    return {
        name: [dim for dim, axis in enumerate(found) if isinstance(axis, Units) and axis.group == "width"]
        for name, found in axes.items()
    }


@pytest.mark.parametrize("rank", ["magnitude", "taylor"])
def test_units_of_zeros_are_the_ones_that_go(rank):
    config = described(vit(), text(layers=2))
    teacher = built(config)
    source = without_units(weights(teacher, config))
    teacher.load_state_dict(source.state)
    # one head, one neuron less, and as wide
    own = described(vit(), text(layers=2))
    own["text_cfg"] = text(layers=2)
    student = {name: value.clone() for name, value in source.state.items()}
    block = "transformer.resblocks.0."
    keep_heads = torch.cat([head_rows(head) for head in (0, 2, 3)]).view(3, 3, HEAD).transpose(0, 1).flatten()
    keep_neurons = [n for n in range(128) if n != 5]
    student[block + "attn.in_proj_weight"] = torch.zeros(72, 32)
    student[block + "attn.in_proj_bias"] = torch.zeros(72)
    student[block + "attn.out_proj.weight"] = torch.zeros(32, 24)
    student[block + "mlp.c_fc.weight"] = torch.zeros(127, 32)
    student[block + "mlp.c_fc.bias"] = torch.zeros(127)
    student[block + "mlp.c_proj.weight"] = torch.zeros(32, 127)
    target = ClipWeights("student", own, student, False)
    state = inherit_manual(target, source, source, rank=rank, terms=terms_of(teacher, source))
    assert torch.equal(state[block + "attn.in_proj_weight"], source.state[block + "attn.in_proj_weight"][keep_heads])
    assert torch.equal(
        state[block + "attn.out_proj.weight"], source.state[block + "attn.out_proj.weight"][:, keep_heads[:24]]
    )
    assert torch.equal(state[block + "mlp.c_fc.bias"], source.state[block + "mlp.c_fc.bias"][keep_neurons])
    assert torch.equal(state[block + "mlp.c_proj.weight"], source.state[block + "mlp.c_proj.weight"][:, keep_neurons])


@pytest.mark.parametrize("rank", ["magnitude", "taylor"])
def test_a_dim_of_zeros_leaves_every_tensor_of_the_tower(rank):
    config = described(vit(layers=2), text())
    teacher = built(config)
    source = without_units(weights(teacher, config))
    teacher.load_state_dict(source.state)
    others = torch.tensor([dim for dim in range(32) if dim != 3])
    wanted = {}
    for name, dims in width_dims(source).items():
        value = source.state["visual." + name]
        for dim in dims:
            value = value.index_select(dim, others)
        wanted["visual." + name] = value
    assert wanted["visual.conv1.weight"].shape[0] == wanted["visual.proj"].shape[0] == 31
    narrower = {name: torch.zeros_like(value) for name, value in wanted.items()}
    target = ClipWeights("student", config, source.state | narrower, False)
    state = inherit_manual(target, source, source, rank=rank, terms=terms_of(teacher, source))
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_magnitudes_by_hand():
    from training.models.unit_importance import magnitude_scores

    heads, width, read = Units("heads", parts=3, size=2), Units("width"), Units("heads", size=2, reads=True)
    weights = {
        "qkv": torch.tensor([1.0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0])[:, None],
        "out": torch.tensor([[0.0, 2, 0, 1]]),
        "bn.running_var": torch.tensor([100.0]),
    }
    scores = magnitude_scores(weights, {"qkv": (heads, width), "out": (width, read), "bn.running_var": (width,)})
    # head 0 has rows 0, 1 of queries, 4, 5 of keys and 8, 9 of values: 1 + 4, and 4 in what reads it
    assert scores["heads"].square().tolist() == pytest.approx([1 + 4 + 4, 4 + 1])
    assert float(scores["width"]) ** 2 == pytest.approx(9 + 5)


def test_first_order_scores_are_the_derivative_by_a_gate():
    """Of a neuron, a head and a dim, against differences of the loss in float64."""
    config = described(vit(layers=2), text(layers=2))
    teacher = built(config).double()
    source = weights(teacher, config)
    images = IMAGES.double()

    def loss():
        image = teacher.encode_image(images, normalize=True)
        return clip_loss(image, teacher.encode_text(TOKENS, normalize=True), torch.tensor(10.0))

    frozen = next(teacher.parameters()).requires_grad_(False)
    gradients = list(gradients_of(teacher, [loss]))
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    terms = taylor_terms(source, gradients[0])
    block = "visual.transformer.resblocks.1."
    gates = {
        (block + "mlp.c_proj.weight", 7): [(block + "mlp.c_proj.weight", slice(7, 8))],
        (block + "attn.out_proj.weight", 2): [(block + "attn.out_proj.weight", slice(2 * HEAD, 3 * HEAD))],
        (block + "mlp.c_fc.weight", 4): [(block + "ln_2.weight", 4), (block + "ln_2.bias", 4)],
    }
    for (name, unit), places in gates.items():
        values = []
        for step in (1 + 1e-5, 1 - 1e-5):
            before = {place: source.state[place].clone() for place, _ in places}
            for place, where in places:
                source.state[place][..., where] *= step
            with torch.no_grad():
                values.append(float(loss()))
            for place, value in before.items():
                source.state[place].copy_(value)
        assert float(terms[name][unit]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-7), name


def test_changes_of_opposite_sign_in_two_batches_do_not_cancel():
    from training.models.unit_importance import first_order_scores

    axes = {"a": (Units("x", reads=True),), "b": (Units("x", reads=True), Units("y"))}
    batches = [
        {"a": torch.tensor([1.0, 3]), "b": torch.tensor([1.0, -2])},
        {"a": torch.tensor([-2.0, 0]), "b": torch.tensor([0.0, 0])},
    ]
    assert first_order_scores(batches, axes)["x"].tolist() == [2 + 2, 1 + 0]


def test_without_terms_taylor_is_an_error():
    config = described(vit(), text())
    with pytest.raises(ValueError, match="terms of at least one batch"):
        inherited(config, weights(built(config), config), rank="taylor")


# what does not fit


@pytest.mark.parametrize(
    ("student", "source", "message"),
    [
        (described(vit(width=40), text()), described(vit(), text()), "student is wider than teacher, 40 dims and 32"),
        (
            described(vit(mlp_ratio=8.0), text()),
            described(vit(), text()),
            "student is wider than teacher, 256 neurons and 128",
        ),
        (described(resnet(8), text()), described(resnet(4), text()), "student is wider than teacher, 4 channels and 2"),
        (
            described({**vit(width=16), "patch_size": 8}, text()),
            described(vit(), text()),
            r"another patch size than teacher, 8 and 16 .*visual.conv1.weight.*nothing is interpolated",
        ),
        (
            described({**vit(width=16), "image_size": 64}, text()),
            described(vit(), text()),
            "another number of image positions than teacher, 17 and 5",
        ),
        (
            described(vit(), text(), embed_dim=8),
            described(vit(), text()),
            "another embedding width than teacher, 8 and 16",
        ),
        (
            described(vit(layers=6), text()),
            described(vit(), text()),
            "has 6 image layers in visual.transformer.resblocks",
        ),
        (described(vit(), text(layers=6)), described(vit(), text()), "has 6 text layers in transformer.resblocks"),
        (
            described(resnet(layers=(3, 1, 1, 2)), text()),
            described(resnet(), text()),
            "has 3 image layers in visual.layer1, teacher 2; take a source that is at least as deep",
        ),
        (described(resnet(), text()), described(vit(), text()), "student is a CLIP-ResNet, that of teacher a ViT"),
        (described(vit(), {**text(), "vocab_size": 40}), described(vit(), text()), "another vocabulary than teacher"),
        (described(vit(), {**text(), "context_length": 6}), described(vit(), text()), "another context length"),
        (
            described(vit(head_width=16), text()),
            described(vit(), text()),
            "student has heads of width 16, that of teacher of 8",
        ),
        (
            described(vit(), text()),
            described(vit(), text(), quick_gelu=True),
            "image tower of student computes GELU, and the weights of teacher .* QuickGELU; .*-quickgelu",
        ),
        (
            described(resnet(), text(), quick_gelu=True),
            described(resnet(), text()),
            "text tower of student computes QuickGELU, and the weights of teacher were trained with GELU",
        ),
        (
            described(vit(), text()),
            described(vit(), text(ls_init_value=0.1)),
            r"teacher computes with transformer.resblocks.0.ls_1.gamma, which student has no room for",
        ),
        (
            described(vit(ls_init_value=0.1), text()),
            described(vit(), text()),
            r"nothing to inherit for visual.transformer.resblocks.0.ls_1.gamma, teacher has no",
        ),
        (
            described(vit(ls_init_value=0.1), text()),
            described(vit(ls_init_value=0.1), text()),
            r"visual.transformer.resblocks.0.ls_1.gamma \[32\] is no tensor of a plain ViT",
        ),
    ],
)
def test_what_does_not_fit_is_named(student, source, message):
    with pytest.raises(UserError, match=message):
        inherited(student, weights(built(source), source))


def test_other_architectures_are_refused_by_name():
    config = described(vit(), text())
    source = weights(built(config), config)
    trunk = {name.replace("visual.", "visual.trunk."): value for name, value in source.state.items()}
    with pytest.raises(UserError, match=r"its image tower .*visual.trunk|its image tower .*trunk"):
        inherited(config, ClipWeights("timm's", config, trunk, False))
    image_only = {name: value for name, value in source.state.items() if name.startswith("visual.")}
    with pytest.raises(UserError, match=r"its text tower .*no tensors"):
        inherited(config, ClipWeights("image only", config, image_only, False))
    layers = {
        name if name.startswith("visual.") else name.replace("transformer.resblocks", "layers"): value
        for name, value in source.state.items()
    }
    with pytest.raises(UserError, match=r"MobileCLIP's: its text tower is of a kind .*take open_clip's ViT"):
        inherited(config, ClipWeights("MobileCLIP's", config, layers, False))
    uneven = source.state | {"ln_final.weight": torch.ones(30)}
    with pytest.raises(UserError, match="text tower of student has heads of width 8, that of uneven of 7"):
        inherited(config, ClipWeights("uneven", config, uneven, False))
    mixed = source.state | {"transformer.resblocks.3.ln_1.weight": torch.ones(48)}
    with pytest.raises(UserError, match="other dims than in the tensors beside it"):
        inherited(config, ClipWeights("mixed", config, mixed, False))
    odd = source.state | {"transformer.resblocks.0.attn.in_proj_bias": torch.ones(100)}
    with pytest.raises(UserError, match=r"in_proj_bias \[100\].*100 rows are not 3 times a multiple of 8"):
        inherited(config, ClipWeights("odd", config, odd, False))


def test_the_activation_is_the_one_that_the_weights_were_trained_with():
    config = described(vit(), text())
    state = {}
    assert clip_weights("ViT-B-32", "openai", config, state).quick_gelu  # open_clip itself warns only
    assert not clip_weights("ViT-B-32", "laion2b_e16", config, state).quick_gelu
    assert (
        clip_weights("ViT-B/32", "laion400m_e32", config, state).quick_gelu
        == clip_weights("ViT-B-32", "laion400m_e32", config, state).quick_gelu
    )
    assert not clip_weights("ViT-B-32", "weights.pt", config, state).quick_gelu
    assert clip_weights("mine", None, config | {"quick_gelu": True}, state).quick_gelu
    assert clip_weights("ViT-B-32", "openai", config, state).name == "ViT-B-32 (openai)"
