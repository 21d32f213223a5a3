"""The student against what was written: features of the same images and texts, how often they agree, and speeds."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.export.probe import Probe, noise
from training.models.classifier import Classifier

# per dtype: largest difference of a feature of unit length (of a logit, as `Comparison` has it), smallest cosine
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999}
BATCH = 16
TIMED_SECONDS = 0.5  # the passes that a speed is the median of


class Encoders(NamedTuple):
    """A model as two functions; features are of unit length, but those of a model with classes are its logits."""

    image: Callable[[Tensor], Tensor]
    """(B, 3, S, S) normalised pixels -> (B, E)"""
    text: Callable[[list[str]], Tensor] | None
    """texts -> (N, E); None without a text tower"""
    is_classifier: bool = False
    """whether the images' features are logits"""


@dataclass(frozen=True)
class Comparison:
    """What a student and its export differ by.

    Attributes:
        difference: The largest absolute difference of a feature. That of a classifier's logits, which can be of any
            size, is divided by the largest one where it is above 1.
        image_cosine: The smallest cosine of two features of one image.
        text_cosine: The same of a text; None without a text tower.
        agreement: The share of the images whose best text (or class) is the same; None without both.
        accuracy: The share whose best text (or class) is their own, of the student and of the export; None for noise.
    """

    difference: float
    image_cosine: float
    text_cosine: float | None
    agreement: float | None
    accuracy: tuple[float, float] | None


class Speed(NamedTuple):
    """Images and texts per second, one at a time; no texts without a text tower."""

    images: float
    texts: float | None


def encoders_of(loaded: LoadedModel) -> Encoders:
    """Return the encoders of a model as `load_model`, `load_run` and `load_onnx` return them."""
    model = loaded.model
    if isinstance(model, Classifier):
        if model.has_classes:
            return Encoders(model, None, is_classifier=True)
        return Encoders(lambda pixels: model.encode_image(pixels, normalize=True), None)
    return Encoders(
        lambda pixels: model.encode_image(pixels, normalize=True),
        lambda texts: model.encode_text(loaded.tokenizer(texts), normalize=True),
    )


@torch.no_grad()
def features(encoders: Encoders, probe: Probe) -> tuple[Tensor, Tensor | None]:
    """Return the features of a probe's images (N, E), and of its texts (M, E) where there is a text tower."""
    images = torch.cat([encoders.image(pixels) for pixels in torch.split(probe.pixels, BATCH)]).float()
    if encoders.text is None:
        return images, None
    starts = range(0, len(probe.texts), BATCH)
    return images, torch.cat([encoders.text(probe.texts[start : start + BATCH]) for start in starts]).float()


def compare(student: Encoders, export: Encoders, probe: Probe) -> Comparison:
    """Compare two models. An export of the image tower alone is compared by its images only."""
    images, texts = features(student, probe)
    their_images, their_texts = features(export, probe)
    difference = float((images - their_images).abs().max())
    if student.is_classifier:
        difference /= max(1.0, float(images.abs().max()))
    text_cosine = None
    if texts is not None and their_texts is not None:
        difference = max(difference, float((texts - their_texts).abs().max()))
        text_cosine = float(F.cosine_similarity(texts, their_texts).min())
    scores = images if student.is_classifier else _scores(images, texts)
    their_scores = their_images if student.is_classifier else _scores(their_images, their_texts)
    agreement = accuracy = None
    if scores is not None and their_scores is not None:
        best, their_best = scores.argmax(1), their_scores.argmax(1)
        agreement = float((best == their_best).double().mean())
        if probe.targets is not None:
            shares = [float((found == probe.targets).double().mean()) for found in (best, their_best)]
            accuracy = (shares[0], shares[1])
    image_cosine = float(F.cosine_similarity(images, their_images).min())
    return Comparison(difference, image_cosine, text_cosine, agreement, accuracy)


def _scores(images: Tensor, texts: Tensor | None) -> Tensor | None:
    """Similarities (N, M) of images and texts, where there are texts."""
    return None if texts is None else images @ texts.mT


def check_same(comparison: Comparison, folder: Path, dtype: str) -> None:
    """Raise UserError when an export computes something else than its student."""
    what = f"{folder}: loaded back, its outputs differ"
    if not comparison.difference <= TOLERANCE[dtype]:  # NaN is not
        raise UserError(f"{what} by {comparison.difference:.2g} (more than {TOLERANCE[dtype]:g}); do not use it")
    cosine = min(comparison.image_cosine, 1 if comparison.text_cosine is None else comparison.text_cosine)
    if cosine < MIN_COSINE[dtype]:
        raise UserError(f"{what}: a cosine is {cosine:.5f} (less than {MIN_COSINE[dtype]}); do not use it")


@torch.no_grad()
def measure_speed(encoders: Encoders, probe: Probe) -> Speed:
    """Return how many images and texts of a probe per second a model encodes, one at a time."""
    pixels, texts = probe.pixels[:1], probe.texts[:1]
    encode = encoders.text
    return Speed(
        passes_per_second(lambda: encoders.image(pixels)),
        None if encode is None else passes_per_second(lambda: encode(texts)),
    )


def passes_per_second(
    run: Callable[[], object], seconds: float = TIMED_SECONDS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the inverse of the median duration by a clock, of at least three calls behind a first one."""
    run()
    durations = list[float]()
    while sum(durations) < seconds or len(durations) < 3:
        start = clock()
        run()
        durations.append(clock() - start)
    return 1 / median(durations)


def largest_difference(one: LoadedModel, other: LoadedModel) -> float:
    """Return the largest difference of two models, as `Comparison` has it, of eight images of noise and captions."""
    return compare(encoders_of(one), encoders_of(other), noise(one)).difference
