"""Images of classes: folders of class folders, or a CLIP_benchmark WebDataset, read by position like packed shards.

ROOT/train/CLASS/*.jpg, ROOT/test/CLASS/*.jpg (or val/)                            any depth below CLASS
ROOT/classnames.txt, train/nshards.txt, train/0.tar …, test/…                      members jpg|png|webp and cls
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shards_spec.class_names import parse_label, read_class_names, read_shard_count
from shards_spec.counter_rng import raw_draws
from shards_spec.files import DataError, UserError, exists, is_url, join, read_buffer
from shards_spec.folders import walk
from shards_spec.images import decode_rgb
from shards_spec.models import LoadedModel
from shards_spec.names import endings_line, file_ending, is_ignored, is_image
from shards_spec.tar import index_shard
from shards_spec.views import ViewSpec, apply_view, draw_view
from training.data.order import BatchPlan, Order
from training.data.samples import Item, ShardReader, Skipped, to_pixels

log = logging.getLogger(__name__)
TEST_SPLITS = ("test", "val")
CROP = 224 / 232  # share of the shorter side that the test crop covers: 232 pixels are cut to 224


class LabelledImages(Protocol):
    """``labels`` (N,) are indices into ``classes``."""

    classes: list[str]
    labels: np.ndarray

    def image(self, index: int) -> tuple[str, bytes]:
        """A name and the encoded image."""
        ...


class FolderImages:
    """Files below ``folder``/CLASS, both ascending."""

    def __init__(self, folder: Path) -> None:
        folders = [entry.name for entry in folder.iterdir() if entry.is_dir()]
        left_out = Counter[str]()
        self.folder, self.classes = folder, sorted(name for name in folders if not is_ignored(name))
        found = [(path, label) for label, name in enumerate(self.classes) for path in _images(folder / name, left_out)]
        if left_out:
            log.warning("%s: files that are not taken: %s", folder, endings_line(left_out))
        self.paths = [path for path, _ in found]
        self.labels = np.array([label for _, label in found], np.int64)

    def image(self, index: int) -> tuple[str, bytes]:
        """Path below the folder, bytes."""
        path = self.paths[index]
        return path.relative_to(self.folder).as_posix(), path.read_bytes()


class _Numbered(ShardReader):
    """Shards named as CLIP_benchmark does."""

    def path(self, shard: int) -> str:
        return join(self.root, self.folder, f"{shard}.tar")


class TarImages:
    """Samples of ``root/split/N.tar`` in the order of the files. Raises UserError and DataError."""

    def __init__(self, root: str, split: str) -> None:
        self.classes = read_class_names(join(root, "classnames.txt"))
        self.reader = _Numbered(root, split, [])
        labels = [self._labels(path) for path in numbered_shards(root, split)]
        self.reader.sizes = [len(own) for own in labels]
        self.ends = np.cumsum(self.reader.sizes)
        self.labels = np.array([label for own in labels for label in own], np.int64)

    def image(self, index: int) -> tuple[str, bytes]:
        """Key, bytes."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        sample = self.reader.sample(shard, index - int(self.ends[shard] - self.reader.sizes[shard]))
        return sample.key, sample.image

    def _labels(self, path: str) -> list[int]:
        with read_buffer(path) as buffer:
            return [
                parse_label(
                    members["cls"].read(buffer) if "cls" in members else b"", len(self.classes), f"{path}: key {key}"
                )
                for key, members in index_shard(buffer, path)
            ]


def numbered_shards(root: str, split: str) -> list[str]:
    """Paths of a split's shards as CLIP_benchmark names them. Raises UserError when nshards.txt does not tell them."""
    count = read_shard_count(join(root, split, "nshards.txt"))
    paths = [join(root, split, f"{shard}.tar") for shard in range(count)]
    if missing := [path for path in paths if not exists(path)]:
        raise UserError(f"{missing[0]} is not there, though nshards.txt says {count}; copy the missing shards")
    return paths


