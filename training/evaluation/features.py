"""A model by any name as `clipmill search` uses it: unit features of images and texts in one space."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from shards_spec.files import UserError, sha256_file
from shards_spec.models import LOCAL_DIR, NO_TRUST, LoadedModel, Trust, model_label, pick_device, weights_sha256
from training.evaluation.config import EvalConfig
from training.evaluation.cost import inference_form
from training.evaluation.stage import check_model, load_measured
from training.export.onnx_model import graph_files, is_onnx, load_onnx


class EmbeddingModel:
    """A model that gives images and texts unit features, and says what they depend on.

    Args:
        loaded: The model with its tokenizer.
        name: How pages and messages call it.
        weights: A hash of its weights.
        device: Where it computes.
        bf16: Under autocast to bfloat16.
        batch_size: Images or texts per forward pass.
    """

    def __init__(
        self, loaded: LoadedModel, *, name: str, weights: str, device: str, bf16: bool, batch_size: int
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        self.image_size = loaded.image_size
        preprocess = open_clip.get_model_preprocess_cfg(loaded.model)
        precision = "bf16" if bf16 else "fp32"
        self.identity: dict[str, Any] = {"weights_sha256": weights, "preprocess": preprocess, "precision": precision}
        self._loaded = loaded
        self._device = torch.device(device)
        self._bf16 = bf16
        self._transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)

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


def load_embedding_model(
    model: str,
    pretrained: str | None = None,
    *,
    raw: bool = False,
    best: bool = False,
    trust: Trust = NO_TRUST,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 64,
) -> EmbeddingModel:
    """Load a model by whatever `clipmill eval` takes, or a folder of `clipmill export --format onnx`.

    Raises UserError when there is no such model, it has no text tower, or an option does not fit it.
    """
    folder = model.removeprefix(LOCAL_DIR)
    name = model_label(str(Path(folder).resolve()) if Path(folder).is_dir() else model, pretrained)
    config = EvalConfig(
        (model,), ("none",), pretrained, raw=raw, best=best, precision=precision, trust=trust, device=device
    )
    if is_onnx(folder):
        check_model(config, folder)
        loaded = load_onnx(folder)
        _check_has_texts(model, loaded)
        weights = "-".join(sha256_file(str(path)) for path in graph_files(folder))
        return EmbeddingModel(loaded, name=name, weights=weights, device="cpu", bf16=False, batch_size=batch_size)
    place = pick_device(device)
    loaded, _ = load_measured(config, model)
    _check_has_texts(model, loaded)
    weights = weights_sha256(loaded.model)
    loaded = replace(loaded, model=inference_form(loaded.model).to(place))
    return EmbeddingModel(
        loaded, name=name, weights=weights, device=place, bf16=precision == "bf16", batch_size=batch_size
    )


def _check_has_texts(model: str, loaded: LoadedModel) -> None:
    """Raise UserError for a model without a text tower."""
    if loaded.tokenizer is None:
        raise UserError(f"{model} has no text tower, and a search compares images with texts: give a CLIP")
