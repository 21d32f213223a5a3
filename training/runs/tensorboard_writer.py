"""TensorBoard's event file, written in the caller's thread, so that a full disk is the caller's error.

`SummaryWriter` writes from a thread of its own, which dies of a full disk with a traceback.
"""

import contextlib
import os
import socket
import time
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Curves:
    """A new event file in ``folder``; TensorBoard forgets what earlier files say of ``step`` and later ones."""

    def __init__(self, folder: str, step: int) -> None:
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{step}"
        self._file = open(os.path.join(folder, name), "ab")  # noqa: SIM115  # closed by __exit__
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), step=step, file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One value per curve. Raises OSError."""
        parts = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=parts)))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # what did not fit was told when it was written
            self._file.close()
