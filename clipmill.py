"""The one command: ``clipmill COMMAND …``. Everything heavy is imported when its command runs."""

import contextlib
import errno
import importlib
import io
import logging
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = ("pipeline", "shards_spec", "slurm", "training")
MENDS = {  # to what the system says
    errno.EMFILE: "allow this process more open files (ulimit -n 1024)",
    errno.ENOSPC: "free some space and run the same command again, it goes on",
    errno.EACCES: "change the permissions, or give a folder of your own",
    errno.EROFS: "give a folder that can be written",
    errno.ENOTDIR: "a file is where a folder should be: give another path",
    errno.EEXIST: "a file is where a folder should be: give another path",
}

# command: (module, config class, function, one line)
COMMANDS = {
    "ingest": ("pipeline.ingest.stage", "IngestConfig", "ingest", "list, folder or img2dataset shards -> ROOT/raw"),
    "dedup": (
        "pipeline.dedup.stage",
        "DedupConfig",
        "dedup",
        "duplicates over all shards -> ROOT/dedup, which pack obeys",
    ),
    "caption": (
        "pipeline.caption.stage",
        "CaptionConfig",
        "caption",
        "N CoCa captions per image -> ROOT/captions/NAME",
    ),
    "pack": ("pipeline.pack.stage", "PackConfig", "pack", "images, captions, WordNet synsets -> ROOT/shards"),
    "vocab": ("pipeline.labels.vocab_stage", "VocabConfig", "vocab", "synsets by frequency -> ROOT/vocab/NAME.tsv"),
    "classes": (
        "pipeline.labels.classes_stage",
        "ClassesConfig",
        "classes",
        "class names -> synsets of a vocabulary, a TSV",
    ),
    "cache": ("pipeline.cache.stage", "CacheConfig", "cache", "teacher embeddings of K views -> ROOT/teacher/NAME"),
    "train": ("", "", "", "train RECIPE: a student from shards and cache -> RUN"),
    "eval": ("training.evaluation.stage", "EvalConfig", "evaluate", "zero-shot classification and retrieval"),
    "export": ("training.export", "ExportConfig", "export", "RUN -> an open_clip folder"),
    "report": ("pipeline.report", "ReportConfig", "report", "one HTML page of a dataset or a run"),
    "check": ("pipeline.check.stage", "CheckConfig", "check", "prove a dataset's promises"),
    "submit": ("", "", "", "submit STAGE ROOT | train RECIPE | pipeline ROOT: the same commands on Slurm"),
    "jobs": ("slurm.status", "JobsConfig", "jobs", "what was submitted for a dataset or a run, and how it goes"),
}


class _OursFirst(MetaPathFinder):
    """Finds our packages beside this file: their plain names may be those of folders where a command is started."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of one of our packages, None for all else."""
        return PathFinder.find_spec(name, [HERE]) if name in PACKAGES else None


sys.meta_path.insert(0, _OursFirst())


def usage() -> str:
    """The help page, printed without importing anything."""
    lines = [f"  {name:8} {line}" for name, (*_, line) in COMMANDS.items()]
    return (
        "usage: clipmill COMMAND ...\n\n" + "\n".join(lines)
        + "\n\nclipmill COMMAND --help shows every option; clipmill --version the version."
    )  # fmt: skip


