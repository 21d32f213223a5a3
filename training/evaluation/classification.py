"""Measuring an image classifier on labelled images: the test of `probe`, `finetune` and `clipmill eval`."""

import numpy as np
import torch

from shards_spec.class_names import describe_difference
from shards_spec.files import DataError, UserError
from shards_spec.messages import counted
from shards_spec.models import LoadedModel
from training.data.batches import load_batches
from training.data.labelled_images import LabelledImages, open_images
from training.data.labelled_rows import LabelledImageRows
from training.data.order import BatchPlan
from training.evaluation.accuracy import AccuracyMeter
from training.models.classifier import Classifier

BATCH = 64  # images per forward pass


def classification_metrics(
    classifier: Classifier, rows: LabelledImageRows, *, device: str, workers: int, bf16: bool
) -> dict[str, float]:
    """Return acc1, acc5 and mean_per_class_recall (of the classes that occur) of a classifier in eval mode.

    Raises as `count_answers` does.
    """
    return count_answers(classifier, rows, device=device, workers=workers, bf16=bf16).metrics()


@torch.no_grad()
def count_answers(
    classifier: Classifier,
    rows: LabelledImageRows,
    *,
    device: str,
    workers: int = 0,
    bf16: bool = False,
    batch_size: int = BATCH,
) -> AccuracyMeter:
    """Return the counted answers of a classifier in eval mode to all rows; images that do not decode are left out.

    Raises DataError when none decodes, or a shard is damaged.
    """
    meter = AccuracyMeter(classifier.classes)
    positions = batch_ranges(len(rows.chosen), batch_size)
    for batch in load_batches(rows, positions, workers=workers, device=device, skip_empty=True):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logits = classifier(batch["images"])
        meter.add(logits.float(), batch["targets"].cpu())
    if not meter.total:
        raise no_image_decodes(rows)
    return meter


def measure_classifier(
    loaded: LoadedModel, root: str, device: str, bf16: bool, batch_size: int = BATCH
) -> tuple[dict[str, float], int, int]:
    """Measure a classifier on the test images of ``root``.

    Returns:
        Its metrics, the number of images they are over, and of those left out, which do not decode.

    Raises:
        UserError: The test images have other classes than the classifier, or there are none.
        DataError: A shard is damaged, or no image decodes.
    """
    model = loaded.model
    images = open_images(root, train=False)
    if images.classes != model.names:
        raise UserError(
            f"{root} has other classes than the model ({describe_difference(images.classes, model.names)}); after "
            "pre-training, `clipmill train probe` makes a classifier of its classes"
        )
    rows = plain_rows(images, loaded)
    meter = count_answers(model, rows, device=device, bf16=bf16, batch_size=batch_size)
    return meter.metrics(), meter.total, len(rows.chosen) - meter.total


def no_image_decodes(rows: LabelledImageRows) -> DataError:
    """Return the error of rows of which none can be used; it names the first of them."""
    first, _ = rows.images.image(int(rows.chosen[0]))
    return DataError(f"none of {counted(len(rows.chosen), 'image')} decodes, first {first}; download the set again")


def plain_rows(images: LabelledImages, student: LoadedModel) -> LabelledImageRows:
    """Return all images in their stored order, as plain crops."""
    return LabelledImageRows(images, student, BatchPlan(BATCH), None, np.arange(len(images.labels)))


def batch_ranges(count: int, size: int = BATCH) -> list[range]:
    """Return the positions of the batches of ``count`` rows; the last batch may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
