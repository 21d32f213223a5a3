"""The tasks of `clipmill eval`: how a model is measured on one set, and what is said of it."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shards_spec import imagenet
from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.data.labelled_images import find_split, open_train_and_test
from training.evaluation.classification import measure_classifier
from training.evaluation.clip_benchmark import dataset_task
from training.evaluation.config import EvalConfig
from training.evaluation.datacomp import find_task
from training.evaluation.linear_probe import linear_probe
from training.evaluation.nearest_neighbours import neighbour_scores
from training.evaluation.summary import IMAGENET
from training.evaluation.zero_shot import (
    Encoder,
    EvalSet,
    captioned_features,
    class_metrics,
    first_caption_recalls,
    labelled_features,
    recalls,
    zeroshot_scores,
)
from training.models.classifier import Classifier

# task, as the result's file is named by it -> task, as CLIP_benchmark names it in the file
TASKS: dict[str, str] = {
    "classification": "classification",
    "zeroshot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "retrieval-first-caption": "zeroshot_retrieval_first_caption",
    "linear-probe": "linear_probe",
    "knn": "knn_classification",
}
LEARNING = ("linear-probe", "knn")  # from the train split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Metrics, the number of images measured, of images left out, and what else is written beside the metrics."""

    metrics: dict[str, float]
    samples: int
    skipped: int
    details: dict[str, Any] = field(default_factory=dict)


def chosen_task(config: EvalConfig, loaded: LoadedModel, root: str) -> str:
    """Return the task to measure. Raises UserError when the model cannot be measured so."""
    if not isinstance(loaded.model, Classifier):
        return dataset_task(root) if config.task == "auto" else config.task
    if config.task == "auto":
        if not loaded.model.has_classes:
            raise UserError(
                "the model was trained without classes, and has no texts: --task knn or --task linear-probe measures "
                "its features"
            )
        return "classification"
    if config.task not in LEARNING:
        raise UserError(
            f"--task {config.task} needs texts, and the model is a classifier of images: --task linear-probe and knn "
            "measure its features, without --task its own classes are measured"
        )
    return config.task


def measure_task(config: EvalConfig, loaded: LoadedModel, data: EvalSet, task: str, device: str) -> Measurement:
    """Measure a model on a set.

    Raises:
        UserError: A file of the set is missing or wrong, or it has no split train where the task needs it.
        DataError: A shard is damaged, or the set does not fit the task.
    """
    bf16 = config.precision == "bf16"
    if task == "classification":
        return Measurement(*measure_classifier(loaded, data.root, device, bf16, config.batch_size))
    encoder = Encoder(loaded, config.batch_size, device, bf16)
    if task == "zeroshot":
        scores, labels = zeroshot_scores(encoder, data)
        details = {"classes": scores.shape[1], **_on_classes_of_variants(data.name, scores, labels)}
        return Measurement(class_metrics(scores, labels), len(labels), encoder.skipped, details)
    if task in LEARNING:
        return _learned(config, encoder, data, task)
    features = captioned_features(encoder, data)
    if task == "retrieval":
        metrics = recalls(features.images, features.texts, features.owner)
    else:
        metrics = first_caption_recalls(features)
    return Measurement(metrics, len(features.images), encoder.skipped)


def _on_classes_of_variants(dataset: str, scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """For ImageNet its acc1 on the classes of -A and of -R, told apart among these alone; nothing for other sets."""
    task = find_task(dataset, scores.shape[1])
    if task is None or task.key != IMAGENET:
        return {}
    found = {}
    for letter in ("a", "r"):
        chosen = torch.tensor(imagenet.labels_of_variant(letter))
        own = torch.isin(labels, chosen)
        if own.any():
            best = chosen[scores[own][:, chosen].argmax(dim=1)]
            found[f"imagenet-{letter}"] = float((best == labels[own]).double().mean())
    return {"acc1_on_classes_of": found}


def train_split(root: str, task: str) -> str:
    """Return the split that a task of `LEARNING` learns from. Raises UserError when there is none."""
    try:
        return find_split(root, ("train",))
    except UserError as error:
        raise UserError(
            f"--task {task} learns from a split train (`clipmill evalset EVAL --split train` writes one): {error}"
        ) from error


def _learned(config: EvalConfig, encoder: Encoder, data: EvalSet, task: str) -> Measurement:
    """A classifier of the train split's features, measured on the test split's."""
    train, test = open_train_and_test(data.root)
    classes = len(test.classes)
    bank, bank_labels = labelled_features(encoder, data, train, train_split(data.root, task))
    skipped = encoder.skipped
    features, labels = labelled_features(encoder, data, test, find_split(data.root))
    details: dict[str, Any] = {"classes": classes, "train_samples": len(bank_labels), "train_skipped": skipped}
    if task == "linear-probe":
        probe = linear_probe(bank, bank_labels, classes, encoder.device)
        scores = probe.scores(features)
        details["C"] = probe.c
    else:
        neighbours = min(config.neighbours, len(bank))
        if neighbours < config.neighbours:
            log.warning(
                "%s: --neighbours %d, there are %d training images: all vote", data.root, config.neighbours, neighbours
            )
        scores = neighbour_scores(bank, bank_labels, features, classes, neighbours)
        details["neighbours"] = neighbours
    return Measurement(class_metrics(scores, labels), len(labels), encoder.skipped - skipped, details)
