"""Stage `vocab`: count the synsets of all final shards and keep the frequent ones."""

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.core.runner import Root, upstream_shards
from pipeline.labels.catlip_pickle import catlip_bytes, read_catlip
from pipeline.labels.labeler import LabelRule
from pipeline.labels.wordnet import load_wordnet
from shards_spec.files import DataError, UserError, join, read_bytes, remove_stale, write_bytes
from shards_spec.layout import SHARDS, VOCAB, final_parquet, vocabulary_tsv
from shards_spec.manifest import read_dataset, write_stage
from shards_spec.names import check_name
from shards_spec.parquet import open_parquet
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
    """keep at most this many"""
    source: str = "original"
    """captions that count: original (as CatLIP does), all or synthetic; training's --label-captions must be the same"""
    wordnet: str | None = None
    """folder with WordNet 3.0, for the lemmas; by default NLTK's or Debian's"""
    import_catlip: str | None = None
    """take CatLIP's own vocabulary, a pickled dictionary from key to count, in its order, instead of counting"""
    export_catlip: str | None = None
    """write the vocabulary in that form, too"""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.min_count < 0 or (self.top_k is not None and self.top_k < 1):
            raise UserError(f"min_count {self.min_count} must be >= 0 and top_k {self.top_k} >= 1")
        if self.source not in ("all", "original", "synthetic"):
            raise UserError(f"source {self.source!r} must be all, original or synthetic")


@dataclass(frozen=True)
class Labels:
    """The labels of some rows: number of rows and captions; row, caption and index into ``wnids`` of each label [L]."""

    samples: int
    captions: int
    sample: np.ndarray
    caption: np.ndarray
    code: np.ndarray
    wnids: list[str]


def vocab(config: VocabConfig) -> Vocabulary:
    """Write ``vocab/NAME.tsv`` and return it. Memory: a batch of rows and the counters. Raises UserError, DataError."""
    shards = upstream_shards(config.root, SHARDS, "pack")
    packed = read_dataset(config.root)["stages"].get("pack", {}).get("config", {})
    if config.import_catlip:
        vocabulary = _imported(config, config.import_catlip)
        vocabulary.check_rule(packed, config.import_catlip)
    else:
        vocabulary = _counted(config, shards, rule_of(packed))
    path = vocabulary_tsv(config.root, config.name)
    remove_stale(join(config.root, VOCAB))
    vocabulary.write(path)
    if config.export_catlip:
        write_bytes(config.export_catlip, catlip_bytes(vocabulary))
    found = coverage(config.root, shards, config.source, vocabulary)
    block = {
        "config": vocabulary.header,
        "synsets": len(vocabulary),
        "sha256": vocabulary.sha256,
        "shards": len(shards),
        "coverage": found,
    }
    write_stage(config.root, f"vocab/{config.name}", block)
    log.info("%s: %s", path, _said(found))
    return vocabulary


def _said(found: dict[str, int]) -> str:
    samples = max(found["samples"], 1)
    classes = f", {found['imagenet_classes']} of the 1000 classes of ImageNet-1k" if "imagenet_classes" in found else ""
    return (
        f"{100 * found['samples_with_label'] / samples:.1f} % of {found['samples']} samples have a label, "
        f"{found['labels'] / samples:.2f} labels per sample{classes}"
    )


def _counted(config: VocabConfig, shards: list[int], rule: dict[str, Any]) -> Vocabulary:
    """Sums over shards, in whatever order: the vocabulary depends on the numbers only."""
    counts, documents, captions = Counter[str](), Counter[str](), 0
    for shard in shards:
        for labels in _labels(config.root, shard, config.source):
            captions += labels.captions
            counts.update(_tally(labels.code, labels.wnids))
            documents.update(_tally(_distinct(labels.caption, labels), labels.wnids))
    if not counts:
        kind = "" if config.source == "all" else f"{config.source} "
        raise UserError(f"{config.root}: no {kind}caption has a synset; count others by --source, or pack others")
    header = {**rule, "source": config.source, "captions": captions, "occurrences": counts.total()}
    heads = load_wordnet(config.wordnet).heads
    return build_vocabulary(counts, documents, heads, header, config.min_count, config.top_k)


