"""The one command: ``clipmill COMMAND …``. Everything heavy is imported when its command runs."""

import contextlib
import errno
import io
import logging
import os
import pkgutil
import shlex
import sys
from collections.abc import Callable, Container
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, NamedTuple, TextIO

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ("pipeline", "shards_spec", "slurm", "training")
ADVICE = {  # what to do about an error of the operating system
    errno.EMFILE: "allow this process more open files (ulimit -n 1024)",
    errno.ENOSPC: "free some space and rerun the same command to resume",
    errno.EACCES: "change the permissions, or give a folder of your own",
    errno.EROFS: "give a folder that can be written",
    errno.ENOTDIR: "a file is where a folder should be: give another path",
    errno.EISDIR: "a folder is where a file should be: move it away, or give another path",
    errno.EEXIST: "a file is where a folder should be: give another path",
}
# counters of stages whose names are plural, and their singular
COUNTED_THINGS = {
    "captions": "caption",
    "image vectors": "image vector",
    "text vectors": "text vector",
    "samples of an epoch": "sample of an epoch",
    "captions left out by --captions-where": "caption left out by --captions-where",
}
INTERRUPTED = "interrupted; rerun the same command to resume"


class _OwnPackages(MetaPathFinder):
    """Finds our packages beside this file: the folder where a command is started may have folders of the same names."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of one of our packages, None for every other module."""
        return PathFinder.find_spec(name, [HERE]) if name in PACKAGES else None


sys.meta_path.insert(0, _OwnPackages())


from shards_spec.layout import STAGE_COMMANDS, STAGES  # noqa: E402 - found beside this file only now


class Command(NamedTuple):
    """A line of the help page, and options and function as ``package.module:name``; without: see `_command`."""

    help: str
    config: str = ""
    function: str = ""


COMMANDS = {name: Command(STAGES[name].help, STAGES[name].config, STAGES[name].function) for name in STAGE_COMMANDS}
COMMANDS |= {
    "plan": Command(
        "hours, gigabytes and commands of all stages, from a minute's probe",
        "pipeline.plan.config:PlanConfig",
        "pipeline.plan.stage:plan",
    ),
    "classes": Command(
        "class names -> synsets of a vocabulary, a TSV",
        "pipeline.labels.classes_stage:ClassesConfig",
        "pipeline.labels.classes_stage:classes",
    ),
    "train": Command("train RECIPE: a student from shards and cache -> RUN"),
    "evalset": Command(
        "class folders or captioned images -> an evaluation set",
        "pipeline.evalset.config:EvalsetConfig",
        "pipeline.evalset.stage:evalset",
    ),
    "eval": Command(
        "zero-shot, retrieval, linear probe, k-NN of models on sets",
        "training.evaluation.config:EvalConfig",
        "training.evaluation.stage:evaluate",
    ),
    "search": Command(
        "find images by a text or by another image",
        "pipeline.search.config:SearchConfig",
        "pipeline.search.stage:search",
    ),
    "export": Command(
        "RUN -> a folder for open_clip, timm, transformers or onnxruntime",
        "training.export:ExportConfig",
        "training.export:export",
    ),
    "report": Command("one HTML page of a dataset or a run", "pipeline.report:ReportConfig", "pipeline.report:report"),
    "compare": Command(
        "one HTML page that compares training runs",
        "pipeline.report.compare:CompareConfig",
        "pipeline.report.compare:compare",
    ),
    "check": Command(
        "validate a dataset: files, hashes, keys, totals",
        "pipeline.check.config:CheckConfig",
        "pipeline.check.stage:check",
    ),
    "why": Command(
        "the life of one sample: its row, captions, synsets, cosines, steps of a run",
        "pipeline.why.config:WhyConfig",
        "pipeline.why.stage:why",
    ),
    "takedown": Command(
        "samples out of every file of a dataset, with proof",
        "pipeline.takedown.config:TakedownConfig",
        "pipeline.takedown.stage:takedown",
    ),
    "submit": Command("submit STAGE ROOT | train RECIPE | pipeline ROOT: the same commands on Slurm"),
    "jobs": Command(
        "what was submitted for a dataset or a run, and how it goes",
        "slurm.status:JobsConfig",
        "slurm.status:jobs",
    ),
}


