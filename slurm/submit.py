"""``clipmill submit``: the same command, elsewhere. A stage becomes an array over shards and a job that adds it up."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from shards_spec.files import UserError, join
from shards_spec.layout import CHECK, STAGES
from slurm.division import Division, divide, upstream_folder
from slurm.jobs import ArrayJob, ChainJob, FinishJob, Job, StageJob, TrainJob
from slurm.options import Options, Site, read_site
from slurm.scheduler import DEFAULT_ARRAY, SlurmQueue, executor_parameters, max_array_size, need_slurm, wait_for
from slurm.snapshot import snapshot
from slurm.step import COMMANDS, USAGE, Step, by_stage, parse_steps
from slurm.submission import Submission, command_words, jobs_folder, make_folder, new_id
from slurm.submitit_parts import error_logs, failure_message


def submit(words: list[str], run_here: Callable[[Step], int]) -> int:
    """Parse and submit; return the exit code. ``run_here`` runs a step in this process. Raises UserError."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    steps = parse_steps(words)
    _refuse_incomplete(steps)
    cluster = steps[0].options.cluster
    if cluster == "debug":
        return next((code for step in steps if (code := run_here(step))), 0)
    if cluster == "local":
        return _submit_locally(steps)
    if not steps[0].options.dry_run:
        need_slurm()
    return _submit_chain(steps)


def _refuse_incomplete(steps: list[Step]) -> None:
    """Raise UserError for ``--incomplete`` where no job comes before."""
    options = steps[0].options
    if options.incomplete and not options.after and len(steps) == len(by_stage(steps[0])) == 1:
        raise UserError("--incomplete would not be used without --after JOB: nothing runs before")


def _submit_chain(steps: list[Step]) -> int:
    """Submit each step, and each stage of a training, to start after the one before."""
    steps = list(chain.from_iterable(by_stage(step) for step in steps))
    submitted = list[Submission]()
    shards: int | None = None
    after = steps[0].options.after
    for step in steps:
        step = dataclasses.replace(step, options=dataclasses.replace(step.options, after=after))
        submission = submit_step(step, chained=len(submitted) > 0, shards=shards)
        submitted.append(submission)
        if step.command in STAGES and STAGES[step.command].array:  # the others leave the number of shards as it is
            shards = submission.shards
        after = (submission.last,)
        if not step.options.dry_run:
            print(submission.line())
    options = steps[-1].options
    return _wait(steps, submitted) if options.wait and not options.dry_run else 0


def submit_step(step: Step, *, chained: bool = False, shards: int | None = None) -> Submission:
    """Submit one command; ``chained`` after one of ``shards`` shards, where that is known. Raises UserError."""
    options, site = step.options, _site_of(step)
    jobs_dir = jobs_folder(step.root, site)
    code = jobs_dir / "code" if options.dry_run else snapshot(jobs_dir / "code")
    name = new_id(step.command)
    if step.command == CHECK.name:
        step = dataclasses.replace(step, config=step.config.of_run(name))
    if not options.dry_run:
        make_folder(jobs_dir, name)
    queue = SlurmQueue(jobs_dir / name, options, site, executor_parameters(step.command, options, site, str(code)))
    size = DEFAULT_ARRAY
    if options.array > 1 and step.array_folder is not None and not options.dry_run:
        size = max_array_size()
    if options.parallel:  # Slurm's limit is one of an array, so there is one
        step = dataclasses.replace(step, options=dataclasses.replace(options, array=min(options.array, size)))
    division = divide(step, chained, shards, jobs_dir)
    arrays = list[str]()
    dependency = _dependency(options)
    if division.folder is None:
        last = queue.submit([single_job(step)], dependency)
    else:
        tasks, finish = _array_jobs(step, division, name, jobs_dir / "claims")
        arrays = [queue.submit(tasks[start : start + size], dependency) for start in range(0, len(tasks), size)]
        if arrays:
            dependency = f"afterany:{':'.join(arrays)}"
        last = queue.submit([dataclasses.replace(finish, arrays=tuple(arrays))], dependency)
    submission = Submission(
        id=name,
        command=step.command,
        words=command_words(),
        cluster=options.cluster,
        root=step.root,
        folder=division.folder,
        shards=division.total,
        tasks=len(division.ranges),
        arrays=arrays,
        last=last,
        after=list(options.after),
        snapshot=str(code),
    )
    if not options.dry_run:
        submission.write(jobs_dir)
    return submission


