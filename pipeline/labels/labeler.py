"""Caption to WNIDs: CatLIP's released rule (arXiv 2404.15653) and four options that depart from it.

The released rule: clean, tokenise, and try *every token* as a noun (the paper's part-of-speech tags are computed and
never used): lemmatise, take sense 1, keep it when the synset is named after that very lemma.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.labels.tokenizer import Memo, TokenMapper, normalise_caption
from pipeline.labels.wordnet import WORDNET_VERSION, WordNet, load_wordnet
from shards_spec.files import UserError
from shards_spec.messages import counted

Tagger = Callable[[list[str]], list[str]]
NLTK_TAGGER = "nltk"
FUNCTION_WORDS = (
    "above",
    "are",
    "being",
    "best",
    "can",
    "down",
    "few",
    "first",
    "free",
    "get",
    "here",
    "like",
    "may",
    "more",
    "no",
    "now",
    "one",
    "out",
    "over",
    "then",
    "there",
    "two",
    "use",
    "while",
    "why",
)
"""Words that say nothing about an image and yet get a synset by the released rule ("can" is a tin, "are" an area)."""


@dataclass(frozen=True)
class LabelRule:
    """How a caption becomes synsets; the default is what CatLIP's released code does.

    Labels made by different rules must not be mixed.
    """

    nouns_only: bool = False
    """keep only tokens that the tagger calls nouns (``NN…``): the paper's text, section 3.1"""
    tagger: str = NLTK_TAGGER
    """the tagger: NLTK's averaged perceptron, or ``module:function`` from a list of tokens to a list of Penn tags"""
    collocations: bool = False
    """nouns of several words, the longest first: "ice cream" is ice cream, and neither ice nor cream"""
    synonyms: bool = False
    """also synsets with another name than the word: "bike" is motorcycle.n.01, as WordNet has it"""
    stop_words: tuple[str, ...] = ()
    """tokens that get no synset, ascending"""

    @property
    def name(self) -> str:
        """The rule's name: ``catlip-released``, then ``+`` and each option that departs from it."""
        options = {
            f"nouns:{self.tagger}": self.nouns_only,
            "collocations": self.collocations,
            "synonyms": self.synonyms,
            "stop": bool(self.stop_words),
        }
        return "+".join(["catlip-released", *(option for option, is_set in options.items() if is_set)])

    def describe(self) -> dict[str, Any]:
        """What `pack`'s config and a vocabulary's header record: equal for equal rules only."""
        stop = {"stop_words": list(self.stop_words)} if self.stop_words else {}
        return {"wordnet": WORDNET_VERSION, "rule": self.name, **stop}


class Labeler:
    """Captions to WNIDs by one rule. Not thread-safe; a process needs one (`load_labeler`)."""

    def __init__(self, net: WordNet, rule: LabelRule = LabelRule(), tagger: Tagger | None = None) -> None:
        """``tagger`` maps a caption's tokens to as many Penn tags; by default the rule's, loaded when needed."""
        self._net = net
        self._rule = rule
        self._stop_words = frozenset(rule.stop_words)
        self._tagger = tagger or (load_tagger(rule.tagger) if rule.nouns_only else None)
        self._needs_context = rule.nouns_only or rule.collocations
        self._synset_memo = Memo(self.synset)
        self._map_tokens = TokenMapper(str if self._needs_context else self._synset_memo.__getitem__)
        self._max_tokens = _max_tokens(net) if rule.collocations else {}

    def synsets(self, caption: str) -> list[str]:
        """WNIDs in the order of the caption's words; a synset whose word occurs twice is there twice."""
        tokens_or_wnids = self._map_tokens(normalise_caption(caption))
        return self._synsets_in_context(tokens_or_wnids) if self._needs_context else tokens_or_wnids

    def synset(self, token: str) -> str | None:
        """WNID of one token, whatever its neighbours are, or None."""
        return None if token in self._stop_words else self._net.synset(token, self._rule.synonyms)

    def _synsets_in_context(self, tokens: list[str]) -> list[str]:
        nouns = self._are_nouns(tokens)
        wnids = list[str]()
        at = 0
        while at < len(tokens):
            length, wnid = self._collocation(tokens, nouns, at)
            if wnid is None and nouns[at]:
                wnid = self._synset_memo[tokens[at]]
            if wnid is not None:
                wnids.append(wnid)
            at += length
        return wnids

    def _are_nouns(self, tokens: list[str]) -> list[bool]:
        if not self._tagger or not tokens:
            return [True] * len(tokens)
        tags = self._tagger(tokens)
        if len(tags) != len(tokens):
            tagged, given = counted(len(tags), "tag"), counted(len(tokens), "token")
            raise UserError(f"tagger {self._rule.tagger} gives {tagged} for {given}: {tokens}")
        return [tag.startswith("NN") for tag in tags]

    def _collocation(self, tokens: list[str], nouns: list[bool], at: int) -> tuple[int, str | None]:
        """(number of tokens, WNID) of the longest noun of several words that begins here; (1, None) without one.

        Its last word is the noun. Only one that gives a label counts, so that this option never loses a label.
        """
        longest = min(self._max_tokens.get(tokens[at], 1), len(tokens) - at)
        for length in range(longest, 1, -1):
            if nouns[at + length - 1]:
                *before, last = tokens[at : at + length]
                stem = "_".join([*before, ""]).replace("_'", "'")  # WordNet has "bird's" as one word
                join = stem[:-1] if last.startswith("'") else stem
                wnid = self._synset_memo[join + last] or self._synset_memo[join + self._net.lemmatise(last)]
                if wnid is not None:
                    return length, wnid
        return 1, None


def _max_tokens(net: WordNet) -> dict[str, int]:
    """First token of nouns of several words to the number of tokens of the longest such noun."""
    longest = dict[str, int]()
    for lemma in net.first_sense:
        if "_" in lemma:
            tokens = lemma.replace("'", "_'").split("_")
            longest[tokens[0]] = max(len(tokens), longest.get(tokens[0], 0))
    return longest


def load_tagger(name: str = NLTK_TAGGER) -> Tagger:
    """The tagger that a rule names. Raises UserError that says what to do when it or its data are absent."""
    if name != NLTK_TAGGER:
        module, _, function = name.partition(":")
        try:
            tagger: Tagger = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--tagger {name!r}: {error}; it must be 'nltk' or MODULE:FUNCTION") from error
        return tagger
    from nltk.tag import PerceptronTagger

    try:
        perceptron = PerceptronTagger()
    except LookupError as error:
        raise UserError(
            "--nouns-only needs the data of NLTK's tagger: python -m nltk.downloader averaged_perceptron_tagger_eng "
            "(NLTK 3.8: averaged_perceptron_tagger), or --tagger MODULE:FUNCTION"
        ) from error
    return lambda tokens: [tag for _, tag in perceptron.tag(tokens)]


@lru_cache(maxsize=2)
def load_labeler(wordnet: str | None = None, rule: LabelRule = LabelRule()) -> Labeler:
    """One labeler per process, rule and WordNet folder. Raises UserError when a part of it is absent."""
    return Labeler(load_wordnet(wordnet), rule)
