"""What a raw sample becomes in a final shard: which captions stay, its synsets, its members; or why it is dropped."""

import contextlib
import gc
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.filters import caption_problem
from pipeline.core.runner import Result, Task
from pipeline.dedup.stage import read_dropped
from pipeline.labels.labeler import LabelRule, load_labeller
from pipeline.pack import caption_cleaning as hygiene
from shards_spec.files import DataError, json_bytes, remove
from shards_spec.layout import (
    DEDUP,
    RAW,
    SHARDS,
    captions_folder,
    captions_parquet,
    dedup_parquet,
    parquet_path,
    raw_tar,
    sizes_json,
    tar_path,
)
from shards_spec.parquet import read_table
from shards_spec.sample import Sample
from shards_spec.shard_writer import ShardWriter
from shards_spec.tar import read_shard

log = logging.getLogger(__name__)
DISSIMILAR = "every caption below min_similarity"  # why a sample is dropped
NEED_SIMILARITY = "--min-similarity needs the cosines that `clipmill caption ... --similarity` stores"
NOT_FINITE = "json members with NaN or Infinity of the source, null instead"
OWN_FIELD = re.compile(r"syn_(0|[1-9][0-9]*)|synsets")  # of the json member: a source's are no captions of these shards
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
class Choice:
    """Which samples and captions stay: all that decides it but the files; a worker is sent it."""

    captioners: tuple[str, ...]
    deduplicated: bool
    max_caption_chars: int
    min_similarity: float | None = None

    def inputs(self, shard: int) -> Iterator[tuple[str, str]]:
        """(folder, path) of the files that belong to a raw shard."""
        yield RAW, tar_path(RAW, shard)
        for folder in [*map(captions_folder, self.captioners), *([DEDUP] * self.deduplicated)]:
            yield folder, parquet_path(folder, shard)


@dataclass(frozen=True)
class Part:
    """Samples ``start`` to ``stop`` (None: the last one) of a raw shard; the first one lies at byte ``offset``.

    ``keys`` are those samples' keys, or None for a whole shard.
    """

    shard: int
    start: int = 0
    stop: int | None = None
    offset: int = 0
    keys: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Synthetic:
    """The captions that the captioners wrote for an image, in order, those that are left out counted.

    ``there`` is False when nobody wrote any; ``original``: whether the original caption may stay.
    """

    texts: list[str]
    there: bool = False
    left_out: int = 0
    original: bool = True


@dataclass(frozen=True, slots=True)
class Kept:
    """A sample that stays: its caption as it came and as it is stored, its synthetic captions, its json member."""

    original: str
    caption: str
    synthetic: list[str]
    meta: dict[str, Any]
    facts: list[str]


class Chooser:
    """Decides sample by sample, for one part of a raw shard. Raises DataError for captions or lists of other images.

    >>> decided = [chooser.decide(sample) for sample in samples]
    >>> chooser.end()
    """

    def __init__(self, root: str, part: Part, choice: Choice) -> None:
        """``root/raw`` is not read here."""
        self._shard, self._choice = part.shard, choice
        self._source = raw_tar(root, part.shard)
        self._dropped = dict[str, str]()
        if choice.deduplicated:
            dropped = read_dropped(dedup_parquet(root, part.shard))
            keys = dropped if part.keys is None else [key for key in part.keys if key in dropped]
            self._dropped = {key: dropped[key] for key in keys}
        paths = [captions_parquet(root, name, part.shard) for name in choice.captioners]
        self._captions = [read_captions(path, part.keys, choice.min_similarity) for path in paths]

    def decide(self, sample: Sample) -> Kept | str:
        """What stays of a sample, or the reason why it is dropped. Its image is not looked at."""
        synthetic = self._synthetic(sample.key)
        if reason := self._dropped.pop(sample.key, None):
            return reason
        if self._captions and not synthetic.there:  # caption writes no row without captions but for these
            return "picture does not decode"
        try:
            original, meta = hygiene.read_caption(sample), sample.meta
        except DataError as error:
            log.warning("%s: %s; dropped", self._source, error)
            return "caption or json does not parse"
        dissimilar = bool(original.strip()) and not synthetic.original
        original = "" if dissimilar else original
        caption, mends = hygiene.tidy(original)
        if not caption.strip() and not synthetic.texts:
            if dissimilar or synthetic.left_out:
                return DISSIMILAR
            return hygiene.EMPTY if original.strip() else "no caption"
        if problem := caption_problem(caption, 0, self._choice.max_caption_chars, sane=False):
            return problem
        facts = [f"{mend} mended" for mend in mends]
        facts += ["json members with syn_N or synsets of the source, left out"] * any(map(OWN_FIELD.fullmatch, meta))
        facts += ["original captions below min_similarity"] * dissimilar
        facts += ["synthetic captions below min_similarity"] * synthetic.left_out
        return Kept(original, caption, synthetic.texts, meta, facts)

    def end(self) -> None:
        """After the last sample: whatever is still here belongs to no image. Raises DataError."""
        for captioner, captions in zip(self._choice.captioners, self._captions, strict=True):
            if captions:
                path = parquet_path(captions_folder(captioner), self._shard)
                raise DataError(f"{path}: key {next(iter(captions))} is not in {tar_path(RAW, self._shard)}")
        if self._dropped:
            key = next(iter(self._dropped))
            path, tar = parquet_path(DEDUP, self._shard), tar_path(RAW, self._shard)
            raise DataError(f"{path}: key {key} is not in {tar}; run dedup again")

    def _synthetic(self, key: str) -> Synthetic:
        found = list[Synthetic]()
        for captioner, captions in zip(self._choice.captioners, self._captions, strict=True):
            if key not in captions:
                raise DataError(f"{self._source}: key {key} has no row in captions/{captioner}; run caption again")
            found.append(captions.pop(key))
        if len(found) == 1:
            return found[0]
        return Synthetic(
            [text for one in found for text in one.texts],
            any(one.there for one in found),
            sum(one.left_out for one in found),
            not found or any(one.original for one in found),
        )


