#!/usr/bin/env python3
"""Labels: captions/s on one core against the released way of CatLIP, and the share of captions with the same labels.

    python tests/bench/labels.py [--captions 100000] [--reference 4000] [--seed 0] [--wordnet DIR]
    pip install --no-deps --target /tmp/nltk381 nltk==3.8.1      # the version that the released code pins
    PYTHONPATH=/tmp/nltk381 python tests/bench/labels.py

The released way: every cleaning step on every caption, NLTK's ``word_tokenize``, its WordNet lemmatiser and reader, and
a look-up in a list of 24,320 keys, most frequent first (``in``, then ``index``). Its part-of-speech tags, which it
computes and never uses, are left out, so the ratio is on the low side. NLTK reads a temporary copy of the WordNet
folder, to which lexnames (and index.sense, empty: only other languages need it) are added. Without the data of Punkt
the untrained one with the English abbreviations takes its place.

**The captions are made up**: words of WordNet by their frequency in its tagged texts, in the forms of web captions
(titles, possessives, numbers, quotes, entities, addresses, shares as in ``FORMS``); and the demo's own. CPU seconds, so
that other work on the machine does not count. Cold is the first pass, warm the second one over the same captions.
"""

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import ftfy
import nltk

from pipeline.labels.labeler import Labeler
from pipeline.labels.punkt_english import ABBREVIATIONS
from pipeline.labels.tokenizer import tokenise
from pipeline.labels.wordnet import WordNet, find_wordnet, load_wordnet
from shards_spec.vocab import Vocabulary

ROOT = Path(__file__).parents[2]
KEYS = 24_320  # of DataComp's vocabulary
NOUN_KINDS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
VERB_KINDS = (
    "body change cognition communication competition consumption contact creation emotion motion perception possession "
    "social stative weather"
)
PATTERNS = (
    "a {a} {n} on the {n}",
    "{n} and {N} in {a} {n}",
    "{N} {N} {n} for {n}s",
    "the {n}'s {a} {n}",
    "{d} {n}s with a {n}",
    "{N} {N}, {N} {d}",
    "{a}-{n} {n} of the {n}",
    "{n} {v}ing a {n} in front of the {n}",
    "{a} {a} {n} {v}s",
    "person , the {n} , {v}s at the {n}",
    "vector {n} of a {a} {n} isolated on white background",
    "{N} in {N} by {N}",
)
FORMS = (  # share of captions, what is done to them
    (0.20, "{} ."),
    (0.20, "{}."),
    (0.12, "{}. {}."),
    (0.08, "{} - {}"),
    (0.06, "{} | {}"),
    (0.05, "{} ({n})"),
    (0.04, "{}: {}"),
    (0.03, "{}!"),
    (0.03, '"{n}" {}'),
    (0.02, "{} 'the {n}'"),
    (0.02, "{}..."),
    (0.02, "{} &amp; {n}"),
    (0.02, "{} – {n}s’ café"),
    (0.01, "{}—{n}"),
    (0.01, "www.{n}.com {}"),
    (0.01, "<b>{}</b> {n}"),
    (0.01, "{n}+{n}%20{n}"),
    (0.01, "{} don't, can't or won't {n}?"),
    (0.01, "Dr. J. Smith, St. {N}, U.S. {}"),
    (0.01, "{}, $3.50 / 10:30 {n}s"),
    (0.04, "{}"),
)


def nltk_folder(source: Path, root: Path) -> None:
    """WordNet as NLTK's reader wants it below ``root``, which becomes NLTK's only data folder of WordNet."""
    folder = root / "corpora" / "wordnet"
    shutil.copytree(source, folder)
    kinds = ["adj.all", "adj.pert", "adv.all", *(f"noun.{kind}" for kind in NOUN_KINDS.split())]
    kinds += [*(f"verb.{kind}" for kind in VERB_KINDS.split()), "adj.ppl"]
    category = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    lines = [f"{i:02d}\t{kind}\t{category[kind.split('.')[0]]}\n" for i, kind in enumerate(kinds)]
    (folder / "lexnames").write_text("".join(lines))
    if not (folder / "index.sense").exists():
        (folder / "index.sense").touch()
    nltk.data.path.insert(0, str(root))


Released = tuple[Callable[[str], list[int]], Callable[..., list[str]], Callable[[str], list[str]]]


def released(keys: list[str]) -> Released:
    """(caption to class indices, tokens to unpadded keys, text to tokens) as CatLIP's code has them, on this NLTK."""
    from nltk.corpus import wordnet
    from nltk.stem import WordNetLemmatizer
    from nltk.tokenize import NLTKWordTokenizer, word_tokenize
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types |= ABBREVIATIONS
    sentences = PunktSentenceTokenizer(parameters)
    lemmatise, words = WordNetLemmatizer().lemmatize, NLTKWordTokenizer()
    lemmatise("dogs")  # the reader loads now

    def untrained(text: str) -> list[str]:
        return list(chain.from_iterable(words.tokenize(sentence) for sentence in sentences.tokenize(text)))

    try:
        word_tokenize("a dog. a cat.")
        split: Callable[[str], list[str]] = word_tokenize
    except LookupError:
        split = untrained

    def of_tokens(tokens: list[str], lemma_of: Callable[[str], str] = lemmatise) -> list[str]:
        found = []
        for token in tokens:
            name = f"{lemma_of(token)}.n.01"
            try:
                synset = wordnet.synset(name)
            except Exception:  # as released
                continue
            if synset.name() == name:
                found.append(f"{synset.pos()}{synset.offset()}")
        return found

    def label(caption: str) -> list[int]:
        return [keys.index(key) for key in of_tokens(split(clean(caption))) if key in keys]

    return label, of_tokens, split


