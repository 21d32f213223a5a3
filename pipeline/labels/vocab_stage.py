"""Stage `vocab`: count the synsets of all final shards and keep the frequent ones."""

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.command_line import Root
from pipeline.core.runner import (
    ALL,
    RunOptions,
    ShardAssignment,
    ShardTask,
    Stage,
    Summary,
    run_stage,
    upstream_shards,
)
from pipeline.core.workers import workers_for
from pipeline.labels.catlip_pickle import catlip_bytes, read_catlip
from pipeline.labels.labeler import LabelRule
from pipeline.labels.vocab_parts import (
    CAPTIONS,
    COUNT_COLUMNS,
    COVERAGE_COLUMNS,
    read_parts,
    sum_counts,
    sum_coverage,
    write_part,
)
from pipeline.labels.wordnet import load_wordnet
from shards_spec.files import DataError, UserError, join, read_bytes, remove_stale, write_bytes
from shards_spec.layout import SHARDS, STAGES, VOCAB, parquet_path, vocabulary_tsv
from shards_spec.lock import locked
from shards_spec.manifest import file_hash, read_dataset, remove_parts, write_stage
from shards_spec.messages import counted, require
from shards_spec.names import check_name
from shards_spec.vocab import Vocabulary, build_vocabulary, rule_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VocabConfig:
    """Build the synset vocabulary: count over captions, threshold, most frequent first."""

    root: Root
    """the dataset; reads shards/*.parquet, writes vocab/NAME.tsv"""
    name: str = "all"
    """file name below vocab/"""
    min_count: int = 500
    """keep synsets that occur more often than this (CatLIP section 3.1: 500 for CC3M and DataComp)"""
    top_k: int | None = None
    """keep at most this many synsets"""
    source: str = "original"
    """captions that count: original (as CatLIP does) or all, with training's --label-captions the same; synthetic: no
    training takes it"""
    wordnet: str | None = None
    """folder with WordNet 3.0, for the lemmas; by default NLTK's or Debian's"""
    import_catlip: str | None = None
    """use CatLIP's own vocabulary, a pickled dictionary from key to count, in its order, instead of counting"""
    export_catlip: str | None = None
    """also write the vocabulary in that form"""
    workers: int = os.cpu_count() or 1
    """processes that count"""

    def __post_init__(self) -> None:
        check_name(self.name)
        require(self.min_count >= 0, "min_count", self.min_count, "0 or more")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more")
        is_known = self.source in ("all", "original", "synthetic")
        require(is_known, "source", self.source, "all, original or synthetic")
        require(self.workers >= 1, "workers", self.workers, "1 or more")

    @property
    def label(self) -> str:
        """What the vocabulary is called below vocab/."""
        return self.name


def vocab(config: VocabConfig, assignment: ShardAssignment = ALL) -> Vocabulary | Summary:
    """Count the synsets of each shard of the assignment; then write ``vocab/NAME.tsv`` from all counts and return it.

    An assignment of some shards returns what it did of them. Memory: a batch of rows, and the counts. Raises UserError,
    also when another process makes the same vocabulary, ShardsFailed for broken shards.
    """
    shards = upstream_shards(config.root, SHARDS, "pack")
    path = vocabulary_tsv(config.root, config.name)
    with locked(join(config.root, f".vocab.{config.name}.lock"), path, shared=not assignment.is_complete):
        return _vocab(config, assignment, shards)


def _vocab(config: VocabConfig, assignment: ShardAssignment, shards: list[int]) -> Vocabulary | Summary:
    root = config.root
    packed = read_dataset(root)["stages"].get("pack", {}).get("config", {})
    imported = _import_catlip(config, config.import_catlip) if config.import_catlip else None
    if imported is not None:
        imported.check_rule(packed, f"{config.import_catlip}")
    parts = Stage(f"vocab/{config.name}", STAGES["vocab"].array_folder(config.name), {})
    summary = run_stage(
        root,
        parts,
        _tasks(config, shards, assignment),
        partial(write_part, folder=parts.folder, source=config.source),
        RunOptions(
            workers=workers_for(len(shards), config.workers), assignment=assignment, total=len(shards), totals=False
        ),
    )
    if not assignment.is_complete:
        return summary
    read = partial(read_parts, root, parts.folder, shards)
    vocabulary = imported
    if vocabulary is None:
        vocabulary = _from_counts(config, rule_of(packed), sum_counts(read(COUNT_COLUMNS)), summary)
    covered = coverage(read(COVERAGE_COLUMNS), summary.counts.get("success", 0), vocabulary)
    path = vocabulary_tsv(root, config.name)
    remove_stale(join(root, VOCAB))
    vocabulary.write(path)
    if config.export_catlip:
        write_bytes(config.export_catlip, catlip_bytes(vocabulary))
    block = {
        "config": vocabulary.header,
        "synsets": len(vocabulary),
        "sha256": vocabulary.sha256,
        "shards": len(shards),
        "coverage": covered,
    }
    write_stage(root, parts.name, block)
    remove_parts(join(root, parts.folder))
    log.info("%s: %s", path, _format_coverage(covered))
    return vocabulary


