"""What a captioner is asked for, and what it returns."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CaptionRequest:
    """Captions to write for one image.

    ``image`` (S, S, 3) uint8 is scaled and cropped; ``indices`` are the numbers of the captions to write, ``attempt``
    is 0 for the first try at them. ``original`` is the caption that came with the image, None when it is not to be
    rated.
    """

    key: str
    image: np.ndarray
    indices: tuple[int, ...]
    original: str | None = None
    attempt: int = 0


@dataclass(frozen=True)
class GeneratedCaption:
    """One caption.

    ``logprob`` is the sum over its ``num_tokens`` tokens and the end token, both None where who wrote it does not say;
    ``ended``: the model closed it itself, within the longest length. ``similarity`` is the cosine with its image by the
    captioner's contrastive heads, None when not asked for.
    """

    text: str
    logprob: float | None
    num_tokens: int | None
    ended: bool
    similarity: float | None = None


@dataclass(frozen=True)
class CaptionedImage:
    """The answer to one `CaptionRequest`: its captions in the order of ``indices``."""

    captions: list[GeneratedCaption]
    original_similarity: float | None = None
