"""SiCLIP's towers against float64 NumPy written from the papers' formulas, their counts, names and inference form."""

import math
from itertools import chain, product

import numpy as np
import open_clip
import pytest
import timm
import torch
from small_apple import released_names
from small_training import tiny_config, write_packed
from timm.models.fastvit import ConvMlp, checkpoint_filter_fn
from timm.utils import reparameterize_model
from torch import nn

from shards_spec.files import UserError
from shards_spec.models import load_model
from training.config import OptimConfig
from training.engine.optim import build_optimizer, param_groups
from training.export import ExportConfig, export
from training.models.mobileclip import forward_shared, forward_tail, from_apple, our_name
from training.models.siclip import SasBlock, SasStack, shaped_matrices
from training.models.text_tower import FeedForward, TextTower
from training.runs.student import load_run
from training.trainer import train

HEAD_BIAS = 512  # timm's head has one, Apple's projection has none


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


def shaken(module, seed=0):
    """The module in eval mode with nothing left at 0, 1 or 1e-5: norms, statistics, layer scales, gains, Wq."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=draw)
        elif "layer_scale" in name:
            tensor.uniform_(0.2, 0.6, generator=draw)
        elif tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw))
    return module.eval()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def arrays(module):
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


# NumPy, float64. Tokens are (B, T, C), images (B, C, H, W).


def np_softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def np_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def np_layer_norm(x, p, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def np_batch_norm(x, p, name):
    """Over the last dimension, by the stored statistics."""
    x = (x - p[f"{name}.running_mean"]) / np.sqrt(p[f"{name}.running_var"] + 1e-5)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def np_linear(x, p, name):
    weight = p[f"{name}.weight"]
    return x @ weight.reshape(weight.shape[:2]).T + p.get(f"{name}.bias", 0)


def np_ffn(x, p, name):
    return np_linear(np_gelu(np_linear(x, p, f"{name}.fc1")), p, f"{name}.fc2")


def np_heads(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def np_attention(query, key, heads, mask=None):
    logits = np_heads(query, heads) @ np_heads(key, heads).transpose(0, 1, 3, 2)
    logits = logits / math.sqrt(query.shape[-1] // heads)
    return np_softmax(logits if mask is None else np.where(mask, logits, -np.inf))


def np_shaped(x, p, qk, heads, mask=None):
    """S (B, H, T, T) of normalised tokens; ``p`` holds alpha, beta, gamma and ``qk`` the two matrices and biases."""
    query, key = np.split(np_linear(x, qk, "qk"), 2, -1)
    tokens = x.shape[1]
    visible = np.ones((tokens, tokens), bool) if mask is None else mask
    uniform = visible / visible.sum(1, keepdims=True)
    a, b, c = (p[name].reshape(-1, 1, 1) for name in ("alpha", "beta", "gamma"))
    return a * np.eye(tokens) + b * np_attention(query, key, heads, visible) - c * uniform


def np_mixed(shaped, x):
    """S_h X_h of all heads side by side."""
    return (shaped @ np_heads(x, shaped.shape[1])).transpose(0, 2, 1, 3).reshape(x.shape)


def np_depthwise(x, kernel):
    """(B, T, C) with (C, 1, K), zeros outside."""
    reach = kernel.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (0, 0)))
    return sum(padded[:, k : k + x.shape[1]] * kernel[:, 0, k] for k in range(kernel.shape[-1]))


def np_rep_mixer_block(x, p, name):
    n = f"{name}.token_mixer."
    mixed = np_batch_norm(np_depthwise(x, p[n + "conv.weight"]), p, n + "bn") + np_batch_norm(x, p, n + "skip")
    x = x + p[n + "layer_scale"] * (mixed - np_batch_norm(x, p, n + "norm"))
    inner = np_batch_norm(np_depthwise(x, p[f"{name}.conv.conv.weight"]), p, f"{name}.conv.bn")
    return x + p[f"{name}.layer_scale"] * np_ffn(inner, p, f"{name}.ffn")


def np_text_tower(tokens, p, heads, layers):
    """MobileCLIP-S0's text tower: no mask."""
    x = np_rep_mixer_block(p["token_embedding.weight"][tokens] + p["positional_embedding"], p, "first")
    for layer in range(layers):
        n = f"layers.{layer}."
        query, key, value = np.split(np_linear(np_layer_norm(x, p, n + "norm"), p, n + "qkv"), 3, -1)
        x = x + np_linear(np_mixed(np_attention(query, key, heads), value), p, n + "proj")
        x = x + np_ffn(np_layer_norm(x, p, n + "ffn_norm"), p, n + "ffn")
    x = np_layer_norm(np_rep_mixer_block(x, p, "last"), p, "ln_final")
    return x[np.arange(len(x)), tokens.argmax(-1)] @ p["text_projection"]


