"""CLIP-KD's losses against an independent evaluation: the gradients that autograd gives."""

import math

import pytest
import torch
import torch.nn.functional as F

from training.losses import similarity
from training.losses.clip_kd import FeatureFusion, FeatureProjection, contrastive_gradients, gradient_loss
from training.losses.similarity import Similarity


def unit(*seeds, n=7, d=5):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [F.normalize(torch.randn(n, d, generator=own, dtype=torch.float64), dim=-1) for own in generators]


def by_autograd(rows, columns, scale, create_graph=False):
    """The gradients of the rows' cross-entropy at both features."""
    rows, columns = (value if value.requires_grad else value.clone().requires_grad_() for value in (rows, columns))
    loss = F.cross_entropy(scale * rows @ columns.T, torch.arange(len(rows)))
    return torch.autograd.grad(loss, [rows, columns], create_graph=create_graph)


def written_out(student, teacher):
    """GD from autograd's gradients, with a graph for the student's."""
    image, text, scale = student
    total = 0
    for ours, theirs in (((image, text), teacher[:2]), ((text, image), teacher[1::-1])):
        targets = by_autograd(*theirs, teacher[2])
        for own, target in zip(by_autograd(*ours, scale, create_graph=True), targets, strict=True):
            total = total + (own - target).square().mean()
    return total


def test_closed_form_gradients_are_those_of_autograd():
    rows, columns = unit(0, 1)
    pair = Similarity(rows, columns, 4.0)
    normalisers = pair.logits().logsumexp(1)
    expected = by_autograd(rows, columns, 4.0)
    for found, wanted in zip(contrastive_gradients(pair, normalisers, slice(0, 7)), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-14)
    for found, wanted in zip(contrastive_gradients(pair, normalisers, slice(2, 5)), expected, strict=True):
        assert torch.allclose(found, wanted[2:5], atol=1e-14)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradient_distillation_and_its_own_gradient(inverse):
    image, text, teacher_image, teacher_text = unit(0, 1, 2, 3)
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    leaves = [image.requires_grad_(), text.requires_grad_(), scale]

    def at(value):
        return 1 / value if inverse else value

    expected = written_out((image, text, at(scale)), (teacher_image, teacher_text, at(9.0)))
    loss = gradient_loss(Similarity(image, text, at(scale)), Similarity(teacher_image, teacher_text, at(9.0)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert loss.item() > 0
    for found, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-14)


def test_gradient_distillation_of_the_teacher_itself_is_nothing():
    image, text = unit(0, 1)
    assert gradient_loss(Similarity(image, text, 8.0), Similarity(image, text, 8.0)).item() < 1e-30
    assert gradient_loss(Similarity(image, text, 8.0), Similarity(image, text, 4.0)).item() > 1e-6


def test_gradient_distillation_in_blocks_is_the_whole(monkeypatch):
    image, text, teacher_image, teacher_text = unit(0, 1, 2, 3, n=11)
    image.requires_grad_()

    def value():
        loss = gradient_loss(Similarity(image, text, 6.0), Similarity(teacher_image, teacher_text, 9.0))
        return loss.item(), torch.autograd.grad(loss, image)[0]

    whole, gradient = value()
    monkeypatch.setattr(similarity, "MAX_WHOLE", 4)
    monkeypatch.setattr(similarity, "BLOCK_ROWS", 4)
    in_blocks, other = value()
    assert in_blocks == pytest.approx(whole, rel=1e-12)
    assert torch.allclose(gradient, other, atol=1e-15)


def test_fused_features_are_contrasted():
    torch.manual_seed(0)
    fusion = FeatureFusion(5, 3).double()
    student, teacher = tuple(unit(0, 1)), tuple(value.requires_grad_() for value in unit(2, 3, d=3))
    loss = fusion(student, teacher)
    fused = [
        F.normalize(torch.cat(pair, 1) @ own.weight.T + own.bias, dim=1)
        for own, pair in ((fusion.image, (student[0], teacher[0])), (fusion.text, (student[1], teacher[1])))
    ]
    logits = fused[0] @ fused[1].T / 0.07
    labels = torch.arange(7)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert all(value.grad is None for value in teacher)
    assert fusion.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert fusion.logit_scale.grad.abs() > 0


def test_a_projection_takes_features_of_any_length():
    torch.manual_seed(0)
    projection = FeatureProjection(5, 3)
    image, text = (3 * value.float() for value in unit(0, 1))
    for found, value, own in zip(
        projection(image, text), (image, text), (projection.image, projection.text), strict=True
    ):
        assert torch.allclose(found, F.normalize(value @ own.weight.T + own.bias, dim=1))
        assert found.shape == (7, 3)
