"""The files of a source: one file, a folder or a glob, local or an fsspec URL."""

import glob
import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pipeline.ingest.source_io import local_stamp, remote_stamp
from shards_spec.files import UserError, filesystem, is_url, join, store_errors
from shards_spec.folders import walk
from shards_spec.library_errors import no_regular_file
from shards_spec.names import PACKED_ENDINGS, clean_name, endings_line, file_ending, is_ignored

log = logging.getLogger(__name__)
Format = Literal[
    "cc3m",
    "cc12m",
    "csv",
    "parquet",
    "jsonl",
    "txt",
    "folder",
    "classes",
    "hf-parquet",
    "webdataset",
    "datacompdr",
    "img2dataset",
]
# Kinds of files that are taken from a folder or a glob when its form is not known yet.
KINDS = {
    "tar": (".tar",),
    "parquet": (".parquet", ".parq", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz"),
    "csv": (".csv", ".csv.gz"),
    "tsv": (".tsv", ".tab", ".tsv.gz", ".tab.gz"),
}
# A text file in a folder is a list only when the form says so.
ENDINGS = {**KINDS, "txt": (".txt", ".txt.gz")}
KINDS_OF_FORM = {
    "webdataset": ("tar",),
    "datacompdr": ("tar",),
    "parquet": ("parquet",),
    "hf-parquet": ("parquet",),
    "jsonl": ("jsonl",),
    "csv": ("csv", "tsv"),
    "cc3m": ("tsv",),
    "cc12m": ("tsv",),
    "txt": ("txt",),
}


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
        path: The local path or URL.
        below: Its path below the source's folder.
        size: In bytes; 0 where a store does not tell it.
        stamp: Changes with its content (`source_io.local_stamp`, `source_io.remote_stamp`).
    """

    path: str
    below: str
    size: int
    stamp: str


def source_files(source: str, form: Format | None = None) -> list[SourceFile]:
    """The source's list files or tars, sorted by their paths below it. Raises UserError when there is none.

    Of a folder, the files of the kinds that ``form`` has; without a form, of all kinds.
    """
    try:
        info = source_info(source)
        if info is None:
            files = _glob_files(source)
        elif info["type"] == "directory":
            files = _folder_files(source, form)
        else:
            return [_source_file(source, base_name(source.rstrip("/")), info)]
    except OSError as error:
        raise UserError(f"--source {source}: cannot be listed ({error})") from error
    return sorted(files, key=lambda file: file.below)


def source_info(source: str) -> dict[str, Any] | None:
    """What fsspec tells of a source: ``type`` is file or directory; None when nothing has that name."""
    if not is_url(source):
        if not os.path.exists(source):
            return None
        return {"type": "directory" if os.path.isdir(source) else "file"}
    fs, inner = filesystem(source)
    try:
        with store_errors(source):
            info: dict[str, Any] = fs.info(inner)
    except FileNotFoundError:
        return None
    return info


def base_name(path: str) -> str:
    """The last part of a path."""
    return path.rpartition("/")[2]


def file_kind(name: str) -> str | None:
    """The kind of a file by its name: a key of `KINDS`, or None."""
    return next((kind for kind, endings in KINDS.items() if name.lower().endswith(endings)), None)


def _source_file(path: str, below: str, info: dict[str, Any]) -> SourceFile:
    """Raises UserError for a name that is not UTF-8 and for what is not a regular file, OSError."""
    if clean_name(path) != path:
        raise UserError(f"--source: the file name {clean_name(path)!r} is not UTF-8; rename it")
    if is_url(path):
        return SourceFile(path, below, info.get("size") or 0, remote_stamp(info))
    if (reason := no_regular_file(path)) is not None:  # reading a pipe would block for ever
        raise UserError(f"--source {path} {reason}; name a file")
    return SourceFile(path, below, os.stat(path).st_size, local_stamp(path))


def _glob_files(source: str) -> list[SourceFile]:
    """The files that a glob matches, by their paths below the last folder without a wildcard."""
    folder, pattern = _split_glob(source)
    matches = _remote_matches(source, folder, pattern) if is_url(source) else _local_matches(folder, pattern)
    takes_underscores = base_name(pattern).startswith("_")  # without: leaves out Spark's _SUCCESS and the like
    files = []
    for below, info in matches.items():
        if is_ignored(below) or (base_name(below).startswith("_") and not takes_underscores):
            continue
        path = below if folder == "." else join(folder, below)
        files.append(_source_file(path, below, info))
    if not files:
        raise UserError(f"--source {source}: no file matches it")
    return files


def _split_glob(source: str) -> tuple[str, str]:
    """(folder, pattern) of a glob, at its first part with a wildcard. Raises UserError when there is none."""
    parts = source.split("/")
    if is_url(source):
        wildcards = ["*" in part for part in parts]  # ? and [] may be part of a URL
    else:
        wildcards = [glob.has_magic(part) for part in parts]
    if not any(wildcards):
        raise UserError(f"--source {source}: {_describe_absent(source)}")
    first = wildcards.index(True)
    if is_url(source) and first < 3:  # parts: scheme and colon, empty, bucket
        raise UserError(f"--source {source}: begins with a wildcard; give a bucket or folder before it")
    folder = "/".join(parts[:first])
    if not folder:
        folder = "/" if source.startswith("/") else "."
    return folder, "/".join(parts[first:])


def _describe_absent(source: str) -> str:
    if is_url(source):
        return (
            "nothing is there, or its server does not give it; a source is a local file or folder, or a URL that "
            "fsspec reads (https://, s3://, gs://, ...): check it, or download it and give the local path"
        )
    hint = "; give a glob ('*.tar'), or leave the quotes away for the shell to expand it" if "{" in source else ""
    return f"no such file or folder{hint}"


def _remote_matches(source: str, folder: str, pattern: str) -> dict[str, dict[str, Any]]:
    """Path below ``folder`` to what the store tells of the file."""
    fs, inner = filesystem(folder)
    prefix = inner.rstrip("/") + "/"
    with store_errors(source):
        found = fs.glob(prefix + pattern, detail=True)
    return {path[len(prefix) :]: info for path, info in found.items() if info["type"] == "file"}


def _local_matches(folder: str, pattern: str) -> dict[str, dict[str, Any]]:
    names = glob.glob(pattern, root_dir=folder, recursive=True)
    return {name: {} for name in names if os.path.isfile(join(folder, name))}


def _folder_files(source: str, form: Format | None) -> list[SourceFile]:
    """The files of a folder that ``form`` takes; warns of those that are left out when there is a form."""
    kinds = KINDS_OF_FORM.get(form or "", tuple(KINDS))
    endings = sum((ENDINGS[kind] for kind in kinds), start=())
    files = []
    left_out = Counter[str]()
    for prefix, infos in walk(source):
        for name, info in infos.items():
            if not name.startswith("_") and name.lower().endswith(endings):
                files.append((prefix + name, info))
            else:
                left_out[file_ending(name)] += 1
    if form is not None and left_out:
        hint = "; unpack what is packed" if set(PACKED_ENDINGS) & set(left_out) else ""
        _warn_once(f"--source {source}: files that are not taken: {endings_line(left_out)}{hint}")
    if not files:
        what = "of a known kind" if form is None else f"for --format {form}"
        raise UserError(f"--source {source}: the folder has no file {what} ({', '.join(endings)})")
    return [_source_file(join(source, below), below, info) for below, info in files]


@cache
def _warn_once(text: str) -> None:
    """Warn once per process: a source's files are listed several times."""
    log.warning(text)
