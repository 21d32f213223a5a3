"""``clipmill submit``: the very command, elsewhere. A stage becomes an array over shards and a job that adds it up.

The flags are those of the stage's own dataclass, and the group of `Options` beside them. Everything a submission
leaves is in ROOT/logs/jobs (a run's: RUN/logs/jobs): a folder per submission with its jobs' logs, and the code.
"""

import dataclasses
import pkgutil
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.core.command_line import parse, parse_known, parse_several
from shards_spec.display import hide_secrets
from shards_spec.files import UserError, is_url, join, read_json, write_json
from shards_spec.layout import LOGS, STAGE_COMMANDS, STAGES
from shards_spec.manifest import finished_shards
from shards_spec.suggest import did_you_mean
from slurm.jobs import ArrayJob, ChainJob, FinishJob, Job, StageJob, TrainJob
from slurm.options import MEND, Options, Site, read_site
from slurm.scheduler import Slurm, max_array_size, need_slurm, parameters, wait_for
from slurm.snapshot import environment, snapshot

COMMANDS = (*STAGE_COMMANDS, "train")  # that can be submitted
USAGE = """usage: clipmill submit STAGE ROOT ...          a stage as an array over its shards
       clipmill submit train RECIPE --out RUN ...   nodes x GPUs, one process each
       clipmill submit pipeline ROOT [options] -- ingest --source LIST -- caption ... -- pack -- vocab -- cache ...
                                -- train RECIPE --out RUN ...   one after the other

The flags are those of the command itself; clipmill submit STAGE --help shows them with submit's own."""
# in the path of job files: a line of a script; patterns in the path of a log (%j is the job's number); PYTHONPATH's own
UNFIT = re.compile(r"[\x00-\x1f\x7f%\\:]")


@dataclass(frozen=True)
class Step:
    """A command to submit; ``function`` and ``config`` of a stage, ``words`` of a training."""

    command: str
    options: Options
    function: Callable[..., Any] | None = None
    config: Any = None
    words: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """The dataset, or the run's folder."""
        return self.config.root if self.config is not None else _option(self.words, "--out") or ""


def submit(words: list[str], plain: Callable[[Step], int]) -> int:
    """Parse and submit; ``plain`` runs a step here and now. Raises UserError."""
    target = words[0] if words else "--help"
    if target in ("-h", "--help"):
        print(USAGE)
        return 0
    if target == "pipeline":
        steps = _pipeline(words[1:])
    elif target == "train":
        steps = [_train_step(words[1:], Options())]
    elif target in STAGE_COMMANDS:
        steps = [_stage_step(target, words[1:], Options())]
    else:
        raise UserError(f"cannot submit {target!r}; {did_you_mean(target, [*COMMANDS, 'pipeline'])}")
    cluster = steps[0].options.cluster
    if cluster == "debug":
        return next((code for step in steps if (code := plain(step))), 0)
    if cluster == "local":
        return _locally(steps)
    if not steps[0].options.dry_run:
        need_slurm()
    submissions, shards, after = list[Submission](), None, steps[0].options.after
    for step in steps:
        own = dataclasses.replace(step, options=dataclasses.replace(step.options, after=after))
        submissions.append(submit_step(own, chained=len(submissions) > 0, shards=shards))
        if step.command not in STAGES or STAGES[step.command].array:  # the others leave the number of shards as it is
            shards = submissions[-1].shards
        after = (submissions[-1].last,)
        if not step.options.dry_run:
            print(submissions[-1].line())
    return _wait(steps, submissions) if steps[-1].options.wait and not steps[-1].options.dry_run else 0


def _stage_step(command: str, words: list[str], default: Options) -> Step:
    stage = STAGES[command]
    parts = {"": (pkgutil.resolve_name(stage.config), None), "submit": (Options, default)}
    config, options = parse_several(f"submit {command}", parts, words)
    return Step(command, options, pkgutil.resolve_name(stage.function), config)


def _train_step(words: list[str], default: Options) -> Step:
    """The recipe's own flags go to the job as they are: checking them takes torch, which takes longer than all else."""
    from training.recipes import RECIPES

    if words and words[0] not in (*RECIPES, "-h", "--help"):
        raise UserError(f"no recipe {words[0]!r}; {did_you_mean(words[0], RECIPES)}")
    options, rest = parse_known(
        "submit train RECIPE", Options, default,
        words[1:] if words[:1] != ["--help"] else words,
    )  # fmt: skip
    if not words or not _option(rest, "--out"):
        raise UserError("submit train RECIPE --out RUN: name the recipe and the run's folder, the job's files go there")
    return Step("train", options, words=(words[0], *rest))


def _option(words: Iterable[str], name: str) -> str | None:
    """The value of a flag among words that are not parsed here."""
    found, before = None, ""
    for word in words:
        if before == name:
            found = word
        elif word.startswith(f"{name}="):
            found = word.removeprefix(f"{name}=")
        before = word
    return found


