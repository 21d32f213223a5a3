"""The captions of one shard: collected by image, and sampled again where they are unusable."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipeline.caption.head_check import ContrastiveHeadCheck
from pipeline.caption.requests import CaptionRequest, GeneratedCaption

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.caption.captioner import Captioner

LOOP = re.compile(r"(?<!\S)(\S+(?: \S+){0,3})(?: \1){2,}(?!\S)")  # up to four words, three times in a row


def caption_defect(text: str, others: list[str]) -> str | None:
    """Why a caption should be sampled again, None when it is fine.

    ``empty``; ``degenerate``: no letter, or words in a loop; ``repeated``: one of the image's ``others`` is the same.
    """
    if not text:
        return "empty"
    if _is_degenerate(text):
        return "degenerate"
    return "repeated" if text in others else None


@lru_cache(maxsize=2**16)  # a shard's captions: they are counted at its end, when a GPU has nothing to do
def _is_degenerate(text: str) -> bool:
    return not any(letter.isalpha() for letter in text) or LOOP.search(text) is not None


@dataclass
class ImageCaptions:
    """One image's captions by index, in the order in which the indices were first asked for."""

    captions: dict[int, GeneratedCaption] = field(default_factory=dict)
    original_similarity: float | None = None

    def defect(self, index: int) -> str | None:
        """What is wrong with a caption, compared with all others of the image."""
        others = [caption.text for other, caption in self.captions.items() if other != index]
        return caption_defect(self.captions[index].text, others)


class CaptionRedrawer:
    """Captions a shard's images and samples unusable captions again, up to ``redraws`` times each.

    Images to be done again are collected until they fill a batch. ``rows`` has an entry per key: the caller adds one
    for each sample, in the order of the shard, before it is captioned.
    """

    def __init__(self, captioner: "Captioner", redraws: int) -> None:
        self.captioner = captioner
        self.redraws = redraws if captioner.decoding.is_sampling else 0  # other methods would give the same again
        self.rows = dict[str, ImageCaptions]()
        self.pending = list[CaptionRequest]()
        self.redrawn = 0
        self.head_check = ContrastiveHeadCheck()

    def add(
        self, requests: list[CaptionRequest], images: "Tensor | None" = None, upcoming: "Tensor | None" = None
    ) -> None:
        """Caption a batch; unusable captions are requested again, once a batch of such requests is full.

        ``images`` and ``upcoming`` are those of `Captioner.caption`.
        """
        answers = self.captioner.caption(requests, self.head_check, images, upcoming)
        for request, answer in zip(requests, answers, strict=True):
            row = self.rows[request.key]
            if request.attempt == 0:
                row.original_similarity = answer.original_similarity
            unusable = list[int]()
            for index, caption in zip(request.indices, answer.captions, strict=True):
                row.captions[index] = caption
                if request.attempt < self.redraws and row.defect(index):
                    unusable.append(index)
            if unusable:
                again = replace(request, indices=tuple(unusable), original=None, attempt=request.attempt + 1)
                self.pending.append(again)
        self.redraw(at_least=self.captioner.batch_size)

    def redraw(self, at_least: int) -> None:
        """Caption pending requests again while there are ``at_least`` of them."""
        while len(self.pending) >= at_least:
            batch = self.pending[: self.captioner.batch_size]
            del self.pending[: self.captioner.batch_size]
            self.redrawn += sum(len(request.indices) for request in batch)
            self.add(batch)

    def counters(self) -> dict[str, int]:
        """Numbers of captions: all, sampled again, cut at the longest length, and the defects that are left."""
        counters = Counter({"redrawn": self.redrawn})
        for row in self.rows.values():
            counters["captions"] += len(row.captions)
            counters["cut at max_tokens"] += sum(not caption.ended for caption in row.captions.values())
            texts = [caption.text for caption in row.captions.values()]
            for position, text in enumerate(texts):
                defect = caption_defect(text, texts[:position])
                if defect:
                    counters[defect] += 1
        return {name: number for name, number in sorted(counters.items()) if number}

    def as_columns(self) -> dict[str, list[Any]]:
        """Columns of the Parquet file; lists of rows would take twenty times as long to become a table."""
        rows = [(key, row, list(row.captions.values())) for key, row in self.rows.items()]
        return {
            "key": [key for key, _, _ in rows],
            "captions": [[caption.text for caption in captions] for _, _, captions in rows],
            "logprobs": [[caption.logprob for caption in captions] for _, _, captions in rows],
            "num_tokens": [[caption.num_tokens for caption in captions] for _, _, captions in rows],
            "similarities": [[caption.similarity for caption in captions] for _, _, captions in rows],
            "original_similarity": [row.original_similarity for _, row, _ in rows],
        }
