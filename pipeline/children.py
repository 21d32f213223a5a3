"""What every worker process does first. Imports next to nothing: workers start with it."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """In a worker: end when the parent is killed, so that no orphan writes beside a second run (Linux only)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
