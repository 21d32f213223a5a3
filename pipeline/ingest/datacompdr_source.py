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

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from pipeline.ingest.rows import Row, captions_of, decode_text, json_text
from pipeline.ingest.source_files import SourceFile, source_files
from pipeline.ingest.tar_samples import PEEKED_SAMPLES, TarSample, image_extension, open_tar, tar_samples
from pipeline.ingest.webdataset_source import MAX_TEXT_BYTES, image_ref_of, not_a_tar
from shards_spec.files import UserError
from shards_spec.names import clean_name
from shards_spec.sample import parse_object
from shards_spec.tar_members import Member

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
BAD_FIELDS = "json member is not a JSON object"
TOO_LARGE = "is too large"
NOT_UTF8 = "is not UTF-8"
NO_ORIGINAL = "no caption in --original-captions"
BAD_CAPTIONS = "syn.json has no list of texts"


def is_datacompdr(path: str) -> bool:
    """Whether the first samples of a tar have parameters of augmentations."""
    with open_tar(path) as buffer:
        return any(AUGMENTATIONS in sample.members for sample in islice(tar_samples(buffer, path), PEEKED_SAMPLES))


def datacompdr_rows(files: list[SourceFile], original_captions: str | None = None) -> Iterator[Row]:
    """A row per sample of the tars; its other columns are ``uid``, ``tar``, ``sha256`` and ``syn_text``.

    ``original_captions`` are tars of the same names whose samples have a caption each. Raises UserError when one of
    them is missing.
    """
    captioned = _captioned_tars(original_captions) if original_captions is not None else None
    for file in files:
        captions = _original_captions(file, captioned, original_captions or "") if captioned is not None else None
        with open_tar(file.path) as buffer:
            for number, sample in enumerate(tar_samples(buffer, file.path)):
                name = clean_name(f"{file.below}/{sample.key}" if sample.key else file.below)
                if sample.problem is None:
                    row = _row(buffer, sample, name, file)
                    yield row if captions is None or row.problem else _with_caption(row, captions)
                else:
                    kind_of_file = not_a_tar(file.path) if number == 0 else None
                    yield Row(None, name, kind_of_file or sample.problem, file.stamp)


def _captioned_tars(source: str) -> dict[str, SourceFile]:
    try:
        return {file.below: file for file in source_files(source, "webdataset")}
    except UserError as error:
        raise UserError(str(error).replace("--source", "--original-captions")) from error


def _original_captions(file: SourceFile, captioned: dict[str, SourceFile], source: str) -> dict[str, str]:
    """Uid to caption of the tar with the name of ``file``."""
    tar = captioned.get(file.below)
    if tar is None:
        raise UserError(f"--original-captions {source}: no {file.below} is there, which --source has; download it, too")
    captions = dict[str, str]()
    with open_tar(tar.path) as buffer:
        for sample in tar_samples(buffer, tar.path):
            text, problem = member_text(buffer, sample.members.get("txt"))
            if text is not None and problem is None:
                captions[sample.key] = text.strip()
    return captions


def _with_caption(row: Row, captions: dict[str, str]) -> Row:
    """The row with its original caption, or a note that there is none."""
    caption = captions.get(row.extra[UID])
    return replace(row, note=NO_ORIGINAL) if caption is None else replace(row, caption=caption)


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
        fields_problem,
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
