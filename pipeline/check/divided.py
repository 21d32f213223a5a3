"""`clipmill submit check`: the parts of a check by the tasks of an array, and their sum by the job after it."""

import contextlib
import logging
import os
from collections.abc import Iterator

from pipeline.check.config import CheckConfig, CheckJobConfig, CheckRunConfig
from pipeline.check.parts import PartWriter, read_part
from pipeline.check.stage import DatasetParts, begin, check, sum_up
from pipeline.check.validators import shard_folders
from pipeline.core.runner import ALL, RunOptions, ShardAssignment, ShardsFailed, ShardTask, Stage, Summary, run_stage
from shards_spec.files import UserError, join, sha256_json
from shards_spec.layout import CHECK
from shards_spec.manifest import finished_shards, remove_parts
from shards_spec.messages import counted

log = logging.getLogger(__name__)
PROBLEMS_TOLD = 20  # as the reason that a job failed; its log has all


class ProblemsFound(ShardsFailed):
    """The dataset is not valid. The message has the first problems."""


def longest_folder(root: str) -> tuple[str, int]:
    """The folder with the most shards, and their number, which is that of the parts. Raises UserError without any."""
    folders = [join(root, shard_folder.folder) for shard_folder in shard_folders(root)]
    last = {folder: shards[-1] for folder in folders if (shards := finished_shards(folder))}
    if not last:
        raise UserError(f"{root}: no finished shards in it; it is not a clipmill dataset")
    longest = max(last, key=lambda folder: last[folder])
    return longest, last[longest] + 1


def check_array(config: CheckJobConfig, assignment: ShardAssignment = ALL) -> Summary | None:
    """Check the shards of the assignment and write their parts below ROOT; sum all up where they are complete.

    Without an assignment, check everything, and write nothing. Returns what was done of an assignment of some shards.
    Raises ProblemsFound when the dataset is not valid.
    """
    if not isinstance(config, CheckRunConfig):
        _report(config.root, check(CheckConfig(config.root, workers=config.workers)))
        return None
    root, folder = config.root, CHECK.folder(config.label)
    findings, blocks = begin(root)
    whole = DatasetParts(root, blocks)
    options = RunOptions(
        workers=whole.processes(config.workers), assignment=assignment, total=len(whole.shards), totals=False
    )
    stage, work = Stage(CHECK.name, folder, {}), PartWriter(whole.check, folder)
    summary = run_stage(root, stage, _tasks(whole, config.run, assignment), work, options)
    if assignment.is_complete:
        sum_up(whole, (read_part(join(root, folder), shard) for shard in whole.shards), findings)
        remove_parts(join(root, folder))
        with contextlib.suppress(OSError):  # it has parts of other runs, or is no folder of a disk
            os.rmdir(join(root, folder.partition("/")[0]))
        _report(root, findings.problems)
    return summary


def _tasks(whole: DatasetParts, run: str, assignment: ShardAssignment) -> Iterator[ShardTask]:
    """A task per part of the assignment. A part of another run, or of other folders, is made again."""
    folders = sha256_json([shard_folder.folder for shard_folder in whole.check.folders])
    for shard in filter(assignment.claim, whole.shards):
        yield ShardTask(shard, {"run": run, "folders": folders}, whole.names_of(shard).names)


def _report(root: str, problems: list[str]) -> None:
    """Log the problems, and raise ProblemsFound when there are any."""
    if not problems:
        log.info("%s: all promises hold", root)
        return
    for problem in problems:
        log.error("%s", problem)
    told = [f"  {number}: {problem}" for number, problem in enumerate(problems[:PROBLEMS_TOLD], 1)]
    rest = f" (the first {PROBLEMS_TOLD} are named here, all above)" if len(problems) > PROBLEMS_TOLD else ""
    raise ProblemsFound("\n".join([f"{root}: {counted(len(problems), 'problem')}{rest}", *told]))
