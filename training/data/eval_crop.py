"""How an image is cut to be measured: the plain crop of our own models, or the crop that a timm model came with."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from PIL import Image
from torch import Tensor

from shards_spec.models import EvalCrop, LoadedModel
from training.data.batches import to_pixels

CROP = 224 / 232  # share of the shorter side that the test crop covers: 232 pixels are cut to 224
PLAIN = EvalCrop(CROP, "bilinear", "center")  # `plain_crop` in timm's words


def plain_crop(image: Image.Image, side: int) -> Image.Image:
    """Return the central square of `CROP` of the shorter side, at ``side`` x ``side`` pixels, bilinear, antialiased."""
    width, height = image.size
    cut = CROP * min(image.size)
    box = ((width - cut) / 2, (height - cut) / 2, (width + cut) / 2, (height + cut) / 2)
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)


def crop_of(data: Mapping[str, Any]) -> EvalCrop | None:
    """Return the crop that timm's data config, or an export's description, names; None for the plain one."""
    mode = data.get("crop_mode") or "center"
    crop = EvalCrop(data.get("crop_pct") or CROP, data.get("interpolation") or PLAIN.interpolation, mode)
    return None if crop == PLAIN else crop


def eval_pixels(image: Image.Image, loaded: LoadedModel, side: int) -> Tensor:
    """Return the pixels (3, side, side) uint8 of an RGB image as a classifier is measured on it."""
    if loaded.crop is None:
        return to_pixels(plain_crop(image, side))
    return _timm_transform(loaded.crop, side, tuple(loaded.mean))(image)


@lru_cache(maxsize=8)
def _timm_transform(crop: EvalCrop, side: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Tensor]:
    """The transform of timm itself, which rounds sides in its own way, up to uint8; ``mean`` fills a border."""
    from timm.data.transforms_factory import create_transform

    transform: Callable[[Image.Image], Tensor] = create_transform(
        (3, side, side), mean=mean, normalize=False, **crop._asdict()
    )
    return transform
