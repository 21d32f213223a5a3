"""TinyCLIP's students: sizes, activations, timm's towers, folders for open_clip alone, and the released checkpoints."""

import json
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP
from small_apple import released_names
from small_training import tiny_config, write_packed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shards_spec.files import UserError
from shards_spec.models import load_model, load_teacher
from training.config import ModelConfig
from training.export import ExportConfig, export
from training.models.tinyclip import CONFIGS, _convert_state_dict, from_released, irregular_tensor, student_name
from training.runs.student import load_run, load_student
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

SMALLEST = "TinyCLIP-ViT-8M-16-Text-3M"
TOKENS = 25_296_896
# image parameters, text without token embedding, token embedding, total, GMACs of an image and of a text
SIZES = {
    "TinyCLIP-ViT-61M-32-Text-29M": (61_411_200, 28_674_048, TOKENS, 115_382_145, 3.08, 2.24),
    "TinyCLIP-ViT-40M-32-Text-19M": (39_691_776, 19_216_896, TOKENS, 84_205_569, 2.00, 1.49),
    "TinyCLIP-ViT-39M-16-Text-19M": (38_587_392, 19_216_896, TOKENS, 83_101_185, 7.99, 1.49),
    SMALLEST: (8_276_992, 2_520_576, 12_648_448, 23_446_017, 1.79, 0.19),
    "TinyCLIP-ResNet-30M-Text-29M": (29_583_780, 28_936_192, TOKENS, 83_816_869, 4.69, 2.24),
    "TinyCLIP-ResNet-19M-Text-19M": (18_596_766, 19_479_040, TOKENS, 63_372_703, 2.92, 1.49),
    "ViT-B-32": (87_849_216, 38_131_200, TOKENS, 151_277_313, 4.41, 2.98),
    "ViT-B-16": (86_192_640, 38_131_200, TOKENS, 149_620_737, 17.56, 2.98),
    "RN50": (38_316_896, 38_393_344, TOKENS, 102_007_137, 6.11, 2.98),
}
STATISTICS = {"RN50": 53_303, "TinyCLIP-ResNet-30M-Text-29M": 46_647, "TinyCLIP-ResNet-19M-Text-19M": 36_663}
TIMM = {
    "TinyCLIP-ViT-61M-32-Text-29M": "vit_betwixt_patch32_clip_224",
    "TinyCLIP-ViT-40M-32-Text-19M": "vit_medium_patch32_clip_224",
    "TinyCLIP-ViT-39M-16-Text-19M": "vit_medium_patch16_clip_224",
    SMALLEST: "vit_xsmall_patch16_clip_224",
}


def on_meta(name):
    """A model of names and shapes alone."""
    with torch.device("meta"):
        return CLIP(**open_clip.get_model_config(name))


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


# fact 7
@pytest.mark.parametrize("name", SIZES)
def test_parameters_to_the_unit(name):
    model = on_meta(name)
    image, tokens = count(model.visual.parameters()), count(model.token_embedding.parameters())
    total = count(model.parameters())
    assert (image, total - image - tokens - 1, tokens, total) == SIZES[name][:4]
    assert count(model.visual.buffers()) == STATISTICS.get(name, 0)


# fact 7
@pytest.mark.parametrize("name", SIZES)
def test_multiplications_to_a_percent(name):
    model = on_meta(name)
    inputs = torch.empty(1, 3, 224, 224, device="meta"), torch.empty(1, 77, dtype=torch.long, device="meta")
    for encode, value, published in zip((model.encode_image, model.encode_text), inputs, SIZES[name][4:], strict=True):
        with FlopCounterMode(display=False) as counter:
            encode(value)
        found = counter.get_total_flops() / 2e9  # a multiplication and an addition are two
        assert abs(found - published) <= 0.01 * published + 0.005, found  # they are published with two decimals


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_gelu_is_exact_unless_the_name_says_otherwise(path):
    model = on_meta(path.stem)
    activations = {type(module) for module in model.modules() if "GELU" in type(module).__name__}
    if path.stem.endswith("-quickgelu"):
        assert activations == {open_clip.transformer.QuickGELU}
        plain = json.loads(path.with_stem(path.stem.removesuffix("-quickgelu")).read_text())
        assert json.loads(path.read_text()) == plain | {"quick_gelu": True}
    else:
        assert activations == {nn.GELU}
        assert {module.approximate for module in model.modules() if isinstance(module, nn.GELU)} == {"none"}
    epsilons = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    assert epsilons == {1e-5}
    names = {path.stem.removesuffix("-quickgelu") for path in CONFIGS.glob("*.json")}
    assert names == {name for name in SIZES if name.startswith("TinyCLIP")}


