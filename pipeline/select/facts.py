"""What is known of the samples and captions of a final shard, as columns that conditions name.

Nothing is read or computed before a condition asks for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from keyword import iskeyword
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards_spec.files import DataError, UserError, join, names
from shards_spec.layout import (
    CAPTIONS,
    RAW,
    SHARDS,
    TEACHER,
    captions_folder,
    captions_parquet,
    final_parquet,
    final_tar,
    parquet_path,
    raw_parquet,
    remake_advice,
    resume_advice,
    tar_path,
    teacher_folder,
)
from shards_spec.manifest import file_hash, file_hashes, read_done
from shards_spec.parquet import column_names, read_table
from shards_spec.sample import check_keys
from shards_spec.teacher_shard import TeacherShard

LANGUAGE_FACTS = ("language", "language_confidence")  # a model finds them, which takes milliseconds a caption
TEXT_FACTS = ("caption", "chars", "words", "synsets", *LANGUAGE_FACTS)
SIZE_FACTS = ("width", "height", "aspect")
SIMILARITY_FACTS = ("original_similarity", "synthetic_similarity")


@dataclass(frozen=True)
class FactSources:
    """Where facts come from: caches with captions, a captioner's similarities, the list's own columns."""

    teachers: tuple[str, ...] = ()
    captioner: str | None = None
    columns: tuple[str, ...] = ()

    @property
    def cosines(self) -> dict[str, str]:
        """Name of a column of cosines -> its teacher: ``cosine_NAME``, and ``cosine`` where there is one teacher."""
        found = {identifier(f"cosine_{teacher}"): teacher for teacher in self.teachers}
        return found | ({"cosine": self.teachers[0]} if len(self.teachers) == 1 else {})

    @property
    def of_samples(self) -> list[str]:
        """Names of the facts about samples."""
        similarities = SIMILARITY_FACTS if self.captioner else ()
        synthetic = [f"synthetic_{name}" for name in self.cosines]
        own = ["key", *TEXT_FACTS, "captions", *SIZE_FACTS, *self.cosines, *synthetic, *similarities]
        return own + [name for name in map(identifier, self.columns) if name not in own]

    @property
    def of_captions(self) -> list[str]:
        """Names of the facts about captions."""
        return ["number", *TEXT_FACTS, *self.cosines, *(("similarity",) if self.captioner else ())]

    def with_teacher(self, teacher: str) -> "FactSources":
        """These sources, a teacher's cache before the others."""
        return self if teacher in self.teachers else replace(self, teachers=(teacher, *self.teachers))

    def needed(self, sample_names: set[str], caption_names: set[str]) -> "FactSources":
        """The sources of these names alone."""
        asked = {name.removeprefix("synthetic_") for name in sample_names | caption_names}
        used = {teacher for name, teacher in self.cosines.items() if name in asked}
        has_similarity = bool(sample_names & set(SIMILARITY_FACTS)) or "similarity" in caption_names
        own = set(FactSources(self.teachers, self.captioner).of_samples)
        return FactSources(
            tuple(teacher for teacher in self.teachers if teacher in used),
            self.captioner if has_similarity else None,
            tuple(name for name in self.columns if {name, identifier(name)} & (sample_names - own)),
        )

    def column(self, name: str) -> str:
        """The column of the list that is meant by its own name or by its `identifier`."""
        found = (column for column in self.columns if identifier(column) == name)
        return name if name in self.columns else next(found, name)


def identifier(name: str) -> str:
    """The name of a cache or column as it can stand in a condition, where it has to be a name of Python."""
    plain = "".join(char if char.isalnum() else "_" for char in name)
    return plain if plain.isidentifier() and not iskeyword(plain) else f"_{plain}"


def find_sources(root: str, teachers: tuple[str, ...], captioner: str | None, shards: list[int]) -> FactSources:
    """What a dataset has: the named caches and captioner, by default each where it is the only one.

    Raises UserError for a cache or captioner that is not there or does not serve.
    """
    caches = [name for name in names(join(root, TEACHER)) if _has_captions(root, name, shards[0])]
    for teacher in teachers:
        if teacher not in caches:
            raise UserError(f"--teacher {teacher!r}: caches with captions in {root} are: {', '.join(caches) or 'none'}")
    captioners = [name for name in names(join(root, CAPTIONS)) if _has_similarities(root, name)]
    if captioner is not None and captioner not in captioners:
        there = ", ".join(captioners) or "none"
        raise UserError(
            f"--captioner {captioner!r}: captions with similarities (`clipmill caption --similarity`) are: {there}"
        )
    only = captioners[0] if len(captioners) == 1 else None
    first = raw_shards_of(root, shards[0])[:1]
    columns = list(chain.from_iterable(_raw_columns(raw_parquet(root, raw)) for raw in first))
    return FactSources(teachers or tuple(caches), captioner or only, tuple(columns))