def usage() -> str:
    """The help page; nothing that takes time is imported for it."""
    lines = [f"  {name:8} {command.help}" for name, command in COMMANDS.items()]
    return (
        "usage: clipmill COMMAND ...\n\n"
        + "\n".join(lines)
        + "\n\nclipmill COMMAND --help shows every option; clipmill --version the version."
    )


def main() -> None:
    """Entry point. Exit code 0, 1 (data broken), 2 (the user's mistake, one line on stderr), 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows what it has no letters for
    code = 1
    try:
        code = _run(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:  # the reader left, as `head` does, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            _fail(code, f"the output cannot be written: {error.strerror}")
    except KeyboardInterrupt:  # before a command has begun: while modules are imported
        code = _fail(130, INTERRUPTED)
    sys.exit(code)


def _run(words: list[str]) -> int:
    """Run a command; an error of the user, the data or the system becomes one line on stderr and an exit code."""
    if words[:1] in ([], ["-h"], ["--help"], ["help"]):
        print(usage())
        return 0
    from shards_spec.display import log_to_stderr
    from shards_spec.files import DataError, UserError

    try:
        log_to_stderr()
        _check_encoding(words)
        return _command(words[0], words[1:])
    except UserError as error:
        return _fail(2, str(error))
    except DataError as error:
        return _fail(1, str(error))
    except BrokenPipeError:
        return 1
    except OSError as error:
        logging.getLogger("clipmill").debug("", exc_info=True)
        return _fail(2, _describe_os_error(error))
    except KeyboardInterrupt:
        return _fail(130, INTERRUPTED)
    except SystemExit as leave:  # of --help
        return int(leave.code or 0)


def _check_encoding(words: list[str]) -> None:
    """Raise UserError for a word whose bytes are no text in the file system's encoding."""
    from shards_spec.files import UserError

    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # how Python holds such bytes
            encoding = sys.getfilesystemencoding()
            hint = "" if encoding == "utf-8" else ", or set PYTHONUTF8=1"
            raise UserError(f"{word!r} is no text in {encoding}: rename the file or folder{hint}")


def _describe_os_error(error: OSError) -> str:
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    said = str(error.strerror or error)
    advice = ADVICE.get(error.errno or 0)
    return (f"{where}: {said}" if where else said) + (f"; {advice}" if advice else "")


def _command(command: str, words: list[str]) -> int:
    """Run a command by its name; three of them read their words themselves."""
    from importlib.metadata import version

    from shards_spec.files import UserError

    if command == "--version":
        print(f"clipmill {version('clipmill')}")
        return 0
    if command not in COMMANDS:
        from shards_spec.suggest import did_you_mean

        raise UserError(f"no command {command!r}; {did_you_mean(command, COMMANDS)}")
    if command == "train":
        return _train(words)
    if command == "submit":
        return _submit(words)
    from pipeline.core.command_line import parse

    config = parse(command, pkgutil.resolve_name(COMMANDS[command].config), words)
    return _call(command, pkgutil.resolve_name(COMMANDS[command].function), config)


def _fail(code: int, message: str) -> int:
    with contextlib.suppress(OSError):
        _print(f"clipmill: {message}", file=sys.stderr)
    return code


def _print(text: object, file: TextIO | None = None) -> None:
    """Print text that may come from outside: captions, names of files, addresses."""
    from shards_spec.display import shown

    print(shown(str(text)), file=file or sys.stdout)


