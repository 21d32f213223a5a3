"""Lists of samples, as others publish subsets: by key, URL, sha256 of the image, or uid.

A sample is known by numbers of 64 bits: the halves of a uid combined, or the first digits of a hash of any other name.
A list of a billion samples is 8 GB of them, in a file that worker processes share.
"""

import csv
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa

from pipeline.core.prefetch import batches
from pipeline.ingest.source_io import BROKEN_GZIP, lines
from pipeline.select.facts import ShardFacts
from shards_spec.content_id import content_id, is_among
from shards_spec.files import UserError, exists, is_url, open_read, read_bytes, sha256_file
from shards_spec.messages import counted
from shards_spec.parquet import open_parquet

log = logging.getLogger(__name__)
NAMES = ("uid", "url", "sha256", "key")  # what a sample is called, the surest first: keys of two downloads look alike
UID = re.compile(r"[0-9a-fA-F]{32}")
SHA256_DIGITS = 64
HALF = (1 << 64) - 1
SPREAD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: combines halves of a uid so that patterns in them do not cancel
NUMPY_MAGIC = b"\x93NUMPY"
PARQUET_MAGIC = b"PAR1"
BLOCK = 1 << 20  # names that are read at a time
UID_PAIR = np.dtype("u8,u8")  # of a uid's upper and lower half, as DataComp's subsets have them


@dataclass(frozen=True)
class SampleList:
    """The samples of the files of an option; sent to worker processes.

    ``path`` is a file of ascending uint64, ``hashes`` are the sha256 of the files that were given.
    """

    option: str
    path: str
    hashes: tuple[str, ...]

    def has(self, facts: ShardFacts) -> np.ndarray:
        """Whether each sample of a shard is listed under any of its names, bool (n,)."""
        listed = np.load(self.path, mmap_mode="r")
        found = np.zeros(len(facts), bool)
        for name in NAMES:
            if name == "key" or name in facts.sources.columns:
                ids = name_ids(facts.of_samples(name).cast(pa.string()).to_pylist())
                found |= is_among(ids, listed)
        return found


def read_sample_list(paths: tuple[str, ...], option: str, folder: str) -> SampleList:
    """Read the files of an option, and keep their numbers in a file of a folder. Raises UserError."""
    parts = [np.empty(0, np.uint64)]
    for path in paths:
        if not exists(path):
            raise UserError(f"{option} {path}: no such file; `clipmill select --help` says what a list can be")
        if os.path.isdir(path):
            raise UserError(f"{option} {path}: is a folder; give the file of the list")
        own = np.unique(np.concatenate([np.empty(0, np.uint64), *_file_ids(path, option)]))
        if not len(own):
            raise UserError(f"{option} {path}: no name of a sample in it; is it the right file?")
        log.info("select: %s in %s", counted(len(own), "sample", style=","), path)
        parts.append(own)
    target = os.path.join(folder, f"{option.lstrip('-')}.npy")
    np.save(target, np.unique(np.concatenate(parts)))
    return SampleList(option, target, tuple(sha256_file(path) for path in paths))


def name_ids(texts: Iterable[str | None]) -> np.ndarray:
    """uint64 [texts]: the number of each name; 0 for None and for an empty one."""
    return np.fromiter((_name_id(text) if text else 0 for text in texts), np.uint64)


def uid_ids(halves: np.ndarray) -> np.ndarray:
    """uint64 (n,): the numbers of uids as (n, 2) uint64, upper and lower half."""
    ids: np.ndarray = halves[:, 0] * np.uint64(SPREAD) + halves[:, 1]
    ids[ids == 0] = HALF
    return ids


def uid_halves(uid: str) -> tuple[int, int]:
    """The upper and the lower 64 bits of a uid of 32 hexadecimal digits."""
    number = int(uid, 16)
    return number >> 64, number & HALF


def _name_id(text: str) -> int:
    if UID.fullmatch(text):
        upper, lower = uid_halves(text)
        return (upper * SPREAD + lower) & HALF or HALF
    if len(text) == SHA256_DIGITS:
        text = text.lower()
    return content_id(text.encode(errors="surrogatepass"))


def _file_ids(path: str, option: str) -> Iterator[np.ndarray]:
    """The numbers of a file's names, some at a time."""
    with open_read(path) as file:
        magic = file.read(len(NUMPY_MAGIC))
    if magic == NUMPY_MAGIC:
        yield from _numpy_ids(path, option)
    elif magic.startswith(PARQUET_MAGIC):
        yield from _parquet_ids(path, option)
    else:
        try:
            for part in batches(_text_names(path, option), BLOCK):
                yield name_ids(part)
        except BROKEN_GZIP as error:
            raise UserError(f"{option} {path}: broken gzip file ({error}); download it again") from error
        except UserError as error:  # of the readers of lists, which name an option of ingest
            raise UserError(f"{option} {str(error).replace(', and --format where it is given', '')}") from error


def _text_names(path: str, option: str) -> Iterator[str]:
    """The names in a text: a line each, or one column of a table whose first line names its columns."""
    texts = (line.decode(errors="surrogateescape").strip() for line in lines(path))
    first = next(texts, "")
    separator = "\t" if "\t" in first else ","
    header = [name.strip().strip('"').lower() for name in first.split(separator)]
    named = [name for name in NAMES if name in header]
    if len(header) < 2 or not named:
        if len(header) > 1 and path.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
            raise UserError(f"{option} {path}: none of the columns {', '.join(NAMES)} in it; rename one of {header}")
        yield from chain([first], texts)
        return
    place = header.index(named[0])
    # a quote in a TSV is part of the text
    if separator == "\t":
        rows = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(texts)
    try:
        for row in rows:
            if len(row) > place:
                yield row[place].strip().strip('"')
    except csv.Error as error:
        raise UserError(f"{option} {path}: no table can be read from it ({error}); give a name per line") from error


def _numpy_ids(path: str, option: str) -> Iterator[np.ndarray]:
    try:
        if is_url(path):
            array = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{option} {path}: no array of uids or texts can be read from it ({error})") from error
    is_pairs = array.dtype.fields is not None and [kind.str for kind, *_ in array.dtype.fields.values()] == ["<u8"] * 2
    if is_pairs:
        array = array.view(np.uint64).reshape(-1, 2)
    is_numbers = array.dtype == np.uint64 and array.ndim == 2 and array.shape[1] == 2
    if not is_numbers and not (array.dtype.kind in "US" and array.ndim == 1):
        raise UserError(
            f"{option} {path}: an array of {array.dtype} {array.shape}; allowed are uids as two uint64 each, as in "
            "DataComp's subsets, and texts"
        )
    for start in range(0, len(array), BLOCK):
        block = np.asarray(array[start : start + BLOCK])
        yield uid_ids(block) if is_numbers else name_ids(block.astype(str).tolist())


def _parquet_ids(path: str, option: str) -> Iterator[np.ndarray]:
    """Of the first column that is there among `NAMES`, or of the only column."""
    with open_parquet(path, given=True) as file:
        columns = file.schema_arrow.names
        named = [name for name in NAMES if name in columns] or (columns if len(columns) == 1 else [])
        if not named:
            raise UserError(f"{option} {path}: none of the columns {', '.join(NAMES)} in it; rename one of {columns}")
        for batch in file.iter_batches(BLOCK, columns=named[:1]):
            yield name_ids(batch.column(0).cast(pa.string()).to_pylist())
