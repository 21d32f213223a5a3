"""The sparsity that masks are trained towards: sizes, targets, the two forms of the loss. Numbers: worked by hand."""

import pytest
import torch

from training.config import OptimConfig
from training.engine.optim import ParamGroup, build_optimizer, set_lr
from training.losses.sparsity import (
    SparsityConstraint,
    TowerSize,
    expected_size,
    expected_sparsity,
    sparsity_loss,
    target_sparsity,
)

TINY = TowerSize(width=8, heads=2, neurons=32, layers=2)
VIT_B_32 = TowerSize(width=768, heads=12, neurons=3072, layers=12)
TEXT_B = TowerSize(width=512, heads=8, neurons=2048, layers=12)


def size(tower, dims, heads, neurons):
    return expected_size(tower, *(torch.tensor(float(count), dtype=torch.float64) for count in (dims, heads, neurons)))


def whole(tower):
    return size(tower, tower.width, tower.heads * tower.layers, tower.neurons * tower.layers)


# fact 9
@pytest.mark.parametrize(
    ("kept", "remaining", "sparsity"),
    [
        ((8, 4, 64), 1600, 0.047619),
        ((4, 4, 64), 800, 0.523810),
        ((4, 3, 64), 728, 0.566667),
        ((4, 3, 56), 664, 0.604762),
    ],
)
def test_the_size_of_a_tiny_tower(kept, remaining, sparsity):
    assert TINY.prunable == 1680
    left = size(TINY, *kept)
    assert left.item() == pytest.approx(remaining, abs=1e-9)
    assert expected_sparsity([left], [TINY]).item() == pytest.approx(sparsity, abs=1e-6)


# fact 9, whose 3.824031 has probabilities that are clipped to [1e-6, 1 - 1e-6]: see test_tinyclip_masks.py
def test_the_one_sided_loss_of_a_tiny_tower():
    sparsity = expected_sparsity([size(TINY, 4, 3, 56)], [TINY])
    assert sparsity_loss(sparsity, 0.9, 10.0, 10.0).item() == pytest.approx(3.824036, abs=1e-6)
    assert sparsity_loss(sparsity, 0.5, 10.0, 10.0).item() == 0


# fact 10
def test_sparsity_of_vit_b_32():
    assert (VIT_B_32.prunable, TEXT_B.prunable) == (85_017_600, 37_804_032)
    half = size(VIT_B_32, 384, 144, 36864)
    assert expected_sparsity([half], [VIT_B_32]).item() == pytest.approx(0.500272, abs=1e-6)
    joint = expected_sparsity([whole(VIT_B_32), whole(TEXT_B)], [VIT_B_32, TEXT_B])
    assert joint.item() == pytest.approx(76_800 / 122_821_632, abs=1e-9)


def test_a_pair_of_towers_counts_by_its_weights_and_not_by_the_mean():
    sizes = [size(VIT_B_32, 384, 144, 36864), whole(TEXT_B)]
    alone = [expected_sparsity([own], [tower]).item() for own, tower in zip(sizes, (VIT_B_32, TEXT_B), strict=True)]
    joint = expected_sparsity(sizes, [VIT_B_32, TEXT_B]).item()
    share = VIT_B_32.prunable / (VIT_B_32.prunable + TEXT_B.prunable)
    assert joint == pytest.approx(share * alone[0] + (1 - share) * alone[1], abs=1e-12)


# fact 11
def test_the_target_ramps_up_and_stays():
    assert [target_sparsity(step, 0.0, 0.25) for step in (0, 500, 1000, 5000)] == [0, 0.125, 0.25, 0.25]
    assert target_sparsity(5, 0.25, 0.5, ramp=10) == 0.375
    assert target_sparsity(0, 0.25, 0.5, ramp=0) == 0.5


def test_the_papers_form_is_two_sided():
    below, above = torch.tensor(0.1), torch.tensor(0.4)
    assert sparsity_loss(below, 0.3, 2.0, 5.0, two_sided=True).item() == pytest.approx(2 * -0.2 + 5 * 0.04)
    assert sparsity_loss(above, 0.3, 2.0, 5.0, two_sided=True).item() == pytest.approx(2 * 0.1 + 5 * 0.01)
    assert sparsity_loss(above, 0.3, 2.0, 5.0).item() == 0


def ascend(constraint, sparsities, target=0.3):
    """Train the multipliers alone, as a task's groups do; return lambda after each step."""
    parameters = list(constraint.parameters())
    groups = [ParamGroup(parameters, fixed_lr=0.02, maximize=True, betas=(0.9, 0.999), eps=1e-8)]
    optimizer = build_optimizer(constraint, OptimConfig(lr=1e-4, weight_decay=0.2), groups)
    values = []
    for sparsity in sparsities:
        optimizer.zero_grad()
        constraint(torch.tensor(sparsity), target).backward()
        assert all(parameter.grad is not None for parameter in parameters)  # DDP waits for each of them
        set_lr(optimizer, groups, 1e-4)
        optimizer.step()
        values.append(constraint.linear.item())
    return values


# fact 14
def test_lambda_rises_by_its_rate_and_coasts_without_falling():
    values = ascend(SparsityConstraint(), [0.1] * 3 + [0.5] * 60)
    assert values[:3] == pytest.approx([10.02, 10.04, 10.06], abs=1e-4)
    assert values == sorted(values)
    assert values[2] < values[-1] < 10.3
    assert values[-1] - values[-2] < 1e-3


def test_a_larger_violation_moves_lambda_no_further():
    assert ascend(SparsityConstraint(), [0.29] * 5) == pytest.approx(ascend(SparsityConstraint(), [0.0] * 5), abs=1e-4)


def test_in_the_papers_form_lambda_takes_both_signs():
    assert ascend(SparsityConstraint(two_sided=True), [0.1] * 5)[-1] == pytest.approx(-0.1, abs=1e-3)
    assert ascend(SparsityConstraint(two_sided=True), [0.5] * 5)[-1] == pytest.approx(0.1, abs=1e-3)
