"""Targets that are distributions: sheet's numbers, stored soft labels against the teacher's own, gradients."""

import pytest
import torch

from shards_spec.soft_labels import SoftLabelFormat
from training.losses.relations import soft_ce, soft_kl
from training.losses.soft_labels import spread_rest, target_cross_entropy, target_kl


def logits(seed, scale, count=64, classes=1000):
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(teacher, kept):
    """The targets (n, K) that a cache of the teacher's soft labels gives."""
    own = SoftLabelFormat(teacher.shape[1], kept)
    return torch.from_numpy(own.distributions(own.encode(teacher).numpy()))


def test_numbers_of_the_sheet():  # fact 17
    student, teacher = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    targets = teacher.softmax(1)
    assert target_cross_entropy(student, targets).item() == pytest.approx(0.6931, abs=1e-4)
    assert target_kl(student, targets).item() == pytest.approx(0.1109, abs=1e-4)


def test_they_are_the_teachers_losses():
    student, teacher = logits(0, 3.0), logits(1, 3.0)
    for temperature in (1.0, 4.0):
        targets = (teacher / temperature).softmax(1)
        assert torch.allclose(
            target_cross_entropy(student, targets, temperature), soft_ce(student, teacher, temperature)
        )
        assert torch.allclose(target_kl(student, targets, temperature), soft_kl(student, teacher, temperature))


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 10.0])
def test_all_stored_labels_give_the_live_loss(scale):
    """From a teacher that knows nothing to one with probabilities far below float16's least."""
    student, teacher = logits(0, 3.0), logits(1, scale)
    student.requires_grad_()
    live, cached = soft_ce(student, teacher), target_cross_entropy(student, stored(teacher, "all"))
    assert (cached / live - 1).abs().max() < 1e-3
    (live_gradient,) = torch.autograd.grad(live.sum(), student, retain_graph=True)
    (gradient,) = torch.autograd.grad(cached.sum(), student)
    assert (gradient - live_gradient).norm() < 1e-3 * live_gradient.norm()


def test_all_stored_labels_serve_other_temperatures():
    student, teacher = logits(0, 3.0), logits(1, 6.0)
    own = SoftLabelFormat(1000, "all")
    kept = torch.from_numpy(own.decode(own.encode(teacher).numpy())["logits"].copy())
    for temperature in (2.0, 10.0):
        targets = (kept.float() / temperature).softmax(1)
        live = soft_ce(student, teacher, temperature)
        assert (target_cross_entropy(student, targets, temperature) / live - 1).abs().max() < 1e-3


def test_the_rest_is_spread_evenly():
    classes, probabilities, rest = torch.tensor([[3, 0]]), torch.tensor([[0.5, 0.2]]), torch.tensor([0.3])
    targets = spread_rest(classes, probabilities, rest, 5)
    assert torch.allclose(targets, torch.tensor([[0.2, 0.1, 0.1, 0.5, 0.1]]))
    teacher = logits(1, 3.0, classes=40).float()
    own = SoftLabelFormat(40, 7)
    rows = own.encode(teacher).numpy()
    record = own.decode(rows)
    parts = (record["classes"].astype("int64"), record["probabilities"].astype("float32"), record["rest"].copy())
    targets = spread_rest(*map(torch.from_numpy, parts), 40)
    assert torch.allclose(targets, torch.from_numpy(own.distributions(rows)), atol=1e-7)
    assert torch.allclose(targets.sum(1), torch.ones(64), atol=1e-6)


def test_fewer_labels_are_farther_from_the_teacher():
    student, teacher = logits(0, 1.0), logits(1, 3.0)
    live = soft_ce(student, teacher)
    losses = [target_cross_entropy(student, stored(teacher, kept)) for kept in (1, 10, 100, 999)]
    gaps = [(loss / live - 1).abs().mean().item() for loss in losses]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 10 * gaps[2]


def test_large_logits_are_finite_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        student = torch.tensor([[1e3, -1e3, 0.0]], dtype=torch.bfloat16, requires_grad=True)
        loss = target_cross_entropy(student, torch.tensor([[0.0, 1.0, 0.0]]))
    loss.sum().backward()
    assert loss.item() == 2000
    assert torch.isfinite(student.grad).all()