def _submit(words: list[str]) -> int:
    from slurm.step import Step
    from slurm.submit import submit

    def run_here(step: Step) -> int:
        if step.command == "train":
            return _train(list(step.words))
        if step.command == "check":
            from pipeline.check.config import CheckConfig
            from pipeline.check.stage import check

            return _call("check", check, CheckConfig(step.root, workers=step.config.workers))
        return _call(step.command, step.function, step.config)

    return submit(words, run_here)


def _call(command: str, function: Any, config: Any) -> int:
    """Call a command's function, print its outcome and return the exit code."""
    if command in STAGE_COMMANDS:
        return _call_stage(command, function, config)
    if command == "search":
        return _search(function, config)
    if command == "check" and config.repair:
        return _repair(config)
    outcome = _compare(function, config) if command == "compare" else function(config)
    if command == "check":
        return _print_problems(config.root, outcome, advice=_repair_advice(config.root))
    if command == "classes":
        _print(f"classes: {outcome.summary}")
    if command == "takedown":
        for line in outcome.lines:
            _print(line)
        return 0 if outcome.is_matched else 1
    if command == "why":
        _print_life(config, outcome)
    if command in ("compare", "evalset", "plan", "report", "jobs"):
        _print(outcome)
    return 0


def _print_problems(root: str, problems: list[str], said: Container[str] = (), advice: str = "") -> int:
    """Print what `check` found, but what was ``said`` before, with ``advice`` on it; returns the exit code."""
    from shards_spec.messages import counted

    for problem in problems:
        if problem not in said:
            _print(problem)
    _print(f"{root}: {counted(len(problems), 'problem') + advice if problems else 'all promises hold'}")
    return 1 if problems else 0


def _repair_advice(root: str) -> str:
    """What the last line of `check` adds to the number of problems; nothing where there is no dataset."""
    from shards_spec.files import exists, join

    if not any(exists(join(root, folder)) for folder in ("raw", "shards")):
        return ""
    return (
        f"; `clipmill check {shlex.quote(root)} --repair` mends what it can, from the web only what no other file has "
        "(--dry-run shows what it would do)"
    )


def _repair(config: Any) -> int:
    """Repair a dataset and print every action, then the problems that are left."""
    from pipeline.repair.stage import repair

    said = list[str]()

    def say(line: str) -> None:
        said.append(line)
        _print(line)

    return _print_problems(config.root, repair(config, say), said)


def _print_life(config: Any, life: Any) -> None:
    """Print what became of a sample and, of a run, when it was used."""
    lines = list(life.lines)
    if config.run:
        from training.runs.uses import uses_of

        uses = uses_of(config.run, config.root, {"raw": life.raw, "shards": life.final})
        lines += [f"train: {config.run}", *(f"  {line}" for line in uses)]
    for line in (life.key, *lines):
        _print(line)


def _compare(function: Callable[[Any, Any], Any], config: Any) -> Any:
    """Compare runs; what they say of images of --data is computed by training/, which pipeline/ does not import."""
    guesses = None
    if config.data:
        from pipeline.report.compare import run_folders
        from training.evaluation.guesses import guess_images

        guesses = guess_images(run_folders(config.runs), config.data, count=config.images, device=config.device)
    return function(config, guesses)


def _search(function: Callable[[Any, Any], Any], config: Any) -> int:
    """Search with the model that the config names; pipeline/ and training/ do not import each other."""
    from pipeline.search.page import write_search_page
    from training.evaluation.features import load_embedding_model

    model = load_embedding_model(
        config.model,
        config.pretrained,
        raw=config.raw,
        best=config.best,
        trust=config.trust,
        device=config.device,
        precision=config.precision,
        batch_size=config.batch_size,
    )
    outcome = function(config, model)
    for line in outcome.lines(config.json):
        _print(line)
    if config.html:
        _print(write_search_page(config.html, outcome))
    return 0


