"""Bytes in, bytes out: decode any image, turn it upright, make it RGB, shrink its shorter side, write a JPEG.

No files and no network here, so it runs in any process. An upright RGB JPEG that is small enough keeps its bytes. Which
formats are decoded, and how, is decided in `shards_spec.images`.
"""

import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import ExifTags, Image, ImageFile

from pipeline.core.filters import image_problem
from pipeline.core.perceptual_hash import perceptual_hash
from shards_spec.files import sha256_bytes
from shards_spec.images import MAX_PIXELS, TRANSPOSED, load_rgb, open_image, read_exif, upright_transpose
from shards_spec.pixels import BadImage, from_rgbx, rgbx

JPEG_QUALITY = 95
RESIZE = "resize: "  # reasons that begin so are counted as img2dataset's failed_to_resize
CATMULL_ROM = ResizeAlg.convolution(FilterType.catmull_rom)
REDUCING_GAP = 4  # times as large as it shall be a large image is first reduced, by means of whole pixels
MAX_EXIF_CHARS = 1000  # of one value; cameras store whole previews in some tags


@dataclass(frozen=True)
class ImageRules:
    """Limits and size of the images.

    ``image_size`` and ``min_size`` are pixels of the shorter side; ``max_aspect_ratio`` 0 allows any.
    """

    image_size: int = 256
    max_pixels: int = MAX_PIXELS
    min_size: int = 0
    max_aspect_ratio: float = 0.0


@dataclass(frozen=True)
class EncodedImage:
    """An image as a raw shard holds it: ``data`` is a JPEG of ``width`` x ``height`` pixels.

    ``original_width`` and ``original_height`` are the upright sizes before shrinking, ``exif`` is JSON (tag name to
    text), ``sha256`` is of the bytes that came in, ``phash`` is `perceptual_hash` of the pixels.
    """

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str
    sha256: str
    phash: str | None


Outcome = EncodedImage | str  # of a row: the image, or the named reason why there is none


def to_outcome(data: bytes, rules: ImageRules) -> Outcome:
    """`convert`, with a reason in place of an error."""
    try:
        return convert(data, rules)
    except BadImage as error:
        return f"{RESIZE}{error}"


def convert(data: bytes, rules: ImageRules) -> EncodedImage:
    """The image with its shorter side at most ``rules.image_size`` pixels. Raises BadImage."""
    image = open_image(data, rules.max_pixels)
    if problem := image_problem(*image.size, rules.min_size, rules.max_aspect_ratio or math.inf):
        raise BadImage(problem)
    original_size = image.size
    pixels, extent = _decode(image, data, shrunk_size(original_size, rules.image_size))
    if extent is None:  # decoding may change it: Pillow turns a TIFF upright, and takes the largest image of an icon
        original_size = extent = pixels.size
    size = shrunk_size(original_size, rules.image_size)
    is_rgb_jpeg = image.format == "JPEG" and image.mode == "RGB"
    exif = read_exif(image)  # after the pixels: for some formats Pillow decodes here too, and hides damage
    turn = upright_transpose(exif)
    keeps_bytes = is_rgb_jpeg and turn is None and size == original_size
    if pixels.size != size:
        pixels = shrink(pixels, size, extent)
    width, height = original_size
    if turn is not None:
        pixels = pixels.transpose(turn)
        if turn in TRANSPOSED:
            width, height = height, width
    return EncodedImage(
        data=data if keeps_bytes else _encode(pixels),
        width=pixels.width,
        height=pixels.height,
        original_width=width,
        original_height=height,
        exif=json.dumps(_exif_texts(exif)) if exif else "{}",
        sha256=sha256_bytes(data),
        phash=perceptual_hash(pixels),
    )


def _decode(
    image: ImageFile.ImageFile, data: bytes, size: tuple[int, int]
) -> tuple[Image.Image, tuple[float, float] | None]:
    """All pixels as RGB; of a large JPEG half, quarter or eighth, never below ``size``.

    Of a JPEG also the width and height of what they show: half of 427 rows are 213.5, which 214 rows of pixels hold.
    With `shrink` after it the pixels are 40 dB and more from a full decode and Lanczos
    (`tests/pipeline/ingest/test_images.py` measures).
    """
    drafted = image.draft(None, size)
    pixels = load_rgb(image, data)
    if drafted is None:
        return pixels, None
    _, (_, _, width, height) = drafted
    return pixels, (width, height)


def shrink(image: Image.Image, size: tuple[int, int], extent: tuple[float, float]) -> Image.Image:
    """An RGB image at a smaller size, by Catmull and Rom's cubic filter, antialiased.

    ``extent`` is the width and height of what the pixels show, from the upper left corner: at most ``image.size``.
    Pillow's BICUBIC (of photos to two levels of 255, in the mean 0.2), and the same on every processor.
    """
    width, height = extent
    factor = max(1, int(min(width / size[0], height / size[1]) / REDUCING_GAP))
    if factor > 1:
        image = image.reduce(factor)  # its last column and row may be of fewer pixels
    options = ResizeOptions(CATMULL_ROM, use_alpha=False, crop_box=CropBox(0, 0, width / factor, height / factor))
    source = ImageData(image.width, image.height, PixelType.U8x4, rgbx(image).tobytes())
    target = ImageData(*size, PixelType.U8x4)
    Resizer().resize(source, target, options)
    return from_rgbx(np.frombuffer(target.get_buffer(), np.uint8).reshape(size[1], size[0], 4))


def shrunk_size(size: tuple[int, int], image_size: int) -> tuple[int, int]:
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
        except Exception:  # damaged directories raise anything
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
