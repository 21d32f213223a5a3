"""Stage `pack`: raw shard + captions + synsets → final shard. The only stage after ingest that writes images.

Raw shard i becomes final shard i. With a shard size, the samples that stay become shards of equal size (`reshard`).
Raw shards at the end of which no sample stays make no final shards: the last final shard counts their losses.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from pipeline.core.runner import (
    ALL,
    RunOptions,
    ShardAssignment,
    ShardTask,
    Stage,
    Summary,
    read_compatible_record,
    run_stage,
    upstream_shards,
)
from pipeline.dedup.drop_list import check_fresh
from pipeline.labels.labeler import load_labeler
from pipeline.labels.wordnet import find_wordnet
from pipeline.pack import caption_cleaning
from pipeline.pack.applied_selection import find_applied_selection, require_samples
from pipeline.pack.config import PackConfig
from pipeline.pack.final_shard import write_final_shard
from pipeline.pack.reshard import file_hashes_of, final_shard_tasks, forget_plan, plan
from pipeline.pack.selection import NEED_SIMILARITY, SelectionConfig, ShardRange
from shards_spec.class_names import CLASS_LIST, class_list_hash, read_labelled_classes
from shards_spec.files import DataError, UserError, exists, join, names, write_json
from shards_spec.layout import (
    CAPTIONS,
    DEDUP,
    RAW,
    SHARDS,
    captions_folder,
    captions_parquet,
    shard_name,
    sizes_json,
    stats_path,
    tar_path,
)
from shards_spec.lock import locked
from shards_spec.manifest import finished_shards, read_done
from shards_spec.messages import counted
from shards_spec.parquet import column_names
from shards_spec.selection import captions_of

log = logging.getLogger(__name__)
LOCK = ".pack.lock"  # below ROOT


def pack(config: PackConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage and write ``shards/sizes.json``.

    With a shard size only `ALL` can be the assignment: where a final shard begins depends on all raw ones. Raises
    UserError, also when another process runs the stage on this ROOT, and ShardsFailed.
    """
    shards = upstream_shards(config.root, RAW, "ingest")
    if assignment is not ALL:  # its claims keep it apart from others
        return _pack(config, assignment, shards)
    with locked(join(config.root, LOCK), join(config.root, SHARDS)):
        return _pack(config, assignment, shards)


