"""Accuracy of a classification, counted over batches."""

import torch
from torch import Tensor


class AccuracyMeter:
    """Counts correct answers per class; metrics are named and defined as CLIP_benchmark has them."""

    def __init__(self, classes: int) -> None:
        self.images = torch.zeros(classes, dtype=torch.int64)
        self.top1 = torch.zeros(classes, dtype=torch.int64)
        self.top5 = torch.zeros(classes, dtype=torch.int64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            scores: (B, K) on any device. With fewer than five classes the top five are all of them.
            labels: (B,) on the CPU.
        """
        classes = len(self.images)
        is_correct = scores.topk(min(5, classes), dim=1).indices.cpu() == labels[:, None]
        self.images += torch.bincount(labels, minlength=classes)
        self.top1 += torch.bincount(labels[is_correct[:, 0]], minlength=classes)
        self.top5 += torch.bincount(labels[is_correct.any(dim=1)], minlength=classes)

    @property
    def total(self) -> int:
        """The number of images counted."""
        return int(self.images.sum())

    def metrics(self) -> dict[str, float]:
        """Return acc1, acc5 and mean_per_class_recall, over the classes that occur; needs at least one image."""
        occurs = self.images > 0
        return {
            "acc1": int(self.top1.sum()) / self.total,
            "acc5": int(self.top5.sum()) / self.total,
            "mean_per_class_recall": float((self.top1[occurs] / self.images[occurs]).double().mean()),
        }
