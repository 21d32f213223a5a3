"""Which samples and captions of a raw shard stay in the final shards, and why the others are dropped."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.filters import caption_problem
from pipeline.dedup.drop_list import read_drop_list
from pipeline.pack.applied_selection import (
    NOT_SELECTED,
    AppliedSelection,
    ChosenSample,
    find_applied_selection,
)
from pipeline.pack.caption_cleaning import EMPTY_AFTER_CLEANING, clean_caption, read_caption
from shards_spec.files import DataError, exists, join
from shards_spec.layout import (
    DEDUP,
    RAW,
    captions_folder,
    captions_parquet,
    dedup_parquet,
    parquet_path,
    raw_tar,
    remake_advice,
    tar_path,
)
from shards_spec.parquet import read_table
from shards_spec.sample import Sample
from shards_spec.selection import captions_of

log = logging.getLogger(__name__)
DISSIMILAR = "every caption below min_similarity"  # a reason on disk
NEED_SIMILARITY = "--min-similarity needs the cosines that `clipmill caption ... --similarity` stores"
# members of a source's json that have the names of ours; they are no captions of these shards
RESERVED_FIELD = re.compile(r"syn_(0|[1-9][0-9]*)|synsets")


@dataclass(frozen=True)
class SelectionConfig:
    """Every setting that decides which samples and captions stay; sent to worker processes."""

    captioners: tuple[str, ...]
    deduplicated: bool
    max_caption_chars: int
    min_similarity: float | None = None
    applied: AppliedSelection | None = None

    @classmethod
    def of_record(cls, root: str, config: dict[str, Any]) -> "SelectionConfig":
        """The selection of finished shards, by the config in their done-records."""
        captioner = config.get("captioner") or ()
        chosen = config.get("select")
        return cls(
            (captioner,) if isinstance(captioner, str) else tuple(captioner),
            exists(join(root, DEDUP)),
            config["max_caption_chars"],
            config.get("min_similarity"),
            None if chosen is None else find_applied_selection(root, chosen, captions_of(config)),
        )

    def inputs(self, shard: int) -> Iterator[tuple[str, str]]:
        """(folder, path) of the files that belong to a raw shard."""
        yield RAW, tar_path(RAW, shard)
        for captioner in self.captioners:
            folder = captions_folder(captioner)
            yield folder, parquet_path(folder, shard)
        if self.deduplicated:
            yield DEDUP, parquet_path(DEDUP, shard)
        if self.applied is not None:
            yield from self.applied.inputs(shard)


@dataclass(frozen=True)
class ShardRange:
    """Rows ``start`` to ``stop`` (None: the end) of a raw shard's plan; the first one is at byte ``offset`` of the tar.

    ``keys`` are the keys of the samples that are still there, or None for a whole shard; ``taken_down`` of those that
    were to stay are not.
    """

    shard: int
    start: int = 0
    stop: int | None = None
    offset: int = 0
    keys: tuple[str, ...] | None = None
    taken_down: int = 0


@dataclass(frozen=True, slots=True)
class SyntheticCaptions:
    """An image's synthetic captions that stay, in order.

    ``any_written`` is False when no captioner wrote any, and ``undecodable`` says that one could not decode the image;
    captions of others may be missing for other reasons. ``left_out`` is the number below the least similarity, and
    ``original_is_similar`` says whether the original caption may stay.
    """

    texts: list[str]
    any_written: bool = False
    undecodable: bool = False
    left_out: int = 0
    original_is_similar: bool = True


@dataclass(frozen=True, slots=True)
class SelectedSample:
    """A sample that stays: its caption as it came and as it is stored, its synthetic captions, its json member.

    ``notes`` are the stage's counters that it adds to.
    """

    original: str
    caption: str
    synthetic: list[str]
    meta: dict[str, Any]
    notes: list[str]

    def with_captions(self, numbers: list[int]) -> "SelectedSample":
        """The sample with some of its captions: 0 is the original, the synthetic ones are counted from 1."""
        synthetic = [text for number, text in enumerate(self.synthetic, 1) if number in numbers]
        if 0 in numbers:
            return replace(self, synthetic=synthetic)
        return replace(self, original="", caption="", synthetic=synthetic)


class SampleSelector:
    """Selects sample by sample, for one range of a raw shard.

    >>> outcomes = [selector.select(sample) for sample in samples]
    >>> selector.finish()
    """

    def __init__(self, root: str, shard_range: ShardRange, selection: SelectionConfig) -> None:
        """Read the captions and dedup's list, not the raw shard. Raises DataError."""
        shard = shard_range.shard
        self._shard = shard
        self._selection = selection
        self._source = raw_tar(root, shard)
        self._dropped = dict[str, str]()
        if selection.deduplicated:
            dropped = read_drop_list(dedup_parquet(root, shard))
            keys = dropped if shard_range.keys is None else [key for key in shard_range.keys if key in dropped]
            self._dropped = {key: dropped[key] for key in keys}
        self._choices = selection.applied.choices(root, shard) if selection.applied else None
        paths = [captions_parquet(root, name, shard) for name in selection.captioners]
        self._captions = [read_captions(path, shard_range.keys, selection.min_similarity) for path in paths]

    def select(self, sample: Sample) -> SelectedSample | str:
        """What stays of a sample, or the reason why it is dropped. Its image is not looked at.

        Raises DataError when the captions do not belong to the raw shard.
        """
        synthetic = self._synthetic(sample.key)
        if reason := self._reason_to_drop(sample.key, synthetic):
            return reason
        try:
            original = read_caption(sample)
            meta = sample.meta
        except DataError as error:
            log.warning("%s: %s; dropped", self._source, error)
            return "caption or json does not parse"
        dissimilar = bool(original.strip()) and not synthetic.original_is_similar
        if dissimilar:
            original = ""
        caption, fixes = clean_caption(original)
        if not caption.strip() and not synthetic.texts:
            if dissimilar or synthetic.left_out:
                return DISSIMILAR
            return EMPTY_AFTER_CLEANING if original.strip() else "no caption"
        if problem := caption_problem(caption, 0, self._selection.max_caption_chars, sane=False):
            return problem

        notes = [f"{fix} mended" for fix in fixes]
        if any(map(RESERVED_FIELD.fullmatch, meta)):
            notes.append("json members with syn_N or synsets of the source, left out")
        if dissimilar:
            notes.append("original captions below min_similarity")
        notes += ["synthetic captions below min_similarity"] * synthetic.left_out
        if self._captions and not synthetic.any_written:
            notes.append("samples without a synthetic caption")
        selected = SelectedSample(original, caption, synthetic.texts, meta, notes)
        captions = self._chosen(sample.key).captions
        return selected if captions is None else selected.with_captions(captions)

    def _reason_to_drop(self, key: str, synthetic: SyntheticCaptions) -> str | None:
        """Why a sample goes whatever its caption is, or None."""
        if reason := self._dropped.pop(key, None):
            return reason
        if synthetic.undecodable and not synthetic.any_written:
            return "picture does not decode"
        return self._chosen(key).reason

    def _chosen(self, key: str) -> ChosenSample:
        """What `clipmill select` chose of a sample."""
        if self._choices is None:
            return ChosenSample(None, None)
        return self._choices.get(key, ChosenSample(NOT_SELECTED, None))

    def finish(self) -> None:
        """After the last sample: raise DataError if a caption or an entry of dedup's list belongs to no sample."""
        for captioner, captions in zip(self._selection.captioners, self._captions, strict=True):
            if captions:
                path = parquet_path(captions_folder(captioner), self._shard)
                raise DataError(f"{path}: key {next(iter(captions))} is not in {tar_path(RAW, self._shard)}")
        if self._dropped:
            path = parquet_path(DEDUP, self._shard)
            key = next(iter(self._dropped))
            raise DataError(f"{path}: key {key} is not in {tar_path(RAW, self._shard)}; run dedup again")

    def _synthetic(self, key: str) -> SyntheticCaptions:
        """The captions of all captioners for an image, joined."""
        by_captioner = list[SyntheticCaptions]()
        for captioner, captions in zip(self._selection.captioners, self._captions, strict=True):
            if key not in captions:
                raise DataError(f"{self._source}: key {key} has no row in captions/{captioner}; run caption again")
            by_captioner.append(captions.pop(key))
        if len(by_captioner) == 1:
            return by_captioner[0]
        texts = list[str]()
        for captions_of_one in by_captioner:
            texts += captions_of_one.texts
        return SyntheticCaptions(
            texts,
            any_written=any(captions_of_one.any_written for captions_of_one in by_captioner),
            undecodable=any(captions_of_one.undecodable for captions_of_one in by_captioner),
            left_out=sum(captions_of_one.left_out for captions_of_one in by_captioner),
            original_is_similar=(
                not by_captioner or any(captions_of_one.original_is_similar for captions_of_one in by_captioner)
            ),
        )


