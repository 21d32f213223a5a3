"""The hidden folder ``ROOT/.repair``: what is moved away, what is being made, and which raw shards have changed.

Readers ignore names that begin with a dot. The journal tells a run that follows a killed one which images of a raw
shard are still those that its captions were written for.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from shards_spec.files import DataError, UserError, exists, filesystem, is_url, join, read_json, remove, write_json

HIDDEN = ".repair"
MOVED = "moved"
JOURNAL = "journal.json"
LOST_BLOCKS = "lost blocks"


class Folder:
    """``ROOT/.repair``. Paths given and returned are below ROOT, but for `path`."""

    def __init__(self, root: str) -> None:
        self._root = root

    def path(self, name: str) -> str:
        """A path in the folder, to open."""
        return join(self._root, HIDDEN, name)

    def move_away(self, path: str) -> str:
        """Move a file or folder of ROOT into the folder; returns where it is now. Nothing there is replaced."""
        target = self.target(path)
        move(join(self._root, path), join(self._root, target))
        return target

    def target(self, path: str) -> str:
        """Where `move_away` would move a file."""
        target = f"{HIDDEN}/{MOVED}/{path}"
        number = 0
        while exists(join(self._root, target)):
            number += 1
            target = f"{HIDDEN}/{MOVED}/{path}.{number}"
        return target

    def put(self, name: str, path: str) -> None:
        """Let a file of the folder take its place in ROOT."""
        move(self.path(name), join(self._root, path))

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
        self.clear("scratch")
        if not is_url(self._root):
            with contextlib.suppress(OSError):
                Path(self._root, HIDDEN).rmdir()

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
