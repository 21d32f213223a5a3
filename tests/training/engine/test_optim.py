"""The optimizer's state moves between devices and memory formats."""

import torch
from torch import nn

from training.config import OptimConfig
from training.engine.optim import build_optimizer, load_optimizer


def stepped(module, optimizer, step):
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1) * (step + 1))
    optimizer.step()


def new(channels_last=False):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    if channels_last:
        module.to(memory_format=torch.channels_last)
    return module, build_optimizer(module, OptimConfig())


def test_a_fused_state_goes_on_unfused_in_another_memory_format():
    module, optimizer = new()
    twin, written = new()
    for group in written.param_groups:
        group["fused"] = True  # as CUDA's has it
    for step in range(2):
        stepped(module, optimizer, step)
        stepped(twin, written, step)
    state = written.state_dict()
    other, resumed = new(channels_last=True)
    other.load_state_dict(twin.state_dict())
    load_optimizer(resumed, state)
    assert [group["fused"] for group in resumed.param_groups] == [None, None]
    assert [group["fused"] for group in state["param_groups"]] == [True, True], "the state is left as it is"
    for parameter, values in resumed.state.items():
        assert values["exp_avg"].stride() == values["exp_avg_sq"].stride() == parameter.stride()
    stepped(module, optimizer, 2)
    stepped(other, resumed, 2)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
