"""A checkpoint's file and its hash: written atomically, and read only where the bytes are those that were written."""

import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

from shards_spec.checkpoints import read_checkpoint
from shards_spec.files import DataError, atomic_writer, sha256_file, write_bytes
from shards_spec.library_errors import checkpoint_errors

HASH = ".sha256"  # ending beside a checkpoint's name


def hash_file(checkpoint: Path) -> Path:
    """Return where a checkpoint's hash is."""
    return checkpoint.with_name(checkpoint.name + HASH)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically and its hash after it. Raises UserError when the disk is full."""
    hash_file(path).unlink(missing_ok=True)  # an older file's of this name; a kill leaves one without, which is fine
    save_state(path, state)
    write_bytes(str(hash_file(path)), f"{sha256_file(str(path))}  {path.name}\n".encode())


class _ErrorKeepingFile:
    """A file that remembers why it could not be written: torch then says "unexpected pos" and no more."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state atomically, without a hash. Raises OSError and UserError."""
    with atomic_writer(str(path)) as file:
        written = _ErrorKeepingFile(file)
        try:
            torch.save(state, cast(IO[bytes], written))  # of which it uses these two alone
        except RuntimeError as error:
            if written.error is None:
                raise
            raise written.error from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state that `RunFolder.save` wrote, on the CPU.

    Raises DataError when its bytes are not those of its hash, or when it cannot be read. One without a hash, of an
    earlier version, is checked by its zip's own checksums.
    """
    fix = "delete it to resume from the one before"
    with checkpoint_errors(str(path), given=False, fix=fix):
        if not _is_intact(path):
            raise DataError(f"{path} is damaged: its bytes are not those that were written; {fix}")
    state: Any = read_checkpoint(str(path), given=False, fix=fix)
    if not isinstance(state, dict) or not {"task", "progress"} <= set(state):
        raise DataError(f"{path} is no checkpoint of `clipmill train`; {fix}")
    return state


def _is_intact(path: Path) -> bool:
    hashed = hash_file(path)
    if hashed.exists():
        return hashed.read_text().split()[:1] == [sha256_file(str(path))]
    with zipfile.ZipFile(path) as parts:
        return parts.testzip() is None
