"""Rows of Apple's DataCompDR tars (apple/DataCompDR-12M, -12M-bf16, -1B): links, hashes and captions, no images.

A sample is named by DataComp's uid. Its members, by the dataset card and the program that wrote them
(apple/ml-mobileclip-dr):

- ``url.txt``: the image's address;
- ``json``: ``uid`` and ``sha256``, of the bytes at that address;
- ``syn.json``: ``syn_text``, five captions of coca_ViT-L-14;
- ``paug.json``: ``param_aug``, the parameters of 30 (12M) or 10 (1B) augmentations;
- ``npz`` or ``pth.gz``: ``image_emb`` (augmentations, 1536) and ``text_emb`` (1 + captions, 1536);
- ``txt``, ``jpg``: the original caption and the image, where someone has added them. mlfoundations/DataComp-12M has
  these captions, in tars of the same names with the same uids.

No member with embeddings is opened here.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from pipeline.ingest.rows import Row, captions_of, decode_text, json_text
from pipeline.ingest.source_files import SourceFile, source_files
from pipeline.ingest.tar_samples import PEEKED_SAMPLES, TarSample, image_extension, open_tar, tar_samples
from pipeline.ingest.webdataset_source import MAX_TEXT_BYTES, image_ref_of, not_a_tar
from shards_spec.files import UserError
from shards_spec.messages import counted
from shards_spec.names import clean_name
from shards_spec.sample import parse_object
from shards_spec.tar_members import Member

log = logging.getLogger(__name__)
AUGMENTATIONS = "paug.json"
CAPTIONS = "syn.json"
ADDRESS = "url.txt"
FIELDS = "json"
EMBEDDINGS = ("npz", "pth.gz")
UID = "uid"  # this and the following are other columns of the rows
TAR = "tar"
SYNTHETIC = "syn_text"
HASH = "sha256"
NO_ADDRESS = "no url.txt"
NO_HASH = "no sha256 in the json member"
NO_EMBEDDINGS = "no npz or pth.gz member"
NO_AUGMENTATIONS = "no paug.json"
NO_FIELDS = "no json member"
BAD_FIELDS = "json member is not a JSON object"
TOO_LARGE = "is too large"
NOT_UTF8 = "is not UTF-8"
NO_ORIGINAL = "no caption in --original-captions"
EMPTY_FILE = "empty file"
BROKEN = ("truncated tar", "damaged tar")  # as `tar_samples` names them
BAD_CAPTIONS = "syn.json has no list of texts"


def is_datacompdr(path: str) -> bool:
    """Whether the first samples of a tar have parameters of augmentations."""
    with open_tar(path) as buffer:
        return any(AUGMENTATIONS in sample.members for sample in islice(tar_samples(buffer, path), PEEKED_SAMPLES))


def datacompdr_rows(files: list[SourceFile], original_captions: str | None = None) -> Iterator[Row]:
    """A row per sample of the tars; its other columns are ``uid``, ``tar``, ``sha256`` and ``syn_text``.

    ``original_captions`` are tars of the same names whose samples have a caption each. Broken tars, of either, are
    warned of, and so are tars none of whose samples has an original caption. Raises UserError when one of them is
    missing.
    """
    originals = _OriginalCaptions(original_captions) if original_captions is not None else None
    for file in files:
        if originals is not None:
            originals.open(file)
        with open_tar(file.path) as buffer:
            for sample in _samples_and_warning(buffer, file.path, "--source"):
                name = clean_name(f"{file.below}/{sample.key}" if sample.key else file.below)
                if sample.problem is None:
                    row = _row(buffer, sample, name, file)
                    yield row if originals is None or row.problem else originals.add_to(row)
                else:
                    yield Row(None, name, sample.problem, file.stamp)
    if originals is not None:
        originals.warn()


def _samples_and_warning(buffer: memoryview, path: str, option: str) -> Iterator[TarSample]:
    """The samples of a tar; one that is broken is warned of, and its last item has the problem of the file."""
    number = 0
    if not len(buffer):
        log.warning("%s %s is an empty file, not a tar; download it again", option, path)
        yield TarSample("", {}, EMPTY_FILE)
        return
    for sample in tar_samples(buffer, path):
        if sample.members or sample.problem is None:
            number += sample.problem is None
            yield sample
            continue
        kind_of_file = not_a_tar(path) if number == 0 else None
        if kind_of_file is not None:
            log.warning("%s %s is %s; download it again", option, path, kind_of_file)
        elif number == 0 and sample.problem in BROKEN:
            log.warning("%s %s is not a tar, or breaks off in its first sample; download it again", option, path)
        elif sample.problem in BROKEN:
            whole = counted(number, "whole sample", style=",")
            log.warning("%s %s breaks off after %s (%s); download it again", option, path, whole, sample.problem)
        yield sample._replace(problem=kind_of_file or sample.problem)


@dataclass
class _OriginalCaptions:
    """The tars of --original-captions, of which that with the name of the source's tar is read.

    Attributes:
        source: The folder or glob.
        unmatched: Names of tars of the source none of whose samples has a caption.
        tars: How many tars of the source have samples that could have one.
    """

    source: str
    unmatched: list[str] = field(default_factory=list)
    tars: int = 0
    _captions: dict[str, str] = field(default_factory=dict)  # uid to caption
    _name: str = ""
    _asked: int = 0
    _found: int = 0

    def __post_init__(self) -> None:
        try:
            self._files = {file.below: file for file in source_files(self.source, "webdataset")}
        except UserError as error:
            raise UserError(str(error).replace("--source", "--original-captions")) from error

    def open(self, file: SourceFile) -> None:
        """Read the captions for a tar of the source. Raises UserError when they are not there."""
        self._end_tar()
        tar = self._files.get(file.below)
        if tar is None:
            raise UserError(
                f"--original-captions {self.source}: no {file.below} is there, which --source has; download it, too"
            )
        self._name = file.below
        self._captions = {}
        with open_tar(tar.path) as buffer:
            for sample in _samples_and_warning(buffer, tar.path, "--original-captions"):
                text, problem = member_text(buffer, sample.members.get("txt"))
                if text is not None and problem is None:
                    self._captions[sample.key] = text.strip()

    def add_to(self, row: Row) -> Row:
        """The row with its original caption, or a note that there is none."""
        caption = self._captions.get(row.extra[UID])
        self._asked += 1
        if caption is None:
            return replace(row, note=NO_ORIGINAL)
        self._found += 1
        return replace(row, caption=caption)

    def _end_tar(self) -> None:
        """Count the tar that was read."""
        if self._asked:
            self.tars += 1
            if not self._found:
                self.unmatched.append(self._name)
        self._asked = self._found = 0

    def warn(self) -> None:
        """Say, after the last tar, of how many not one sample has a caption."""
        self._end_tar()
        if not self.unmatched:
            return
        how_many = f"{len(self.unmatched):,} of {counted(self.tars, 'tar', style=',')}"
        log.warning(
            "--original-captions %s: not one caption for the samples of %s, such as %s: its uids are not those of "
            "--source's tar of that name, or it has no txt members; is this the folder that belongs to --source?",
            self.source,
            how_many if self.tars > len(self.unmatched) else f"any tar ({how_many})",
            self.unmatched[0],
        )


def _row(buffer: memoryview, sample: TarSample, name: str, file: SourceFile) -> Row:
    members = sample.members
    problems = list[str | None]()

    def read(extension: str) -> str | None:
        text, problem = member_text(buffer, members.get(extension))
        problems.append(problem and f"{extension} {problem}")
        return text

    fields, fields_problem = _json_object(read(FIELDS), BAD_FIELDS)
    captions, captions_problem = _json_object(read(CAPTIONS), BAD_CAPTIONS)
    synthetic = [caption.text for caption in captions_of(captions.get(SYNTHETIC)) if caption.text is not None]
    address = (read(ADDRESS) or "").strip()
    image = image_extension(members)
    digest = json_text(fields.get(HASH))[0]
    caption = read("txt")
    problems += [
        fields_problem if FIELDS in members else NO_FIELDS,
        captions_problem or (None if synthetic else BAD_CAPTIONS),
        None if address or image else NO_ADDRESS,
        None if digest or image else NO_HASH,
        None if AUGMENTATIONS in members else NO_AUGMENTATIONS,
        None if any(extension in members for extension in EMBEDDINGS) else NO_EMBEDDINGS,
    ]
    return Row(
        caption=None if caption is None else caption.strip(),
        url=address or name,
        problem=next(filter(None, problems), None),
        stamp=file.stamp if image else "",  # a link is the same row in another copy of the tar
        image_ref=image_ref_of(file.path, members[image]) if image else None,
        extra={UID: sample.key, TAR: file.below, HASH: digest, SYNTHETIC: synthetic},
    )


def member_text(buffer: memoryview, member: Member | None) -> tuple[str | None, str | None]:
    """(text, problem) of a member that holds text; no text where there is no such member."""
    if member is None:
        return None, None
    if member.size > MAX_TEXT_BYTES:
        return None, TOO_LARGE
    text, broken = decode_text(member.read(buffer))
    return text, NOT_UTF8 if broken else None


def _json_object(text: str | None, problem: str) -> tuple[dict[str, Any], str | None]:
    """(the object, problem) of a member with JSON; empty where there is no such member."""
    if text is None:
        return {}, problem
    try:
        return parse_object(text), None
    except ValueError:
        return {}, problem
