"""Token relations and their losses; facts are those of the TinyMIM sheet, section 12."""

import math

import pytest
import torch
import torch.nn.functional as F

from training.losses import relations
from training.losses.relations import (
    Pair,
    soft_ce,
    soft_kl,
    split_heads,
    token_relation,
    token_relation_loss,
    whiten,
    whitened_feature_loss,
)

DISTANCES = ("kl", "cross_entropy", "smooth_l1")


def tokens(seed, *shape, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_loss(student, teacher, heads, distance):
    """The loss as its formula says, of whole matrices and by autograd."""
    mine, theirs = (token_relation(*pair, heads) for pair in (student, teacher))
    if distance == "smooth_l1":
        return F.smooth_l1_loss(mine, theirs, reduction="none", beta=2.0).mean(dim=(1, 2, 3))
    predicted, target = mine.log_softmax(-1), theirs.softmax(-1)
    losses = -(target * predicted).sum(-1)
    if distance == "kl":
        losses = losses + (target * target.log()).sum(-1)
    return losses.mean(dim=(1, 2))


def test_shapes_and_rows():  # fact 1
    for width in (192, 768):
        logits = token_relation(tokens(0, 2, 197, width), tokens(1, 2, 197, width), 12)
        assert logits.shape == (2, 12, 197, 197)
        torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(2, 12, 197, dtype=torch.float64))


def test_the_loss_is_zero_where_relations_are_equal_and_nowhere_else():  # fact 3
    own, other = tokens(0, 3, 11, 24, dtype=torch.float32), tokens(1, 3, 11, 24, dtype=torch.float32)
    assert token_relation_loss(Pair(own, other), Pair(own, other), 4).max() < 1e-6
    for seed in range(20):
        theirs = own + 10.0**-seed * tokens(seed, 3, 11, 24, dtype=torch.float32)
        assert token_relation_loss(Pair(own, own), Pair(theirs, theirs), 4).min() >= 0
    assert token_relation_loss(Pair(own, own), Pair(other, other), 4).min() > 1e-3


def test_direction_and_gradient_at_the_logits():  # fact 4
    student, teacher = tokens(0, 2, 3, 5, 5).requires_grad_(), tokens(1, 2, 3, 5, 5)
    loss = soft_kl(student, teacher).mean()
    assert loss.item() != pytest.approx(soft_kl(teacher, student.detach()).mean().item(), rel=1e-2)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, (student.softmax(-1) - teacher.softmax(-1)) / (2 * 3 * 5))
    ours = soft_ce(student, teacher)
    torch.testing.assert_close(torch.autograd.grad(ours.mean(), student)[0], gradient)


@pytest.mark.parametrize("distance", DISTANCES)
def test_relations_ignore_the_basis(distance):  # fact 5
    q, k, v, other = (tokens(seed, 2, 7, 12) for seed in range(4))
    turn = torch.linalg.qr(tokens(9, 4, 4))[0]

    def turned(x):
        return (split_heads(x, 3) @ turn).transpose(1, 2).flatten(2)

    for one, two in ((q, k), (v, v)):
        plain = token_relation_loss(Pair(one, two), Pair(other, other), 3, distance)
        torch.testing.assert_close(
            token_relation_loss(Pair(turned(one), turned(two)), Pair(other, other), 3, distance), plain
        )
    one_sided = token_relation_loss(Pair(turned(q), k), Pair(other, other), 3, distance)
    assert not torch.allclose(one_sided, token_relation_loss(Pair(q, k), Pair(other, other), 3, distance))


def test_heads_pair_up_by_index():  # fact 6
    student, teacher = tokens(0, 2, 7, 12), tokens(1, 2, 7, 12)
    swapped = split_heads(teacher, 3)[:, [1, 2, 0]].transpose(1, 2).flatten(2)
    plain = token_relation_loss(Pair(student, student), Pair(teacher, teacher), 3)
    assert not torch.allclose(plain, token_relation_loss(Pair(student, student), Pair(swapped, swapped), 3))


def test_whitened_target():  # fact 12
    student, teacher = tokens(0, 2, 5, 16).requires_grad_(), (7 + 3 * tokens(1, 2, 5, 16)).requires_grad_()
    target = whiten(teacher)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 5, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(target.var(-1, unbiased=False), torch.ones(2, 5, dtype=torch.float64), rtol=1e-4, atol=0)
    loss = whitened_feature_loss(student, teacher)
    error = (student - target).abs()
    expected = torch.where(error <= 2, error.square() / 4, error - 1).mean(dim=(1, 2))
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_large_logits_in_low_precision(dtype, distance):  # fact 15
    def large(seed):  # logits of magnitude 1e3
        return tokens(seed, 2, 9, 8, dtype=torch.float32, scale=23.0).to(dtype).requires_grad_()

    student, teacher = large(0), large(1)
    with torch.autocast("cpu", dtype):
        assert token_relation(student, student, 1).abs().max() > 1e3
        loss = token_relation_loss(Pair(student, student), Pair(teacher, teacher), 1, distance)
        assert loss.dtype == torch.float32
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    logits = torch.tensor([[1e3, -1e3, 0.0]], dtype=dtype)
    with torch.autocast("cpu", dtype):
        assert soft_kl(logits, -logits).isfinite().all()
        assert soft_ce(logits, -logits).item() == pytest.approx(2e3)


