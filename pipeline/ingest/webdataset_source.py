"""Rows of WebDataset tars made by others: one per sample, with the place of its image. No image is read here."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any, cast

from pipeline.core.prefetch import prefetch_map
from pipeline.ingest.image_folder import not_decoded, seen_line, warn_of_no_caption
from pipeline.ingest.rows import (
    CAPTION_NAMES,
    NOT_UTF8,
    URL_NAMES,
    Caption,
    Columns,
    Row,
    SparseTarRef,
    TarRef,
    decode_text,
    find_column,
    json_text,
)
from pipeline.ingest.source_files import SourceFile
from pipeline.ingest.source_io import open_random_access
from pipeline.ingest.text_lists import captions_of
from shards_spec.files import DataError, UserError, is_url, store_errors
from shards_spec.library_errors import what_it_is
from shards_spec.names import PACKED_BYTES, clean_name, is_image, packed_kind, undecoded_ending
from shards_spec.sample import LABEL_IMAGES, NAMED_IMAGES, TEXT_EXTENSIONS, parse_object, split_name, subsamples
from shards_spec.tar_members import Member, TrailingBytes, TruncatedTar, scan

MAX_TEXT_BYTES = 1 << 24  # of a member beside an image
PEEKED_SAMPLES = 20  # of the first tar, to tell whether a named column is there; of each, to tell how members lie
MOST_GATHERED = 200_000  # members of a tar whose captions do not lie beside their images; some 100 MB
REMOTE_TARS = 8  # listed at once
ONLY_NOBODYS = "only hidden or system files"
SEVERAL, NOT_AN_OBJECT = "several images under one key", "json member is not a JSON object"

Group = tuple[str, dict[str, Member], str | None]  # key, extension -> member, problem


class _Parts:
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
            raise UserError(f"--source {path}: its server gives whole files only ({error}); fetch it first") from error

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
def _tar_buffer(path: str) -> Iterator[memoryview]:
    """The tar's bytes by slices."""
    with contextlib.closing(_Parts(path)) as parts:
        yield cast(memoryview, parts)


# members to samples


def tar_samples(buffer: memoryview, path: str) -> Iterator[Group]:
    """(key, extension -> member, problem) of adjacent members with one key, as `sample.subsamples` parts them.

    Where the first samples are single members, as in a tar of all images, then all captions, members are put together
    by their keys wherever they lie, up to `MOST_GATHERED` of them. A tar that breaks off gives its whole samples, then
    one last item with its problem and the key it broke in.
    """
    nobodys = list[str]()
    groups = _adjacent(buffer, path, nobodys)
    head = list(islice(groups, PEEKED_SAMPLES))
    if not head and nobodys:
        yield "", {}, ONLY_NOBODYS
    lonely = len(head) > 1 and all(problem is None and len(members) == 1 for _, members, problem in head)
    groups = chain(head, groups)
    for key, members, problem in _gathered(groups) if lonely else groups:
        if problem is not None:
            yield key, members, problem
            continue
        for longer, own in subsamples(key, members):
            yield longer, own, next((member.problem for member in own.values() if member.problem), None)
            yield from ((f"{longer}.{stem}", {}, SEVERAL) for stem in _ambiguous(own))


def _adjacent(buffer: memoryview, path: str, nobodys: list[str]) -> Iterator[Group]:
    key, members, usual = None, dict[str, Member](), set[str]()
    try:
        for member in scan(buffer, path, nobodys=nobodys):
            new_key, extension = split_name(member.name)
            if new_key != key or extension in members:
                if key is not None:
                    yield key, members, None
                    usual = set(members)
                key, members = new_key, {}
            members[extension] = member
    except DataError as error:
        ended = isinstance(error, TrailingBytes)
        if key is not None and (ended or (usual and usual <= set(members))):  # nothing that the one before had lacks
            yield key, members, None
            key = None
        yield key or "", {}, "truncated tar" if isinstance(error, TruncatedTar) else "damaged tar"
        return
    if key is not None:
        yield key, members, None


