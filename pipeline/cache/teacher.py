"""A teacher on its device: pixels and texts to unit vectors that do not depend on what shares their batch."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.prefetch import batches
from shards_spec.files import UserError
from shards_spec.library_errors import is_out_of_memory
from shards_spec.models import LoadedModel

log = logging.getLogger(__name__)
CPU_ROWS = 16  # matrix products of fewer rows use other kernels; more are hardly faster
CUDA_ROWS = 256


class Teacher:
    """Embeds in forward passes of exactly ``rows`` rows, the last one filled up with copies.

    So a row's bits depend neither on its neighbours nor on its position. On a CPU ``rows`` is always 16, and the bits
    do not depend on ``batch_size`` either; on CUDA another number may change the last bit. A pass that the device has
    no memory for is halved, and so are all later ones.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int | None = None) -> None:
        self.loaded = loaded
        self.model = loaded.model
        parameter = next(self.model.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype
        self.rows = CPU_ROWS if self.device.type == "cpu" else batch_size or CUDA_ROWS

    @cached_property
    def dim(self) -> int:
        """Width D of the embeddings, found with a blank image."""
        side = self.loaded.image_size
        return int(self.embed_images([np.zeros((side, side, 3), np.uint8)]).shape[1])

    def embed_images(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Images (S, S, 3) uint8 -> (n, D) float32, L2-normalised."""
        return self._embed(images, self._encode_images)

    def embed_texts(self, texts: Iterable[str]) -> np.ndarray:
        """(n, D) float32, L2-normalised."""
        return self._embed(texts, self._encode_texts)

    def _encode_images(self, images: list[np.ndarray]) -> Tensor:
        pixels = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2)
        pixels = self.loaded.normalise(pixels).to(self.dtype)
        is_timm = self.loaded.tokenizer is None
        features: Tensor = self.model(pixels) if is_timm else self.model.encode_image(pixels, normalize=False)
        return features

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self.loaded.tokenizer(texts).to(self.device)
        features: Tensor = self.model.encode_text(tokens, normalize=False)
        return features

    @torch.inference_mode()
    def _embed(self, items: Iterable[Any], encode: Callable[[list[Any]], Tensor]) -> np.ndarray:
        features = list[np.ndarray]()
        on_device: Tensor | None = None
        for batch in batches(items, self.rows):
            for encoded in self._passes(batch, encode):
                # a result is copied from the device only when the next pass is queued there, so that it never idles
                if on_device is not None:
                    features.append(on_device.cpu().numpy())
                on_device = encoded
        if on_device is not None:
            features.append(on_device.cpu().numpy())
        return np.concatenate(features) if features else np.empty((0, 0), np.float32)

    def _passes(self, batch: list[Any], encode: Callable[[list[Any]], Tensor]) -> Iterator[Tensor]:
        """Unit vectors of the batch, in as many passes as the memory needs."""
        done = 0
        while done < len(batch):
            part = batch[done : done + self.rows]
            padding = part[:1] * (self.rows - len(part))
            try:
                encoded = encode(part + padding)[: len(part)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            else:
                yield F.normalize(encoded.float(), dim=-1)
                done += len(part)
                continue
            self._halve(reason)  # out of the except block, where the failed pass's tensors are free again

    def _halve(self, reason: str) -> None:
        if self.rows == 1:
            raise UserError(f"out of memory with one row at a time ({reason}); use a larger device or --precision bf16")
        log.warning("out of memory with %d rows; continuing with %d at a time", self.rows, self.rows // 2)
        self.rows //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