def _raw_columns(path: str) -> list[str]:
    """The columns of a raw shard's table. Raises DataError for another table in its place: no name would match."""
    columns = column_names(path)
    for name in ("key", "status"):
        if name not in columns:
            raise DataError(f"{path}: no column {name}, so it is no table of a raw shard; {remake_advice(path)}")
    return columns


def _has_captions(root: str, name: str, shard: int) -> bool:
    if read_done(join(root, teacher_folder(name)), shard) is None:
        return False
    return TeacherShard(root, name, shard).find("text_0") is not None


def _has_similarities(root: str, name: str) -> bool:
    done = read_done(join(root, captions_folder(name)), 0)
    return done is not None and "similarities" in column_names(captions_parquet(root, name, 0))


def raw_shards_of(root: str, shard: int) -> list[int]:
    """The raw shards that a final shard was packed from, by its done-record."""
    done = read_done(join(root, SHARDS), shard)
    return [] if done is None else done.raw_shards


def shard_inputs(root: str, shard: int, sources: FactSources) -> dict[str, str]:
    """Hashes of all files that a shard's facts come from, and of the raw tars that it was packed from.

    Raises UserError where a cache has not this shard.
    """
    raws = raw_shards_of(root, shard)
    files = [(SHARDS, shard, [tar_path(SHARDS, shard), parquet_path(SHARDS, shard)])]
    for raw in raws:
        tables = [parquet_path(RAW, raw)] if sources.columns else []
        files.append((RAW, raw, [tar_path(RAW, raw), *tables]))
    if sources.captioner:
        folder = captions_folder(sources.captioner)
        files += [(folder, raw, [parquet_path(folder, raw)]) for raw in raws]
    hashes = dict[str, str]()
    for folder, number, paths in files:
        hashes |= zip(paths, file_hashes(root, folder, number, paths), strict=True)
    for teacher in sources.teachers:
        done = read_done(join(root, teacher_folder(teacher)), shard)
        if done is None:
            raise UserError(
                f"{join(root, parquet_path(teacher_folder(teacher), shard))} is not finished: "
                f"{resume_advice(join(root, teacher_folder(teacher)))}"
            )
        hashes |= done.outputs
    return hashes


