"""Jensen-Shannon divergence of attention by its numbers."""

import itertools
import math
import random
import xml.etree.ElementTree as ElementTree

import numpy as np
import open_clip
import pytest
import torch

import training.models.mobileclip  # noqa: F401 - its names for open_clip.create_model
from training.evaluation.attention_divergence import (
    adjacent_divergences,
    assignment,
    averaged_divergence,
    js_divergence,
    matched_divergence,
    write_divergences,
)
from training.models.taps import attention_maps


def attention(seed, sharpness=3.0):
    draw = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(3, 4, 6, 6, generator=draw)).softmax(-1)


# fact 11
def test_values():
    one = torch.tensor([1.0, 0.0])
    other = torch.tensor([0.0, 1.0])
    half = torch.tensor([0.5, 0.5])
    assert js_divergence(one, one).item() == 0
    assert js_divergence(one, other).item() == pytest.approx(0.693147, abs=1e-6)
    assert js_divergence(one, half).item() == pytest.approx(0.215762, abs=1e-6)
    assert js_divergence(half, one).item() == pytest.approx(0.215762, abs=1e-6)
    one, other = attention(0).double(), attention(1).double()
    p, q = one.numpy(), other.numpy()
    middle = (p + q) / 2
    expected = ((p * np.log(p / middle)).sum(-1) + (q * np.log(q / middle)).sum(-1)) / 2
    assert np.abs(js_divergence(one, other).numpy() - expected).max() < 1e-12


# fact 11
@pytest.mark.parametrize("seed", range(5))
def test_averaged_heads_are_never_further_apart_than_matched_ones(seed):
    one, other = attention(seed), attention(100 + seed)
    assert averaged_divergence(one, other) <= matched_divergence(one, other) <= math.log(2)
    assert averaged_divergence(one, other) == pytest.approx(averaged_divergence(other, one))
    assert matched_divergence(one, one[:, [2, 0, 3, 1]]) == pytest.approx(0, abs=1e-6)
    assert averaged_divergence(one, one[:, [2, 0, 3, 1]]) == pytest.approx(0, abs=1e-6)


def test_assignment_is_the_cheapest_of_all():
    draw = random.Random(0)
    for size in (1, 2, 3, 5, 6):
        for _ in range(20):
            costs = [[draw.choice([draw.random(), 0.5, 0.0]) for _ in range(size)] for _ in range(size)]
            found = assignment(costs)
            assert sorted(found) == list(range(size))
            best = min(sum(costs[i][j] for i, j in enumerate(p)) for p in itertools.permutations(range(size)))
            assert sum(costs[i][j] for i, j in enumerate(found)) == pytest.approx(best)


def test_attention_of_both_models_and_the_image(tmp_path):
    torch.manual_seed(0)
    teacher, student = open_clip.create_model("MobileCLIP-tiny").eval(), open_clip.create_model("SiCLIP-tiny").eval()
    pixels, tokens = torch.rand(2, 3, 64, 64), torch.randint(1, 400, (2, 77))
    block = teacher.visual.trunk.stages[3].blocks[1].token_mixer
    block.fused_attn, seen = False, []
    block.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    maps = attention_maps(teacher.visual, pixels)
    assert [tuple(found.shape) for found in maps] == [(2, 4, 4, 4)] * 2
    assert torch.allclose(maps[1], seen[0], atol=1e-6)
    for model in (teacher, student):
        assert [found.shape[1:] for found in attention_maps(model.text, tokens)] == [(2, 77, 77)] * 4
    assert all(torch.allclose(found, torch.tensor(1 / 77)) for found in attention_maps(student.text, tokens))
    found = {
        "image": adjacent_divergences(teacher.visual, [pixels, pixels.flip(0)]),
        "text": adjacent_divergences(teacher.text, [tokens]),
    }
    assert found["image"][0] == pytest.approx((averaged_divergence(*maps), matched_divergence(*maps)))
    assert [len(pairs) for pairs in found.values()] == [1, 3]
    write_divergences(str(tmp_path / "divergence.svg"), found)
    root = ElementTree.parse(tmp_path / "divergence.svg").getroot()
    assert sum(element.tag.endswith("rect") for element in root) == 1 + 2 * 4
    assert any(element.text == "text 2-3" for element in root)