def _gathered(groups: Iterator[Group]) -> Iterator[Group]:
    """Groups with one key as one, in the order of their first members; beyond `MOST_GATHERED` as they come."""
    found, open_groups, number, last = list[tuple[str, dict[str, Member]]](), dict[str, dict[str, Member]](), 0, None
    for key, members, problem in groups:
        if problem is not None:
            last = key, members, problem
            break
        own = open_groups.get(key)
        if own is None or own.keys() & members.keys():
            open_groups[key] = own = {}
            found.append((key, own))
        own.update(members)
        number += len(members)
        if number >= MOST_GATHERED:
            break
    usual = set[str]().union(*(_kinds(members) for _, members in found)) if last is not None else set[str]()
    for key, members in found:  # of a tar that breaks off, those that may have had more behind the break are not whole
        yield key, members, last[2] if last is not None and usual - _kinds(members) else None
    if last is not None:
        yield last
    yield from groups


def _kinds(members: dict[str, Member]) -> set[str]:
    """``image``, ``txt``, ``json`` …"""
    found = {"image" if is_image(extension) else extension.rpartition(".")[2] for extension in members}
    return found & {"image", "json", *TEXT_EXTENSIONS}


def _image_extension(members: dict[str, Member]) -> str | None:
    """``jpg`` before ``image.jpg`` before other images such as ``mask.png``; the first of equals."""
    found = [extension for extension in members if is_image(extension)]
    plain = [extension for extension in found if "." not in extension]
    named = [extension for extension in found if extension.split(".")[0] in NAMED_IMAGES]
    others = [extension for extension in found if extension.split(".")[0] not in LABEL_IMAGES]
    return next(iter(plain or named or others or found), None)


def _ambiguous(members: dict[str, Member]) -> list[str]:
    """Stems of further images that could be the sample's as well as the first."""
    chosen = _image_extension(members)
    if chosen is None or "." not in chosen or chosen.split(".")[0] in (*NAMED_IMAGES, *LABEL_IMAGES):
        return []
    others = (extension.rpartition(".")[0] for extension in members if is_image(extension) and extension != chosen)
    return [stem for stem in others if stem.split(".")[0] not in LABEL_IMAGES]


# samples to rows


def webdataset_rows(files: list[SourceFile], columns: Columns) -> Iterator[Row]:
    """A row per sample of the tars, one per caption of those with a list of them.

    Raises UserError for a column given that the first samples do not have.
    """
    if not files:
        return
    _check_columns(files[0].path, columns)
    seen = Counter[str]()
    if any(is_url(file.path) for file in files):
        listed = prefetch_map(lambda file: list(_tar_rows(file, columns, seen)), files, REMOTE_TARS, REMOTE_TARS)
        rows = chain.from_iterable(listed)
    else:
        rows = chain.from_iterable(_tar_rows(file, columns, seen) for file in files)
    source = files[0].path if len(files) == 1 else f"{len(files)} tars"
    yield from warn_of_no_caption(rows, source, partial(seen_line, "members", seen))


def _tar_rows(file: SourceFile, columns: Columns, seen: Counter[str]) -> Iterator[Row]:
    with _tar_buffer(file.path) as buffer:
        if (kind := packed_kind(bytes(buffer[:PACKED_BYTES]))) is not None:
            yield Row(None, clean_name(file.below), f"{kind}, not a tar", file.stamp)
            return
        for number, (key, members, problem) in enumerate(tar_samples(buffer, file.path)):
            name = clean_name(f"{file.below}/{key}" if key else file.below)
            seen.update(extension.rpartition(".")[2] for extension in members)
            if problem is not None:
                if not number and (found := what_it_is(file.path)) is not None and found[0].startswith("is "):
                    problem = found[0].removeprefix("is ")  # a Git LFS pointer, a web page
                yield Row(None, name, problem, file.stamp)
            else:
                yield from _sample_rows(buffer, members, name, file, columns)


def _sample_rows(
    buffer: memoryview, members: dict[str, Member], name: str, file: SourceFile, columns: Columns
) -> Iterator[Row]:
    image = _image_extension(members)
    texts = {extension: member for extension, member in members.items() if not is_image(extension)}
    fields, problem = _json_fields(buffer, texts)
    url = _url(buffer, texts, fields or {}, columns[1]) or name
    for caption, wrong, note in _captions(buffer, texts, fields, columns[0], (image or "").rpartition(".")[0]):
        if image is None:
            other = next(filter(None, map(undecoded_ending, texts)), None)
            yield Row(caption, url, not_decoded(other) if other else "no picture", file.stamp)
            continue
        member = members[image]
        place = (
            SparseTarRef(file.path, member.size, member.pieces)
            if member.pieces
            else TarRef(file.path, member.offset, member.size)
        )
        yield Row(caption, url, wrong or (problem if caption is None else None), file.stamp, place, note)