def _tasks(config: VocabConfig, shards: list[int], assignment: ShardAssignment) -> Iterator[ShardTask]:
    """A task per shard of the assignment: what is counted is among its inputs, so that no part of another run fits."""
    for shard in filter(assignment.claim, shards):
        path = parquet_path(SHARDS, shard)
        yield ShardTask(shard, {path: file_hash(config.root, SHARDS, shard, path), "source": config.source})


def _format_coverage(covered: dict[str, int]) -> str:
    samples = max(covered["samples"], 1)
    text = (
        f"{100 * covered['samples_with_label'] / samples:.1f} % of {counted(covered['samples'], 'sample')} labelled, "
        f"{covered['labels'] / samples:.2f} labels per sample"
    )
    if "imagenet_classes" in covered:
        text += f", {covered['imagenet_classes']} of the 1000 classes of ImageNet-1k"
    return text


def _from_counts(config: VocabConfig, rule: dict[str, Any], counts: pa.Table, parts: Summary) -> Vocabulary:
    """The vocabulary of the ``counts`` of all parts (`sum_counts`). Raises UserError when there are none."""
    if not len(counts):
        kind = "" if config.source == "all" else f"{config.source} "
        raise UserError(f"{config.root}: no {kind}caption has a synset; count others with --source, or pack others")
    wnids = counts.column("wnid").to_pylist()
    occurrences = dict(zip(wnids, counts.column("occurrences").to_pylist(), strict=True))
    documents = dict(zip(wnids, counts.column("documents").to_pylist(), strict=True))
    captions = parts.counters.get(CAPTIONS, 0)
    header = {**rule, "source": config.source, "captions": captions, "occurrences": sum(occurrences.values())}
    heads = load_wordnet(config.wordnet).heads
    return build_vocabulary(occurrences, documents, heads, header, min_count=config.min_count, top_k=config.top_k)


def _import_catlip(config: VocabConfig, path: str) -> Vocabulary:
    """The first ``top_k`` synsets of CatLIP's own file, in its order; the numbers of captions are unknown, so 0."""
    try:
        counts = read_catlip(read_bytes(path), path)
    except OSError as error:
        raise UserError(f"--import-catlip {path} cannot be read ({error})") from error
    heads = load_wordnet(config.wordnet).heads
    if unknown := [wnid for wnid in counts if wnid not in heads]:
        raise DataError(f"{path}: {unknown[0]} is no noun of WordNet 3.0; it was made with another version")
    rows = tuple((wnid, heads[wnid], count, 0) for wnid, count in counts.items())[: config.top_k]
    header = {
        **LabelRule().describe(),
        "source": "catlip",
        "captions": None,
        "occurrences": sum(counts.values()),
        "min_count": None,
        "top_k": config.top_k,
    }
    return Vocabulary(rows, header)


def coverage(parts: Iterable[pa.Table], samples: int, vocabulary: Vocabulary) -> dict[str, int]:
    """How much of some shards the vocabulary covers; ``parts`` are their labels, ``samples`` the number of samples.

    Keys: ``samples``, ``samples_with_label``, ``labels`` (the sum of the distinct ones of each sample) and, where
    timm's list of them is found, ``imagenet_classes``, the number of ImageNet-1k's classes in the vocabulary.
    """
    samples_with_label, labels = sum_coverage(parts, vocabulary.index)
    covered = {"samples": samples, "samples_with_label": samples_with_label, "labels": labels}
    if classes := imagenet_classes():
        covered["imagenet_classes"] = len(classes & vocabulary.index.keys())
    return covered


def imagenet_classes() -> frozenset[str]:
    """WNIDs of ImageNet-1k from timm's files, without importing timm; empty when they are not where we know them."""
    spec = importlib.util.find_spec("timm")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, "data", "_info", "imagenet_synsets.txt")
        if path.is_file():
            return frozenset(path.read_text().split())
    return frozenset()
