"""`clipmill plan`: what every stage will take on this machine, computed from a probe of a minute.

Measured here: how many of a list's first rows succeed and what their images weigh, a core's speed (a rendered view
against the core on which all costs were measured; the other costs are taken to go with it), and the device's ceiling.
The jobs of a GPU keep up the share of the ceiling that they kept up on the card of `rates.json`. Assumed: the network.
"""

import os
import shlex
import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from pipeline.core.workers import usable_cores
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.stage import source_form
from pipeline.plan.config import PlanConfig
from pipeline.plan.costs import ASSUMED_SHARE, Costs
from pipeline.plan.estimate import Choices, Corpus, Gpu, Hardware, StageCost, stage_costs
from pipeline.plan.probe import (
    FirstRows,
    device_ceiling,
    stored_images,
    try_first_rows,
    view_milliseconds,
)
from pipeline.plan.rates import RATES, read_rates
from shards_spec.files import UserError, exists, is_url, join, read_json
from shards_spec.layout import RAW, SHARDS, STAGES, stats_path, tar_path
from shards_spec.manifest import read_dataset, shard_ids
from shards_spec.messages import counted

SHARD_SIZE = 1000  # of `ingest` by default
MUCH_DISK = 0.9  # share of the free space above which the plan does not fit
PROBED_SHARDS = 3
SHRINK = "fewer --views, --dtype int8, or a smaller --image-size of ingest"


@dataclass
class PlannedData:
    """What a plan is of.

    ``costs`` has what is known of an image, ``images`` (key, encoded image) are probed, ``facts`` are lines for people,
    ``done`` the bytes of each stage that has been run (0 on an object store).
    """

    corpus: Corpus
    costs: Costs
    images: list[tuple[str, bytes]]
    facts: list[str]
    done: dict[str, float] = field(default_factory=dict)


def plan(config: PlanConfig) -> str:
    """Return the plan as text.

    Raises:
        UserError: There is no such dataset or source, or it has no samples.
        DataError: A shard of the dataset is damaged.
    """
    is_dataset = exists(join(config.source, RAW)) or exists(join(config.source, SHARDS))
    data = _dataset(config.source) if is_dataset else _source(config)
    milliseconds = view_milliseconds(data.images, config.views)
    costs = Costs()
    slower = 1.0 if milliseconds is None else milliseconds / costs.view_ms
    cores = config.cores or usable_cores()
    device, ceiling = device_ceiling(config.device)
    gpu = Gpu(ceiling, ASSUMED_SHARE * ceiling, None if device == "CPU" else read_rates(RATES))
    choices = Choices(config.views, config.captions, config.dtype == "int8", config.epochs)
    stages = stage_costs(data.corpus, choices, cores, _on_this_core(data.costs, slower))
    unused = {"caption"} if config.captions == 0 else set[str]()
    trainings = {f"train {config.student}"}
    chosen = [
        stage
        for stage in stages
        if stage.name not in unused and (not stage.name.startswith("train ") or stage.name in trainings)
    ]
    speed = "costs of a core as measured elsewhere" if milliseconds is None else f"a view takes {milliseconds:.2f} ms"
    facts = [
        *data.facts,
        f"this machine: {counted(cores, 'core')}, {speed}; {device}, {ceiling / 1e12:.3g} TFLOP/s",
    ]
    hardware = Hardware(gpu, cores, config.gbit)
    lines = [*facts, "", *_table(chosen, hardware, data.done), "", *_advice(config, chosen, data.done)]
    return "\n".join([*lines, "", *_commands(config, is_dataset, data.done)])


def _on_this_core(costs: Costs, slower: float) -> Costs:
    """Costs with milliseconds that are so many times longer."""
    names = [own.name for own in fields(costs) if own.name.endswith("_ms")]
    times = {name: getattr(costs, name) * slower for name in names}
    return replace(costs, rows_per_s=costs.rows_per_s / slower, **times)


def _source(config: PlanConfig) -> PlannedData:
    """A source, by its size and its first rows."""
    form = source_form(config.ingest("clipmill-plan"))
    estimate = estimate_rows(config.source, form)
    if estimate is None:
        raise UserError(f"{config.source}: only reading all of it would tell how many rows it has; ingest it first")
    rows, is_exact = estimate
    if not rows:
        raise UserError(f"{config.source} has no row; nothing to plan")
    first = try_first_rows(config, form)
    facts = [f"{config.source}: {form}, {'' if is_exact else 'about '}{counted(rows, 'row')}"]
    share = 1.0
    costs = Costs()
    if first is None:
        facts.append("no row was tried (--probe-rows 0): all are taken to succeed, with images as assumed")
    else:
        facts.append(_first_rows_line(first))
        share = first.samples / max(first.rows, 1)
        if first.images:
            costs = replace(costs, image=first.image_bytes)
    if not share:
        raise UserError(
            f"none of the first {counted(first.rows if first else 0, 'row')} of {config.source} became a sample, most "
            f"often {first.most_frequent_reason if first else ''!r}: see docs/troubleshooting.md, or plan without them "
            "by --probe-rows 0"
        )
    corpus = Corpus(config.source, rows, round(rows * share), SHARD_SIZE)
    return PlannedData(corpus, costs, first.images if first else [], facts)


