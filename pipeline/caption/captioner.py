"""A captioner on its device: batches of images to captions, within the device's memory."""

import logging
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from pipeline.caption.beam_search import beam_search
from pipeline.caption.coca import NO_COCA, Coca
from pipeline.caption.decoding import Decoding
from pipeline.caption.redraws import Contrast, Described, Wanted, Written
from pipeline.caption.sampling import generate
from pipeline.core.devices import is_out_of_memory
from shards_spec.files import UserError
from shards_spec.images import without_ends
from shards_spec.models import LoadedModel

log = logging.getLogger(__name__)
MOST_IMAGES = {"cpu": 32, "cuda": 512}  # more makes no batch faster
SHARE = 0.8  # of the device's free memory that a batch may take
CHOICE_BYTES = 64  # per row and vocabulary entry, for choosing a token: logits, their copies, a full sort


def check_coca(model: str) -> None:
    """Raise UserError for a name of open_clip's that is no CoCa, before it is built and its weights are fetched."""
    config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if config is not None and "multimodal_cfg" not in config:
        raise UserError(f"{model}: {NO_COCA}")


class Captioner:
    """Writes captions in batches of at most ``batch_size`` images; by default as many as the device's memory holds.

    ``decoding``, ``num_captions`` and ``seed`` shape the captions; ``similarity`` adds the cosines. Raises UserError
    when the model is no CoCa.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        decoding: Decoding,
        num_captions: int,
        seed: int = 0,
        similarity: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.coca = Coca(loaded.model, loaded.tokenizer)
        self.decoding, self.num_captions, self.seed, self.similarity = decoding, num_captions, seed, similarity
        self.size = loaded.image_size
        cfg = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(loaded.model))
        self._transform: Any = open_clip.transform.image_transform_v2(cfg, is_train=False)
        self.batch_size = batch_size or self._fitting()

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, S, S) as the model was trained to see it; open_clip's evaluation transform."""
        return self._transform(without_ends(image))

    def image_bytes(self) -> int:
        """An upper bound of the device memory that one more image in the batch takes at its worst moment.

        Counted: the encoder's activations, the image's cross-attention keys and values, its rows' caches, and the
        room to choose a token.
        """
        coca, decoding = self.coca, self.decoding
        item = torch.finfo(coca.dtype).bits // 8
        one = coca.encode(torch.zeros(1, 3, self.size, self.size))
        cross = sum(tensor.numel() for tensor in (*one.keys, *one.values)) * item
        patches, width = coca.model.visual.positional_embedding.shape
        encoder = 16 * patches * width * item + 3 * self.size**2 * (4 + item)
        rows = decoding.num_beams if decoding.method == "beam" else self.num_captions
        length = coca.context_length if decoding.prefix else 1 + decoding.max_tokens
        layers = [*(coca.text_blocks or ()), *coca.blocks]
        caches = sum(2 * block.heads * block.dim * length * item for block in layers)
        vocabulary = coca.decoder.text_projection.shape[1]
        return cross * 5 // 4 + encoder + rows * (caches * 5 // 4 + CHOICE_BYTES * vocabulary)

    def _fitting(self) -> int:
        """Images per batch for this device, a power of two."""
        kind = self.coca.device.type
        most = MOST_IMAGES.get(kind, 32)
        if kind == "cuda":
            free, _ = torch.cuda.mem_get_info(self.coca.device)
            most = min(most, max(1, int(SHARE * free) // self.image_bytes()))
        return 1 << (most.bit_length() - 1)

    def describe(self, batch: list[Wanted], contrast: Contrast | None = None) -> list[Described]:
        """Captions for a batch of any length; its rated original pairs are added to ``contrast``.

        A batch that the device has no memory for is halved, and so are all later ones. Raises UserError when not even
        one image fits.
        """
        described: list[Described] = []
        while len(described) < len(batch):
            part = batch[len(described) : len(described) + self.batch_size]
            try:
                described += self._describe(part, contrast)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            if len(part) == 1:  # and out of the except block, where the failed batch's tensors are free again
                raise UserError(f"out of memory with one image at a time ({reason}); ask for fewer or shorter captions")
            self.batch_size = len(part) // 2
            log.warning("out of memory with %d images; going on with %d at a time", len(part), self.batch_size)
            if self.coca.device.type == "cuda":
                torch.cuda.empty_cache()
        return described

    def _describe(self, batch: list[Wanted], contrast: Contrast | None) -> list[Described]:
        coca, decoding = self.coca, self.decoding
        images = coca.encode(torch.stack([wanted.image for wanted in batch]))
        owners = [place for place, wanted in enumerate(batch) for _ in wanted.indices]
        if decoding.method == "beam":
            found = [c for row in beam_search(coca, images, self.num_captions, decoding) for c in row]
        else:
            names = [self._name(wanted, index) for wanted in batch for index in wanted.indices]
            found = generate(coca, images, owners, names, decoding)
        prompt = coca.prompt(decoding.prefix) if decoding.prefix else []
        texts = [coca.decode([*prompt, *caption.tokens]) for caption in found]
        cosines, originals = self._similarities(batch, images.features, owners, texts, contrast)
        written = iter(
            Written(text, caption.logprob, len(caption.tokens), caption.ended, cosine)
            for text, caption, cosine in zip(texts, found, cosines, strict=True)
        )
        return [
            Described([next(written) for _ in wanted.indices], original)
            for wanted, original in zip(batch, originals, strict=True)
        ]

    def _name(self, wanted: Wanted, index: int) -> str:
        """What a caption's random numbers depend on."""
        return f"caption/{self.seed}/{wanted.key}/{index}" + (f"/{wanted.attempt}" if wanted.attempt else "")

    @torch.inference_mode()
    def _similarities(
        self, batch: list[Wanted], features: Tensor, owners: list[int], texts: list[str], contrast: Contrast | None
    ) -> tuple[list[float | None], list[float | None]]:
        """Cosines of the texts, and of the batch's original captions, with their images; None where not asked."""
        originals: list[float | None] = [None] * len(batch)
        if not self.similarity:
            return [None] * len(texts), originals
        rated = [place for place, wanted in enumerate(batch) if wanted.original is not None]
        text_features = self.coca.text_features([*texts, *(str(batch[place].original) for place in rated)])
        features = features.float()
        cosines = (features[[*owners, *rated]] * text_features).sum(-1).tolist()
        if contrast is not None and rated:
            contrast.add(features[rated], text_features[len(texts) :], [str(batch[place].original) for place in rated])
        for place, cosine in zip(rated, cosines[len(texts) :], strict=True):
            originals[place] = cosine
        return cosines[: len(texts)], originals
