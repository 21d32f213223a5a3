"""Stages after `ingest` run again for the shards that are broken or stale, by the settings of their records."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.cut import cut_teacher_shard
from pipeline.cache.export_lists import export_lists
from pipeline.cache.stage import cache, cache_identity, remove_stale_files
from pipeline.caption.stage import caption, caption_identity
from pipeline.check.config import CheckConfig
from pipeline.core.model_choice import recorded_models
from pipeline.core.runner import ShardsFailed
from pipeline.core.taken_down import counters_of_rest
from pipeline.dedup.drop_list import hash_raw_shards
from pipeline.dedup.stage import dedup
from pipeline.labels.labeler import load_labeler
from pipeline.labels.wordnet import find_wordnet
from pipeline.pack.stage import pack
from pipeline.repair.folder import STOP_WORDS, Folder
from pipeline.repair.raw import RefusedError
from pipeline.repair.recorded import file_sha256, is_gone, sound_record
from pipeline.repair.settings import (
    Record,
    cache_config,
    caption_config,
    command_line,
    dedup_config,
    label_rule,
    pack_config,
    select_config,
)
from pipeline.select.stage import select
from shards_spec.files import DataError, UserError, exists, join, read_bytes, remove, write_bytes
from shards_spec.layout import RAW, STAGE_FOLDER, final_tar, parquet_path, stage_output, stats_path, tar_path
from shards_spec.manifest import Done, file_hash, finished_shards, read_done
from shards_spec.parquet import read_table, write_table
from shards_spec.tar import shard_keys

UNPROVEN = ("logit_scale", "logit_bias")  # of a teacher's identity: floats that another device may compute otherwise


def stale_shards(root: str, key: str) -> list[int]:
    """The whole shards of a stage that were made of other files than those that are there now.

    None of the selection by which `pack` made the final shards: it is of those that were there before.
    """
    packed = sound_record(root, "pack", 0)
    if packed is not None and key == f"select/{packed.config.get('select')}":
        return []
    shards = finished_shards(join(root, stage_output(key) or ""))
    records = {shard: done for shard in shards if (done := sound_record(root, key, shard)) is not None}
    if key == "dedup":
        try:
            inputs = {"raw": hash_raw_shards(root, finished_shards(join(root, RAW)))}
        except (DataError, OSError):
            return []  # a raw shard is broken, which has been said
        return [shard for shard, done in records.items() if done.inputs != inputs]
    return [shard for shard, done in records.items() if key != "ingest" and _is_stale(root, done)]


def _is_stale(root: str, done: Done) -> bool:
    inputs = {path: digest for path, digest in done.inputs.items() if "/" in path}
    gone = {folder for folder in {path.rpartition("/")[0] for path in inputs} if is_gone(root, folder)}
    return any(
        _hash_now(root, path) != digest for path, digest in inputs.items() if path.rpartition("/")[0] not in gone
    )


def _hash_now(root: str, path: str) -> str | None:
    """The hash of an input as it is now: by its stage's record, else of its bytes."""
    folder, _, name = path.rpartition("/")
    digits = name.partition(".")[0].partition("-")[0]
    if STAGE_FOLDER.fullmatch(f"{root}/{folder}") and digits.isdigit():
        with contextlib.suppress(DataError, OSError):
            return file_hash(root, folder, int(digits), path)
    return file_sha256(join(root, path))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Around work on a stage: its errors are reasons to refuse the repair."""
    try:
        yield
    except (UserError, DataError, ShardsFailed, OSError, KeyError, TypeError, ValueError) as error:
        raise RefusedError(str(error) or type(error).__name__) from error


class Remaker:
    """Runs the stages of one dataset again."""

    def __init__(self, config: CheckConfig, folder: Folder) -> None:
        self._config = config
        self._root = config.root
        self._folder = folder

    def prepare(self, key: str, record: Record) -> Callable[[], Any]:
        """What runs a stage by the settings of its records; nothing is written yet.

        Raises RefusedError when it cannot be run here.
        """
        kind, _, name = key.partition("/")
        stages: dict[str, Callable[[str, Record], Callable[[], Any]]] = {
            "dedup": self._dedup,
            "caption": self._caption,
            "pack": self._pack,
            "cache": self._cache,
            "cache-lists": self._lists,
            "select": self._select,
        }
        if kind not in stages:
            raise RefusedError("run its stage again")
        with _refusals():
            return stages[kind](name, record)

    def run(self, stage: Callable[[], Any], broken: list[tuple[str, int]]) -> None:
        """Run a stage that makes the ``broken`` shards (folder and number) again, and those that are stale.

        Raises RefusedError when that fails; records of shards that were not made are there again then.
        """
        records = [stats_path(join(self._root, folder), shard) for folder, shard in broken]
        saved = {path: read_bytes(path) for path in records if exists(path) and not os.path.isdir(path)}
        for path in records:
            if os.path.isdir(path):
                self._folder.move_away(path.removeprefix(f"{self._root.rstrip('/')}/"))
            remove(path)
        try:
            with _refusals():
                stage()
        finally:
            for path, data in saved.items():
                if not exists(path):  # it still says how the shard was made
                    write_bytes(path, data)

    def _dedup(self, _: str, record: Record) -> Callable[[], Any]:
        config = dedup_config(self._root, record)
        return lambda: dedup(config)

    def _pack(self, _: str, record: Record) -> Callable[[], Any]:
        config = pack_config(self._root, record, self._folder.path(STOP_WORDS))
        load_labeler(str(find_wordnet(config.wordnet, config.download_wordnet)), label_rule(record))

        def run() -> None:
            if config.stop_words == self._folder.path(STOP_WORDS):
                write_bytes(config.stop_words, "\n".join(record["stop_words"]).encode())
            pack(config)

        return run

    def _lists(self, name: str, _: Record) -> Callable[[], Any]:
        return lambda: export_lists(self._root, name, overwrite=False)

    def _select(self, name: str, record: Record) -> Callable[[], Any]:
        config = select_config(self._root, name, record)
        return lambda: select(config)

    def _caption(self, name: str, record: Record) -> Callable[[], Any]:
        _refuse_others("caption", name, record)

        def make(model: str) -> Any:
            return caption_config(self._root, name, record, model, self._config.device)

        config = self._with_model("caption", record, make, caption_identity)
        return lambda: caption(config)

    def _cache(self, name: str, record: Record) -> Callable[[], Any]:
        _refuse_others("cache", name, record)

        def make(model: str) -> Any:
            return cache_config(self._root, name, record, model, self._config.device)

        config = self._with_model("cache", record, make, cache_identity)
        return lambda: cache(config)

    def _with_model(
        self, command: str, record: Record, make: Callable[[str], Any], identify: Callable[[Any], Record]
    ) -> Any:
        """The config whose model is the recorded one, by the hash of its weights. Raises UserError."""
        reasons = list[str]()
        for model in recorded_models(record, self._config.models):
            config = make(model)
            try:
                identity = identify(config)
            except UserError as error:
                reasons.append(str(error))
                continue
            differing = [
                field for field, value in identity.items() if field not in UNPROVEN and record.get(field) != value
            ]
            if not differing:
                return config
            reasons.append(f"{model} differs in {', '.join(differing)}")
        named = recorded_models(record, ())[-1]
        if record.get("library", "open_clip") == "open_clip" and record["pretrained"] is None:
            named = f"local-dir:PATH/{named}"  # a record has no path, and no weights belong to a bare name
        line = command_line(command, make(named))
        raise UserError(
            f"its model is not at hand ({'; '.join(reasons)}); name it with --models, or delete the shard's record and "
            f"run `{line}` where it is"
        )


def _refuse_others(command: str, name: str, record: Record) -> None:
    """Raise UserError for what no model of ours made: its files or its server are not in the record."""
    if record.get("weights_sha256") is None:
        raise UserError(
            f"it is of others; delete the shard's record and run `clipmill {command} --name {name}` again with the "
            "options that it had (--from or --server)"
        )


def cut_captions(root: str, key: str, store: Folder) -> list[int]:
    """Shorten captions of changed raw shards to the samples that stay, where the journal vouches for their images.

    Returns the shards. No model is needed, and the captions that stay are unchanged.
    """
    folder, journal = stage_output(key) or "", store.journal()
    cut = list[int]()
    for shard in stale_shards(root, key):
        done = sound_record(root, key, shard)
        change = journal.get(str(shard))
        path, tar = parquet_path(folder, shard), tar_path(RAW, shard)
        if done is None or change is None or done.inputs.get(tar) not in change["before"]:
            continue
        if file_sha256(join(root, path)) != done.outputs.get(path):
            continue
        keys = shard_keys(join(root, tar))
        table = read_table(join(root, path))
        stored = table.column("key").to_pylist()
        if set(change["changed"]) & set(keys) or not set(keys) <= set(stored):
            continue
        rest = table.take([stored.index(sample) for sample in keys])
        digest = write_table(join(store.scratch, path), rest)
        inputs = {tar: file_hash(root, RAW, shard, tar)}
        store.publish(_cut_record(done, rest, inputs, {path: digest}), folder)
        cut.append(shard)
    return cut


def _cut_record(done: Done, table: pa.Table, inputs: dict[str, str], outputs: dict[str, str]) -> Done:
    """The record of captions that were cut to the rows of a table; what was counted as they were written stays."""
    lengths = pc.list_value_length(table.column("captions"))
    empty = pc.sum(pc.equal(lengths, 0)).as_py() or 0
    counts = {"success": len(table) - empty, "picture does not decode": empty}
    return Done(
        stage=done.stage,
        shard=done.shard,
        config=done.config,
        counts={reason: number for reason, number in counts.items() if number},
        inputs=inputs,
        outputs=outputs,
        counters=counters_of_rest(done.counters, pc.sum(lengths).as_py() or 0),
    )


def _stale_with_samples(root: str, key: str) -> list[int]:
    """The stale shards of a cache whose final shards are there."""
    return [shard for shard in stale_shards(root, key) if exists(final_tar(root, shard))]


def cuttable_caches(root: str, key: str) -> list[int]:
    """The shards that `cut_caches` would bring up to date; nothing below ROOT is written."""
    with tempfile.TemporaryDirectory() as scratch:
        return [
            shard
            for shard in _stale_with_samples(root, key)
            if cut_teacher_shard(root, key.partition("/")[2], shard, scratch) is not None
        ]


def cut_caches(root: str, key: str, store: Folder) -> list[int]:
    """Bring caches up to date whose shards lost samples and have nothing new, without a model; returns the shards."""
    folder = stage_output(key) or ""
    cut = list[int]()
    for shard in _stale_with_samples(root, key):
        before = read_done(join(root, folder), shard)
        done = cut_teacher_shard(root, key.partition("/")[2], shard, store.scratch)
        if before is not None and done is not None:
            store.publish(done, folder)
            remove_stale_files(root, folder, shard, done.outputs, before.outputs)
            cut.append(shard)
    return cut
