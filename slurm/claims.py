"""Which task makes which shard: claim files on a file system that all machines see, so that idle tasks help slow ones.

A claim is a hard link, named after the shard, to a file of its owner; the owner's heartbeat touches that one file,
which is the heartbeat of all its claims. Making a link fails where the name is taken, so one of many gets it. A claim
without heartbeat may be taken over. Rarely two tasks make the same shard: their bytes are equal and files appear whole,
so that only costs time. A process that was frozen and resumes restarts itself, see `Claims`.
"""

import contextlib
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.core.runner import ShardAssignment
from shards_spec.files import UserError, write_bytes
from shards_spec.layout import shard_name
from shards_spec.manifest import finished_shards

BEATS = 6  # heartbeats in the time after which a claim is stale
LIST_AGE_S = 5.0  # how old a list of finished shards may be; older where listing takes long:
LIST_SHARE = 0.05  # of a task's time, at most, goes into listing


def restart_process() -> None:
    """Replace this process by a new one of the same command; what it was writing stays a temporary file."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join(5)
    sys.stderr.write("suspended for too long, others may have taken over: restarting\n")
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


class Claims:
    """The claims of one owner in a folder, and the thread that keeps them alive while the block lasts.

    An owner whose heartbeat is late by ``stale_s`` was frozen: others may have taken over, so it calls ``late``.
    """

    def __init__(self, folder: str, owner: str, stale_s: float, late: Callable[[], None] = restart_process) -> None:
        self._folder = Path(folder)
        self._owner = owner
        self._owner_file = self._folder / f".{owner}"
        self._stale_s, self.beat_s = stale_s, stale_s / BEATS
        self._late = late
        self._held = set[int]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Claims":
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes(str(self._owner_file), self._owner.encode())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for shard in list(self._held):
            self.release(shard)
        self._owner_file.unlink(missing_ok=True)

    def acquire(self, shard: int) -> bool:
        """Claim a shard: True when it is this owner's now. Raises UserError where hard links cannot be made."""
        path = self._folder / shard_name(shard)
        if shard in self._held:
            return True
        if not self._link(path) and not self._take_over(path):
            return False
        self._held.add(shard)
        return True

    def is_available(self, shard: int) -> bool:
        """Whether `acquire` would succeed at the moment."""
        path = self._folder / shard_name(shard)
        return shard in self._held or not path.exists() or self._stale(path)

    def silent_s(self, shard: int) -> float:
        """Seconds since the last heartbeat of the holder of a shard; 0 when it has none."""
        return self._holder(self._folder / shard_name(shard))[1] or 0.0

    def release(self, shard: int) -> None:
        """Give a claim back, unless another owner has taken it over."""
        if shard in self._held:
            self._held.discard(shard)
            self._remove(self._folder / shard_name(shard))

    def _link(self, path: Path) -> bool:
        try:
            os.link(self._owner_file, path)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self._folder}: claims need a file system with hard links ({error})") from error
        return True

    def _take_over(self, path: Path) -> bool:
        """Put this owner's claim in the place of one that is stale, or that it made before a restart."""
        if not self._stale(path):
            return False
        lock = path.with_name(f".{path.name}.taken-over")  # one owner at a time takes over, and looks again
        if not self._link(lock):
            if self._stale(lock):
                lock.unlink(missing_ok=True)
            return False
        try:
            if self._stale(path):
                path.unlink(missing_ok=True)
            return self._link(path)
        finally:
            lock.unlink(missing_ok=True)

    def _stale(self, path: Path) -> bool:
        holder, silent_s = self._holder(path)
        return silent_s is not None and (holder == self._owner or silent_s > self._stale_s)

    def _holder(self, path: Path) -> tuple[str, float | None]:
        """The owner of a claim and the seconds since its heartbeat by the file system's clock; None: it is gone."""
        try:
            with open(path) as file:  # opening asks a network file system for the true times
                then, owner = os.fstat(file.fileno()).st_mtime, file.read()
        except FileNotFoundError:
            return "", None
        os.utime(self._owner_file)
        return owner, self._owner_file.stat().st_mtime - then

    def _remove(self, path: Path) -> None:
        """Delete the own claim; another owner's, which was made meanwhile, is put back."""
        aside = self._folder / f".{path.name}.{self._owner}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)
            if aside.read_text() != self._owner:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, path)
            aside.unlink()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.beat_s):
            now = time.monotonic()
            if now - last > self._stale_s:
                self._late()
            with contextlib.suppress(OSError):  # the next one may come through
                os.utime(self._owner_file)
                last = now


