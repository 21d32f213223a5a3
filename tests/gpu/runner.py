"""Runs the steps of tests/gpu/run.sh, each within its limit, and prints their table.

    python tests/gpu/runner.py [--dry] [--only STEP ...] [--seconds N] [--table FILE]

The exit code is 1 when a step failed or was stopped. Under $OUT (or a folder of /tmp): figures.jsonl, rates.json for
tests/bench/plan.py, table.md, and log.txt, what the steps wrote. --table prints the table of an earlier figures.jsonl.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from figures import DEVICE, PREFIX, WORK
from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECONDS = 460  # for all steps; the script promises eight minutes
LOG_LINES = 40  # of a failed step, shown
GRACE = 10  # seconds that a step has to say where it was stopped


@dataclass(frozen=True)
class Step:
    """A process with its limit in seconds."""

    name: str
    command: tuple[str, ...]
    seconds: float


def measurement(name: str, seconds: float) -> Step:
    """The step that runs measure_NAME.py."""
    return Step(name, (str(HERE / f"measure_{name}.py"),), seconds)


SHARE = max(1, min(6, (os.cpu_count() or 1) // 2 - 1))  # processes of the tests, each with whole files
TESTS = (
    *("-m", "pytest", "-q", "-rs", "--durations=8", "-p", "no:cacheprovider", "-m", "gpu"),
    *(("--numprocesses", str(SHARE), "--dist=loadfile") if SHARE > 1 else ()),
    str(HERE),
)
STEPS = (
    measurement("limits", 40),
    Step("tests", TESTS, 240),
    measurement("memory", 70),
    measurement("cache", 80),
    measurement("caption", 120),
    measurement("train", 80),
    measurement("loop", 110),
    measurement("reader", 150),
)


@dataclass
class Outcome:
    """What a step left: its figures, how long it took, and what went wrong (empty: nothing)."""

    step: str
    figures: list[dict[str, Any]]
    seconds: float
    fault: str


def run_step(step: Step, *, dry: bool, limit: float, env: dict[str, str], log: Path) -> Outcome:
    """Run a step; its output goes to ``log``.

    A step over its limit is interrupted, so that its log ends with the place, and killed with all its processes.
    """
    command = [sys.executable, *step.command, *(["--dry"] if dry and step.name != "tests" else [])]
    start = time.monotonic()
    fault = ""
    with log.open("w") as out:
        process = start_process(command, env, out)
        try:
            code = process.wait(timeout=limit)
            fault = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            fault = f"stopped after {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        finally:
            kill_group(process)
    seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").splitlines()
    figures = [json.loads(line.removeprefix(PREFIX)) for line in lines if line.startswith(PREFIX)]
    if step.name == "tests":
        facts = {"outcome": summary_of(lines)}
        figures = [{"name": "gpu tests", "value": seconds, "unit": "s", "goal": "all pass", "facts": facts}]
    elif not figures and not fault:
        fault = "no figure"
    return Outcome(step.name, figures, seconds, fault)


def start_process(command: list[str], env: dict[str, str], out: IO[str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own, whose output goes to ``out``."""
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a step, its workers too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def summary_of(lines: list[str]) -> str:
    """Pytest's counts, from the last line that has them."""
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return counts[-1].strip("= ").split(" in ")[0] if counts else "no result"


