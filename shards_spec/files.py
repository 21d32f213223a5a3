"""Files that are whole or absent, on local paths and on fsspec URLs.

A local file is written beside its final name, flushed to disk and renamed. A remote object is written to a
local temporary file and put once. So a file under its final name is complete, whenever the writer died.

Listings of a store are not cached: what another process wrote or deleted is seen at once. A store's errors become
UserError naming the URL, except FileNotFoundError on reading.
"""

import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec

S3_HINT = " (pip install s3fs, or in a checkout of clipmill pip install -e '.[s3]')"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """What the user gave cannot be used; the message says what was found, where, and what to do."""


class DataError(Exception):
    """A file of the dataset is broken; the message names the file, the key and what to do."""


def is_url(path: str) -> bool:
    """True for an fsspec URL such as ``s3://bucket/x``; False for a local path."""
    return "://" in path


def join(root: str, *parts: str) -> str:
    """``root/part/part`` for paths and URLs alike."""
    return "/".join([root.rstrip("/") or "/", *(part.strip("/") for part in parts)]) if parts else root


@contextlib.contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn a store client's exceptions into UserError naming the URL and what to do; FileNotFoundError gets the URL."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, _one_line(error), url) from error
    except ImportError as error:
        raise UserError(f"{url}: {_one_line(error)}{S3_HINT if url.startswith('s3') else ''}") from error
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError | ValueError):
            raise  # a bug; what clients raise is OSError, ValueError or a class of their own
        raise UserError(
            f"{url}: {_one_line(error)}; check the address, the store's credentials and the connection, then rerun "
            "the same command to resume"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, without a cache of listings, and the path in it. Raises UserError."""
    with store_errors(url):
        fs, inner = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, str(inner)


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    if not is_url(path):
        return os.path.exists(path)
    fs, inner = filesystem(path)
    with store_errors(path):
        return bool(fs.exists(inner))


def names(folder: str) -> list[str]:
    """Sorted base names in a folder, without our temporary files; empty when the folder is absent."""
    if not is_url(folder):
        found = os.listdir(folder) if os.path.isdir(folder) else []
    else:
        (fs, inner), found = filesystem(folder), []
        with contextlib.suppress(FileNotFoundError), store_errors(folder):
            entries = [str(entry).rstrip("/") for entry in fs.ls(inner, detail=False)]
            found = [entry.rsplit("/", 1)[-1] for entry in entries if entry != inner.rstrip("/")]  # a file lists itself
    return sorted(name for name in found if not name.startswith("."))


def free_bytes(path: str) -> int | None:
    """Free bytes of the disk that holds a local path or will hold it; None for a URL."""
    if is_url(path):
        return None
    place = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if os.path.exists(folder))).free


class _RemoteFile(io.RawIOBase):
    """A store's file whose errors are `store_errors`."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with store_errors(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


def open_read(path: str) -> IO[bytes]:
    """A binary reader. Raises FileNotFoundError."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = filesystem(path)
    with store_errors(path):
        return io.BufferedReader(_RemoteFile(path, fs.open(inner, "rb")))


def read_bytes(path: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    if not is_url(path):
        return Path(path).read_bytes()
    fs, inner = filesystem(path)
    with store_errors(path):
        return bytes(fs.cat_file(inner))


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
    """A hidden name beside ``path`` that no other process can foresee; it tells who made it (`remove_stale`)."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{secrets.token_hex(4)}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_writer(path: str) -> Iterator[IO[bytes]]:
    """A binary writer whose bytes appear under ``path`` all at once on leaving the block, or never.

    Raises UserError when the disk is full or the store refuses.
    """
    disk = tempfile.gettempdir() if is_url(path) else path
    try:
        with _remote_writer(path) if is_url(path) else _local_writer(path) as file:
            yield file
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"no space left on the disk of {disk}: free some and rerun the same command to resume"
        ) from error


@contextlib.contextmanager
def _local_writer(path: str) -> Iterator[IO[bytes]]:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "xb") as file:  # exclusive: links are not followed
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it may never have been made
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            raise OSError(error.errno, error.strerror, path) from error  # names the file that is meant
        raise


