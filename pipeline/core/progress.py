"""How far a stage has come: a bar on a terminal, lines in a log."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from shards_spec.messages import counted

log = logging.getLogger(__name__)
LOG_INTERVAL_S = 10


@contextlib.contextmanager
def show_progress(
    name: str, total: int | None, status_text: Callable[[], str] | None
) -> Iterator[Callable[[int], None]]:
    """Give the block a function that shows a number of finished shards, of ``total`` if that is known.

    ``status_text`` returns more text for the line; it replaces the bar's estimate of the time left.
    """
    console = Console(stderr=True)
    text = status_text or (lambda: "")
    if not console.is_terminal:
        yield _log_line(name, total, text)
        return
    columns: list[ProgressColumn] = [
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards {task.fields[status]}"),
    ]
    if status_text is None:
        columns.append(TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total, status="")
        yield lambda done: bar.update(task, completed=done, status=text())


def _log_line(name: str, total: int | None, text: Callable[[], str]) -> Callable[[int], None]:
    """A function that logs a line, at most one every `LOG_INTERVAL_S` seconds."""
    last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > LOG_INTERVAL_S:
            last = time.monotonic()
            shards = counted(total, "shard") if total else "? shards"
            log.info("%s: %d of %s %s", name, done, shards, text())

    return show