def unmet_requirements(package: str) -> list[str]:
    """What ``package`` requires and this Python has in another version, or not at all."""
    unmet = list[str]()
    for requirement in map(Requirement, importlib.metadata.requires(package) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                version = "none"
            if version == "none" or not requirement.specifier.contains(version, prereleases=True):
                unmet.append(f"{requirement}, and there is {version}")
    return unmet


def has_cuda() -> bool:
    """Whether torch finds a card."""
    import torch

    return torch.cuda.is_available()


def facts_about_machine(dry: bool) -> dict[str, str]:
    """What every figure carries: card, versions, date."""
    import torch

    card = "CPU, dry run" if dry else torch.cuda.get_device_name()
    return {"card": card, "torch": torch.__version__, "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def number(value: float) -> str:
    """Three significant digits, whole from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(figures: list[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = ["| figure | value | goal | more |", "|---|---|---|---|"]
    for one in figures:
        facts = one.get("facts", {})
        more = ", ".join(f"{key.replace('_', ' ')} {shown(fact)}" for key, fact in facts.items())
        lines.append(f"| {one['name']} | {number(one['value'])} {one['unit']} | {one.get('goal', '')} | {more} |")
    return "\n".join(lines)


def shown(fact: float | str) -> str:
    """A fact of a figure as text."""
    return fact if isinstance(fact, str) else number(fact)


def rates(figures: list[dict[str, Any]], machine: dict[str, str], work: Path) -> dict[str, Any]:
    """rates.json: samples per second of the jobs that tests/bench/plan.py knows, and the ceiling they are held to."""
    path = work / "ceiling"
    measured = {one["rate"]: one["value"] for one in figures if one.get("rate")}
    return {**machine, "ceiling": float(path.read_text()) if path.exists() else None, "rates": measured}


def run_steps(names: list[str], *, dry: bool, seconds: float, out: Path, work: Path) -> list[Outcome]:
    """Run the named steps (all, when none is named) within ``seconds`` altogether.

    One after the other, so that none takes from the next; two at a time in a dry run, whose figures mean nothing.
    """
    modules = [ROOT, ROOT / "tests" / "bench", ROOT / "tests" / "support", HERE]  # a measurement reuses the benches
    path = os.pathsep.join([*map(str, modules), *filter(None, [os.environ.get("PYTHONPATH")])])
    idle = {"OMP_WAIT_POLICY": "PASSIVE"}  # two steps of a dry run must not spin against each other
    given = {DEVICE: "cpu" if dry else "cuda", WORK: str(work), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    env = {**idle, **os.environ, **given}
    end = time.monotonic() + seconds

    def run(step: Step) -> Outcome:
        limit = min(step.seconds, end - time.monotonic())
        if limit < 1:
            return Outcome(step.name, [], 0.0, "no time left")
        log = work / f"{step.name}.log"
        outcome = run_step(step, dry=dry, limit=limit, env=env, log=log)
        report(outcome, log.read_text(errors="replace"), out / "log.txt")
        return outcome

    steps = [step for step in STEPS if not names or step.name in names]
    with ThreadPoolExecutor(2 if dry else 1) as pool:
        return list(pool.map(run, steps))


def report(outcome: Outcome, output: str, log: Path) -> None:
    """Print how a step went, with the end of its ``output`` where it failed, and append all of that to ``log``."""
    with log.open("a") as whole:
        whole.write(f"=== {outcome.step}\n{output}\n")
    lines = [f"{outcome.step}: {outcome.fault or 'done'} in {outcome.seconds:.0f} s, {len(outcome.figures)} figures"]
    if outcome.fault:
        said = [line for line in output.splitlines() if not line.startswith(PREFIX)]
        lines += [f"    {line}" for line in said[-LOG_LINES:]]
    print("\n".join(lines), flush=True)


def main() -> int:
    """Run, print, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--only", nargs="+", default=[], choices=[step.name for step in STEPS], metavar="STEP")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all steps together")
    parser.add_argument("--table", help="print the table of this figures.jsonl and do nothing else")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # steps inherit it ignored from a background job
    if given.table:
        try:
            lines = Path(given.table).read_text().splitlines()
        except OSError as error:
            parser.error(f"--table {given.table}: {error.strerror}")
        print(markdown([json.loads(line) for line in lines]))
        return 0
    if unmet := unmet_requirements("clipmill"):
        parser.error(f"clipmill needs {'; '.join(unmet)}: see tests/gpu/kit.txt and provided.txt")
    if not given.dry and not has_cuda():
        parser.error("no CUDA device: --dry runs the same steps on the CPU")
    out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="clipmill-gpu-out-"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")
    except OSError as error:
        parser.error(f"OUT={out}: {error.strerror}; give a folder that can be written")
    machine = facts_about_machine(given.dry)
    with tempfile.TemporaryDirectory(prefix="clipmill-gpu-") as folder:
        outcomes = run_steps(given.only, dry=given.dry, seconds=given.seconds, out=out, work=Path(folder))
        figures = [{**figure, "step": outcome.step, **machine} for outcome in outcomes for figure in outcome.figures]
        found = rates(figures, machine, Path(folder))
    (out / "figures.jsonl").write_text("".join(json.dumps(figure) + "\n" for figure in figures))
    (out / "rates.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(markdown(figures) + "\n")
    print(f"\n{', '.join(machine.values())}; files in {out}\n\n{markdown(figures)}")
    faults = [f"{outcome.step}: {outcome.fault}" for outcome in outcomes if outcome.fault]
    print("\n".join(["", *faults]) if faults else "\nall steps done")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
