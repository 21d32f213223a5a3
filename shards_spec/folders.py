"""Folders of files, local or on an fsspec URL, walked in one fixed order without ignored files."""

import os
from collections.abc import Iterator
from typing import Any

from shards_spec.files import UserError, filesystem, is_url, store_errors
from shards_spec.names import is_ignored

Files = dict[str, dict[str, Any]]  # file name -> what a remote store tells of it


def walk(folder: str) -> Iterator[tuple[str, Files]]:
    """(prefix below the folder, its files by name), a folder's files before its folders', both by name.

    Ignored files (`names.is_ignored`) are left out. Linked folders are entered, unless they lie in the
    folder anyhow, hold it, or were entered before: links make neither loops nor a file come twice. Raises UserError for
    a folder that cannot be listed.
    """
    if is_url(folder):
        fs, inner = filesystem(folder)
        yield from _walk_remote(folder, fs, inner.rstrip("/"), "")
    else:
        yield from _walk_local(folder)


def class_folders(folder: str) -> list[str]:
    """Names of the folders in a folder, ascending, without ignored ones: the classes of labelled images.

    Raises UserError for a folder that cannot be listed.
    """
    if is_url(folder):
        fs, inner = filesystem(folder)
        return _remote_entries(folder, fs, inner.rstrip("/"))[1]
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not is_ignored(entry.name) and _is_folder(entry))
    except OSError as error:
        raise UserError(f"{folder.rstrip('/')} cannot be listed ({error.strerror})") from error


def _walk_local(folder: str) -> Iterator[tuple[str, Files]]:
    root, entered = os.path.realpath(folder), set[str]()
    waiting = [("", False)]  # (prefix, whether a link leads there)
    while waiting:
        prefix, linked = waiting.pop()
        path = os.path.join(folder, prefix)
        if linked:
            real = os.path.realpath(path)
            if real in entered or os.path.commonpath((root, real)) in (root, real):
                continue
            entered.add(real)
        try:
            with os.scandir(path) as entries:
                found = sorted((entry for entry in entries if not is_ignored(entry.name)), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{path.rstrip('/')} cannot be listed ({error.strerror})") from error
        folders = [entry for entry in found if _is_folder(entry)]
        waiting += [(f"{prefix}{entry.name}/", linked or entry.is_symlink()) for entry in reversed(folders)]
        names = {entry.name for entry in folders}
        yield prefix, {entry.name: {} for entry in found if entry.name not in names}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that is not there
        return False


def _walk_remote(url: str, fs: Any, inner: str, prefix: str) -> Iterator[tuple[str, Files]]:
    files, folders = _remote_entries(url, fs, inner)
    yield prefix, files
    for name in folders:
        yield from _walk_remote(url, fs, f"{inner}/{name}", f"{prefix}{name}/")


def _remote_entries(url: str, fs: Any, inner: str) -> tuple[Files, list[str]]:
    """(files, names of folders) in a folder of a store, both by name."""
    files, folders = Files(), list[str]()
    with store_errors(url):
        found = fs.ls(inner, detail=True)
    for info in sorted(found, key=lambda info: str(info["name"])):
        path = str(info["name"]).rstrip("/")
        name = path.rsplit("/", 1)[-1]
        if path.strip("/") == inner.strip("/") or is_ignored(name):
            continue  # some stores list a folder's marker in the folder
        if info.get("type") == "directory":
            folders.append(name)
        else:
            files[name] = info
    return files, folders
