"""Signals that stop a training after the step in progress."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def stop_flag() -> Iterator[list[signal.Signals]]:
    """Give a list that receives stopping signals.

    A second Ctrl-C acts at once. Schedulers repeat the other signals, which stay harmless.
    """
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for name in STOPPING:
        before[name] = signal.signal(name, note)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
