"""Exceptions of libraries as the product's own two errors: one context manager per kind of file.

``given`` says whose the file is: the user's (UserError: they give another one) or the dataset's (DataError: its stage
makes it again). ``fix`` is what to do, where the usual advice does not fit. Messages name the file, say what is wrong
in at most a line of the library's own words, and what to do. FileNotFoundError passes for files of a dataset, since
callers handle absence.
"""

import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shards_spec.file_kinds import HEAD_BYTES, binary_kind, known_kind
from shards_spec.files import DataError, UserError, is_url, open_read
from shards_spec.layout import remake_advice
from shards_spec.messages import conversion
from shards_spec.sample import check_depth

LONGEST = 200  # characters of a library's text that are shown
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<?xml")
GZIP = b"\x1f\x8b"
GZIPPED = "is packed with gzip"
# what a file of a kind may be seen to be; the other ones of `file_kinds` are not of that kind
OWN_KINDS = {"Parquet file": ("a Parquet file",), "checkpoint": ("a zip file (or a spreadsheet)",)}
NO_JSON = (ValueError, RecursionError)  # what json raises: no JSON, no UTF-8, nested too deep, too many digits
FETCH = "download it again"
REMAKE = "delete it and run its stage again"
# how full memory is told by RuntimeErrors: of torch's allocators, C++, cuBLAS and cuDNN; oneDNN gives no reason
NO_MEMORY = (
    "can't allocate memory",
    "DefaultCPUAllocator",
    "out of memory",
    "std::bad_alloc",
    "bad allocation",
    "STATUS_ALLOC_FAILED",
    "could not create a primitive",
    "could not create a memory object",
)


def short(error: BaseException) -> str:
    """An error's text in one line of at most `LONGEST` characters; its type where it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, KeyError) and len(error.args) == 1:
        text = error.args[0] if isinstance(error.args[0], str) else f"KeyError {error}"  # str() puts text in quotes
    text = " ".join(text[: 4 * LONGEST].split()).rstrip(".")
    return (text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " ...") or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the host's, did not suffice for what torch was to do."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in NO_MEMORY)


def no_regular_file(path: str) -> str | None:
    """Why a local path cannot be read as a file (it is a folder, a pipe, ...); None when it can, or for a URL."""
    if is_url(path):
        return None
    try:
        mode = os.stat(path).st_mode  # once: on a network file system it is a round trip
    except (OSError, ValueError):  # not there; no path at all
        return None
    if stat.S_ISDIR(mode):
        return "is a folder, not a file"
    return None if stat.S_ISREG(mode) else "is no regular file (a pipe, a socket or a device)"


def describe_content(path: str) -> tuple[str, str] | None:
    """What a file is that was taken for another, and what to do; None where its first bytes do not tell."""
    if reason := no_regular_file(path):
        return reason, "name a file"
    try:
        with open_read(path) as file:
            head = file.read(HEAD_BYTES)
    except (OSError, UserError):
        return None
    if not head:
        return "has 0 bytes", FETCH
    if head.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGE):
        return "is a web page, not the file itself", "download it again by its direct link"
    if head.startswith(GZIP):
        return GZIPPED, "unpack it (gunzip)"
    return None


def _describe_other_kind(path: str, kind: str) -> str | None:
    """``is a JPEG image, not a Parquet file``, where the first bytes are those of another kind of file."""
    try:
        with open_read(path) as file:
            head = file.read(HEAD_BYTES)
    except (OSError, UserError):
        return None
    found = binary_kind(head) if kind == "JSON file" else known_kind(head)
    if found is None or found in OWN_KINDS.get(kind, ()) or (found.endswith("gzip") and "gzip" in kind):
        return None
    return f"is {found}, not a {kind}"


def product_error(path: str, error: BaseException, kind: str, given: bool, fix: str = "") -> UserError | DataError:
    """The product's error for an exception of a library over a file of a ``kind`` ("Parquet file")."""
    own = UserError if given else DataError
    remake = fix if given else remake_advice(path, fix or REMAKE)
    if isinstance(error, FileNotFoundError):
        return own(f"{path} is not there; {remake or 'check the path'}")
    described = describe_content(path)
    if described is not None and not (described[0] == GZIPPED and "gzip" in kind):
        what, advice = described
        if not given and advice == FETCH:
            advice = remake
        return own(f"{path} {what}; {advice}")
    if isinstance(error, NotADirectoryError) and (file := _file_above(path)) is not None:
        return own(f"{file}: a file is where a folder should be; delete it, or move it away")
    if isinstance(error, OSError) and error.errno is not None:
        fixes = {errno.EACCES: "check its permissions", errno.EMFILE: "raise `ulimit -n`"}
        return own(f"{path} cannot be read ({short(error)}); {fixes.get(error.errno, 'check the disk that holds it')}")
    if (other := _describe_other_kind(path, kind)) is not None:
        return own(f"{path} {other}; {remake or 'check the path'}")
    return own(f"{path}: not a readable {kind} ({short(error)}); {remake or FETCH}")


