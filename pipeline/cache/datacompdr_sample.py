"""What DataCompDR stores of a sample: its teachers' vectors, and the augmentations that they are of.

Nothing is unpickled but tensors: ``npz`` is read without pickles, ``pth.gz`` by torch with ``weights_only``, both after
their sizes are known, since a kilobyte can unpack to gigabytes. The members are described in
`pipeline.ingest.datacompdr_source`, whose rows named the tar and the uid of each sample.

The augmentations are torchvision's RandomResizedCrop and RandAugment of magnitude 9 at 224 pixels
(apple/ml-mobileclip, ``training/configs/datacompdr12m.json`` and ``training/dr/transforms.py``): ``[[top, left, height,
width], [[operation, magnitude], [operation, magnitude]]]`` each, with the flip between them where there is one.
"""

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.ingest.datacompdr_source import AUGMENTATIONS, CAPTIONS, EMBEDDINGS, SYNTHETIC, member_text
from pipeline.ingest.source_files import SourceFile
from pipeline.ingest.tar_samples import open_tar, tar_samples
from shards_spec.augment import BINS, OP_SETS
from shards_spec.files import DataError
from shards_spec.sample import parse_object
from shards_spec.tar_members import Member
from shards_spec.views import MOST_RECORDED_OPS, RecordedView

SIDE = 224  # pixels of a view, at which shifts are recorded
MAX_BYTES = 1 << 24  # of a member with vectors, packed and unpacked; Apple's have 0.2 MB
MAX_PICKLE = 1 << 16  # of it: names and shapes
RESIZED_SIDE = 512  # DataComp's downloader reduces the longer side to it (img2dataset's keep_ratio_largest)
OPERATIONS = OP_SETS["torchvision"].operations  # Apple's list has them in the same order
LAST = BINS - 1
# magnitude of the highest bin; those of operations without one are 0, of Posterize and Solarize see `_level`
HIGHEST = {
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150 / 331 * SIDE,
    "TranslateY": 150 / 331 * SIDE,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}
UNSAFE = "pickle with more than tensors"
TOO_LARGE = "embeddings too large"
UNREADABLE = "embeddings not readable"
BAD_VECTORS = "embeddings are no matrix of finite numbers"
BAD_PARAMETERS = "paug.json is no list of augmentations"
OUTSIDE = "augmentations outside of the image"
OTHER_NUMBER = "another number of vectors than of augmentations and captions"


@dataclass(frozen=True)
class StoredAugmentation:
    """One augmentation: ``box`` is top, left, height, width in pixels; ``ops`` as in `views.View`."""

    box: tuple[int, int, int, int]
    flip: bool
    ops: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StoredSample:
    """A sample's vectors, all teachers' side by side.

    Attributes:
        images: (augmentations, D) float32.
        texts: (original captions + synthetic ones, D) float32.
        augmentations: As many as ``images``.
        synthetic: The synthetic captions; ``texts`` has the last ones.
    """

    images: np.ndarray
    texts: np.ndarray
    augmentations: list[StoredAugmentation]
    synthetic: list[str]


class SourceTar:
    """A tar of the source with its samples by uid, read in place. Close it."""

    def __init__(self, file: SourceFile) -> None:
        self._stack = ExitStack()
        self._buffer = self._stack.enter_context(open_tar(file.path))
        self._members = {sample.key: sample.members for sample in tar_samples(self._buffer, file.path)}

    @property
    def uids(self) -> list[str]:
        """The uids of its samples, in their order."""
        return list(self._members)

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def read(self, uid: str) -> StoredSample:
        """The sample of a uid. Raises DataError with the reason when it is not there, or cannot be used."""
        members = self._members.get(uid)
        if not members:  # a sample that the tar breaks off in has none
            raise DataError("not in its tar")
        return _stored_sample(self._buffer, members)


