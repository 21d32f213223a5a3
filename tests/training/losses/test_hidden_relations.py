"""MiniViT's relations of attention and hidden states; facts are those of the MiniViT sheet, section 13."""

import math

import pytest
import torch
import torch.nn.functional as F

from training.losses.hidden_relations import (
    attention_relation_loss,
    deit_soft_distillation,
    gram_distance,
    hidden_relation_loss,
)
from training.losses.relations import soft_ce, soft_kl, token_relation

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed, width):
    return torch.linalg.qr(tokens(seed, width, width))[0]


def written_out(student, teacher, heads):
    """The attention relations' loss, one pair, head and row after the other."""
    terms = []
    for i in range(3):
        for j in range(3):
            parts = [x.chunk(3, -1) for x in (student, teacher)]
            cut = [[part[k].unflatten(-1, (heads, -1)) for k in (i, j)] for part in parts]
            for head in range(heads):
                own, theirs = (
                    (rows[:, :, head] @ columns[:, :, head].mT / math.sqrt(rows.shape[-1])).softmax(-1)
                    for rows, columns in cut
                )
                terms.append(-(theirs * own.log()).sum(-1).mean(-1))
    return torch.stack(terms)


# fact 10
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_relations_are_nine_terms_of_their_formula(heads):
    student, teacher = tokens(0, 2, 5, 3 * 8), tokens(1, 2, 5, 3 * 12)  # of other widths
    terms = written_out(student, teacher, heads)
    assert len(terms) == 9 * heads
    assert torch.allclose(attention_relation_loss(student, teacher, heads), terms.mean(0), atol=1e-12)


# fact 10
def test_attention_relations_do_not_depend_on_the_basis():
    student, teacher = tokens(0, 2, 5, 24), tokens(1, 2, 5, 36)
    turned = torch.cat([part @ rotation(2, 8) for part in student.chunk(3, -1)], -1)
    loss = attention_relation_loss(student, teacher)
    assert torch.allclose(attention_relation_loss(turned, teacher), loss, atol=1e-12)
    apart = torch.cat([part @ rotation(seed, 8) for seed, part in enumerate(student.chunk(3, -1))], -1)
    assert not torch.allclose(attention_relation_loss(apart, teacher), loss, atol=1e-3)


# fact 10
def test_attention_relations_at_a_perfect_match():
    teacher = tokens(1, 2, 5, 24)
    student = teacher.clone().requires_grad_()
    loss = attention_relation_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.abs().max() < 1e-12
    relations = [
        token_relation(rows, columns).softmax(-1) for rows in teacher.chunk(3, -1) for columns in teacher.chunk(3, -1)
    ]
    entropy = torch.stack([-(each * each.log()).sum(-1).mean((1, 2)) for each in relations]).mean(0)
    assert torch.allclose(loss, entropy, atol=1e-12)


# fact 10
@pytest.mark.parametrize(("student", "teacher"), [(8, 12), (12, 8)])
def test_relation_heads_must_divide_both_widths(student, teacher):
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        attention_relation_loss(tokens(0, 2, 5, 3 * student), tokens(1, 2, 5, 3 * teacher), 3)
    with pytest.raises(ValueError, match="relations of 5 tokens cannot follow relations of 4"):
        attention_relation_loss(tokens(0, 2, 5, 24), tokens(1, 2, 4, 24))


# fact 11
def test_one_relation_head_is_no_attention_map():
    queries, keys = tokens(0, 2, 5, 8), tokens(1, 2, 5, 8)
    one = token_relation(queries, keys).softmax(-1)
    per_head = token_relation(queries, keys, 2).softmax(-1)
    assert (per_head - one).abs().max() > 0.1
    attention = (queries @ keys.mT / 8**0.5).softmax(-1)  # of one head
    assert torch.allclose(one[:, 0], attention, atol=1e-12)


# fact 12
@pytest.mark.parametrize("count", [4, 40])  # fewer and more tokens than channels
def test_the_released_loss_of_hidden_states(count):
    student, teacher = tokens(0, 2, count, 8), tokens(1, 2, count, 12)
    cosines = [F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT for x in (student, teacher)]
    expected = (cosines[0] - cosines[1]).square().mean((1, 2)) * 49
    loss = hidden_relation_loss(student, teacher)
    assert torch.allclose(loss, expected, atol=1e-12)
    assert hidden_relation_loss(student, student).abs().max() < 1e-12
    assert hidden_relation_loss(student, 3 * student @ rotation(2, 8)).abs().max() < 1e-12
    assert torch.allclose(hidden_relation_loss(3 * student @ rotation(2, 8), teacher), loss, atol=1e-12)


