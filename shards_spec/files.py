"""Files that are whole or absent, on local paths and on fsspec URLs.

A local file is written beside its final name, flushed to disk and renamed. A remote object is written to a
local temporary file and put once. So a file under its final name is complete, whenever the writer died.
"""

import contextlib
import hashlib
import json
import mmap
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec


class UserError(Exception):
    """What the user gave cannot be used; the message says what was found, where, and what to do."""


class DataError(Exception):
    """A file of the dataset is broken; the message names the file, the key and the mend."""


def is_url(path: str) -> bool:
    """True for an fsspec URL such as ``s3://bucket/x``; False for a local path."""
    return "://" in path


def join(root: str, *parts: str) -> str:
    """``root/part/part`` for paths and URLs alike."""
    return "/".join([root.rstrip("/") or "/", *(part.strip("/") for part in parts)]) if parts else root


def _filesystem(path: str) -> tuple[Any, str]:
    fs, inner = fsspec.core.url_to_fs(path)
    return fs, str(inner)


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    if not is_url(path):
        return os.path.exists(path)
    fs, inner = _filesystem(path)
    return bool(fs.exists(inner))


def names(folder: str) -> list[str]:
    """Sorted base names in a folder, without our temporary files; empty when the folder is absent."""
    if not is_url(folder):
        found = os.listdir(folder) if os.path.isdir(folder) else []
    else:
        fs, inner = _filesystem(folder)
        try:
            found = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(inner, detail=False)]
        except FileNotFoundError:
            found = []
    return sorted(name for name in found if not name.startswith("."))


def open_read(path: str) -> IO[bytes]:
    """A binary reader. Raises FileNotFoundError."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = _filesystem(path)
    reader: IO[bytes] = fs.open(inner, "rb")
    return reader


def read_bytes(path: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    with open_read(path) as file:
        return file.read()


@contextlib.contextmanager
def read_buffer(path: str) -> Iterator[memoryview]:
    """The whole file as a buffer: memory-mapped when local, in memory when remote."""
    if is_url(path) or os.path.getsize(path) == 0:
        yield memoryview(read_bytes(path))
        return
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    yield memoryview(mapped)  # unmapped when the last view of it is gone


def _temporary_name(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_writer(path: str) -> Iterator[IO[bytes]]:
    """A binary writer whose bytes appear under ``path`` all at once on leaving the block, or never."""
    if is_url(path):
        fs, inner = _filesystem(path)
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            fs.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(file.name, inner)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_writer(path) as file:
        file.write(data)


def json_bytes(value: Any, indent: int | None = 2) -> bytes:
    """JSON as written everywhere here: UTF-8, keys in the given order, newline at the end."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


def write_json(path: str, value: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, json_bytes(value))


def read_json(path: str) -> Any:
    """Parse a JSON file. Raises DataError naming the file when it is not JSON, FileNotFoundError when absent."""
    try:
        return json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); delete it and run its stage again") from error


def remove(path: str) -> None:
    """Delete a file if it is there."""
    if is_url(path):
        fs, inner = _filesystem(path)
        if fs.exists(inner):
            fs.rm_file(inner)
    else:
        Path(path).unlink(missing_ok=True)


def remove_stale(folder: str) -> None:
    """Delete temporary files that a dead process of this host left in a local folder."""
    if is_url(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(".tmp"):
            owner = name[:-4].rsplit(".", 1)[-1]
            mine = name[: -len(owner) - 5].endswith("." + socket.gethostname())
            if mine and owner.isdigit() and not _alive(int(owner)):
                Path(folder, name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (PermissionError, FileNotFoundError):  # somebody else's, or a system without /proc
        return True
    return state not in "ZX"  # killed, and its parent too: nobody has collected it yet


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str) -> str:
    """Hexadecimal sha256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open_read(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