def _site_of(step: Step) -> Site:
    return read_site(step.options.site, step.command, COMMANDS)


def _dependency(options: Options) -> str | None:
    """Slurm's condition for the start of a job."""
    if not options.after:
        return None
    kind = "afterany" if options.incomplete else "afterok"
    return f"{kind}:{':'.join(options.after)}"


def _array_jobs(step: Step, division: Division, submission: str, claims: Path) -> tuple[list[ArrayJob], FinishJob]:
    """A job for each task of an array, and the one that adds it up, which does not know the arrays' numbers yet."""
    assert division.folder is not None
    assert step.function is not None
    upstream = upstream_folder(step, division)
    finish = FinishJob(
        max_requeue=step.options.max_requeue,
        command=step.command,
        function=step.function,
        config=step.config,
        folder=join(step.root, division.folder),
        claims=str(claims / division.folder.replace("/", "-")),
        submission=submission,
        arrays=(),
    )
    tasks = [
        ArrayJob(
            max_requeue=finish.max_requeue,
            command=finish.command,
            function=finish.function,
            config=finish.config,
            folder=finish.folder,
            claims=finish.claims,
            submission=submission,
            upstream=upstream,
            ranges=ranges,
            claim_s=step.options.claim_s,
        )
        for ranges in division.ranges
    ]
    return tasks, finish


def single_job(step: Step) -> Job:
    """A step as one job."""
    if step.command == "train":
        return TrainJob(step.options.max_requeue, step.words)
    assert step.function is not None
    return StageJob(step.options.max_requeue, step.command, step.function, step.config)


def _submit_locally(steps: list[Step]) -> int:
    """All steps in one process in the background, which survives this one."""
    import submitit

    first, last = steps[0], steps[-1]
    options, site = last.options, _site_of(last)
    jobs_dir = jobs_folder(first.root, site)
    if len(steps) > 1 and options.processes > 1:
        raise UserError("--cluster local: a chain has one process per step")
    code, name = snapshot(jobs_dir / "code"), new_id(first.command)
    executor = submitit.AutoExecutor(
        make_folder(jobs_dir, name), cluster="local", local_max_num_timeout=options.max_requeue
    )
    processes = options.processes if last.command == "train" else 1
    executor.update_parameters(
        timeout_min=options.minutes,
        tasks_per_node=processes,
        gpus_per_node=options.gpus_per_node or 0,
        local_setup=site.script_lines(str(code)),
    )
    jobs = [single_job(step) for step in steps]
    job: Any = executor.submit(jobs[0] if len(jobs) == 1 else ChainJob(options.max_requeue, tuple(jobs)))
    submission = Submission(
        id=name,
        command="+".join(step.command for step in steps),
        words=command_words(),
        cluster="local",
        root=first.root,
        folder=None,
        shards=None,
        tasks=processes,
        arrays=[],
        last=str(job.job_id),
        after=[],
        snapshot=str(code),
    )
    submission.write(jobs_dir)
    print(f"process {job.job_id}; clipmill jobs {first.root}")
    if not options.wait:
        return 0
    error = job.exception()
    if error is not None:
        logs = error_logs(jobs_dir / name, submission.last)
        print("\n".join([failure_message(error, logs), *map(str, logs)]), file=sys.stderr)
    return int(error is not None)


def _wait(steps: Sequence[Step], submitted: Sequence[Submission]) -> int:
    for step, submission in zip(steps, submitted, strict=True):
        folder = jobs_folder(submission.root, _site_of(step)) / submission.id
        succeeded = wait_for(folder, submission.last)
        outcome = "succeeded" if succeeded else f"failed; clipmill jobs {submission.root}"
        print(f"{submission.command}: job {submission.last} {outcome}")
        if not succeeded:
            return 1
    return 0
