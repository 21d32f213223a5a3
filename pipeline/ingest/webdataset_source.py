"""Rows of WebDataset tars made by others: one per sample, with the place of its image. No image is read here."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

from pipeline.core.prefetch import prefetch_map
from pipeline.ingest.cells import CAPTION_TOO_LONG
from pipeline.ingest.image_folder import not_decoded, seen_line, warn_of_no_caption
from pipeline.ingest.rows import (
    CAPTION_NAMES,
    NOT_UTF8,
    URL_NAMES,
    Columns,
    ImageRef,
    Row,
    SourceCaption,
    SparseTarRef,
    TarRef,
    captions_of,
    decode_text,
    find_column,
    json_text,
)
from pipeline.ingest.source_files import SourceFile
from pipeline.ingest.tar_samples import PEEKED_SAMPLES, TarSample, image_extension, open_tar, tar_samples
from shards_spec.file_kinds import PACKED_BYTES, packed_kind
from shards_spec.files import UserError, is_url
from shards_spec.library_errors import describe_content
from shards_spec.messages import counted
from shards_spec.names import clean_name, is_image, undecoded_ending
from shards_spec.sample import TEXT_EXTENSIONS, parse_object
from shards_spec.tar_members import Member

MAX_TEXT_BYTES = 1 << 24  # of a member beside an image
MAX_LABEL_BYTES = 64  # of a number
REMOTE_TARS = 8  # listed at once
NO_IMAGE = "no picture"
NOT_AN_OBJECT = "json member is not a JSON object"


def webdataset_rows(files: list[SourceFile], columns: Columns) -> Iterator[Row]:
    """A row per sample of the tars; of one with a list of captions, one each.

    Raises UserError for a column named that the first samples do not have.
    """
    if not files:
        return
    _check_columns(files[0].path, columns)
    seen = Counter[str]()  # endings of members
    if any(is_url(file.path) for file in files):
        rows_of_tars = prefetch_map(lambda file: list(_tar_rows(file, columns, seen)), files, REMOTE_TARS, REMOTE_TARS)
        rows = chain.from_iterable(rows_of_tars)
    else:
        rows = chain.from_iterable(_tar_rows(file, columns, seen) for file in files)
    source = files[0].path if len(files) == 1 else f"{len(files)} tars"
    yield from warn_of_no_caption(rows, source, partial(seen_line, "members", seen))


def _tar_rows(file: SourceFile, columns: Columns, seen: Counter[str]) -> Iterator[Row]:
    with open_tar(file.path) as buffer:
        if (kind := packed_kind(bytes(buffer[:PACKED_BYTES]))) is not None:
            yield Row(None, clean_name(file.below), f"{kind}, not a tar", file.stamp)
            return
        for number, sample in enumerate(tar_samples(buffer, file.path)):
            seen.update(extension.rpartition(".")[2] for extension in sample.members)
            name = clean_name(f"{file.below}/{sample.key}" if sample.key else file.below)
            if sample.problem is None:
                yield from _sample_rows(buffer, sample.members, name, file, columns)
            else:
                kind_of_file = not_a_tar(file.path) if number == 0 else None
                yield Row(None, name, kind_of_file or sample.problem, file.stamp)


def labelled_tar_rows(files: list[SourceFile]) -> Iterator[tuple[Row, bytes]]:
    """(a row without caption, the bytes of its member ``cls``) per sample of the tars."""
    for file in files:
        with open_tar(file.path) as buffer:
            for sample in tar_samples(buffer, file.path):
                name = clean_name(f"{file.below}/{sample.key}" if sample.key else file.below)
                image, label = image_extension(sample.members), sample.members.get("cls")
                problem = sample.problem or (NO_IMAGE if image is None else None)
                image_ref = None if image is None else image_ref_of(file.path, sample.members[image])
                row = Row(None, name, problem, file.stamp, image_ref)
                yield row, b"" if label is None or label.size > MAX_LABEL_BYTES else label.read(buffer)


def not_a_tar(path: str) -> str | None:
    """What a file is that is no tar, such as a Git LFS pointer or a web page; None where that cannot be told."""
    kind = describe_content(path)
    if kind is None or not kind[0].startswith("is "):
        return None
    return kind[0].removeprefix("is ")


def _sample_rows(
    buffer: memoryview, members: dict[str, Member], name: str, file: SourceFile, columns: Columns
) -> Iterator[Row]:
    """A row per caption of a sample; ``name`` stands for its URL where it has none."""
    caption_column, url_column = columns
    image = image_extension(members)
    texts = _Texts(buffer, members)
    url = texts.url(url_column) or name
    for caption in texts.captions(caption_column, stem=(image or "").rpartition(".")[0]):
        if image is None:
            undecoded = next(filter(None, map(undecoded_ending, members)), None)
            yield Row(caption.text, url, not_decoded(undecoded) if undecoded else NO_IMAGE, file.stamp)
            continue
        problem = caption.problem
        if problem is None and caption.text is None:
            problem = texts.fields_problem
        yield Row(caption.text, url, problem, file.stamp, image_ref_of(file.path, members[image]), caption.note)


def image_ref_of(path: str, member: Member) -> ImageRef:
    """Where the image lies that is a member of the tar ``path``."""
    if member.pieces:
        return SparseTarRef(path, member.size, member.pieces)
    return TarRef(path, member.offset, member.size)


class _Texts:
    """The members of a sample that are not images.

    Attributes:
        members: By extension.
        fields: The object in the json member; empty when there is none.
        fields_problem: Why the json member cannot be used.
    """

    def __init__(self, buffer: memoryview, members: dict[str, Member]) -> None:
        self._buffer = buffer
        self.members = {extension: member for extension, member in members.items() if not is_image(extension)}
        self.fields: dict[str, Any] = {}
        self.fields_problem: str | None = None
        member = self._find(("json",))
        if member is not None:
            text, problem = self._read(member)
            try:
                if problem is not None:
                    raise ValueError(problem)
                self.fields = parse_object(text or "")
            except ValueError:
                self.fields_problem = NOT_AN_OBJECT

    def captions(self, given: str | None, stem: str) -> list[SourceCaption]:
        """The sample's captions.

        Args:
            given: The json field or the extension that holds them; None: found by their usual names.
            stem: What stands before the image's last extension: of ``seg.jpg``, ``seg.txt`` comes before ``txt``.
        """
        if given is not None and given in self.fields:
            return captions_of(self.fields[given])
        if given is not None:
            member = self.members.get(given.lower())
        else:
            member = self._find(TEXT_EXTENSIONS, stem)
        if member is not None:
            text, problem = self._read(member)
            return [SourceCaption(text.strip() if text is not None else None, problem)]
        names = list(self.fields)
        index = find_column(None, CAPTION_NAMES, names) if given is None else None
        return captions_of(self.fields[names[index]]) if index is not None else [SourceCaption()]

    def url(self, given: str | None) -> str | None:
        """The image's URL, from the json field or the member ``given`` or called so; None when there is none."""
        names = list(self.fields)
        index = find_column(given, URL_NAMES, names)
        value = self.fields[names[index]] if index is not None else None
        if value is None:
            member = self.members.get((given or "url").lower())
            value = self._read(member)[0] if member is not None else None
        return (json_text(value)[0] or "").strip() or None

    def _find(self, extensions: tuple[str, ...], stem: str = "") -> Member | None:
        """The first member with one of the extensions: of the stem, then alone (``txt``), then with another stem."""
        exact = [f"{stem}.{extension}" for extension in extensions] if stem else []
        for extension in (*exact, *extensions):
            if extension in self.members:
                return self.members[extension]
        for extension, member in self.members.items():
            if extension.rpartition(".")[2] in extensions:
                return member
        return None

    def _read(self, member: Member) -> tuple[str | None, str | None]:
        """(text, problem) of a member."""
        if member.size > MAX_TEXT_BYTES:
            return None, CAPTION_TOO_LONG
        text, broken = decode_text(member.read(self._buffer))
        return (text or "").removeprefix("\ufeff"), NOT_UTF8 if broken else None


def _check_columns(path: str, columns: Columns) -> None:
    """Raises UserError when a column named is in none of the first samples."""
    if columns == (None, None):
        return
    caption_column, url_column = columns
    seen: dict[str, None] = {}  # extensions and json fields
    samples = 0
    urls = 0
    with open_tar(path) as buffer:
        head: list[TarSample] = list(islice(tar_samples(buffer, path), PEEKED_SAMPLES))
        for sample in head:
            if not sample.members:
                continue
            samples += 1
            texts = _Texts(buffer, sample.members)
            seen |= dict.fromkeys([*texts.members, *texts.fields])
            url = texts.url(url_column)
            urls += url is not None and "\ufffd" not in url  # bytes that are not text: an image
    if not samples:
        return
    for given, option in ((caption_column, "--caption-col"), (url_column, "--url-col")):
        if given is not None and given not in seen and given.lower() not in seen:
            raise UserError(f"--source {path}: no column {given!r}; its samples have {list(seen)}; change {option}")
    if url_column is not None and not urls:
        raise UserError(
            f"--source {path}: --url-col {url_column!r} holds no text in the first {counted(samples, 'sample')}; "
            "it names where the image's address stands, images themselves are found without it"
        )
