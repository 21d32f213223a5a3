"""The life of one sample: its rows of the list, and what every stage made of it or why it left it out.

Nothing is kept beside the dataset for it. The sample is looked for in the key columns of the Parquet files, one shard
at a time; a sample that `pack` dropped is selected again by pack's own rules, as its done-record has them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from pipeline.pack.selection import SampleSelector, SelectionConfig, ShardRange
from pipeline.why.config import WhyConfig
from shards_spec.files import DataError, UserError, exists, join, names
from shards_spec.layout import (
    CAPTIONS,
    RAW,
    SELECT,
    SHARDS,
    TEACHER,
    VOCAB,
    captions_parquet,
    dataset_json,
    dedup_parquet,
    final_parquet,
    final_tar,
    plan_parquet,
    raw_parquet,
    raw_tar,
    shard_name,
    stats_path,
    vocabulary_tsv,
)
from shards_spec.manifest import finished_shards, read_dataset, read_done, shard_ids
from shards_spec.messages import counted
from shards_spec.parquet import open_parquet, read_table
from shards_spec.selection import read_selection
from shards_spec.soft_labels import SoftLabelFormat, format_of
from shards_spec.tar import read_shard, shard_keys
from shards_spec.teacher_shard import TeacherShard
from shards_spec.vocab import read_vocabulary

Row = dict[str, Any]
MOST_CLASSES_SHOWN = 5


@dataclass
class SampleLife:
    """What is known of a sample.

    ``lines`` are text for people. ``raw`` and ``final`` are (shard, index in its tar), None where it is not.
    """

    key: str
    lines: list[str] = field(default_factory=list)
    raw: tuple[int, int] | None = None
    final: tuple[int, int] | None = None

    def add(self, heading: str, *facts: str) -> None:
        """A heading and its facts, a line each."""
        self.lines.append(heading)
        self.lines += [f"  {fact}" for fact in facts]


def why(config: WhyConfig) -> SampleLife:
    """Follow a sample through a dataset.

    Raises:
        UserError: There is no dataset, or it has no such key or link.
        DataError: A file is damaged.
    """
    root = config.root
    if not exists(join(root, RAW)) and not exists(join(root, SHARDS)):
        raise UserError(f"{root}: no raw/ and no shards/ in it; it is not a clipmill dataset")
    key = config.key
    rows = list(_raw_rows(root, "key", key))
    if not rows:
        rows = list(_raw_rows(root, "url", key))
        keys = list(dict.fromkeys(row["key"] for _, _, row in rows))
        if len(keys) > 1:
            raise UserError(f"{key!r} is the link of {counted(len(keys), 'row')}: give one of the keys {keys[:20]}")
        key = keys[0] if keys else key
    life = SampleLife(key)
    life.final = _find_final(root, key)
    if not rows and life.final is None:
        raise UserError(f"{root} has no sample or row of the key or link {config.key!r}")
    if exists(dataset_json(root)):
        life.add(f"source: {read_dataset(root).get('source')}")
    for shard, number, row in rows:
        _tell_row(life, root, shard, number, row)
    if life.raw is not None:
        _tell_duplicate(life, root, life.raw[0])
        _tell_captions(life, root, life.raw[0])
    if life.final is not None:
        _tell_final(life, root, *life.final)
        _tell_teachers(life, root, *life.final)
        _tell_selections(life, root, *life.final)
    elif life.raw is not None:
        life.add("pack", _reason_of_pack(root, life.key, *life.raw))
    return life


def _raw_rows(root: str, column: str, value: str) -> Iterator[tuple[int, int, Row]]:
    """(shard, row number, row) of all rows of the list with a value: a key that was tried again has several."""
    for shard in shard_ids(join(root, RAW)) if exists(join(root, RAW)) else []:
        path = raw_parquet(root, shard)
        with open_parquet(path) as file:
            if column not in file.schema_arrow.names:
                continue
            found = _places(file.read([column]).column(0).to_pylist(), value)
            rows = file.read().take(found).to_pylist() if found else []
        for number, row in zip(found, rows, strict=True):
            yield shard, number, row


def _places(values: list[Any], value: str) -> list[int]:
    return [number for number, other in enumerate(values) if other == value]


def _find_final(root: str, key: str) -> tuple[int, int] | None:
    """(shard, row) of a key in final shards; that which the key's digits name is looked at first."""
    if not exists(join(root, SHARDS)):
        return None
    shards = finished_shards(join(root, SHARDS))
    for shard in sorted(shards, key=lambda shard: not key.startswith(shard_name(shard))):
        found = _places(read_table(final_parquet(root, shard), ["key"]).column("key").to_pylist(), key)
        if found:
            return shard, found[0]
    return None


