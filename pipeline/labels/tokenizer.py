"""Caption to tokens as CatLIP's released code makes them: `clean`, then NLTK 3.8.1's ``word_tokenize`` (it pins that).

The rules are kept here and not called from NLTK because NLTK's changed: 3.10 splits ``'dog'`` where 3.8.1 does not, and
labels shall be the same on every machine. The regular expressions are NLTK's (``nltk/tokenize/destructive.py``,
``punkt.py``, Apache-2.0), for lower-cased text; what Punkt's English model has learnt about such text is
`pipeline/labels/punkt_english.py`: "col. sanders" is one sentence, so "col." is no colonel, and "ph.d. students" have
a label.

Twenty substitutions over every caption would be all of the time. Apart from quotes and full stops they do not look
across a space, so `Reader` splits at spaces and remembers what each piece comes to; a caption for which that is not
certain goes the long way, so that both ways give the same tokens always.
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
MEMO_LIMIT = 1 << 18  # entries, about 40 MB; web captions have long tails
MEMO_LONGEST = 64  # characters; longer ones are addresses and do not come again

_TAG, _SPACES = re.compile(r"<.*?>"), re.compile(r" +")

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
_INITIAL, _NUMBER = re.compile(r"[^\W\d]\.$"), re.compile(r"-?[.,]?\d[\d,.\-]*\.?$")
_PIECE = re.compile(r"(?:[^.?!]|\.(?=\w))*(?P<end>[?!]+|\.+)?")
_CLOSERS = "])}>\"'»”’"
QUOTES = "\"'"  # a sentence's first characters are read differently only when they are these


def clean(caption: str) -> str:
    """URL-unquote, ``+`` to space, drop tags, strip and collapse spaces, ftfy, lower-case, in the released order.

    A step whose characters do not occur is left out; ftfy alone takes longer than all of the rest of labelling.
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
    return [token for sentence in _sentences(text) for token in _words(sentence)]


def _words(sentence: str) -> list[str]:
    """NLTK's improved Treebank tokeniser on one sentence."""
    for pattern, replacement in _OPENING:
        sentence = pattern.sub(replacement, sentence)
    sentence = f" {sentence} "
    for pattern, replacement in _CLOSING:
        sentence = pattern.sub(replacement, sentence)
    return sentence.split()


def _sentences(text: str) -> Iterator[str]:
    """Punkt's sentences, closing quotes and brackets with the sentence that they follow."""
    shift = 0
    for (start, stop), (next_start, next_stop) in pairwise([*_spans(text), (-1, -1)]):
        start += shift
        shift = 0
        if next_start >= 0 and (closing := _REALIGN.match(text[next_start:next_stop])):
            stop, shift = next_start + len(closing[0].rstrip()), closing.end()
        if closing_or_text := text[start:stop]:
            yield closing_or_text


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for match, context in _candidates(text):
        if _is_break(context):
            yield start, match.end()
            start = match.start("next") if match["next"] else match.end()
    yield start, len(text.rstrip())


