"""What is asked of Slurm, one call for many jobs, and how jobs are submitted and waited for."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shards_spec.files import UserError
from slurm.jobs import Job
from slurm.options import Options, Site
from slurm.submitit_parts import dry_executor, result_path, result_succeeded, script_text, submission_errors

DEFAULT_ARRAY = 1001  # tasks of an array where Slurm does not say, its own default
DRY_ID = "0"  # in place of the number that Slurm would give a job
NOT_SUBMITTED = re.compile(rf":{DRY_ID}(?=:|$)")  # in a dependency
ASK_S = 60.0  # while waiting, the scheduler is asked at most that often
ANSWER_S = 30.0  # its commands must answer within
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "STOPPED", "PREEMPTED")


def need_slurm() -> None:
    """Raise UserError where there is no Slurm to submit to."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "no Slurm on this machine (sbatch and srun are not on PATH): submit from a login node, or say "
            "--cluster local or --cluster debug"
        )


def ask(*words: str) -> str:
    """Output of one of Slurm's commands. Raises UserError when it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{words[0]} does not answer ({error}): is Slurm up?") from error
    if done.returncode:
        raise UserError(f"{words[0]}: {_last_line(done.stderr)}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or ["no reason given"])[0 if errors else -1]


def max_array_size() -> int:
    """How many tasks an array may have."""
    limits = re.findall(r"(?:^MaxArraySize *= *|\bmax_array_tasks=)(\d+)", ask("scontrol", "show", "config"), re.M)
    return max(1, min(map(int, limits), default=DEFAULT_ARRAY))


def states(jobs: Iterable[str]) -> dict[str, str] | None:
    """State of every job or array task: of the queue, and of the accounting for those that left it.

    None where Slurm does not answer; a job is not among them when Slurm has forgotten it.
    """
    wanted = ",".join(sorted(jobs))
    found = dict[str, str]()
    if not wanted:
        return found
    with contextlib.suppress(UserError):  # no accounting: the queue, then the jobs' own results must do
        for line in ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", wanted).splitlines():
            job, state = line.split("|")[:2]
            found |= dict.fromkeys(_array_tasks(job), state.split()[0])
    try:
        for line in ask("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j", wanted).splitlines():
            job, state, reason = line.split("|")
            found[job] = f"{state} ({reason})" if state == "PENDING" and reason not in ("None", "Priority") else state
    except UserError as error:
        if not found and "Invalid job id" not in str(error):  # that one says that a job is forgotten
            return None
    return found


def _array_tasks(job: str) -> list[str]:
    """The tasks of ``7_[0-2,5%4]``, as the accounts have those that did not begin."""
    group = re.fullmatch(r"(\d+)_\[([\d,-]+).*\]", job)
    if group is None:
        return [job]
    tasks = list[str]()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", group[2]):
        tasks += [f"{group[1]}_{task}" for task in range(int(first), int(last or first) + 1)]
    return tasks


def executor_parameters(command: str, options: Options, site: Site, snapshot: str) -> dict[str, Any]:
    """A command's parameters for submitit's SlurmExecutor. ``snapshot`` is the folder of the code that jobs run."""
    train = command == "train"
    gpus = options.gpus_per_node if options.gpus_per_node is not None else site.gpus_per_node
    cpus = [f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []  # srun has its own since Slurm 22.05
    parameters = {
        "job_name": f"clipmill-{command}",
        "time": options.minutes,
        "nodes": options.nodes if train else 1,
        "ntasks_per_node": (options.tasks_per_node or gpus or 1) if train else 1,
        "gpus_per_node": gpus or None,
        "cpus_per_task": site.cpus_per_task,
        "mem": f"{int(site.mem_gb * 1024)}MB" if site.mem_gb else None,
        "partition": options.partition or site.partition,
        "account": site.account,
        "qos": site.qos,
        "signal_delay_s": options.signal_s,
        "setup": site.script_lines(snapshot),
        "array_parallelism": options.parallel or 100_000,
        "srun_args": ["--kill-on-bad-exit=1", *cpus],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **site.sbatch},
    }
    return {name: value for name, value in parameters.items() if value is not None}


class SlurmQueue:
    """Submits the jobs of one submission, or prints their scripts."""

    def __init__(self, folder: Path, options: Options, site: Site, parameters: dict[str, Any]) -> None:
        from submitit import SlurmExecutor

        python = f"{site.container} {shlex.quote(sys.executable)}" if site.container else None
        make = dry_executor if options.dry_run else SlurmExecutor
        self._executor: Any = make(folder, options.max_requeue, python=python)
        self._parameters, self._dry_run = parameters, options.dry_run

    def submit(self, jobs: Sequence[Job], dependency: str | None) -> str:
        """Submit one job, or several as an array; the number. Raises UserError with Slurm's reason."""
        executor = self._executor
        if self._dry_run and dependency:
            dependency = NOT_SUBMITTED.sub(":ID_OF_THE_JOB_ABOVE", dependency)
        parameters = {**self._parameters, **({"dependency": dependency} if dependency else {})}
        executor.parameters = {}
        executor.update_parameters(**parameters)
        if self._dry_run:
            text = script_text(executor, parameters)
            print(text if len(jobs) == 1 else text.replace("\n# Parameters\n", f"\n# an array of {len(jobs)}\n", 1))
            return DRY_ID
        try:
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # sbatch's words come in the error
                submitted: list[Any] = [executor.submit(job) for job in jobs]
            return str(submitted[0].job_id).split("_")[0]
        except submission_errors() as error:
            raise UserError(
                f"Slurm refuses the job: {_last_line(str(error))}; correct the site file or the flags"
            ) from error


def wait_for(folder: Path, job: str) -> bool:
    """Wait for a job's end; whether it succeeded. Its result is seen at once, the scheduler seldom asked."""
    result = result_path(folder, job)
    asked = time.monotonic()
    while not result.exists():
        time.sleep(1)
        if time.monotonic() - asked > ASK_S:
            asked = time.monotonic()
            found = states([job])
            if found is None:  # Slurm may answer again in a minute
                continue
            state = found.get(job, "forgotten").split()[0]
            if state not in LIVE and not result.exists():
                return state == "COMPLETED"
    return result_succeeded(result)
