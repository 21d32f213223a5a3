#!/usr/bin/env python3
"""Cut CLIP's byte-pair vocabulary down to what the demo's captions need.

    python demo/cut_bpe.py

CLIP's 49,408 tokens make the caption loss too expensive for a CPU. The cut keeps, in their order, the merges that
the words of the demo's captions use, and the first COMMON merges so that other English words stay short. So every
caption word is tokenised exactly as by CLIP, and a vocabulary has 512 + merges + 2 tokens.
The merges are those of OpenAI's CLIP (MIT licence), as shipped with open_clip.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import scenes
from open_clip.tokenizer import SimpleTokenizer

COMMON = 400
CAPTIONS = 20_000
MODELS = Path(__file__).resolve().parent / "models"


def caption_words() -> set[str]:
    """Return the words of many captions, scene by scene as a list of that many scenes would have them."""
    words: set[str] = set()
    for i in range(CAPTIONS):
        rng = Random(f"words/{i}")
        scene = scenes.make_scene(rng)
        for say in (scenes.full_caption, scenes.short_caption):
            words.update(word.strip(",") for word in say(scene, rng).split())
    return words


def needed_merges(tokenizer: SimpleTokenizer, words: set[str]) -> set[tuple[str, str]]:
    """Return the merges that build the tokens of `words`, down to single characters."""
    left_and_right = {"".join(pair): pair for pair in reversed(tokenizer.bpe_ranks)}
    pending: list[str] = []
    for word in words:
        pending += tokenizer.bpe(word).split()
    needed: set[tuple[str, str]] = set()
    while pending:
        pair = left_and_right.get(pending.pop())
        if pair is not None and pair not in needed:
            needed.add(pair)
            pending.extend(pair)
    return needed


def main() -> None:
    """Write bpe.txt.gz beside each model's configuration and print the size of the vocabulary."""
    tokenizer = SimpleTokenizer()
    needed = needed_merges(tokenizer, caption_words())
    kept = [pair for rank, pair in enumerate(tokenizer.bpe_ranks) if rank < COMMON or pair in needed]
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in kept)])
    data = gzip.compress(text.encode("utf-8"), mtime=0)
    for model in ("coca", "student"):
        (MODELS / model / "bpe.txt.gz").write_bytes(data)
    print(f"{len(kept)} merges, {512 + len(kept) + 2} tokens")


if __name__ == "__main__":
    main()
