"""Caption to WordNet noun synsets by CatLIP's released rule (arXiv 2404.15653; its code pins NLTK 3.8.1).

The rule: clean, tokenise, and try *every token* as a noun (the paper's part-of-speech tags are computed and never
used): lemmatise, take sense 1, keep it when the synset is named after that very lemma. WordNet 3.0's files are parsed
directly, which takes half the time and memory of NLTK's reader and needs none of its data packages.
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import ftfy
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer

from shards_spec.files import UserError

log = logging.getLogger(__name__)
RULE = "catlip-released"
WORDNET_VERSION = "3.0"
PROBE = ("dog", "n02084071")  # WordNet 3.1 has another offset
SUFFIXES = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
    ("ies", "y"),
)  # fmt: skip
PLACES = ("/usr/share/wordnet", "/usr/share/wordnet-3.0/dict", "/usr/local/WordNet-3.0/dict")
MEMO_LIMIT = 1_000_000  # tokens; web captions have long tails


@dataclass
class WordNet:
    """Noun side of WordNet 3.0. ``first_sense``: lemma to WNID of sense 1; ``heads``: WNID to its first lemma."""

    first_sense: dict[str, str]
    heads: dict[str, str]
    exceptions: dict[str, list[str]]
    memo: dict[str, str | None] = field(default_factory=dict)

    def lemmatise(self, token: str) -> str:
        """NLTK 3.8.1's ``WordNetLemmatizer().lemmatize(token)``: shortest known form, first on ties, else itself."""
        if token in self.exceptions:
            found = self._known([token, *self.exceptions[token]])
        else:
            forms = _strip([token])
            found = self._known([token, *forms])
            while forms and not found:
                forms = _strip(forms)
                found = self._known(forms)
        return min(found, key=len) if found else token

    def _known(self, forms: list[str]) -> list[str]:
        return [form for form in forms if form in self.first_sense]

    def synset(self, token: str) -> str | None:
        """WNID of a token, or None: its lemma must be the first name of the lemma's first sense."""
        if token in self.memo:
            return self.memo[token]
        lemma = self.lemmatise(token)
        wnid = self.first_sense.get(lemma)
        if wnid is not None and self.heads[wnid].lower() != lemma:
            wnid = None
        if len(self.memo) < MEMO_LIMIT:
            self.memo[token] = wnid
        return wnid

    def synsets(self, caption: str) -> list[str]:
        """WNIDs in the order of the caption's words; a synset named twice is there twice."""
        found = (self.synset(token) for token in tokenise(clean(caption)))
        return [wnid for wnid in found if wnid is not None]


def _strip(forms: Iterable[str]) -> list[str]:
    return [form[: -len(old)] + new for form in forms for old, new in SUFFIXES if form.endswith(old)]


def clean(caption: str) -> str:
    """URL-unquote, ``+`` to space, drop tags, strip and collapse spaces, ftfy, lower-case, in the released order."""
    text = unquote(caption).replace("+", " ")
    text = re.sub(r"<.*?>", "", text).strip("\n")
    text = re.sub(r" +", " ", text)
    return ftfy.fix_text(text).strip().lower()


@lru_cache(maxsize=1)
def _tokenisers() -> tuple[PunktSentenceTokenizer, NLTKWordTokenizer]:
    return PunktSentenceTokenizer(), NLTKWordTokenizer()


def tokenise(text: str) -> list[str]:
    """NLTK's ``word_tokenize``, with the untrained Punkt, which needs no data download."""
    sentences, words = _tokenisers()
    return [token for sentence in sentences.tokenize(text) for token in words.tokenize(sentence)]


def find_wordnet(folder: str | None = None) -> Path:
    """The folder with ``index.noun``: the one given, NLTK's data, or Debian's.

    Raises UserError that says how to get it.
    """
    nltk_roots = [*os.environ.get("NLTK_DATA", "").split(os.pathsep), "~/nltk_data", "/usr/share/nltk_data"]
    nltk_places = [os.path.join(root, "corpora", "wordnet") for root in nltk_roots if root]
    for place in [folder] if folder else [*nltk_places, *PLACES]:
        path = Path(place).expanduser()
        if all((path / name).is_file() for name in ("index.noun", "data.noun", "noun.exc")):
            return path
    raise UserError(
        f"WordNet 3.0 is not in {folder or 'any usual place'}: apt-get install wordnet-base, or "
        "python -m nltk.downloader wordnet (and unzip it), or --wordnet DIR with index.noun, data.noun, noun.exc"
    )


@lru_cache(maxsize=2)
def load_wordnet(folder: str | None = None) -> WordNet:
    """Parse the noun files once per process. Raises UserError when they are absent or not WordNet 3.0."""
    path = find_wordnet(folder)
    heads = {}
    for fields in _lines(path / "data.noun"):
        heads[f"n{fields[0]}"] = fields[4]
    first_sense = {}
    for fields in _lines(path / "index.noun"):
        first_sense[fields[0]] = f"n{fields[4 + int(fields[3]) + 2]}"
    exceptions: dict[str, list[str]] = {}
    for line in (path / "noun.exc").read_text().splitlines():
        form, *lemmas = line.split()
        exceptions[form] = lemmas
    if first_sense.get(PROBE[0]) != PROBE[1]:
        raise UserError(
            f"{path} is not WordNet 3.0: {PROBE[0]} is {first_sense.get(PROBE[0])}, expected {PROBE[1]}; WNIDs of "
            "other versions do not match ImageNet's. Give --wordnet a folder of version 3.0"
        )
    return WordNet(first_sense, heads, exceptions)


def _lines(path: Path) -> Iterable[list[str]]:
    with open(path, encoding="latin-1") as file:
        for line in file:
            if not line.startswith("  "):  # the licence
                yield line.split()