def _images(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Image files at any depth, ascending; ``left_out`` counts the others by ending."""
    files = [folder / prefix / name for prefix, names in walk(str(folder)) for name in names]
    images = [path for path in files if is_image(path.name) and path.is_file()]
    left_out.update(file_ending(path.name) for path in files if not is_image(path.name))
    return sorted(images)


def open_images(root: str, train: bool) -> LabelledImages:
    """The training or test split of a data set. Raises UserError when there is none, or it has no image."""
    if not root:
        raise UserError("--data is needed: a folder with train/ and test/, of class folders or WebDataset shards")
    splits = ("train",) if train else TEST_SPLITS
    split = find_split(root, splits)
    found: LabelledImages = FolderImages(Path(root, split)) if is_folders(root, split) else TarImages(root, split)
    if not len(found.labels):
        raise UserError(f"{join(root, split)} has no images; put class folders with images there, or shards")
    return found


def find_split(root: str, splits: Sequence[str] = TEST_SPLITS) -> str:
    """The first of the folders ``splits`` of a data set that holds shards or class folders. Raises UserError."""
    for split in splits:
        if exists(join(root, split, "nshards.txt")) or is_folders(root, split):
            return split
    if not is_url(root) and not Path(root).is_dir():
        raise UserError(f"{root} is {'a file, not a folder' if Path(root).exists() else 'not there'}; check --data")
    raise UserError(
        f"{join(root, splits[0], 'nshards.txt')} is not there, nor is a folder of images per class in "
        f"{' or '.join(join(root, split) for split in splits)}: is {root} a data set in CLIP_benchmark's WebDataset "
        f"layout or of class folders? {_way_out(root, splits)}".rstrip()
    )


def _way_out(root: str, splits: Sequence[str]) -> str:
    """What to do where ``root`` itself has the class folders."""
    if not is_folders(root, ""):
        return ""
    if Path(root).resolve().name in splits:
        return f"Its classes lie in {root} itself: give the folder above"
    return f"If the folders in {root} are its classes, move them below {join(root, splits[0])}"


def is_folders(root: str, split: str) -> bool:
    """Whether a split is class folders and not shards."""
    folder = Path(root, split)
    if is_url(root) or not folder.is_dir() or (folder / "nshards.txt").exists():
        return False
    return any(entry.is_dir() and not is_ignored(entry.name) for entry in folder.iterdir())


def subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices of ``fraction`` of each class's images, ascending; a smaller share is within a larger one."""
    kept = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        drawn = np.argsort(raw_draws(f"subset/{seed}/{label}", len(own)), kind="stable")
        kept.append(own[drawn[: max(1, round(fraction * len(own)))]])
    return np.sort(np.concatenate(kept))


class LabelledImageRows:
    """Images by position: the ``chosen`` ones in the order of epochs with views drawn, or, without, all as they lie.

    Items are those of `Samples`, with ``targets`` (an int64 scalar) in place of texts.
    """

    def __init__(
        self, images: LabelledImages, student: LoadedModel, plan: BatchPlan, views: ViewSpec | None, chosen: np.ndarray
    ) -> None:
        self.images, self.student, self.plan, self.views, self.chosen = images, student, plan, views, chosen
        self.order = Order([len(chosen)], plan.seed, streams=1, window=1)

    def __getitem__(self, index: int | tuple[int, int | None]) -> Item:
        position, side = index if isinstance(index, tuple) else (index, None)
        place = self.order.locate(position)
        number = int(self.chosen[place.index if self.views else position])
        side = side or self.student.image_size
        name, data = self.images.image(number)
        try:
            image = decode_rgb(data)
        except DataError as error:
            return Skipped(f"{name}: {error}")
        spec = self.views
        shown = apply_view(image, spec, draw_view(spec, name, place.epoch), side) if spec else plain_crop(image, side)
        targets = torch.tensor(int(self.images.labels[number]))
        return {
            "key": name, "position": position, "epoch": place.epoch, "images": to_pixels(shown), "targets": targets,
        }  # fmt: skip


class FeatureRows:
    """Features (N, D) and labels (N,) by position, for a head alone."""

    def __init__(self, features: Tensor, labels: Tensor, student: LoadedModel, plan: BatchPlan) -> None:
        self.features, self.labels, self.student, self.plan = features, labels, student, plan
        self.order = Order([len(labels)], plan.seed, streams=1, window=1)

    def __getitem__(self, index: int | tuple[int, int | None]) -> Item:
        position = index[0] if isinstance(index, tuple) else index
        place = self.order.locate(position)
        row: dict[str, Any] = {"features": self.features[place.index], "targets": self.labels[place.index]}
        return {"key": str(place.index), "position": position, "epoch": place.epoch, **row}


def plain_crop(image: Image.Image, side: int) -> Image.Image:
    """The central square of `CROP` of the shorter side, at ``side`` x ``side`` pixels, bilinear, antialiased."""
    width, height = image.size
    cut = CROP * min(image.size)
    box = ((width - cut) / 2, (height - cut) / 2, (width + cut) / 2, (height + cut) / 2)
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)
