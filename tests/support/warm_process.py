"""Processes that run Python code of a test without importing torch anew: forked from a server that has it.

A fork of the test process itself would do for no training: autograd refuses to run in the child of a process that used
it. The server, multiprocessing's, imports and waits; each process costs some milliseconds in place of seconds.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

# shards_spec before torch, whose threads it keeps from spinning
PRELOADED = ["shards_spec", "open_clip", "training.trainer", "training.recipes.clip", "training.recipes.tinyclip"]
_LOCK = threading.Lock()
_FORKSERVER = multiprocessing.get_context("forkserver")
_server_pid: int | None = None  # of the server that has imported these


class WarmProcess:
    """A process in a session of its own, with the part of `subprocess.Popen` that tests need.

    ``words`` are its ``sys.argv[1:]``, ``env`` its environment; its output goes to files, which `communicate` reads, or
    all of it to the file ``log``.
    """

    def __init__(
        self, code: str, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None, log: str = ""
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = warm_context()
        outputs = [log or os.path.join(self._folder.name, name) for name in ("out", "err")]
        arguments = (code, words, outputs, str(cwd or Path.cwd()), dict(env or os.environ))
        self._process = context.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that killed it, None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """As `returncode`."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return the exit code. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + (timeout or 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a warm process", timeout)
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it wrote to standard output and to standard error."""
        self.wait(timeout)
        out, errors = (Path(self._folder.name, name).read_text() for name in ("out", "err"))
        return out, errors


def warm_context() -> multiprocessing.context.ForkServerContext:
    """The context of processes forked from the server.

    The server takes the place of one with other imports, such as that of the cache's rendering processes.
    """
    global _server_pid
    with _LOCK:
        server = forkserver._forkserver  # the process has one
        if _server_pid is None or server._forkserver_pid != _server_pid:
            server._stop()
            server.set_forkserver_preload(PRELOADED)
            server.ensure_running()
            _server_pid = server._forkserver_pid
    return _FORKSERVER


def _run(code: str, words: tuple[str, ...], outputs: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Run code in the forked child as ``python -c CODE WORDS`` does."""
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own; it inherits the server's
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["-c", *words]
    exec(compile(code, "<a test's code>", "exec"), {"__name__": "__main__"})
