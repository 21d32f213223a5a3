"""Images and texts that a student and its export are compared on: noise, or samples of a dataset."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shards_spec.files import DataError, UserError, exists, join
from shards_spec.images import crop_extreme_aspect, decode_rgb
from shards_spec.layout import RAW, SHARDS, dataset_json, final_tar, raw_tar
from shards_spec.manifest import shard_ids
from shards_spec.messages import flag
from shards_spec.models import LoadedModel
from shards_spec.tar import read_shard
from training.data.eval_crop import eval_pixels
from training.data.labelled_images import find_split, open_split
from training.evaluation.clip_benchmark import captioned_samples, captions_of, dataset_task, read_classes
from training.models.classifier import Classifier

log = logging.getLogger(__name__)
CAPTIONS = tuple(f"a photo of {number} things" for number in ("no", "one", "two", "three", "four", "five", "six", "7"))
Captioned = tuple[str, bytes, str]  # where a sample lies, its image, its caption


@dataclass(frozen=True)
class Probe:
    """What models are compared on.

    Attributes:
        pixels: (N, 3, S, S) float32, normalised.
        texts: Captions, or a prompt per class.
        targets: (N,) int64 index of each image's text or class; None for noise, and where the model has other classes.
    """

    pixels: Tensor
    texts: list[str]
    targets: Tensor | None = None


def noise(student: LoadedModel) -> Probe:
    """Return eight images of noise and eight captions."""
    side = student.image_size
    return Probe(torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0)), list(CAPTIONS))


def read_probe(root: str, student: LoadedModel, count: int, field: str) -> Probe:
    """Return up to ``count`` images of a dataset, prepared as for evaluation, with their captions or classes.

    Args:
        root: A dataset with shards/ or raw/, whose original captions are taken, or an EVAL root.
        student: The model, for its preprocessing.
        count: How many.
        field: The option that names the dataset, for messages.

    Raises:
        UserError: There is no such dataset, or it has nothing for this student.
        DataError: A shard is damaged.
    """
    if _is_pairs(root):
        probe = _read_pairs(root, student, count)
        if isinstance(student.model, Classifier):  # a caption is no class
            probe = replace(probe, targets=None)
    else:
        probe = _read_classes(root, student, count)
    if not len(probe.pixels):
        raise UserError(f"{flag(field)} {root}: none of its images can be used; give another dataset")
    return probe


def _is_pairs(root: str) -> bool:
    """Whether a dataset has captions and no classes."""
    if exists(dataset_json(root)) or exists(join(root, SHARDS)) or exists(join(root, RAW)):
        return True
    find_split(root)  # raises UserError where there is no dataset at all
    return dataset_task(root) == "retrieval"


def _pairs(root: str) -> Iterator[Captioned]:
    """Yield samples with their first caption, in file order."""
    for folder, path_of in ((SHARDS, final_tar), (RAW, raw_tar)):
        shards = shard_ids(join(root, folder)) if exists(join(root, folder)) else []
        for shard in shards:
            path = path_of(root, shard)
            for sample in read_shard(path):
                yield f"{path}: key {sample.key}", sample.image, sample.caption
        if shards:
            return
    for path, sample in captioned_samples(root):
        yield f"{path}: key {sample.key}", sample.image, captions_of(path, sample)[0]


def _read_pairs(root: str, student: LoadedModel, count: int) -> Probe:
    """Images with a caption each; one that has a former one's caption is left out."""
    pixels = list[Tensor]()
    texts = dict[str, None]()
    for where, image, caption in _pairs(root):
        if caption.strip() and caption not in texts:
            pixels += _decoded(where, image, student)
            if len(pixels) > len(texts):
                texts[caption] = None
        if len(pixels) == count:
            break
    return Probe(_stacked(pixels, student), list(texts), torch.arange(len(texts)))


def _read_classes(root: str, student: LoadedModel, count: int) -> Probe:
    """Images at equal distances over a split, with a prompt per class."""
    images = open_split(root, find_split(root))
    names, prompts = read_classes(root, images)
    total = len(images.labels)
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))
    pixels = list[Tensor]()
    targets = list[int]()
    for index in chosen:
        pixels += _decoded(*images.image(index), student)
        if len(pixels) > len(targets):
            targets.append(int(images.labels[index]))
    is_of_others = isinstance(student.model, Classifier) and student.model.names != images.classes
    return Probe(
        _stacked(pixels, student),
        [prompts[0].format(c=name) for name in names],
        None if is_of_others else torch.tensor(targets),
    )


def _decoded(where: str, image: bytes, student: LoadedModel) -> list[Tensor]:
    """An encoded image as the input of a student, (3, S, S); nothing, and a warning, when it does not decode."""
    try:
        decoded = crop_extreme_aspect(decode_rgb(image, as_benchmark=True))
    except DataError as error:
        log.warning("%s: %s; left out", where, error)
        return []
    if isinstance(student.model, Classifier):
        crop = eval_pixels(decoded, student, student.image_size)
        return [student.normalise(crop.unsqueeze(0))[0]]
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.model))
    return [image_transform_v2(preprocess, is_train=False)(decoded)]


def _stacked(pixels: list[Tensor], student: LoadedModel) -> Tensor:
    """The images of a probe, (N, 3, S, S), also of none."""
    side = student.image_size
    return torch.stack(pixels) if pixels else torch.empty(0, 3, side, side)