def main() -> None:
    """Entry point. Exit code 0, 1 (data broken), 2 (the user's mistake, one line on stderr), 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows what it has no letters for
    code = 1
    try:
        code = _told(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:  # the reader left, as `head` does, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            _fail(code, f"the output cannot be written: {error.strerror}")
    except KeyboardInterrupt:  # before a command has begun: while modules are imported
        code = _fail(130, "interrupted; the same command goes on where it stopped")
    sys.exit(code)


def _told(words: list[str]) -> int:
    """Run a command; what users, data and the system can be blamed for is one line."""
    if words[:1] in ([], ["-h"], ["--help"]):
        print(usage())
        return 0
    from shards_spec.display import log_to_stderr
    from shards_spec.files import DataError, UserError

    try:
        log_to_stderr()
        for word in words:
            if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
                encoding = sys.getfilesystemencoding()
                way = "" if encoding == "utf-8" else ", or set PYTHONUTF8=1"
                raise UserError(f"{word!r} is no text in {encoding}: rename the file or folder{way}")
        return _command(words)
    except UserError as error:
        return _fail(2, str(error))
    except DataError as error:
        return _fail(1, str(error))
    except BrokenPipeError:
        return 1
    except OSError as error:
        logging.getLogger("clipmill").debug("", exc_info=True)
        return _fail(2, _system_said(error))
    except KeyboardInterrupt:
        return _fail(130, "interrupted; the same command goes on where it stopped")
    except SystemExit as leave:  # of --help
        return int(leave.code or 0)


def _system_said(error: OSError) -> str:
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    mend = MENDS.get(error.errno or 0, "")
    return f"{where}{': ' if where else ''}{error.strerror or error}{'; ' if mend else ''}{mend}"


def _command(words: list[str]) -> int:
    from importlib.metadata import version

    from shards_spec.files import UserError

    command, rest = words[0], words[1:]
    if command == "--version":
        print(f"clipmill {version('clipmill')}")
        return 0
    if command not in COMMANDS:
        from shards_spec.suggest import did_you_mean

        raise UserError(f"no command {command!r}; {did_you_mean(command, COMMANDS)}")
    own = {"train": _train, "submit": _submit}.get(command)
    return own(rest) if own else _run(command, rest)


def _fail(code: int, message: str) -> int:
    with contextlib.suppress(OSError):
        _say(f"clipmill: {message}", file=sys.stderr)
    return code


def _say(text: object, file: Any = None) -> None:
    """Print what may hold words of others."""
    from shards_spec.display import shown

    print(shown(str(text)), file=file or sys.stdout)


def _run(command: str, rest: list[str]) -> int:
    from pipeline.core.command_line import parse

    module_name, class_name, function_name, _ = COMMANDS[command]
    module = importlib.import_module(module_name)
    config = parse(command, getattr(module, class_name), rest)
    return _finish(command, getattr(module, function_name), config)


def _submit(rest: list[str]) -> int:
    from slurm.submit import submit

    return submit(
        rest, COMMANDS,
        lambda step: _train(list(step.words)) if step.command == "train"
        else _finish(step.command, step.function, step.config),
    )  # fmt: skip


def _finish(command: str, function: Any, config: Any) -> int:
    """Run a command and print what it is asked for."""
    if command in ("ingest", "dedup", "caption", "pack", "cache"):
        return _run_stage(command, function, config)
    outcome = function(config)
    if command == "check":
        for problem in outcome:
            _say(problem)
        _say(f"{config.root}: {len(outcome)} problems" if outcome else f"{config.root}: all promises hold")
        return 1 if outcome else 0
    if command == "vocab":
        _say(
            f"vocab: {len(outcome)} synsets of {outcome.header['occurrences']} occurrences, "
            f"sha256 {outcome.sha256[:12]}"
        )
    if command == "classes":
        _say(f"classes: {outcome.summary}")
    if command in ("report", "jobs"):
        _say(outcome)
    return 0


def _run_stage(command: str, function: Any, config: Any) -> int:
    from pipeline.core.runner import ShardsFailed

    try:
        summary = function(config)
    except ShardsFailed as error:
        return _fail(1, str(error))
    if command == "dedup":
        exact, near = (summary.counts.get(f"{kind}duplicate image", 0) for kind in ("", "near-"))
        images = sum(summary.counts.values())
        _say(f"dedup: {exact + near} of {images} images are duplicates ({exact} exact, {near} near)")
        return _checked(command, summary)
    others = ", ".join(f"{number} {reason}" for reason, number in summary.counts.items() if reason != "success")
    facts = ", ".join(f"{number} {what}" for what, number in summary.facts.items())
    samples = summary.counts.get("success", 0)
    rate = f", {samples * summary.made / summary.shards / summary.seconds:.0f} samples/s" if summary.made else ""
    done = (
        f"{command}: {samples} samples in {summary.shards} shards "
        f"({summary.made} made now, {summary.seconds:.1f} s{rate})"
    )
    _say("; ".join([done, *([f"left out: {others}"] if others else []), *([facts] if facts else [])]))
    return _checked(command, summary)


def _checked(command: str, summary: Any) -> int:
    """The exit code of a stage: 1 with a word about it when nothing came out."""
    from pipeline.core.no_success import explain_no_success

    nothing = explain_no_success(command, summary.counts)
    return _fail(1, nothing) if nothing else 0


def _train(rest: list[str]) -> int:
    from training.recipes import RECIPES

    recipe = rest[0] if rest else "--help"
    if recipe in ("-h", "--help"):
        print(
            "usage: clipmill train RECIPE ...\n\n"
            + "\n".join(f"  {name:9} {line}" for name, line in RECIPES.items())
            + "\n\n--smoke trains a few small steps; --predict-memory only says what memory a step takes.\n"
            "clipmill train RECIPE --help shows every option."
        )
        return 0
    if recipe not in RECIPES:
        from shards_spec.suggest import did_you_mean

        return _fail(2, f"no recipe {recipe!r}; {did_you_mean(recipe, RECIPES)}")
    from pipeline.core.command_line import Tries, parse_several

    module = importlib.import_module(f"training.recipes.{recipe}")
    from training.config import smoke

    default = smoke(module.config()) if "--smoke" in rest else module.config()
    config, tries = parse_several(
        f"train {recipe}", {recipe: (type(default), default), "tries": (Tries, None)}, rest[1:]
    )
    from training.trainer import predict, train

    if tries.predict_memory:
        _say(predict(recipe, config))
        return 0
    out = train(recipe, config)
    if os.environ.get("RANK", "0") == "0":
        _say(out)
    return 0


if __name__ == "__main__":
    main()
