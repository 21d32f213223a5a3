"""All that leans on submitit's inside: how it makes scripts, names its files and stores results.

submitit documents its executors and `JobEnvironment`; what is here it may change. Without these parts ``--dry-run``
prints the options in place of a script, and a result is read by unpickling it. `tests/slurm/test_submitit_parts.py`
tests the installed version.
"""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEAD = 64  # bytes of a result that say how the job ended
OUTCOMES = {b"\x07success": True, b"\x05error": False}  # as pickle writes these words, length first
# the last line of a traceback, with what follows up to the line that submitit puts behind it
SAID = re.compile(r"^clipmill: .*?(?=^submitit ERROR|\Z)", re.M | re.S)  # as `clipmill` ends
RAISED = re.compile(r"^slurm\.jobs\.JobFailedError: (.*?)^-{22}$", re.M | re.S)


def dry_executor(folder: Path, max_requeue: int, python: str | None) -> Any:
    """A SlurmExecutor that can be made where Slurm is not installed."""
    from submitit.slurm.slurm import SlurmExecutor

    class DryExecutor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            """What submitit prefers; the original is negative without srun, and then no executor is made."""
            return 2

    return DryExecutor(folder, max_requeue, python=python)


def script_text(executor: Any, parameters: dict[str, Any]) -> str:
    """The sbatch script that a SlurmExecutor would submit; its parameters where this submitit cannot tell."""
    try:
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    except (AttributeError, TypeError):
        lines = [f"# {name} = {value!r}" for name, value in parameters.items()]
        text = "\n".join(["# this version of submitit shows no script", "", "# Parameters", *lines, ""])
    return text


def submission_errors() -> tuple[type[Exception], ...]:
    """What submitit raises when Slurm refuses a job."""
    from submitit.core import utils

    names = ("FailedJobError", "FailedSubmissionError")
    return tuple(getattr(utils, name) for name in names if hasattr(utils, name)) or (RuntimeError,)


def failure_message(error: Exception, logs: Iterable[Path]) -> str:
    """What a job raised, without the traceback that submitit puts around it; a lost job's error as it is.

    What a training said before it ended is in the job's ``logs``; the last word of them follows.
    """
    raised = RAISED.findall(str(error))
    said = SAID.findall("".join(log.read_text(errors="replace") for log in logs))
    return "\n".join(text.strip() for text in [raised[-1] if raised else str(error), *said[-1:]])


def result_path(folder: Path, job: str) -> Path:
    """Where a job's first task stores its result when it has ended."""
    return folder / f"{job}_0_result.pkl"


def result_succeeded(path: Path) -> bool:
    """Whether a stored result is that of a success. Its first bytes tell; else it is unpickled."""
    data = path.read_bytes()
    for word, succeeded in OUTCOMES.items():
        if word in data[:HEAD]:
            return succeeded
    return bool(pickle.loads(data)[0] == "success")


def results(folder: Path) -> list[tuple[str, Path]]:
    """(job or array task, file of a result) of all tasks that have ended, by name of the file."""
    ending = "_result.pkl"  # after the number of the task in its job
    paths = sorted(folder.glob(f"*{ending}"))
    return [(path.name.removesuffix(ending).rsplit("_", 1)[0], path) for path in paths]


def submitted_jobs(folder: Path) -> list[str]:
    """Numbers of all jobs and array tasks that were submitted, in no order."""
    ending = "_submitted.pkl"
    return [path.name.removesuffix(ending) for path in folder.glob(f"*{ending}")]


def error_logs(folder: Path, job: str) -> list[Path]:
    """What a job's tasks wrote to stderr, the one that was written to last at the end."""
    return sorted(folder.glob(f"{job}_*_log.err"), key=lambda path: path.stat().st_mtime)
