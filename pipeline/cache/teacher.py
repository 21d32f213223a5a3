"""A teacher on its device: pixels and texts to vectors or soft labels that do not depend on what shares their batch."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, cycle, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.cache.device_clock import DeviceClock, Moment
from pipeline.cache.fused_attention import fuse_attention
from pipeline.cache.tokens import tokenise
from shards_spec.files import UserError
from shards_spec.library_errors import is_out_of_memory
from shards_spec.models import LoadedModel
from shards_spec.soft_labels import SoftLabelFormat

log = logging.getLogger(__name__)
CPU_ROWS = 16  # matrix products of fewer rows use other kernels; more are hardly faster
CUDA_ROWS = 256
CUDA_TEXTS = 4  # per image: a text is shorter, and larger passes of texts are faster


@dataclass(frozen=True)
class _QueuedPass:
    """A pass that the device was given: when it begins, and its result (n, D) on the host, there when it has ended."""

    begin: Moment
    features: Tensor
    end: Moment


class Teacher:
    """Embeds in forward passes of exactly ``rows`` images or ``text_rows`` texts, the last one filled up with copies.

    So a row's bits depend neither on its neighbours nor on its position. On a CPU ``rows`` is always 16, and the bits
    do not depend on ``batch_size`` either; on CUDA another number may change the last bit. A pass that the device has
    no memory for is halved, and so are all later ones.

    A CUDA device is given a pass before the last one's result is awaited, so that it goes from one to the next.
    ``waited_s`` is how long it had none since `start_clock`.
    """

    def __init__(
        self, loaded: LoadedModel, batch_size: int | None = None, soft_labels: SoftLabelFormat | None = None
    ) -> None:
        """With ``soft_labels`` the model is a classifier, and images become bytes of that format."""
        self.loaded = loaded
        self.soft_labels = soft_labels
        self.model = loaded.model
        parameter = next(self.model.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype
        self.rows = CPU_ROWS if self.device.type == "cpu" else batch_size or CUDA_ROWS
        if self.device.type == "cuda":
            fuse_attention(self.model)
        self._texts_per_image = 1 if self.device.type == "cpu" else CUDA_TEXTS
        self._clock = DeviceClock(self.device)
        self.start_clock()

    @property
    def text_rows(self) -> int:
        """Texts in a pass."""
        return self.rows * self._texts_per_image

    def start_clock(self) -> None:
        """Count ``waited_s`` from here."""
        self.waited_s = 0.0
        self._idle_since = self._clock.moment()

    @cached_property
    def dim(self) -> int:
        """Numbers D of what is stored of an image, found with a blank one."""
        side = self.loaded.image_size
        return int(self.embed_images([np.zeros((side, side, 3), np.uint8)]).shape[1])

    def embed_images(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Images (S, S, 3) uint8 -> (n, D) float32, L2-normalised, or uint8 of soft labels.

        An image may be overwritten after the next one.
        """
        return self._embed(images, self._encode_images)

    def embed_texts(self, texts: Iterable[str]) -> np.ndarray:
        """(n, D) float32, L2-normalised."""
        return self.embed_tokens(tokenise(self.loaded.tokenizer, texts))

    def embed_tokens(self, tokens: Iterable[np.ndarray]) -> np.ndarray:
        """Texts as the tokenizer's (context_length,) int64 -> (n, D) float32, L2-normalised."""
        return self._embed(tokens, self._encode_tokens, self._texts_per_image)

    def _encode_images(self, images: Tensor) -> Tensor:
        pixels = self.loaded.normalise(images.permute(0, 3, 1, 2)).to(self.dtype)
        is_timm = self.loaded.tokenizer is None
        features: Tensor = self.model(pixels) if is_timm else self.model.encode_image(pixels, normalize=False)
        return F.normalize(features.float(), dim=-1) if self.soft_labels is None else self.soft_labels.encode(features)

    def _encode_tokens(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(tokens, normalize=False).float(), dim=-1)

    @torch.inference_mode()
    def _embed(self, items: Iterable[np.ndarray], encode: Callable[[Tensor], Tensor], per_row: int = 1) -> np.ndarray:
        """What ``encode`` makes of all items, (n, D), in passes of ``per_row`` items for each of ``rows``."""
        features = list[np.ndarray]()
        queued = deque[_QueuedPass]()
        for batch in self._host_batches(items, per_row):
            for queued_pass in self._passes(batch, encode, per_row):
                queued.append(queued_pass)
                if len(queued) > 1:
                    features.append(self._result(queued.popleft()))
        features += map(self._result, queued)
        return np.concatenate(features) if features else np.empty((0, 0), np.float32)

    def _host_batches(self, items: Iterable[np.ndarray], per_row: int) -> Iterator[Tensor]:
        """Batches of a pass's items on the host, the last one shorter, in two buffers that are used in turn.

        On CUDA they are page-locked, so that the device copies from them while the host fills the other one.
        """
        iterator = iter(items)
        first = next(iterator, None)
        if first is None:
            return
        iterator = chain([first], iterator)
        buffers = [torch.from_numpy(np.empty((self.rows * per_row, *first.shape), first.dtype)) for _ in range(2)]
        if self.device.type == "cuda":
            buffers = [buffer.pin_memory() for buffer in buffers]
        for buffer in cycle(buffers):
            places = buffer.numpy()
            count = 0
            for item in islice(iterator, self.rows * per_row):
                places[count] = item
                count += 1
            if not count:
                return
            yield buffer[:count]

    def _passes(self, batch: Tensor, encode: Callable[[Tensor], Tensor], per_row: int) -> Iterator[_QueuedPass]:
        """What ``encode`` makes of the batch, in as many passes as the memory needs."""
        done = 0
        while done < len(batch):
            rows = self.rows * per_row
            part = batch[done : done + rows]
            begin = self._clock.moment()
            try:
                # encoded with the copies: the order in which CUDA sums up a row depends on the number of rows
                features = encode(self._full_pass(part, rows))[: len(part)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            else:
                # the copy comes right behind the pass, not behind the next one
                on_host = features.to("cpu", non_blocking=True)
                yield _QueuedPass(begin, on_host, self._clock.moment())
                done += len(part)
                continue
            self._halve(reason)  # out of the except block, where the failed pass's tensors are free again

    def _full_pass(self, part: Tensor, rows: int) -> Tensor:
        """``rows`` rows on the device: those of ``part``, then copies of its first."""
        inputs = part.to(self.device, non_blocking=True)
        missing = rows - len(inputs)
        return torch.cat([inputs, inputs[:1].expand(missing, *inputs.shape[1:])]) if missing else inputs

    def _result(self, queued: _QueuedPass) -> np.ndarray:
        """The features (n, D) of a pass, when the device has done it."""
        self._clock.wait(queued.end)
        self.waited_s += self._clock.seconds(self._idle_since, queued.begin)
        self._idle_since = queued.end
        return queued.features.numpy().copy()

    def _halve(self, reason: str) -> None:
        if self.rows == 1:
            raise UserError(f"out of memory with one row at a time ({reason}); use a larger device or --precision bf16")
        log.warning("out of memory with %d rows; continuing with %d at a time", self.rows, self.rows // 2)
        self.rows //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