def text_block(dim=16, heads=2, seed=0):
    torch.manual_seed(seed)
    return SasStack([SasBlock(nn.LayerNorm(dim), FeedForward(dim), heads)], dim, bias=True, share=1)


def image_block(dim=16, heads=2, seed=0):
    torch.manual_seed(seed)
    return SasStack([SasBlock(nn.BatchNorm2d(dim), ConvMlp(dim, 24), heads)], dim, bias=False, share=1)


def parts_of(stack):
    """The only block's parameters and the only qk's, as arrays."""
    return arrays(stack.blocks[0]), {f"qk.{name}": value for name, value in arrays(stack.qk[0]).items()}


# fact 1
def test_parameters_of_the_towers():
    base, student = open_clip.create_model("MobileCLIP-S0"), open_clip.create_model("SiCLIP-S0")
    assert (count(base.visual) - HEAD_BIAS, count(base.text)) == (11_406_464, 42_441_216)
    assert count(base) - HEAD_BIAS == 53_847_681
    assert (count(student.visual) - HEAD_BIAS, count(student.text)) == (9_830_628, 38_760_040)
    assert count(student) - HEAD_BIAS == 48_590_669
    new = [student.visual.trunk.stages[3].blocks, student.text.layers]
    assert [count(part) for part in new] == [3_728_484, 8_928_360]
    # inference form
    assert count(reparameterize_model(base.visual)) - HEAD_BIAS == 11_356_992
    assert count(reparameterize_model(student.visual)) - HEAD_BIAS == 9_781_156
    # Apple's names, in both directions
    named = {our_name(name) for name in released_names((2, 6, 10, 2))}
    assert set(base.state_dict()) - named == {"visual.trunk.head.fc.bias"}
    assert named <= set(base.state_dict())
    # pixels in [0, 1], also without a tag
    assert {*base.visual.preprocess_cfg["mean"]} == {0.0}
    assert {*student.visual.preprocess_cfg["std"]} == {1.0}


def s0_text_tower(**options):
    return TextTower(512, context_length=77, vocab_size=49408, width=512, heads=8, **options)


def small_text_tower(**options):
    return TextTower(8, context_length=7, vocab_size=20, width=16, heads=2, **options)


# fact 1, other sharing
def test_parameters_of_other_groups():
    unshared = timm.create_model("siclip_mci0", num_classes=512, share=1)
    assert count(unshared) - HEAD_BIAS == 10_354_916
    sizes = [count(s0_text_tower(layers=4, kernel_size=11, share=share)) for share in (1, 2)]
    assert sizes == [40_335_976, 39_285_352]
    sizes = [count(s0_text_tower(layers=12, kernel_size=0, share=share)) for share in (1, 2, 12)]
    assert sizes == [57_112_376, 53_960_504, 51_333_944]  # of MobileCLIP2-S0's
    with pytest.raises(ValueError, match="share 3"):
        TextTower(8, context_length=5, vocab_size=9, width=8, heads=2, layers=4, kernel_size=3, share=3)