class Failures:
    """Shards that failed since a submission, seen by all its tasks: none tries them again before the next one."""

    def __init__(self, folder: str, submission: str) -> None:
        self._folder = Path(folder)
        self._ending = f".failed.{submission}"

    def add(self, shard: int) -> None:
        """Record a failure."""
        os.close(os.open(self._path(shard), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))

    def has(self, shard: int) -> bool:
        """Whether a shard has failed, as of now."""
        return self._path(shard).exists()

    def all(self) -> set[int]:
        """All shards that have failed."""
        return {int(path.name.removesuffix(self._ending)) for path in self._folder.glob(f"*{self._ending}")}

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard_name(shard)}{self._ending}"


class Assigned(ShardAssignment):
    """The shards of a list, claimed one by one. ``failed`` is set when one of them fails."""

    def __init__(self, claims: Claims, failures: Failures, shards: Iterable[int]) -> None:
        self._claims, self._failures = claims, failures
        self._shards = frozenset(shards)
        self.failed = False

    @property
    def is_complete(self) -> bool:
        """False: other tasks make the rest."""
        return False

    def claim(self, shard: int) -> bool:
        """Whether to make the shard: it is in the list, free, and has not failed."""
        return shard in self._shards and self._acquire(shard)

    def _acquire(self, shard: int) -> bool:
        if not self._claims.acquire(shard):
            return False
        if self._failures.has(shard):  # in another task
            self._claims.release(shard)
            return False
        return True

    def complete(self, shard: int, made: bool) -> None:
        """Give the claim back; a shard that was not ``made`` has failed."""
        if not made:
            self._failures.add(shard)
            self.failed = True
        self._claims.release(shard)


class WorkStealing(Assigned):
    """All shards: those that no task makes at the moment are taken over, unless they failed."""

    def __init__(self, claims: Claims, failures: Failures, folder: str) -> None:
        super().__init__(claims, failures, ())
        self._folder = folder
        self._done = frozenset[int]()  # or failed
        self._listed_at = -math.inf
        self._max_age_s = LIST_AGE_S

    def wait(self, total: int) -> bool:
        """Whether a shard of the first ``total`` is free; waits until it is clear whether the holders are alive."""
        start, beat = time.monotonic(), self._claims.beat_s
        pause = 0.1
        while True:
            self._listed_at = -math.inf
            self._list()
            left = [shard for shard in range(total) if shard not in self._done]
            if any(self._claims.is_available(shard) for shard in left):
                return True
            silent_s = max((self._claims.silent_s(shard) for shard in left), default=0.0)
            if not left or (silent_s < 2 * beat and time.monotonic() - start > 2.5 * beat):
                return False
            time.sleep(pause := min(2 * pause, beat / 2))

    def claim(self, shard: int) -> bool:
        """Whether to make the shard: it is not done, free, and has not failed."""
        self._list()
        return shard not in self._done and self._acquire(shard)

    def _list(self) -> None:
        start = time.monotonic()
        if start - self._listed_at > self._max_age_s:
            self._done = frozenset(finished_shards(self._folder)) | self._failures.all()
            self._listed_at = time.monotonic()
            self._max_age_s = max(LIST_AGE_S, (self._listed_at - start) / LIST_SHARE)


class Finished(ShardAssignment):
    """The shards that are finished; the stage's totals are written when none is ``missing``."""

    def __init__(self, folder: str) -> None:
        self._finished = frozenset(finished_shards(folder))
        self.missing = list[int]()

    @property
    def is_complete(self) -> bool:
        """Whether no shard is missing."""
        return not self.missing

    def claim(self, shard: int) -> bool:
        """Whether the shard is finished; others are added to ``missing``."""
        if shard not in self._finished and shard not in self.missing:
            self.missing.append(shard)
        return shard in self._finished
