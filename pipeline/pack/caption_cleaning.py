"""What `pack` does to an original caption before it stores it: fixes that keep the sample, reasons that drop it.

A caption is stored as its author would see it. Nothing a reader sees is taken away: letters of all scripts, combining
marks, emoji with their joiners (U+200C, U+200D), variation selectors and flag tags stay. Synsets are taken from the
caption as it came: the released rule of CatLIP has a cleaning of its own.

Fixes, in this order, each counted in the stage's counters (`<name> mended`):

| name | what | becomes |
|---|---|---|
| surrogates | halves of UTF-16 pairs written as UTF-8 (CESU-8) | the character; a half alone: nothing |
| html entities | ``&amp;`` ``&#39;`` ``&nbsp;``, with their semicolon, also escaped twice | the character |
| control characters | C1 codes; separators such as form feed; other controls but tab, line feed, carriage return | the Windows-1252 character that was meant; a space; nothing |
| invisible marks | zero-width space and no-break space, word joiner, soft hyphen, marks, embeddings, overrides and isolates of direction | nothing: text has the direction of its letters without them |

Spaces at both ends are removed after a fix. A caption that needs none is kept byte for byte.

Drops, counted among the shard's reasons:

| reason | what |
|---|---|
| caption or json does not parse | bytes that are no UTF-8, surrogates apart |
| caption empty after cleaning | nothing was left, and the image has no synthetic caption |
| caption too long | more characters than ``--max-caption-chars`` after cleaning: a page of text says little about an image |
"""  # noqa: E501 (tables)

import contextlib
import html
import math
import re
from collections.abc import Callable
from typing import Any

from ftfy.fixes import fix_c1_controls

from shards_spec.files import DataError
from shards_spec.sample import Sample

RULES_VERSION = 1  # part of pack's config: shards of another version are made again
EMPTY_AFTER_CLEANING = "caption empty after cleaning"

_SURROGATE = re.compile("[\ud800-\udfff]")
_ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]")
_SEPARATOR = re.compile("[\x0b\x0c\x1c-\x1f\u2028\u2029]")
_INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]")


def read_caption(sample: Sample) -> str:
    """The caption as it came, in which halves of UTF-16 pairs are left for `clean_caption`. Raises DataError."""
    try:
        return sample.caption
    except DataError:
        with contextlib.suppress(UnicodeDecodeError):
            return sample.members["txt"].decode(errors="surrogatepass")
        raise


def clean_caption(caption: str) -> tuple[str, list[str]]:
    """The caption as it is stored, and the names of the fixes it needed, in order."""
    if caption.isascii() and "&" not in caption and caption.isprintable():
        return caption, []
    text = caption
    fixes = list[str]()
    for name, fix in FIXES.items():
        fixed = fix(text)
        if fixed != text:
            fixes.append(name)
            text = fixed
    return (text.strip(), fixes) if fixes else (caption, [])


def without_surrogates(text: str) -> str:
    """Replace surrogate pairs by their character and delete unpaired surrogates."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


def strict_json(value: Any) -> Any:
    """A value of a json member as every reader accepts it: surrogates fixed, null for NaN and infinities."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [strict_json(part) for part in value]
    if isinstance(value, dict):
        return {without_surrogates(key): strict_json(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unescape(text: str) -> str:
    for _ in range(2):
        text = _ENTITY.sub(_character, text)
    return without_surrogates(text)  # a pair may come as two entities


def _character(entity: re.Match[str]) -> str:
    name = entity[1]
    if name[0] != "#":
        return html.unescape(entity[0])
    number = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
    return chr(number) if 0xD800 <= number <= 0xDFFF else html.unescape(entity[0])


def _without_controls(text: str) -> str:
    if not _CONTROL.search(text):
        return text
    return _CONTROL.sub("", _SEPARATOR.sub(" ", fix_c1_controls(text)))


FIXES: dict[str, Callable[[str], str]] = {
    "surrogates": without_surrogates,
    "html entities": _unescape,
    "control characters": _without_controls,
    "invisible marks": lambda text: _INVISIBLE.sub("", text),
}