def test_images_are_normalised_as_openais():
    model = load_model(SMALLEST, random_weights=True)
    assert model.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert model.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert model.image_size == 224


@pytest.mark.parametrize("name", TIMM)
def test_timm_computes_the_same_of_the_image_towers(name):
    torch.manual_seed(0)
    tower = CLIP(**open_clip.get_model_config(name)).visual.eval()
    state = {f"visual.{key}": value + 0.05 * torch.randn_like(value) for key, value in tower.state_dict().items()}
    tower.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    other = timm.create_model(TIMM[name], num_classes=512).eval()
    other.load_state_dict(checkpoint_filter_fn(state, other))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted, found = tower(images), other(images)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.fixture(scope="module")
def student_run(tmp_path_factory):
    """The folder of a step of the smallest student."""
    root = tmp_path_factory.mktemp("run")
    write_packed(str(root), [4])
    config = tiny_config("clip", str(root), str(root / "out"), steps=1, model=SMALLEST, batch_size=2)
    return train("clip", config)


OPEN_CLIP_ALONE = """
import sys, torch, open_clip
model, _, _ = open_clip.create_model_and_transforms("local-dir:" + sys.argv[1])
tokens = open_clip.get_tokenizer("local-dir:" + sys.argv[1])(["a red ball"])
images = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
with torch.no_grad():
    torch.save([model.eval().encode_image(images), model.encode_text(tokens)], sys.argv[2])
assert not {"training", "shards_spec", "clipmill"} & set(sys.modules)
"""