# fact 2
@pytest.mark.parametrize("make", [text_block, image_block])
def test_a_new_block_mixes_nothing(make):
    stack = make().eval()
    block, qk = parts_of(stack)
    x = torch.randn(3, 9, 16)
    shaped = np_shaped(x.double().numpy(), block, qk, 2)
    assert np.abs(np_mixed(shaped, x.numpy()) - x.numpy()).max() < 1e-6
    assert np.abs(shaped.sum(-1) - 1).max() < 1e-12
    assert (stack.blocks[0].mix(x, stack.qk[0]) - x).abs().max() < 1e-5
    query, key = (side.unflatten(-1, (2, -1)).transpose(1, 2) for side in stack.qk[0](x).chunk(2, -1))
    gains = [torch.rand(2) for _ in range(3)]
    rows = shaped_matrices(query, key, *gains).sum(-1)
    assert torch.allclose(rows, (gains[0] + gains[1] - gains[2]).view(1, 2, 1).expand_as(rows), atol=1e-6)


# fact 3
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("make", [text_block, image_block])
def test_both_forms_of_shaped_attention(make, causal):
    stack = make().double()
    x, mask = torch.randn(3, 9, 16).double(), torch.ones(9, 9).tril().bool() if causal else None
    assert (stack.blocks[0].mix(x, stack.qk[0], mask) - x).abs().max() < 1e-5  # a new block's identity
    shaken(stack)
    nn.init.normal_(stack.qk[0].weight, std=0.7)  # attention far from uniform
    block, qk = parts_of(stack)
    shaped = np_shaped(x.numpy(), block, qk, 2, None if mask is None else mask.numpy())
    expected = block["beta_sa"] * np_mixed(shaped, x.numpy())
    mixed = stack.blocks[0].mix(x, stack.qk[0], mask).detach().numpy()
    assert np.abs(mixed - expected).max() < 1e-6  # the uniform part, 1/n, is a float32
    query, key = (side.unflatten(-1, (2, -1)).transpose(1, 2) for side in stack.qk[0](x).chunk(2, -1))
    gains = (stack.blocks[0].alpha, stack.blocks[0].beta, stack.blocks[0].gamma)
    assert np.abs(shaped_matrices(query, key, *gains, mask=mask).detach().numpy() - shaped).max() < 1e-6
    if causal:
        none = torch.zeros(1, 2, 9, 8)
        uniform = shaped_matrices(none, none, torch.zeros(2), torch.ones(2), torch.zeros(2), mask=mask)
        assert torch.allclose(uniform[0, 0].sum(-1), torch.ones(9))
        assert torch.allclose(uniform[0, 0, :, 0], 1 / torch.arange(1.0, 10))


def test_a_text_block_is_its_formula():
    stack, x = shaken(text_block()).double(), torch.randn(3, 9, 16).double()
    nn.init.normal_(stack.qk[0].weight, std=0.7)
    block, qk = parts_of(stack)
    normed = np_layer_norm(x.numpy(), block, "norm")
    expected = block["beta_sa"] * np_mixed(np_shaped(normed, block, qk, 2), normed)
    expected = expected + block["beta_ff"] * np_ffn(normed, block, "ffn")
    assert np.abs(stack(x).detach().numpy() - expected).max() < 1e-12


def test_an_image_block_is_its_formula():
    stack, x = shaken(image_block()).double(), torch.randn(3, 16, 2, 3).double()
    nn.init.normal_(stack.qk[0].weight, std=0.7)
    block, qk = parts_of(stack)
    normed = np_batch_norm(x.numpy().transpose(0, 2, 3, 1), block, "norm")
    padded, kernel = np.pad(normed, ((0, 0), (3, 3), (3, 3), (0, 0))), block["ffn.conv.conv.weight"][:, 0]
    conv = sum(padded[:, i : i + 2, j : j + 3] * kernel[:, i, j] for i, j in product(range(7), repeat=2))
    tokens = normed.reshape(3, 6, 16)
    expected = block["beta_sa"] * np_mixed(np_shaped(tokens, block, qk, 2), tokens)
    expected = expected + block["beta_ff"] * np_ffn(np_batch_norm(conv, block, "ffn.conv.bn"), block, "ffn").reshape(
        3, 6, 16
    )
    found = stack(x).detach().flatten(2).mT.numpy()
    assert np.abs(found - expected).max() < 1e-12