def read_captions(
    path: str, keys: tuple[str, ...] | None, min_similarity: float | None
) -> dict[str, SyntheticCaptions]:
    """Key to synthetic captions of one shard, without empty ones; of ``keys`` alone when they are given.

    A captioner leaves a row empty when the image does not decode, and null when there is no caption of it.
    Captions with a cosine below ``min_similarity`` are left out, too. Raises DataError for a file that is no Parquet,
    lacks one of the columns or has a key twice.
    """
    cosine_columns = [] if min_similarity is None else ["similarities", "original_similarity"]
    table = read_table(path, ["key", "captions"], optional=cosine_columns, fix="run caption again")
    if missing := set(cosine_columns) - set(table.column_names):
        raise DataError(f"{path}: no column {max(missing)}; {NEED_SIMILARITY}")
    if keys is not None:
        table = table.filter(pc.is_in(table.column("key"), pa.array(keys, pa.string())))
    captions = dict[str, SyntheticCaptions]()
    columns = [table.column(name).to_pylist() for name in ("key", "captions", *cosine_columns)]
    if min_similarity is None:
        for key, texts in zip(*columns, strict=True):
            written = [text for text in texts or () if text]
            captions[key] = SyntheticCaptions(written, any_written=bool(texts), undecodable=texts == [])
    else:
        for key, texts, cosines, original_cosine in zip(*columns, strict=True):  # of a model here: none is null
            if len(texts) != len(cosines):
                raise DataError(f"{path}: key {key} has not one similarity per caption; {remake_advice(path)}")
            captions[key] = _similar_captions(texts, cosines, original_cosine, min_similarity)
    if len(captions) != len(table):
        repeated = next(key for key, count in Counter(columns[0]).items() if count > 1)
        raise DataError(f"{path}: key {repeated} twice; {remake_advice(path)}")
    return captions


def _similar_captions(
    texts: list[str], cosines: list[float | None], original_cosine: float | None, min_similarity: float
) -> SyntheticCaptions:
    """Captions without a cosine stay."""
    written = [(text, cosine) for text, cosine in zip(texts, cosines, strict=True) if text]
    kept = [text for text, cosine in written if cosine is None or cosine >= min_similarity]
    return SyntheticCaptions(
        kept,
        any_written=bool(texts),
        undecodable=not texts,
        left_out=len(written) - len(kept),
        original_is_similar=original_cosine is None or original_cosine >= min_similarity,
    )
