"""Stage `pack`: raw shard + captions + synsets → final shard. The only stage after ingest that writes pictures."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import hygiene
from pipeline.dedup import FOLDER as DEDUP
from pipeline.dedup import check_fresh, read_dropped
from pipeline.labels import FUNCTION_WORDS, Labeller, LabelRule, load_labeller
from pipeline.likeness import caption_problem
from pipeline.stage import Result, Root, Stage, Summary, Task, run_stage, upstream_shards
from pipeline.wordnet import find_wordnet
from shards_spec.files import (
    DataError,
    UserError,
    atomic_writer,
    exists,
    join,
    json_bytes,
    names,
    open_read,
    read_bytes,
    sha256_file,
    write_json,
)
from shards_spec.manifest import file_hash, forget, read_done, shard_name
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard

log = logging.getLogger(__name__)
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("synthetic", pa.list_(pa.string())),
        pa.field("synsets", pa.list_(pa.list_(pa.string()))),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)


@dataclass(frozen=True)
class PackConfig:
    """Join pictures, captions and WordNet synsets into the final shards."""

    root: Root
    """the dataset; reads raw/, captions/NAME/ and, where it is there, dedup/; writes shards/"""
    captioner: str | None = None
    """folder below captions/; needed only when there are several; 'none' packs the original captions alone"""
    wordnet: str | None = None
    """folder (or NLTK's zip) with WordNet 3.0's index.noun, data.noun, noun.exc; by default NLTK's or Debian's"""
    download_wordnet: bool = False
    """fetch WordNet with NLTK's downloader when it is nowhere"""
    nouns_only: bool = False
    """synsets of nouns only, by part-of-speech tag, as CatLIP's paper says; its released code takes every word"""
    tagger: str = "nltk"
    """tagger for --nouns-only: nltk, or MODULE:FUNCTION from a list of words to a list of Penn tags"""
    collocations: bool = False
    """synsets of nouns of several words, the longest first"""
    synonyms: bool = False
    """keep synsets whose first name is another word: bike is a motorcycle then"""
    stop_words: str | None = None
    """words that get no synset: a text file, or 'function' for a short list of function words"""
    max_caption_chars: int = 10_000
    """samples with a longer original caption are left out; 0: none is"""
    workers: int = os.cpu_count() or 1
    """processes"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers {self.workers} must be at least 1")
        if self.max_caption_chars < 0:
            raise UserError(f"max_caption_chars {self.max_caption_chars} must be 0 (no limit) or more")

    @property
    def rule(self) -> LabelRule:
        """How captions become synsets. Raises UserError when the file of stop words cannot be read."""
        stop = _stop_words(self.stop_words) if self.stop_words else ()
        return LabelRule(self.nouns_only, self.tagger, self.collocations, self.synonyms, stop)


def _stop_words(source: str) -> tuple[str, ...]:
    if source == "function":
        return FUNCTION_WORDS
    try:
        words = read_bytes(source).decode().lower().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--stop-words {source} is no text file that can be read ({error})") from error
    return tuple(sorted(set(words)))


def pack(config: PackConfig) -> Summary:
    """Run the stage and write ``shards/sizes.json``. Raises UserError, ShardsFailed."""
    captioner = _pick_captioner(config)
    shards = upstream_shards(config.root, "raw", "ingest")
    if captioner:
        captioned = upstream_shards(config.root, f"captions/{captioner}", f"caption/{captioner}")
        if captioned != shards:
            raise UserError(
                f"captions/{captioner} has {len(captioned)} shards, raw/ has {len(shards)}: run caption again"
            )
    if deduplicated := exists(join(config.root, DEDUP)):
        check_fresh(config.root, shards)
    wordnet, rule = str(find_wordnet(config.wordnet, config.download_wordnet)), config.rule
    load_labeller(wordnet, rule)  # an unusable WordNet or tagger is an error now, not in a worker
    shaping = {**rule.describe(), "caption_hygiene": hygiene.VERSION, "max_caption_chars": config.max_caption_chars}
    stage = Stage("pack", "shards", {"captioner": captioner, **shaping})
    texts = Texts(captioner, wordnet, rule, config.max_caption_chars)
    work = partial(pack_shard, texts=texts, deduplicated=deduplicated)
    tasks = (Task(shard, _inputs(config.root, shard, captioner, deduplicated)) for shard in shards)
    workers = min(config.workers, len(shards))
    summary = run_stage(config.root, stage, tasks, work, total=len(shards), workers=workers, overwrite=config.overwrite)
    write_json(join(config.root, "shards", "sizes.json"), _sizes(config.root, shards))
    return summary


def _pick_captioner(config: PackConfig) -> str | None:
    if config.captioner == "none":
        return None
    there = names(join(config.root, "captions"))
    if config.captioner and config.captioner not in there:
        raise UserError(f"no captions/{config.captioner} in {config.root}; there: {there or 'none'}")
    if not config.captioner and len(there) > 1:
        raise UserError(f"several captioners in {config.root}/captions: {there}; say --captioner NAME")
    return config.captioner or (there[0] if there else None)


def _inputs(root: str, shard: int, captioner: str | None, deduplicated: bool) -> dict[str, str]:
    name = shard_name(shard)
    inputs = {f"raw/{name}.tar": file_hash(root, "raw", shard, f"raw/{name}.tar")}
    for folder in [*([f"captions/{captioner}"] if captioner else []), *([DEDUP] if deduplicated else [])]:
        inputs[f"{folder}/{name}.parquet"] = file_hash(root, folder, shard, f"{folder}/{name}.parquet")
    return inputs


def _sizes(root: str, shards: list[int]) -> dict[str, int]:
    sizes = {}
    for shard in shards:
        done = read_done(join(root, "shards"), shard)
        assert done is not None, shard
        sizes[f"{shard_name(shard)}.tar"] = done.successes
    return sizes


@dataclass(frozen=True)
class Texts:
    """What a worker does with captions: the synthetic ones to add, the rule of the synsets, the longest caption."""

    captioner: str | None
    wordnet: str
    rule: LabelRule
    max_caption_chars: int


def pack_shard(root: str, task: Task, *, texts: Texts, deduplicated: bool = False) -> Result:
    """One shard. Picture bytes are copied untouched; a sample that dedup/ names or that has no caption is left out and
    counted.

    Raises DataError when the captions or dedup's list do not belong to the raw shard.
    """
    name, captioner, label = shard_name(task.shard), texts.captioner, load_labeller(texts.wordnet, texts.rule)
    dropped = read_dropped(join(root, DEDUP, f"{name}.parquet")) if deduplicated else {}
    captions = read_captions(join(root, f"captions/{captioner}/{name}.parquet")) if captioner else None
    counts, mends, rows = Counter[str](), Counter[str](), list[dict[str, Any]]()

    def packed() -> Iterator[Sample]:
        source = join(root, f"raw/{name}.tar")
        for sample in read_shard(source):
            if captions is not None and sample.key not in captions:
                raise DataError(f"{source}: key {sample.key} has no row in captions/{captioner}; run caption again")
            synthetic = captions.pop(sample.key) if captions is not None else []
            if sample.key in dropped:
                counts[dropped.pop(sample.key)] += 1
                continue
            if captions is not None and not synthetic:  # caption writes no row without captions but for these
                counts["picture does not decode"] += 1
                continue
            row, mended = _row(sample, synthetic, source, label, texts.max_caption_chars)
            if isinstance(row, str):
                counts[row] += 1
                continue
            counts["success"] += 1
            mends.update(mended)
            rows.append(row)
            yield Sample(sample.key, _members(sample, row))

    forget(join(root, "shards"), task.shard)
    tar, table = f"shards/{name}.tar", f"shards/{name}.parquet"
    _, tar_hash = write_shard(join(root, tar), packed())
    if captions:
        raise DataError(f"captions/{captioner}/{name}.parquet: key {next(iter(captions))} is not in raw/{name}.tar")
    if dropped:
        raise DataError(f"{DEDUP}/{name}.parquet: key {next(iter(dropped))} is not in raw/{name}.tar; run dedup again")
    with atomic_writer(join(root, table)) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    outputs = {tar: tar_hash, table: sha256_file(join(root, table))}
    return Result(dict(counts), outputs, facts={f"{mend} mended": number for mend, number in sorted(mends.items())})


def read_captions(path: str) -> dict[str, list[str]]:
    """Key to synthetic captions of one shard. Raises DataError for a file that is no Parquet or repeats a key."""
    try:
        with open_read(path) as file:
            table = pq.read_table(file, columns=["key", "captions"])
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); delete it and run caption again") from error
    keys = table.column("key").to_pylist()
    captions = dict(zip(keys, table.column("captions").to_pylist(), strict=True))
    if len(captions) != len(keys):
        repeated = next(key for key, count in Counter(keys).items() if count > 1)
        raise DataError(f"{path}: key {repeated} twice; delete it and run caption again")
    return captions


def _row(
    sample: Sample, synthetic: list[str], source: str, label: Labeller, max_chars: int
) -> tuple[dict[str, Any] | str, list[str]]:
    """The sample's row of the Parquet file, or the reason why it is dropped; and the mends of its caption."""
    try:
        original, meta = hygiene.read_caption(sample), sample.meta
    except DataError as error:
        log.warning("%s: %s; dropped", source, error)
        return "caption or json does not parse", []
    caption, mends = hygiene.tidy(original)
    synthetic = [text for text in synthetic if text]
    if not caption.strip() and not synthetic:
        return (hygiene.EMPTY if original.strip() else "no caption"), mends
    if problem := caption_problem(caption, 0, max_chars, sane=False):
        return problem, mends
    row = {
        "key": sample.key,
        "caption": caption,
        "synthetic": synthetic,
        "synsets": [label.synsets(text) for text in [original, *synthetic]],
        "width": meta.get("width"),
        "height": meta.get("height"),
    }
    return row, mends


def _members(sample: Sample, row: dict[str, Any]) -> dict[str, bytes]:
    """The picture as it is, the original caption mended; json gets the captions as plain strings and the synsets."""
    synthetic = {f"syn_{i}": text for i, text in enumerate(row["synthetic"])}
    meta = {**hygiene.encodable(sample.meta), "caption": row["caption"], **synthetic, "synsets": row["synsets"]}
    extension = sample.image_extension
    return {
        extension: sample.image,
        "txt": row["caption"].encode(),
        "json": json_bytes(meta, indent=None),
    }
