"""The record of a submission and the folder that holds it: ROOT/logs/jobs, a run's RUN/logs/jobs.

A submission has a folder of its own there, with its jobs' pickles and logs; the copy of the code lies beside them.
"""

import dataclasses
import re
import secrets
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shards_spec.display import hide_secrets
from shards_spec.files import UserError, is_url, read_json, write_json
from shards_spec.layout import LOGS
from shards_spec.messages import counted
from slurm.options import JOBS_ADVICE, Site
from slurm.snapshot import environment

# a line break would be a line of the job's script; %j and the like are patterns in the path of a log; PYTHONPATH
# ends a path at a colon
MISREAD = re.compile(r"[\x00-\x1f\x7f%\\:]")


@dataclass(frozen=True)
class Submission:
    """What was submitted, as ``submission.json`` has it.

    ``folder`` is what an array fills below ROOT, ``shards`` how many there will be; None where there is no array, or
    where the number is not known. ``tasks`` is the number of array tasks or processes. ``last`` is the job that others
    can wait for, ``after`` those that it waits for.
    """

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
        """For the terminal: the job that others can be chained to, and the arrays that it finishes."""
        array = f"{counted(self.tasks, 'array task')} in job {', '.join(self.arrays)}, then " if self.arrays else ""
        return f"{self.command}: {array}job {self.last}; clipmill jobs {self.root}"

    def write(self, jobs_dir: Path) -> None:
        """Write ``submission.json`` and ``environment.json`` into the submission's folder."""
        folder = jobs_dir / self.id
        write_json(str(folder / "environment.json"), environment())
        write_json(str(folder / "submission.json"), dataclasses.asdict(self))


def new_id(command: str) -> str:
    """A name for a submission, later ones sort behind earlier ones."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{command}-{secrets.token_hex(2)}"


def make_folder(jobs_dir: Path, submission: str) -> Path:
    """The folder of a new submission; for this user alone, since jobs unpickle what lies there."""
    folder = jobs_dir / submission
    folder.mkdir(mode=0o700, parents=True)
    return folder


def command_words() -> str:
    """The words after ``clipmill`` as this process was started with, without secrets."""
    return hide_secrets(shlex.join(sys.argv[1:]))


def submissions(jobs_dir: Path) -> list[Submission]:
    """All submissions of a dataset or run, the oldest first."""
    return [Submission(**read_json(str(path))) for path in sorted(jobs_dir.glob("*/submission.json"))]


def jobs_folder(root: str, site: Site) -> Path:
    """Where job files of a dataset or run are, seen by all nodes.

    Raises UserError for a URL, or a path that a script, Slurm or Python misreads, when the site file names no other.
    """
    own = None if is_url(root) else Path(root).absolute() / LOGS / "jobs"
    if own is not None and not MISREAD.search(str(own)):
        return own
    if not site.jobs:
        raise UserError(f"{root} is no folder: {JOBS_ADVICE}" if own is None else _describe_misread(own))
    other = Path(site.jobs).absolute()
    if MISREAD.search(str(other)):
        raise UserError(_describe_misread(other))
    return other / re.sub(r"[^A-Za-z0-9.-]+", "_", root)


def _describe_misread(path: Path) -> str:
    character = MISREAD.findall(str(path))[0]
    return (
        f"{str(path)!r}: jobs' scripts, Slurm's logs or PYTHONPATH would misread {character!r} in that path: "
        f"{JOBS_ADVICE}"
    )
