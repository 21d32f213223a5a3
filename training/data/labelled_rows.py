"""Rows of labelled images by position, as the trainer reads them: drawn views, plain crops, or features."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shards_spec.counter_rng import raw_draws
from shards_spec.files import DataError, UserError
from shards_spec.images import decode_rgb
from shards_spec.models import LoadedModel
from shards_spec.views import ViewSpec, apply_view, draw_view
from training.data.batches import Item, Skipped, to_pixels
from training.data.eval_crop import eval_pixels
from training.data.labelled_images import LabelledImages
from training.data.lru import LRUCache
from training.data.order import BatchPlan, Order
from training.data.paired_views import PairedViews
from training.data.soft_label_cache import SoftLabelCache


class LabelledImageRows:
    """Labelled images by position.

    Items are those of `Samples`, with ``targets`` (an int64 scalar) instead of texts.

    Args:
        images: The images.
        student: The model; items have its image size unless an index names another.
        plan: Sizes of the batches.
        views: What views are drawn from; images then come in the order of epochs. None: plain crops in stored order.
        chosen: (n,) indices of the images that are used.
        repeats: Views of an image that follow each other (repeated augmentation). An epoch remains n views, so that it
            takes ``repeats`` epochs to see all images.
        soft: Soft labels of the images, a ROOT's, for items that have its ``item_fields``. Its views come in turn.
    """

    def __init__(
        self,
        images: LabelledImages,
        student: LoadedModel,
        plan: BatchPlan,
        views: ViewSpec | None,
        chosen: np.ndarray,
        *,
        repeats: int = 1,
        soft: SoftLabelCache | None = None,
    ) -> None:
        self.images = images
        self.student = student
        self.plan = plan
        self.views = views
        self.chosen = chosen
        self.repeats = repeats
        self.soft = soft
        self.paired: PairedViews | None = None  # set where a teacher sees other pixels than the student
        self.order = images.order(chosen, plan.seed)
        # windows of the order whose successors were prefetched; two per stream, as a batch may cross epochs
        self._prefetched: LRUCache[tuple[int, tuple[int, int]], None] = LRUCache(2 * self.order.streams)
        self._starts = np.cumsum(self.order.sizes) - self.order.sizes  # of the order's shards in ``chosen``

    def __getitem__(self, index: int | tuple[int, int | None]) -> Item:
        position, side = index if isinstance(index, tuple) else (index, None)
        try:
            return self._item(position, side or self.student.image_size)
        except (DataError, UserError) as error:
            return error

    def _item(self, position: int, side: int) -> dict[str, Any] | Skipped:
        location = self.order.locate(position // self.repeats)
        window = (location.epoch, location.window)
        self._prefetched.get(window, lambda: self.images.prefetch(self.order.next_shards(location)))
        view = location.epoch * self.repeats + position % self.repeats
        if self.soft is not None:
            view %= self.soft.num_views
        place = position if self.views is None else int(self._starts[location.shard]) + location.index
        number = int(self.chosen[place])
        name, data = self.images.image(number)
        try:
            image = decode_rgb(data)
        except DataError as error:
            return Skipped(f"{name}: {error}")
        return {
            "key": name,
            "position": position,
            "epoch": location.epoch,
            **self._render(image, name, view, side),
            "targets": torch.tensor(int(self.images.labels[number])),
            **(self.soft.item(number, view) if self.soft is not None else {}),
        }

    def _render(self, image: Image.Image, name: str, number: int, side: int) -> dict[str, Tensor]:
        """The fields of images of an item, of the view of that number."""
        if self.views is None:
            return {"images": eval_pixels(image, self.student, side)}
        view = draw_view(self.views, name, number)
        if self.paired is None:
            return {"images": to_pixels(apply_view(image, self.views, view, side))}
        return self.paired.render(image, self.views, view, side, f"{name}/{number}")


class FeatureRows:
    """Features (N, D) and labels (N,) by position, to train a head alone."""

    def __init__(self, features: Tensor, labels: Tensor, student: LoadedModel, plan: BatchPlan) -> None:
        self.features = features
        self.labels = labels
        self.student = student
        self.plan = plan
        self.order = Order([len(labels)], plan.seed, streams=1, window=1)

    def __getitem__(self, index: int | tuple[int, int | None]) -> Item:
        position = index[0] if isinstance(index, tuple) else index
        location = self.order.locate(position)
        return {
            "key": str(location.index),
            "position": position,
            "epoch": location.epoch,
            "features": self.features[location.index],
            "targets": self.labels[location.index],
        }


def subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return the indices of ``fraction`` of each class's images (at least one), ascending.

    The images of a smaller fraction are among those of a larger one.
    """
    chosen = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        shuffled = of_class[np.argsort(raw_draws(f"subset/{seed}/{label}", len(of_class)), kind="stable")]
        chosen.append(shuffled[: max(1, round(fraction * len(of_class)))])
    return np.sort(np.concatenate(chosen))
