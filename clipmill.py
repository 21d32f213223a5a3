"""The one command: ``clipmill COMMAND …``. Everything heavy is imported when its command runs."""

import importlib
import logging
import os
import sys
from typing import Any

# command: (module, config class, function, one line)
COMMANDS = {
    "ingest": ("pipeline.ingest", "IngestConfig", "ingest", "list, folder or img2dataset shards -> ROOT/raw"),
    "dedup": ("pipeline.dedup", "DedupConfig", "dedup", "duplicates over all shards -> ROOT/dedup, which pack obeys"),
    "caption": ("pipeline.caption", "CaptionConfig", "caption", "N CoCa captions per picture -> ROOT/captions/NAME"),
    "pack": ("pipeline.pack", "PackConfig", "pack", "pictures, captions, WordNet synsets -> ROOT/shards"),
    "vocab": ("pipeline.vocab", "VocabConfig", "vocab", "synsets by frequency -> ROOT/vocab/NAME.tsv"),
    "classes": ("pipeline.class_map", "ClassesConfig", "classes", "class names -> synsets of a vocabulary, a TSV"),
    "cache": ("pipeline.cache", "CacheConfig", "cache", "teacher embeddings of K views -> ROOT/teacher/NAME"),
    "train": ("", "", "", "train RECIPE: a student from shards and cache -> RUN"),
    "eval": ("training.evaluate", "EvalConfig", "evaluate", "zero-shot classification and retrieval"),
    "export": ("training.export", "ExportConfig", "export", "RUN -> an open_clip folder"),
    "report": ("pipeline.report", "ReportConfig", "report", "one HTML page of a dataset or a run"),
    "check": ("pipeline.check", "CheckConfig", "check", "prove a dataset's promises"),
    "submit": ("", "", "", "submit STAGE ROOT | train RECIPE | pipeline ROOT: the same commands on Slurm"),
    "jobs": ("slurm.status", "JobsConfig", "jobs", "what was submitted for a dataset or a run, and how it goes"),
}


def usage() -> str:
    """The help page, printed without importing anything."""
    lines = [f"  {name:8} {line}" for name, (*_, line) in COMMANDS.items()]
    return "usage: clipmill COMMAND ...\n\n" + "\n".join(lines) + "\n\nclipmill COMMAND --help shows every option."


def main() -> None:
    """Entry point. Exit code 0, 1 (data broken), 2 (the user's mistake, one line on stderr)."""
    logging.basicConfig(level=os.environ.get("CLIPMILL_LOG", "INFO"), format="%(levelname).1s %(message)s")
    logging.getLogger().handlers[0].addFilter(_ours)
    command, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command not in COMMANDS:
        sys.exit(_fail(2, f"no command {command!r}; there are {', '.join(COMMANDS)}"))
    from shards_spec.files import DataError, UserError

    try:
        own = {"train": _train, "submit": _submit}.get(command)
        sys.exit(own(rest) if own else _run(command, rest))
    except UserError as error:
        sys.exit(_fail(2, str(error)))
    except DataError as error:
        sys.exit(_fail(1, str(error)))
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_fail(130, "interrupted; the same command goes on where it stopped"))


def _fail(code: int, message: str) -> int:
    print(f"clipmill: {message}", file=sys.stderr)
    return code


def _parse(config_class: Any, rest: list[str], prog: str, default: Any = None) -> Any:
    import tyro

    return tyro.cli(config_class, args=rest, prog=prog, **({"default": default} if default is not None else {}))


def _run(command: str, rest: list[str]) -> int:
    module_name, class_name, function_name, _ = COMMANDS[command]
    module = importlib.import_module(module_name)
    config = _parse(getattr(module, class_name), rest, f"clipmill {command}")
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
            print(problem)
        print(f"{config.root}: {len(outcome)} problems" if outcome else f"{config.root}: all promises hold")
        return 1 if outcome else 0
    if command == "vocab":
        print(
            f"vocab: {len(outcome)} synsets of {outcome.header['occurrences']} occurrences, "
            f"sha256 {outcome.sha256[:12]}"
        )
    if command == "classes":
        print(f"classes: {outcome.summary}")
    if command in ("report", "jobs"):
        print(outcome)
    return 0


def _run_stage(command: str, function: Any, config: Any) -> int:
    from pipeline.stage import ShardsFailed

    try:
        summary = function(config)
    except ShardsFailed as error:
        return _fail(1, str(error))
    if command == "dedup":
        exact, near = (summary.counts.get(f"{kind}duplicate image", 0) for kind in ("", "near-"))
        pictures = sum(summary.counts.values())
        print(f"dedup: {exact + near} of {pictures} pictures are duplicates ({exact} exact, {near} near)")
        return 0
    others = ", ".join(f"{number} {reason}" for reason, number in summary.counts.items() if reason != "success")
    facts = ", ".join(f"{number} {what}" for what, number in summary.facts.items())
    samples = summary.counts.get("success", 0)
    rate = f", {samples * summary.made / summary.shards / summary.seconds:.0f} samples/s" if summary.made else ""
    done = (
        f"{command}: {samples} samples in {summary.shards} shards "
        f"({summary.made} made now, {summary.seconds:.1f} s{rate})"
    )
    print("; ".join([done, *([f"left out: {others}"] if others else []), *([facts] if facts else [])]))
    return 0


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
        return _fail(2, f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    module = importlib.import_module(f"training.recipes.{recipe}")
    from training.config import smoke

    default = smoke(module.config()) if "--smoke" in rest else module.config()
    options = [option for option in rest[1:] if option not in ("--smoke", "--predict-memory")]
    config = _parse(type(default), options, f"clipmill train {recipe}", default)
    from training.trainer import predict, train

    if "--predict-memory" in rest:
        print(predict(recipe, config))
        return 0
    out = train(recipe, config)
    if os.environ.get("RANK", "0") == "0":
        print(out)
    return 0


def _ours(record: logging.LogRecord) -> bool:
    """Keep warnings of all, chatter only of our own modules."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in ("pipeline", "training", "slurm")


if __name__ == "__main__":
    main()