@contextlib.contextmanager
def _remote_writer(url: str) -> Iterator[IO[bytes]]:
    fs, inner = filesystem(url)
    with tempfile.NamedTemporaryFile(prefix=".", suffix=_temporary_name("")) as file:
        yield file
        file.flush()
        try:
            with store_errors(url):
                _put(fs, file.name, inner)
        except FileNotFoundError as error:
            raise UserError(f"{url}: {error.strerror}; make the bucket, or check its name") from error


def _put(fs: Any, local: str, inner: str) -> None:
    """Object stores put whole or not at all. Where folders are real (paths from a root /), as on local disks."""
    if not inner.startswith("/"):
        fs.put_file(local, inner)  # without makedirs, which would make a bucket of a misspelt name
        return
    fs.makedirs(os.path.dirname(inner), exist_ok=True)
    temporary = _temporary_name(inner)
    try:
        fs.put_file(local, temporary)
        fs.mv(temporary, inner)
    finally:
        with contextlib.suppress(Exception):  # it is gone when all went well
            fs.rm_file(temporary)


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_writer(path) as file:
        file.write(data)


def json_bytes(value: Any, indent: int | None = 2, strict: bool = False) -> bytes:
    """JSON as written everywhere here: UTF-8, keys in the given order, newline at the end.

    Raises UnicodeEncodeError for a half surrogate, and when ``strict`` ValueError for NaN and infinities.
    """
    return (json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=not strict) + "\n").encode()


def write_json(path: str, value: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, json_bytes(value))


def read_json(path: str, fix: str = "") -> Any:
    """Parse a JSON file. Raises DataError naming the file and ``fix`` when it is not JSON, FileNotFoundError."""
    from shards_spec.library_errors import json_errors, parse_json  # which reads files by this module

    with json_errors(path, fix=fix):
        return parse_json(path, read_bytes(path), fix=fix)


def replace_file(path: str, new: str) -> None:
    """Give the file ``new`` the name ``path``, in place of what is there; nothing happens when ``new`` is gone.

    On object stores the file appears whole too: it is copied, then deleted under its old name. Raises UserError when
    the store refuses.
    """
    if not is_url(path):
        if os.path.exists(new):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            os.replace(new, path)
        return
    fs, inner = filesystem(path)
    _, inner_new = filesystem(new)
    with store_errors(path):
        if fs.exists(inner_new):
            fs.mv(inner_new, inner)


def remove_tree(folder: str) -> None:
    """Delete a folder and all in it, if it is there."""
    if not is_url(folder):
        if os.path.isdir(folder):
            shutil.rmtree(folder)
        return
    fs, inner = filesystem(folder)
    with contextlib.suppress(FileNotFoundError), store_errors(folder):
        fs.rm(inner, recursive=True)


def remove(path: str) -> None:
    """Delete a file if it is there."""
    if not is_url(path):
        Path(path).unlink(missing_ok=True)
        return
    fs, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError), store_errors(path):
        fs.rm_file(inner)


def remove_files(paths: list[str]) -> None:
    """Delete files of one folder, in few requests on an object store. Raises FileNotFoundError where one is gone."""
    if paths and is_url(paths[0]):
        fs, _ = filesystem(paths[0])
        with store_errors(paths[0]):
            fs.rm([filesystem(path)[1] for path in paths])
        return
    for path in paths:
        os.unlink(path)


def remove_stale(folder: str) -> None:
    """Delete temporary files that a dead process of this host left in a folder, or had on their way to a URL."""
    folder = tempfile.gettempdir() if is_url(folder) else folder
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.startswith(".") and name.endswith(".tmp"):
            owner = name[:-4].rsplit(".", 1)[-1]
            mine = name[: -len(owner) - 5].endswith("." + socket.gethostname())
            if mine and owner.isdigit() and not is_alive(int(owner)):
                with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                    os.unlink(os.path.join(folder, name))


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs; one that was killed and not collected yet does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (PermissionError, FileNotFoundError):  # another user's, or a system without /proc
        return True
    return state not in "ZX"  # a zombie: killed, and its parent has not collected it


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
