"""A captioner on its device: batches of images to captions, within the device's memory."""

import logging
from collections.abc import Callable
from itertools import chain

import numpy as np
import open_clip
import torch
from torch import Tensor

from pipeline.caption.beam_search import beam_search
from pipeline.caption.coca import NO_COCA, Coca, EncodedImages
from pipeline.caption.cuda_graphs import graphs_for
from pipeline.caption.decoding import Decoding
from pipeline.caption.head_check import ContrastiveHeadCheck
from pipeline.caption.preprocess import Preprocess
from pipeline.caption.requests import CaptionedImage, CaptionRequest, GeneratedCaption
from pipeline.caption.sampling import DecodedTokens, generate
from pipeline.caption.static_sampling import StaticSampler
from shards_spec.files import UserError
from shards_spec.library_errors import is_out_of_memory
from shards_spec.models import LoadedModel

log = logging.getLogger(__name__)
MAX_BATCH = {"cpu": 32, "cuda": 512}  # images; more makes no batch faster
MEMORY_SHARE = 0.8  # of the device's free memory that a batch may take
CACHE_OVERHEAD = 5 / 4  # copies while rows are selected
SAMPLING_BYTES = 64  # per row and vocabulary entry, to choose a token: logits, their copies, a full sort
PIXEL_BYTES = 5  # of a colour of a pixel, as it comes and as float32
ENCODER_VALUES = 16  # activations per patch and channel that the image encoder holds at once


def check_coca(model: str) -> None:
    """Raise UserError for a name of open_clip's that is no CoCa, before it is built and its weights are fetched."""
    config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if config is not None and "multimodal_cfg" not in config:
        raise UserError(f"{model}: {NO_COCA}")


