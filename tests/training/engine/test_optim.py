"""The optimizer's state moves between devices, kinds of kernels and memory formats."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from training.config import OptimConfig
from training.engine.optim import ParamGroup, build_optimizer, load_optimizer


def stepped(module, optimizer, step):
    for number, parameter in enumerate(module.parameters()):
        drawn = torch.Generator().manual_seed(100 * step + number)
        gradient = torch.randn(parameter.shape, generator=drawn)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)  # laid out like the parameter, as autograd does
    optimizer.step()


def new(channels_last=False, fused=True):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    if channels_last:
        module.to(memory_format=torch.channels_last)
    convolution, *others = module.parameters()
    options: dict[str, Any] = {"maximize": True, "betas": (0.5, 0.7), "eps": 1e-3}
    groups = [ParamGroup([convolution], weight_decay=0.3), ParamGroup(others, **options)]
    return module, build_optimizer(module, OptimConfig(), groups, fused=fused)


def assert_near(module, other):
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_the_fused_optimizer_computes_what_the_plain_one_does():
    fused, plain = new(), new(fused=False)
    assert [[group["fused"] for group in optimizer.param_groups] for _, optimizer in (fused, plain)] == [
        [True, True],
        [None, None],
    ]
    before = [parameter.detach().clone() for parameter in fused[0].parameters()]
    for step in range(5):
        stepped(*fused, step)
        stepped(*plain, step)
    assert_near(fused[0], plain[0])
    moved = zip(fused[0].parameters(), before, strict=True)
    assert all((parameter - start).abs().max() > 1e-4 for parameter, start in moved)


@pytest.mark.parametrize("fused", [True, False], ids=["fused to plain", "plain to fused"])
def test_a_state_goes_on_in_the_other_kind_and_another_memory_format(fused):
    module, optimizer = new(fused=fused)
    for step in range(2):
        stepped(module, optimizer, step)
    state = copy.deepcopy(optimizer.state_dict())  # as it comes from a file
    other, resumed = new(channels_last=True, fused=not fused)
    other.load_state_dict(module.state_dict())
    load_optimizer(resumed, state)
    ways = {True: [True, True], False: [None, None]}
    assert [group["fused"] for group in resumed.param_groups] == ways[not fused]
    assert [group["fused"] for group in state["param_groups"]] == ways[fused], "the state is left as it is"
    for parameter, values in resumed.state.items():
        assert values["exp_avg"].stride() == values["exp_avg_sq"].stride() == parameter.stride()
    for step in (2, 3):
        stepped(module, optimizer, step)
        stepped(other, resumed, step)
    assert_near(module, other)


@pytest.mark.parametrize(
    "weight",
    [torch.ones(4, 6)[:, ::2], torch.ones(2, 2, dtype=torch.complex64)],
    ids=["with gaps", "complex"],
)
def test_what_the_fused_kernel_does_not_take_is_optimized_without_it(weight):
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    optimizer = build_optimizer(module, OptimConfig(lr=0.5, weight_decay=0.0))
    module.weight.sum().abs().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] is None
    torch.testing.assert_close(module.weight.detach().real, torch.full(weight.shape, 0.5))