def _tell_row(life: SampleLife, root: str, shard: int, number: int, row: Row) -> None:
    """A row of the list: where it came from, and what the download came to."""
    status = row.get("status")
    facts = [f"{name}: {row[name]}" for name in ("url", "caption") if row.get(name) is not None]
    if status == "success":
        index = _place_in_tar(root, shard, life.key)
        if index is None:
            facts.append(f"success, but {raw_tar(root, shard)} does not have it: run `clipmill check {root}`")
        else:
            life.raw = (shard, index)
            facts.append(f"taken: {raw_tar(root, shard)}, sample {index}")
    else:
        facts.append(f"left out: {status}, {row.get('error_message') or 'no reason recorded'}")
    shown = {"key", "url", "caption", "status", "error_message", "exif"}
    others = {name: value for name, value in row.items() if name not in shown and value is not None}
    if others:
        facts.append(", ".join(f"{name} {value}" for name, value in others.items()))
    life.add(f"ingest: row {number} of {raw_parquet(root, shard)}", *facts)


def _place_in_tar(root: str, shard: int, key: str) -> int | None:
    return next(iter(_places(shard_keys(raw_tar(root, shard)), key)), None)


def _tell_duplicate(life: SampleLife, root: str, shard: int) -> None:
    """What dedup says of a sample of a raw shard."""
    path = dedup_parquet(root, shard)
    if not exists(path):
        return
    table = read_table(path, ["key", "reason", "kept"])
    rows = [row for row in table.to_pylist() if row["key"] == life.key]
    facts = [f"{row['reason']}, {_kept_instead(row['kept'])}" for row in rows] or ["no duplicate of an earlier sample"]
    life.add("dedup", *facts)


def _kept_instead(key: str) -> str:
    return f"{key} stays instead" if key else "what stayed instead was taken down"


def _tell_captions(life: SampleLife, root: str, shard: int) -> None:
    """The synthetic captions of each captioner, and how likely and similar it found them."""
    for captioner in names(join(root, CAPTIONS)):
        path = captions_parquet(root, captioner, shard)
        if not exists(path):
            life.add(f"caption/{captioner}", f"{path} is not there yet")
            continue
        rows = [row for row in read_table(path).to_pylist() if row["key"] == life.key]
        if not rows:
            raise DataError(f"{path}: no row of key {life.key}; run caption again")
        life.add(f"caption/{captioner}", *_caption_facts(rows[0]))


def _caption_facts(row: Row) -> list[str]:
    if row.get("reason") is not None:
        return [f"no captions: {row['reason']}"]
    cosines = row.get("similarities") or [None] * len(row["captions"])
    parts = zip(row["captions"], row["logprobs"], row["num_tokens"], cosines, strict=True)
    facts = []
    for number, (text, logprob, tokens, cosine) in enumerate(parts):
        measured = [] if logprob is None else [f"{logprob / max(tokens, 1):.2f} nats a token"]
        similar = [] if cosine is None else [f"cosine {cosine:.3f}"]
        known = ", ".join([*measured, *similar])
        facts.append(f"{number}: {text!r}" + (f" ({known})" if known else ""))
    if row.get("original_similarity") is not None:
        facts.append(f"original caption: cosine {row['original_similarity']:.3f}")
    return facts or ["no captions: the image does not decode"]


def _reason_of_pack(root: str, key: str, shard: int, index: int) -> str:
    """Why a raw sample is in no final shard."""
    plan = plan_parquet(root, shard)
    if exists(plan):
        for row in read_table(plan, ["key", "reason"]).to_pylist():
            if row["key"] == key:
                return f"dropped: {row['reason']}" if row["reason"] else f"stays; run `clipmill pack {root}` to its end"
    done = read_done(join(root, SHARDS), 0) if exists(join(root, SHARDS)) else None
    if done is None:
        return f"not packed yet: `clipmill pack {root}` does it"
    selection = SelectionConfig.of_record(root, done.config)
    selector = SampleSelector(root, ShardRange(shard, keys=(key,)), selection)
    outcome = selector.select(next(islice(read_shard(raw_tar(root, shard)), index, None)))
    stays = f"stays by pack's rules, but is in no final shard: run `clipmill pack {root}` again"
    return f"dropped: {outcome}" if isinstance(outcome, str) else stays


