"""SiCLIP's losses against hand-written NumPy in float64, and pair matching: what is drawn, and by whom."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.losses.contrastive import clip_loss
from training.losses.distillation import (
    affinity_loss,
    element_feature_loss,
    feature_loss,
    interactive_loss,
    relation_loss,
)
from training.losses.pair_matching import Negatives, PairHead, key_ids, pair_loss, sample_negatives, text_ids
from training.losses.similarity import RowShare, Similarity

pytestmark = pytest.mark.integration

EYE = torch.eye(2, dtype=torch.float64)


def unit(seed, count=7, dim=5):
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def log_softmax(logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def tensors(*arrays):
    return [torch.from_numpy(array).requires_grad_() for array in arrays]


def numpy_relation(image, text, teacher_image, teacher_text, *, scale, teacher_scale):
    total = 0.0
    for ours, theirs in (
        ((image, text), (teacher_image, teacher_text)),
        ((text, image), (teacher_text, teacher_image)),
    ):
        student, teacher = (
            log_softmax(scale * ours[0] @ ours[1].T),
            log_softmax(teacher_scale * theirs[0] @ theirs[1].T),
        )
        total += (np.exp(teacher) * (teacher - student)).sum(axis=1).mean() / 2
    return total


def numpy_diagonal(scale, *pairs):
    return sum(-np.diag(log_softmax(scale * rows @ columns.T)).mean() for rows, columns in pairs) / len(pairs)


def test_losses_equal_numpy():
    arrays = [unit(seed) for seed in range(4)]
    image, text, teacher_image, teacher_text = arrays
    student = tensors(*arrays)
    feature = ((image - teacher_image) ** 2).mean() + ((text - teacher_text) ** 2).mean()
    contrastive = numpy_diagonal(6.0, (image, text), (text, image))
    expected = [
        (clip_loss(*student[:2], 6.0), contrastive),
        (element_feature_loss(*student), feature),
        (
            relation_loss(*student, student_scale=6.0, teacher_scale=9.0),
            numpy_relation(*arrays, scale=6.0, teacher_scale=9.0),
        ),
        (interactive_loss(*student, 6.0), numpy_diagonal(6.0, (image, teacher_text), (text, teacher_image))),
    ]
    for found, number in expected:
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(number, abs=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        element_feature_loss,
        lambda *features: relation_loss(*features, student_scale=6.0, teacher_scale=9.0),
        lambda *features: interactive_loss(*features, 6.0),
    ],
)
def test_gradient_reaches_the_student_alone(loss):
    student_and_teacher = tensors(*(unit(seed) for seed in range(4)))
    loss(*student_and_teacher).backward()
    assert all(features.grad.abs().sum() > 0 for features in student_and_teacher[:2])
    assert all(features.grad is None for features in student_and_teacher[2:])
    inputs, teacher = student_and_teacher[:2], [features.detach() for features in student_and_teacher[2:]]
    assert torch.autograd.gradcheck(lambda *ours: loss(*ours, *teacher), inputs)


def test_losses_are_float32_under_autocast():
    features = [torch.from_numpy(unit(seed)).float() for seed in range(4)]
    head, negatives = PairHead(5), negatives_of(10 * features[0] @ features[1].T, [])

    def losses():
        return (
            element_feature_loss(*features),
            relation_loss(*features, student_scale=6.0, teacher_scale=9.0),
            interactive_loss(*features, 6.0),
            pair_loss(head, *features[:2], negatives),
        )

    plain = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses() == plain


def test_feature_distillation_by_elements():  # fact 8
    assert element_feature_loss(EYE, EYE, EYE.flip(0), EYE).item() == pytest.approx(1.0)
    image, text, teacher_image, teacher_text = arrays = [unit(seed) for seed in range(4)]
    cosines = (image * teacher_image).sum(1).mean() + (text * teacher_text).sum(1).mean()
    lengths = [3 * arrays[0], arrays[1], 0.1 * arrays[2], arrays[3]]  # normalised inside
    assert 5 * element_feature_loss(*tensors(*lengths)).item() == pytest.approx(4 - 2 * cosines)
    assert element_feature_loss(*tensors(*arrays)).item() == pytest.approx(
        feature_loss(*tensors(*arrays)).item() * 2 / 5
    )


def test_relation_golden():  # fact 9
    image, text = tensors(unit(0), unit(1))
    assert relation_loss(image, text, image, text, student_scale=20.0, teacher_scale=20.0).item() < 1e-8
    for student_scale, teacher_scale, value in ((0.0, math.log(3), 0.130812), (math.log(3), 0.0, 0.143841)):
        loss = relation_loss(EYE, EYE, EYE, EYE, student_scale=student_scale, teacher_scale=teacher_scale)
        assert loss.item() == pytest.approx(value, abs=1e-6)


def test_relation_is_affinity_less_the_entropy_of_the_teacher():
    features = tensors(*(unit(seed) for seed in range(4)))
    entropy = affinity_loss(*features[2:], *features[2:], student_scale=9.0, teacher_scale=9.0)
    expected = affinity_loss(*features, student_scale=6.0, teacher_scale=9.0) - entropy
    assert relation_loss(*features, student_scale=6.0, teacher_scale=9.0).item() == pytest.approx(
        expected.item(), abs=1e-12
    )


@pytest.mark.parametrize(("scale", "loss"), [(2.6593, 4.6863), (14.2857, 0.00095872), (0.0, 7.3369)])
def test_interactive_golden(scale, loss):  # fact 10
    eye = torch.eye(1536, dtype=torch.float64)
    assert interactive_loss(eye, eye, eye, eye, scale).item() == pytest.approx(loss, rel=2e-5)
    assert loss == pytest.approx(math.log(1 + 1535 * math.exp(-scale)), rel=2e-5)


def random_pairs(count=7):
    shifted = torch.arange(count).roll(1)
    return [*tensors(unit(0, count), unit(1, count)), Negatives(shifted, shifted.roll(2))]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("logits", [1, 2])
def test_pair_loss_equals_numpy(logits, raw):
    image, text, negatives = random_pairs()
    head = PairHead(5, logits, raw).double()
    weight, bias = (value.detach().numpy() for value in (head.linear.weight, head.linear.bias))
    lengths = 1.0 if raw else 5.0
    pairs = [(n, n, 1) for n in range(7)]
    pairs += [(n, negatives.texts[n], 0) for n in range(7)] + [(negatives.images[n], n, 0) for n in range(7)]
    losses = []
    for v, s, label in pairs:
        scores = weight @ (lengths * unit(0)[v] * unit(1)[s]) + bias
        scores = np.array([0.0, scores[0]]) if logits == 1 else scores
        losses.append(-log_softmax(scores[None])[0, label])
    grown = (image, text) if raw else (3 * image, 0.5 * text)  # normalised inside unless raw
    loss = pair_loss(head, *grown, negatives)
    assert loss.item() == pytest.approx(np.mean(losses), abs=1e-12)
    assert torch.autograd.gradcheck(lambda v, s: pair_loss(head, v, s, negatives), (image, text))


def constant_head(bias, dim=5):
    head = PairHead(dim, len(bias)).double()
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.tensor(bias))
    return head


def test_pair_loss_of_heads_that_say_nothing():  # fact 12
    pairs = random_pairs()
    assert pair_loss(constant_head([0.0, 0.0]), *pairs).item() == pytest.approx(math.log(2))
    best = pair_loss(constant_head([math.log(2 / 3), math.log(1 / 3)]), *pairs)
    assert best.item() == pytest.approx(0.636514, abs=1e-6)


def test_a_product_can_tell_pairs_and_a_sum_cannot():  # fact 12
    (v, w), (s, t) = torch.from_numpy(unit(0, 2)), torch.from_numpy(unit(1, 2))
    hyperplane = torch.from_numpy(np.random.default_rng(2).normal(size=10))

    def additive(image, text):
        return hyperplane @ torch.cat([image, text])

    assert (additive(v, s) + additive(w, t)).item() == pytest.approx(
        (additive(v, t) + additive(w, s)).item(), abs=1e-12
    )
    head = PairHead(2).double()
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[-10.0, -10.0], [10.0, 10.0]]))  # constant rows: the cosine
        head.linear.bias.copy_(torch.tensor([10.0, -10.0]))
    swapped = torch.tensor([1, 0])
    assert pair_loss(head, EYE, EYE, Negatives(swapped, swapped)).item() < 1e-6


def negatives_of(logits, ids, seed=0, step=0):
    """Negatives of a whole batch, whose rows are images."""
    return sample_negatives(logits, logits.T, ids, seed=seed, step=step)


def test_negatives_are_never_the_anchor():  # fact 12
    features = F.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), dim=1).half()
    logits = 100 * (features @ features.T)  # the right pair is the most similar by far
    assert logits.dtype == torch.float16
    after = logits.softmax(dim=1).fill_diagonal_(0)
    assert (after.sum(dim=1) == 0).any()  # what masking after the softmax would leave
    for step in range(200):
        for index in negatives_of(logits, [], step=step):
            assert ((index >= 0) & (index < 64) & (index != torch.arange(64))).all()


def test_duplicates_are_no_negatives():
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 3], [5, 0, 0]])
    texts, keys = text_ids(tokens), key_ids(["a", "b", "c", "b"], torch.device("cpu"))
    assert (texts == texts[0]).tolist() == [True, False, True, False]
    assert (keys == keys[1]).tolist() == [False, True, False, True]
    drawn = [negatives_of(torch.zeros(4, 4), [texts, keys], step=step) for step in range(100)]
    allowed = [{1, 3}, {0, 2}, {1, 3}, {0, 2}]
    for part in (0, 1):
        assert [{int(negatives[part][n]) for negatives in drawn} for n in range(4)] == allowed


def test_pairs_without_a_negative_leave_the_mean():
    image, text, _ = random_pairs(3)
    same = torch.tensor([4, 4, 9])
    negatives = negatives_of(image @ text.T, [same])
    assert negatives.texts.tolist()[:2] == [2, 2]
    alone = negatives_of(image @ text.T, [torch.zeros(3, dtype=torch.long)])
    assert alone.texts.tolist() == alone.images.tolist() == [-1] * 3
    head = PairHead(5).double()
    loss = pair_loss(head, image, text, alone)
    assert loss.item() == pytest.approx(F.cross_entropy(head(image, text), torch.ones(3, dtype=torch.long)).item())
    loss.backward()
    assert image.grad.isfinite().all()


def test_frequencies_follow_the_masked_softmax():  # fact 13
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(8, 8)) * 2)
    counts, steps = np.zeros((2, 8, 8)), 6250  # 100,000 draws
    for step in range(steps):
        for part, index in enumerate(negatives_of(logits, [], seed=3, step=step)):
            counts[part, np.arange(8), index.numpy()] += 1
    for found, similarity in zip(counts, (logits.numpy(), logits.numpy().T), strict=True):
        expected = np.exp(similarity) * (1 - np.eye(8))
        expected *= steps / expected.sum(axis=1, keepdims=True)
        deviation = (found - expected)[expected > 0] ** 2 / expected[expected > 0]
        assert found[expected == 0].sum() == 0
        assert deviation.sum() < 48 + 4 * math.sqrt(2 * 48)  # chi-squared: 8 rows of 7 - 1 degrees of freedom


def test_draws_belong_to_seed_step_and_anchor():
    logits = torch.zeros(6, 6)
    one, again = negatives_of(logits, [], seed=1, step=2), negatives_of(logits, [], seed=1, step=2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    others = [
        negatives_of(logits, [], seed=1, step=3),
        negatives_of(logits, [], seed=2, step=2),
        Negatives(one.images, one.texts),
    ]
    assert not any(torch.equal(one.texts, other.texts) for other in others)


def test_the_shares_of_processes_draw_what_one_process_draws():  # fact 13
    """Their losses and gradients are compared in test_row_share, by four processes."""
    image, text = (torch.from_numpy(unit(seed, 14, 6)) for seed in (0, 1))
    ids = torch.arange(14) // 2
    whole = negatives_of(10 * image @ text.T, [ids], seed=7, step=11)
    parts = []
    for rank in range(4):
        own = RowShare(rank, 4).rows(14)
        logits = Similarity(image, text, 10.0).both_directions(own)
        parts.append(sample_negatives(*logits, [ids], seed=7, step=11, start=own.start))
    for index, drawn in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), drawn)
        assert len(set(drawn.tolist())) > 3
