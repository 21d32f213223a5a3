"""Node-local copies of remote files, and read-ahead of local ones.

Ranks and worker processes of a machine share one folder of copies. So a shard crosses the network once, in one piece,
however many of them read it, and later epochs find it there.
"""

import atexit
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from stat import S_ISDIR

from shards_spec.files import (
    UserError,
    filesystem,
    free_bytes,
    is_url,
    read_bytes,
    remove_stale,
    store_errors,
    write_bytes,
)

log = logging.getLogger(__name__)
KEEP_SECONDS = 60  # a copy used within that time is kept: another process may be about to open it
SPARE_BYTES = 1 << 30  # free space on the disk that copies leave


def private_folder(path: Path) -> Path:
    """Return ``path``, made if missing, if it is a folder of this user that no one else can write to.

    Otherwise a fresh folder, removed when this process ends: anyone may have made ``path`` in the folder for temporary
    files before, and its files would be read as our copies.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        path.chmod(0o700)
        return path
    fresh = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent))
    log.warning("%s is not this user's alone: copies go to %s, until the end; name a folder by --scratch", path, fresh)
    maker = os.getpid()

    def remove() -> None:
        if os.getpid() == maker:  # not when a forked worker ends
            shutil.rmtree(fresh, ignore_errors=True)

    atexit.register(remove)
    return fresh


class LocalFileCache:
    """Copies of remote files in a folder that the processes of a machine share by file locks.

    Args:
        folder: Where copies go, made if missing; empty for a folder of this user among the temporary files.
        limit: Bytes of copies that are kept; those used last stay.
    """

    def __init__(self, folder: str = "", limit: int = 50 << 30) -> None:
        self._given = folder
        self.limit = limit
        # the process whose thread prefetches, and the paths that it shall fetch
        self._prefetcher: tuple[int, SimpleQueue[str]] | None = None

    @cached_property
    def folder(self) -> Path:
        """Where the copies are; made at the first use, since local datasets need none."""
        if self._given:
            Path(self._given).mkdir(parents=True, exist_ok=True)
            return Path(self._given)
        return private_folder(Path(tempfile.gettempdir(), f"clipmill-{os.getuid()}"))

    def get(self, path: str) -> str:
        """Return where to read a file: the path itself if it is local, else that of its complete copy.

        Raises:
            FileNotFoundError: The store has no such file.
            UserError: The store has another error, or the copy does not fit into the folder.
        """
        if not is_url(path):
            return path
        fs, inner = filesystem(path)
        with store_errors(path):
            version = fs.ukey(inner)
        name = hashlib.sha256(f"{path} {version}".encode()).hexdigest()[:32]
        copy = self.folder / f"{name}-{os.path.basename(path)}"
        if not copy.exists():
            with self._lock(name):
                if not copy.exists():  # another process may have made it in the meantime
                    data = read_bytes(path)
                    self._make_room(len(data), path)
                    write_bytes(str(copy), data)
        os.utime(copy)
        return str(copy)

    def prefetch(self, paths: list[str]) -> None:
        """Begin to copy remote files, in a thread, and to read local ones into the page cache.

        Errors are not reported here: `get` of the same file raises them.
        """
        for path in paths:
            if is_url(path):
                self._prefetch_queue().put(path)
                continue
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def _prefetch_queue(self) -> "SimpleQueue[str]":
        if self._prefetcher is None or self._prefetcher[0] != os.getpid():  # threads do not survive a fork
            queue: SimpleQueue[str] = SimpleQueue()
            threading.Thread(target=self._run_prefetcher, args=(queue,), daemon=True).start()
            self._prefetcher = (os.getpid(), queue)
        return self._prefetcher[1]

    def _run_prefetcher(self, queue: "SimpleQueue[str]") -> None:
        while True:
            with suppress(FileNotFoundError, UserError):
                self.get(queue.get())

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """A lock that one process of the machine holds; the system releases it when that process dies."""
        lock = self.folder / f".lock-{name[:2]}"
        with open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, path: str) -> None:
        """Remove the copies used longest ago until ``size`` more bytes fit. Raises UserError when the disk is full."""
        remove_stale(str(self.folder))
        copies = [(entry, entry.stat()) for entry in self._copies()]
        copies.sort(key=lambda pair: pair[1].st_mtime)
        used_bytes = sum(status.st_size for _, status in copies)
        spare_bytes = (free_bytes(str(self.folder)) or 0) - SPARE_BYTES
        for copy, status in copies:
            if used_bytes + size <= self.limit and size <= spare_bytes:
                return
            if status.st_mtime > time.time() - KEEP_SECONDS:
                break
            copy.unlink(missing_ok=True)  # a process that has it open can still read it
            used_bytes -= status.st_size
            spare_bytes += status.st_size
        if size > spare_bytes:
            raise UserError(
                f"{path}: its {size} bytes do not fit into {self.folder} (1 GiB of the disk stays free); name a folder "
                "with more room by --scratch, or mix fewer shards by --streams and --window"
            )

    def _copies(self) -> list[Path]:
        entries = [entry for entry in self.folder.iterdir() if not entry.name.startswith(".")]
        return [entry for entry in entries if entry.exists()]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_prefetcher": None}  # threads and queues cannot be pickled