def _pack(config: PackConfig, assignment: ShardAssignment, shards: list[int]) -> Summary:
    root = config.root
    selection = _selection(config, shards)
    wordnet = str(find_wordnet(config.wordnet, config.download_wordnet))
    rule = config.rule
    load_labeler(wordnet, rule)  # an unusable WordNet or tagger is an error now, not in a worker
    captioner, limits = _selection_record(selection)
    size = {} if config.shard_size is None else {"shard_size": config.shard_size}
    classes = read_labelled_classes(root, "ingest")
    labels = {} if classes is None else {CLASS_LIST: class_list_hash(classes)}
    stage = Stage("pack", SHARDS, {**captioner, **rule.describe(), **limits, **size, **labels})
    if not config.overwrite:
        read_compatible_record(join(root, SHARDS), stage, 0)  # an error now, before a plan is made
    if config.shard_size is None:
        forget_plan(root)
        last = _last_final_shard(root, shards, selection)
        tasks: Iterable[ShardTask] = _one_to_one(root, shards, selection, assignment, last)
        total = last + 1
    else:
        planned = plan(
            root,
            shards,
            selection,
            config={**captioner, **limits},
            workers=config.workers,
            overwrite=config.overwrite,
        )
        tasks = final_shard_tasks(root, shards, selection, config.shard_size)
        total = max(1, -(-planned.counts.get("success", 0) // config.shard_size))
    work = partial(
        write_final_shard,
        selection=selection,
        wordnet=wordnet,
        rule=rule,
        classes=None if classes is None else len(classes),
    )
    options = RunOptions(
        workers=min(config.workers, total), assignment=assignment, overwrite=config.overwrite, total=total
    )
    summary = run_stage(root, stage, tasks, work, options)
    if not assignment.is_complete:
        return summary
    sizes = final_sizes(root, summary.shards)
    if config.shard_size is None:
        last = max((shard for shard, size in enumerate(sizes.values()) if size), default=0)
        # a dataset that an earlier version finished with empty shards at its end has sizes.json, and keeps them
        if last + 1 < len(sizes) and not exists(sizes_json(root)):
            tasks = _one_to_one(root, shards, selection, ALL, last)
            options = RunOptions(workers=min(config.workers, last + 1), total=last + 1)
            again = run_stage(root, stage, tasks, work, options)
            summary = replace(again, made=min(summary.made, again.shards), seconds=summary.seconds)
            sizes = final_sizes(root, last + 1)
        _warn_of_empty(sizes)
    write_json(sizes_json(root), sizes)
    return summary


def _warn_of_empty(sizes: dict[str, int]) -> None:
    if empty := [name for name, size in sizes.items() if not size]:
        log.warning(
            "pack: %s without a sample (first: %s), kept so that shard numbers have no gaps. Some readers refuse such "
            "shards (Megatron-Energon; datasets without features= when the first shard is empty): --shard-size makes "
            "none",
            counted(len(empty), "final shard"),
            empty[0],
        )


def _last_final_shard(root: str, shards: list[int], selection: SelectionConfig) -> int:
    """The number of the last final shard.

    It is that of the last raw shard, unless an earlier run found that no sample stays of the raw shards behind a
    certain one, and those are still the same.
    """
    finished = finished_shards(join(root, SHARDS))
    done = read_done(join(root, SHARDS), finished[-1]) if finished else None
    if done is None or finished[-1] >= shards[-1] or tar_path(RAW, shards[-1]) not in done.inputs:
        return shards[-1]
    merged = _merged(root, shards[finished[-1] :], selection)
    return finished[-1] if done.inputs == merged.inputs else shards[-1]


def _one_to_one(
    root: str, shards: list[int], selection: SelectionConfig, assignment: ShardAssignment, last: int
) -> Iterator[ShardTask]:
    """A task per raw shard of the assignment up to ``last``; the last one takes in those behind, which are empty."""
    for shard in filter(assignment.claim, shards[: last + 1]):
        yield _merged(root, shards[last:] if shard == last else [shard], selection)


def _merged(root: str, shards: list[int], selection: SelectionConfig) -> ShardTask:
    """One final shard of several raw ones."""
    inputs = dict[str, str]()
    for shard in shards:
        inputs |= file_hashes_of(root, shard, selection)
    return ShardTask(shards[0], inputs, tuple(map(ShardRange, shards)))


def _selection(config: PackConfig, shards: list[int]) -> SelectionConfig:
    """What stays, once captions and dedup's lists are there for every raw shard. Raises UserError when they are not."""
    captioners = _pick_captioners(config)
    for name in captioners:
        captioned = upstream_shards(config.root, captions_folder(name), f"caption/{name}")
        if captioned != shards:
            raise UserError(
                f"captions/{name} has {counted(len(captioned), 'shard')}, raw/ has {len(shards)}: run caption again"
            )
    if config.min_similarity is not None:
        _check_similarities(config, captioners, shards)
    deduplicated = exists(join(config.root, DEDUP))
    if deduplicated:
        check_fresh(config.root, shards)
    selection = SelectionConfig(captioners, deduplicated, config.max_caption_chars, config.min_similarity)
    if config.select is None:
        return selection
    captioner, limits = _selection_record(selection)
    applied = find_applied_selection(config.root, config.select, captions_of(captioner | limits))
    require_samples(config.root, config.select)
    return replace(selection, applied=applied)


def _selection_record(selection: SelectionConfig) -> tuple[dict[str, object], dict[str, object]]:
    """The settings that decide which samples and captions stay: the captioners, and the rest."""
    captioners = selection.captioners
    captioner = captioners[0] if len(captioners) == 1 else list(captioners) or None
    limits: dict[str, object] = {
        "caption_hygiene": caption_cleaning.RULES_VERSION,
        "max_caption_chars": selection.max_caption_chars,
    }
    if selection.min_similarity is not None:
        limits["min_similarity"] = selection.min_similarity
    if selection.applied is not None:
        limits["select"] = selection.applied.name
    return {"captioner": captioner}, limits


def _pick_captioners(config: PackConfig) -> tuple[str, ...]:
    if config.captioner == ("none",):
        return ()
    available = names(join(config.root, CAPTIONS))
    if unknown := [name for name in config.captioner if name not in available]:
        hint = " ('none' cannot be combined with others)" if "none" in unknown else ""
        raise UserError(f"no captions/{unknown[0]} in {config.root}; available: {available or 'none'}{hint}")
    if len(set(config.captioner)) < len(config.captioner):
        raise UserError(f"--captioner {' '.join(config.captioner)}: name each once")
    if not config.captioner and len(available) > 1:
        raise UserError(
            f"several captioners in {config.root}/captions: {available}; say --captioner NAME, or several names"
        )
    return config.captioner or tuple(available)


def _check_similarities(config: PackConfig, captioners: tuple[str, ...], shards: list[int]) -> None:
    if not captioners:
        raise UserError(f"{NEED_SIMILARITY}, and no captions are packed; leave it out")
    for name in captioners:
        path = captions_parquet(config.root, name, shards[0])
        with contextlib.suppress(DataError):  # a broken file is reported by its shard
            if "similarities" not in column_names(path):
                raise UserError(f"captions/{name} has no column similarities: {NEED_SIMILARITY}")


def final_sizes(root: str, total: int) -> dict[str, int]:
    """Number of samples of each final shard, by the name of its tar. Raises UserError for a shard without a record."""
    sizes = dict[str, int]()
    for shard in range(total):
        done = read_done(join(root, SHARDS), shard)
        if done is None:
            raise UserError(
                f"{stats_path(join(root, SHARDS), shard)} is gone: does another pack run on this ROOT? Run this one "
                "again when it has ended"
            )
        sizes[f"{shard_name(shard)}.tar"] = done.successes
    return sizes
