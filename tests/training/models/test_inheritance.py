"""What a SiCLIP student takes from MobileCLIP-S0, and that the frozen part of it stays so to the last bit."""

import copy

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from timm.utils import reparameterize_model

from training.config import OptimConfig
from training.engine.optim import build_optimizer
from training.losses.contrastive import clip_loss
from training.models.inheritance import freeze, in_teacher, inherit, inherit_siclip
from training.models.mobileclip import forward_shared, forward_tail, with_text_tower

NEW = ("visual.trunk.stages.3.blocks.", "text.layers.")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher():
    """MobileCLIP-tiny with statistics and layer scales that are not those of a new model."""
    torch.manual_seed(0)
    model = open_clip.create_model("MobileCLIP-tiny").eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif "layer_scale" in name:
            tensor.uniform_(0.1, 0.3)
    return model


@pytest.fixture
def student():
    torch.manual_seed(1)
    return open_clip.create_model("SiCLIP-tiny")


def test_every_tensor_of_the_teacher_but_its_attention_is_inherited(teacher, student):
    source = teacher.state_dict()
    state, frozen = inherit_siclip(student.state_dict(), source)
    used = {in_teacher(name) for name in state} - {None}
    left = ("token_mixer.qkv", "token_mixer.proj", "layer_scale_", ".qkv.", ".proj.", ".ffn_norm.")
    assert all(name.startswith(NEW) and any(part in name for part in left) for name in set(source) - used)
    assert used <= set(source)
    for i in range(2):
        ours, theirs = f"visual.trunk.stages.3.blocks.0.blocks.{i}.", f"visual.trunk.stages.3.blocks.{i}."
        assert torch.equal(state[ours + "ffn.fc1.weight"], source[theirs + "mlp.fc1.weight"])
        assert torch.equal(state[ours + "norm.running_var"], source[theirs + "norm.running_var"])
    for i in range(4):
        assert torch.equal(state[f"text.layers.0.blocks.{i}.norm.weight"], source[f"text.layers.{i}.norm.weight"])
        assert torch.equal(state[f"text.layers.0.blocks.{i}.ffn.fc2.bias"], source[f"text.layers.{i}.ffn.fc2.bias"])
    new = [name for name in state if in_teacher(name) is None]
    assert len(new) == 2 * 5 + 4 * 5 + 1 + 2  # gains, and qk of either tower
    assert all(torch.equal(state[name], student.state_dict()[name]) for name in new)
    assert not any(name.startswith(NEW) or name == "logit_scale" for name in frozen)
    assert all(torch.equal(state[name], source[name]) for name in [*frozen, "logit_scale"])
    assert len(frozen) + 1 == len([name for name in state if not name.startswith(NEW)])


def test_options(teacher, student):
    source, own = teacher.state_dict(), student.state_dict()
    state, _ = inherit_siclip(own, source, random_ffn=True, keys=True, exact_norm=True)
    ffn = [name for name in state if ".ffn." in name and name.startswith(NEW)]
    assert len(ffn) == 2 * 10 + 4 * 4
    assert all(torch.equal(state[name], own[name]) for name in ffn)
    image, text = "visual.trunk.stages.3.blocks.0.qk.0.weight", "text.layers.0.qk.0."
    assert not state[image][:128].any()
    assert torch.equal(state[image][128:], source["visual.trunk.stages.3.blocks.0.token_mixer.qkv.weight"][128:256])
    for kind in ("weight", "bias"):
        assert torch.equal(state[text + kind][64:], source[f"text.layers.0.qkv.{kind}"][64:128])
    student.load_state_dict(state)
    norm, x = student.visual.trunk.stages[3].blocks[0].blocks[1].norm.eval(), torch.randn(2, 128, 2, 2)
    assert (norm(x) - x).abs().max() <= 1e-6 * x.abs().max()  # its gain is a float32: 1 and a few roundings of 6e-8
    pairs = open_clip.create_model("SiCLIP-tiny").text.layers[0]
    assert pairs.share == 4


def test_keys_of_the_first_block_of_each_group(teacher):
    from training.models.text_tower import TextTower

    tower = TextTower(64, context_length=77, vocab_size=49408, width=64, heads=2, layers=4, kernel_size=11, share=2)
    own = {f"text.{name}": value for name, value in tower.state_dict().items()}
    source = {name: value for name, value in teacher.state_dict().items() if name.startswith("text.")}
    state, _ = inherit_siclip(own, source, keys=True)
    assert torch.equal(state["text.layers.0.qk.1.weight"][64:], source["text.layers.2.qkv.weight"][64:128])


