"""The search after a takedown: no key, link or image hash of what went is left in any file below ROOT."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards_spec.files import (
    DataError,
    UserError,
    filesystem,
    is_url,
    join,
    open_read,
    read_buffer,
    sha256_bytes,
    sha256_file,
    store_errors,
)
from shards_spec.layout import RAW, STAGING, STATS_PATTERN, TAKEDOWN
from shards_spec.library_errors import short
from shards_spec.names import is_image
from shards_spec.parquet import open_parquet
from shards_spec.sample import parse_object
from shards_spec.tar import index_shard

WORDS = re.compile(rb"[^\s\"'<>,;\\]+")  # of a text file
IN_TAR = ".tar:"  # of a name in a search index: TAR:KEY
BLOCK = 1 << 20  # bytes of a text file that are read at a time
LONGEST = 1 << 14  # bytes of a word that may lie across two of them


class TakedownSearch:
    """What is searched for: ``key``, ``url`` and ``sha256`` to values."""

    def __init__(self, root: str, searched: Mapping[str, list[str]]) -> None:
        self._root = root
        self.keys = frozenset(searched["key"])
        self.images = frozenset(searched["sha256"])
        self._texts = frozenset(searched["url"]) | self.images
        values = [value.encode() for value in (*self._texts, *self.keys)]
        self._words = frozenset(values)
        self._phrases = [value for value in values if not WORDS.fullmatch(value)]
        self._text_array = pa.array(sorted(self._texts), pa.string())
        self._key_array = pa.array(sorted(self.keys), pa.string())
        self.files = 0

    def findings(self) -> Iterator[tuple[str, str]]:
        """(path below ROOT, what was found where) of everything that is left, and of files that cannot be searched."""
        for path in all_files(self._root):
            if path.startswith((f"{STAGING}/", f"{TAKEDOWN}/")):
                continue  # the journal, hashes, and reports, which name keys alone
            self.files += 1
            try:
                yield from ((path, found) for found in self.search_file(path))
            except (DataError, UserError, OSError) as error:
                yield path, f"cannot be searched: {short(error)}"

    def search_file(self, path: str) -> Iterator[str]:
        """What is left in one file. Raises DataError for a broken one."""
        full = join(self._root, path)
        if path.endswith(".tar"):
            yield from self._search_tar(full)
        elif path.endswith(".parquet"):
            yield from self._search_parquet(full, in_raw=path.startswith(f"{RAW}/"))
        elif is_image(path):
            if sha256_file(full) in self.images:
                yield "the image itself"
        elif not STATS_PATTERN.fullmatch(path.rpartition("/")[2]):  # numbers, reasons, hashes of files
            yield from self._search_text(full)

    def names_any(self, text: bytes) -> bool:
        """Whether a text has one of the values as a word, or anywhere when it is no single word."""
        return not self._words.isdisjoint(WORDS.findall(text)) or any(phrase in text for phrase in self._phrases)

    def _search_tar(self, path: str) -> Iterator[str]:
        with read_buffer(path) as buffer:
            for key, members in index_shard(buffer, path):
                if key in self.keys:
                    yield f"the sample {key}"
                    continue
                for extension, member in members.items():
                    data = member.read(buffer)
                    if extension == "json" and self._is_named(data):
                        yield f"a link or hash in the json of sample {key}"
                    if self.images and is_image(extension) and sha256_bytes(data) in self.images:
                        yield f"the image of sample {key}"

    def _is_named(self, data: bytes) -> bool:
        """Whether a json member has one of the links or hashes; its own key is none."""
        try:
            fields = parse_object(data)
        except ValueError:  # as pack finds it, too
            return self.names_any(data)
        fields.pop("key", None)
        return not self._texts.isdisjoint(_leaves(fields))

    def _search_parquet(self, path: str, *, in_raw: bool) -> Iterator[str]:
        with open_parquet(path) as file:
            texts = [field.name for field in file.schema_arrow if _has_text(field.type)]
            for batch in file.iter_batches(columns=texts) if texts else ():
                for name in dict.fromkeys(batch.schema.names):
                    column = _flat(batch.column(name))
                    if name in ("key", "kept"):
                        found = self._is_key(column) & _counts(batch, in_raw)
                    else:
                        found = pc.is_in(column, self._text_array).to_numpy(zero_copy_only=False)
                    if found.any():
                        yield f"{int(found.sum())} in the column {name}"

    def _is_key(self, column: pa.Array) -> np.ndarray:
        keys = pc.is_in(column, self._key_array).to_numpy(zero_copy_only=False)
        if not keys.any() and len(column) and IN_TAR in str(column[0]):
            names = [str(name).rpartition(IN_TAR)[2] for name in column.to_pylist()]
            keys = np.isin(names, list(self.keys))
        found: np.ndarray = keys
        return found

    def _search_text(self, path: str) -> Iterator[str]:
        rest = b""
        with open_read(path) as file:
            while block := file.read(BLOCK):
                text = rest + block
                if self.names_any(text):
                    yield "a key, link or hash in its text"
                    return
                rest = text[-LONGEST:]


def _counts(batch: pa.RecordBatch, in_raw: bool) -> np.ndarray:
    """Where the key of a row says that its sample is there: in raw/ a row without content has its key, too."""
    if not in_raw or "status" not in batch.schema.names:
        return np.ones(len(batch), bool)
    success: np.ndarray = pc.equal(batch.column("status"), "success").to_numpy(zero_copy_only=False)
    return success


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)


def _has_text(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _flat(column: pa.Array) -> pa.Array:
    """The texts of a column of texts, or of lists of them."""
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    return column.cast(pa.string())


def all_files(root: str) -> Iterator[str]:
    """Paths below ROOT of all files, hidden ones too, in a fixed order."""
    if is_url(root):
        fs, inner = filesystem(root)
        with store_errors(root):
            found = sorted(map(str, fs.find(inner)))
        start = inner.rstrip("/") + "/"
        yield from (path.removeprefix(start) for path in found)
        return
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            yield os.path.relpath(os.path.join(folder, name), root)