def _stored_sample(buffer: memoryview, members: dict[str, Member]) -> StoredSample:
    vectors = _read_vectors(buffer, members)
    synthetic = _json_member(buffer, members, CAPTIONS).get(SYNTHETIC)
    if not isinstance(synthetic, list):
        raise DataError("syn.json has no list of texts")
    images = _matrix(vectors, "image_emb")
    texts = _matrix(vectors, "text_emb")
    if "syn_text_emb" in vectors:  # as the program writes them today; DataCompDR has all texts in one
        texts = np.concatenate([texts, _matrix(vectors, "syn_text_emb")])
    augmentations = parse_augmentations(_json_member(buffer, members, AUGMENTATIONS).get("param_aug"))
    if len(images) != len(augmentations) or len(texts) <= len(synthetic):
        raise DataError(OTHER_NUMBER)
    return StoredSample(images, texts, augmentations, synthetic)


def _json_member(buffer: memoryview, members: dict[str, Member], name: str) -> dict[str, Any]:
    text, problem = member_text(buffer, members.get(name))
    if text is None or problem is not None:
        raise DataError(f"{name} {problem or 'is not there'}")
    try:
        return parse_object(text)
    except ValueError as error:
        raise DataError(f"{name} is not a JSON object") from error


# vectors


def _read_vectors(buffer: memoryview, members: dict[str, Member]) -> dict[str, np.ndarray]:
    name = next((name for name in EMBEDDINGS if name in members), None)
    if name is None:
        raise DataError("no npz or pth.gz member")
    member = members[name]
    if member.size > MAX_BYTES:
        raise DataError(TOO_LARGE)
    data = member.read(buffer)
    return read_npz(data) if name == "npz" else read_pth_gz(data)


def _matrix(vectors: dict[str, np.ndarray], name: str) -> np.ndarray:
    matrix = vectors.get(name)
    if matrix is None or matrix.ndim != 2 or not matrix.size or matrix.dtype.kind != "f":
        raise DataError(BAD_VECTORS)
    if not np.isfinite(matrix).all():
        raise DataError(BAD_VECTORS)
    return matrix.astype(np.float32)


