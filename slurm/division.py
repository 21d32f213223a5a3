"""How a stage's shards are divided between the tasks of an array."""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from shards_spec.files import UserError, join
from shards_spec.layout import CHECK, SUBMITTED
from shards_spec.manifest import finished_shards
from slurm.jobs import Ranges
from slurm.step import Step
from slurm.submission import submissions


class Division(NamedTuple):
    """``folder`` is what the array fills below ROOT (`StageInfo.array_folder`); None where one job does it all.

    ``ranges`` are each task's shards, empty where their number is not known: then the tasks take what they find.
    ``total`` is how many shards there will be, None where it is not known.
    """

    folder: str | None
    ranges: list[Ranges]
    total: int | None


def divide(step: Step, chained: bool, shards: int | None, jobs_dir: Path) -> Division:
    """Divide what is missing; a step that is ``chained`` comes after one of ``shards`` shards. Raises UserError."""
    folder = step.array_folder
    if folder is None:
        return Division(None, [()], None)
    if getattr(step.config, "overwrite", False):  # not every stage has it
        raise UserError(f"--overwrite is for one process: delete {join(step.root, folder)} first, then submit without")
    if step.command == "ingest":
        total = _source_shards(step.config)
    elif step.command == CHECK.name:
        total = None if chained or step.options.after else _checked_shards(step.root)
    elif chained:
        total = shards
    else:
        total = _upstream_shards(step, jobs_dir)
    if total is None:
        return Division(folder, [()] * step.options.array, None)
    if _has_all_results(step, total):
        return Division(None, [()], total)
    done = set() if step.options.recheck else set(finished_shards(join(step.root, folder)))
    missing = [shard for shard in range(total) if shard not in done]
    if not missing:
        print(f"{step.command}: all {total} shards are there; --recheck checks each of them")
        return Division(folder, [], total)
    tasks = min(step.options.array, len(missing))
    cuts = [len(missing) * task // tasks for task in range(tasks + 1)]
    return Division(folder, [as_ranges(missing[start:stop]) for start, stop in pairwise(cuts)], total)


def _has_all_results(step: Step, total: int) -> bool:
    """Whether a stage that sums up parts has made its own shards: one job sees that they are as they should be."""
    stage = SUBMITTED[step.command]
    if not stage.parts or not stage.has_shards or step.options.recheck:
        return False
    return finished_shards(join(step.root, stage.writes)) == list(range(total))


def as_ranges(shards: list[int]) -> Ranges:
    """Ascending numbers as (first, behind the last) of each run without gaps."""
    ranges: list[tuple[int, int]] = []
    for shard in shards:
        if ranges and ranges[-1][1] == shard:
            ranges[-1] = (ranges[-1][0], shard + 1)
        else:
            ranges.append((shard, shard + 1))
    return tuple(ranges)


def _source_shards(config: Any) -> int | None:
    from pipeline.ingest.stage import source_shards

    return source_shards(config)


def upstream_folder(step: Step, division: Division) -> str | None:
    """The folder whose shards an array takes; None where only the stage itself knows how many there are."""
    stage = SUBMITTED[step.command]
    if stage is CHECK and division.total is not None:
        from pipeline.check.divided import longest_folder

        return longest_folder(step.root)[0]
    return join(step.root, stage.reads_folder) if stage.reads else None


def _checked_shards(root: str) -> int:
    from pipeline.check.divided import longest_folder

    return longest_folder(root)[1]


def _upstream_shards(step: Step, jobs_dir: Path) -> int | None:
    """How many shards the stage before has made, or will have when the jobs that this step waits for have ended."""
    from pipeline.core.runner import upstream_shards

    stage = SUBMITTED[step.command]
    assert stage.reads is not None, "only ingest and check read no other stage"
    if step.options.after:
        before = submissions(jobs_dir)
        known = [one.shards for one in before if one.folder == stage.reads_folder and one.shards is not None]
        return known[-1] if known else None
    return len(upstream_shards(step.root, stage.reads_folder, stage.reads))
