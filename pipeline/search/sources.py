"""The images that are searched: files of a folder at any depth, and samples of tars, each with an identity.

An image's identity is a 64-bit hash of its name and of what tells a change: size and modification time of a file, the
bytes of a sample. Samples are read for it once; `TarListing` keeps what they were for as long as the tar is the same.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import pyarrow as pa

from pipeline.ingest.image_folder import not_decoded, stamp_and_problem
from shards_spec.content_id import content_id
from shards_spec.files import DataError, UserError, exists, is_url, join, read_buffer, read_bytes
from shards_spec.folders import walk
from shards_spec.layout import RAW, SHARDS, dataset_json
from shards_spec.names import IMAGE_EXTENSIONS, endings_line, file_ending, is_image, undecoded_ending
from shards_spec.parquet import read_table, write_table
from shards_spec.tar import index_shard
from shards_spec.tar_members import Member

log = logging.getLogger(__name__)
IN_TAR = ".tar:"  # of a sample's name: TAR:KEY
DATASET_FILES = (".parquet", ".json")  # beside a dataset's tars


ReadImage = Callable[[], bytes]


@dataclass(frozen=True)
class ImageEntry:
    """An image by its name below the folder (``a/b.jpg``, ``00003.tar:KEY``) and its identity."""

    name: str
    id: int


class TarListing:
    """Names and identities of the samples of tars, kept in a Parquet file between searches."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._known = dict[str, tuple[str, list[ImageEntry]]]()  # tar -> (stamp, samples)
        self._used = dict[str, tuple[str, list[ImageEntry]]]()
        if exists(path):
            self._read()

    def _read(self) -> None:
        try:
            table = read_table(self.path, ["tar", "stamp", "key", "id"])
        except DataError as error:
            log.warning("%s; the tars are read again", error)
            return
        for tar, stamp, key, identity in zip(*(column.to_pylist() for column in table.columns), strict=True):
            self._known.setdefault(tar, (stamp, []))[1].append(ImageEntry(f"{tar}:{key}", identity))

    def get(self, tar: str, stamp: str) -> list[ImageEntry] | None:
        """Return the samples of a tar, None where it is new or was changed."""
        known = self._known.get(tar)
        if known is None or known[0] != stamp:
            return None
        self._used[tar] = known
        return known[1]

    def put(self, tar: str, stamp: str, entries: list[ImageEntry]) -> None:
        """Keep the samples of a tar."""
        self._used[tar] = (stamp, entries)

    def save(self) -> None:
        """Write what `get` and `put` had since the start, unless the file has just that."""
        if self._used == self._known:
            return
        columns: dict[str, list[str | int]] = {"tar": [], "stamp": [], "key": [], "id": []}
        for tar, (stamp, entries) in self._used.items():
            columns["tar"] += [tar] * len(entries)
            columns["stamp"] += [stamp] * len(entries)
            columns["key"] += [entry.name.removeprefix(f"{tar}:") for entry in entries]
            columns["id"] += [entry.id for entry in entries]
        types = {"tar": pa.string(), "stamp": pa.string(), "key": pa.string(), "id": pa.uint64()}
        write_table(self.path, pa.table({name: pa.array(columns[name], types[name]) for name in columns}))


@dataclass
class ImageSource:
    """The images below a folder.

    ``left_out`` counts, by reason, the images that cannot be used; ``other_files`` the other files by their ending.
    """

    folder: str
    is_dataset: bool
    left_out: Counter[str] = field(default_factory=Counter)
    other_files: Counter[str] = field(default_factory=Counter)

    def entries(self, listing: TarListing) -> Iterator[ImageEntry]:
        """Yield all images in a fixed order: a folder's before its folders', by name. Raises UserError."""
        for prefix, files in walk(self.folder):
            for name, info in files.items():
                if name.lower().endswith(".tar"):
                    yield from self._samples(prefix + name, info, listing)
                elif is_image(name):
                    stamp, problem = stamp_and_problem(self.folder, prefix + name, info)
                    if problem is None:
                        yield ImageEntry(prefix + name, content_id(f"{prefix}{name}\0{stamp}".encode()))
                    else:
                        self.left_out[problem] += 1
                elif ending := undecoded_ending(name):
                    self.left_out[not_decoded(ending)] += 1
                elif not (self.is_dataset and name.endswith(DATASET_FILES)):
                    self.other_files[file_ending(name)] += 1

    def _samples(self, tar: str, info: dict[str, object], listing: TarListing) -> Iterator[ImageEntry]:
        """The samples with an image of a tar; those before the damage of a damaged one."""
        stamp, problem = stamp_and_problem(self.folder, tar, info)
        if problem is not None:
            self.left_out[problem] += 1
            return
        entries = listing.get(tar, stamp)
        if entries is None:
            entries = []
            for key, read in self._read_tar(tar):
                entries.append(ImageEntry(f"{tar}:{key}", content_id(f"{tar}:{key}\0{content_id(read())}".encode())))
            listing.put(tar, stamp, entries)
        yield from entries

    def _read_tar(self, tar: str, wanted: set[str] | None = None) -> Iterator[tuple[str, ReadImage]]:
        """Key and image of the samples of a tar, of all without ``wanted``."""
        path = join(self.folder, tar)
        try:
            with read_buffer(path) as buffer:
                for key, members in index_shard(buffer, path):
                    if wanted is None or key in wanted:
                        image = _image_member(members)
                        if image is not None:
                            yield key, partial(image.read, buffer)
                        else:
                            self.left_out["sample without an image"] += 1
        except DataError as error:
            if wanted is None:  # else it was counted when the tar was listed
                self.left_out["damaged tar"] += 1
                log.warning("%s; what comes before the damage is searched", error)

    def read(self, entries: Iterable[ImageEntry]) -> Iterator[tuple[ImageEntry, ReadImage]]:
        """Yield each entry, in order, with the function that reads its encoded image; it may be called in a thread.

        Samples that left their tar meanwhile are left out; the function raises OSError for a file that is gone.
        """
        for tar, group in groupby(entries, key=lambda entry: tar_of(entry.name)):
            if not tar:
                yield from ((entry, partial(read_bytes, join(self.folder, entry.name))) for entry in group)
                continue
            by_key = {entry.name.removeprefix(f"{tar}:"): entry for entry in group}
            for key, read in self._read_tar(tar, set(by_key)):
                yield by_key[key], read

    def path(self, name: str) -> str:
        """Return how results show an image: the path of its file, or of its tar and the key."""
        return join(self.folder, name)

    def files_seen(self) -> str:
        """Return what the folder holds besides images, for messages."""
        return endings_line(self.other_files) if self.other_files else "none"


def _image_member(members: dict[str, Member]) -> Member | None:
    return next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)


def tar_of(name: str) -> str:
    """Return the tar of a sample's name; empty for a file's."""
    tar, separator, _ = name.partition(IN_TAR)
    return f"{tar}.tar" if separator else ""


def open_source(images: str) -> ImageSource:
    """Return the images of a folder, or of a dataset's newest tars: ``shards/``, else ``raw/``. Raises UserError."""
    if not exists(images):
        raise UserError(f"--images {images} is not there: give a folder of images or the ROOT of a dataset")
    for folder in (SHARDS, RAW):
        if exists(dataset_json(images)) and exists(join(images, folder)):
            return ImageSource(join(images, folder), is_dataset=True)
    if not is_url(images):
        next(walk(images))  # names a file, or a folder that may not be read
    return ImageSource(images.rstrip("/") or "/", is_dataset=False)
