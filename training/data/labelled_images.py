"""Reader of labelled images for training and evaluation: folders of class folders, or a CLIP_benchmark WebDataset.

ROOT/train/CLASS/*.jpg, ROOT/test/CLASS/*.jpg (or val/)                            any depth below CLASS
ROOT/classnames.txt, train/nshards.txt, train/0.tar …, test/…                      members jpg|png|webp and cls
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from shards_spec.class_names import parse_label, read_class_names, read_shard_count
from shards_spec.files import UserError, exists, is_url, join, read_buffer
from shards_spec.folders import walk
from shards_spec.layout import dataset_json
from shards_spec.names import IMAGE_EXTENSIONS, endings_line, file_ending, is_ignored, is_image
from shards_spec.sample import Sample
from shards_spec.tar import index_shard, read_shard
from training.data.shard_reader import ShardReader

log = logging.getLogger(__name__)
TEST_SPLITS = ("test", "val")


class LabelledImages(Protocol):
    """Images of one split, each with one of ``classes``."""

    classes: list[str]

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 indices into ``classes``."""
        ...

    def image(self, index: int) -> tuple[str, bytes]:
        """Return a name and the encoded image of the ``index``-th of ``labels``."""
        ...

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """Yield all images once, in order: where each lies, for messages, and a sample that `label_of` reads."""
        ...


class FolderImages:
    """Image files below ``folder``/CLASS; classes and paths ascend."""

    def __init__(self, folder: Path) -> None:
        folders = [entry.name for entry in folder.iterdir() if entry.is_dir()]
        self.folder = folder
        self.classes = sorted(name for name in folders if not is_ignored(name))
        self.paths: list[Path] = []
        other_endings = Counter[str]()
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            images = _image_files(folder / name, other_endings)
            self.paths += images
            labels += [label] * len(images)
        self.labels = np.array(labels, np.int64)
        if other_endings:
            log.warning("%s: files that are not taken: %s", folder, endings_line(other_endings))

    def image(self, index: int) -> tuple[str, bytes]:
        """Return the path below the folder and the file's bytes."""
        path = self.paths[index]
        return path.relative_to(self.folder).as_posix(), path.read_bytes()

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """Yield the folder and a sample for each file."""
        for index, label in enumerate(self.labels):
            name, data = self.image(index)
            # any image extension will do: decoders look at the bytes
            yield str(self.folder), Sample(name, {IMAGE_EXTENSIONS[0]: data, "cls": str(label).encode()})


class _NumberedShardReader(ShardReader):
    """Shards named as CLIP_benchmark names them."""

    def path(self, shard: int) -> str:
        return join(self.root, self.folder, f"{shard}.tar")


class ShardImages:
    """Samples of ``root/split/N.tar`` in file order.

    Raises:
        UserError: A text file or a shard of the dataset is missing or wrong.
        DataError: A shard is damaged, or a sample has no valid label.
    """

    def __init__(self, root: str, split: str) -> None:
        self.root = root
        self.split = split
        self.classes = read_class_names(join(root, "classnames.txt"))
        self.paths = shard_paths(root, split)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64; the first use reads the labels of all shards."""
        return np.array(list(chain.from_iterable(self._labels_per_shard)), np.int64)

    def image(self, index: int) -> tuple[str, bytes]:
        """Return the sample's key and the encoded image."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard]) - self._reader.sizes[shard]
        sample = self._reader.sample(shard, index - first)
        return sample.key, sample.image

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """Yield the shard's path and the sample for each sample; reads shard by shard, nothing is kept."""
        for path in self.paths:
            for sample in read_shard(path):
                yield path, sample

    @cached_property
    def _labels_per_shard(self) -> list[list[int]]:
        return [self._read_labels(path) for path in self.paths]

    @cached_property
    def _reader(self) -> _NumberedShardReader:
        return _NumberedShardReader(self.root, self.split, [len(labels) for labels in self._labels_per_shard])

    @cached_property
    def _ends(self) -> np.ndarray:
        """(shards,) the index after each shard's last image."""
        return np.cumsum(self._reader.sizes)

    def _read_labels(self, path: str) -> list[int]:
        labels = []
        with read_buffer(path) as buffer:
            for key, members in index_shard(buffer, path):
                data = members["cls"].read(buffer) if "cls" in members else b""
                labels.append(parse_label(data, len(self.classes), f"{path}: key {key}"))
        return labels


