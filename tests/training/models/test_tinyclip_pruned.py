"""CLIPs with their own heads and neurons per layer: equal to open_clip's, masked as the paper says, cut exactly."""

import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from small_pruned import features, inputs, largest_difference, masked_clip, plain_clip, pruned_clip

from shards_spec.files import UserError
from training.losses.sparsity import TowerSize
from training.models import tinyclip_convert, tinyclip_pruned
from training.models.tinyclip_convert import build_pruned, from_open_clip
from training.models.tinyclip_masks import MAX_LOG_ALPHA, MIN_LOG_ALPHA, MaskValues
from training.models.tinyclip_pruning import (
    attach_masks,
    expected_model_sparsity,
    expected_sparsities,
    kept_units,
    mask_parameters,
    masks_of,
    materialise,
    reshape_like,
    to_full_size,
)
from training.models.tinyclip_table import markdown, model_table, tower_table

KINDS = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "custom text": {"custom_text": True},
    "mean pooling": {"vision": {"pool_type": "avg", "no_ln_pre": True}},
    "norm after the mean": {"vision": {"pool_type": "avg", "final_ln_after_pool": True}},
    "first token, no causal mask": {"text": {"pool_type": "first", "no_causal_mask": True}, "custom_text": True},
    "eos": {"text": {"pool_type": "eos", "eos_id": 49}},
    "tanh": {"vision": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}},
    "attentional pooling": {"vision": {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}},
    "pooling as wide": {
        "vision": {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "pool_type": "avg"},
        "embed_dim": 48,
    },
    "bias": {"init_logit_bias": -10.0, "init_logit_scale": 1.0},
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_open_clip_computes(kind):
    plain, config = plain_clip(**KINDS[kind])
    model, pruned = from_open_clip(plain, config)
    assert not model.training
    names = {
        name.replace("attn_pool.attn.in_proj_weight", "attn_pool.attn.q_proj_weight") for name in plain.state_dict()
    }
    extra = {f"visual.attn_pool.attn.{name}_proj_weight" for name in "kv"} if "wide" in kind else set()
    assert set(model.state_dict()) == set(tinyclip_convert.with_text_prefix(dict.fromkeys(names))) | extra
    assert largest_difference(features(plain), features(model)) < 2e-6
    assert json.loads(json.dumps(pruned)) == pruned
    with torch.enable_grad():  # open_clip's attention has another kernel without a graph
        assert largest_difference(features(plain), features(model)) == 0


def ones(model):
    """Let the masks be exactly 1, whatever their log-alphas."""

    def all_on(masks):
        def sample(_):
            heads, neurons = (
                tuple(torch.ones(count) for count in counts) for counts in (masks.head_counts, masks.neuron_counts)
            )
            return MaskValues(torch.ones(len(masks.dims)), heads, neurons)

        return sample

    for masks in masks_of(model):
        masks.sample = all_on(masks)
    return model.train()


# fact 13
@pytest.mark.parametrize("kind", ["plain", "quick_gelu", "norm after the mean", "mean pooling", "attentional pooling"])
def test_masks_of_ones_change_nothing(kind):
    plain, _ = plain_clip(**KINDS[kind])
    model, config = pruned_clip(**KINDS[kind])
    attach_masks(model, config)
    ones(model)
    with torch.enable_grad():
        assert largest_difference(features(plain), features(model)) < 2e-6
        grads = [
            torch.autograd.grad(sum(feature.sum() for feature in features(own)), own.visual.proj)
            for own in (plain, model)
        ]
    assert largest_difference(*grads) < 2e-5