def _first_rows_line(first: FirstRows) -> str:
    lost = f", else most often {first.most_frequent_reason}" if first.most_frequent_reason else ""
    return (
        f"its first {counted(first.rows, 'row')}: {counted(first.samples, 'sample')} "
        f"({first.samples / max(first.rows, 1):.1%}) in {first.seconds:.0f} s, {first.image_bytes / 1e3:.1f} kB an "
        f"image{lost}"
    )


def _dataset(root: str) -> PlannedData:
    """A dataset, by its records and its first shards."""
    folder = RAW if exists(join(root, RAW)) else SHARDS
    shards = shard_ids(join(root, folder))
    if not shards:
        raise UserError(f"{join(root, folder)} has no finished shards: run `clipmill ingest {root}` to its end first")
    records = [read_json(stats_path(join(root, folder), shard)) for shard in shards]
    rows = sum(record["count"] for record in records)
    samples = sum(record["successes"] for record in records)
    if not samples:
        raise UserError(f"{root} has no sample in {folder}/; nothing to plan")
    images = stored_images([tar_path(join(root, folder), shard) for shard in shards[:PROBED_SHARDS]])
    mean = sum(len(data) for _, data in images) / max(len(images), 1)
    corpus = Corpus(root, rows, samples, -(-rows // len(shards)))
    facts = [f"{root}: {counted(samples, 'sample')} in {counted(len(shards), 'shard')}, {mean / 1e3:.1f} kB an image"]
    data = PlannedData(corpus, replace(Costs(), image=mean), images, facts)
    for block in read_dataset(root)["stages"]:
        kind, _, name = block.partition("/")
        if kind in STAGES:
            data.done[kind] = data.done.get(kind, 0.0) + _bytes_below(root, STAGES[kind].folder(name))
    return data


def _bytes_below(root: str, folder: str) -> float:
    """Bytes of a stage's folder or file; 0 on an object store."""
    path = Path(root, folder)
    if is_url(root):
        return 0.0
    if path.is_file():
        return path.stat().st_size
    return float(sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file()))


def _table(stages: list[StageCost], hardware: Hardware, done: dict[str, float]) -> list[str]:
    """A line per stage, and their sums."""
    lines = [f"{'':20}{'hours':>10}{'GB':>10}  set by"]
    hours = 0.0
    size = 0.0
    for stage in stages:
        if stage.name in done:
            size += done[stage.name]
            lines.append(f"{stage.name:20}{'done':>10}{done[stage.name] / 1e9:>10.1f}")
            continue
        took, limit = stage.hours(hardware)
        hours += took
        size += stage.written
        reason = f"device, its share of the ceiling {hardware.gpu.basis(stage.jobs)}" if limit == "GPU" else limit
        lines.append(f"{stage.name:20}{took:>10.2f}{stage.written / 1e9:>10.1f}  {reason}")
    return [*lines, f"{'together':20}{hours:>10.2f}{size / 1e9:>10.1f}"]


def _advice(config: PlanConfig, stages: list[StageCost], done: dict[str, float]) -> list[str]:
    """What does not fit, and what the figures rest on."""
    place = Path.cwd() if is_url(config.source) or not os.path.isdir(config.source) else Path(config.source)
    free = shutil.disk_usage(place).free
    needed = sum(stage.written for stage in stages if stage.name not in done)
    lines = [f"free on the disk of {place}: {free / 1e9:.0f} GB, still to be written: {needed / 1e9:.1f} GB"]
    if needed > MUCH_DISK * free:
        lines.append(f"that does not fit: {SHRINK}, or another disk")
    lines.append(
        f"assumed: {config.gbit:g} Gbit/s of network; shares of a ceiling are those measured on one card, "
        f"{ASSUMED_SHARE:g} where none was measured (as on a CPU)"
    )
    return lines


def _commands(config: PlanConfig, is_dataset: bool, done: dict[str, float]) -> list[str]:
    """The commands that are left, in order."""
    root = shlex.quote(config.source) if is_dataset else "ROOT"
    private = " --allow-private" if config.allow_private else ""
    every = {
        "ingest": f"clipmill ingest {root} --source {shlex.quote(config.source)}{private}",
        "dedup": f"clipmill dedup {root}",
        "caption": f"clipmill caption {root} --num-captions {config.captions}",
        "pack": f"clipmill pack {root} --download-wordnet",
        "vocab": f"clipmill vocab {root}",
        "cache": f"clipmill cache {root} --views {config.views} --ops 2 --dtype {config.dtype}",
    }
    if not config.captions:
        del every["caption"]
    due = {stage for stage in every if stage not in done}
    if due & {"dedup", "caption"}:  # only pack brings what they find into the shards
        due.add("pack")
    left = [command for stage, command in every.items() if stage in due]
    train = f"clipmill train tinyclip --data {root} --model {config.student} --epochs {config.epochs}"
    return [*left, f"clipmill check {root}", f"{train} --out {shlex.quote(f'runs/{Path(config.source).stem}')}"]