def clean(caption: str) -> str:
    """The released cleaning, every step on every caption."""
    text = unquote(caption).replace("+", " ")
    text = re.sub(r"<.*?>", "", text).strip("\n")
    return ftfy.fix_text(re.sub(r" +", " ", text)).strip().lower()


def words_by_frequency(source: Path) -> dict[str, tuple[list[str], list[int]]]:
    """n, v, a: words of WordNet and how often its tagged texts have them, and once more the rest of the words."""
    counts: dict[str, Counter[str]] = {"n": Counter(), "v": Counter(), "a": Counter()}
    for kind, name in (("n", "noun"), ("v", "verb"), ("a", "adj")):
        for line in (source / f"index.{name}").read_text().splitlines():
            if line[0] != " " and line.split()[0].isalpha():
                counts[kind][line.split()[0]] = 1
    for line in (source / "cntlist.rev").read_text().splitlines():
        key, _, number = line.split()
        lemma, _, kind = key.partition("%")
        found = {"1": "n", "2": "v", "3": "a", "5": "a"}.get(kind[0])
        if found and lemma in counts[found]:
            counts[found][lemma] += 50 * int(number)
    return {kind: (list(found), list(found.values())) for kind, found in counts.items()}


def made_up(source: Path, number: int, seed: int) -> Iterator[str]:
    """Captions; the same for the same seed."""
    draw, drawn = random.Random(seed), {}
    for kind, (words, weights) in words_by_frequency(source).items():
        drawn[kind] = draw.choices(words, weights, k=200_000)

    def fill(pattern: str) -> str:
        return re.sub(r"\{(\w?)\}", lambda hole: word(hole[1]), pattern)

    def word(kind: str) -> str:
        if not kind:
            return fill(draw.choice(PATTERNS))
        if kind == "d":
            return str(draw.choice([2, 3, 12, 2016, "two", "three", "1,000"]))
        found = draw.choice(drawn[kind.lower()])
        return found.capitalize() if kind.isupper() else found

    forms, shares = [form for _, form in FORMS], [share for share, _ in FORMS]
    for form in draw.choices(forms, shares, k=number):
        yield fill(form)


def demo(number: int, seed: int) -> Iterator[str]:
    """Captions of the demo's scenes."""
    sys.path.insert(0, str(ROOT))
    from demo.scenes import make_scene, web_caption

    for i in range(number):
        draw = random.Random(f"{seed}/{i}")
        yield web_caption(make_scene(draw), draw)[0]


def seconds(label: Callable[[str], object], captions: list[str]) -> float:
    """CPU seconds of labelling them all."""
    start = time.process_time()
    for caption in captions:
        label(caption)
    return time.process_time() - start


def measure(name: str, captions: list[str], options: argparse.Namespace, net: WordNet) -> None:
    """Print rates, ratio and agreement on one set of captions."""
    labeller, few = Labeler(net), captions[: options.reference]
    frequent = [wnid for wnid, _ in Counter(chain.from_iterable(map(labeller.synsets, captions))).most_common()]
    vocabulary = Vocabulary(tuple((wnid, "", 0, 0) for wnid in [*dict.fromkeys([*frequent, *net.heads])][:KEYS]), {})
    theirs, of_tokens, split = released([f"n{int(row[0][1:])}" for row in vocabulary.rows])
    labeller = Labeler(net)  # a cold one

    def ours(caption: str) -> list[int]:
        return vocabulary.labels(labeller.synsets(caption))

    cold = seconds(ours, captions)
    warm = seconds(ours, captions)
    alone = seconds(labeller.synsets, captions)
    slow = seconds(theirs, few)
    reasons = Counter[str]()
    for caption in few:
        mine = {f"n{int(wnid[1:])}" for wnid in labeller.synsets(caption)}
        text = clean(caption)
        if mine == set(of_tokens(split(text))):
            reasons["identical"] += 1
        elif mine == set(of_tokens(tokenise(text))):
            reasons["NLTK's tokeniser changed since 3.8.1"] += 1
        elif mine == set(of_tokens(split(text), net.lemmatise)):
            reasons["NLTK's lemmatiser changed since 3.8.1"] += 1
        else:
            reasons["both" if mine == set(of_tokens(tokenise(text), net.lemmatise)) else "unexplained"] += 1
    rate, reference = len(captions) / warm, len(few) / slow
    tokens = sum(len(split(clean(caption))) for caption in few) / len(few)
    print(
        f"{name}: {len(captions)} captions of {tokens:.1f} tokens, NLTK {nltk.__version__}"
        f"\n  released way {reference:,.0f} captions/s; ours {len(captions) / cold:,.0f} cold, {rate:,.0f} warm, "
        f"{len(captions) / alone:,.0f} warm without the vocabulary"
        f"\n  ratio {len(captions) / cold / reference:.1f} cold, {rate / reference:.1f} warm"
        f"\n  identical labels: {100 * reasons.pop('identical', 0) / len(few):.2f} % of {len(few)} captions"
        + "".join(f"; {100 * number / len(few):.2f} % {reason}" for reason, number in reasons.most_common())
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=100_000, help="captions per set for our way")
    parser.add_argument("--reference", type=int, default=4_000, help="of them for the released way, and compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wordnet", help="folder with WordNet 3.0")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    source = find_wordnet(options.wordnet)
    with tempfile.TemporaryDirectory() as folder:
        nltk_folder(source, Path(folder))
        net = load_wordnet(str(source))
        measure("made-up web captions", list(made_up(source, options.captions, options.seed)), options, net)
        measure("captions of the demo", list(demo(options.captions // 5, options.seed)), options, net)


if __name__ == "__main__":
    main()
