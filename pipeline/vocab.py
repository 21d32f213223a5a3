"""Stage `vocab`: count the synsets of all final shards and keep the frequent ones."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq

from pipeline.stage import Root, upstream_shards
from pipeline.wordnet import RULE, WORDNET_VERSION, load_wordnet
from shards_spec.files import UserError, join, open_read, remove_stale
from shards_spec.manifest import shard_name, write_stage
from shards_spec.vocab import Vocabulary, build_vocabulary


@dataclass(frozen=True)
class VocabConfig:
    """Build the synset vocabulary: count over all captions, threshold, most frequent first."""

    root: Root
    """the dataset; reads shards/*.parquet, writes vocab/NAME.tsv"""
    name: str = "all"
    """file name below vocab/"""
    min_count: int = 500
    """keep synsets that occur more often than this (CatLIP section 3.1: 500 for CC3M and DataComp)"""
    top_k: int | None = None
    """keep at most this many"""
    source: str = "all"
    """captions that count: all, original or synthetic"""
    wordnet: str | None = None
    """folder with WordNet 3.0, for the lemmas; by default NLTK's or Debian's"""

    def __post_init__(self) -> None:
        if self.min_count < 0 or (self.top_k is not None and self.top_k < 1):
            raise UserError(f"min_count {self.min_count} must be >= 0 and top_k {self.top_k} >= 1")
        if self.source not in ("all", "original", "synthetic"):
            raise UserError(f"source {self.source!r} must be all, original or synthetic")


def vocab(config: VocabConfig) -> Vocabulary:
    """Write ``vocab/NAME.tsv`` and return it. Memory: one shard's rows and the counters. Raises UserError."""
    shards = upstream_shards(config.root, "shards", "pack")
    counts, documents, captions = Counter[str](), Counter[str](), 0
    for shard in shards:
        for synsets in _caption_synsets(config, shard):
            captions += 1
            counts.update(synsets)
            documents.update(set(synsets))
    header = {
        "wordnet": WORDNET_VERSION, "rule": RULE, "source": config.source, "captions": captions,
        "occurrences": counts.total(),
    }  # fmt: skip
    heads = load_wordnet(config.wordnet).heads
    vocabulary = build_vocabulary(counts, documents, heads, header, config.min_count, config.top_k)
    path = f"vocab/{config.name}.tsv"
    remove_stale(join(config.root, "vocab"))
    vocabulary.write(join(config.root, path))
    block = {
        "config": vocabulary.header,
        "synsets": len(vocabulary),
        "sha256": vocabulary.sha256,
        "shards": len(shards),
    }
    write_stage(config.root, f"vocab/{config.name}", block)
    return vocabulary


def _caption_synsets(config: VocabConfig, shard: int) -> Iterator[list[str]]:
    piece = {"all": slice(None), "original": slice(0, 1), "synthetic": slice(1, None)}[config.source]
    with open_read(join(config.root, "shards", f"{shard_name(shard)}.parquet")) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=["synsets"]):
            for per_caption in batch.column(0).to_pylist():
                yield from per_caption[piece]
