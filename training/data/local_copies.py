"""What is read soon, brought near: remote files are copied once per machine, local ones into the page cache.

Ranks and worker processes of a machine share one folder of copies, so a shard crosses the network once however many
of them read it, in one piece as object stores like it, and later epochs find it there.
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
KEEP_SECONDS = 60  # a copy used within that time stays: another process may be about to open it
SPARE_BYTES = 1 << 30  # of the disk left free


def private_folder(path: Path) -> Path:
    """``path``, made where it is missing, if it is this user's and nobody else can write there; else a fresh folder.

    Anybody may take a name among the temporary files before us: what lies there would be read as ours. The fresh folder
    goes when this process ends.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        path.chmod(0o700)
        return path
    fresh = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent))
    log.warning("%s is not this user's alone: copies go to %s, until the end; name a folder by --scratch", path, fresh)
    maker = os.getpid()
    atexit.register(lambda: shutil.rmtree(fresh, ignore_errors=True) if os.getpid() == maker else None)
    return fresh


class LocalFileCache:
    """Copies of remote files in ``folder`` (made when missing), at most ``limit`` bytes, those used last stay.

    With an empty ``folder`` they go to this user's own among the temporary files. Processes share it by file locks.
    """

    def __init__(self, folder: str = "", limit: int = 50 << 30) -> None:
        self._given = folder
        self.limit = limit
        self._soon: tuple[int, SimpleQueue[str]] | None = None  # the process that reads ahead, and what it shall read

    @cached_property
    def folder(self) -> Path:
        """Where the copies are; asked for when there is something to copy."""
        if self._given:
            Path(self._given).mkdir(parents=True, exist_ok=True)
            return Path(self._given)
        return private_folder(Path(tempfile.gettempdir(), f"clipmill-{os.getuid()}"))

    def get(self, path: str) -> str:
        """Where to read a file: the path itself when local, else its whole copy.

        Raises FileNotFoundError when the store has none of that name, UserError for the store's other errors or when
        the folder cannot take it.
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
                if not copy.exists():  # another process may have brought it
                    data = read_bytes(path)
                    self._make_room(len(data), path)
                    write_bytes(str(copy), data)
        os.utime(copy)
        return str(copy)

    def prefetch(self, paths: list[str]) -> None:
        """Begin to bring files near, in a thread; what goes wrong shows when `get` is asked for them."""
        for path in paths:
            if is_url(path):
                self._thread().put(path)
                continue
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def _thread(self) -> "SimpleQueue[str]":
        if self._soon is None or self._soon[0] != os.getpid():  # a fork has no threads
            queue: SimpleQueue[str] = SimpleQueue()
            threading.Thread(target=self._bring, args=(queue,), daemon=True).start()
            self._soon = (os.getpid(), queue)
        return self._soon[1]

    def _bring(self, queue: "SimpleQueue[str]") -> None:
        while True:
            with suppress(FileNotFoundError, UserError):
                self.get(queue.get())

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one process of the machine; the system frees it when that dies."""
        lock = self.folder / f".lock-{name[:2]}"
        with open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, path: str) -> None:
        remove_stale(str(self.folder))
        copies = [(entry, entry.stat()) for entry in self._copies()]
        held = sum(stat.st_size for _, stat in copies)
        spare = (free_bytes(str(self.folder)) or 0) - SPARE_BYTES
        for copy, stat in sorted(copies, key=lambda pair: pair[1].st_mtime):
            if held + size <= self.limit and size <= spare:
                return
            if stat.st_mtime > time.time() - KEEP_SECONDS:
                break
            copy.unlink(missing_ok=True)  # who has it open still reads it
            held, spare = held - stat.st_size, spare + stat.st_size
        if size > spare:
            raise UserError(
                f"{path}: its {size} bytes do not fit into {self.folder} (1 GiB of the disk stays free); name a folder "
                "with more room by --scratch, or mix fewer shards by --streams and --window"
            )

    def _copies(self) -> list[Path]:
        found = [entry for entry in self.folder.iterdir() if not entry.name.startswith(".")]
        return [entry for entry in found if entry.exists()]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_soon": None}  # threads stay where they are
