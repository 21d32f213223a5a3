"""Reader of labelled images for training and evaluation, of three kinds.

DATA/train/classnames.txt, train/raw/ or train/shards/, test/…       a ROOT per split, by `ingest --format classes`
DATA/train/CLASS/*.jpg, DATA/test/CLASS/*.jpg                        class folders, images at any depth below CLASS
DATA/classnames.txt, train/nshards.txt, train/0.tar …, test/…        CLIP_benchmark's, members jpg|png|webp and cls

The test split may be called val. Where one split is needed, its ROOT itself may be named.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow.compute as pc

from shards_spec.class_names import (
    SHARD_COUNT,
    describe_difference,
    label_of,
    numbered_shards,
    parse_label,
    read_class_names,
    read_labelled_classes,
)
from shards_spec.files import DataError, UserError, exists, is_url, join, read_buffer
from shards_spec.folders import class_folders, walk
from shards_spec.layout import RAW, SHARDS, class_names_txt, dataset_json, parquet_path, remake_advice, sizes_json
from shards_spec.manifest import read_dataset
from shards_spec.messages import counted
from shards_spec.names import IMAGE_EXTENSIONS, endings_line, file_ending, is_ignored, is_image
from shards_spec.parquet import read_table
from shards_spec.sample import Sample
from shards_spec.tar import index_shard, read_shard
from training.data.order import Order
from training.data.shard_reader import ShardReader, dataset_sizes

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

    def order(self, chosen: np.ndarray, seed: int) -> Order:
        """Return the order in which epochs show the images of ``chosen``, ascending indices (n,).

        Its shards are consecutive parts of ``chosen``.
        """
        ...

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to read these shards of `order`."""
        ...


class _MixedImages:
    """Images any of which may come next."""

    def order(self, chosen: np.ndarray, seed: int) -> Order:
        """Return an order that mixes all images."""
        return Order([len(chosen)], seed, streams=1, window=1)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Do nothing: all images are in one shard of the order."""


class FolderImages(_MixedImages):
    """Image files below ``folder``/CLASS; classes and paths ascend."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes = class_folders(str(folder))
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
        """Return the path below the folder and the file's bytes. Raises DataError when it is gone."""
        path = self.paths[index]
        try:
            return path.relative_to(self.folder).as_posix(), path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); put it back, or start the run again") from error

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


class ShardImages(_MixedImages):
    """Samples of ``root/split/N.tar`` in file order.

    Raises:
        UserError: A text file or a shard of the dataset is missing or wrong.
        DataError: A shard is damaged, or a sample has no valid label.
    """

    def __init__(self, root: str, split: str) -> None:
        self.root = root
        self.split = split
        self.classes = read_class_names(join(root, "classnames.txt"))
        self.paths = numbered_shards(join(root, split))

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


