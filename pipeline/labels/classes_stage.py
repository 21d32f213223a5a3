"""Stage `classes`: class names to synsets of a vocabulary, for CatLIP's Transfer Init (arXiv 2404.15653, section 4.2).

The paper names path similarity and copied, averaged or random rows; threshold, ties and order are readings, see
`map_class`. It needs WordNet, so it is here, and the recipes `probe` and `finetune` read the file that it writes.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.labels.wordnet import WORDNET_VERSION, WordNet, load_hypernyms, load_wordnet
from shards_spec.class_map import ClassMap, ClassRow
from shards_spec.class_names import read_lines
from shards_spec.files import UserError
from shards_spec.names import is_ignored
from shards_spec.vocab import Vocabulary, read_vocabulary

log = logging.getLogger(__name__)
WNID = re.compile(r"n[0-9]{1,8}")
PLACES = re.compile(r"/?[a-z]/(?=[a-z])")  # "/a/airfield": Places365 puts a letter's folder in front


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
    """path similarity that the nearest synset must have at least; 1 takes exact ones alone"""
    wordnet: str | None = None
    """folder with WordNet 3.0; by default NLTK's or Debian's"""

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha}: must be in (0, 1]")


def classes(config: ClassesConfig) -> ClassMap:
    """Write the class map and return it. Raises UserError and DataError."""
    vocabulary = read_vocabulary(config.vocabulary)
    if vocabulary.header.get("wordnet") != WORDNET_VERSION:
        raise UserError(f"{config.vocabulary} is of WordNet {vocabulary.header.get('wordnet')}, not {WORDNET_VERSION}")
    found = map_classes(read_names(config.classes), vocabulary, config.alpha, config.wordnet)
    found.write(config.out)
    log.info("%s: %s", config.out, found.summary)
    if found.unmapped:
        log.warning("no synset for %s%s", ", ".join(found.unmapped[:20]), " ..." if len(found.unmapped) > 20 else "")
    return found


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
    net, nearest = load_wordnet(wordnet), Nearest(vocabulary.index, load_hypernyms(wordnet))
    rows = tuple(map_class(name, net, nearest, vocabulary.index, alpha) for name in names)
    header = {"vocabulary_sha256": vocabulary.sha256, "wordnet": WORDNET_VERSION, "alpha": alpha}
    return ClassMap(rows, header)


def map_class(name: str, net: WordNet, nearest: "Nearest", index: dict[str, int], alpha: float) -> ClassRow:
    """One class: its own synset, the mean of its words', the nearest one of at least ``alpha``, or none.

    A WNID is its synset. A name of several words is looked up as one noun of WordNet, then word by word by the rule of
    captions, where all of them must be in the vocabulary. Only a class whose synset is known has a nearest one.
    """
    own, words = _look_up(name, net)
    if own in index:
        return ClassRow(name, "exact", (own,), (net.heads[own],), 1.0)
    parts = [net.synset(word) for word in words]
    known = tuple(dict.fromkeys(part for part in parts if part in index))
    if len(words) > 1 and all(part in index for part in parts):
        return ClassRow(name, "mean", known, tuple(net.heads[wnid] for wnid in known))
    if own is not None and (best := nearest.of(own)) and best[1] >= alpha:
        return ClassRow(name, "nearest", (best[0],), (net.heads[best[0]],), best[1])
    return ClassRow(name, "none")


def _look_up(name: str, net: WordNet) -> tuple[str | None, list[str]]:
    """A class's synset, if it has one, and its words."""
    if WNID.fullmatch(name):
        wnid = f"n{int(name[1:]):08d}"
        return (wnid if wnid in net.heads else None), []
    words = re.split(r"[_/\s]+", PLACES.sub("", name.strip().lower(), count=1).strip("/_ "))
    if len(words) == 1:
        return net.synset(words[0]), words
    return net.synset("_".join(words), synonyms=True), words


class Nearest:
    """The synset of a vocabulary of highest path similarity, which is 1 / (1 + steps up and down the hypernyms)."""

    def __init__(self, index: dict[str, int], hypernyms: dict[str, tuple[str, ...]]) -> None:
        self.index, self.hypernyms = index, hypernyms
        self.below: dict[str, tuple[int, int, str]] = {}  # synset: steps, rank and WNID of the first in V below it
        for wnid, rank in index.items():
            for above, steps in self.above(wnid).items():
                found = (steps, rank, wnid)
                self.below[above] = min(found, self.below.get(above, found))

    def above(self, wnid: str) -> dict[str, int]:
        """The synset itself and all above it, with the fewest steps to each."""
        steps, ring = {wnid: 0}, [wnid]
        while ring:
            ring = [up for low in ring for up in self.hypernyms.get(low, ()) if up not in steps]
            depth = max(steps.values()) + 1
            steps |= dict.fromkeys(ring, depth)
        return steps

    def of(self, wnid: str) -> tuple[str, float] | None:
        """WNID and similarity; of several the one that is above ``wnid``, then the first of the vocabulary."""
        above = self.above(wnid)
        found = []
        for node, up in above.items():
            if node in self.below:
                down, rank, other = self.below[node]
                found.append((up + down, other not in above, rank, other))
        if not found:
            return None
        steps, _, _, best = min(found)
        return best, 1 / (1 + steps)
