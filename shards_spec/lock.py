"""One writer at a time: a lock file that names its holder; the kernel frees it when that process ends, even if killed.

The lock is the kernel's (flock, which network file systems carry between hosts too), so a file that a killed process
left locks nothing. On a file system without such locks nothing is held, and a warning says so; nor on object stores.
"""

import contextlib
import errno
import fcntl
import getpass
import json
import logging
import os
import socket
import time
from collections.abc import Iterator

from shards_spec.files import UserError, is_alive, is_url
from shards_spec.sample import parse_object

log = logging.getLogger(__name__)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
WAIT_S = 0.5  # between two looks at a lock that is waited for
ORPHANS_S = 20.0  # how long to wait for worker processes of a killed holder: they share its lock until they end


@contextlib.contextmanager
def locked(path: str, what: str, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Hold the lock ``path`` (a hidden file of an existing folder) while the block lasts; it is gone afterwards.

    Raises UserError naming the holder (process, host, user, since when) where another process has it; with ``wait``
    it waits for that one instead. ``what`` is what it writes, for that message. Holders that are ``shared`` exclude no
    other such one, as the tasks of an array, which claims keep apart.
    """
    if is_url(path):
        yield
        return
    descriptor = _acquire(path, what, wait, shared)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if shared:
                fcntl.flock(
                    descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # fails while others hold it: the last deletes it
            os.unlink(path)  # while it is held: a process that opened it meanwhile sees in `_acquire` that it is gone
        os.close(descriptor)


def _acquire(path: str, what: str, wait: bool, shared: bool) -> int:
    """Open and lock the file; the descriptor, which holds the lock. Raises UserError."""
    is_told = False
    deadline = time.monotonic() + ORPHANS_S
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"{path}: the lock file of {what} cannot be opened ({error.strerror})") from error
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if _died_here(holder) and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            if wait:
                if not is_told:
                    log.info("%s is being written by %s: waiting for its end", what, _describe_holder(holder))
                is_told = True
                time.sleep(WAIT_S)
                continue
            raise UserError(
                f"{what} is being written by {_describe_holder(holder)}: wait for its end, or stop it first"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            log.warning("%s: this file system has no locks (%s); do not start the command twice", path, error.strerror)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
                return descriptor
        os.close(descriptor)  # its holder ended and deleted the file after this process had opened it


def _this_process() -> dict[str, object]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        user = str(os.getuid())
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "pid": os.getpid(), "user": user, "since": started}


def _describe_holder(data: bytes) -> str:
    try:
        holder = parse_object(data)
        return f"process {holder['pid']} on {holder['host']} (of {holder['user']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):  # it has just locked the file and not written yet
        return "another process"


def _died_here(data: bytes) -> bool:
    """Whether the holder was a process of this host that has ended."""
    try:
        holder = parse_object(data)
        return bool(holder["host"] == socket.gethostname() and not is_alive(int(holder["pid"])))
    except (ValueError, KeyError, TypeError, OverflowError):
        return False