def _pipeline(words: list[str]) -> list[Step]:
    """ROOT and common options, then each command after a ``--`` of its own."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    common, *named = parts
    if not common or not named or not all(named):
        raise UserError(f"name ROOT and the commands\n{USAGE}")
    options = parse("submit pipeline ROOT", Options, common[1:])
    steps = []
    for command, *rest in named:
        if command == "train":
            rest = rest if _option(rest, "--data") else [*rest, "--data", common[0]]
            steps.append(_train_step(rest, options))
        elif command in STAGE_COMMANDS:
            steps.append(_stage_step(command, [common[0], *rest], options))
        else:
            raise UserError(f"cannot submit {command!r}; {did_you_mean(command, COMMANDS)}")
    return steps


@dataclass(frozen=True)
class Submission:
    """What was submitted, as ``submission.json`` has it. ``shards``: how many there will be, None where unknown."""

    id: str
    command: str
    words: str
    cluster: str
    root: str
    folder: str | None
    shards: int | None
    tasks: int
    arrays: list[str]
    last: str
    after: list[str]
    snapshot: str

    def line(self) -> str:
        """For the terminal: the job that others can be chained to, and what it adds up."""
        array = f"{self.tasks} array tasks in job {', '.join(self.arrays)}, then " if self.arrays else ""
        return f"{self.command}: {array}job {self.last}; clipmill jobs {self.root}"


def submit_step(step: Step, chained: bool = False, shards: int | None = None) -> Submission:
    """Submit one command; ``chained`` after one of ``shards`` shards, where that is known. Raises UserError."""
    options, site = step.options, read_site(step.options.site, step.command, COMMANDS)
    place = jobs_folder(step.root, site)
    code = snapshot(place / "code") if not options.dry_run else place / "code"
    name = _submission_name(step.command)
    given = parameters(step.command, options, site, str(code), step.command == "train")
    if not options.dry_run:
        (place / name).mkdir(mode=0o700, parents=True)  # jobs unpickle what lies there
    slurm = Slurm(place / name, options, site, given)
    condition = (
        f"{'afterany' if options.incomplete else 'afterok'}:{':'.join(options.after)}" if options.after else None
    )
    several = options.array > 1 and output_folder(step) is not None
    size = max_array_size() if several and not options.dry_run else 1001
    if options.parallel:  # Slurm's limit is one of an array, so there is one
        step = dataclasses.replace(step, options=dataclasses.replace(options, array=min(options.array, size)))
    folder, ranges, total = _divided(step, chained, shards, place)
    arrays = list[str]()
    if folder is None:
        jobs: list[Job] = [_single(step)]
    else:
        common: dict[str, Any] = {
            "command": step.command,
            "function": step.function,
            "max_requeue": options.max_requeue,
        }
        common |= {"config": step.config, "folder": join(step.root, folder), "submission": name}
        common |= {"claims": str(place / "claims" / folder.replace("/", "-"))}
        stage = STAGES[step.command]
        upstream = join(step.root, stage.reads_folder) if stage.reads else None
        jobs = [ArrayJob(**common, upstream=upstream, ranges=own, claim_s=options.claim_s) for own in ranges]
        arrays = [slurm.submit(jobs[start : start + size], condition) for start in range(0, len(jobs), size)]
        condition = f"afterany:{':'.join(arrays)}" if arrays else condition
        jobs = [FinishJob(**common, arrays=tuple(arrays))]
    last = slurm.submit(jobs, condition)
    submission = Submission(
        name, step.command, _words(), options.cluster, step.root, folder, total, len(ranges), arrays,
        last, list(options.after), str(code),
    )  # fmt: skip
    if not options.dry_run:
        write_json(str(place / name / "environment.json"), environment())
        write_json(str(place / name / "submission.json"), dataclasses.asdict(submission))
    return submission


def jobs_folder(root: str, site: Site) -> Path:
    """Where job files of a dataset or run are, seen by all nodes.

    Raises UserError for a URL, or a path that a script, Slurm or Python misreads, when the site file names no other.
    """
    place = None if is_url(root) else Path(root).absolute() / LOGS / "jobs"
    if place is not None and not UNFIT.search(str(place)):
        return place
    if not site.jobs:
        raise UserError(f"{root} is no folder: {MEND}" if place is None else _misread(place))
    place = Path(site.jobs).absolute()
    if UNFIT.search(str(place)):
        raise UserError(_misread(place))
    return place / re.sub(r"[^A-Za-z0-9.-]+", "_", root)


def _misread(place: Path) -> str:
    found = UNFIT.findall(str(place))[0]
    return f"{str(place)!r}: jobs' scripts, Slurm's logs or PYTHONPATH would misread {found!r} in that path: {MEND}"


def _submission_name(command: str) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{command}-{secrets.token_hex(2)}"


def _words() -> str:
    return hide_secrets(shlex.join(sys.argv[1:]))


def submissions(place: Path) -> list[Submission]:
    """All submissions of a dataset or run, the oldest first."""
    return [Submission(**read_json(str(path))) for path in sorted(place.glob("*/submission.json"))]


def _single(step: Step) -> Job:
    if step.command == "train":
        return TrainJob(step.options.max_requeue, step.words)
    assert step.function is not None
    return StageJob(step.options.max_requeue, step.command, step.function, step.config)


Ranges = tuple[tuple[int, int], ...]


def _divided(step: Step, chained: bool, shards: int | None, place: Path) -> tuple[str | None, list[Ranges], int | None]:
    """The folder that a stage's array fills, a list of shards for each task, and how many shards there will be.

    No folder for what is one job. Where the number is unknown the lists are empty: the tasks take what they find.
    """
    folder = output_folder(step)
    if folder is None:
        return None, [()], None
    if step.config.overwrite:
        raise UserError(f"--overwrite is for one process: delete {join(step.root, folder)} first, then submit without")
    total = _source_shards(step.config) if step.command == "ingest" else _upstream_shards(step, chained, shards, place)
    if total is None:
        return folder, [()] * step.options.array, None
    done = set() if step.options.recheck else set(finished_shards(join(step.root, folder)))
    missing = [shard for shard in range(total) if shard not in done]
    if not missing:
        print(f"{step.command}: all {total} shards are there; --recheck looks into each")
    tasks = min(step.options.array, len(missing))
    cuts = [len(missing) * task // tasks for task in range(tasks + 1)] if tasks else []
    return folder, [_ranges(missing[a:b]) for a, b in pairwise(cuts)], total


def output_folder(step: Step) -> str | None:
    """The folder below ROOT whose shards an array makes; None for what one job does."""
    command, config = step.command, step.config
    whole = (  # what all shards together decide
        (command == "cache" and config.export_lists)
        or (command == "pack" and config.shard_size is not None)
        or (command == "ingest" and config.retry_failed)
    )
    if command not in STAGES or not STAGES[command].array or whole:
        return None
    return STAGES[command].folder(config.label if STAGES[command].is_named else "")


def _ranges(shards: list[int]) -> Ranges:
    found: list[tuple[int, int]] = []
    for shard in shards:
        if found and found[-1][1] == shard:
            found[-1] = (found[-1][0], shard + 1)
        else:
            found.append((shard, shard + 1))
    return tuple(found)


def _source_shards(config: Any) -> int | None:
    from pipeline.ingest.stage import source_shards

    return source_shards(config)


def _upstream_shards(step: Step, chained: bool, shards: int | None, place: Path) -> int | None:
    from pipeline.core.runner import upstream_shards

    folder, stage = STAGES[step.command].reads_folder, STAGES[step.command].reads or ""
    if chained:
        return shards
    if step.options.after:
        before = [one.shards for one in submissions(place) if one.folder == folder and one.shards is not None]
        return before[-1] if before else None
    return len(upstream_shards(step.root, folder, stage))


def _locally(steps: list[Step]) -> int:
    """All steps in one process in the background, which survives this one."""
    import submitit

    options, site = steps[-1].options, read_site(steps[-1].options.site, steps[-1].command, COMMANDS)
    place = jobs_folder(steps[0].root, site)
    if options.dry_run or (len(steps) > 1 and options.processes > 1):
        raise UserError("--cluster local: --dry-run has nothing to print, and a chain has one process per step")
    code, name = snapshot(place / "code"), _submission_name(steps[0].command)
    (place / name).mkdir(mode=0o700, parents=True)  # as in `submit_step`
    executor = submitit.AutoExecutor(place / name, cluster="local", local_max_num_timeout=options.max_requeue)
    tasks = options.processes if steps[-1].command == "train" else 1
    executor.update_parameters(
        timeout_min=options.minutes, tasks_per_node=tasks, gpus_per_node=options.gpus_per_node or 0,
        local_setup=site.script_lines(str(code)),
    )  # fmt: skip
    jobs = [_single(step) for step in steps]
    job: Any = executor.submit(jobs[0] if len(jobs) == 1 else ChainJob(options.max_requeue, tuple(jobs)))
    record = Submission(
        name, "+".join(step.command for step in steps), _words(), "local", steps[0].root, None, None,
        tasks, [], str(job.job_id), [], str(code),
    )  # fmt: skip
    write_json(str(place / name / "environment.json"), environment())
    write_json(str(place / name / "submission.json"), dataclasses.asdict(record))
    print(f"process {job.job_id}; clipmill jobs {steps[0].root}")
    if not options.wait:
        return 0
    error = job.exception()
    if error is not None:
        print(str(error), file=sys.stderr)
    return int(error is not None)


def _wait(steps: list[Step], made: list[Submission]) -> int:
    for step, one in zip(steps, made, strict=True):
        site = read_site(step.options.site, step.command, COMMANDS)
        fine = wait_for(jobs_folder(one.root, site) / one.id, one.last)
        print(f"{one.command}: job {one.last} {'succeeded' if fine else f'failed; clipmill jobs {one.root}'}")
        if not fine:
            return 1
    return 0