def read_npz(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of numbers in numpy's ``npz``. Raises DataError with the reason; no pickle is loaded."""
    with _damage_named(), _open_archive(data) as archive:
        return {info.filename.removesuffix(".npy"): _read_npy(archive.read(info)) for info in archive.infolist()}


def _read_npy(data: bytes) -> np.ndarray:
    """An array whose bytes are all there: the header could claim any size, and objects are pickles."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise DataError(UNSAFE)
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise DataError(UNREADABLE)
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if is_fortran else "C")


def read_pth_gz(data: bytes) -> dict[str, np.ndarray]:
    """The tensors in a gzipped archive of torch's, as float32. Raises DataError with the reason."""
    import torch

    with _damage_named():
        unpacker = zlib.decompressobj(wbits=31)  # gzip
        unpacked = unpacker.decompress(data, MAX_BYTES)
        if unpacker.unconsumed_tail:
            raise DataError(TOO_LARGE)
        if not unpacker.eof:
            raise DataError(UNREADABLE)
        with _open_archive(unpacked) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
            if any(info.file_size > MAX_PICKLE for info in pickles):
                raise DataError(UNSAFE)
        try:
            content = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
        except Exception as error:  # damage makes it raise nearly anything
            is_unsafe = re.search("unsupported|TorchScript", str(error), re.IGNORECASE)
            raise DataError(UNSAFE if is_unsafe else UNREADABLE) from error
        if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
            raise DataError(BAD_VECTORS)
        if any(tensor.numel() * 4 > MAX_BYTES for tensor in content.values()):  # a stride of 0 repeats one number
            raise DataError(TOO_LARGE)
        return {str(name): tensor.to_dense().to(torch.float32).numpy() for name, tensor in content.items()}


@contextmanager
def _open_archive(data: bytes) -> Iterator[zipfile.ZipFile]:
    """A zip file of bounded size. Raises DataError."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
            raise DataError(TOO_LARGE)
        yield archive


@contextmanager
def _damage_named() -> Iterator[None]:
    """Around readers of zip, gzip, npy and tensors, which raise nearly anything over damage."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(UNREADABLE) from error


# augmentations


def parse_augmentations(stored: Any) -> list[StoredAugmentation]:
    """The augmentations in ``param_aug``, a list or its JSON. Raises DataError with the reason."""
    try:
        parameters = json.loads(stored) if isinstance(stored, str) else stored
        augmentations = [_augmentation(*one) for one in parameters]
    except (ValueError, TypeError, IndexError, RecursionError, OverflowError) as error:
        raise DataError(BAD_PARAMETERS) from error
    if not augmentations:
        raise DataError(BAD_PARAMETERS)
    return augmentations


def _augmentation(box: list[int], *others: Any) -> StoredAugmentation:
    """Of a crop, perhaps a flip, and RandAugment's operations, null where it was skipped."""
    flip, operations = others if len(others) == 2 else (False, *others)
    top, left, height, width = box
    is_whole = all(type(number) is int for number in box) and min(top, left) >= 0 < min(height, width)
    if not is_whole or type(flip) is not bool or len(operations or ()) > MOST_RECORDED_OPS:
        raise ValueError("no crop, flip and operations")
    ops = tuple((index, _level(index, float(magnitude))) for index, magnitude in operations or ())
    return StoredAugmentation((top, left, height, width), flip, ops)


def _level(operation: int, magnitude: float) -> int:
    """The signed bin of a recorded magnitude. Raises ValueError for one that is no bin's, IndexError."""
    if type(operation) is not int or operation < 0:
        raise ValueError("no operation")
    name = OPERATIONS[operation][0]
    if name == "Posterize":
        bits = {8 - round(4 * level / LAST): level for level in reversed(range(BINS))}
        return bits[int(magnitude)] if magnitude in bits else _no_bin(name, magnitude)
    if name == "Solarize":
        level = round((255 - magnitude) / 255 * LAST)
        return level if 0 <= level <= LAST and abs(255 - 8.5 * level - magnitude) < 0.01 else _no_bin(name, magnitude)
    if name not in HIGHEST:
        return 0
    level = round(magnitude / HIGHEST[name] * LAST)
    fits = abs(level) <= LAST and abs(level * HIGHEST[name] / LAST - magnitude) < 1e-4 * HIGHEST[name]
    return level if fits else _no_bin(name, magnitude)


def _no_bin(name: str, magnitude: float) -> int:
    raise ValueError(f"{name} has no magnitude {magnitude}")


def recorded_views(
    augmentations: list[StoredAugmentation], upright_size: tuple[int, int], orientation: int
) -> list[RecordedView]:
    """The augmentations of an image whose file has ``upright_size`` (width, height) and an EXIF ``orientation``.

    Apple's code ignores the orientation. Boxes count in the file's own pixels, or in those of the copy that DataComp's
    downloader makes, whose longer side is at most 512: in the latter where all boxes lie in it, which those of a larger
    image would do by a chance of less than 0.25 to the power of their number. Raises DataError.
    """
    frame = (upright_size[1], upright_size[0]) if orientation >= 5 else upright_size
    longer = max(frame)
    if longer > RESIZED_SIDE:
        reduced = (round(frame[0] * RESIZED_SIDE / longer), round(frame[1] * RESIZED_SIDE / longer))
        if _fit(augmentations, reduced):
            frame = reduced
    if not _fit(augmentations, frame):
        raise DataError(OUTSIDE)
    views = []
    for augmentation in augmentations:
        top, left, height, width = augmentation.box
        views.append(RecordedView(frame, (left, top, width, height), orientation, augmentation.flip, augmentation.ops))
    return views


def _fit(augmentations: list[StoredAugmentation], frame: tuple[int, int]) -> bool:
    for augmentation in augmentations:
        top, left, height, width = augmentation.box
        if left + width > frame[0] or top + height > frame[1]:
            return False
    return True
