"""Bytes in, bytes out: decode any picture, turn it upright, make it RGB, shrink its shorter side, write a JPEG.

No files and no network here, so it runs in any process. A picture that is a small upright RGB JPEG already keeps
its bytes.
"""

import io
import json
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.likeness import perceptual_hash, picture_problem
from shards_spec.files import sha256_bytes

JPEG_QUALITY = 95
RESIZE = "resize: "  # reasons that begin so are counted as img2dataset's failed_to_resize
MAX_SIDE = 65_500  # libjpeg's limit
MAX_EXIF_CHARS = 1000  # of one value; makers hide whole previews in there
# pixels only: EPS and the like would start other programs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "MPO", "BMP", "TIFF", "JPEG2000", "PPM", "ICO")
# what Pillow's decoders raise on hostile bytes
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
    ArithmeticError, RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
TURNS = {  # EXIF orientation to what makes the picture upright; from 5 on the sides change places
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """The bytes are no picture we can use; the message is a short, stable reason fit for counting."""


@dataclass(frozen=True)
class PictureRules:
    """``image_size`` (of the shorter side) and ``min_size`` are pixels; ``max_aspect_ratio`` 0 allows any."""

    image_size: int = 256
    max_pixels: int = 100_000_000  # 300 MB as RGB; decompression bombs are larger
    min_size: int = 0
    max_aspect_ratio: float = 0.0


@dataclass(frozen=True)
class Picture:
    """``data`` is a JPEG of ``width`` x ``height`` pixels.

    ``original_*`` are the upright sizes before shrinking, ``exif`` is JSON (tag name to text), ``sha256`` is of the
    bytes that came in, ``phash`` is `likeness.perceptual_hash` of the pixels.
    """

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str
    sha256: str
    phash: str | None


Outcome = Picture | str  # of a row: the picture, or the named reason why there is none


def to_outcome(data: bytes, rules: PictureRules) -> Outcome:
    """`convert`, with a reason in place of an error."""
    try:
        return convert(data, rules)
    except BadImage as error:
        return f"{RESIZE}{error}"


def convert(data: bytes, rules: PictureRules) -> Picture:
    """The picture with its shorter side at most ``rules.image_size`` pixels. Raises BadImage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bombs (we count pixels) and of damaged EXIF
        image = _open(data, rules.max_pixels)
        if problem := picture_problem(*image.size, rules.min_size, rules.max_aspect_ratio or math.inf):
            raise BadImage(problem)
        width, height, jpeg = image.width, image.height, image.format == "JPEG" and image.mode == "RGB"
        size = _shrunk(image.size, rules.image_size)
        pixels = _decode(image, size)
        exif = _read_exif(image)  # after the pixels: for some formats Pillow decodes here too, and hides what breaks
        orientation = exif.get(ExifTags.Base.Orientation, 1) if exif else 1
        exif_json = json.dumps(_exif_texts(exif)) if exif else "{}"
    keep = jpeg and orientation not in TURNS and size == (width, height)
    if pixels.size != size:
        pixels = pixels.resize(size, Image.Resampling.HAMMING)
    if orientation in TURNS:
        pixels = pixels.transpose(TURNS[orientation])
        width, height = (height, width) if orientation >= 5 else (width, height)
    encoded = data if keep else _encode(pixels)
    phash = perceptual_hash(pixels)
    return Picture(encoded, *pixels.size, width, height, exif_json, sha256_bytes(data), phash)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except DECODER_ERRORS as error:
        raise BadImage("broken image") from error
    if image.width * image.height > max_pixels or max(image.size) > MAX_SIDE:
        raise BadImage("too many pixels")
    if min(image.size) < 1:
        raise BadImage("broken image")
    return image


def _decode(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """All pixels as RGB; a large JPEG is decoded at half, quarter or eighth size, never below ``size``.

    With Pillow's HAMMING filter after it the pixels are 40 dB and more from a full decode and Lanczos
    (`tests/test_pipeline_images.py` measures), for half the time of a full decode and a bicubic filter.
    """
    try:
        image.draft(None, size)
        image.load()
        return _to_rgb(image)
    except DECODER_ERRORS as error:
        raise BadImage("truncated image" if "truncated" in str(error) else "broken image") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: keep the upper eight (convert() would clip at 255)
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _shrunk(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """``size`` with its shorter side at ``image_size``, when it is larger."""
    shorter = min(size)
    if shorter <= image_size:
        return size
    width, height = (max(1, round(side * image_size / shorter)) for side in size)
    return width, height


def _encode(pixels: Image.Image) -> bytes:
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _read_exif(image: Image.Image) -> Image.Exif | None:
    try:
        return image.getexif()
    except DECODER_ERRORS:
        return None  # damaged EXIF does not spoil the pixels


def _exif_texts(exif: Image.Exif | None) -> dict[str, str]:
    """Tags named as exifread names them (img2dataset's EXIF reader): ``Image Make``, ``EXIF ISOSpeedRatings``."""
    texts: dict[str, str] = {}
    if not exif:
        return texts
    parts: tuple[tuple[str, int | None, dict[int, str]], ...] = (
        ("Image", None, ExifTags.TAGS),
        ("EXIF", ExifTags.IFD.Exif, ExifTags.TAGS),
        ("GPS", ExifTags.IFD.GPSInfo, ExifTags.GPSTAGS),
    )
    for part, directory, tag_names in parts:
        try:
            tags: dict[int, Any] = dict(exif) if directory is None else exif.get_ifd(directory)
            for tag, value in tags.items():
                text = _exif_text(value)
                if tag in tag_names and text is not None:
                    texts[f"{part} {tag_names[tag]}"] = text
        except DECODER_ERRORS:
            continue
    return texts


def _exif_text(value: Any) -> str | None:
    """The value as text; None for binary or very long values."""
    if isinstance(value, bytes):
        value = value.rstrip(b"\0")
        if not value.isascii():
            return None
        value = value.decode()
    text = str(value).strip()
    return text if len(text) <= MAX_EXIF_CHARS and (text.isprintable() or text == "") else None