def reference(tower, x, values, causal, first_norm):
    """The masked blocks as the paper's section has them: one head after the other, norms of gathered dimensions."""
    kept = values.dims.nonzero().flatten()

    def norm(layer, tokens):
        inner = F.layer_norm(tokens[..., kept], (len(kept),), layer.weight[kept], layer.bias[kept], layer.eps)
        return torch.zeros_like(tokens).index_copy(-1, kept, inner)

    x = x * values.dims
    x = norm(first_norm, x) if first_norm is not None else x
    for block, heads, neurons in zip(tower.transformer.resblocks, values.heads, values.neurons, strict=True):
        qkv = F.linear(norm(block.ln_1, x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        width = block.attn.head_dim
        outputs = []
        for head, mask in enumerate(heads):
            query, key, value = (part[..., head * width : (head + 1) * width] for part in qkv)
            logits = query @ key.mT / math.sqrt(width)
            if causal:
                logits = logits + torch.full(logits.shape[1:], -torch.inf, dtype=logits.dtype).triu(1)
            outputs.append(mask * (logits.softmax(-1) @ value))
        x = x + values.dims * block.attn.out_proj(torch.cat(outputs, -1))
        hidden = block.mlp.gelu(block.mlp.c_fc(norm(block.ln_2, x))) * neurons
        x = x + values.dims * block.mlp.c_proj(hidden)
    return x, norm


def reference_features(model, image, text):
    """Both towers' features under the masks ``image`` and ``text``."""
    pixels, tokens = inputs()
    pixels = pixels.to(model.visual.proj.dtype)
    visual = model.visual
    patches = visual.conv1(pixels).flatten(2).mT
    x = torch.cat((visual.class_embedding.expand(len(pixels), 1, -1), patches), 1) + visual.positional_embedding
    x, norm = reference(visual, x, image, False, visual.ln_pre)
    seen = norm(visual.ln_post, x[:, 0]) @ visual.proj
    x, norm = reference(
        model.text, model.text.token_embedding(tokens) + model.text.positional_embedding, text, True, None
    )
    read = norm(model.text.ln_final, x)[torch.arange(len(tokens)), tokens.argmax(1)] @ model.text.text_projection
    return seen, read


@pytest.mark.parametrize("training", [True, False])
def test_the_masked_forward_is_the_papers(training):
    """Features and all gradients in float64, also those of the log-alphas, for a sample and for evaluation."""
    model, _ = masked_clip()
    model.double().train(training)
    draws = [masks.draw().double() for masks in masks_of(model)]
    pixels, tokens = inputs()
    parameters = dict(model.named_parameters())
    del parameters["logit_scale"]

    def gradients(image, text):
        loss = (image * torch.linspace(1, 2, image.numel()).view_as(image)).sum() + (text**2).sum()
        return torch.autograd.grad(loss, list(parameters.values()))

    with torch.enable_grad():
        own = (model.visual(pixels.double(), draws[0]), model.text(tokens, draws[1]))
        theirs = reference_features(model, *(masks(draw) for masks, draw in zip(masks_of(model), draws, strict=True)))
        assert largest_difference(own, theirs) < 1e-12
        for name, mine, expected in zip(parameters, gradients(*own), gradients(*theirs), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-10, msg=name)


def test_dropped_dimensions_are_zero_in_all_of_the_residual_stream():
    model, _ = masked_clip()
    outputs = []
    for block in [*model.visual.transformer.resblocks, *model.text.transformer.resblocks]:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    features(model)
    off = [masks.deterministic().dims == 0 for masks in masks_of(model)]
    assert all(mask.sum() > 5 for mask in off)
    for index, output in enumerate(outputs):
        assert not output[..., off[index // 3]].any()
        assert output[..., ~off[index // 3]].all()


# fact 13
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("custom text", "bias")])
@pytest.mark.parametrize("seed", [0, 1])
def test_materialising_is_exact(kind, seed):
    """Also for a layer without heads and one without neurons; features are normalised, as losses take them."""
    model, config = masked_clip(seed, **KINDS[kind])
    wide = build_pruned(config, model.state_dict()).double().eval()
    before = features(model)
    materialise(model, config)
    after = features(model)
    normalised = [tuple(F.normalize(feature, dim=-1) for feature in pair) for pair in (before, after)]
    assert largest_difference(*normalised) < 1e-6
    pixels, tokens = inputs()
    exact = (wide.encode_image(pixels.double()), wide.encode_text(tokens))
    materialise(wide, dict(config))
    assert largest_difference(exact, (wide.encode_image(pixels.double()), wide.encode_text(tokens))) < 1e-12
    whole = features(pruned_clip(**KINDS[kind])[0])
    for tower, other in zip(before, whole, strict=True):
        assert (tower - other).abs().max() > 0.1
    for tower in (model.visual, model.text):
        own = tower.description
        assert own["heads"][1] == 0
        assert own["neurons"][2] == 0
        assert own["heads"][0] + own["heads"][2] > 0
        names = [name for name in tower.state_dict() if ".1.attn" in name or ".1.ln_1" in name or ".2.mlp" in name]
        assert names == ["transformer.resblocks.1.attn.out_proj.bias", "transformer.resblocks.2.mlp.c_proj.bias"]
        assert tower.transformer.resblocks[1].attn.out_proj.bias.abs().min() > 0


# fact 15
def test_what_is_left_after_materialising():
    model, config = masked_clip()
    sparsity = expected_model_sparsity(model).item()
    kept = [masks.deterministic() for masks in masks_of(model)]
    materialise(model, config)
    assert mask_parameters(model) == []
    assert not [name for name in model.state_dict() if "masks" in name]
    for tower, values, norm in zip((model.visual, model.text), kept, ("ln_post", "ln_final"), strict=True):
        width = int(values.dims.count_nonzero())
        assert getattr(tower, norm).normalized_shape == (width,)
        for block, heads, neurons in zip(tower.transformer.resblocks, values.heads, values.neurons, strict=True):
            if heads.any():
                assert len(block.attn.in_proj_weight) == 3 * 8 * heads.count_nonzero()
                assert block.attn.num_heads == heads.count_nonzero()
                assert block.ln_1.normalized_shape == (width,)
            if neurons.any():
                assert block.mlp.c_fc.out_features == neurons.count_nonzero() == block.mlp.c_proj.in_features
    table = model_table(model)
    assert table["sparsity"] == pytest.approx(sparsity, abs=0.01)
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".attn." in name or ".mlp." in name)
    whole = sum(tower.original.prunable for tower in (model.visual, model.text))
    assert blocks / whole == pytest.approx(1 - table["sparsity"])
    copy = build_pruned(json.loads(json.dumps(config)), model.state_dict()).eval()
    assert largest_difference(features(model), features(copy)) == 0


def test_what_is_told_while_masks_are_trained():
    """Sizes are those of the cut that would be made now, sparsities those that the loss sees."""
    model, config = masked_clip()
    told, sparsities = kept_units(model), expected_sparsities(model)
    assert sparsities["sparsity"] == expected_model_sparsity(model).item()
    for name, masks in zip(("image", "text"), masks_of(model), strict=True):
        assert sparsities[name] == pytest.approx(1 - masks.expected_size().item() / masks.original.prunable, abs=1e-6)
    assert sparsities["image"] < sparsities["sparsity"] < sparsities["text"]
    materialise(model, config)
    assert kept_units(model) == told
    for name, part in (("image", "vision_cfg"), ("text", "text_cfg")):
        assert told[name] == {key: config[part][key] for key in ("width", "heads", "neurons")}


def test_a_tower_without_any_dimension_is_refused():
    model, config = masked_clip()
    model.text.masks.dims.fill_(-30.0)
    with pytest.raises(UserError, match="keep nothing of the tower 'text': give a lower --sparsity"):
        materialise(model, config)


def test_materialising_draws_nothing_and_keeps_the_model():
    model, config = masked_clip()
    model.visual.image_mean = (0.1, 0.2, 0.3)
    model.train().set_grad_checkpointing(True)
    scale = model.logit_scale
    state = torch.get_rng_state()
    materialise(model, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.logit_scale is scale
    assert model.visual.training
    assert model.text.transformer.grad_checkpointing
    assert model.visual.image_mean == (0.1, 0.2, 0.3)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_stage_masks_the_units_that_are_left_and_counts_from_the_whole():
    model, config = masked_clip()
    materialise(model, config)
    first, sparsity = features(model), model_table(model)["sparsity"]
    attach_masks(model, config)
    assert expected_model_sparsity(model).item() == pytest.approx(sparsity, abs=0.01)
    assert largest_difference(features(model), first) < 5e-4
    for masks, tower in zip(masks_of(model), (model.visual, model.text), strict=True):
        assert len(masks.dims) == tower.description["width"]
        assert masks.original == tower.original != TowerSize(*(0,) * 4)
        masks.dims[:4] = -30.0
        masks.neurons[::2] = -30.0
    smaller = features(model)
    materialise(model, config)
    assert largest_difference(features(model), smaller) < 5e-6
    assert model_table(model)["sparsity"] > sparsity + 0.05


# fact 16
@pytest.mark.parametrize("kind", ["plain", "attentional pooling"])
def test_in_full_size_again_it_computes_the_same(kind):
    model, config = masked_clip(**KINDS[kind])
    materialise(model, config)
    cut = features(model)
    to_full_size(model, config)
    assert [tower.description["width"] for tower in (model.visual, model.text)] == [48, 32]
    assert largest_difference(features(model), cut) < 5e-5
    assert {round(value.item()) for value in torch.cat(mask_parameters(model)).unique()} == {-10, 10}
    for masks in masks_of(model):
        masks.clamp()
    values = torch.cat(mask_parameters(model))
    assert (values.max().item(), values.min().item()) == pytest.approx((MAX_LOG_ALPHA, MIN_LOG_ALPHA))


@pytest.mark.parametrize("attach", [True, False])
def test_a_checkpoint_of_another_shape_is_taken_over(attach):
    """As on resume: the student as prepared, and weights from after, or before, the masks were applied."""
    model, config = masked_clip()
    other, other_config = masked_clip(1)
    materialise(other, other_config)
    if attach:
        model, config, other, other_config = other, other_config, model, config
    assert not reshape_like(other, other_config, other.state_dict())
    assert reshape_like(model, config, other.state_dict())
    assert config == other_config
    assert (mask_parameters(model) != []) == attach
    assert largest_difference(features(model), features(other)) == 0
    model.load_state_dict(other.state_dict())


def test_checkpointed_blocks_see_the_same_sample():
    model, _ = masked_clip()
    model.train()
    gradients = []
    pixels, tokens = inputs()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(4)
        with torch.enable_grad():
            loss = model.encode_image(pixels).square().sum() + model.encode_text(tokens).square().sum()
            gradients.append(torch.autograd.grad(loss, [p for n, p in model.named_parameters() if n != "logit_scale"]))
    assert largest_difference(*gradients) == 0


def test_autocast_and_pure_bf16():
    model, config = masked_clip()
    whole = features(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = features(model)
    assert half[0].dtype == torch.bfloat16
    materialise(model, config)
    with torch.autocast("cpu", torch.bfloat16):
        cut = features(model)
    pure = model.bfloat16()
    pixels, tokens = inputs()
    last = (pure.encode_image(pixels.bfloat16()), pure.encode_text(tokens))
    for other in (half, cut, last):
        for mine, theirs in zip(other, whole, strict=True):
            assert F.cosine_similarity(mine.float(), theirs).min() > 0.999


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"layers": [1, 1, 1, 1], "width": 8}, {}, "not ModifiedResNet"),
        ({"timm_model_name": "vit_tiny_patch16_224"}, {}, "not VisionTransformer"),
        ({"attentional_pool": "cascade"}, {}, "two attentional poolings"),
        ({"patch_dropout": 0.5}, {}, "a dropout of patches"),
        ({"ls_init_value": 0.1}, {}, "ResidualAttentionBlock with other parts in its image tower"),
        ({}, {"scale_fc": True}, "CustomResidualAttentionBlock with other parts in its text tower"),
        ({}, {"proj_bias": True}, "a text tower without a plain projection"),
        ({"pos_embed_type": "sin_cos_2d"}, {}, "fixed positions"),
    ],
)
def test_towers_without_support_are_refused_by_name(vision, text, message):
    model, config = plain_clip(vision=vision, text=text)
    with pytest.raises(UserError, match=message):
        from_open_clip(model, config)


def test_other_models_are_refused_by_name():
    model, config = plain_clip(custom_text=True)
    model.text = torch.nn.Identity()
    with pytest.raises(UserError, match="not Identity"):
        from_open_clip(model, config)
    config = {name: plain_clip()[1][name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    coca = open_clip.coca_model.CoCa(**config, multimodal_cfg={**config["text_cfg"]})
    with pytest.raises(UserError, match="not CoCa"):
        from_open_clip(coca, config)


def test_what_is_pruned_already_is_copied():
    model, config = masked_clip()
    copy, same = from_open_clip(model, config)
    assert same == config
    assert copy is not model
    assert largest_difference(features(copy), features(model)) == 0


def test_the_table_of_vit_b_32():
    """Section 6: parameters to the unit, multiplications within one per cent."""
    with torch.device("meta"):
        plain = open_clip.model.CLIP(512, {"patch_size": 32}, {})
    config = {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}}
    model, _ = from_open_clip(plain, config)
    image, text = tower_table(model.visual), tower_table(model.text)
    assert (image.parameters, text.parameters, text.token_embedding) == (87_849_216, 38_131_200, 25_296_896)
    assert (image.blocks, text.blocks) == (85_017_600, 37_804_032)
    assert (image.sparsity, text.sparsity) == (0, 0)
    assert model_table(model)["parameters"] == 151_277_313
    assert image.macs == pytest.approx(4.41e9, rel=0.01)
    assert text.macs == pytest.approx(2.98e9, rel=0.01)


def test_the_table_of_a_pooling():
    """It is no part of the blocks, and its multiplications are those of queries, keys, values and output."""
    pooled = pruned_clip(**KINDS["attentional pooling"])[0]
    plain, own = model_table(pruned_clip()[0])["image"], model_table(pooled)["image"]
    assert own["sparsity"] == 0
    assert own["blocks"] == plain["blocks"]
    assert own["parameters"] == sum(parameter.numel() for parameter in pooled.visual.parameters())
    assert own["macs"] - plain["macs"] == 2 * 17 * 48 * 16 + 2 * 5 * 16 * 16 + 2 * 5 * 17 * 16 + (16 - 48) * 16


def test_the_table_in_markdown():
    model, config = masked_clip()
    materialise(model, config)
    lines = markdown(model).splitlines()
    assert [line.count("|") for line in lines] == [8] * 5
    own = model.visual.description
    assert lines[2].startswith(f"| image | {own['width']} | {' '.join(map(str, own['heads']))} | ")
    assert model_table(model)["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert json.loads(json.dumps(model_table(model)))["image"]["heads"] == own["heads"]


def test_constants_of_layers_without_units_are_trained():
    model, config = masked_clip()
    materialise(model, config)
    with torch.enable_grad():
        sum(feature.sum() for feature in features(model.train())).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None and name != "logit_scale"]
    assert missing == []
    assert isinstance(model.visual.transformer.resblocks[1].attn.out_proj, tinyclip_pruned.ConstantLinear)