def test_numbers_by_hand():  # fact 16
    student, teacher = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    assert soft_kl(student, teacher).item() == pytest.approx(0.1109, abs=5e-5)
    assert soft_kl(teacher, student).item() == pytest.approx(0.1201, abs=5e-5)
    assert soft_ce(student, teacher).item() == pytest.approx(0.6931, abs=5e-5)
    # the same as a relation: one head, one row, of width 1
    row, columns = torch.tensor([[[1.0]]]), torch.tensor([[[1.0], [0.0]]])
    ours = Pair(torch.zeros(1, 1, 1), columns)
    assert token_relation_loss(ours, Pair(row, columns)).item() == pytest.approx(0.1109, abs=5e-5)
    assert token_relation_loss(ours, Pair(row, columns), 1, "cross_entropy").item() == pytest.approx(0.6931, abs=5e-5)


def test_scale_by_hand():  # fact 17
    ones = torch.ones(1, 5, 4)
    logits = token_relation(ones, ones)
    assert (logits == 2).all()
    torch.testing.assert_close(logits.softmax(-1), torch.full((1, 1, 5, 5), 1 / 5))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("numbers", [1, 40, 77, 200, 10**6])
def test_blocks_are_the_whole(distance, numbers, monkeypatch):
    """One row at a time, some rows, one matrix, several, all at once: the same losses and gradients."""
    monkeypatch.setattr(relations, "CPU_BLOCK", numbers)
    q, k, v = (tokens(seed, 3, 7, 12).requires_grad_() for seed in range(3))
    teacher_q, teacher_k, teacher_v = (tokens(seed, 3, 7, 20) for seed in range(3, 6))
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def of(loss):
        qk = loss(Pair(q, k), Pair(teacher_q, teacher_k), 4, distance)
        vv = loss(Pair(v, v), Pair(teacher_v, teacher_v), 4, distance)
        return qk + vv, torch.autograd.grad((weights * (qk + vv)).sum(), (q, k, v))

    ours, gradients = of(token_relation_loss)
    expected, expected_gradients = of(plain_loss)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_blocks_in_float32(monkeypatch):
    monkeypatch.setattr(relations, "CPU_BLOCK", 300)
    one, other = (tokens(seed, 2, 20, 32, dtype=torch.float32).requires_grad_() for seed in range(2))
    pair, target = Pair(one, one), Pair(other, other)
    ours = token_relation_loss(pair, target, 4).sum()
    plain = plain_loss(pair, target, 4, "kl").sum()
    mine, theirs = (torch.autograd.grad(loss, one)[0] for loss in (ours, plain))
    assert (mine - theirs).abs().max() < 1e-6
    assert token_relation_loss(pair, target, 4).grad_fn is not None
    with torch.no_grad():  # nothing is differentiated then, and the loss is the same
        assert torch.equal(token_relation_loss(pair, target, 4).sum(), ours)


def test_no_gradient_reaches_the_teacher():
    student, teacher = tokens(0, 1, 4, 6).requires_grad_(), tokens(1, 1, 4, 6).requires_grad_()
    token_relation_loss(Pair(student, student), Pair(teacher, teacher), 2).sum().backward()
    soft_ce(student, teacher).sum().backward()
    assert teacher.grad is None


def test_columns_may_be_fewer_than_rows():
    student = Pair(tokens(0, 2, 6, 8), tokens(1, 2, 3, 8))
    teacher = Pair(tokens(2, 2, 6, 4), tokens(3, 2, 3, 4))
    torch.testing.assert_close(token_relation_loss(student, teacher), plain_loss(student, teacher, 1, "kl"))


def test_temperature():
    student, teacher = tokens(0, 4, 9), tokens(1, 4, 9)
    torch.testing.assert_close(soft_ce(student, teacher, 3.0), soft_ce(student / 3, teacher / 3))
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(soft_kl(student, teacher), soft_ce(student, teacher) - entropy)


def test_one_head_is_no_attention_map():  # fact 11 of MiniViT's sheet
    q, k = tokens(0, 1, 5, 8), tokens(1, 1, 5, 8)
    assert not torch.allclose(token_relation(q, k).softmax(-1), token_relation(q, k, 2).softmax(-1))
    assert token_relation(q, k)[0, 0, 1, 2].item() == pytest.approx((q[0, 1] @ k[0, 2]).item() / math.sqrt(8))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="12 heads do not divide a width of 200"):
        token_relation(tokens(0, 1, 2, 200), tokens(0, 1, 2, 200), 12)
    with pytest.raises(ValueError, match="relations of 5 tokens cannot follow relations of 6"):
        token_relation_loss(Pair(*[tokens(0, 1, 5, 8)] * 2), Pair(*[tokens(0, 1, 6, 8)] * 2))
