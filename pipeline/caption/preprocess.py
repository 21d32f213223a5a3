"""Images as a captioner takes them; the processes that decode import this, and no model."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import open_clip
from PIL import Image

from shards_spec.images import crop_extreme_aspect


@dataclass(frozen=True)
class Preprocess:
    """The part of open_clip's evaluation transform that scales and crops, with its settings.

    What is left of the transform is done on the device: threads of Python that each compute with tensors hinder
    one another.
    """

    size: int | tuple[int, int]
    interpolation: str
    resize_mode: str
    fill_color: int

    @classmethod
    def of(cls, model: Any) -> "Preprocess":
        """That of an open_clip model."""
        config = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
        size = config.size if isinstance(config.size, int) else tuple(config.size)
        return cls(size, config.interpolation, config.resize_mode, config.fill_color)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(1, S, S, 3) uint8, as the model was trained to see the image."""
        for step in (crop_extreme_aspect, *_steps(self)):
            image = step(image)
        return np.asarray(image)[None]


@cache
def _steps(preprocess: Preprocess) -> tuple[Any, ...]:
    config = open_clip.transform.PreprocessCfg(
        size=preprocess.size,
        interpolation=preprocess.interpolation,
        resize_mode=preprocess.resize_mode,
        fill_color=preprocess.fill_color,
    )
    *steps, _, _ = open_clip.transform.image_transform_v2(config, is_train=False).transforms
    return tuple(steps)  # without ToTensor and Normalize