def test_what_does_not_fit_is_named(teacher, student):
    source = dict(teacher.state_dict())
    shape = source["text.ln_final.weight"]
    with pytest.raises(ValueError, match=r"text.ln_final.weight has shape \[64\], text.ln_final.weight .* \[63\]"):
        inherit_siclip(student.state_dict(), {**source, "text.ln_final.weight": shape[:63]})
    del source["text.first.layer_scale"]
    with pytest.raises(ValueError, match=r"the source has no text\.first\.layer_scale"):
        inherit_siclip(student.state_dict(), source)
    grown = inherit({"a": torch.zeros(2), "b": torch.zeros(3)}, {"c": torch.ones(2)}, {"a": "c", "b": None}.get)
    assert {name: value.tolist() for name, value in grown.items()} == {"a": [1, 1], "b": [0, 0, 0]}


def test_mobileclip2_is_another_base():
    image = {"timm_model_name": "mci_tiny", "timm_pool": "avg", "timm_proj": None, "image_size": 64}
    text = {"context_length": 9, "vocab_size": 50, "width": 16, "heads": 2, "layers": 4}
    base = CustomTextCLIP(8, image, {**text, "no_causal_mask": True}).eval()
    own = {"tower": "mct", "kernel_size": 0, **text, "share": 4}
    student = CustomTextCLIP(8, {**image, "timm_model_name": "siclip_tiny"}, own).eval()
    tokens, pixels = torch.randint(50, (5, 9)), torch.rand(2, 3, 64, 64)
    wanted = base.encode_text(tokens), base.encode_image(pixels)
    base = with_text_tower(base)
    assert torch.allclose(base.encode_text(tokens), wanted[0], atol=1e-5)
    state, frozen = inherit_siclip(student.state_dict(), base.state_dict())
    student.load_state_dict(state)
    assert torch.equal(student.text.forward_shared(tokens), base.text.forward_shared(tokens))
    assert torch.equal(forward_tail(base, forward_shared(student, pixels)), wanted[1])
    assert {"text.positional_embedding", "text.text_projection", "text.ln_final.bias"} <= set(frozen)


# fact 6
def test_training_moves_all_that_is_trainable_and_no_bit_of_the_rest(teacher, student):
    state, frozen = inherit_siclip(student.state_dict(), teacher.state_dict())
    student.load_state_dict(state)
    freeze(student, frozen)
    student = copy.deepcopy(student)  # as EMA and DDP's users do
    optimizer = build_optimizer(student, OptimConfig(lr=1e-2))
    for _ in range(3):
        student.train()
        pixels, tokens = torch.rand(6, 3, 64, 64), torch.randint(1, 49407, (6, 77))
        image, text = student.encode_image(pixels, normalize=True), student.encode_text(tokens, normalize=True)
        optimizer.zero_grad()
        clip_loss(image, text, student.logit_scale.exp()).backward()
        optimizer.step()
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, state[name])}
    assert moved == set(state) - set(frozen)
    assert any(name.endswith("num_batches_tracked") for name in moved)
    assert any(name.endswith("num_batches_tracked") for name in frozen)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == {
        name for name, _ in student.named_parameters() if name.startswith(NEW) or name == "logit_scale"
    }


# fact 7
def test_the_prefix_is_one_for_teacher_and_student(teacher, student):
    state, frozen = inherit_siclip(student.state_dict(), teacher.state_dict())
    student.load_state_dict(state)
    freeze(student, frozen)
    student.train()
    pixels, tokens = torch.rand(3, 3, 64, 64), torch.randint(1, 49407, (3, 77))
    with torch.no_grad():
        assert torch.equal(forward_tail(teacher, forward_shared(student, pixels)), teacher.encode_image(pixels))
        assert torch.equal(
            teacher.text.forward_tail(student.text.forward_shared(tokens), tokens), teacher.encode_text(tokens)
        )
        fused = reparameterize_model(teacher)
        student.eval()
        for model in (teacher, student):
            found, whole = forward_tail(model, forward_shared(fused, pixels)), model.encode_image(pixels)
            assert (found - whole).abs().max() < 1e-5
