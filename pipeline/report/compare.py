"""`clipmill compare`: one self-contained HTML page about several training runs."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any

import tyro

from pipeline.report import check_page_path, render, write_page
from pipeline.report.axes import short, total
from pipeline.report.chain import has_begun, joined, stage_folders
from pipeline.report.compare_charts import ComparedRun, ResultKey, all_results, curve_views, scatter_charts
from pipeline.report.methods import MethodTable, group_methods, mean_runs, method_table
from pipeline.report.results import Evaluations, metric_name, results_of_runs, share_text
from pipeline.report.run import (
    RunFiles,
    cost_rows,
    duration,
    parameter_counts,
    read_run,
    state,
)
from pipeline.report.samples import thumbnail
from pipeline.report.text import flatten
from shards_spec.files import DataError, UserError, exists, is_url
from shards_spec.messages import require
from shards_spec.predictions import Guesses

UNKNOWN = "–"
ALWAYS_DIFFERENT = ("out",)  # fields of a config that no two runs share
FieldRows = list[tuple[str, list[str]]]
PARTS = {"total": "Parameters", "image": "image tower", "text": "text tower", "embedding": "token embeddings"}


@dataclass(frozen=True)
class CompareConfig:
    """Write one self-contained HTML page that compares training runs: curves, results, cost, differences of configs."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")]
    """RUN folders of any recipes, also unfinished ones, and folders of trainings in stages"""
    output: str = "compare.html"
    """where to write the page"""
    baseline: str = ""
    """the run, or the name that runs of several seeds share, whose accuracy at the end the others' samples are counted
    to"""
    results: tuple[str, ...] = ()
    """folders of `clipmill eval --output`, whose results of these runs count where RUN/eval has none"""
    markdown: str = ""
    """file for the table of methods, in Markdown"""
    data: str = ""
    """EVAL root, as `clipmill eval` takes it: the page then shows what the runs say of some of its images"""
    images: int = 8
    """images of --data that are shown, evenly over the set"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N, for --data"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("compare: RUN is needed: one RUN folder or more")
        require(self.images >= 1, "images", self.images, "1 or more")


def compare(config: CompareConfig, guesses: Guesses | None = None) -> str:
    """Write the page and return its path.

    Args:
        config: The runs, and where to write.
        guesses: What the runs say of some images, for `CompareConfig.data`.

    Raises:
        UserError: A folder is no run, one is named twice, or the page cannot be written.
    """
    check_page_path(config.output, "--output")
    if config.markdown:
        check_page_path(config.markdown, "--markdown")
    problems = list[str]()
    runs = read_runs(config.runs, results_of_runs(config.results, problems))
    methods = method_table(runs, config.baseline)
    if config.markdown and methods is None:
        raise UserError(
            "--markdown: each run is a method of its own; name runs of several seeds (NAME-0 NAME-1) or a --baseline"
        )
    page = compare_page(runs, guesses, methods)
    page["problems"] += problems
    write_page(config.output, render("compare.html.j2", {"page": page}), "--output")
    if methods is not None and config.markdown:
        write_page(config.markdown, methods.markdown(), "--markdown")
    return config.output


def read_runs(paths: Sequence[str], more: Mapping[str, Evaluations] | None = None) -> list[ComparedRun]:
    """Read the runs; a training in stages counts as one, with the results and the config of its last stage.

    ``more`` has results by the real paths of runs, which count where a run's own folder has none. Raises UserError when
    a folder is no run, or one is named twice.
    """
    more = more or {}
    real = [path if is_url(path) else os.path.realpath(path) for path in paths]
    for index, path in enumerate(real):
        if path in real[:index]:
            raise UserError(
                f"{paths[index]} is named twice ({paths[real.index(path)]} is the same folder): name it once"
            )
    runs = []
    for index, (path, name) in enumerate(zip(paths, short_names(real), strict=True)):
        folders = [path] if has_begun(path) else stage_folders(path)
        if not folders:
            missing = "is not there" if not exists(path) else "has no config.json, no metrics.jsonl and no stage-1"
            raise UserError(f"{path} {missing}: give the folders that `clipmill train` wrote")
        stages = [with_results(read_run(folder), more.get(os.path.realpath(folder))) for folder in folders]
        columns = stages[0].columns if len(stages) == 1 else joined(stages)[0]
        runs.append(ComparedRun(index + 1, name, path, stages[-1], columns))
    return runs


def with_results(run: RunFiles, more: Evaluations | None) -> RunFiles:
    """A run with results from elsewhere, where its own folder has none of them."""
    if more is None:
        return run
    own = run.evaluations
    both = own._replace(
        values=more.values | own.values, cost=own.cost or more.cost, onnx_cost=own.onnx_cost or more.onnx_cost
    )
    return replace(run, evaluations=both)


def run_folders(paths: Sequence[str]) -> dict[str, str]:
    """The folder with the newest checkpoints of each run: of a training in stages that of its last stage."""
    return {one.path: one.run.path for one in read_runs(paths)}


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them are in."""
    parts = [path.rstrip("/").split("/") for path in paths]
    shared = 0
    while all(len(own) > shared + 1 and own[shared] == parts[0][shared] for own in parts):
        shared += 1
    return ["/".join(own[shared:]) for own in parts]


