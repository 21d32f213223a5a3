"""What a search needs of a model, whatever computes its features."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image


class FeatureModel(Protocol):
    """A model that gives images and texts unit features in one space."""

    name: str
    """how pages and messages call it"""
    identity: dict[str, Any]
    """every setting that affects a feature of an image, as JSON: an index of another identity is another index"""
    image_size: int
    """pixels S of the image tower's input"""
    batch_size: int
    """images per forward pass"""

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return the input of the image tower, (3, S, S) float32, for an upright RGB image; called in threads."""
        ...

    def embed_images(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Return the (n, D) float32 unit features of images of `prepare`."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the (n, D) float32 unit features of texts."""
        ...