@pytest.mark.slow
def test_an_exported_folder_needs_open_clip_alone(student_run, tmp_path):
    folder = tmp_path / "exported"
    export(ExportConfig(student_run, str(folder)))
    arguments = [sys.executable, "-c", OPEN_CLIP_ALONE, str(folder), str(tmp_path / "features.pt")]
    subprocess.run(arguments, cwd=tmp_path, env={"PATH": "", "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    image, text = torch.load(tmp_path / "features.pt")
    model = load_run(student_run)[0]
    with torch.no_grad():
        assert torch.equal(model.model.encode_text(model.tokenizer(["a red ball"])), text)
        images = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
        assert torch.equal(model.model.encode_image(images), image)
    file = {"file": str(folder / "open_clip_model.safetensors")}
    tower = timm.create_model(TIMM[SMALLEST], pretrained=True, pretrained_cfg_overlay=file).eval()
    with torch.no_grad():
        assert torch.allclose(tower(images), image, atol=1e-5)


# released checkpoints


def released(state, image="_image_encoder.module.", text="_text_encoder.module.", scale="_logit_scale.module."):
    """A state dict under the authors' names, in fp16."""
    places = {}
    for name, value in state.items():
        prefix = image if name.startswith("visual.") else text
        places[(scale if name == "logit_scale" else prefix) + name] = value.half()
    return places


WITHOUT_DDP = {
    "image": "image_encoder_without_ddp.",
    "text": "text_encoder_without_ddp.",
    "scale": "logit_scale_without_ddp.",
}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(3)
    return CLIP(**open_clip.get_model_config(SMALLEST)).state_dict()


def small():
    """A few tensors of a CLIP."""
    return {"visual.proj": torch.ones(4, 2), "ln_final.weight": torch.ones(4), "logit_scale": torch.tensor(3.0)}


@pytest.mark.parametrize(
    "names",
    [
        {},
        WITHOUT_DDP,
        {"image": "_image_encoder.", "text": "_text_encoder.", "scale": "_logit_scale."},
        {
            "image": "module._image_encoder.module.",
            "text": "module._text_encoder.",
            "scale": "_logit_scale.module.module.",
        },
        {"scale": ""},
        {"scale": "module."},
    ],
)
def test_names_of_the_authors_become_open_clips(names):
    found = from_released(released(small(), **names))
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in small().items()}
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_one_tensor_under_both_names_is_one():
    both = released(small()) | released(small(), **WITHOUT_DDP)
    assert set(from_released(both)) == set(small())
    both["text_encoder_without_ddp.ln_final.weight"] += 1
    with pytest.raises(ValueError, match=r"_text_encoder.module.ln_final.weight and text_encoder_without_ddp.ln_final"):
        from_released(both)


def test_other_state_dicts_are_not_the_authors():
    assert from_released(small()) is None
    assert from_released(dict.fromkeys(released_names((2, 6, 10, 2)), torch.ones(1))) is None  # Apple's
    assert from_released({"logit_scale.x": torch.ones(1)}) is None


def test_half_a_model_and_two_models_are_named():
    names = released(small())
    image = {name: value for name, value in names.items() if "text_encoder" not in name}
    with pytest.raises(
        ValueError, match=r"_image_encoder.module.visual.proj, are of one tower; the text tower is missing"
    ):
        from_released(image)
    with pytest.raises(ValueError, match=r"text.ln_final.weight stands beside TinyCLIP's _image_encoder.module.visual"):
        from_released(names | {"text.ln_final.weight": torch.ones(4)})
    masks = names | {"_image_encoder.module.l0_module.hidden_loga": torch.ones(4)}
    with pytest.raises(ValueError, match=r"l0_module.hidden_loga is a mask that was not yet applied"):
        from_released(masks)


def test_the_file_of_another_student_is_named():
    for name in (name for name in SIZES if name.startswith("TinyCLIP")):
        state = on_meta(name).state_dict()
        assert student_name(state) == name
        assert irregular_tensor(state) is None
        assert _convert_state_dict(on_meta(name), released(state)).keys() == state.keys()
        other = "TinyCLIP-ResNet-19M-Text-19M" if name == SMALLEST else SMALLEST
        with pytest.raises(ValueError, match=f"it is {name} .*name that model"):
            _convert_state_dict(on_meta(other), released(state))
    assert student_name(on_meta("ViT-B-32").state_dict()) is None


def test_a_model_that_masks_cut_is_named():
    state = on_meta(SMALLEST).state_dict()
    fewer = "visual.transformer.resblocks.2.attn.in_proj_weight"
    with pytest.raises(ValueError, match=f"by {fewer} learned masks cut this model"):
        _convert_state_dict(on_meta(SMALLEST), released(state | {fewer: torch.empty(3 * 64, 256)}))
    neurons = "transformer.resblocks.0.mlp.c_fc.weight"
    assert irregular_tensor(state | {neurons: torch.empty(1000, 256)}) == neurons
    gone = {name: value for name, value in state.items() if "transformer.resblocks.1.attn" not in name}
    assert irregular_tensor(gone).startswith("visual.transformer.resblocks.1.attn.")


def test_a_released_file_loads_wherever_a_model_is_named(weights, tmp_path):
    file = tmp_path / "TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.pt"
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save(
        {"epoch": 25, "name": "x", "state_dict": released(weights), "optimizer": [optimizer], "scaler": {}}, file
    )
    loaders = (
        lambda: load_model(SMALLEST, str(file)),
        lambda: load_teacher(SMALLEST, str(file)),
        lambda: load_student(ModelConfig(SMALLEST, str(file)), 0),
    )
    for load in loaders:
        found = load().model.state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], value.half().float()) for name, value in weights.items())


def test_a_file_that_does_not_fit_is_named_with_its_key_and_the_fix(tmp_path):
    file = tmp_path / "mixed.pt"
    torch.save(released(small()) | {"visual.trunk.x": torch.ones(1)}, file)
    with pytest.raises(UserError) as error:
        load_model(SMALLEST, str(file))
    text = str(error.value)
    assert text.startswith(f"{file} does not fit {SMALLEST}: visual.trunk.x stands beside TinyCLIP's _image_encoder")
    assert text.endswith("take a file of one model")
    torch.save(released(small()), file)
    with pytest.raises(UserError, match=r"mixed.pt does not fit .*weights missing"):
        load_model(SMALLEST, str(file))
