"""What every worker process does first. Imports next to nothing: workers start with it."""

import ctypes
import os
import signal
import sys
from multiprocessing.process import parent_process


def die_with_parent() -> None:
    """In a worker: end when the parent is killed, so that no orphan writes beside a second run (Linux only).

    The kernel tells a death from now on; a parent that died while this worker started is found by its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if (parent := parent_process()) is not None and os.getppid() != parent.pid:
            os._exit(1)
