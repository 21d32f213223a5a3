"""Counting right answers of a classification over batches, whatever gives the scores."""

import torch
from torch import Tensor


class AccuracyMeter:
    """Right answers per class; metrics are named and defined as CLIP_benchmark has them."""

    def __init__(self, classes: int) -> None:
        self.seen, self.first, self.in_five = (torch.zeros(classes, dtype=torch.int64) for _ in range(3))

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """(B, K) scores on any device, (B,) labels on the CPU; five are all where there are fewer classes."""
        classes = len(self.seen)
        right = scores.topk(min(5, classes), dim=1).indices.cpu() == labels[:, None]
        self.seen += torch.bincount(labels, minlength=classes)
        self.first += torch.bincount(labels[right[:, 0]], minlength=classes)
        self.in_five += torch.bincount(labels[right.any(dim=1)], minlength=classes)

    @property
    def total(self) -> int:
        """Images counted."""
        return int(self.seen.sum())

    def metrics(self) -> dict[str, float]:
        """acc1, acc5 and mean_per_class_recall, over the classes that occur; at least one image was counted."""
        there = self.seen > 0
        return {
            "acc1": int(self.first.sum()) / self.total,
            "acc5": int(self.in_five.sum()) / self.total,
            "mean_per_class_recall": float((self.first[there] / self.seen[there]).double().mean()),
        }
