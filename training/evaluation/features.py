"""A model by any name as `clipmill search` uses it: unit features of images and texts in one space."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from shards_spec.files import UserError
from shards_spec.models import LoadedModel, Trust, model_label, pick_device, weights_sha256
from training.evaluation.config import EvalConfig
from training.evaluation.stage import load_measured


class TorchFeatures:
    """Unit features that a model computes in torch.

    Args:
        loaded: The model with its tokenizer.
        name: How pages and messages call it.
        device: Where it computes.
        bf16: Under autocast to bfloat16.
        batch_size: Images or texts per forward pass.
    """

    def __init__(self, loaded: LoadedModel, name: str, device: str, bf16: bool, batch_size: int) -> None:
        self.name = name
        self.batch_size = batch_size
        preprocess = open_clip.get_model_preprocess_cfg(loaded.model)
        self.identity: dict[str, Any] = {
            "weights_sha256": weights_sha256(loaded.model),
            "preprocess": preprocess,
            "precision": "bf16" if bf16 else "fp32",
        }
        self._loaded = loaded
        self._device = torch.device(device)
        self._bf16 = bf16
        self._transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
        loaded.model.to(device).eval()

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return the input of the image tower, (3, S, S) float32, for an upright RGB image."""
        pixels: np.ndarray = self._transform(image).numpy()
        return pixels

    def embed_images(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Return the (n, D) float32 unit features of images of `prepare`, in passes of ``batch_size``."""
        parts = range(0, len(prepared), self.batch_size)
        batches = (torch.from_numpy(np.stack(prepared[start : start + self.batch_size])) for start in parts)
        return np.concatenate([self._embed(self._loaded.model.encode_image, pixels) for pixels in batches])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the (n, D) float32 unit features of texts, in passes of ``batch_size``."""
        parts = range(0, len(texts), self.batch_size)
        batches = (self._loaded.tokenizer(list(texts[start : start + self.batch_size])) for start in parts)
        return np.concatenate([self._embed(self._loaded.model.encode_text, tokens) for tokens in batches])

    @torch.inference_mode()
    def _embed(self, encode: Callable[..., Tensor], inputs: Tensor) -> np.ndarray:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            features = encode(inputs.to(self._device))
        unit: np.ndarray = F.normalize(features.float(), dim=-1).cpu().numpy()
        return unit


def load_features(
    model: str,
    pretrained: str | None = None,
    *,
    raw: bool = False,
    best: bool = False,
    trust: Trust,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 64,
) -> TorchFeatures:
    """Load a model for a search, by whatever `clipmill eval` takes.

    Raises UserError when there is no such model, or it has no text tower.
    """
    place = pick_device(device)
    config = EvalConfig((model,), data=("none",), pretrained=pretrained, raw=raw, best=best, trust=trust)
    loaded, _ = load_measured(config, model)
    if loaded.tokenizer is None:
        raise UserError(f"{model} has no text tower, and a search compares images with texts: give a CLIP")
    return TorchFeatures(loaded, model_label(model, pretrained), place, precision == "bf16", batch_size)