def label_of(path: str, sample: Sample, classes: int) -> int:
    """Return the label of a sample of `LabelledImages.samples`. Raises DataError when it is no class."""
    return parse_label(sample.members.get("cls", b""), classes, f"{path}: key {sample.key}")


def shard_paths(root: str, split: str) -> list[str]:
    """Return the paths of a split's shards. Raises UserError when nshards.txt or one of the shards is missing."""
    count = read_shard_count(join(root, split, "nshards.txt"))
    paths = [join(root, split, f"{shard}.tar") for shard in range(count)]
    if missing := [path for path in paths if not exists(path)]:
        raise UserError(f"{missing[0]} is not there, though nshards.txt says {count}; copy the missing shards")
    return paths


def _image_files(folder: Path, other_endings: Counter[str]) -> list[Path]:
    """Image files at any depth, ascending; ``other_endings`` counts the other files by ending."""
    images = []
    for prefix, names in walk(str(folder)):
        for name in names:
            path = folder / prefix / name
            if not is_image(name):
                other_endings[file_ending(name)] += 1
            elif path.is_file():
                images.append(path)
    return sorted(images)


def open_images(root: str, train: bool) -> LabelledImages:
    """Open the training or the test split of a dataset.

    Raises:
        UserError: There is no such split, or it has no images.
        DataError: A shard is damaged, or a sample has no valid label.
    """
    if not root:
        raise UserError("--data is needed: a folder with train/ and test/, of class folders or WebDataset shards")
    split = find_split(root, ("train",) if train else TEST_SPLITS)
    images = open_split(root, split)
    if not len(images.labels):
        raise UserError(f"{join(root, split)} has no images; put class folders with images there, or shards")
    return images


def open_split(root: str, split: str) -> LabelledImages:
    """Open a split that `find_split` found; it may have no images. Raises UserError."""
    return FolderImages(Path(root, split)) if has_class_folders(root, split) else ShardImages(root, split)


def find_split(root: str, splits: Sequence[str] = TEST_SPLITS) -> str:
    """Return the first of ``splits``, folders of a dataset, that holds shards or class folders. Raises UserError."""
    for split in splits:
        if exists(join(root, split, "nshards.txt")) or has_class_folders(root, split):
            return split
    if not is_url(root) and not Path(root).is_dir():
        raise UserError(f"{root} is {'a file, not a folder' if Path(root).exists() else 'not there'}; check the path")
    raise UserError(
        f"{join(root, splits[0], 'nshards.txt')} is not there, nor is a folder of images per class in "
        f"{' or '.join(join(root, split) for split in splits)}: is {root} a dataset in CLIP_benchmark's WebDataset "
        f"layout or of class folders? {_advice_on_class_folders(root, splits)}".rstrip()
    )


def _advice_on_class_folders(root: str, splits: Sequence[str]) -> str:
    """What to do where ``root`` itself has the class folders, else nothing."""
    if exists(dataset_json(root)):
        return "It is a ROOT of image-text pairs, which have no classes"
    if not has_class_folders(root, ""):
        return ""
    if Path(root).resolve().name in splits:
        return f"Its classes lie in {root} itself: give the folder above"
    return f"If the folders in {root} are its classes, move them below {join(root, splits[0])}"


def has_class_folders(root: str, split: str) -> bool:
    """Whether a split consists of class folders and not of shards."""
    folder = Path(root, split)
    if is_url(root) or not folder.is_dir() or (folder / "nshards.txt").exists():
        return False
    return any(entry.is_dir() and not is_ignored(entry.name) for entry in folder.iterdir())
