"""The hidden folder ``ROOT/.repair``: what is moved away, what is being made, and which raw shards have changed.

Readers ignore names that begin with a dot. The journal tells a run that follows a killed one which images of a raw
shard are still those that its captions were written for.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from shards_spec.files import (
    DataError,
    UserError,
    atomic_writer,
    exists,
    filesystem,
    is_url,
    join,
    open_read,
    read_json,
    remove,
    sha256_file,
    write_json,
)
from shards_spec.folders import walk
from shards_spec.layout import REPAIRED, stats_path
from shards_spec.manifest import Done, finished_shards, forget, read_done

MOVED = "moved"
SCRATCH = "scratch"
STOP_WORDS = "stop_words.txt"
JOURNAL = "journal.json"
LOST_BLOCKS = "lost blocks"


class Folder:
    """``ROOT/.repair``. Paths given and returned are below ROOT, but for `path`."""

    def __init__(self, root: str) -> None:
        self._root = root

    def path(self, name: str) -> str:
        """A path in the folder, to open."""
        return join(self._root, REPAIRED, name)

    def move_away(self, path: str) -> str:
        """Move a file or folder of ROOT into the folder; returns where it is now. Nothing there is replaced."""
        target = self.target(path)
        move(join(self._root, path), join(self._root, target))
        return target

    def copy_away(self, path: str) -> str:
        """As `move_away`, of a file that stays where it is until another one takes its place."""
        source, digest = join(self._root, path), sha256_file(join(self._root, path))
        target = f"{REPAIRED}/{MOVED}/{path}"
        if exists(join(self._root, target)) and sha256_file(join(self._root, target)) == digest:
            return target  # by a run that was killed after it
        target = self.target(path)
        with open_read(source) as file, atomic_writer(join(self._root, target)) as copy:
            shutil.copyfileobj(file, copy)
        return target

    def target(self, path: str) -> str:
        """Where `move_away` would move a file."""
        target = f"{REPAIRED}/{MOVED}/{path}"
        number = 0
        while exists(join(self._root, target)):
            number += 1
            target = f"{REPAIRED}/{MOVED}/{path}.{number}"
        return target

    @property
    def scratch(self) -> str:
        """Where shards are made, laid out as ROOT."""
        return self.path(SCRATCH)

    def put(self, path: str) -> None:
        """Let a file of `scratch` take its place in ROOT; a folder that is there is moved away."""
        if os.path.isdir(join(self._root, path)):
            self.move_away(path)
        move(join(self.scratch, path), join(self._root, path))

    def publish(self, done: Done, folder: str) -> None:
        """Let a shard that was made in `scratch` take its place: from here on a killed run is finished by the next."""
        done.write(join(self.scratch, folder))
        self._put_shard(done, folder)

    def finish_killed(self) -> list[str]:
        """Put the shards in their places that a killed run had made to the end; returns their records' paths."""
        finished = list[str]()
        folders = sorted(prefix for prefix, _ in walk(self.scratch)) if exists(self.scratch) else []
        for folder in (prefix.rstrip("/") for prefix in folders):
            for shard in finished_shards(join(self.scratch, folder)):
                done = read_done(join(self.scratch, folder), shard)
                if done is not None:
                    self._put_shard(done, folder)
                    finished.append(stats_path(folder, shard))
        self.clear(SCRATCH)
        return finished

    def _put_shard(self, done: Done, folder: str) -> None:
        forget(join(self._root, folder), done.shard)
        for path in done.outputs:
            if exists(join(self.scratch, path)):
                self.put(path)
        self.put(stats_path(folder, done.shard))

    def journal(self) -> dict[str, Any]:
        """Number of a raw shard to what `note_change` noted of it."""
        with contextlib.suppress(DataError, UserError, OSError):
            journal = read_json(self.path(JOURNAL))
            return journal if isinstance(journal, dict) else {}
        return {}

    def note_change(self, shard: int, before: set[str], changed: list[str]) -> None:
        """Note that a raw shard will have another tar: hashes of the one before, and keys of images that may differ."""
        entry = {"before": sorted(before), "changed": changed}
        write_json(self.path(JOURNAL), {**self.journal(), str(shard): entry})

    def note_lost_blocks(self, keys: list[str]) -> None:
        """Note the stages whose blocks ``dataset.json`` lost: they would be taken for unfinished ones."""
        write_json(self.path(JOURNAL), {**self.journal(), LOST_BLOCKS: [*self.lost_blocks(), *keys]})

    def lost_blocks(self) -> list[str]:
        """The stages of `note_lost_blocks`."""
        return list(self.journal().get(LOST_BLOCKS, []))

    def forget_changes(self) -> None:
        """Delete the journal, and what a killed run left half made; the folder too when nothing was moved there."""
        remove(self.path(JOURNAL))
        self.clear(SCRATCH)
        remove(self.path(STOP_WORDS))
        if not is_url(self._root):
            with contextlib.suppress(OSError):
                Path(self._root, REPAIRED).rmdir()

    def clear(self, name: str) -> None:
        """Delete a folder in the hidden folder and all that is in it."""
        path = self.path(name)
        if not is_url(path):
            shutil.rmtree(path, ignore_errors=True)
        elif exists(path):
            fs, inner = filesystem(path)
            fs.rm(inner, recursive=True)


def move(path: str, target: str) -> None:
    """Rename a file or folder, on object stores by copying it."""
    if not is_url(path):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(path).rename(target)
        return
    fs, inner = filesystem(path)
    fs.mv(inner, filesystem(target)[1], recursive=bool(fs.isdir(inner)))
