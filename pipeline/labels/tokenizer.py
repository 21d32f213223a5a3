"""Caption to tokens as CatLIP's released code makes them: `normalise_caption`, then ``word_tokenize`` of NLTK 3.8.1.

The released code pins that version of NLTK. Its rules are copied because NLTK's changed: 3.10 splits ``'dog'`` where
3.8.1 does not, and labels must be the same on every machine. The regular expressions are NLTK's
(``nltk/tokenize/destructive.py``, ``punkt.py``, Apache-2.0), for lower-cased text; what Punkt's English model has
learnt about such text is in `pipeline/labels/punkt_english.py`: "col. sanders" is one sentence, so "col." is no
colonel, and "ph.d. students" have a label.

Twenty substitutions over every caption would take nearly all of the time. Apart from quotes and full stops they do not
look across a space, so `TokenMapper` splits at spaces and remembers the result of each piece. A caption for which that
might give other tokens is tokenised as a whole.
"""

import re
import string
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import TypeVar
from urllib.parse import unquote

import ftfy

from pipeline.labels.punkt_english import ABBREVIATIONS, OPENERS

T = TypeVar("T")
MEMO_LIMIT = 1 << 18  # entries, about 40 MB; web captions have a long tail of rare words
MEMO_MAX_CHARS = 64  # longer keys are addresses, which do not come again

_TAG = re.compile(r"<.*?>")
_SPACES = re.compile(r" +")