def compare_page(
    runs: Sequence[ComparedRun], guesses: Guesses | None = None, methods: MethodTable | None = None
) -> dict[str, Any]:
    """The variables of the template."""
    values = all_results(runs)
    differences, others = _differences(runs)
    problems = list(chain.from_iterable(one.run.problems for one in runs))
    return {
        "runs": [(one, _summary(one)) for one in runs],
        "results": _result_rows(runs, values),
        "methods": methods,
        "costs": _cost_table(runs),
        "scatter": scatter_charts(*(mean_runs(group_methods(runs)) if methods else (runs, values))),
        "views": curve_views(runs),
        "differences": differences,
        "other_fields": others,
        "guesses": guesses,
        "images": _images(guesses, problems),
        "problems": problems,
    }


def _summary(one: ComparedRun) -> list[tuple[str, str]]:
    """A row of the table of runs: (column, text)."""
    config = one.run.config
    last = {name: float(values[-1]) for name, values in one.columns.items() if len(values)}

    def logged(name: str) -> str:
        return total(round(last[name])) if math.isfinite(last.get(name, math.nan)) else UNKNOWN

    parameters = parameter_counts(one.run).get("total")
    batch, seconds = config.get("batch_size"), last.get("seconds", math.nan)
    return [
        ("Recipe", str(config.get("recipe") or UNKNOWN)),
        ("Model", str(config.get("model") or UNKNOWN)),
        ("Parameters", short(parameters) if parameters else UNKNOWN),
        ("Batch", f"{batch:,}" if isinstance(batch, int) else UNKNOWN),
        ("Steps", logged("step")),
        ("Samples seen", logged("samples_seen")),
        ("Time", duration(seconds) if math.isfinite(seconds) else UNKNOWN),
        ("State", state(one.run) or UNKNOWN),
    ]


def _result_rows(
    runs: Sequence[ComparedRun], values: dict[str, dict[ResultKey, float]]
) -> list[tuple[str, str, list[tuple[str, bool]]]]:
    """(dataset, metric, per run the text and whether it is the best of several), what most runs have first."""
    keys = dict.fromkeys(chain.from_iterable(values.values()))
    rows = []
    for dataset, task, metric in sorted(keys, key=lambda key: -sum(key in own for own in values.values())):
        numbers = [values[one.path].get((dataset, task, metric), math.nan) for one in runs]
        finite = [value for value in numbers if math.isfinite(value)]
        if finite:
            best = max(finite) if len(finite) > 1 else math.inf
            rows.append(
                (
                    f"{dataset}, {task.replace('_', ' ')}",
                    metric_name(metric),
                    [(share_text(value), value == best) for value in numbers],
                )
            )
    return rows


def _cost_table(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """(what, per run the text), of parameters and of what `clipmill eval --cost` measured."""
    columns = []
    for one in runs:
        counts = parameter_counts(one.run)
        own = {label: short(counts[part], 4) for part, label in PARTS.items() if counts.get(part)}
        measured = one.run.evaluations
        columns.append(own | dict(cost_rows(measured.cost) + cost_rows(measured.onnx_cost)))
    rows = dict.fromkeys(chain.from_iterable(columns))
    return [(row, [own.get(row, UNKNOWN) for own in columns]) for row in rows]


def _differences(runs: Sequence[ComparedRun]) -> tuple[FieldRows, FieldRows]:
    """(field, per run the value) of what differs: of fields that all recipes have, and of the others."""
    configs = [{field: text or UNKNOWN for field, text in flatten(one.run.config)} for one in runs]
    rows, others = FieldRows(), FieldRows()
    for field in dict.fromkeys(chain.from_iterable(configs)):
        texts = [own.get(field, UNKNOWN) for own in configs]
        if field not in ALWAYS_DIFFERENT and len(set(texts)) > 1:
            (rows if all(field in own for own in configs) else others).append((field, texts))
    return rows, others


def _images(guesses: Guesses | None, problems: list[str]) -> list[str | None]:
    """The images of guesses as data URIs; None, and a problem, for one that does not decode."""
    drawn = list[str | None]()
    for one in guesses.images if guesses else []:
        try:
            drawn.append(thumbnail(one.image)[0])
        except DataError as error:
            problems.append(f"key {one.key}: {error}")
            drawn.append(None)
    return drawn
