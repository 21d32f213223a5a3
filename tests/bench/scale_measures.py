"""What tests/bench/scale.py measures, each in a process of its own, with or without strace around it.

    python tests/bench/scale_measures.py NAME ROOT

prints one line of JSON: seconds of CPU (workers included) and of the clock after imports, the part of the CPU seconds
that was the system's, the largest resident memory less that after the imports, and that of the largest worker.
"""

import importlib
import io
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

KINDS = {
    "open": "open openat openat2",
    "look up": "stat lstat statx newfstatat access faccessat faccessat2 readlink readlinkat",
    "list": "getdents64",
    "flush": "fsync fdatasync",
    "write": "rename renameat renameat2 unlink unlinkat link linkat mkdir mkdirat rmdir symlink utimensat",
}
KIND: dict[str, str] = {}
for kind, calls in KINDS.items():
    KIND |= dict.fromkeys(calls.split(), kind)


def command(*words: str) -> None:
    """Run ``clipmill WORDS`` in this process. Raises RuntimeError when it fails."""
    import clipmill

    sys.argv = ["clipmill", *words]
    with redirect_stdout(io.StringIO()) as said:
        try:
            clipmill.main()
        except SystemExit as leave:
            if leave.code:
                raise RuntimeError(f"clipmill {' '.join(words)}: exit code {leave.code}\n{said.getvalue()}") from leave


def shards_of(root: str) -> int:
    """Number of final shards."""
    from shards_spec.manifest import read_dataset

    shards: int = read_dataset(root)["stages"]["pack"]["shards"]
    return shards


def list_folder(root: str) -> None:
    """List the shards of one folder that are finished."""
    from shards_spec.manifest import finished_shards

    assert len(finished_shards(f"{root}/raw")) == shards_of(root)


def read_sizes(root: str) -> None:
    """Read what the dataset says of itself: dataset.json, and the samples of each shard."""
    from shards_spec.manifest import shard_sizes

    assert len(shard_sizes(root)) == shards_of(root)


def submit_array(root: str) -> None:
    """Print the job script of an array over all shards."""
    more = ["--name", "new", "--array", "1000", "--cluster", "slurm", "--dry-run"]
    command("submit", "cache", root, "--model", "RN50", *more)


def show_jobs(root: str) -> None:
    """Show five submissions, each of an array over all shards."""
    from slurm.options import read_site
    from slurm.step import COMMANDS
    from slurm.submission import Submission, jobs_folder

    folder = jobs_folder(root, read_site(None, "jobs", COMMANDS))
    for number in map(str, range(5)):
        of_array = {"folder": "shards", "shards": shards_of(root), "tasks": 1000, "arrays": ["1"], "last": "2"}
        one = Submission(
            id=number, command="pack", words="", cluster="slurm", root=root, after=[], snapshot="", **of_array
        )
        one.write(folder)
    command("jobs", root)


def array_task(root: str) -> None:
    """Run a task of pack's array that finds nothing left to do, neither its own nor another's."""
    from pipeline.pack.config import PackConfig
    from pipeline.pack.stage import pack
    from slurm.claims import Claims, Failures, WorkStealing

    with Claims(f"{root}/logs/jobs/claims/shards", "bench", 180.0) as claims:
        others = WorkStealing(claims, Failures(f"{root}/logs/jobs", "s"), f"{root}/shards")
        pack(PackConfig(root, workers=1), others)


def claim_all(root: str) -> None:
    """Claim every shard and give it back."""
    from slurm.claims import Assigned, Claims, Failures

    shards = range(shards_of(root))
    folder = f"{root}/logs/jobs/claims/new"
    with Claims(folder, "bench", 180.0) as claims:
        assignment = Assigned(claims, Failures(folder, "s"), shards)
        for shard in shards:
            assert assignment.claim(shard)
            assignment.complete(shard, True)


def dedup_anew(root: str) -> None:
    """Search for duplicates in the same raw shards, below another ROOT that has nothing else."""
    other = Path(spare(root))
    other.mkdir()
    (other / "raw").symlink_to(f"{root}/raw")
    shutil.copy(f"{root}/dataset.json", other)
    command("dedup", str(other), "--workers", "1")


def spare(root: str) -> str:
    """A ROOT beside this one for what a measure writes; the caller deletes it."""
    return f"{root}-spare"


