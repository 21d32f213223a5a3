"""What is left of a damaged raw shard: samples that can still be read, each proven by a hash or only by its looks.

A tar has no hashes of its members. An image is proven by the copy in its final shard (whose bytes are untouched since
`ingest`), by the id that a teacher cache keeps of it, or by the sha256 in its row, where `ingest` kept the bytes.
Any other one is taken when it decodes and has the size and nearly the perceptual hash of its row.
"""

import contextlib
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.core.near_duplicates import MAX_NEAR_BITS, parse_hashes
from pipeline.core.perceptual_hash import perceptual_hash
from pipeline.ingest.images import EncodedImage
from pipeline.pack.selection import RESERVED_FIELD
from pipeline.repair.recorded import file_sha256, sound_record
from shards_spec.content_id import content_id
from shards_spec.files import DataError, UserError, join, read_bytes, sha256_bytes
from shards_spec.images import decode_rgb
from shards_spec.layout import RAW, SHARDS, shard_name, tar_path
from shards_spec.manifest import finished_shards
from shards_spec.names import is_image
from shards_spec.sample import parse_object, split_name
from shards_spec.tar import read_shard
from shards_spec.tar_members import BLOCK, byte_sum
from shards_spec.teacher_shard import TeacherShard

Members = dict[str, bytes]  # extension to bytes
IMAGE_FIELDS = tuple(field.name for field in fields(EncodedImage) if field.name != "data")


def salvage_tar(path: str) -> dict[str, Members]:
    """Key to members of all that can be read of a damaged tar, in file order; headers are looked for block by block."""
    try:
        data = memoryview(read_bytes(path))
    except OSError:
        return {}
    samples = dict[str, Members]()
    for name, content in _members(data):
        key, extension = split_name(posixpath.normpath(name))
        samples.setdefault(key, {}).setdefault(extension, content)
    return samples


def _members(data: memoryview) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each member whose header is whole and whose bytes are all there."""
    position = 0
    while position + BLOCK <= len(data):
        block = bytes(data[position : position + BLOCK])
        position += BLOCK
        header = _header(block)
        if header is None or position + header.size > len(data):
            continue
        if header.isreg() and "." in header.name:
            yield header.name, bytes(data[position : position + header.size])
        position += header.size + -header.size % BLOCK


def _header(block: bytes) -> tarfile.TarInfo | None:
    """A member's header; None for any other block. The sum is compared first, as most blocks are an image's."""
    stored = block[148:156].strip(b" \0")
    with contextlib.suppress(tarfile.HeaderError, ValueError):
        if stored and int(stored, 8) == byte_sum(block) - byte_sum(block[148:156]) + 8 * ord(" "):
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    return None


def row_of_json(members: Members, key: str) -> dict[str, Any] | None:
    """The row that the json member of a sample holds; None when it does not parse or is another sample's."""
    try:
        row = parse_object(members.get("json", b""))
    except ValueError:
        return None
    return row if row.get("key") == key and row.get("status") == "success" else None


def image_of(members: Members) -> bytes | None:
    """The image member."""
    return next((data for extension, data in members.items() if is_image(f".{extension}")), None)


@dataclass
class ImageWitnesses:
    """What other stages know of the images of a raw shard.

    ``copies`` are the images that whole final shards have, by key, ``rows`` what their json members say of them (the
    caption cleaned), ``ids`` the content ids in whole teacher caches.
    """

    copies: dict[str, bytes] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    ids: dict[str, set[int]] = field(default_factory=dict)

    def prove(self, key: str, image: bytes, row: dict[str, Any] | None) -> bool:
        """Whether the bytes of an image are those of `ingest`."""
        if key in self.copies:
            return self.copies[key] == image
        if key in self.ids:
            return content_id(image) in self.ids[key]
        return row is not None and row.get("sha256") == sha256_bytes(image)


def find_witnesses(root: str, shard: int, *, wanted: set[str], hashes: set[str], keys: list[str]) -> ImageWitnesses:
    """Look for a raw shard's images in the final shards and caches whose files are as they were written.

    ``wanted`` are the keys of samples besides those that begin with the shard's number, ``hashes`` those that the tar
    had, ``keys`` the stages that are there. Read are the final shards that were made of this tar, and their caches.
    """
    witnesses = ImageWitnesses()
    for number in finished_shards(join(root, SHARDS)):
        done = sound_record(root, "pack", number)
        if number != shard if done is None else done.inputs.get(tar_path(RAW, shard)) not in hashes:
            continue
        tar = tar_path(SHARDS, number)
        if done is not None and file_sha256(join(root, tar)) == done.outputs.get(tar):
            for sample in read_shard(join(root, tar)):
                if sample.key in wanted or sample.key.startswith(shard_name(shard)):
                    witnesses.copies[sample.key] = sample.image
                    row = {name: value for name, value in sample.meta.items() if not RESERVED_FIELD.fullmatch(name)}
                    witnesses.rows[sample.key] = row
        for key in keys:
            if key.startswith("cache/"):
                _add_ids(witnesses, root, key, number)
    return witnesses


def _add_ids(witnesses: ImageWitnesses, root: str, key: str, number: int) -> None:
    """The ids of images in one shard of a teacher cache, if its files are whole."""
    done = sound_record(root, key, number)
    if done is None or any(file_sha256(join(root, path)) != digest for path, digest in done.outputs.items()):
        return
    with contextlib.suppress(DataError, UserError, OSError):
        file = TeacherShard(root, key.removeprefix("cache/"), number).files[-1]
        ids = next((file.ids(column) for column in file.names if not column.startswith("text_")), None)
        if ids is not None:
            for sample_key, content in zip(file.keys, ids, strict=True):
                witnesses.ids.setdefault(sample_key, set()).add(int(content))


def looks_right(image: bytes, row: dict[str, Any]) -> bool:
    """Whether an image decodes and has the size and perceptual hash of its row, where the row has them."""
    try:
        pixels = decode_rgb(image)
    except DataError:
        return False
    sizes = [(row.get("width"), pixels.width), (row.get("height"), pixels.height)]
    if any(recorded is not None and recorded != own for recorded, own in sizes):
        return False
    return _look_alike(row.get("phash"), perceptual_hash(pixels))


def _look_alike(recorded: Any, own: str | None) -> bool:
    """Whether two perceptual hashes are near: that of a row was taken before the image was encoded; None is no hash."""
    if own is None or not isinstance(recorded, str):
        return True
    try:
        one, other = parse_hashes([recorded, own])
    except ValueError:
        return True
    return (int(one) ^ int(other)).bit_count() <= MAX_NEAR_BITS


def encoded_image(image: bytes, row: dict[str, Any]) -> EncodedImage | None:
    """The image with what its row says of it; None when the row lacks one of the fields."""
    if not set(IMAGE_FIELDS) <= row.keys() or not isinstance(row["width"], int):
        return None
    return EncodedImage(image, **{name: row[name] for name in IMAGE_FIELDS})


def raw_samples(path: str) -> dict[str, Members]:
    """Key to members of a whole tar, in file order; of what can be read of it when it is not one."""
    try:
        return {sample.key: sample.members for sample in read_shard(path)}
    except (DataError, UserError, OSError):
        return salvage_tar(path)