def _member_text(buffer: memoryview, member: Member) -> tuple[str | None, str | None]:
    """(text, problem)."""
    if member.size > MAX_TEXT_BYTES:
        return None, "caption too long"
    text, broken = decode_text(member.read(buffer))
    text = text.removeprefix("\ufeff") if text is not None else None
    return text, NOT_UTF8 if broken else None


def _json_fields(buffer: memoryview, texts: dict[str, Member]) -> tuple[dict[str, Any] | None, str | None]:
    """The sample's json member (None when there is none), and its problem when it is no JSON object."""
    member = _member(texts, ("json",))
    if member is None:
        return None, None
    text, problem = _member_text(buffer, member)
    try:
        return (parse_object(text or ""), None) if problem is None else (None, NOT_AN_OBJECT)
    except ValueError:
        return None, NOT_AN_OBJECT


def _member(texts: dict[str, Member], names: tuple[str, ...], stem: str = "") -> Member | None:
    """The first member with one of the extensions: of the image's longer stem, plain ones (``txt``), longer ones."""
    exact = [*(f"{stem}.{name}" for name in names if stem), *names]
    found = next((texts[name] for name in exact if name in texts), None)
    return found or next((member for ext, member in texts.items() if ext.rpartition(".")[2] in names), None)


def _captions(
    buffer: memoryview, texts: dict[str, Member], fields: dict[str, Any] | None, given: str | None, stem: str
) -> list[Caption]:
    if given is not None and fields is not None and given in fields:
        return captions_of(fields[given])
    member = texts.get(given.lower()) if given is not None else _member(texts, TEXT_EXTENSIONS, stem)
    if member is not None:
        text, problem = _member_text(buffer, member)
        return [Caption(text.strip() if text is not None else None, problem)]
    names = list(fields or {})
    index = find_column(None, CAPTION_NAMES, names) if given is None else None
    return captions_of((fields or {})[names[index]]) if index is not None else [Caption()]


def _url(buffer: memoryview, texts: dict[str, Member], fields: dict[str, Any], given: str | None) -> str | None:
    """The image's address on the web, when the sample tells it."""
    names = list(fields)
    index = find_column(given, URL_NAMES, names)
    value = fields[names[index]] if index is not None else None
    if value is None and (member := texts.get((given or "url").lower())) is not None:
        value = _member_text(buffer, member)[0]
    return (json_text(value)[0] or "").strip() or None


def _check_columns(path: str, columns: Columns) -> None:
    """Raises UserError when a column given is in none of the first samples."""
    if columns == (None, None):
        return
    seen, samples, links = dict[str, None](), 0, 0
    with _tar_buffer(path) as buffer:
        for _, members, _ in islice(tar_samples(buffer, path), PEEKED_SAMPLES):
            samples += bool(members)
            texts = {extension: member for extension, member in members.items() if not is_image(extension)}
            fields = _json_fields(buffer, texts)[0] or {}
            seen |= dict.fromkeys([*texts, *fields])
            links += columns[1] is not None and "\ufffd" not in (_url(buffer, texts, fields, columns[1]) or "\ufffd")
    for given, option in zip(columns, ("--caption-col", "--url-col"), strict=True):
        if samples and given is not None and given not in seen and given.lower() not in seen:
            raise UserError(f"--source {path}: no column {given!r}; its samples have {list(seen)}; change {option}")
    if samples and columns[1] is not None and not links:
        raise UserError(
            f"--source {path}: --url-col {columns[1]!r} holds no text in the first {samples} samples; it names where "
            "the image's address stands, images themselves are found without it"
        )


def mean_sample_bytes(path: str, samples: int) -> float | None:
    """Bytes of the tar per sample, by its first samples; None when it has none."""
    end = number = 0
    with _tar_buffer(path) as buffer:
        for number, (_, members, _) in enumerate(tar_samples(buffer, path), start=1):
            end = max([end, *(member.offset + member.size for member in members.values())])
            if number == samples:
                break
    return end / number if number and end else None
