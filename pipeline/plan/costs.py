"""What a sample and a shard cost: measured by `tests/bench/costs.py`, counted by `tests/bench/plan.py --flops`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Of a sample: milliseconds of one core and bytes, as `costs.py` prints them, on 2 vCPU of an AMD EPYC (Zen 4)."""

    ingest_ms: float = 4.4
    dedup_ms: float = 0.0052  # with memory for all; see docs/scale.md
    dedup_sum_ms: float = 0.0019  # of that the search, which is one process
    caption_ms: float = 2.2  # decode and resize; what the GPU does is in FLOP
    pack_ms: float = 0.21
    vocab_ms: float = 0.0018  # original captions
    vocab_sum_ms: float = 0.00013  # of that the sum of all shards' counts, which is one process
    view_ms: float = 0.36  # decoding included, which ten views share
    train_ms: float = 1.4
    check_ms: float = 0.25  # from the page cache
    check_sum_ms: float = 0.00021  # of that the sum of all parts, which is one process: `check_sum.py`
    rows_per_s: float = 370_000  # of a list of links, that are read to be left to others
    downloaded: float = 125_000  # assumed: the photos of the benches
    image: float = 29_900  # img2dataset's documentation: 1 M images at 256 px are 29.9 GB
    raw_more: float = 3_800  # tar headers, txt, json, padding, the Parquet row
    final_more: float = 4_600
    caption_bytes: float = 185  # of five captions
    row_more: float = 90  # of a cache row beside its vectors: key and identities


FILE_OPERATIONS = {  # of a shard, as `costs.py` counts them by strace: opened, looked up, flushed, renamed or removed
    "ingest": 5 + 4 + 3 + 7,
    "dedup": 13 + 14 + 4 + 12,
    "caption": 6 + 7 + 2 + 5,
    "pack": 14 + 13 + 3 + 8,
    "vocab": 8 + 10 + 2 + 7,
    "cache": 7 + 9 + 2 + 5,
    "check": 24 + 30,
}
CLAIM = 5  # more per shard where an array makes it: linked, looked up, moved aside, opened, removed
WIDTH = 768  # numbers in an embedding of ViT-L/14
# The jobs that a GPU is given, each with the 1e9 operations of one sample (multiply and add are two). A sample of
# "five captions" is an image, encoded already, whose five captions are written: five captions per second are a rate
# of 1. A step's sample is an image with its texts; forward pass three times, optimizer and loss not counted.
FLOP = {
    "image, ViT-L/14": 162.03,
    "text, ViT-L/14": 13.30,
    "image, CoCa ViT-L/14": 170.86,
    "five captions of 30 tokens, CoCa ViT-L/14": 80.05,
    "step of ViT-M-32": 3 * (3.99 + 5.96),
    "step of MobileCLIP-S0": 3 * (4.79 + 2.64),
    "step of ViT-B-16": 3 * (35.13 + 5.96),
}
ASSUMED_SHARE = 0.2  # of a card's ceiling that a job keeps up whose rate was not measured
STUDENTS = ("ViT-M-32", "MobileCLIP-S0", "ViT-B-16")
