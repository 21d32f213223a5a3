"""Caption to WNIDs: CatLIP's released rule (arXiv 2404.15653) and four named ways to depart from it.

The released rule: clean, tokenise, and try *every token* as a noun (the paper's part-of-speech tags are computed and
never used): lemmatise, take sense 1, keep it when the synset is named after that very lemma.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.labels.tokenizer import Memo, Reader, clean
from pipeline.labels.wordnet import WORDNET_VERSION, WordNet, load_wordnet
from shards_spec.files import UserError

Tagger = Callable[[list[str]], list[str]]
NLTK_TAGGER = "nltk"
FUNCTION_WORDS = (
    "above", "are", "being", "best", "can", "down", "few", "first", "free", "get", "here", "like", "may", "more", "no",
    "now", "one", "out", "over", "then", "there", "two", "use", "while", "why",
)  # fmt: skip
"""Words that say nothing about an image and pass the released rule all the same ("can" is a tin, "are" an area)."""


@dataclass(frozen=True)
class LabelRule:
    """How a caption becomes synsets; the default is what CatLIP's released code does. Labels of two rules don't mix."""

    nouns_only: bool = False
    """keep only tokens that the tagger calls nouns (``NN…``): the paper's text, section 3.1"""
    tagger: str = NLTK_TAGGER
    """what tags: NLTK's averaged perceptron, or ``module:function`` from a list of tokens to a list of Penn tags"""
    collocations: bool = False
    """nouns of several words, the longest first: "ice cream" is ice cream and neither ice nor cream"""
    synonyms: bool = False
    """no check of the name: "bike" is motorcycle.n.01, as WordNet has it"""
    stop_words: tuple[str, ...] = ()
    """tokens that are never tried, ascending"""

    @property
    def name(self) -> str:
        """The rule in a word: ``catlip-released``, then what departs from it."""
        parts = {
            f"nouns:{self.tagger}": self.nouns_only, "collocations": self.collocations, "synonyms": self.synonyms,
            "stop": bool(self.stop_words),
        }  # fmt: skip
        return "+".join(["catlip-released", *(part for part, on in parts.items() if on)])

    def describe(self) -> dict[str, Any]:
        """What `pack`'s config and a vocabulary's header say of it: equal for equal rules only."""
        stop = {"stop_words": list(self.stop_words)} if self.stop_words else {}
        return {"wordnet": WORDNET_VERSION, "rule": self.name, **stop}


class Labeller:
    """Captions to WNIDs by one rule. Not for several threads; a process needs one (`load_labeller`)."""

    def __init__(self, net: WordNet, rule: LabelRule = LabelRule(), tagger: Tagger | None = None) -> None:
        """``tagger`` maps a caption's tokens to as many Penn tags; without it the rule's is loaded when needed."""
        self._net, self._rule, self._stop = net, rule, frozenset(rule.stop_words)
        self._tagger = tagger or (load_tagger(rule.tagger) if rule.nouns_only else None)
        self._in_context = rule.nouns_only or rule.collocations
        self._memo = Memo(self.synset)
        self._read = Reader(str if self._in_context else self._memo.__getitem__)
        self._longest = _longest(net) if rule.collocations else {}

    def synsets(self, caption: str) -> list[str]:
        """WNIDs in the order of the caption's words; a synset named twice is there twice."""
        found = self._read(clean(caption))
        return self._of_tokens(found) if self._in_context else found

    def synset(self, token: str) -> str | None:
        """WNID of one token, whatever stands beside it, or None."""
        return None if token in self._stop else self._net.synset(token, self._rule.synonyms)

    def _of_tokens(self, tokens: list[str]) -> list[str]:
        nouns = self._nouns(tokens)
        found, at = list[str](), 0
        while at < len(tokens):
            length, wnid = self._collocation(tokens, nouns, at)
            if wnid is None and nouns[at]:
                wnid = self._memo[tokens[at]]
            if wnid is not None:
                found.append(wnid)
            at += length
        return found

    def _nouns(self, tokens: list[str]) -> list[bool]:
        if not self._tagger or not tokens:
            return [True] * len(tokens)
        tags = self._tagger(tokens)
        if len(tags) != len(tokens):
            raise UserError(f"tagger {self._rule.tagger} gives {len(tags)} tags for {len(tokens)} tokens: {tokens}")
        return [tag.startswith("NN") for tag in tags]

    def _collocation(self, tokens: list[str], nouns: list[bool], at: int) -> tuple[int, str | None]:
        """(number of tokens, WNID) of the longest noun of several words that begins here; (1, None) without one.

        Its last word is the noun. Only one that gives a label counts, so that this option never costs a label.
        """
        words = min(self._longest.get(tokens[at], 1), len(tokens) - at)
        for length in range(words, 1, -1):
            if nouns[at + length - 1]:
                *before, last = tokens[at : at + length]
                stem = "_".join([*before, ""]).replace("_'", "'")  # "bird", "'s" is one word there
                join = stem[:-1] if last.startswith("'") else stem
                wnid = self._memo[join + last] or self._memo[join + self._net.lemmatise(last)]
                if wnid is not None:
                    return length, wnid
        return 1, None


def _longest(net: WordNet) -> dict[str, int]:
    """First token of nouns of several words to the most tokens that such a noun has."""
    longest = dict[str, int]()
    for lemma in net.first_sense:
        if "_" in lemma:
            words = lemma.replace("'", "_'").split("_")
            longest[words[0]] = max(len(words), longest.get(words[0], 0))
    return longest


def load_tagger(name: str = NLTK_TAGGER) -> Tagger:
    """The tagger a rule names. Raises UserError with the mend when it or its data are absent."""
    if name != NLTK_TAGGER:
        module, _, function = name.partition(":")
        try:
            found: Tagger = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"tagger {name!r}: {error}; it must be 'nltk' or MODULE:FUNCTION") from error
        return found
    from nltk.tag import PerceptronTagger

    try:
        tagger = PerceptronTagger()
    except LookupError as error:
        raise UserError(
            "nouns only needs the data of NLTK's tagger: python -m nltk.downloader averaged_perceptron_tagger_eng "
            "(NLTK 3.8: averaged_perceptron_tagger), or --tagger MODULE:FUNCTION"
        ) from error
    return lambda tokens: [tag for _, tag in tagger.tag(tokens)]


@lru_cache(maxsize=2)
def load_labeller(wordnet: str | None = None, rule: LabelRule = LabelRule()) -> Labeller:
    """One labeller per process, rule and WordNet folder. Raises UserError when a part of it is absent."""
    return Labeller(load_wordnet(wordnet), rule)
