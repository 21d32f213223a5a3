"""What `clipmill eval --cost` says, where it can be counted by hand."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_training import DIM, tiny_clip, tiny_siclip, train_short
from torch import nn

from shards_spec.files import UserError
from training.config import ModelConfig
from training.evaluation.config import EvalConfig
from training.evaluation.cost import (
    BATCH,
    CLEAR_REFS,
    _peak_memory,
    count_macs,
    inference_form,
    measure_cost,
    weights_bytes,
)
from training.evaluation.stage import evaluate
from training.models.classifier import new_classifier
from training.models.parameter_count import count_parameters
from training.models.weight_tying import tie
from training.runs.student import new_student

WIDTH = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return new_student(ModelConfig(tiny_clip(tmp_path_factory.mktemp("model") / "clip")), 0)


@pytest.fixture(scope="module")
def siclip(tmp_path_factory):
    return new_student(ModelConfig(tiny_siclip(tmp_path_factory.mktemp("model") / "siclip")), 0)


def test_parameters_by_hand(clip):
    counts = count_parameters(clip.model)
    block = 12 * WIDTH**2 + 13 * WIDTH  # attention 4 W² + 4 W, MLP 8 W² + 5 W, two norms of 2 W
    vocabulary = clip.config["text_cfg"]["vocab_size"]
    assert counts["image"] == 3 * 16**2 * WIDTH + WIDTH + 5 * WIDTH + 2 * 2 * WIDTH + block + WIDTH * DIM
    assert counts["text"] == 16 * WIDTH + block + 2 * WIDTH + WIDTH * DIM
    assert (counts["embedding"], counts["other"]) == (vocabulary * WIDTH, 1)
    assert counts["total"] == sum(parameter.numel() for parameter in clip.model.parameters())


def test_multiplications_by_hand(clip):
    tokens = 5  # of an image of 32 pixels: four patches and the class token
    block = tokens * 12 * WIDTH**2 + 2 * tokens**2 * WIDTH
    expected = 4 * 3 * 16**2 * WIDTH + block + WIDTH * DIM
    assert count_macs(clip.model.encode_image, torch.zeros(1, 3, 32, 32)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_is_tied_counts_once():
    blocks = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(4))
    model = nn.Module()
    model.blocks = blocks
    whole = count_parameters(model)["total"], weights_bytes(model)
    tie(model.blocks, (0, 0, 1, 1), ("mlp",), "first")
    assert count_parameters(model)["total"] == whole[0] - 2 * 72
    assert weights_bytes(model) == whole[1] - 4 * 2 * 72 + 8 * 4  # less two MLPs, and the map of blocks to groups


def test_form_for_inference_is_measured_and_the_model_stays(siclip):
    before = {name: value.clone() for name, value in siclip.model.state_dict().items()}
    cost = measure_cost(siclip, ["cpu"], in_a_row=2)
    assert cost["parameters"]["inference"] < cost["parameters"]["total"]
    assert cost["weights_bytes"] == weights_bytes(inference_form(siclip.model))
    after = siclip.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    (speed,) = cost["speed"]
    assert (speed["device"], speed["in_a_row"]) == ("cpu", 2)
    for rates in (speed["images_per_s"], speed["texts_per_s"]):
        assert set(rates) == {"1", str(BATCH)}
        assert min(rates.values()) > 0
    weights = weights_bytes(inference_form(siclip.model)) / 2**20
    if "1" in speed["peak_mib"]:  # Linux tells it
        assert weights <= round(speed["peak_mib"]["1"] + 0.1, 1)


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux tells the peak of resident memory")
def test_memory_of_a_pass_is_seen():
    class Wide(nn.Module):
        def forward(self, images):
            return images.repeat(1, 1, 8, 8).relu()  # twice 64 times the images

    images = torch.ones(BATCH, 3, 32, 32)
    with torch.inference_mode(), _peak_memory("cpu", Wide()) as peak:
        Wide()(images)
    taken = 2 * 64 * images.numel() * 4 / 2**20  # 96 MiB
    assert 0.8 * taken < peak[0] < 2 * taken


def test_classifier_has_images_alone():
    cost = measure_cost(new_classifier("timm:test_vit", 7, pretrained=None, seed=0), ["cpu"], in_a_row=1)
    assert set(cost["macs"]) == {"image"}
    assert cost["parameters"]["image"] == cost["parameters"]["total"]
    assert "texts_per_s" not in cost["speed"][0]


def test_command_writes_the_file_and_prints(tmp_path, capsys):
    run = train_short(tmp_path)
    (result,) = evaluate(EvalConfig(run, cost=True, cost_images=3, device="cpu"))
    path = Path(run, "eval", "cost.json")
    assert json.loads(path.read_text()) == result
    assert (result["task"], result["recipe"], result["step"]) == ("cost", "clip", 2)
    printed = capsys.readouterr().out
    assert "3 images in a row, cpu" in printed
    assert str(path) in printed


def test_a_model_of_another_library_is_refused(clip):
    with pytest.raises(UserError, match="no parameters there: give the RUN"):
        measure_cost(dataclasses.replace(clip, model=nn.Module()), ["cpu"], in_a_row=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "--data .*one EVAL root or more"), ({"cost": True, "cost_images": 0}, "--cost-images 0")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        EvalConfig("any", **options)
