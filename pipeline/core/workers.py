"""What every worker process does first. Imports next to nothing, because workers start with it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess, parent_process

CPU_QUOTA = "/sys/fs/cgroup/cpu.max"  # of a container: microseconds of all cores per microseconds, or "max"
SHARDS_PER_WORKER = 16  # of a stage that only reads a table; a process takes most of a second to start
BLAS_THREADS = "OPENBLAS_NUM_THREADS"  # of the BLAS that numpy brings
# of mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that this process gets when its parent dies


def spawn_context() -> SpawnContext:
    """How the processes of a stage start, of which there is one per core.

    Each has one thread in numpy's BLAS, unless the environment says otherwise: by default it would have one per core,
    and on a busy machine they take most of the time for waiting for each other.
    """
    os.environ.setdefault(BLAS_THREADS, "1")
    return multiprocessing.get_context("spawn")


def die_with_parent() -> None:
    """End this worker when its parent is killed, so that no orphan writes beside a second run (Linux only).

    SIGINT is ignored: Ctrl-C reaches the whole process group, and the parent ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it is dead, or this is the child of its fork server
            threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()  # a process of a fork server has a pipe to the parent
    os._exit(1)


def keep_freed_memory() -> None:
    """Keep what this process frees for its next image (glibc only): 128 MB at most, in blocks of up to 32 MB.

    By default each image's megabytes go back to the system and come anew, cleared, page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 128 << 20)


def workers_for(shards: int, workers: int) -> int:
    """How many of ``workers`` processes are worth their start where a shard takes milliseconds."""
    return max(1, min(workers, shards // SHARDS_PER_WORKER))


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than a container's quota gives."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(CPU_QUOTA) as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))
