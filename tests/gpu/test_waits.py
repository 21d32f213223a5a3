"""Forward passes queue their work on the card and do not wait for it, and compute there what they do on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cuda_only import only_on_cuda

from training.losses.clip_kd import gradient_loss
from training.losses.contrastive import clip_loss
from training.losses.distillation import (
    affinity_loss,
    element_feature_loss,
    ensemble_relation_loss,
    interactive_loss,
    relation_loss,
)
from training.losses.multilabel import pad_labels, sigmoid_loss, softmax_loss
from training.losses.pair_matching import PairHead, key_ids, pair_loss, sample_negatives, text_ids
from training.losses.similarity import Similarity
from training.models.range_augment import RangeAugment

COUNT = 12


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Within, an operation that waits for the card raises RuntimeError."""
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def features(device: str) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(COUNT, 8, generator=drawn, dtype=torch.float64), dim=-1) for _ in range(4)]
    return [row.to(device) for row in rows]


def test_a_blocking_copy_is_a_wait(device):
    only_on_cuda(device)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits(device):
        torch.arange(3).to(device)


def losses(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [
        clip_loss(*rows[:2], 20.0),
        affinity_loss(*rows),
        relation_loss(*rows, student_scale=20.0, teacher_scale=30.0),
        interactive_loss(*rows, 20.0),
        element_feature_loss(*rows),
        gradient_loss(Similarity(*rows[:2], 20.0), Similarity(*rows[2:], 30.0)),
        ensemble_relation_loss(Similarity(*rows[:2], 20.0), [Similarity(*rows[2:], 30.0)] * 2),
    ]


@pytest.mark.parametrize("most", [8192, 4], ids=["whole", "blocks"])
def test_losses_of_pairs(device, monkeypatch, most):
    monkeypatch.setattr("training.losses.similarity.MAX_WHOLE", most)
    monkeypatch.setattr("training.losses.similarity.BLOCK_ROWS", 5)
    there = features(device)
    with no_waits(device):
        found = losses(there)
    for one, other in zip(found, losses(features("cpu")), strict=True):
        torch.testing.assert_close(one.cpu(), other)


def test_negatives_are_those_of_the_cpu(device):
    tokens, keys = torch.arange(3 * COUNT).view(COUNT, 3) // 6, [f"{index // 2}" for index in range(COUNT)]
    head = PairHead(8).double()

    def on(place: str) -> tuple[list[list[int]], float]:
        image, text, *_ = features(place)
        moved = head.to(place)
        sent = tokens.to(place)
        with no_waits(place):
            ids = (text_ids(sent), key_ids(keys, sent.device))
            logits = 20 * image @ text.T
            negatives = sample_negatives(logits, logits.T, ids, seed=7, step=3)
            loss = pair_loss(moved, image, text, negatives)
        return [one.tolist() for one in negatives], loss.item()

    there, here = on(device), on("cpu")
    assert there[0] == here[0]
    assert there[1] == pytest.approx(here[1])


def test_labels(device):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    labels = pad_labels([[1, 4], [], [8]])
    for loss in (sigmoid_loss, softmax_loss):
        there = logits.to(device), labels.to(device)
        with no_waits(device):
            found = loss(*there)
        torch.testing.assert_close(found.cpu(), loss(logits, labels))


def test_range_augment(device):
    torch.manual_seed(0)
    augment = RangeAugment((0.5,) * 3, (0.25,) * 3)
    augment.BOUNDS = {name: RangeAugment.BOUNDS[name] for name in ("brightness", "contrast")}  # noise is the device's
    images, drawn = torch.randn(COUNT, 3, 8, 8), augment.draw(COUNT)
    expected = augment(images, drawn)
    moved, there = augment.to(device), images.to(device)
    with no_waits(device):
        found = moved(there, drawn)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-4, atol=1e-4)
