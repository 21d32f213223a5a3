"""Measuring an image classifier on labelled images: the test of `probe`, `finetune` and `clipmill eval`."""

import numpy as np
import torch

from shards_spec.class_names import describe_difference
from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.data.batches import load_batches
from training.data.labelled_images import LabelledImages, open_images
from training.data.labelled_rows import LabelledImageRows
from training.data.order import BatchPlan
from training.evaluation.accuracy import AccuracyMeter
from training.models.classifier import Classifier

BATCH = 64  # images per forward pass


@torch.no_grad()
def classification_metrics(
    classifier: Classifier, rows: LabelledImageRows, *, device: str, workers: int, bf16: bool
) -> dict[str, float]:
    """Return acc1, acc5 and mean_per_class_recall (of the classes that occur) of a classifier in eval mode."""
    meter = AccuracyMeter(classifier.classes)
    for batch in load_batches(rows, batch_ranges(len(rows.chosen)), workers=workers, device=device):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logits = classifier(batch["images"])
        meter.add(logits.float(), batch["targets"].cpu())
    return meter.metrics()


def measure_classifier(loaded: LoadedModel, root: str, device: str, bf16: bool) -> tuple[dict[str, float], int]:
    """Return the metrics of a classifier on the test images of ``root``, and the number of those images.

    Raises:
        UserError: The test images have other classes than the classifier, or there are none.
        DataError: A shard is damaged.
    """
    model = loaded.model
    images = open_images(root, train=False)
    if images.classes != model.names:
        raise UserError(
            f"{root} has other classes than the model ({describe_difference(images.classes, model.names)}); after "
            "pre-training, `clipmill train probe` makes a classifier of its classes"
        )
    metrics = classification_metrics(model, plain_rows(images, loaded), device=device, workers=0, bf16=bf16)
    return metrics, len(images.labels)


def plain_rows(images: LabelledImages, student: LoadedModel) -> LabelledImageRows:
    """Return all images in their stored order, as plain crops."""
    return LabelledImageRows(images, student, BatchPlan(BATCH), None, np.arange(len(images.labels)))


def batch_ranges(count: int) -> list[range]:
    """Return the positions of the batches of ``count`` rows; the last batch may be smaller."""
    return [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
