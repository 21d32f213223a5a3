"""Gradients per use of a tied weight, and CKA: section 11 of the MiniViT sheet."""

import copy

import pytest
import timm
import torch

import training.models.minivit  # noqa: F401  registers the names
from training.evaluation.layer_analysis import CkaMeter, linear_cka, unbiased_hsic, use_gradient_norms
from training.models.block_reader import BlockReader
from training.models.minivit import SWIN_SHARED
from training.models.weight_tying import tied_blocks, untie

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gradient_norms_are_those_of_each_use():
    torch.manual_seed(0)
    model = timm.create_model("mini_swin_test", head_maps="identity").double()
    images = gaussian(1, 2, 3, 32, 32).double()

    def loss(module):
        return module(images).square().sum()

    names = BlockReader(model).names
    before = copy.deepcopy(model.state_dict())
    norms = use_gradient_norms(model, loss, names, SWIN_SHARED)
    assert len(norms) == 6
    assert min(norms) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    single = use_gradient_norms(model, loss, names, ("mlp.fc1.weight",))
    assert all(one < whole for one, whole in zip(single, norms, strict=True))
    # by hand: the gradients of an untied copy, whose sum is the shared one
    apart = copy.deepcopy(model)
    for blocks in tied_blocks(apart).values():
        untie(blocks)
    for each in (model, apart):
        loss(each).backward()
    uses = [apart.layers[1].blocks[index].mlp.fc1.weight.grad for index in (2, 3)]
    assert single[4:] == pytest.approx([use.norm().item() for use in uses])
    assert torch.allclose(model.layers[1].blocks[3].mlp.fc1.weight.grad, uses[0] + uses[1])


def test_cka_of_independent_features():
    biased, meter = [], CkaMeter()
    for seed in range(200):
        one, other = gaussian(2 * seed, 20, 64), gaussian(2 * seed + 1, 20, 64)
        biased.append(linear_cka(one, other).item())
        meter.add([one], [other])
    assert sum(biased) / len(biased) == pytest.approx(0.80, abs=0.05)
    assert meter.values()[0] == pytest.approx(0.0, abs=0.01)


def test_cka_does_not_see_scale_rotation_and_shift():
    one = gaussian(0, 30, 16) @ torch.diag(torch.arange(1.0, 17))
    turned = 3 * one @ torch.linalg.qr(gaussian(1, 16, 16))[0] + 5
    other = one + 4 * gaussian(2, 30, 16)
    assert linear_cka(one, turned).item() == pytest.approx(1, abs=1e-5)
    meter = CkaMeter()
    meter.add([one, one, one.unflatten(1, (4, 4))], [turned, other, one])
    values = meter.values()
    assert values[0] == pytest.approx(1, abs=1e-4)
    assert 0.3 < values[1] < 0.99
    assert values[2] == pytest.approx(1, abs=1e-6)


def test_the_estimate_is_its_formula():
    k, m = (x @ x.T for x in (gaussian(0, 7, 3).double(), gaussian(1, 7, 5).double()))
    total = 0.0
    for i in range(7):  # the U-statistic of order 4, over all tuples of different samples
        for j in range(7):
            for q in range(7):
                for r in range(7):
                    if len({i, j, q, r}) == 4:
                        total += (k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])).item()
    expected = total / (7 * 6 * 5 * 4)
    assert unbiased_hsic(k, m).item() == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_measured():
    meter = CkaMeter()
    assert meter.values() == []
    with pytest.raises(ValueError, match="3 samples"):
        meter.add([gaussian(0, 3, 4)], [gaussian(1, 3, 4)])
    with pytest.raises(ValueError, match="5 and of 6 samples"):
        meter.add([gaussian(0, 5, 4)], [gaussian(1, 6, 4)])