def read_captions(path: str, keys: tuple[str, ...] | None, least: float | None) -> dict[str, Synthetic]:
    """Key to synthetic captions of one shard, empty ones left out; of ``keys`` only when they are given.

    ``least``: captions with a lower cosine are left out, too. Raises DataError for a file that is no Parquet, has not
    these columns or repeats a key.
    """
    similar = ["similarities", "original_similarity"] if least is not None else []
    table = read_table(path, ["key", "captions"], optional=similar, fix="delete it and run caption again")
    if missing := set(similar) - set(table.column_names):
        raise DataError(f"{path}: no column {max(missing)}; {NEED_SIMILARITY}")
    if keys is not None:
        table = table.filter(pc.is_in(table.column("key"), pa.array(keys, pa.string())))
    found = table.column("key").to_pylist()
    columns = [table.column(name).to_pylist() for name in ("captions", *similar)]
    if least is None:
        chosen = [Synthetic([text for text in texts if text], bool(texts)) for texts in columns[0]]
    else:
        if odd := [key for key, texts, cosines, _ in zip(found, *columns, strict=True) if len(texts) != len(cosines)]:
            raise DataError(f"{path}: key {odd[0]} has not one similarity per caption; delete it and run caption again")
        chosen = [_similar(texts, cosines, own, least) for texts, cosines, own in zip(*columns, strict=True)]
    captions = dict(zip(found, chosen, strict=True))
    if len(captions) != len(found):
        repeated = next(key for key, count in Counter(found).items() if count > 1)
        raise DataError(f"{path}: key {repeated} twice; delete it and run caption again")
    return captions


def _similar(texts: list[str], cosines: list[float | None], original: float | None, least: float) -> Synthetic:
    said = [(text, cosine) for text, cosine in zip(texts, cosines, strict=True) if text]
    kept = [text for text, cosine in said if cosine is None or cosine >= least]
    return Synthetic(kept, bool(texts), len(said) - len(kept), original is None or original >= least)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cycles meanwhile: none are made, and going through all known labels takes an eighth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def write_final_shard(root: str, task: Task, *, choice: Choice, wordnet: str, rule: LabelRule) -> Result:
    """Write the tar and the Parquet file of a final shard, made of the task's payload: its `Part` tuple, in order.

    Image bytes are copied untouched; every sample that is left out is counted. Raises DataError when captions or
    dedup's list do not belong to the raw shards.
    """
    label = load_labeller(wordnet, rule).synsets
    counts, facts = Counter[str](), Counter[str]()
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}

    def packed() -> Iterator[Sample]:
        for part in task.payload:
            chooser = Chooser(root, part, choice)
            samples = read_shard(raw_tar(root, part.shard), part.offset)
            for sample in islice(samples, part.stop and part.stop - part.start):
                kept = chooser.decide(sample)
                if isinstance(kept, str):
                    counts[kept] += 1
                    continue
                counts["success"] += 1
                synsets = [label(text) for text in (kept.original, *kept.synthetic)]
                sides = (_pixels(kept.meta.get(name)) for name in ("width", "height"))
                row = (sample.key, kept.caption, kept.synthetic, synsets, *sides)
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
                members = _members(sample, kept, synsets)
                facts.update(kept.facts)
                yield Sample(sample.key, members)
            chooser.end()

    files = ShardWriter(root, SHARDS, task.shard)
    remove(sizes_json(root))  # it says that all shards fit together
    with _uncollected():
        files.write_tar(packed())
    files.write_parquet(pa.table(columns, SCHEMA))
    return Result(dict(counts), files.outputs, counters=dict(sorted(facts.items())))


def _pixels(value: Any) -> int | None:
    """A side as the json member has it; None for what is no such number (foreign shards)."""
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else None


def _members(sample: Sample, kept: Kept, synsets: list[list[str]]) -> dict[str, bytes]:
    """The image as it is, the original caption mended; json gets the captions as plain strings and the synsets.

    Adds to the facts of ``kept`` what the json member could not keep.
    """
    ours = {"caption": kept.caption, **{f"syn_{i}": text for i, text in enumerate(kept.synthetic)}, "synsets": synsets}
    theirs = {name: value for name, value in kept.meta.items() if not OWN_FIELD.fullmatch(name)}
    try:
        meta = json_bytes({**theirs, **ours}, indent=None, strict=True)
    except ValueError as error:
        if not isinstance(error, UnicodeEncodeError):
            kept.facts.append(NOT_FINITE)
        meta = json_bytes({**hygiene.strict_json(theirs), **ours}, indent=None, strict=True)
    return {sample.image_extension: sample.image, "txt": kept.caption.encode(), "json": meta}