_OPENING = (
    (re.compile(r"([«“‘„]|[`]+)"), r" \1 "),
    (re.compile(r'^"'), r"``"),
    (re.compile(r"(``)"), r" \1 "),
    (re.compile(r"([ (\[{<])(\"|'{2})"), r"\1 `` "),
    (re.compile(r"(?i)(')(?!re|ve|ll|m|t|s|d|n)(\w)\b"), r"\1 \2"),
    (re.compile(r"([^.])(\.)([\])}>\"'»”’ ]*+)\s*$"), r"\1 \2 \3 "),  # the final full stop; possessive: no backtracking
    (re.compile(r"([:,])([^\d])"), r" \1 \2"),
    (re.compile(r"([:,])$"), r" \1 "),
    (re.compile(r"\.{2,}"), r" \g<0> "),
    (re.compile(r"[;@#$%&]"), r" \g<0> "),
    (re.compile(r"([^.])(\.)([\])}>\"']*)\s*$"), r"\1 \2\3 "),
    (re.compile(r"[?!]"), r" \g<0> "),
    (re.compile(r"([^'])' "), r"\1 ' "),
    (re.compile(r"[*]"), r" \g<0> "),
    (re.compile(r"[\]\[(){}<>]"), r" \g<0> "),
    (re.compile(r"--"), r" -- "),
)
_CLOSING = (
    (re.compile(r"([»”’])"), r" \1 "),
    (re.compile(r"''"), " '' "),
    (re.compile(r'"'), " '' "),
    (re.compile(r"([^' ])('[sS]|'[mM]|'[dD]|') "), r"\1 \2 "),
    (re.compile(r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) "), r"\1 \2 "),
    (re.compile(r"(?i)\b(can)(not)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(d)('ye)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(gim)(me)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(gon)(na)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(got)(ta)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(lem)(me)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(more)('n)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(wan)(na)(?=\s)"), r" \1 \2 "),
    (re.compile(r"(?i) ('t)(is)\b"), r" \1 \2 "),
    (re.compile(r"(?i) ('t)(was)\b"), r" \1 \2 "),
)
_CONTRACTED = re.compile(r"\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b", re.IGNORECASE)
_SIMPLE = re.compile(r"(\w+(?:[-/]\w+)*)([.,:;!?]|'s)?")  # a word, and one mark that is a token of its own

_NON_WORD = r"[)\";}\]*:@'({\[?!]"
_RUN = r"-{2,}|\.{2,}|(?:\.\s){2,}\."
_END = re.compile(rf"[.?!](?=(?P<after>{_NON_WORD}|\s+(?P<next>\S+)))")
_PUNKT_WORD = re.compile(
    rf"{_RUN}|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|{_NON_WORD}|{_RUN}|,(?=$|\s|{_NON_WORD}|{_RUN}))|\S"
)
_REALIGN = re.compile(r"[\"')\]}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
_INITIAL = re.compile(r"[^\W\d]\.$")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.\-]*\.?$")
_PIECE = re.compile(r"(?:[^.?!]|\.(?=\w))*(?P<end>[?!]+|\.+)?")
_CLOSERS = "])}>\"'»”’"
QUOTES = "\"'"  # a sentence's first characters are read differently only when they are these


def normalise_caption(caption: str) -> str:
    """URL-unquote, ``+`` to space, drop tags, strip and collapse spaces, ftfy, lower-case, in the released order.

    A step whose characters do not occur is skipped: ftfy alone takes longer than all the rest of labelling.
    """
    text = unquote(caption) if "%" in caption else caption
    text = text.replace("+", " ")
    if "<" in text:
        text = _TAG.sub("", text)
    text = text.strip("\n")
    if "  " in text:
        text = _SPACES.sub(" ", text)
    if not (text.isascii() and text.isprintable()) or ("&" in text and ";" in text):
        text = ftfy.fix_text(text)
    return text.strip().lower()


def tokenise(text: str) -> list[str]:
    """NLTK 3.8.1's ``word_tokenize`` with Punkt's English model; ``text`` is lower-cased."""
    return list(chain.from_iterable(map(_words, _sentences(text))))


def _words(sentence: str) -> list[str]:
    """NLTK's improved Treebank tokeniser on one sentence."""
    for pattern, replacement in _OPENING:
        sentence = pattern.sub(replacement, sentence)
    sentence = f" {sentence} "
    for pattern, replacement in _CLOSING:
        sentence = pattern.sub(replacement, sentence)
    return sentence.split()


def _sentences(text: str) -> Iterator[str]:
    """Punkt's sentences; closing quotes and brackets belong to the sentence that they follow."""
    shift = 0
    for (start, stop), (next_start, next_stop) in pairwise([*_spans(text), (-1, -1)]):
        start += shift
        shift = 0
        if next_start >= 0 and (closing := _REALIGN.match(text[next_start:next_stop])):
            stop = next_start + len(closing[0].rstrip())
            shift = closing.end()
        if sentence := text[start:stop]:
            yield sentence


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for match, context in _candidates(text):
        if _is_break(context):
            yield start, match.end()
            start = match.start("next") if match["next"] else match.end()
    yield start, len(text.rstrip())


def _candidates(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each end character that may end a sentence, and the text from the word before it to the word after it."""
    candidate: re.Match[str] | None = None
    word_start = 0  # of the word before the candidate
    position = 0  # of the candidate
    for match in _END.finditer(text):
        before = text[position : match.start()]
        space = max(before.rfind(char) for char in string.whitespace)
        next_word_start = position + space + 1 if space > 0 else word_start
        if candidate and position <= next_word_start:
            yield candidate, text[word_start : candidate.end()] + candidate["after"]
        candidate = match
        word_start = next_word_start
        position = match.start()
    if candidate:
        yield candidate, text[word_start : candidate.end()] + candidate["after"]


def _is_break(context: str) -> bool:
    """Whether a token other than the last one ends a sentence."""
    tokens = chain.from_iterable(map(_PUNKT_WORD.findall, context.split("\n")))
    return any(_ends_sentence(token, after) for token, after in pairwise(tokens))


def _ends_sentence(token: str, after: str) -> bool:
    if token in ("?", "!"):
        return True
    if not token.endswith(".") or token.endswith(".."):
        return False
    word = token[:-1].lower()
    if word in ABBREVIATIONS or word.rpartition("-")[2] in ABBREVIATIONS:
        return False
    initial = _INITIAL.match(token)
    if initial or _NUMBER.match(token):  # "j. smith", "no. 5. oktober": the sentence goes on if the next word can
        continues = after[0].islower() and after.removesuffix(".") not in OPENERS
        return not (after in tuple(";:,.!?") or continues or (initial and after[0].isupper()))
    return True


def _pieces(text: str) -> list[list[str]] | None:
    """The text's sentences as pieces between spaces; None when a piece's tokens may depend on its neighbours."""
    if not text.isprintable() or "''" in text:  # in printable text the only white space is ' '
        return None
    pieces = text.split()
    if not pieces:
        return []
    sentences: list[list[str]] | None = [pieces]
    if -1 < text.find(".") < len(text) - 1 or "?" in text or "!" in text:
        sentences = _pieces_by_sentence(pieces)
    if sentences and len(sentences[0]) == 1 and pieces[0][0] in QUOTES:
        return None
    return sentences


def _pieces_by_sentence(pieces: list[str]) -> list[list[str]] | None:
    sentences = list[list[str]]()
    start = 0
    for stop, piece in enumerate(pieces, start=1):
        if piece.isalnum():
            continue
        match = _PIECE.fullmatch(piece)
        if not match:
            return None
        if match["end"] and stop < len(pieces) and _is_break(f"{piece} {pieces[stop]}"):
            if pieces[stop][0] in "\"')]}":  # may belong to this sentence
                return None
            sentences.append(pieces[start:stop])
            start = stop
    sentences.append(pieces[start:])
    return sentences if pieces[-1].strip(_CLOSERS) else None


class Memo(dict[str, T]):
    """A dict from argument to value of a function of a string; when it has `MEMO_LIMIT` entries it is emptied."""

    def __init__(self, function: Callable[[str], T]) -> None:
        self._function = function

    def __missing__(self, key: str) -> T:
        value = self._function(key)
        if len(key) <= MEMO_MAX_CHARS:
            if len(self) >= MEMO_LIMIT:
                self.clear()
            self[key] = value
        return value


class TokenMapper:
    """``[function(token) for token in tokenise(text)]`` without the Nones, memoised by the pieces between spaces."""

    def __init__(self, function: Callable[[str], str | None]) -> None:
        self._function = function
        self._first = Memo(self._map_first)
        self._inner = Memo(self._map_inner)
        self._last = Memo(self._map_last)

    def __call__(self, text: str) -> list[str]:
        """The values of the text's tokens, in order."""
        sentences = _pieces(text)
        if sentences is None:
            return list(self._values(tokenise(text)))
        values = list[str]()
        for pieces in sentences:
            last = pieces.pop()
            if pieces and pieces[0][0] in QUOTES:
                values += self._first[pieces.pop(0)]
            values += chain.from_iterable(map(self._inner.__getitem__, pieces))
            values += self._last[last]
        return values

    def _values(self, tokens: list[str]) -> tuple[str, ...]:
        return tuple(value for token in tokens if (value := self._function(token)) is not None)

    def _map_first(self, piece: str) -> tuple[str, ...]:
        return self._values(_words(f"{piece} x")[:-1])  # x stands for any neighbouring word

    def _map_inner(self, piece: str) -> tuple[str, ...]:
        if (simple := _SIMPLE.fullmatch(piece)) and not _CONTRACTED.search(piece):
            word, mark = simple.groups()
            return self._values([piece] if mark in (None, ".") else [word, mark])
        return self._values(_words(f"x {piece} x")[1:-1])

    def _map_last(self, piece: str) -> tuple[str, ...]:
        if (simple := _SIMPLE.fullmatch(piece)) and not _CONTRACTED.search(piece):
            word, mark = simple.groups()
            return self._values([word, mark] if mark else [word])
        return self._values(_words(f"x {piece}")[1:])