class CaptionCosines:
    """A teacher's cosines of the captions of a final shard with their images, NaN where either is missing.

    Of the mean of an image's vectors over all cached views: that of one alone depends on the crop. Raises DataError
    when the cache is of another shard, or broken.
    """

    def __init__(self, root: str, teacher: str, shard: int, keys: list[str]) -> None:
        self._cached = open_cache(root, teacher, shard, keys)
        self._means = mean_views(self._cached)

    def of(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Of the captions ``number`` (0: the original one) of these samples, ascending: float32 (n,)."""
        column = f"text_{number}"
        vectors = self._cached.file(column).vectors(column).as_floats()
        means = self._means
        if len(rows) < len(means):
            means = means[rows]
            vectors = vectors[rows]
        cosines: np.ndarray = np.einsum("nd,nd->n", means, vectors.astype(np.float32, copy=False))
        return cosines


class ShardFacts:
    """The facts of one final shard.

    ``keys`` are its samples' keys in order. Its captions stand one after the other, a sample's original one first;
    ``owners`` int64 (captions,) is the sample of each and ``numbers`` int64 (captions,) its place among the sample's.

    Raises DataError when a file is broken or belongs to another shard.
    """

    def __init__(self, root: str, shard: int, sources: FactSources) -> None:
        self.root, self.shard = root, shard
        self.sources = sources
        path = final_parquet(root, shard)
        self.table = read_table(path, ["key", "caption", "synthetic", "synsets", "width", "height"])
        self.keys: list[str] = self.table.column("key").to_pylist()
        synthetic = self.table.column("synthetic").to_pylist()
        originals = self.table.column("caption").to_pylist()
        self.texts = [[own or "", *(others or [])] for own, others in zip(originals, synthetic, strict=True)]
        counts = [len(texts) for texts in self.texts]
        self.owners = np.repeat(np.arange(len(counts)), counts)
        self.numbers = np.arange(len(self.owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._samples = dict[str, pa.Array]()
        self._captions = dict[str, pa.Array]()
        self._teachers = dict[str, CaptionCosines]()

    def __len__(self) -> int:
        return len(self.keys)

    def of_samples(self, name: str) -> pa.Array:
        """A fact of each sample, null where it is not known."""
        if name not in self._samples:
            self._samples[name] = self._sample_fact(name)
        return self._samples[name]

    def of_captions(self, name: str) -> pa.Array:
        """A fact of each caption, null where it is not known."""
        if name not in self._captions:
            self._captions[name] = self._caption_fact(name)
        return self._captions[name]

    def _sample_fact(self, name: str) -> pa.Array:
        if name in TEXT_FACTS:
            synsets = [own[:1] for own in self.synsets] if name == "synsets" else []
            return _text_fact(name, [texts[0] for texts in self.texts], synsets)
        if name == "key":
            return pa.array(self.keys)
        if name == "captions":
            return pa.array([sum(bool(text.strip()) for text in texts) for texts in self.texts])
        if name == "aspect":
            sides = [self.of_samples(side).cast(pa.float64()) for side in ("width", "height")]
            return pc.divide(pc.max_element_wise(*sides), pc.min_element_wise(*sides))
        if name in SIZE_FACTS:
            return self.table.column(name).combine_chunks()
        if name.removeprefix("synthetic_") in self.sources.cosines:
            if name.startswith("synthetic_"):
                return self._best_synthetic(self._all_cosines(name.removeprefix("synthetic_")))
            return _nullable(self._cosines(name).of(0, np.arange(len(self))))
        if name in SIMILARITY_FACTS:
            values = self._similarities
            return _nullable(self._original(values)) if name == "original_similarity" else self._best_synthetic(values)
        return self._source_column(name)

    def _caption_fact(self, name: str) -> pa.Array:
        if name in TEXT_FACTS:
            synsets = [[one] for one in chain.from_iterable(self.synsets)] if name == "synsets" else []
            return _text_fact(name, list(chain.from_iterable(self.texts)), synsets)
        if name == "number":
            return pa.array(self.numbers)
        return _nullable(self._similarities if name == "similarity" else self._all_cosines(name))

    @cached_property
    def synsets(self) -> list[list[list[str]]]:
        """The synsets of each caption of each sample."""
        stored = self.table.column("synsets").to_pylist()
        padded = []
        for texts, own in zip(self.texts, stored, strict=True):
            known = list(own or [])[: len(texts)]
            padded.append(known + [[]] * (len(texts) - len(known)))
        return padded

    def _original(self, values: np.ndarray) -> np.ndarray:
        """Of a number of each caption: that of each sample's original one."""
        first: np.ndarray = values[self.numbers == 0]
        return first

    def _best_synthetic(self, values: np.ndarray) -> pa.Array:
        """Of a number of each caption: the largest of each sample's synthetic ones."""
        best = np.full(len(self), -np.inf)
        is_synthetic = (self.numbers > 0) & ~np.isnan(values)
        np.maximum.at(best, self.owners[is_synthetic], values[is_synthetic])
        return _nullable(np.where(np.isinf(best), np.nan, best))

    def _all_cosines(self, name: str) -> np.ndarray:
        """Cosine of each caption with its image, float64 (captions,); NaN where there is none."""
        cosines = np.full(len(self.owners), np.nan)
        for number in range(int(self.numbers.max(initial=-1)) + 1):
            places = np.flatnonzero(self.numbers == number)
            cosines[places] = self._cosines(name).of(number, self.owners[places])
        return cosines

    def _cosines(self, name: str) -> CaptionCosines:
        teacher = self.sources.cosines[name]
        if teacher not in self._teachers:
            self._teachers[teacher] = CaptionCosines(self.root, teacher, self.shard, self.keys)
        return self._teachers[teacher]

    @cached_property
    def _similarities(self) -> np.ndarray:
        """The captioner's cosine of each caption with its image; NaN where it has none."""
        captioner = self.sources.captioner or ""
        by_key = dict[str, tuple[float | None, dict[str, float | None]]]()
        for raw in self._raw_shards:
            table = read_table(
                captions_parquet(self.root, captioner, raw), ["key", "captions", "similarities", "original_similarity"]
            )
            for row in table.to_pylist():
                own = dict(zip(row["captions"], row["similarities"], strict=False))
                by_key[row["key"]] = row["original_similarity"], own
        values = list[float | None]()
        for key, texts in zip(self.keys, self.texts, strict=True):
            original, own = by_key.get(key, (None, {}))
            values += [original, *(own.get(text) for text in texts[1:])]
        return np.array(values, np.float64)

    @cached_property
    def _raw_shards(self) -> list[int]:
        return raw_shards_of(self.root, self.shard)

    @cached_property
    def _raw_tables(self) -> list[pa.Table]:
        """The keys of the raw shards' samples, with all columns of the list that conditions name."""
        tables = []
        for raw in self._raw_shards:
            table = read_table(raw_parquet(self.root, raw), ["key", "status"], optional=self.sources.columns)
            tables.append(table.filter(pc.equal(table.column("status"), "success")))
        return tables

    def _source_column(self, name: str) -> pa.Array:
        """A column of the list, as the raw shards keep it."""
        name = self.sources.column(name)
        tables = [table.select(["key", name]) for table in self._raw_tables if name in table.column_names]
        if not tables:
            return pa.nulls(len(self), pa.string())
        try:
            whole = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException:  # a column that did not fit one type in one of the raw shards is text there
            texts = [table.set_column(1, name, table.column(1).cast(pa.string())) for table in tables]
            whole = pa.concat_tables(texts)
        places = pc.index_in(pa.array(self.keys, pa.string()), value_set=whole.column("key").combine_chunks())
        return whole.column(name).combine_chunks().take(places)


def open_cache(root: str, teacher: str, shard: int, keys: list[str]) -> TeacherShard:
    """A teacher's cache of a final shard with these keys. Raises DataError when it is of another shard, or broken."""
    cached = TeacherShard(root, teacher, shard)
    tar = tar_path(SHARDS, shard)
    if cached.inputs.get(tar) != file_hash(root, SHARDS, shard, tar):
        advice = resume_advice(join(root, teacher_folder(teacher)))
        raise DataError(f"{cached.path}: made from another {final_tar(root, shard)}; {advice}")
    for file in cached.files:
        check_keys(file.path, file.keys, keys, remake_advice(file.path))
    return cached


def mean_views(cached: TeacherShard) -> np.ndarray:
    """float32 (n, D): the mean of each image's vectors over all cached views; NaN where it has none."""
    mean = np.zeros((len(cached.files[0]), cached.files[0].dim), np.float32)
    views = cached.config["num_views"]
    for view in range(views):
        mean += cached.file(f"image_{view}").vectors(f"image_{view}").as_floats()
    mean /= views
    return mean


def unit_rows(means: np.ndarray) -> np.ndarray:
    """Rows of vectors (n, D) at length 1; zeros where there is none, or it has no direction."""
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    is_usable = np.isfinite(lengths) & (lengths > 0)
    return np.where(is_usable, means / np.where(is_usable, lengths, 1), 0)


def _text_fact(name: str, texts: list[str], synsets: list[list[list[str]]]) -> pa.Array:
    """A fact of texts; ``synsets`` are those of each text, once, where they are asked for."""
    if name == "caption":
        return pa.array(texts, pa.string())
    if name == "chars":
        return pa.array([len(text.strip()) for text in texts], pa.int64())
    if name == "words":
        return pa.array([len(text.split()) for text in texts], pa.int64())
    if name == "synsets":
        return pa.array([len(set(chain.from_iterable(own))) for own in synsets], pa.int64())
    languages = [_language(text) for text in texts]
    if name == "language":
        return pa.array([language for language, _ in languages], pa.string())
    return pa.array([confidence for _, confidence in languages], pa.float64())


def _language(text: str) -> tuple[str | None, float | None]:
    """ISO 639-1 code of a text's language and how sure that is, 0 to 1; None for a text without letters."""
    if not any(map(str.isalpha, text)):
        return None, None
    language, confidence = _identify()(text)
    return language, float(confidence)


@lru_cache(1)
def _identify() -> Callable[[str], tuple[Any, Any]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identify: Callable[[str], tuple[Any, Any]] = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True
    ).classify
    return identify


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float64(), mask=np.isnan(values))
