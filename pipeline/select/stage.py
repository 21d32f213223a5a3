"""Stage `select`: final shards and what is known of them → ROOT/select/NAME, which `train` and `pack` obey.

Nothing is rewritten: a selection is a list beside each final shard.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from pipeline.core.runner import (
    ALL,
    RunOptions,
    ShardAssignment,
    ShardResult,
    ShardTask,
    Stage,
    Summary,
    read_compatible_record,
    run_stage,
    upstream_shards,
)
from pipeline.core.workers import workers_for
from pipeline.select.against import index_of
from pipeline.select.against_cosine import CosineRule
from pipeline.select.config import SelectConfig
from pipeline.select.dataset_rules import DatasetRules
from pipeline.select.export_list import check_export, export_list
from pipeline.select.expression import FactCondition, check_names
from pipeline.select.facts import LANGUAGE_FACTS, FactSources, ShardFacts, find_sources, shard_inputs
from pipeline.select.sample_lists import NAMES, SampleList, read_sample_list
from pipeline.select.sample_rules import SampleRules, Weights
from pipeline.select.semantic_duplicates import DuplicateRule
from pipeline.select.survey import Survey
from shards_spec.files import UserError, join, sha256_json
from shards_spec.layout import SHARDS, final_parquet, select_folder
from shards_spec.manifest import read_dataset
from shards_spec.messages import flag
from shards_spec.parquet import read_table
from shards_spec.selection import (
    ALL_SAMPLES,
    CAPTIONS_LEFT_OUT,
    CAPTIONS_OF,
    COPIES,
    ShardSelection,
    captions_of,
    survey_fingerprint,
    write_selection,
)
from shards_spec.suggest import did_you_mean


def select(config: SelectConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage. Raises UserError, ShardsFailed."""
    root, name = config.root, config.name
    shards = upstream_shards(root, SHARDS, "pack")
    packed = read_dataset(root)["stages"].get("pack", {}).get("config", {})
    if packed.get("select") == name:
        raise UserError(f"--name {name}: `clipmill pack --select {name}` made these shards by it; take another name")
    available = find_sources(root, config.teacher, config.captioner, shards)
    if config.export_list is not None:
        check_export(config.export_list, config.export_by, root, available)
    with (
        tempfile.TemporaryDirectory(prefix="clipmill-select-") as folder,
        index_of(config.against, root, config.workers, _cosine_rule(config, available)) as against,
    ):
        dataset_rules = _dataset_rules(config, available)
        rules = replace(_sample_rules(config, available, folder), against=against)
        if dataset_rules.duplicates is not None:
            rules = replace(rules, sources=rules.sources.with_teacher(dataset_rules.duplicates.teacher))
        if against is not None and against.embeddings is not None:
            rules = replace(rules, sources=rules.sources.with_teacher(against.embeddings.rule.teacher))
        identity = {**rules.describe(), **dataset_rules.describe(), CAPTIONS_OF: captions_of(packed)}
        stage = Stage(f"select/{name}", select_folder(name), identity)
        options = RunOptions(
            workers=workers_of(config, len(shards)),
            assignment=assignment,
            overwrite=config.overwrite,
            total=len(shards),
        )
        if dataset_rules:
            summary = _select_by_survey(root, stage, rules, dataset_rules=dataset_rules, shards=shards, options=options)
        else:
            Survey(root, name).remove()  # of an earlier run that did not end
            work = partial(select_shard, name=name, rules=rules)
            summary = run_stage(root, stage, _tasks(root, shards, rules.sources, assignment), work, options)
    if config.export_list is not None and assignment.is_complete:
        export_list(root, name, shards, path=config.export_list, by=config.export_by)
    return summary


def _select_by_survey(
    root: str,
    stage: Stage,
    rules: SampleRules,
    *,
    dataset_rules: DatasetRules,
    shards: list[int],
    options: RunOptions,
) -> Summary:
    """Run the stage in two passes: what a rule says of one sample depends on all of them."""
    name = stage.folder.removeprefix(select_folder(""))
    assignment = options.assignment
    everything = list(_tasks(root, shards, rules.sources, ALL))
    fingerprint = survey_fingerprint(stage.config, [task.inputs for task in everything])
    survey = Survey(root, name, dataset_rules, sha256_json(stage.config), fingerprint)
    tasks = [ShardTask(task.shard, task.inputs | {ALL_SAMPLES: fingerprint}) for task in everything]
    if options.overwrite or any(not _is_finished(root, stage, task) for task in tasks):
        survey.make(rules, everything, options.workers, wait=assignment is not ALL)
    summary = run_stage(root, stage, tasks, partial(select_surveyed_shard, survey=survey), options)
    if assignment.is_complete:
        survey.remove()
    return summary


def _is_finished(root: str, stage: Stage, task: ShardTask) -> bool:
    done = read_compatible_record(join(root, stage.folder), stage, task.shard)
    return done is not None and done.inputs == task.inputs