class Captioner:
    """Writes captions in batches of at most ``batch_size`` images; by default as many as the device's memory holds.

    ``decoding``, ``num_captions`` and ``seed`` determine the captions; ``similarity`` adds the cosines. Raises
    UserError when the model is no CoCa.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        decoding: Decoding,
        num_captions: int,
        *,
        seed: int = 0,
        similarity: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.coca = Coca(loaded.model, loaded.tokenizer)
        self.decoding = decoding
        self.num_captions = num_captions
        self.seed = seed
        self.similarity = similarity
        self.image_size = loaded.image_size
        self.preprocess = Preprocess.of(loaded.model)
        self._normalise: Callable[[Tensor], Tensor] = loaded.normalise
        self.sampler: StaticSampler | None = None  # writes captions by CUDA graphs, where it can
        if self.coca.device.type == "cuda" and self.coca.text_blocks is not None and decoding.method != "beam":
            self.sampler = StaticSampler(self.coca, decoding, graphs_for(self.coca.device))
        self.encodes_ahead = self.coca.device.type == "cuda"  # a CPU does one thing after the other
        self._ahead: tuple[Tensor, EncodedImages] | None = None
        self.batch_size = batch_size or self._default_batch_size()

    @torch.inference_mode()
    def pixels(self, images: Tensor) -> Tensor:
        """The image encoder's input (P, 3, S, S), on the device in the model's type, of `stack`'s images."""
        on_device = images.to(self.coca.device, non_blocking=True)
        return self._normalise(on_device.permute(0, 3, 1, 2)).to(self.coca.dtype).contiguous()

    def stack(self, requests: list[CaptionRequest]) -> Tensor:
        """The images (P, S, S, 3) uint8 of at least one request, for a GPU in pinned memory."""
        shape = (len(requests), *requests[0].image.shape)
        stacked = torch.empty(shape, dtype=torch.uint8, pin_memory=self.coca.device.type == "cuda")
        np.stack([request.image for request in requests], out=stacked.numpy())
        return stacked

    def bytes_per_image(self) -> int:
        """An upper bound of the device memory that one more image in the batch takes at its worst moment.

        Counted: the encoder's activations, the image's cross-attention keys and values, its rows' caches, and the
        room to choose a token. CUDA graphs have cross-attention's input and the room to choose a second time, and a GPU
        the images of the batch that comes next.
        """
        coca = self.coca
        decoding = self.decoding
        item = torch.finfo(coca.dtype).bits // 8
        blank = coca.encode_images(torch.zeros(1, 3, self.image_size, self.image_size))
        cross_attention = sum(tensor.numel() for tensor in (*blank.keys, *blank.values)) * item
        patches, width = coca.model.visual.positional_embedding.shape
        encoder = ENCODER_VALUES * patches * width * item + 3 * self.image_size**2 * (PIXEL_BYTES + item)
        rows = decoding.num_beams if decoding.method == "beam" else self.num_captions
        length = coca.context_length if decoding.prefix else 1 + decoding.max_tokens
        layers = [*(coca.text_blocks or ()), *coca.blocks]
        caches = sum(2 * block.heads * block.head_width * length * item for block in layers)
        vocabulary = coca.decoder.text_projection.shape[1]
        cross_attention *= 1 + bool(self.sampler) + self.encodes_ahead
        choosing = SAMPLING_BYTES * vocabulary * (1 + bool(self.sampler))
        per_row = int(caches * CACHE_OVERHEAD) + choosing
        return int(int(cross_attention * CACHE_OVERHEAD) + encoder + rows * per_row)

    def _default_batch_size(self) -> int:
        """Images per batch for this device, a power of two."""
        kind = self.coca.device.type
        most = MAX_BATCH.get(kind, MAX_BATCH["cpu"])
        if kind == "cuda":
            free, _ = torch.cuda.mem_get_info(self.coca.device)
            most = min(most, max(1, int(MEMORY_SHARE * free) // self.bytes_per_image()))
        return 1 << (most.bit_length() - 1)

    def caption(
        self,
        requests: list[CaptionRequest],
        head_check: ContrastiveHeadCheck | None = None,
        images: Tensor | None = None,
        upcoming: Tensor | None = None,
    ) -> list[CaptionedImage]:
        """Captions for any number of requests; their rated original pairs are added to ``head_check``.

        ``images`` is their `stack`, where it was made before, ``upcoming`` that of the call that comes next: a GPU
        encodes it while the host goes on. A batch that the device has no memory for is halved, and so are all later
        ones. Raises UserError when not even one image fits.
        """
        answers: list[CaptionedImage] = []
        while len(answers) < len(requests):
            part = slice(len(answers), len(answers) + self.batch_size)
            batch = requests[part]
            is_last = part.stop >= len(requests)
            try:
                stacked = self.stack(batch) if images is None else images[part]
                answers += self._caption_batch(batch, stacked, head_check, upcoming if is_last else None)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # out of the except block, where the failed batch's tensors are free again
            if len(batch) == 1:
                raise UserError(f"out of memory with one image at a time ({reason}); ask for fewer or shorter captions")
            self.batch_size = len(batch) // 2
            log.warning("out of memory with %d images; continuing with %d at a time", len(batch), self.batch_size)
            self._ahead = None
            if self.sampler:
                self.sampler.release()
            if self.coca.device.type == "cuda":
                torch.cuda.empty_cache()
        return answers

    def encode_ahead(self, images: Tensor) -> None:
        """Have a GPU begin to encode the ``images`` of the next call of `caption`; done once, without waiting."""
        if not self.encodes_ahead or len(images) > self.batch_size or self._is_ahead(images):
            return
        try:
            self._ahead = (images, self.coca.encode_images(self.pixels(images)))
        except RuntimeError as error:  # a lack of memory is mended in their turn
            if not is_out_of_memory(error):
                raise

    def _is_ahead(self, images: Tensor) -> bool:
        ahead = self._ahead
        return ahead is not None and ahead[0].data_ptr() == images.data_ptr() and len(ahead[0]) == len(images)

    def _encode(self, images: Tensor) -> EncodedImages:
        if self._ahead is None or not self._is_ahead(images):
            return self.coca.encode_images(self.pixels(images))
        _, encoded = self._ahead
        self._ahead = None
        return encoded

    def _caption_batch(
        self,
        requests: list[CaptionRequest],
        stacked: Tensor,
        head_check: ContrastiveHeadCheck | None,
        upcoming: Tensor | None,
    ) -> list[CaptionedImage]:
        coca = self.coca
        images = self._encode(stacked)
        owners = list[int]()  # of each caption: the position of its request
        names = list[str]()
        for position, request in enumerate(requests):
            for index in request.indices:
                owners.append(position)
                names.append(self._random_name(request, index))
        decoded: list[DecodedTokens]
        if self.decoding.method == "beam":
            decoded = list(chain.from_iterable(beam_search(coca, images, self.num_captions, self.decoding)))
        elif self.sampler:
            decoded = self.sampler.generate(images, owners, names)
        else:
            decoded = generate(coca, images, owners, names, self.decoding)
        if upcoming is not None:
            self.encode_ahead(upcoming)
        prompt = coca.prompt_tokens(self.decoding.prefix)
        texts = [coca.decode([*prompt, *caption.tokens]) for caption in decoded]
        cosines, originals = self._similarities(requests, images.features, owners, texts, head_check)
        answers = [CaptionedImage([], original) for original in originals]
        for owner, text, caption, cosine in zip(owners, texts, decoded, cosines, strict=True):
            generated = GeneratedCaption(text, caption.logprob, len(caption.tokens), caption.ended, cosine)
            answers[owner].captions.append(generated)
        return answers

    def _random_name(self, request: CaptionRequest, index: int) -> str:
        """The name that a caption's random numbers belong to."""
        name = f"caption/{self.seed}/{request.key}/{index}"
        return f"{name}/{request.attempt}" if request.attempt else name

    @torch.inference_mode()
    def _similarities(
        self,
        requests: list[CaptionRequest],
        features: Tensor,
        owners: list[int],
        texts: list[str],
        head_check: ContrastiveHeadCheck | None,
    ) -> tuple[list[float | None], list[float | None]]:
        """Cosines of the texts, and of the requests' original captions, with their images; None where not asked."""
        originals: list[float | None] = [None] * len(requests)
        if not self.similarity:
            return [None] * len(texts), originals
        rated = list[int]()
        original_texts = list[str]()
        for position, request in enumerate(requests):
            if request.original is not None:
                rated.append(position)
                original_texts.append(request.original)
        text_features = self.coca.text_features([*texts, *original_texts])
        features = features.float()
        cosines = (features[[*owners, *rated]] * text_features).sum(-1).tolist()
        if head_check is not None and rated:
            head_check.add(features[rated], text_features[len(texts) :], original_texts)
        for position, cosine in zip(rated, cosines[len(texts) :], strict=True):
            originals[position] = cosine
        return cosines[: len(texts)], originals