def find_place(root: str) -> None:
    """Look up places in the order of so many shards of 20,000 samples."""
    from training.data.order import Order

    order = Order([20_000] * shards_of(root), 0)
    for place in (0, order.total // 2):
        order.locate(place)


def open_samples(root: str, teacher: str = "") -> None:
    """Open the dataset as training does, and read a sample in the middle of the order."""
    import open_clip

    from shards_spec.models import LoadedModel
    from training.config import DataConfig, TeacherCacheConfig, ViewConfig
    from training.data import samples

    student = LoadedModel(None, open_clip.get_tokenizer("ViT-B-32"), {}, 32, (0.5,) * 3, (0.5,) * 3)
    views = TeacherCacheConfig((teacher,)) if teacher else ViewConfig()
    opened = samples.open_samples(DataConfig(data=root), views, student, 0)
    assert isinstance(opened[opened.order.total // 2], dict)


Measure = Callable[[str], object]
MEASURES: dict[str, tuple[str, Measure]] = {
    "list": ("list one folder (finished shards)", list_folder),
    "sizes": ("dataset.json and sizes.json", read_sizes),
    "submit": ("submit cache --dry-run, all missing", submit_array),
    "jobs": ("jobs, five submissions", show_jobs),
    "array": ("a task of pack's array, nothing left for it", array_task),
    "claims": ("claim every shard and give it back", claim_all),
    "pack": ("pack again, nothing missing: the totals", lambda root: command("pack", root, "--workers", "1")),
    "dedup": ("dedup", dedup_anew),
    "vocab": ("vocab", lambda root: command("vocab", root, "--min-count", "0")),
    "check": ("check", lambda root: command("check", root)),
    "open": ("open for training, first sample", open_samples),
    "teacher": ("the same with a teacher cache", lambda root: open_samples(root, "tea")),
    "order": ("a place in the order, shards of 20,000", find_place),
}
WITH_WORKERS = ("dedup", "vocab", "check")  # processes that others start are a scheduler's commands
COMMANDS = ("submit", "jobs", "pack", "dedup", "vocab", "check")  # that measures run; their code is imported before
OTHERS = ("slurm.claims", "slurm.submit", "slurm.status", "submitit", "tyro")
FOR_TRAINING = dict.fromkeys(("open", "teacher", "order"), ("open_clip", "training.data.samples"))


def import_all(name: str) -> None:
    """Import what a measure takes, so that it is not measured."""
    import clipmill
    from shards_spec.layout import STAGES

    functions = [STAGES[one].function if one in STAGES else clipmill.COMMANDS[one].function for one in COMMANDS]
    for function in filter(None, functions):
        pkgutil.resolve_name(function)
    for module in (*OTHERS, *FOR_TRAINING.get(name, ())):
        importlib.import_module(module)


def main() -> None:
    """Measure and print."""
    from pipeline.core.workers import die_with_parent

    name, root = sys.argv[1:]
    die_with_parent()
    import_all(name)
    before = resident()
    start = time.perf_counter()
    user, system = cpu_seconds()
    MEASURES[name][1](root)
    user, system = (now - then for now, then in zip(cpu_seconds(), (user, system), strict=True))
    seconds = time.perf_counter() - start
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 if name in WITH_WORKERS else 0.0
    measured = {"CPU": user + system, "system": system, "seconds": seconds, "MiB": resident() - before}
    print(json.dumps(measured | {"worker MiB": worker}))


def cpu_seconds() -> tuple[float, float]:
    """Seconds of the user's code and of the system's so far, of this process and of those that it has waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + children.ru_utime, own.ru_stime + children.ru_stime


def resident() -> float:
    """Largest resident memory of this process so far, MiB; what a parent had before is not in it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


# what the bench calls


def measure(name: str, root: str) -> dict[str, float]:
    """What a measure prints."""
    return run_child(name, root)


def operations(name: str, root: str) -> Counter[str]:
    """Operations on files below ROOT of a measure, by kind."""
    log = Path(f"{root}.trace")
    run_child(name, root, tracer(str(log)))
    found = operations_in(log, root)
    log.unlink()
    return found


def operations_in(log: Path, root: str) -> Counter[str]:
    """Operations on files below ROOT by kind, as strace saw them; asking an open file for its size is none."""
    found = Counter[str]()
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"\d+ +(?:<\.\.\. )?(\w+)", line)
        if match and match[1] in KIND and root in line and '"", ' not in line and "resumed>" not in line:
            found[KIND[match[1]]] += 1
    return found


def tracer(log: str) -> list[str]:
    """Return the command line of strace; its lines name the file of each operation."""
    return ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-e", f"trace=?{',?'.join(KIND)}", "-o", log]


def run_child(name: str, root: str, before: list[str] | None = None) -> dict[str, float]:
    """What a measure prints; ``before`` is the command line of a tracer. Ends this process when it fails."""
    words = [*(before or []), sys.executable, __file__, name, root]
    try:
        with killed_at_the_end(words) as process:
            out, errors = process.communicate()
    finally:
        shutil.rmtree(spare(root), ignore_errors=True)
    if process.returncode:
        sys.exit(f"{name}:\n{errors[-3000:]}")
    measured: dict[str, float] = json.loads(out.splitlines()[-1])
    return measured


@contextmanager
def killed_at_the_end(words: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A process in a session of its own, all of which is killed where the block is left before its end."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    main()
