"""Losses on index lists against the dense definition in float64 NumPy."""

import math

import numpy as np
import pytest
import torch

from training.losses.multilabel import (
    PAD,
    frequency_bias,
    mean_loss,
    pad_labels,
    sigmoid_loss,
    softmax_loss,
)


def multi_hot(labels, classes):
    target = np.zeros((len(labels), classes))
    for row, own in zip(target, labels.tolist(), strict=True):
        row[[label for label in own if label != PAD]] = 1
    return target


def dense_sigmoid(z, t):
    """-t log s(z) - (1 - t) log(1 - s(z)), summed over classes."""
    return (t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)).sum(axis=1)


def random_case(seed, rows=5, classes=40):
    rng = np.random.default_rng(seed)
    lists = [sorted(rng.choice(classes, size, replace=False).tolist()) for size in (0, 1, 3, 7, classes)[:rows]]
    return rng.normal(0, 4, (rows, classes)), pad_labels(lists)


def test_zero_logits():  # fact 10
    logits = torch.zeros(2, 4, requires_grad=True)
    loss = sigmoid_loss(logits, torch.tensor([[0, 2], [PAD, PAD]])).mean()
    loss.backward()
    assert loss.item() == pytest.approx(4 * math.log(2), abs=1e-6) == pytest.approx(2.7726, abs=1e-4)
    assert torch.allclose(logits.grad.abs(), torch.full((2, 4), 0.25))
    assert logits.grad.sign().tolist() == [[-1, 1, -1, 1], [1, 1, 1, 1]]


def test_given_logits():  # fact 10
    logits = torch.tensor([[2.0, -1, 0, 3], [0.5, -2, 1, -3]])
    assert sigmoid_loss(logits, torch.tensor([[0, 2], [PAD, PAD]])).mean().item() == pytest.approx(3.3224, abs=5e-5)


def test_zero_logits_of_the_published_vocabulary():  # fact 10
    loss = sigmoid_loss(torch.zeros(1, 24_320), torch.tensor([[5, 77]])).item()
    assert loss == pytest.approx(16857.34, abs=0.01)


def test_magnitude_at_the_start():  # section 3: about 17.8k
    logits = 0.55 * torch.randn(4, 24_320, generator=torch.Generator().manual_seed(0))
    assert sigmoid_loss(logits, torch.tensor([[1, 2, 3]] * 4)).mean().item() == pytest.approx(17_800, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_sigmoid_loss_is_the_dense_one(seed):
    z, labels = random_case(seed)
    t = multi_hot(labels, 40)
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    losses = sigmoid_loss(logits, labels)
    assert np.allclose(losses.detach(), dense_sigmoid(z, t), rtol=1e-5)  # float32: 40 roundings of 6e-8 at most
    losses.mean().backward()
    assert np.allclose(logits.grad, (1 / (1 + np.exp(-z)) - t) / len(z), rtol=1e-5, atol=1e-6)
    dense = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.detach(), torch.tensor(t, dtype=torch.float32), reduction="none"
    )
    assert torch.allclose(losses.detach(), dense.sum(dim=1), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_softmax_loss_is_the_dense_one(seed):
    z, labels = random_case(seed)
    t = multi_hot(labels, 40)
    normalised = t / np.maximum(t.sum(axis=1, keepdims=True), 1)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    losses = softmax_loss(logits, labels)
    assert np.allclose(losses.detach(), -(normalised * log_p).sum(axis=1), rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    expected = np.exp(log_p) * (t.sum(axis=1, keepdims=True) > 0) - normalised
    assert np.allclose(logits.grad, expected, atol=1e-6)


def test_extreme_logits_stay_exact():
    z = np.array([[90.0, -90, 30, 25, -30, 0]])
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    loss = sigmoid_loss(logits, torch.tensor([[1, 2]]))
    assert loss.item() == pytest.approx(dense_sigmoid(z, multi_hot(torch.tensor([[1, 2]]), 6)).item(), rel=1e-6)
    loss.backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_fp32_under_autocast(loss):
    z, labels = random_case(0)
    logits = torch.tensor(z, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(logits.float(), labels))


def test_rows_without_labels():
    losses, counts = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 0, 1])
    assert mean_loss(losses, counts, drop_empty=False).item() == 3
    assert mean_loss(losses, counts, drop_empty=True).item() == 3.5
    assert mean_loss(losses, torch.zeros(3), drop_empty=True).item() == 0
    padded = pad_labels([[3], [], [1, 2]])
    assert padded.tolist() == [[3, PAD], [PAD, PAD], [1, 2]]
    assert pad_labels([[], []]).shape == (2, 0)
    assert sigmoid_loss(torch.zeros(2, 3), pad_labels([[], []])).tolist() == pytest.approx([3 * math.log(2)] * 2)


def test_bias_of_frequencies_starts_at_the_classes_entropy():
    documents, captions = [900, 50, 1, 0, 1000], 1000
    share = np.clip(np.array(documents) / captions, 0.5 / captions, 1 - 0.5 / captions)
    bias = frequency_bias(documents, captions)
    assert np.allclose(bias, np.log(share / (1 - share)), rtol=1e-5)
    assert np.allclose(torch.sigmoid(bias), share, rtol=1e-5)