# fact 4
@pytest.mark.parametrize("make", [text_block, image_block])
def test_gradients_of_the_first_step(make):
    stack = make()
    x = torch.randn(4, 9, 16) if make is text_block else torch.randn(4, 16, 3, 3)
    (stack(x) * torch.randn_like(x)).sum().backward()
    block, gradient = stack.blocks[0], stack.qk[0].weight.grad
    assert gradient[:16].abs().max() > 1e-4
    assert gradient[16:].abs().max() == 0
    assert block.beta.grad.abs().min() > 1e-4
    assert torch.allclose(block.beta.grad, -block.gamma.grad, rtol=1e-4, atol=1e-5)


# fact 5
def test_shared_matrices_are_one_tensor_and_get_both_gradients():
    shared = shaken(small_text_tower(layers=4, kernel_size=3, share=4)).train()
    apart = shaken(small_text_tower(layers=4, kernel_size=3, share=1)).train()
    state = {name: value for name, value in shared.state_dict().items() if ".qk." not in name}
    for kind in ("weight", "bias"):
        value = shared.state_dict()[f"layers.0.qk.0.{kind}"]
        state |= {f"layers.0.qk.{i}.{kind}": value for i in range(4)}
    apart.load_state_dict(state)
    tokens = torch.randint(20, (5, 7))
    weights = torch.randn(5, 8)
    for tower in (shared, apart):
        (tower(tokens) * weights).sum().backward()
    for kind in ("weight", "bias"):
        total = sum(getattr(qk, kind).grad for qk in apart.layers[0].qk)
        assert torch.allclose(getattr(shared.layers[0].qk[0], kind).grad, total, rtol=1e-4, atol=1e-5)
    groups = build_optimizer(shared, OptimConfig()).param_groups
    held = list(chain.from_iterable(group["params"] for group in groups))
    assert sum(p is shared.layers[0].qk[0].weight for p in held) == 1
    assert len({tensor.data_ptr() for tensor in shared.state_dict().values()}) == len(shared.state_dict())


def test_gains_do_not_decay_and_matrices_do():
    decayed, exempt = (group.params for group in param_groups(text_block(), 0.1))
    assert sorted(p.ndim for p in decayed) == [2, 2, 2]
    assert sum(p.numel() for p in exempt if p.ndim == 0) == 2
    assert all(p.ndim <= 1 for p in exempt)


# section 4.2 of MobileCLIP, by way of its released layout
def test_the_text_tower_is_its_formula():
    torch.manual_seed(0)
    tower = shaken(small_text_tower(layers=3, kernel_size=5, share=0))
    tokens = torch.randint(20, (5, 7))
    expected = np_text_tower(tokens.numpy(), arrays(tower), 2, 3)
    assert np.abs(tower(tokens).detach().numpy() - expected).max() < 1e-4
    fused = reparameterize_model(tower)
    assert np.abs(fused(tokens).detach().numpy() - expected).max() < 1e-4
    assert (fused(tokens) - tower(tokens)).abs().max() < 1e-5
    assert "first.token_mixer.norm.weight" not in fused.state_dict()
    assert "first.token_mixer.norm.weight" in tower.state_dict()


@pytest.mark.parametrize("name", ["MobileCLIP-tiny", "SiCLIP-tiny"])
def test_inference_form_and_split_change_nothing(name):
    model = shaken(open_clip.create_model(name))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data.div_(2)  # keeps 30 layers of shaken weights in range
    pixels, tokens = torch.rand(2, 3, 64, 64), torch.randint(1, 400, (2, 77))
    fused = reparameterize_model(model)
    with torch.no_grad():
        images, texts = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        assert (fused.encode_image(pixels, normalize=True) - images).abs().max() < 1e-5
        assert (fused.encode_text(tokens, normalize=True) - texts).abs().max() < 1e-5
        assert torch.equal(forward_tail(model, forward_shared(model, pixels)), model.visual(pixels))
        assert torch.equal(model.text.forward_tail(model.text.forward_shared(tokens), tokens), model.text(tokens))
        assert len({tuple(row.tolist()) for row in images}) == 2


