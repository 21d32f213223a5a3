"""Stage `classes`: class names to synsets of a vocabulary, for CatLIP's Transfer Init (arXiv 2404.15653, section 4.2).

The paper names path similarity, and rows that are copied, averaged or random; the threshold, ties and the order of the
attempts are our reading of it, see `map_class`. The recipes `probe` and `finetune` read the file that is written here.
"""

import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.labels.wordnet import WORDNET_VERSION, WordNet, load_hypernyms, load_wordnet
from shards_spec.class_map import ClassMap, ClassRow
from shards_spec.class_names import read_lines
from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.names import is_ignored
from shards_spec.vocab import Vocabulary, read_vocabulary

WNID = re.compile(r"n[0-9]{1,8}")
PLACES365_PREFIX = re.compile(r"/?[a-z]/(?=[a-z])")  # "/a/airfield": a folder per letter comes first


@dataclass(frozen=True)
class ClassesConfig:
    """Map class names to synsets of a vocabulary, for a classifier to start from."""

    classes: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAMES")]
    """file with a class name or a WNID per line, or a folder of class folders"""
    vocabulary: str
    """TSV of the pre-trained model: RUN/vocabulary.tsv"""
    out: str
    """class map to write, a TSV"""
    alpha: float = 0.2
    """least path similarity of the nearest synset; 1: only exact matches"""
    wordnet: str | None = None
    """folder with WordNet 3.0; by default NLTK's or Debian's"""

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, "alpha", self.alpha, "in (0, 1]")


def classes(config: ClassesConfig) -> ClassMap:
    """Write the class map and return it. Raises UserError and DataError."""
    vocabulary = read_vocabulary(config.vocabulary)
    if vocabulary.header.get("wordnet") != WORDNET_VERSION:
        raise UserError(f"{config.vocabulary} is of WordNet {vocabulary.header.get('wordnet')}, not {WORDNET_VERSION}")
    class_map = map_classes(read_names(config.classes), vocabulary, config.alpha, config.wordnet)
    class_map.write(config.out)
    return class_map


def read_names(path: str) -> list[str]:
    """Lines of a file, or names of the folders in a folder, ascending. Raises UserError when there is none."""
    if not Path(path).is_dir():
        return [name for name in read_lines(path, "one class name per line") if name]
    names = sorted(entry.name for entry in Path(path).iterdir() if entry.is_dir() and not is_ignored(entry.name))
    if not names:
        raise UserError(f"{path} holds no class folder")
    return names


def map_classes(names: list[str], vocabulary: Vocabulary, alpha: float, wordnet: str | None = None) -> ClassMap:
    """The class map of a list of names or WNIDs."""
    net = load_wordnet(wordnet)
    nearest = NearestSynset(vocabulary.index, load_hypernyms(wordnet))
    rows = tuple(map_class(name, net, nearest, vocabulary.index, alpha) for name in names)
    header = {"vocabulary_sha256": vocabulary.sha256, "wordnet": WORDNET_VERSION, "alpha": alpha}
    return ClassMap(rows, header)


def map_class(name: str, net: WordNet, nearest: "NearestSynset", index: dict[str, int], alpha: float) -> ClassRow:
    """Map one class: to its own synset, to its words' synsets, to the nearest one of at least ``alpha``, or to none.

    A WNID is its own synset. A name of several words is looked up as one noun of WordNet, then word by word by the
    rule of captions; then all of them must be in the vocabulary. Only a class with its own synset has a nearest one.
    """
    wnid, words = _look_up(name, net)
    if wnid in index:
        return ClassRow(name, "exact", (wnid,), (net.heads[wnid],), 1.0)
    word_wnids = [net.synset(word) for word in words]
    if len(words) > 1 and all(word_wnid in index for word_wnid in word_wnids):
        distinct = tuple(dict.fromkeys(word_wnid for word_wnid in word_wnids if word_wnid is not None))
        return ClassRow(name, "mean", distinct, tuple(net.heads[word_wnid] for word_wnid in distinct))
    best = nearest.find(wnid) if wnid is not None else None
    if best is not None and best[1] >= alpha:
        nearest_wnid, similarity = best
        return ClassRow(name, "nearest", (nearest_wnid,), (net.heads[nearest_wnid],), similarity)
    return ClassRow(name, "none")


def _look_up(name: str, net: WordNet) -> tuple[str | None, list[str]]:
    """A class's synset, if it has one, and its words."""
    if WNID.fullmatch(name):
        wnid = f"n{int(name[1:]):08d}"
        return (wnid if wnid in net.heads else None), []
    words = re.split(r"[_/\s]+", PLACES365_PREFIX.sub("", name.strip().lower(), count=1).strip("/_ "))
    if len(words) == 1:
        return net.synset(words[0]), words
    return net.synset("_".join(words), synonyms=True), words


class NearestSynset:
    """Finds the synset of a vocabulary with the highest path similarity.

    Path similarity is 1 / (1 + steps), of the fewest steps up and down the hypernyms from one synset to the other.
    """

    def __init__(self, index: dict[str, int], hypernyms: dict[str, tuple[str, ...]]) -> None:
        """``index`` maps the vocabulary's WNIDs to their ranks; ``hypernyms`` is of `load_hypernyms`."""
        self._hypernyms = hypernyms
        self.closest_below: dict[str, tuple[int, int, str]] = {}  # synset to steps, rank and WNID in the vocabulary
        for wnid, rank in index.items():
            for ancestor, steps in self.ancestors(wnid).items():
                candidate = (steps, rank, wnid)
                self.closest_below[ancestor] = min(candidate, self.closest_below.get(ancestor, candidate))

    def ancestors(self, wnid: str) -> dict[str, int]:
        """The synset itself and all above it, with the fewest steps to each."""
        steps = {wnid: 0}
        level = [wnid]
        while level:
            parents = chain.from_iterable(self._hypernyms.get(child, ()) for child in level)
            level = [parent for parent in parents if parent not in steps]
            steps |= dict.fromkeys(level, max(steps.values()) + 1)
        return steps

    def find(self, wnid: str) -> tuple[str, float] | None:
        """WNID and similarity of the nearest synset, None when there is none.

        Of several equally near ones it is one above ``wnid``, then the first of the vocabulary.
        """
        ancestors = self.ancestors(wnid)
        candidates = list[tuple[int, bool, int, str]]()
        for ancestor, up in ancestors.items():
            if ancestor in self.closest_below:
                down, rank, other = self.closest_below[ancestor]
                candidates.append((up + down, other not in ancestors, rank, other))
        if not candidates:
            return None
        steps, _, _, best = min(candidates)
        return best, 1 / (1 + steps)