def _tell_final(life: SampleLife, root: str, shard: int, index: int) -> None:
    """Captions and synsets as packed."""
    row = read_table(final_parquet(root, shard)).slice(index, 1).to_pylist()[0]
    lemmas = _lemmas(root)
    facts = [f"{final_tar(root, shard)}, sample {index}"]
    for number, text in enumerate([row["caption"], *(row["synthetic"] or [])]):
        synsets = row["synsets"][number] if row.get("synsets") else []
        labels = ", ".join(f"{wnid} {lemmas[wnid]}" if wnid in lemmas else wnid for wnid in synsets)
        facts.append(f"text_{number}: {text!r}" + (f" [{labels}]" if labels else ""))
    life.add("pack", *facts)


def _lemmas(root: str) -> dict[str, str]:
    """WNID to lemma and class index of each vocabulary, for those that have one."""
    found = dict[str, str]()
    for name in names(join(root, VOCAB)):
        if name.endswith(".tsv"):
            vocabulary = read_vocabulary(vocabulary_tsv(root, name.removesuffix(".tsv")))
            for rank, (wnid, lemma, *_) in enumerate(vocabulary.rows):
                place = f"{name.removesuffix('.tsv')} {rank}"
                found[wnid] = f"{found[wnid]}, {place}" if wnid in found else f"{lemma}, {place}"
    return {wnid: f"({text})" for wnid, text in found.items()}


def _tell_teachers(life: SampleLife, root: str, shard: int, index: int) -> None:
    """Cosines of the cached views with each caption, by every teacher."""
    for teacher in names(join(root, TEACHER)):
        heading = f"cache/{teacher}"
        if read_done(join(root, TEACHER, teacher), shard) is None:
            life.add(heading, f"not finished: {stats_path(join(root, TEACHER, teacher), shard)} is not there")
            continue
        cached = TeacherShard(root, teacher, shard)
        if cached.files[0].keys[index] != life.key:
            raise DataError(f"{cached.path}: row {index} is key {cached.files[0].keys[index]}, not {life.key}")
        count = cached.config["num_views"]
        soft = format_of(cached.path, cached.config)
        facts = _cosines(cached, count, index) if soft is None else _most_probable(cached, soft, count, index)
        life.add(heading, f"row {index} of {cached.path}, {counted(count, 'view')}", *facts)


def _tell_selections(life: SampleLife, root: str, shard: int, index: int) -> None:
    """Whether each selection has it, and with which captions."""
    for name in names(join(root, SELECT)):
        heading = f"select/{name}"
        if read_done(join(root, SELECT, name), shard) is None:
            life.add(heading, f"not finished: {stats_path(join(root, SELECT, name), shard)} is not there")
            continue
        selection = read_selection(root, name, shard)
        if index >= len(selection.keys) or selection.keys[index] != life.key:
            life.add(heading, "made from other shards than those there")
            continue
        copies = int(selection.copies[index])
        fact = f"left out: {selection.reasons[index]}" if not copies else "selected"
        if copies > 1:
            fact = f"selected, {copies} times an epoch"
        if selection.pairs and selection.pairs[index]:
            fact += f" ({selection.pairs[index]})"
        shown = selection.captions[index]
        captions = [] if shown is None else [f"shows {', '.join(f'text_{number}' for number in shown)} only"]
        life.add(heading, fact, *captions)


def _cosines(cached: TeacherShard, count: int, index: int) -> list[str]:
    """The mean, least and largest cosine of all views with each caption."""
    views = np.stack([_vector(cached, f"image_{view}", index) for view in range(count)])
    if np.isnan(views).any():
        return ["no vectors: the source of this imported cache had none, training leaves the sample out"]
    facts = []
    for number in range(cached.captions):
        text = _vector(cached, f"text_{number}", index)
        if not np.isnan(text).any():
            cosines = views @ text
            facts.append(f"text_{number}: cosine {cosines.mean():.3f} ({cosines.min():.3f} to {cosines.max():.3f})")
    return facts


def _most_probable(cached: TeacherShard, soft: SoftLabelFormat, count: int, index: int) -> list[str]:
    """The most probable classes, by the mean of all views."""
    stored = [cached.file(f"soft_{view}").stored_row(f"soft_{view}", index) for view in range(count)]
    mean = soft.distributions(np.stack([row for row in stored if row is not None])).mean(axis=0)
    names = cached.files[0].meta.get("class_names")
    best = np.argsort(-mean, kind="stable")[:MOST_CLASSES_SHOWN]
    return [f"class {names[place] if names else place}: {mean[place]:.3f}" for place in best.tolist()]


def _vector(cached: TeacherShard, column: str, index: int) -> np.ndarray:
    """(D,) float32; NaN where the sample has no such caption."""
    return cached.file(column).row(column, index).astype(np.float32)