def _imported(config: VocabConfig, path: str) -> Vocabulary:
    """CatLIP's file: its order is that of the classes, the first ``top_k`` count; in how many captions is unknown."""
    try:
        counts = read_catlip(read_bytes(path), path)
    except OSError as error:
        raise UserError(f"--import-catlip {path} cannot be read ({error})") from error
    heads = load_wordnet(config.wordnet).heads
    if unknown := [wnid for wnid in counts if wnid not in heads]:
        raise DataError(f"{path}: {unknown[0]} is no noun of WordNet 3.0; it was made with another version")
    rows = tuple((wnid, heads[wnid], count, 0) for wnid, count in counts.items())[: config.top_k]
    header = {
        **LabelRule().describe(), "source": "catlip", "captions": None, "occurrences": sum(counts.values()),
        "min_count": None, "top_k": config.top_k,
    }  # fmt: skip
    return Vocabulary(rows, header)


def coverage(root: str, shards: list[int], source: str, vocabulary: Vocabulary) -> dict[str, int]:
    """What the vocabulary gives on these shards, captions of ``source``.

    ``samples``, ``samples_with_label``, ``labels`` (distinct ones per sample, added up) and ``imagenet_classes``: how
    many of ImageNet-1k's classes are in it, where timm's list of them is found.
    """
    samples = hit = total = 0
    for shard in shards:
        for labels in _labels(root, shard, source):
            known = np.array([wnid in vocabulary.index for wnid in labels.wnids], bool)
            distinct = np.unique(labels.sample * len(known) + labels.code)
            distinct = distinct[known[distinct % len(known)]] if len(known) else distinct
            samples += labels.samples
            total += len(distinct)
            hit += len(np.unique(distinct // max(len(known), 1)))
    classes = imagenet_classes()
    imagenet = {"imagenet_classes": len(classes & vocabulary.index.keys())} if classes else {}
    return {"samples": samples, "samples_with_label": hit, "labels": total, **imagenet}


def _labels(root: str, shard: int, source: str) -> Iterator[Labels]:
    path = final_parquet(root, shard)
    with open_parquet(path, fix="run pack again") as file:
        for batch in file.iter_batches(columns=["synsets"]):
            column = batch.column(0)
            captions, sample = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
            first = np.append(True, sample[1:] != sample[:-1])[: len(sample)]  # the original, SPEC.md §3
            chosen = {"all": np.ones_like(first), "original": first, "synthetic": ~first}[source]
            wnids = pc.list_flatten(captions).dictionary_encode()
            caption = pc.list_parent_indices(captions).to_numpy().astype(np.int64)
            kept = chosen[caption]
            yield Labels(
                len(column), int(chosen.sum()), sample[caption][kept].astype(np.int64), caption[kept],
                wnids.indices.to_numpy()[kept], wnids.dictionary.to_pylist(),
            )  # fmt: skip


def _distinct(group: np.ndarray, labels: Labels) -> np.ndarray:
    """Codes of the labels, each once per group."""
    pairs = np.unique(group * len(labels.wnids) + labels.code)
    return pairs % max(len(labels.wnids), 1)


def _tally(codes: np.ndarray, wnids: list[str]) -> dict[str, int]:
    numbers = np.bincount(codes, minlength=len(wnids)).tolist()
    return {wnid: number for wnid, number in zip(wnids, numbers, strict=True) if number}


def imagenet_classes() -> frozenset[str]:
    """WNIDs of ImageNet-1k from timm's files, without importing timm; empty where it has moved them."""
    spec = importlib.util.find_spec("timm")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, "data", "_info", "imagenet_synsets.txt")
        if path.is_file():
            return frozenset(path.read_text().split())
    return frozenset()
