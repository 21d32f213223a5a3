"""When a run used a sample: the order of samples is arithmetic, so nothing had to be recorded."""

from pathlib import Path
from typing import Any

from shards_spec.files import UserError, is_url, read_bytes
from shards_spec.messages import counted
from shards_spec.sample import Sample, parse_object
from training.config import TeacherCacheConfig
from training.data.order import BatchPlan
from training.data.samples import CaptionChoice
from training.data.selected import SamplePlace, SelectionReader, order_of
from training.data.shard_reader import ShardReader, dataset_sizes
from training.data.teacher_cache import TeacherCache, TeacherCaches
from training.runs.run_folder import RunFolder

MOST_LINES = 50  # epochs that are listed


def uses_of(run: str, root: str, places: dict[str, tuple[int, int] | None]) -> list[str]:
    """Return lines on the epochs and steps in which a run used a sample.

    Args:
        run: A RUN folder.
        root: The dataset.
        places: (shard, index) of the sample in the folders ``raw`` and ``shards``, None where it is not.

    Raises:
        UserError: The folder is no run, or not of this dataset's samples.
        DataError: The run's files or the dataset are damaged.
    """
    config = RunFolder(run).config()
    if not {"data", "streams", "window", "seed", "batch_size", "folder"} <= config.keys():
        raise UserError(f"--run {run}: recipe {config.get('recipe')!r} does not read samples by shard")
    if _absolute(config["data"]) != _absolute(root):
        raise UserError(f"--run {run} was trained on {config['data']}, not on {root}")
    folder = config["folder"]
    place = places[folder]
    sizes = dataset_sizes(root, folder)[: config.get("shards")]
    selection = SelectionReader(root, config["select"], len(sizes)) if config.get("select") else None
    order = order_of(sizes, selection, config["seed"], config["streams"], config["window"])
    checkpoint = RunFolder(run).load_newest()
    if checkpoint is not None and checkpoint["sizes_sha256"] != order.sha256:
        return [
            f"cannot be told: {folder}/, or what is selected of it, is another than when the run was trained, so its "
            "order was another one"
        ]
    if place is None:
        return [f"not used: it is not in {folder}/"]
    if place[0] >= len(sizes):
        return [f"not used: the run reads the first {counted(len(sizes), 'shard')}"]
    chosen = [SamplePlace(place[1], place[1])] if selection is None else selection.copies(*place)
    if not chosen:
        return [f"not used: it is not in the selection {config['select']}"]
    sample = ShardReader(root, folder, sizes, 1).sample(*place)
    seen, steps = _progress(Path(run) / "metrics.jsonl")
    plan = _plan(config)
    choice = CaptionChoice(config["seed"], config.get("captions") == "original" or folder == "raw")
    views = _cached_views(config, root, len(sizes))
    lines = [f"seen so far: {counted(seen, 'sample')}, {counted(steps, 'step')}, {seen / order.total:.2f} epochs"]
    for epoch in range(-(-seen // order.total)):
        for copy in chosen:
            position = order.position(epoch, place[0], copy.place)
            if position >= seen:
                lines.append(f"epoch {epoch}: not yet")
            elif epoch < MOST_LINES:
                shown = _shown(choice, sample, copy, copy.turn(epoch), views)
                lines.append(f"epoch {epoch}: step {_step(plan, position)}, {shown}")
    return lines


def _absolute(path: str) -> str:
    return path.rstrip("/") if is_url(path) else str(Path(path).resolve())


def _plan(config: dict[str, Any]) -> BatchPlan:
    sides = tuple(config.get("sides") or ())
    if not sides:
        return BatchPlan(config["batch_size"])
    return BatchPlan(config["batch_size"], sides, config["base_side"], config["batch_parts"], config["seed"])


def _step(plan: BatchPlan, position: int) -> int:
    """Return the step, from 1 as metrics.jsonl counts, whose batch has a position."""
    if not plan.sides:
        return position // plan.batch_size + 1
    step = 0
    end = 0
    while end <= position:
        end += plan.size(step)
        step += 1
    return step


def _cached_views(config: dict[str, Any], root: str, shards: int) -> int | None:
    """Return the number of the cache's views that a run repeats; None where each epoch has a new one."""
    if config.get("teacher_from") != "cache":
        return None
    names = TeacherCacheConfig(config["teacher"]).names
    return TeacherCaches([TeacherCache(root, name, shards, original_only=True) for name in names]).num_views


def _shown(choice: CaptionChoice, sample: Sample, chosen: SamplePlace, turn: int, views: int | None) -> str:
    """Return the view and the caption of a turn."""
    captions = choice.captions(sample)
    caption = choice.draw(captions, sample.key, turn, chosen.captions)
    view = turn if views is None else turn % views
    return f"view {view}, text_{caption} {captions[caption]!r}"


def _progress(metrics: Path) -> tuple[int, int]:
    """Return samples seen and steps by the last whole line of metrics.jsonl."""
    if not metrics.exists():
        raise UserError(f"{metrics} is not there: the run has not begun to train")
    for line in reversed(read_bytes(str(metrics)).splitlines()):
        try:
            values = parse_object(line)
        except ValueError:  # a killed run leaves half a line
            continue
        if "samples_seen" in values and "step" in values:
            return int(values["samples_seen"]), int(values["step"])
    return 0, 0
