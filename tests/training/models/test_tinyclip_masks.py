"""Hard concrete masks, and LayerNorm over the dimensions that a mask keeps."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.losses.sparsity import (
    SparsityConstraint,
    TowerSize,
    expected_sparsity,
    sparsity_loss,
    target_sparsity,
)
from training.models.tinyclip_masks import (
    TowerMasks,
    deterministic_mask,
    keep_probability,
    kept_dims,
    masked_layer_norm,
    masked_weight,
    sample_mask,
)

SIZE = TowerSize(width=768, heads=12, neurons=3072, layers=12)


def tower_masks(size=SIZE):
    return TowerMasks(size.width, [size.heads] * size.layers, [size.neurons] * size.layers, size)


# fact 8
@pytest.mark.parametrize(
    ("log_alpha", "positive", "one", "value"),
    [
        (10.0, 0.999991, 0.999775, 0.999994),
        (4.60517, 0.997982, 0.952870, 0.996035),
        (0.0, 0.831822, 0.168178, 0.5),
        (-1.59860, 0.5, 0.039271, 0.128049),
        (-4.60517, 0.047130, 0.002018, 0.003965),
    ],
)
def test_probabilities_and_values(log_alpha, positive, one, value):
    units = torch.full((1000,), log_alpha)
    assert keep_probability(units)[0].item() == pytest.approx(positive, abs=1.5e-6)
    draws = sample_mask(
        torch.full((400_000,), log_alpha), torch.rand(400_000, generator=torch.Generator().manual_seed(0))
    )
    assert (draws > 0).float().mean().item() == pytest.approx(positive, abs=3e-3)
    assert (draws == 1).float().mean().item() == pytest.approx(one, abs=3e-3)
    kept = deterministic_mask(units)
    assert kept.max().item() == pytest.approx(value, abs=1.5e-6)
    assert kept.count_nonzero().item() == round(1000 * positive)


# fact 8
def test_samples_at_zero_are_symmetric():
    uniform = torch.rand(500_000, generator=torch.Generator().manual_seed(1))
    draws = sample_mask(torch.zeros(500_000), uniform)
    assert (draws == 0).float().mean().item() == pytest.approx(0.168, abs=2e-3)
    assert (draws == 1).float().mean().item() == pytest.approx(0.168, abs=2e-3)
    assert draws.mean().item() == pytest.approx(0.5, abs=2e-3)


# fact 12
def test_the_deterministic_mask_of_eight_units():
    log_alpha = torch.tensor([4.0, 3, 2, 1, 0, -1, -2, -3])
    assert keep_probability(log_alpha).sum().item() == pytest.approx(5.96621, abs=1e-5)
    expected = torch.tensor([0.9918, 0.9734, 0.9168, 0.7685, 0.5, 0.2315, 0, 0])
    torch.testing.assert_close(deterministic_mask(log_alpha), expected, rtol=0, atol=5e-5)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])  # the identity is by size, not by place
    torch.testing.assert_close(deterministic_mask(log_alpha[order]), expected[order], rtol=0, atol=5e-5)


def test_the_clamp_costs_a_fully_kept_tower_some_units_and_leaves_a_pruned_one_some():
    masks = tower_masks()
    masks.clamp()
    assert {round(value.item(), 5) for units in masks.parameters() for value in units.unique()} == {4.60517}
    values = masks.deterministic()
    assert 768 - values.dims.count_nonzero() == 2
    assert {int(3072 - layer.count_nonzero()) for layer in values.neurons} == {6}
    assert {int(12 - layer.count_nonzero()) for layer in values.heads} == {0}
    pruned = deterministic_mask(torch.full((1000,), -4.60517))
    assert pruned.count_nonzero() == 47
    assert pruned.max().item() == pytest.approx(0.003965, abs=1e-6)


def test_all_units_begin_on():
    masks = tower_masks()
    assert masks.units == 768 + 144 + 36864
    assert all((units == 10).all() for units in masks.parameters())
    assert masks.expected_size().item() / SIZE.prunable == pytest.approx(1 - 0.0006, abs=1e-4)
    assert all(value.min() > 0.99999 for value in (masks.eval()().dims, *masks().heads, *masks().neurons))


def test_masks_are_sampled_in_training_and_not_in_evaluation():
    masks = tower_masks(TowerSize(16, 2, 32, 2))
    with torch.no_grad():
        for units in masks.parameters():
            units.zero_()
    torch.manual_seed(3)
    one, other = masks(), masks()
    assert not torch.equal(one.dims, other.dims)
    assert [len(layer) for layer in one.heads] == [2, 2]
    assert [len(layer) for layer in one.neurons] == [32, 32]
    uniform = masks.draw()
    assert 0 < uniform.min() < uniform.max() < 1
    assert torch.equal(masks(uniform).dims, masks(uniform).dims)
    assert torch.equal(masks(uniform).neurons[1], sample_mask(masks.neurons[32:], uniform[16 + 4 + 32 :]))
    masks.eval()
    assert torch.equal(masks().dims, masks().dims)
    assert torch.equal(masks().dims, deterministic_mask(masks.dims))
    assert torch.equal(masks(uniform).dims, masks().dims)


# fact 9
def test_the_size_of_a_tiny_tower_by_its_log_alphas():
    tiny = TowerSize(width=8, heads=2, neurons=32, layers=2)
    masks = tower_masks(tiny)
    sizes = []
    with torch.no_grad():
        for units in masks.parameters():
            units.fill_(30.0)
        for units, off in ((masks.dims, 0), (masks.dims, 4), (masks.heads, 1), (masks.neurons, 8)):
            units[:off] = -30.0
            sizes.append(masks.expected_size().item())
    assert sizes == pytest.approx([1600, 800, 728, 664], abs=0.02)
    sparsity = 1 - masks.expected_size() / tiny.prunable
    assert sparsity_loss(sparsity, 0.9, 10.0, 10.0).item() == pytest.approx(3.824031, abs=1e-6)
    assert sparsity_loss(sparsity, 0.5, 10.0, 10.0).item() == 0


@pytest.mark.parametrize(
    ("end", "ramp", "steps", "sparsity", "linear"), [(0.25, 1000, 1400, 0.265, 11.6), (0.5, 100, 300, 0.606, 13.98)]
)
def test_masks_alone_follow_the_ramp(end, ramp, steps, sparsity, linear):
    """Without another loss, ViT-B/32 ends where the released modules do (section 4.5)."""
    towers = [tower_masks(), tower_masks(TowerSize(width=512, heads=8, neurons=2048, layers=12))]
    parameters = [units for masks in towers for units in masks.parameters()]
    constraint = SparsityConstraint()
    descent = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0)
    ascent = torch.optim.AdamW(constraint.parameters(), lr=0.02, weight_decay=0, maximize=True)
    for step in range(steps):
        reached = expected_sparsity([masks.expected_size() for masks in towers], [masks.original for masks in towers])
        for optimizer in (descent, ascent):
            optimizer.zero_grad()
        constraint(reached, target_sparsity(step, 0.0, end, ramp)).backward()
        for optimizer in (descent, ascent):
            optimizer.step()
        for masks in towers:
            masks.clamp()
    assert reached.item() == pytest.approx(sparsity, abs=1e-3)
    assert constraint.linear.item() == pytest.approx(linear, abs=0.05)


def norm(width, dtype=torch.float64):
    torch.manual_seed(0)
    layer = nn.LayerNorm(width, eps=1e-5).to(dtype)
    nn.init.normal_(layer.weight, 1, 0.3)
    nn.init.normal_(layer.bias, 0, 0.3)
    return layer


def test_layer_norm_runs_over_the_kept_dimensions_only():
    layer = norm(10)
    mask = torch.tensor([0.5, 0, 1, 0.3, 0, 0, 1, 1, 0.9, 0], dtype=torch.float64)
    kept = mask.nonzero().flatten()
    for scale in (1.0, 1e-3):  # at 1e-3 eps counts
        x = (scale * torch.randn(3, 4, 10, dtype=torch.float64) + 2 * scale) * mask
        expected = torch.zeros_like(x)
        expected[..., kept] = F.layer_norm(x[..., kept], (len(kept),), layer.weight[kept], layer.bias[kept], layer.eps)
        torch.testing.assert_close(masked_layer_norm(x, layer, kept_dims(mask)), expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_masked_layer_norm():
    """Those of inputs and affine parameters, against LayerNorm of the gathered dimensions."""
    layer = norm(10)
    mask = torch.tensor([0.5, 0, 1, 0.3, 0, 0, 1, 1, 0.9, 0], dtype=torch.float64)
    kept = mask.nonzero().flatten()
    start = torch.randn(3, 4, 10, dtype=torch.float64)
    weights = torch.randn(3, 4, 10, dtype=torch.float64)

    def gradients(run):
        x = start.clone().requires_grad_()
        return torch.autograd.grad((run(x * mask) * weights).sum(), [x, layer.weight, layer.bias])

    def gathered(x):
        inner = F.layer_norm(x[..., kept], (len(kept),), layer.weight[kept], layer.bias[kept], layer.eps)
        return torch.zeros_like(x).index_copy(-1, kept, inner)

    masked = gradients(lambda x: masked_layer_norm(x, layer, kept_dims(mask)))
    for mine, theirs in zip(masked, gradients(gathered), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_dimensions_it_is_the_plain_layer_norm(dtype):
    layer = norm(33, torch.float32)
    x = torch.randn(5, 33).to(dtype)
    plain = F.layer_norm(x.float(), (33,), layer.weight, layer.bias, layer.eps).to(dtype)
    assert torch.equal(masked_layer_norm(x, layer, kept_dims(torch.ones(33))), plain)


def test_a_mask_without_any_dimension_gives_zeros():
    assert not masked_layer_norm(torch.zeros(2, 8), norm(8, torch.float32), kept_dims(torch.zeros(8))).any()


def test_a_masked_weight_is_a_masked_output():
    torch.manual_seed(0)
    weight, rows, columns, x = torch.randn(4, 6), torch.rand(4), torch.rand(6), torch.randn(5, 6)
    torch.testing.assert_close(F.linear(x, masked_weight(weight, rows, columns)), F.linear(x * columns, weight) * rows)


def test_the_sampled_value_is_the_formula():
    uniform, log_alpha = torch.tensor([0.3]), torch.tensor([0.7])
    concrete = 1 / (1 + math.exp(-(math.log(0.3) - math.log(0.7) + 0.7) / (2 / 3)))
    assert sample_mask(log_alpha, uniform).item() == pytest.approx(concrete * 1.2 - 0.1, abs=1e-6)
