"""Samples of WebDataset tars made by others: which members belong together. No image is read here."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import NamedTuple, cast

from pipeline.ingest.source_io import open_random_access
from shards_spec.files import DataError, UserError, is_url, store_errors
from shards_spec.names import is_image
from shards_spec.sample import LABEL_IMAGES, NAMED_IMAGES, TEXT_EXTENSIONS, split_name, subsamples
from shards_spec.tar_members import Member, TrailingBytes, TruncatedTar, scan

PEEKED_SAMPLES = 20  # of a tar, that tell how its members lie
MAX_GATHERED = 200_000  # members of a tar whose captions do not lie beside their images; some 100 MB
ONLY_IGNORED = "only hidden or system files"
SEVERAL_IMAGES = "several images under one key"


class TarSample(NamedTuple):
    """A sample of a tar: its key, its members by extension, why it cannot be used."""

    key: str
    members: dict[str, Member]
    problem: str | None = None


class _SlicedFile:
    """A tar as the slices that `scan` asks for, local or remote; what lies between them is skipped.

    Mapped into memory, a local tar was listed at less than half the speed, and its images counted as memory.
    """

    def __init__(self, path: str) -> None:
        self._file = open_random_access(path)
        self._errors = partial(store_errors, path) if is_url(path) else contextlib.nullcontext
        try:
            self._size = self._file.seek(0, os.SEEK_END)
        except (ValueError, OSError) as error:
            self._file.close()
            raise UserError(
                f"--source {path}: its server gives whole files only ({error}); download it first"
            ) from error

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, piece: slice) -> bytes:
        start, stop, _ = piece.indices(self._size)
        with self._errors():
            self._file.seek(start)
            return self._file.read(max(stop - start, 0))

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def open_tar(path: str) -> Iterator[memoryview]:
    """The bytes of a local or remote tar, read by slices. Raises UserError for a server that gives whole files only."""
    with contextlib.closing(_SlicedFile(path)) as file:
        yield cast(memoryview, file)  # has what `scan` and `Member.read` use of one


def tar_samples(buffer: memoryview, path: str) -> Iterator[TarSample]:
    """Samples from adjacent members with one key, which `sample.subsamples` may part further.

    Where the first samples are single members, as in a tar of all images, then all captions, members are put together
    by their keys wherever they lie, up to `MAX_GATHERED` of them. A tar that breaks off gives its whole samples, then
    one last item with its problem and the key it broke in.
    """
    ignored: list[str] = []
    groups = _adjacent_members(buffer, path, ignored)
    head = list(islice(groups, PEEKED_SAMPLES))
    if not head and ignored:
        yield TarSample("", {}, ONLY_IGNORED)
    are_apart = len(head) > 1 and all(group.problem is None and len(group.members) == 1 for group in head)
    groups = chain(head, groups)
    for group in _gather(groups) if are_apart else groups:
        if group.problem is not None:
            yield group
            continue
        for key, members in subsamples(group.key, group.members):
            problem = next((member.problem for member in members.values() if member.problem), None)
            yield TarSample(key, members, problem)
            for stem in _other_images(members):
                yield TarSample(f"{key}.{stem}", {}, SEVERAL_IMAGES)


def _adjacent_members(buffer: memoryview, path: str, ignored: list[str]) -> Iterator[TarSample]:
    """Adjacent members with one key; the name of a first file that is ignored is added to ``ignored``."""
    key: str | None = None
    members: dict[str, Member] = {}
    former_extensions: set[str] = set()  # of the sample before
    try:
        for member in scan(buffer, path, ignored=ignored):
            member_key, extension = split_name(member.name)
            if member_key != key or extension in members:
                if key is not None:
                    yield TarSample(key, members)
                    former_extensions = set(members)
                key = member_key
                members = {}
            members[extension] = member
    except DataError as error:
        # the last sample is whole when the tar itself was, or when it lacks nothing that the one before had
        is_complete = bool(former_extensions) and former_extensions <= set(members)
        if key is not None and (isinstance(error, TrailingBytes) or is_complete):
            yield TarSample(key, members)
            key = None
        yield TarSample(key or "", {}, "truncated tar" if isinstance(error, TruncatedTar) else "damaged tar")
        return
    if key is not None:
        yield TarSample(key, members)


def _gather(groups: Iterator[TarSample]) -> Iterator[TarSample]:
    """Members with one key as one sample, in the order of their first members; beyond `MAX_GATHERED` as they come."""
    gathered: list[TarSample] = []
    latest: dict[str, TarSample] = {}  # key -> the last sample with it
    broken: TarSample | None = None
    number = 0
    for group in groups:
        if group.problem is not None:
            broken = group
            break
        sample = latest.get(group.key)
        if sample is None or sample.members.keys() & group.members.keys():
            sample = TarSample(group.key, {})
            latest[group.key] = sample
            gathered.append(sample)
        sample.members.update(group.members)
        number += len(group.members)
        if number >= MAX_GATHERED:
            break
    if broken is None:
        yield from gathered
    else:
        kinds = set[str]()
        for sample in gathered:
            kinds |= _kinds(sample.members)
        for sample in gathered:  # of one that lacks a kind, that member may have come after the break
            is_complete = kinds <= _kinds(sample.members)
            yield sample if is_complete else sample._replace(problem=broken.problem)
        yield broken
    yield from groups


def _kinds(members: dict[str, Member]) -> set[str]:
    """The kinds of members of a sample: ``image``, ``txt``, ``json`` ..."""
    kinds = {"image" if is_image(extension) else extension.rpartition(".")[2] for extension in members}
    return kinds & {"image", "json", *TEXT_EXTENSIONS}


def image_extension(members: dict[str, Member]) -> str | None:
    """The extension of a sample's image: ``jpg`` before ``image.jpg`` before others such as ``mask.png``."""
    images = [extension for extension in members if is_image(extension)]
    plain = [extension for extension in images if "." not in extension]
    named = [extension for extension in images if extension.split(".")[0] in NAMED_IMAGES]
    not_labels = [extension for extension in images if extension.split(".")[0] not in LABEL_IMAGES]
    preferred = plain or named or not_labels or images
    return preferred[0] if preferred else None


def _other_images(members: dict[str, Member]) -> list[str]:
    """Stems of further images that could be the sample's as well as the one of `image_extension`."""
    chosen = image_extension(members)
    if chosen is None or "." not in chosen or chosen.split(".")[0] in (*NAMED_IMAGES, *LABEL_IMAGES):
        return []
    stems = [extension.rpartition(".")[0] for extension in members if is_image(extension) and extension != chosen]
    return [stem for stem in stems if stem.split(".")[0] not in LABEL_IMAGES]


def mean_sample_bytes(path: str, samples: int) -> float | None:
    """Bytes of the tar per sample, by its first ``samples``; None when it has none."""
    end = 0
    number = 0
    with open_tar(path) as buffer:
        for sample in islice(tar_samples(buffer, path), samples):
            number += 1
            end = max([end, *(member.offset + member.size for member in sample.members.values())])
    return end / number if number and end else None
