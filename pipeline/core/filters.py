"""Rules for single samples: captions that say nothing, images of an odd size.

Pure functions, no files. `ingest` applies them to the rows of a shard, `pack` to original captions.
"""

import itertools
import re
import unicodedata

REPEATED_CHARACTER = re.compile(r"(\S)\1{9}")
WORD_BREAK = re.compile(r"[\s,;:.!?|/·、，。_\-–—]+")
REPEATED_WORDS = 5  # in a row
ADDRESS = re.compile(
    r"(?:[a-z][a-z0-9+.\-]*://|www\.)\S+"
    r"|\S+@[a-z0-9.\-]+\.[a-z]+"
    r"|[a-z0-9\-]+(?:\.[a-z0-9\-]+)*\.(?:com|net|org|info)(?:/\S*)?"
    r"|\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|avif|heic|svg)"
    r"|(?:img|imag|image|dsc|dscn|dscf|pict|dcim|mvi|gopr|cimg|hpim|pxl|sam|vid|photo|picture|screenshot)"
    r"[ _\-]?[(]?\d{3,}[\d _\-.()]*(?:\.[a-z]{3,4})?",
    re.IGNORECASE,
)


def caption_problem(caption: str | None, min_chars: int, max_chars: int, sane: bool = True) -> str | None:
    """Why a caption is left out (a reason on disk), or None. Lengths in characters without space around; 0: no limit.

    ``sane`` demands words of any language: letters are Unicode's, and combining marks count as letters. A missing
    caption has length 0; with ``min_chars`` 0 it is no problem.
    """
    text = (caption or "").strip()
    if len(text) < min_chars:
        return "caption too short"
    if 0 < max_chars < len(text):
        return "caption too long"
    if not text or not sane:
        return None
    if ADDRESS.fullmatch(text):
        return "caption is an address"
    letters = sum(map(str.isalpha, text))
    if not letters:
        return "caption has no letters"
    if REPEATED_CHARACTER.search(text) or _repeats_a_word(text):
        return "caption repeats itself"
    rest = sum(unicodedata.category(char)[0] == "M" or char.isspace() for char in text if not char.isalpha())
    return "caption is mostly symbols" if 2 * (letters + rest) < len(text) else None


def _repeats_a_word(text: str) -> bool:
    words = (word for word in WORD_BREAK.split(text.casefold()) if word)
    return any(sum(1 for _ in same) >= REPEATED_WORDS for _, same in itertools.groupby(words))


def image_problem(width: int, height: int, min_size: int, max_aspect: float) -> str | None:
    """Why an image is left out (a reason on disk), or None. Pixels; ``max_aspect`` is longer side / shorter side."""
    if min(width, height) < min_size:
        return "picture too small"
    return "aspect ratio too large" if max(width, height) > max_aspect * min(width, height) else None
