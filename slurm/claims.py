"""Who makes which shard: claim files on a file system that all machines see, so that idle tasks help slow ones.

A claim is a hard link, named by the shard, to a file of its owner; the owner's heartbeat touches that one file, which
is the heartbeat of all its claims. Making a link fails where the name is taken, so one of many gets it. A claim
without heartbeat may be taken over. Now and then two may make the same shard all the same: bytes are equal and files
appear whole, so that costs time and nothing else. A process that was frozen and woken starts anew, see `Claims`.
"""

import contextlib
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

BEATS = 6  # in the time after which a claim is stale
LISTED_S = 5.0  # how old a list of finished shards may be


def restart_process() -> None:
    """Run this process's command again in its place; what it was writing stays a temporary file."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join(5)
    sys.stderr.write("asleep for too long, others may have taken over: starting anew\n")
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


class Claims:
    """The claims of one owner in a folder, and the thread that keeps them alive while the block lasts.

    An owner that finds itself late by ``stale_s`` was frozen: others may have taken over, so it calls ``late`` at once.
    """

    def __init__(self, folder: str, owner: str, stale_s: float, late: Callable[[], None] = restart_process) -> None:
        self._folder, self._owner, self._stale_s, self._late = Path(folder), owner, stale_s, late
        self._mine, self.beat_s = self._folder / f".{owner}", stale_s / BEATS
        self._held, self._stop = set[int](), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Claims":
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes(str(self._mine), self._owner.encode())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for shard in list(self._held):
            self.release(shard)
        self._mine.unlink(missing_ok=True)

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
        """Whether `acquire` would go well at the moment."""
        path = self._folder / shard_name(shard)
        return shard in self._held or not path.exists() or self._stale(path)

    def silent_s(self, shard: int) -> float:
        """For how long the holder of a shard has given no sign of life."""
        return self._holder(self._folder / shard_name(shard))[1] or 0.0

    def release(self, shard: int) -> None:
        """Give a claim back, unless somebody took it over."""
        if shard in self._held:
            self._held.discard(shard)
            self._remove(self._folder / shard_name(shard))

    def _link(self, path: Path) -> bool:
        try:
            os.link(self._mine, path)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self._folder}: claims need a file system with hard links ({error})") from error
        return True

    def _take_over(self, path: Path) -> bool:
        """Put this owner's claim in the place of one that is stale, or its own of an earlier life."""
        if not self._stale(path):
            return False
        lock = path.with_name(f".{path.name}.taken-over")  # by one at a time, who looks again
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
        """Owner of a claim and for how long it has been silent, by the file system's clock; None: gone meanwhile."""
        try:
            with open(path) as file:  # opening asks a network file system for the true times
                then, owner = os.fstat(file.fileno()).st_mtime, file.read()
        except FileNotFoundError:
            return "", None
        os.utime(self._mine)
        return owner, self._mine.stat().st_mtime - then

    def _remove(self, path: Path) -> None:
        """Take the own claim away; another's, which came meanwhile, is put back."""
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
                os.utime(self._mine)
                last = now


class Failures:
    """Shards that failed since a submission, for all its tasks to see: nobody tries them again before the next one."""

    def __init__(self, folder: str, submission: str) -> None:
        self._folder, self._ending = Path(folder), f".failed.{submission}"

    def note(self, shard: int) -> None:
        """One more."""
        os.close(os.open(self._path(shard), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))

    def has(self, shard: int) -> bool:
        """Whether it is among them, at this moment."""
        return self._path(shard).exists()

    def all(self) -> set[int]:
        """All of them."""
        return {int(path.name.removesuffix(self._ending)) for path in self._folder.glob(f"*{self._ending}")}

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard_name(shard)}{self._ending}"


class Assigned(ShardAssignment):
    """The shards of a list, claimed one by one."""

    def __init__(self, claims: Claims, failures: Failures, shards: Iterable[int]) -> None:
        self._claims, self._failures, self._shards = claims, failures, frozenset(shards)
        self.failed = False

    @property
    def is_complete(self) -> bool:
        return False

    def claim(self, shard: int) -> bool:
        return shard in self._shards and self._acquire(shard)

    def _acquire(self, shard: int) -> bool:
        if not self._claims.acquire(shard):
            return False
        if self._failures.has(shard):  # in another task
            self._claims.release(shard)
            return False
        return True

    def complete(self, shard: int, made: bool) -> None:
        if not made:
            self._failures.note(shard)
            self.failed = True
        self._claims.release(shard)


class WorkStealing(Assigned):
    """All shards: what nobody makes at the moment is taken over, unless it failed."""

    def __init__(self, claims: Claims, failures: Failures, folder: str) -> None:
        super().__init__(claims, failures, ())
        self._folder, self._done, self._when = folder, frozenset[int](), -LISTED_S

    def wait(self, total: int) -> bool:
        """Whether there is something to take among the first ``total``, once it is clear whether the holders live."""
        begun, beat, pause = time.monotonic(), self._claims.beat_s, 0.1
        while True:
            self._when = -LISTED_S
            self._look()
            left = [shard for shard in range(total) if shard not in self._done]
            if any(self._claims.is_available(shard) for shard in left):
                return True
            silent_s = max((self._claims.silent_s(shard) for shard in left), default=0.0)
            if not left or (silent_s < 2 * beat and time.monotonic() - begun > 2.5 * beat):
                return False
            time.sleep(pause := min(2 * pause, beat / 2))

    def claim(self, shard: int) -> bool:
        self._look()
        return shard not in self._done and self._acquire(shard)

    def _look(self) -> None:
        if time.monotonic() - self._when > LISTED_S:
            self._done = frozenset(finished_shards(self._folder)) | self._failures.all()
            self._when = time.monotonic()


class Finished(ShardAssignment):
    """The shards that are there; the stage's totals are written when none is missing."""

    def __init__(self, folder: str) -> None:
        self._there, self.missing = frozenset(finished_shards(folder)), list[int]()

    @property
    def is_complete(self) -> bool:
        return not self.missing

    def claim(self, shard: int) -> bool:
        if shard not in self._there and shard not in self.missing:
            self.missing.append(shard)
        return shard in self._there