# fact 12
def test_the_identity_of_gram_matrices_in_single_precision():
    student, teacher = (F.normalize(tokens(seed, 2, 300, 16).float(), dim=-1) for seed in (0, 1))
    whole = (student.double() @ student.double().mT - teacher.double() @ teacher.double().mT).square().sum((1, 2))
    found = gram_distance(student, teacher)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), whole, rtol=1e-5)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(gram_distance(student, teacher).sum(), student)
    assert torch.allclose(gradient, (4 * (student @ student.mT - teacher @ teacher.mT) @ student).detach(), atol=1e-3)


# fact 12
@pytest.mark.parametrize("count", [3, 9])  # fewer and more tokens than channels
def test_gradients_of_the_released_loss(count):
    student, teacher = tokens(0, 2, count, 5).requires_grad_(), tokens(1, 2, count, 4)
    assert torch.autograd.gradcheck(lambda x: gram_distance(x, teacher), student)
    assert torch.autograd.gradcheck(lambda x: hidden_relation_loss(x, teacher), student)


@pytest.mark.parametrize("count", [3, 9])
def test_products_that_cancel_are_not_tf32(count, monkeypatch):
    torch.set_float32_matmul_precision("high")  # as the trainer does on CUDA
    seen = []
    product = torch.Tensor.__matmul__

    def noting(one, other):
        seen.append(torch.get_float32_matmul_precision())
        return product(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", noting)
    try:
        student = tokens(0, 2, count, 5).float().requires_grad_()
        gram_distance(student, tokens(1, 2, count, 4).float()).sum().backward()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}
    assert len(seen) == (3 if count == 3 else 5)


# fact 12
def test_the_papers_loss_of_hidden_states():
    student, teacher = tokens(0, 2, 7, 8), tokens(1, 2, 7, 12)
    own, theirs = ((x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) for x in (student, teacher))
    assert torch.allclose(theirs.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    expected = -(theirs * own.log()).sum(-1).mean(-1)
    assert torch.allclose(hidden_relation_loss(student, teacher, "paper"), expected, atol=1e-12)
    for mode in ("paper", "release"):
        with pytest.raises(ValueError, match="tokens"):
            hidden_relation_loss(student, teacher[:, :6], mode)


def test_losses_are_in_single_precision_under_autocast():
    student, teacher = tokens(0, 2, 40, 24).bfloat16(), tokens(1, 2, 40, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for loss in (
            attention_relation_loss(student, teacher),
            hidden_relation_loss(student, teacher),
            hidden_relation_loss(student, teacher, "paper"),
            deit_soft_distillation(student[:, 0], teacher[:, 0]),
        ):
            assert loss.dtype == torch.float32
            assert loss.shape == (2,)
    exact = hidden_relation_loss(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hidden_relation_loss(student, teacher), exact)


# fact 14
def test_the_soft_distillation_of_mini_deit():
    student, teacher = tokens(0, 6, 1000), tokens(1, 6, 1000)
    released = (
        F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True) / student.numel()
    )
    loss = deit_soft_distillation(student, teacher)
    assert torch.allclose(loss.mean(), released, rtol=1e-10)
    assert torch.allclose(1000 * loss.mean(), soft_kl(student, teacher).mean(), rtol=1e-10)
    warm = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1), reduction="sum", log_target=True)
    assert torch.allclose(deit_soft_distillation(student, teacher, 3.0).mean(), warm * 9 / student.numel(), rtol=1e-10)


# fact 17
def test_numbers_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert soft_ce(student, teacher).item() == pytest.approx(0.6931, abs=5e-5)
    assert soft_ce(teacher, teacher).item() == pytest.approx(0.5822, abs=5e-5)
    assert soft_kl(student, teacher).item() == pytest.approx(0.1109, abs=5e-5)
    orthogonal, parallel = torch.eye(2).unsqueeze(0), torch.tensor([[[1.0, 0], [2, 0]]])
    assert gram_distance(orthogonal, F.normalize(parallel, dim=-1)).item() / 4 == pytest.approx(0.5)
    assert hidden_relation_loss(orthogonal, parallel).item() == pytest.approx(24.5)