def workers_of(config: SelectConfig, shards: int) -> int:
    """How many processes are worth their start: all where a rule takes milliseconds a sample, few for tables."""
    names = _names_of_samples(config) | _names(config.caption_conditions)
    is_slow = bool(config.against) or not names.isdisjoint(LANGUAGE_FACTS)
    return min(config.workers, shards) if is_slow else workers_for(shards, config.workers)


def _dataset_rules(config: SelectConfig, available: FactSources) -> DatasetRules:
    duplicates = None
    if config.semantic_duplicates is not None:
        teacher = _one_teacher(config, available, "semantic_duplicates")
        duplicates = DuplicateRule(teacher, config.semantic_duplicates, config.cells)
    return DatasetRules(duplicates, config.top, config.by, config.balance, config.seed)


def _cosine_rule(config: SelectConfig, available: FactSources) -> CosineRule | None:
    if config.against_cosine is None:
        return None
    teacher = _one_teacher(config, available, "against_cosine")
    return CosineRule(teacher, config.against_cosine, config.against_model)


def _one_teacher(config: SelectConfig, available: FactSources, field: str) -> str:
    """The cache whose embeddings a rule compares: the first that was named, or the only one. Raises UserError."""
    teachers = available.teachers
    if not teachers or (len(teachers) > 1 and not config.teacher):
        there = ", ".join(teachers) or "none"
        raise UserError(
            f"{flag(field)} compares the embeddings of one teacher, there are: {there}; say --teacher NAME, or run "
            f"`clipmill cache {config.root}` first"
        )
    return teachers[0]


def _sample_rules(config: SelectConfig, available: FactSources, folder: str) -> SampleRules:
    """The rules for one sample at a time; lists are kept in a folder while the stage runs."""
    conditions, caption_conditions = config.conditions, config.caption_conditions
    check_names(conditions, available.of_samples, "of samples")
    check_names(caption_conditions, available.of_captions, "of captions")
    if config.by is not None:
        _check_fact("--by", config.by, available)
    weights = config.weights
    if weights is not None:
        check_names((weights,), available.of_samples, "of samples")
    names = _names_of_samples(config)
    if config.from_ or config.drop:
        names |= {*NAMES} & {*available.columns}
    return SampleRules(
        conditions,
        caption_conditions,
        available.needed(names, _names(caption_conditions)),
        only=_list(config.from_, "from_", folder),
        without=_list(config.drop, "drop", folder),
        weights=None if weights is None else Weights(weights, config.seed),
    )


def _check_fact(option: str, name: str, available: FactSources) -> None:
    if name not in available.of_samples and name not in available.columns:
        raise UserError(f"{option} {name}: no fact of that name; {did_you_mean(name, available.of_samples)}")


def _list(paths: tuple[str, ...], field: str, folder: str) -> SampleList | None:
    return read_sample_list(paths, flag(field), folder) if paths else None


def _names_of_samples(config: SelectConfig) -> set[str]:
    """The facts of samples that conditions, weights and --by read."""
    by = set() if config.by is None else {config.by}
    weights = set() if config.weights is None else config.weights.names()
    return _names(config.conditions) | weights | by


def _names(conditions: tuple[FactCondition, ...]) -> set[str]:
    return set[str]().union(*(condition.names() for condition in conditions))


def _tasks(root: str, shards: list[int], sources: FactSources, assignment: ShardAssignment) -> Iterator[ShardTask]:
    for shard in filter(assignment.claim, shards):
        yield ShardTask(shard, shard_inputs(root, shard, sources))


def select_shard(root: str, task: ShardTask, *, name: str, rules: SampleRules) -> ShardResult:
    """Write the selection of one final shard. Raises DataError when a file is broken or of another shard."""
    return _write(root, name, task.shard, rules.apply(ShardFacts(root, task.shard, rules.sources)))


def select_surveyed_shard(root: str, task: ShardTask, *, survey: Survey) -> ShardResult:
    """Write the selection of one final shard from its draft. Raises DataError when that is broken."""
    verdict = survey.verdict
    draft = survey.draft(task.shard, verdict.repeated)
    return _write(root, survey.name, task.shard, verdict.apply(draft, survey.rules))


def _write(root: str, name: str, shard: int, selection: ShardSelection) -> ShardResult:
    outputs = write_selection(root, name, shard, selection)
    counts = Counter(reason for reason in selection.reasons if reason is not None)
    counts["success"] = int((selection.copies > 0).sum())
    counters = {COPIES: int(selection.copies.sum(dtype=np.int64))}
    if left_out := _captions_left_out(root, shard, selection):
        counters[CAPTIONS_LEFT_OUT] = left_out
    return ShardResult(dict(+counts), outputs, counters=counters)


def _captions_left_out(root: str, shard: int, selection: ShardSelection) -> int:
    """The captions of samples that stay that are not shown. Raises DataError for a broken table of the shard."""
    if all(shown is None for shown in selection.captions):
        return 0
    left_out = 0
    table = read_table(final_parquet(root, shard), ["caption", "synthetic"])
    for row, shown in zip(table.to_pylist(), selection.captions, strict=True):
        if shown is not None:
            texts = [row["caption"] or "", *(row["synthetic"] or [])]
            left_out += sum(bool(text.strip()) for text in texts) - len(shown)
    return left_out
