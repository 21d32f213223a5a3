#!/usr/bin/env python3
"""Writes tests/golden/punkt.json: tokens that NLTK 3.8.1 with its real English Punkt model gives for hard captions.

    pip install --no-deps --target /tmp/nltk381 nltk==3.8.1          # the version that CatLIP's released code pins
    NLTK_DATA=DIR PYTHONPATH=/tmp/nltk381 python tests/bench/punkt_golden.py       # DIR/tokenizers/punkt/PY3/…

The model is NLTK's data package ``punkt`` as it was for 3.8.1 (pickles). Every abbreviation occurs, with and without
what may stand before and after it; so do initials, numbers, ellipses, the model's collocations and its four words that
begin sentences in lower case.
"""

import json
import random
from pathlib import Path

import nltk
from nltk import word_tokenize

GOLDEN = Path(__file__).parents[1] / "golden" / "punkt.json"
ODD = (
    "...",
    "..",
    ". . .",
    ". .",
    "?",
    "!",
    "5.",
    "12",
    "3.5.",
    "j.",
    "a.",
    "'",
    '"',
    "(",
    ")",
    "--",
    ",",
    ";",
    "-",
    "dog.",
    '." ',
    "ice",
    "𝐀bc",
    "ǆ",
    "5",
    ").",
    '."',
)
OPENERS = ("administrators", "b-week", "r-revised", "z-holiday")


def main() -> None:
    """Write what NLTK's trained model makes of random text."""
    assert nltk.__version__ == "3.8.1", nltk.__version__
    model = nltk.data.load("tokenizers/punkt/PY3/english.pickle")._params
    abbreviations, pairs = sorted(model.abbrev_types), sorted(model.collocations)
    words, rng = sorted(model.ortho_context), random.Random(0)
    rng.shuffle(abbreviations)

    def piece(number: int) -> str:
        abbreviation = abbreviations[number % len(abbreviations)]
        kinds = {
            "abbreviation": lambda: f"{abbreviation}.",
            "dressed": lambda: rng.choice(["new-", "(", ""]) + abbreviation + rng.choice([".,", ".)", ".-", ".'s"]),
            "odd": lambda: rng.choice(ODD),
            "pair": lambda: ". ".join(rng.choice(pairs)).replace("##number##", "5"),
            "opener": lambda: rng.choice(OPENERS) + rng.choice(["", "."]),
            "word": lambda: rng.choice(words) + rng.choice(["", "", "", "."]),
        }
        return kinds[rng.choices(list(kinds), [4, 2, 2, 1, 1, 5])[0]]()

    texts = []
    for number in range(3 * len(abbreviations)):
        pieces = [piece(number) for _ in range(rng.randrange(1, 6))]
        pieces.insert(rng.randrange(len(pieces)), f"{abbreviations[number % len(abbreviations)]}.")
        texts.append(" ".join(pieces).lower().strip())
    lines = [json.dumps([text, word_tokenize(text)], ensure_ascii=False) for text in texts]
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