def _call_stage(command: str, function: Callable[[Any], Any], config: Any) -> int:
    """Call a stage's function and print its totals, or what `vocab` counted."""
    from pipeline.core.no_success import explain_no_success
    from pipeline.core.runner import ShardsFailed

    try:
        summary = function(config)
    except ShardsFailed as error:
        return _fail(1, str(error))
    if command == "vocab":
        _print(_vocabulary_line(summary))
        return 0
    _print(_dedup_line(summary) if command == "dedup" else _stage_line(command, summary))
    nothing = explain_no_success(command, summary.counts)
    return _fail(1, nothing) if nothing else 0


def _vocabulary_line(vocabulary: Any) -> str:
    from shards_spec.messages import counted

    occurrences = counted(vocabulary.header["occurrences"], "occurrence")
    return f"vocab: {counted(len(vocabulary), 'synset')} of {occurrences}, sha256 {vocabulary.sha256[:12]}"


def _dedup_line(summary: Any) -> str:
    from shards_spec.messages import counted

    exact = summary.counts.get("duplicate image", 0)
    near = summary.counts.get("near-duplicate image", 0)
    images = counted(sum(summary.counts.values()), "image")
    if not exact + near:
        return f"dedup: no duplicates among {images}"
    verb = "is a duplicate" if exact + near == 1 else "are duplicates"
    return f"dedup: {exact + near} of {images} {verb} ({exact} exact, {near} near)"


def _stage_line(command: str, summary: Any) -> str:
    from shards_spec.messages import counted

    samples = summary.counts.get("success", 0)
    speed = samples * summary.made / summary.shards / summary.seconds if summary.made else 0.0
    rate = f", {speed:.0f} samples/s" if speed else ""
    parts = [
        f"{command}: {counted(samples, 'sample')} in {counted(summary.shards, 'shard')} "
        f"({summary.made} made now, {summary.seconds:.1f} s{rate})"
    ]
    reasons = [f"{number} {reason}" for reason, number in summary.counts.items() if reason != "success"]
    if reasons:
        parts.append(f"left out: {', '.join(reasons)}")
    if summary.counters:
        parts.append(", ".join(_counter(what, number) for what, number in summary.counters.items()))
    return "; ".join(parts)


def _counter(what: str, number: int) -> str:
    """``5 captions``, ``1 caption``, ``1 redrawn``: the names of counters are plural, or no nouns."""
    from shards_spec.messages import counted

    return counted(number, COUNTED_THINGS[what], what) if what in COUNTED_THINGS else f"{number} {what}"


def _train_usage(recipes: dict[str, str]) -> str:
    """The help page of `train`, from the recipes' names and lines."""
    lines = [f"  {name:9} {line}" for name, line in recipes.items()]
    return (
        "usage: clipmill train RECIPE ...\n\n"
        + "\n".join(lines)
        + "\n\n--smoke trains a few small steps; --predict-memory only says what memory a step takes.\n"
        "clipmill train RECIPE --help shows every option."
    )


def _train(words: list[str]) -> int:
    """Run ``clipmill train WORDS``, the first of which is the recipe; rank 0 prints the RUN folder."""
    from training.recipes import RECIPES

    recipe = words[0] if words else "--help"
    if recipe in ("-h", "--help"):
        print(_train_usage(RECIPES))
        return 0
    if recipe not in RECIPES:
        from shards_spec.suggest import did_you_mean

        return _fail(2, f"no recipe {recipe!r}; {did_you_mean(recipe, RECIPES)}")
    from pipeline.core.command_line import parse_several
    from training.configs import command_line_parts

    config, trial = parse_several(f"train {recipe}", command_line_parts(recipe, words[1:]), words[1:])
    from training.trainer import predict, train

    if trial.predict_memory:
        for phase, memory in predict(recipe, config).items():
            _print(f"{phase}: {memory}" if phase else memory)
        return 0
    out = train(recipe, config)
    if os.environ.get("RANK", "0") == "0":
        _print(out)
    return 0


if __name__ == "__main__":
    main()
