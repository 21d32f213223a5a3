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

from pipeline.core.command_line import Root
from pipeline.core.runner import upstream_shards
from pipeline.labels.catlip_pickle import catlip_bytes, read_catlip
from pipeline.labels.labeler import LabelRule
from pipeline.labels.wordnet import load_wordnet
from shards_spec.files import DataError, UserError, join, read_bytes, remove_stale, write_bytes
from shards_spec.layout import SHARDS, VOCAB, final_parquet, vocabulary_tsv
from shards_spec.manifest import read_dataset, write_stage
from shards_spec.messages import counted, require
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
    """keep at most this many synsets"""
    source: str = "original"
    """captions that count: original (as CatLIP does), all or synthetic; training's --label-captions must be the same"""
    wordnet: str | None = None
    """folder with WordNet 3.0, for the lemmas; by default NLTK's or Debian's"""
    import_catlip: str | None = None
    """use CatLIP's own vocabulary, a pickled dictionary from key to count, in its order, instead of counting"""
    export_catlip: str | None = None
    """also write the vocabulary in that form"""

    def __post_init__(self) -> None:
        check_name(self.name)
        require(self.min_count >= 0, "min_count", self.min_count, "0 or more")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more")
        is_known = self.source in ("all", "original", "synthetic")
        require(is_known, "source", self.source, "all, original or synthetic")


@dataclass(frozen=True, kw_only=True)
class LabelBatch:
    """The labels of some rows of a final shard's table.

    ``num_samples`` and ``num_captions`` count rows and chosen captions; ``sample``, ``caption`` and ``code`` are the
    row, the caption and the index into ``wnids`` of each label: integers [labels].
    """

    num_samples: int
    num_captions: int
    sample: np.ndarray
    caption: np.ndarray
    code: np.ndarray
    wnids: list[str]


def vocab(config: VocabConfig) -> Vocabulary:
    """Write ``vocab/NAME.tsv`` and return it. Memory: a batch of rows and the counts. Raises UserError, DataError."""
    shards = upstream_shards(config.root, SHARDS, "pack")
    packed = read_dataset(config.root)["stages"].get("pack", {}).get("config", {})
    if config.import_catlip:
        vocabulary = _import_catlip(config, config.import_catlip)
        vocabulary.check_rule(packed, config.import_catlip)
    else:
        vocabulary = _count_labels(config, shards, rule_of(packed))
    path = vocabulary_tsv(config.root, config.name)
    remove_stale(join(config.root, VOCAB))
    vocabulary.write(path)
    if config.export_catlip:
        write_bytes(config.export_catlip, catlip_bytes(vocabulary))
    covered = coverage(config.root, shards, config.source, vocabulary)
    block = {
        "config": vocabulary.header,
        "synsets": len(vocabulary),
        "sha256": vocabulary.sha256,
        "shards": len(shards),
        "coverage": covered,
    }
    write_stage(config.root, f"vocab/{config.name}", block)
    log.info("%s: %s", path, _format_coverage(covered))
    return vocabulary


def _format_coverage(covered: dict[str, int]) -> str:
    samples = max(covered["samples"], 1)
    text = (
        f"{100 * covered['samples_with_label'] / samples:.1f} % of {counted(covered['samples'], 'sample')} labelled, "
        f"{covered['labels'] / samples:.2f} labels per sample"
    )
    if "imagenet_classes" in covered:
        text += f", {covered['imagenet_classes']} of the 1000 classes of ImageNet-1k"
    return text


def _count_labels(config: VocabConfig, shards: list[int], rule: dict[str, Any]) -> Vocabulary:
    counts = Counter[str]()
    documents = Counter[str]()
    captions = 0
    for shard in shards:
        for batch in _label_batches(config.root, shard, config.source):
            captions += batch.num_captions
            counts.update(_count_by_wnid(batch.code, batch.wnids))
            documents.update(_count_by_wnid(_distinct(batch.caption, batch), batch.wnids))
    if not counts:
        kind = "" if config.source == "all" else f"{config.source} "
        raise UserError(f"{config.root}: no {kind}caption has a synset; count others with --source, or pack others")
    header = {**rule, "source": config.source, "captions": captions, "occurrences": counts.total()}
    heads = load_wordnet(config.wordnet).heads
    return build_vocabulary(counts, documents, heads, header, min_count=config.min_count, top_k=config.top_k)


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


def coverage(root: str, shards: list[int], source: str, vocabulary: Vocabulary) -> dict[str, int]:
    """How much of these shards the vocabulary covers, by the captions of ``source``.

    Keys: ``samples``, ``samples_with_label``, ``labels`` (the sum of the distinct ones of each sample) and, where
    timm's list of them is found, ``imagenet_classes``, the number of ImageNet-1k's classes in the vocabulary.
    """
    samples = 0
    samples_with_label = 0
    total_labels = 0
    for shard in shards:
        for batch in _label_batches(root, shard, source):
            known = np.array([wnid in vocabulary.index for wnid in batch.wnids], bool)
            distinct = np.unique(batch.sample * len(known) + batch.code)
            if len(known):
                distinct = distinct[known[distinct % len(known)]]
            samples += batch.num_samples
            total_labels += len(distinct)
            samples_with_label += len(np.unique(distinct // max(len(known), 1)))
    covered = {"samples": samples, "samples_with_label": samples_with_label, "labels": total_labels}
    if classes := imagenet_classes():
        covered["imagenet_classes"] = len(classes & vocabulary.index.keys())
    return covered


def _label_batches(root: str, shard: int, source: str) -> Iterator[LabelBatch]:
    path = final_parquet(root, shard)
    with open_parquet(path, fix="run pack again") as file:
        for batch in file.iter_batches(columns=["synsets"]):
            column = batch.column(0)
            captions = pc.list_flatten(column)
            sample_of_caption = pc.list_parent_indices(column).to_numpy()
            # the first caption of a sample is the original one, SPEC.md §3
            is_original = np.append(True, sample_of_caption[1:] != sample_of_caption[:-1])[: len(sample_of_caption)]
            chosen = {"all": np.ones_like(is_original), "original": is_original, "synthetic": ~is_original}[source]
            wnids = pc.list_flatten(captions).dictionary_encode()
            caption = pc.list_parent_indices(captions).to_numpy().astype(np.int64)
            kept = chosen[caption]
            yield LabelBatch(
                num_samples=len(column),
                num_captions=int(chosen.sum()),
                sample=sample_of_caption[caption][kept].astype(np.int64),
                caption=caption[kept],
                code=wnids.indices.to_numpy()[kept],
                wnids=wnids.dictionary.to_pylist(),
            )


def _distinct(group: np.ndarray, batch: LabelBatch) -> np.ndarray:
    """Codes of the labels, each once per value of ``group`` [labels]."""
    pairs = np.unique(group * len(batch.wnids) + batch.code)
    codes: np.ndarray = pairs % max(len(batch.wnids), 1)
    return codes


def _count_by_wnid(codes: np.ndarray, wnids: list[str]) -> dict[str, int]:
    numbers = np.bincount(codes, minlength=len(wnids)).tolist()
    return {wnid: number for wnid, number in zip(wnids, numbers, strict=True) if number}


def imagenet_classes() -> frozenset[str]:
    """WNIDs of ImageNet-1k from timm's files, without importing timm; empty when they are not where we know them."""
    spec = importlib.util.find_spec("timm")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, "data", "_info", "imagenet_synsets.txt")
        if path.is_file():
            return frozenset(path.read_text().split())
    return frozenset()
