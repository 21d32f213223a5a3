"""The captions of one shard while they are written: what is wanted, what came, what is drawn again."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.caption.captioner import Captioner

ENOUGH_PAIRS = 4096  # of a shard, to judge heads by: 25 MB
LOOP = re.compile(r"(?<!\S)(\S+(?: \S+){0,3})(?: \1){2,}(?!\S)")  # up to four words, three times in a row


@dataclass(frozen=True)
class Wanted:
    """Captions to write for an image: their ``indices``, and which ``attempt`` at them this is.

    ``image`` (3, S, S) is normalised; ``original`` is the caption that came with it, None when it is not to be rated.
    """

    key: str
    image: "Tensor"
    indices: tuple[int, ...]
    original: str | None = None
    attempt: int = 0


@dataclass(frozen=True)
class Written:
    """A caption; ``similarity``: cosine with its image under the captioner's contrastive heads, when asked for."""

    text: str
    logprob: float
    num_tokens: int
    ended: bool
    similarity: float | None = None


@dataclass(frozen=True)
class Described:
    """What `Captioner.describe` gives for one `Wanted`: its captions in the order of ``indices``."""

    captions: list[Written]
    original_similarity: float | None = None


def problem(text: str, others: list[str]) -> str | None:
    """Why a caption should be drawn again: ``empty``, ``degenerate`` (no letter, or words in a loop) or ``repeated``
    (one of the image's ``others`` says the same)."""
    if not text:
        return "empty"
    if not any(letter.isalpha() for letter in text) or LOOP.search(text):
        return "degenerate"
    return "repeated" if text in others else None


@dataclass
class Contrast:
    """Whether a model's contrastive heads tell its images apart by their captions: a shard's first original pairs."""

    images: "list[Tensor]" = field(default_factory=list)
    texts: "list[Tensor]" = field(default_factory=list)
    captions: list[str] = field(default_factory=list)

    def add(self, images: "Tensor", texts: "Tensor", captions: list[str]) -> None:
        """A batch's unit features (n, D) and the captions (n)."""
        if len(self.captions) < ENOUGH_PAIRS:
            self.images.append(images.cpu())
            self.texts.append(texts.cpu())
            self.captions += captions

    def complaint(self) -> str | None:
        """What to say when own captions score no better than shuffled ones by two standard errors; None otherwise, and
        where there are too few to tell (three pairs, two different captions).

        By how much a pair beats what its image and its caption score on average needs no matrix of all pairs: it is the
        product of the two features less their means.
        """
        n = len(self.captions)
        if n < 3 or len(set(self.captions)) < 2:
            return None
        images, texts = (np.concatenate([part.float().numpy() for part in own]) for own in (self.images, self.texts))
        margins = ((images - images.mean(0)) * (texts - texts.mean(0))).sum(-1) * (n / (n - 1))
        if margins.mean() > 2 * margins.std() / n**0.5:
            return None
        own = (images * texts).sum(-1).mean()
        return (
            f"original captions are no closer to their images than to others by this model's contrastive heads (mean "
            f"cosine {own:.4f}, shuffled {own - margins.mean():.4f}, {n} images): its similarities say nothing, do not "
            "filter by them. Fine-tuning on captions can spoil these heads (open_clip's mscoco_finetuned tags): take "
            "another tag"
        )


@dataclass
class Row:
    """One image's captions by index, in the order of the indices."""

    captions: dict[int, Written] = field(default_factory=dict)
    original_similarity: float | None = None

    def problem(self, index: int) -> str | None:
        """What is wrong with a caption."""
        others = [caption.text for other, caption in self.captions.items() if other != index]
        return problem(self.captions[index].text, others)


class Drafts:
    """The rows of one shard while they are written, and the captions that wait to be drawn again in full batches."""

    def __init__(self, captioner: "Captioner", redraws: int) -> None:
        self.captioner, self.redraws = captioner, redraws if captioner.decoding.draws else 0
        self.rows, self.waiting, self.redrawn = dict[str, Row](), list[Wanted](), 0
        self.contrast = Contrast()

    def add(self, batch: list[Wanted]) -> None:
        """Write a batch's captions; those that went wrong are put to wait, or drawn again when enough wait."""
        for wanted, described in zip(batch, self.captioner.describe(batch, self.contrast), strict=True):
            row, wrong = self.rows[wanted.key], list[int]()
            if wanted.attempt == 0:
                row.original_similarity = described.original_similarity
            for index, caption in zip(wanted.indices, described.captions, strict=True):
                row.captions[index] = caption
                if wanted.attempt < self.redraws and row.problem(index):
                    wrong.append(index)
            if wrong:
                self.waiting.append(replace(wanted, indices=tuple(wrong), original=None, attempt=wanted.attempt + 1))
        self.redraw(least=self.captioner.batch_size)

    def redraw(self, least: int) -> None:
        """Draw again while ``least`` images wait."""
        while len(self.waiting) >= least:
            batch = self.waiting[: self.captioner.batch_size]
            del self.waiting[: self.captioner.batch_size]
            self.redrawn += sum(len(wanted.indices) for wanted in batch)
            self.add(batch)

    def facts(self) -> dict[str, int]:
        """Counts of captions."""
        facts = Counter({"redrawn": self.redrawn})
        for row in self.rows.values():
            facts["captions"] += len(row.captions)
            facts["cut at max_tokens"] += sum(not caption.ended for caption in row.captions.values())
            texts = [caption.text for caption in row.captions.values()]
            facts.update(wrong for place, text in enumerate(texts) if (wrong := problem(text, texts[:place])))
        return {name: number for name, number in sorted(facts.items()) if number}

    def as_columns(self) -> list[dict[str, Any]]:
        """Rows of the Parquet file."""
        return [
            {
                "key": key,
                "captions": [caption.text for caption in row.captions.values()],
                "logprobs": [caption.logprob for caption in row.captions.values()],
                "num_tokens": [caption.num_tokens for caption in row.captions.values()],
                "similarities": [caption.similarity for caption in row.captions.values()],
                "original_similarity": row.original_similarity,
            }
            for key, row in self.rows.items()
        ]