class RootImages:
    """Samples of the shards of a ROOT that `clipmill ingest --format classes` made: of ``shards/``, else of ``raw/``.

    Names of images are the samples' keys, so that drawn views are those of a teacher cache. Labels are read from the
    shards' Parquet files, images shard by shard.

    Raises:
        UserError: The stage has not finished, or the classes are no longer those of its shards.
        DataError: A shard is damaged, or a sample has no valid label.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.folder: Literal["shards", "raw"] = "shards" if exists(sizes_json(root)) else "raw"
        stage = "pack" if self.folder == SHARDS else "ingest"
        if stage not in read_dataset(root)["stages"]:
            raise UserError(f"{root}: `clipmill {stage}` has not finished: run it again")
        self.classes = read_labelled_classes(root, stage) or []
        self.reader = ShardReader(root, self.folder, dataset_sizes(root, self.folder))
        self._ends = np.cumsum(self.reader.sizes)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64; the first use reads one column of each shard's Parquet file."""
        return np.concatenate([self._read_labels(shard) for shard in range(len(self.reader.sizes))])

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard of the ``index``-th image, and its index in the shard."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard]) - self.reader.sizes[shard])

    def image(self, index: int) -> tuple[str, bytes]:
        """Return the sample's key and the encoded image."""
        shard, place = self.locate(index)
        path, sample = self.reader.path(shard), self.reader.sample(shard, place)
        if label_of(path, sample, len(self.classes)) != self.labels[index]:
            raise DataError(f"{path}: key {sample.key} has another class than its Parquet row; {remake_advice(path)}")
        return sample.key, sample.image

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """Yield the shard's path and the sample for each sample; reads shard by shard, nothing is kept."""
        for path in map(self.reader.path, range(len(self.reader.sizes))):
            for sample in read_shard(path):
                yield path, sample

    def order(self, chosen: np.ndarray, seed: int) -> Order:
        """Return an order that has few shards open at a time, as that of image-text pairs."""
        before = np.searchsorted(chosen, self._ends)
        return Order(np.diff(before, prepend=0).tolist(), seed)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to copy remote shards, and to read local ones into the page cache."""
        self.reader.file_cache.prefetch([self.reader.path(shard) for shard in shards])

    def _read_labels(self, shard: int) -> np.ndarray:
        path = parquet_path(join(self.root, self.folder), shard)
        table = read_table(path, ["cls", "status"] if self.folder == RAW else ["cls"])
        if self.folder == RAW:
            table = table.filter(pc.equal(table.column("status"), "success"))
        labels: np.ndarray = table.column("cls").to_numpy().astype(np.int64)
        if len(labels) != self.reader.sizes[shard] or not np.isin(labels, np.arange(len(self.classes))).all():
            raise DataError(
                f"{path}: its column cls has not {counted(self.reader.sizes[shard], 'number')} below "
                f"{len(self.classes)}; {remake_advice(path)}"
            )
        return labels


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


def open_train_and_test(root: str) -> tuple[LabelledImages, LabelledImages]:
    """Open both splits of a dataset.

    Raises:
        UserError: One is not there or has no images, or they have other classes.
        DataError: A shard is damaged, or a sample has no valid label.
    """
    if root and is_labelled_root(root):
        raise UserError(
            f"{root} is a ROOT of labelled images, which is one split: give the folder above it, with the ROOTs train/ "
            "and test/"
        )
    train, test = open_images(root, True), open_images(root, False)
    if train.classes != test.classes:
        raise UserError(
            f"{root}: train and test have other classes: {describe_difference(train.classes, test.classes)}"
        )
    return train, test


def open_split(root: str, split: str) -> LabelledImages:
    """Open a split that `find_split` found; it may have no images. Raises UserError."""
    folder = join(root, split) if split else root
    if is_labelled_root(folder):
        return RootImages(folder)
    return FolderImages(Path(folder)) if has_class_folders(root, split) else ShardImages(root, split)


def is_labelled_root(root: str) -> bool:
    """Whether a folder is a ROOT of labelled images: it has shards of ours, and a list of classes."""
    return exists(class_names_txt(root)) and (exists(sizes_json(root)) or exists(join(root, RAW)))


def find_split(root: str, splits: Sequence[str] = TEST_SPLITS) -> str:
    """Return the first of ``splits``, folders of a dataset, that holds labelled images; empty for a ROOT of them.

    Raises UserError.
    """
    if is_labelled_root(root):
        return ""
    for split in splits:
        if has_labelled_images(root, split):
            return split
    if not is_url(root) and not Path(root).is_dir():
        raise UserError(f"{root} is {'a file, not a folder' if Path(root).exists() else 'not there'}; check the path")
    raise UserError(
        f"{join(root, splits[0], SHARD_COUNT)} is not there, nor is a folder of images per class in "
        f"{' or '.join(join(root, split) for split in splits)}: is {root} a dataset in CLIP_benchmark's WebDataset "
        "layout, of class folders, or of ROOTs by `clipmill ingest --format classes`? "
        f"{_advice_on_class_folders(root, splits)}".rstrip()
    )


def has_labelled_images(root: str, split: str) -> bool:
    """Whether a split holds labelled images of any kind."""
    folder = join(root, split)
    return exists(join(folder, SHARD_COUNT)) or is_labelled_root(folder) or has_class_folders(root, split)


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
    if is_url(root) or not folder.is_dir() or (folder / SHARD_COUNT).exists() or is_labelled_root(str(folder)):
        return False
    return any(entry.is_dir() and not is_ignored(entry.name) for entry in folder.iterdir())
