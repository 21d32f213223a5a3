"""The demo's scenes, served over HTTP as the demo serves them."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slurm_cluster import until

DEMO = Path(__file__).parents[2] / "demo"


@contextmanager
def served_scenes(folder: Path, *, count: int, eval_count: int) -> Iterator[None]:
    """Write so many scenes with their list and its faults into ``folder``, and serve it within."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--count", str(count), "--base-url", f"http://127.0.0.1:{port}", "--eval-count", str(eval_count))
    subprocess.run([sys.executable, DEMO / "scenes.py", folder, *words], check=True, capture_output=True)
    server = subprocess.Popen([sys.executable, DEMO / "serve.py", folder, str(port)])
    try:
        until(lambda: _answers(port), 30)
        yield
    finally:
        server.kill()
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0
