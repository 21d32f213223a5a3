"""What recipes that learn from cached soft labels have in common: which cache, and what it must fit."""

import logging
from dataclasses import fields

from shards_spec.files import UserError
from shards_spec.layout import SHARDS
from shards_spec.messages import flag
from training.config import ViewConfig
from training.data.labelled_images import LabelledImages, RootImages
from training.data.soft_label_cache import SoftLabelCache

log = logging.getLogger(__name__)


def open_soft_labels(
    name: str, images: LabelledImages, *, views: tuple[ViewConfig, ViewConfig], side: int, temperature: float = 1.0
) -> SoftLabelCache:
    """Open a cache of soft labels of the training images, whose views are then those of training.

    Args:
        name: Name of the cache.
        images: The training images.
        views: Views as the config asks for them, and the recipe's own; what differs must be the cache's.
        side: Pixels a side of the student's images.
        temperature: Divides the teacher's logits.

    Raises:
        UserError: The images are no packed ROOT, there is no such cache, or it is of other classes, views or
            temperature.
        DataError: A file is damaged.
    """
    if not isinstance(images, RootImages) or images.folder != SHARDS:
        raise UserError(
            f"--soft-labels {name!r}: the training images are no packed ROOT, so there is no cache of them. Make one: "
            "`clipmill ingest DATA/train --source FOLDER --format classes`, `clipmill pack`, `clipmill cache "
            "--soft-labels`"
        )
    cache = SoftLabelCache(images, name)
    if temperature != 1 and cache.format.kept != "all":
        raise UserError(
            f"--temperature {temperature}: --soft-labels {name!r} keeps {cache.format.kept} probabilities at "
            "temperature 1; only a cache made with --soft-labels all serves another"
        )
    for field in fields(ViewConfig):
        asked, default = (getattr(config, field.name) for config in views)
        stored = getattr(cache.views, field.name)
        if asked not in (default, stored):
            raise UserError(
                f"{flag(field.name)} {asked}: the views are those of --soft-labels {name!r}, which has {stored}; leave "
                "the option out, or make a cache of such views"
            )
    if cache.image_size != side:
        log.warning(
            "--soft-labels %r: the teacher saw its views at %d pixels, the student sees the same views at %d",
            name,
            cache.image_size,
            side,
        )
    return cache