def _file_above(path: str) -> str | None:
    """The part of a path that stands for a folder and is none."""
    folder = os.path.dirname(path)
    while folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return folder if folder and not os.path.isdir(folder) else None


@contextmanager
def _errors(path: str, kind: str, caught: tuple[type[Exception], ...], given: bool, fix: str) -> Iterator[None]:
    """Around opening a file and reading it."""
    if (reason := no_regular_file(path)) is not None:  # reading a pipe would wait for ever
        raise (UserError if given else DataError)(f"{path} {reason}; name {'a' if given else 'the'} {kind}")
    with _content_errors(path, kind, caught, given, fix):
        yield


@contextmanager
def _content_errors(path: str, kind: str, caught: tuple[type[Exception], ...], given: bool, fix: str) -> Iterator[None]:
    """Around reading a file that is open, or its bytes: the path is not looked up again."""
    kinds: tuple[type[Exception], ...] = (OSError, *caught)
    try:
        yield
    except (UserError, DataError):
        raise
    except FileNotFoundError as error:
        if given and error.filename in (path, None):
            raise product_error(path, error, kind, given, fix) from error
        raise
    except kinds as error:
        raise product_error(path, error, kind, given, fix) from error


@contextmanager
def parquet_errors(path: str, given: bool = False, fix: str = "") -> Iterator[None]:
    """Around reading a Parquet file by pyarrow, whose exceptions are of six built-in kinds."""
    with _errors(path, "Parquet file", _parquet_kinds(), given, fix):
        yield


@contextmanager
def open_parquet_errors(path: str, given: bool = False) -> Iterator[None]:
    """`parquet_errors` around reading a Parquet file that is open."""
    with _content_errors(path, "Parquet file", _parquet_kinds(), given, ""):
        yield


def _parquet_kinds() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return (pa.ArrowException, ValueError, KeyError, NotImplementedError, OverflowError, MemoryError)


@contextmanager
def json_errors(path: str, given: bool = False, fix: str = "") -> Iterator[None]:
    """Around parsing JSON: no JSON, no UTF-8, nested too deep, a number of more digits than Python converts."""
    with _errors(path, "JSON file", NO_JSON, given, fix):
        yield


def parse_json(path: str, data: bytes, given: bool = False, fix: str = "") -> Any:
    """A JSON document in any Unicode encoding, with or without a BOM. Raises UserError and DataError."""
    with _content_errors(path, "JSON file", NO_JSON, given, fix):
        value = json.loads(data)
        check_depth(data, value)
        return value


def decode_text(path: str, data: bytes, given: bool = True, fix: str = "") -> str:
    """UTF-8 text, its BOM gone.

    Raises UserError or DataError naming the line and ``fix`` or, where it is likely, the encoding.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        own = UserError if given else DataError
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise own(f"{path} is UTF-16, not UTF-8; {fix or conversion('UTF-16', path)}") from error
        line = data.count(b"\n", 0, error.start) + 1
        if (found := describe_content(path)) is not None:
            raise own(f"{path} {found[0]}; {found[1]}") from error
        if (kind := binary_kind(data[:HEAD_BYTES])) is not None:
            raise own(f"{path} is {kind}, not text; {fix or 'check the path'}") from error
        advice = fix or f"if it is latin-1, {conversion('LATIN1', path)}"
        raise own(f"{path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); {advice}") from error


@contextmanager
def gzip_errors(path: str, given: bool = True, fix: str = "") -> Iterator[None]:
    """Around unpacking gzip or zlib."""
    with _errors(path, "gzip file", (EOFError, zlib.error), given, fix):
        yield


@contextmanager
def checkpoint_errors(path: str, given: bool = True, fix: str = "") -> Iterator[None]:
    """Around reading weights (torch's zip or pickle, safetensors): damage makes their readers raise nearly anything."""
    with _errors(path, "checkpoint", (Exception,), given, fix):
        yield
