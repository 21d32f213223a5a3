"""`select --against-cosine`: samples that may show an evaluation image, by a teacher's embeddings.

A teacher sees what a hash does not: an image without structure, a copy of other colours. What looks alike has a high
cosine, too, so that these are candidates only, which their pixels have to confirm (`against`).
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.model_choice import recorded_models
from pipeline.select.cells import Embeddings
from shards_spec.files import UserError, join
from shards_spec.layout import teacher_folder
from shards_spec.manifest import read_done
from shards_spec.messages import flag
from shards_spec.models import HUB, LOCAL_DIR, LoadedModel, load_teacher, pick_devices, weights_sha256
from shards_spec.precision import precision_of
from shards_spec.views import ViewSpec, render_views

log = logging.getLogger(__name__)
CENTRE_CROP = ViewSpec(scale=None)
MODEL = flag("against_model")
ORIENTATIONS = 2  # rows of an image: as it is, mirrored
EMBEDDED_AT_ONCE = 64  # images
BLOCK = 1 << 12  # rows of evaluation images with which samples are multiplied at a time
TILE = 1 << 12  # samples that are multiplied at a time


@dataclass(frozen=True)
class CosineRule:
    """Samples are candidates whose embedding by a ``teacher`` has a cosine of ``least`` with an evaluation image.

    ``model`` is the teacher's name or weights file where its cache's record does not name it: a path of this machine.
    """

    teacher: str
    least: float
    model: str | None = None


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """What a teacher sees of an RGB image: uint8 (size, size, 3)."""
    views = render_views(image, CENTRE_CROP, "", (0,), size)
    only: np.ndarray = views[0]
    return only


def _both_ways(images: list[np.ndarray]) -> Iterator[np.ndarray]:
    for image in images:
        yield image
        yield image[:, ::-1]


def _load(cache: str, record: dict[str, Any], model: str | None) -> LoadedModel:
    """The model of a cache's record, by the hash of its weights and by what is done to pixels. Raises UserError."""
    if record.get("weights_sha256") is None:
        raise UserError(
            f"--against-cosine: {cache} holds vectors of others, whose record has no hash of the teacher's weights; "
            "leave it out, or give --teacher NAME of a cache that `clipmill cache` embedded"
        )
    name, pretrained = recorded_or_given(record, model)
    device = pick_devices("auto")[0]
    try:
        loaded = load_teacher(name, pretrained, device=device, precision=precision_of(record["precision"]))
    except UserError as error:
        advice = f"give another {MODEL}" if model else f"name it with {MODEL}, such as {LOCAL_DIR}PATH or a file"
        raise UserError(f"--against-cosine: the teacher of {cache} is not at hand ({error}); {advice}") from error
    found = {
        "weights_sha256": weights_sha256(loaded.model),
        "image_size": loaded.image_size,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
    }
    differing = [field for field, value in found.items() if record.get(field) != value]
    if differing:
        raise UserError(
            f"--against-cosine: the model {model or name!r} is not the one that made {cache}: it differs in "
            f"{', '.join(differing)}; name that one with {MODEL}"
        )
    return loaded


def recorded_or_given(record: dict[str, Any], model: str | None) -> tuple[str, str | None]:
    """Name and weights of a record's model: as recorded, or ``model``, which may be a file of its weights."""
    recorded = recorded_models(record, ())[-1]
    if model is None:
        return recorded, record["pretrained"]
    if Path(model).is_file():
        return recorded, model
    return model, None if model.startswith((LOCAL_DIR, HUB)) else record["pretrained"]


class EvaluationEmbeddings:
    """The embeddings of evaluation images, in a file that processes share: they are sent where it is, not the model.

    Raises UserError where the model that made the teacher's cache is not at hand, or the given one is another.
    """

    def __init__(self, folder: str, root: str, rule: CosineRule) -> None:
        """In an empty ``folder``, by a teacher of the dataset ``root``."""
        from pipeline.cache.teacher import Teacher  # it imports torch

        self.rule = rule
        done = read_done(join(root, teacher_folder(rule.teacher)), 0)
        loaded = _load(teacher_folder(rule.teacher), {} if done is None else done.config, rule.model)
        self.image_size = loaded.image_size
        self._embeddings = Embeddings(join(folder, "embeddings"))
        self._teacher: Teacher | None = Teacher(loaded)
        log.info("select: %s embeds the evaluation images on %s", rule.teacher, self._teacher.device)
        self._waiting = list[np.ndarray]()

    def add(self, image: np.ndarray) -> None:
        """Add the next image, its `centre_crop`. Raises UserError when the disk is full."""
        self._waiting.append(image)
        if len(self._waiting) == EMBEDDED_AT_ONCE:
            self._embed()

    def finish(self) -> None:
        """Embed what still waits, and let go of the model. Raises UserError when the disk is full."""
        if self._waiting:
            self._embed()
        self._teacher = None

    def _embed(self) -> None:
        assert self._teacher is not None
        self._embeddings.append(self._teacher.embed_images(_both_ways(self._waiting)))
        self._waiting.clear()

    def candidates(self, samples: np.ndarray, most: int) -> dict[int, list[int]]:
        """As `near_images`, by the rule's bound."""
        return near_images(self._embeddings, samples, self.rule.least, most)


def near_images(embeddings: Embeddings, samples: np.ndarray, least: float, most: int) -> dict[int, list[int]]:
    """Of unit embeddings (n, D), 0 where there is none, those near to an image: row to the ``most`` nearest, in order.

    ``embeddings`` has two rows of each image. Memory: a few times the cosines of `TILE` samples with `BLOCK` rows.
    """
    found = dict[int, list[int]]()
    for start in range(0, len(samples), TILE):
        tile = samples[start : start + TILE]
        nearest = NearestImages(len(tile), most, least)
        for first, block in embeddings.blocks(BLOCK):
            cosines = (tile @ block.T).reshape(len(tile), -1, ORIENTATIONS)
            nearest.add(np.maximum(cosines[..., 0], cosines[..., 1]), first // ORIENTATIONS)
        found |= {start + row: images for row, images in nearest.found()}
    return found


class NearestImages:
    """The images of the largest cosines of each sample, from ``least`` on, as blocks of images come."""

    def __init__(self, samples: int, most: int, least: float) -> None:
        self._most = most
        self._least = least
        self._cosines = np.full((samples, most), -np.inf, np.float32)
        self._images = np.zeros((samples, most), np.int64)

    def add(self, cosines: np.ndarray, first: int) -> None:
        """Add the cosines (samples, images) with images from number ``first`` on."""
        largest = cosines.max(axis=1)
        rows = np.flatnonzero((largest >= self._least) & (largest > self._cosines.min(axis=1)))
        numbers = np.broadcast_to(np.arange(first, first + cosines.shape[1]), (len(rows), cosines.shape[1]))
        both = np.concatenate([self._cosines[rows], cosines[rows]], axis=1)
        images = np.concatenate([self._images[rows], numbers], axis=1)
        best = np.argpartition(-both, self._most - 1, axis=1)[:, : self._most]
        self._cosines[rows] = np.take_along_axis(both, best, axis=1)
        self._images[rows] = np.take_along_axis(images, best, axis=1)

    def found(self) -> Iterator[tuple[int, list[int]]]:
        """Rows of samples with images that are near enough, and those, nearest first."""
        for row in np.flatnonzero(self._cosines.max(axis=1) >= self._least).tolist():
            order = np.argsort(-self._cosines[row], kind="stable")
            yield row, self._images[row][order][self._cosines[row][order] >= self._least].tolist()
