"""Captions of a shard that a model writes: sampled again where they are unusable."""

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.caption.head_check import ContrastiveHeadCheck
from pipeline.caption.requests import CaptionRequest
from pipeline.caption.shard_captions import ShardCaptions

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.caption.captioner import Captioner


class CaptionRedrawer:
    """Captions a shard's images and samples unusable captions again, up to ``redraws`` times each.

    Images to be done again are collected until they fill a batch. ``shard`` has a row per key: the caller adds one
    for each sample, in the order of the shard, before it is captioned.
    """

    def __init__(self, captioner: "Captioner", redraws: int) -> None:
        self.captioner = captioner
        self.redraws = redraws if captioner.decoding.is_sampling else 0  # other methods would give the same again
        self.shard = ShardCaptions()
        self.pending = list[CaptionRequest]()
        self.head_check = ContrastiveHeadCheck()

    def add(
        self, requests: list[CaptionRequest], images: "Tensor | None" = None, upcoming: "Tensor | None" = None
    ) -> None:
        """Caption a batch; unusable captions are requested again, once a batch of such requests is full.

        ``images`` and ``upcoming`` are those of `Captioner.caption`.
        """
        answers = self.captioner.caption(requests, self.head_check, images, upcoming)
        for request, answer in zip(requests, answers, strict=True):
            row = self.shard.rows[request.key]
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
            self.shard.redrawn += sum(len(request.indices) for request in batch)
            self.add(batch)