def _candidates(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each end character that may end a sentence, and the text from the word before it to the word after it."""
    last, word, at = None, 0, 0  # the candidate, where its word begins, where it stands
    for match in _END.finditer(text):
        before = text[at : match.start()]
        space = max(before.rfind(char) for char in string.whitespace)
        begin = at + space + 1 if space > 0 else word
        if last and at <= begin:
            yield last, text[word : last.end()] + last["after"]
        last, word, at = match, begin, match.start()
    if last:
        yield last, text[word : last.end()] + last["after"]


def _is_break(context: str) -> bool:
    """Whether a token that others follow ends a sentence."""
    tokens = [token for line in context.split("\n") for token in _PUNKT_WORD.findall(line)]
    return any(_ends(token, after) for token, after in pairwise(tokens))


def _ends(token: str, after: str) -> bool:
    if token in ("?", "!"):
        return True
    if not token.endswith(".") or token.endswith(".."):
        return False
    word = token[:-1].lower()
    if word in ABBREVIATIONS or word.rpartition("-")[2] in ABBREVIATIONS:
        return False
    initial = _INITIAL.match(token)
    if initial or _NUMBER.match(token):  # "j. smith", "no. 5. oktober": only what cannot go on a sentence starts one
        goes_on = after[0].islower() and after.removesuffix(".") not in OPENERS
        return not (after in tuple(";:,.!?") or goes_on or (initial and after[0].isupper()))
    return True


def _pieces(text: str) -> list[list[str]] | None:
    """The text's sentences as pieces between spaces; None when a piece's tokens may depend on its neighbours."""
    if not text.isprintable() or "''" in text:  # the only printable white space is ' '
        return None
    pieces = text.split()
    if not pieces:
        return []
    sentences: list[list[str]] | None = [pieces]
    if -1 < text.find(".") < len(text) - 1 or "?" in text or "!" in text:
        sentences = _pieces_by_sentence(pieces)
    return None if sentences and len(sentences[0]) == 1 and pieces[0][0] in QUOTES else sentences


def _pieces_by_sentence(pieces: list[str]) -> list[list[str]] | None:
    sentences, start = [], 0
    for at, piece in enumerate(pieces, start=1):
        if piece.isalnum():
            continue
        shape = _PIECE.fullmatch(piece)
        if not shape:
            return None
        if shape["end"] and at < len(pieces) and _is_break(f"{piece} {pieces[at]}"):
            if pieces[at][0] in "\"')]}":  # may belong to this sentence
                return None
            sentences.append(pieces[start:at])
            start = at
    sentences.append(pieces[start:])
    return sentences if pieces[-1].strip(_CLOSERS) else None


class Memo(dict[str, T]):
    """A function of a string that remembers its values, at most `MEMO_LIMIT`: a full one starts again."""

    def __init__(self, function: Callable[[str], T]) -> None:
        self._function = function

    def __missing__(self, key: str) -> T:
        value = self._function(key)
        if len(key) <= MEMO_LONGEST:
            if len(self) >= MEMO_LIMIT:
                self.clear()
            self[key] = value
        return value


class Reader:
    """``[of_token(t) for t in tokenise(text)]`` without the Nones, memoised by the pieces between spaces."""

    def __init__(self, of_token: Callable[[str], str | None]) -> None:
        self._of_token = of_token
        self._first, self._inner, self._last = Memo(self._read_first), Memo(self._read_inner), Memo(self._read_last)

    def __call__(self, text: str) -> list[str]:
        """What the text's tokens come to, in order."""
        sentences = _pieces(text)
        if sentences is None:
            return list(self._values(tokenise(text)))
        found = list[str]()
        for pieces in sentences:
            last = pieces.pop()
            if pieces and pieces[0][0] in QUOTES:
                found += self._first[pieces.pop(0)]
            found += chain.from_iterable(map(self._inner.__getitem__, pieces))
            found += self._last[last]
        return found

    def _values(self, tokens: list[str]) -> tuple[str, ...]:
        return tuple(value for token in tokens if (value := self._of_token(token)) is not None)

    def _read_first(self, piece: str) -> tuple[str, ...]:
        return self._values(_words(f"{piece} x")[:-1])  # x stands for any word beside it

    def _read_inner(self, piece: str) -> tuple[str, ...]:
        if (simple := _SIMPLE.fullmatch(piece)) and not _CONTRACTED.search(piece):
            word, mark = simple.groups()
            return self._values([piece] if mark in (None, ".") else [word, mark])
        return self._values(_words(f"x {piece} x")[1:-1])

    def _read_last(self, piece: str) -> tuple[str, ...]:
        if (simple := _SIMPLE.fullmatch(piece)) and not _CONTRACTED.search(piece):
            word, mark = simple.groups()
            return self._values([word, mark] if mark else [word])
        return self._values(_words(f"x {piece}")[1:])