def released(state):
    """A state dict of our tiny MobileCLIP under Apple's names and in Apple's shapes."""
    found = {}
    for name in released_names((1, 1, 1, 2)):
        value = state[our_name(name)]
        text = name.startswith("text_encoder.transformer") and "norm.weight" not in name
        if name.endswith("head.proj"):
            value = value.T
        elif name.endswith("pos_embed"):
            value = value[None, None]
        elif text and name.endswith("conv.weight"):
            value = value[:, :, None]
        elif text and ".convffn.fc" in name and value.ndim == 2:
            value = value[..., None, None]
        elif text and name.endswith("layer_scale"):
            value = value[:, None, None]
        found[name] = value
    return found


def test_apples_file_loads_by_name(tmp_path):
    torch.manual_seed(0)
    model = shaken(open_clip.create_model("MobileCLIP-tiny"))
    nn.init.zeros_(model.visual.trunk.head.fc.bias)
    state = released(model.state_dict())
    assert state["text_encoder.transformer.5.token_mixer.mixer.rbr_conv.0.conv.weight"].shape == (64, 1, 1, 11)
    torch.save(state, tmp_path / "mobileclip.pt")
    loaded = load_model("MobileCLIP-tiny", str(tmp_path / "mobileclip.pt"))
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert (loaded.mean, loaded.std, loaded.image_size) == ((0.0,) * 3, (1.0,) * 3, 64)
    theirs = checkpoint_filter_fn(dict(state), model.visual.trunk)  # timm's own reading of the image tower
    assert all(torch.equal(value, model.visual.trunk.state_dict()[name]) for name, value in theirs.items())
    # errors
    lost = "text_encoder.transformer.3.pre_norm_ffn.4.bias"
    with pytest.raises(ValueError, match=r"1 tensors \(extra.0\) left over, none missing"):
        from_apple({**state, "extra.0": state[lost]}, model.state_dict())
    with pytest.raises(ValueError, match=r"none left over, 1 tensors \(text.layers.2.ffn.fc2.bias\) missing"):
        from_apple({name: value for name, value in state.items() if name != lost}, model.state_dict())
    with pytest.raises(ValueError, match=r"text.layers.2.ffn.fc2.bias has shape \[63\]"):
        from_apple({**state, lost: state[lost][:63]}, model.state_dict())
    torch.save({**state, lost: state[lost][:63]}, tmp_path / "broken.pt")
    with pytest.raises(UserError, match="no MobileCLIP-S0"):
        load_model("MobileCLIP-tiny", str(tmp_path / "broken.pt"))


def test_a_run_trains_evaluates_and_exports(tmp_path):
    write_packed(str(tmp_path), [9, 8])
    out = str(tmp_path / "run")
    train("clip", tiny_config("clip", str(tmp_path), out, model="SiCLIP-tiny", steps=2))
    student, step = load_run(out)
    assert step == 2
    assert student.mean == (0.0, 0.0, 0.0)
    export(ExportConfig(run=out, to=str(tmp_path / "exported")))
    image, tokens = torch.rand(1, 3, 64, 64), student.tokenizer(["a red square"])
    again = load_model(f"local-dir:{tmp_path / 'exported'}")
    assert again.config["text_cfg"]["share"] == 4
    assert (again.model.encode_image(image) - student.model.encode_image(image)).abs().max() < 1e-5
    assert (again.model.encode_text(tokens) - student.model.encode_text(tokens)).abs().max() < 1e-5


def test_mixed_precision_and_recomputation():
    model = open_clip.create_model("SiCLIP-tiny").train()
    pixels, tokens = torch.rand(4, 3, 64, 64), torch.randint(1, 400, (4, 77))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.encode_image(pixels).float().square().sum() + model.encode_text(tokens).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if name != "logit_scale")
    once = model.text(tokens).detach()
    model.set_grad_checkpointing()
    again = model.text(tokens)
    again.sum().backward()
    assert torch.allclose(again, once, atol=1e-6)
    bf16 = open_clip.create_model("SiCLIP-tiny", precision="pure_bf16").eval()
    assert bf16.encode_text(tokens).dtype == bf16.encode_image(pixels.bfloat16()).dtype == torch.bfloat16
