"""A classifier's soft labels from a teacher cache, beside the images whose views they belong to.

TinyViT (Wu et al., arXiv 2207.10666) stores sparse labels so: the largest probabilities, the rest spread evenly over
the other classes. It stores the seed of each augmentation; here a view is drawn by key and number, and is the same
again.
"""

import numpy as np
import torch
from torch import Tensor

from shards_spec.class_names import describe_difference
from shards_spec.embeddings import EmbeddingFile
from shards_spec.files import DataError, UserError
from shards_spec.messages import counted
from shards_spec.soft_labels import SoftLabelFormat, format_of
from shards_spec.teacher_shard import TeacherShard
from training.data.labelled_images import RootImages
from training.data.lru import LRUCache
from training.data.teacher_cache import AGAIN, CacheReader

SOFT_FIELDS = ("soft_logits", "soft_classes", "soft_probabilities", "soft_rest")  # of items, where they have them


class SoftLabelCache(CacheReader):
    """A cache of a classifier's soft labels of labelled images.

    Attributes:
        format: How they are stored.
        image_size: Pixels a side of the teacher's images.
        mean: Of the teacher's pixels in [0, 1], per channel.
        std: Likewise.

    Args:
        images: The images, of packed shards.
        name: Name of the cache.
        capacity: Number of shards whose files stay open.

    Raises:
        UserError: There is no such cache, it has no soft labels, or those of other classes.
        DataError: A file is damaged.
    """

    option = "--soft-labels"
    same = ("model", "pretrained", "weights_sha256", "views_sha256", "dim", "soft_labels", "classes", "classes_sha256")

    def __init__(self, images: RootImages, name: str, capacity: int = 24) -> None:
        self.images = images
        super().__init__(images.root, name, len(images.reader.sizes), images.reader.file_cache)
        self.image_size: int = self.meta["image_size"]
        self.mean: tuple[float, ...] = tuple(self.meta["mean"])
        self.std: tuple[float, ...] = tuple(self.meta["std"])
        self._files: LRUCache[int, dict[str, EmbeddingFile]] = LRUCache(capacity)

    def check_serves(self, first: TeacherShard) -> None:
        """Raise UserError where the cache has no soft labels, or those of other classes."""
        stored = format_of(self.path(0), self.meta)
        if stored is None:
            raise UserError(
                f"--soft-labels {self.name!r} is a cache of embeddings; `clipmill cache {self.root} --soft-labels 100 "
                "--model timm:NAME` makes one of soft labels"
            )
        self.format: SoftLabelFormat = stored
        names = self.meta.get("class_names")
        classes = self.images.classes
        if names is not None and names != classes:
            raise UserError(
                f"--soft-labels {self.name!r}: its teacher knows other classes than --data "
                f"({describe_difference(names, classes)}); take a teacher that was trained on these classes"
            )
        if stored.classes != len(classes):
            raise UserError(
                f"--soft-labels {self.name!r} is of {counted(stored.classes, 'class', 'classes')}, --data has "
                f"{len(classes)}: its labels are of another list"
            )

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Fields of an item: ``soft_logits``, or the other three of `SOFT_FIELDS`."""
        return SOFT_FIELDS[:1] if self.format.kept == "all" else SOFT_FIELDS[1:]

    def item(self, number: int, view: int) -> dict[str, Tensor]:
        """Return the soft labels of a view of the ``number``-th of the images.

        Returns:
            ``soft_logits`` (C,) float16, the largest of which is 0; or ``soft_classes`` (k,) int64, the most probable
            first, their ``soft_probabilities`` (k,) float32, and ``soft_rest`` (), the sum of all others.

        Raises:
            DataError: The cache's files are damaged, or of another shard, teacher or view spec.
        """
        shard, index = self.images.locate(number)
        column = f"soft_{view}"
        file = self._files.get(shard, lambda: self._open(shard))[column]
        row = file.stored_row(column, index)
        if row is None:
            raise DataError(f"{file.path}: key {file.keys[index]} has no {column}; {AGAIN}")
        record = self.format.decode(row[None])[0]
        if self.format.kept == "all":
            return {"soft_logits": torch.from_numpy(record["logits"].copy())}
        return {
            "soft_classes": torch.from_numpy(record["classes"].astype(np.int64)),
            "soft_probabilities": torch.from_numpy(record["probabilities"].astype(np.float32)),
            "soft_rest": torch.tensor(float(record["rest"])),
        }

    def _open(self, shard: int) -> dict[str, EmbeddingFile]:
        names = [f"soft_{view}" for view in range(self.num_views)]
        return self.columns(self.open_shard(shard), names, self.images.reader.keys(shard))
