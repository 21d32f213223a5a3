"""The one decoder of foreign bytes: which formats, how large, at what cost, with which reasons, to which pixels.

Every stage decodes here: `ingest`, `dedup`, `caption`, `cache`, training, class folders, evaluation, `report`. Pixel
formats only: Pillow's readers of EPS, WMF and the like, which start other programs, are never used.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable

from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from shards_spec.decode_cost import jpeg2000_blocks, jpeg_scans
from shards_spec.files import DataError
from shards_spec.jpeg import decode_jpeg
from shards_spec.pixels import BadImage, to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "MPO", "BMP", "TIFF", "JPEG2000", "PPM", "ICO")
MAX_PIXELS = 100_000_000  # 400 MB as Pillow keeps RGB; decompression bombs are larger
PYTHON_DECODERS = ("ppm", "ppm_plain", "bmp_rle")  # Pillow's decoders in Python: a microsecond a sample
MAX_PYTHON_PIXELS = 10_000_000
MAX_SIDE = 65_500  # libjpeg's limit
MAX_ASPECT = 100  # of what `crop_extreme_aspect` leaves
# a progressive JPEG is decoded once per scan, however few bytes a scan has: two seconds at the most
MAX_SCANS = 20
MAX_SCAN_PIXELS = 2_000_000_000
MAX_BLOCKS = 400_000  # of a JPEG 2000, 1.6 GB; in blocks of 64 x 64, 100 million RGB pixels have a quarter of it
UPRIGHT = {  # EXIF orientation to what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRANSPOSED = frozenset(UPRIGHT[orientation] for orientation in (5, 6, 7, 8))  # width and height are exchanged
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"tRNS", b"eXIf")  # of the ancillary chunks
ORIENTATION_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # texts that Pillow finds the orientation in

# Pillow warns of bombs (pixels are counted here) and of damaged EXIF. The filter is set once for the process, because
# catch_warnings() is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_rgb(data: bytes, *, as_benchmark: bool = False, shorter_side: int | None = None) -> Image.Image:
    """The upright image as RGB: transparency on white, every depth scaled to eight bits (`pixels`).

    ``shorter_side`` allows the half, quarter or eighth of a JPEG, whose shorter side is that many pixels at least:
    a third of the time for a large one.
    ``as_benchmark`` gives what CLIP_benchmark evaluates, Pillow's plain ``convert("RGB")``: not turned, the colours
    below transparency, what exceeds eight bits cut off. Formats, limits and errors are the same.
    Raises DataError, "does not decode: " and a short, stable reason.
    """
    try:
        image = open_image(data)
        if shorter_side is not None:
            image.draft(None, (shorter_side, shorter_side))
        if as_benchmark:
            return _loaded(image, data, _as_pillow)
        pixels = load_rgb(image, data)
        transpose = upright_transpose(read_exif(image))  # after the pixels: for some formats Pillow decodes here too
    except BadImage as error:
        raise DataError(f"does not decode: {error}") from error
    return pixels if transpose is None else pixels.transpose(transpose)


def crop_extreme_aspect(image: Image.Image) -> Image.Image:
    """The middle of an image longer than `MAX_ASPECT` shorter sides, for code that scales the shorter side and crops.

    65,500 x 1 pixels, some hundred bytes as PNG, would be three billion at a shorter side of 224.
    """
    most = MAX_ASPECT * min(image.size)
    left = max(0, image.width - most) // 2
    top = max(0, image.height - most) // 2
    if not left and not top:
        return image
    return image.crop((left, top, left + min(image.width, most), top + min(image.height, most)))


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """The image by its header, nothing decoded. Raises BadImage when it is none, or too costly to decode."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    readable = _strip_png(data) if data.startswith(PNG_SIGNATURE) else data
    try:
        image = Image.open(io.BytesIO(readable), formats=formats)
    except UnidentifiedImageError as error:
        raise BadImage("unsupported TIFF" if _is_unsupported_tiff(data) else "not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except Exception as error:  # hostile bytes make Pillow's readers raise anything
        raise BadImage("broken image") from error
    _check_cost(image, data, max_pixels)
    return image


def _check_cost(image: ImageFile.ImageFile, data: bytes, max_pixels: int) -> None:
    """Raise BadImage when decoding would take too much memory or time."""
    pixels = image.width * image.height
    if image.tile and image.tile[0][0] in PYTHON_DECODERS:
        max_pixels = min(max_pixels, MAX_PYTHON_PIXELS)
    if pixels > max_pixels or max(image.size) > MAX_SIDE:
        raise BadImage("too many pixels")
    if min(image.size) < 1:
        raise BadImage("broken image")
    if image.format in ("JPEG", "MPO") and jpeg_scans(data) > max(MAX_SCANS, MAX_SCAN_PIXELS // pixels):
        raise BadImage("too many scans")
    if image.format == "JPEG2000" and jpeg2000_blocks(data) > MAX_BLOCKS:
        raise BadImage("too many code-blocks")


def _is_unsupported_tiff(data: bytes) -> bool:
    """Whether the bytes are a TIFF of samples that Pillow cannot represent: floats of 16 or 64 bits, three floats."""
    try:
        TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except Exception as error:
        return "unknown pixel mode" in str(error)
    return False


def load_rgb(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """All pixels as RGB, not turned (Pillow turns a TIFF); where `draft` was called on the image, at that size.

    ``image`` is `open_image` of ``data``; it need not be loaded afterwards. Raises BadImage.
    """
    return _loaded(image, data, to_rgb)


def _loaded(image: ImageFile.ImageFile, data: bytes, convert: Callable[[Image.Image, str], Image.Image]) -> Image.Image:
    """``convert(image, raw_mode)`` of the decoded image, which changes nothing of eight-bit grey and RGB but the mode.

    Raises BadImage when it cannot be decoded.
    """
    pixels = decode_jpeg(image, data)
    if pixels is not None:
        return pixels
    raw_mode = _raw_mode(image)  # before loading, which discards it
    try:
        image.load()
        return convert(image, raw_mode)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage("truncated image" if "truncated" in str(error) else "broken image") from error


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's name of the samples in the file, with ``;16`` where they have 16 bits."""
    if not image.tile:
        return ""
    codec, _, _, args = image.tile[0]
    if not isinstance(args, tuple):
        return str(args)
    if codec == "ppm" and args[1] > 255:  # the largest sample value
        return f"{args[0]};16"
    return str(args[0])


def _as_pillow(image: Image.Image, raw_mode: str) -> Image.Image:
    return image.convert("RGB")


def read_exif(image: Image.Image) -> Image.Exif | None:
    """The EXIF of a loaded image; None when it is damaged, since the pixels may still be good."""
    try:
        return image.getexif()
    except Exception:
        return None


def upright_transpose(exif: Image.Exif | None) -> Image.Transpose | None:
    """The operation that makes an image with this EXIF upright, None when it is."""
    try:
        return UPRIGHT.get(exif.get(ExifTags.Base.Orientation, 1)) if exif else None
    except Exception:  # Pillow parses the values only here, and they may be damaged
        return None


def _strip_png(data: bytes) -> bytes:
    """A PNG without texts, colour profile and the like, for which Pillow may refuse the whole image."""
    kept = [PNG_SIGNATURE]
    position = len(PNG_SIGNATURE)
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8].ljust(8, b"\0"))
        chunk = data[position : position + 12 + length]
        is_critical = kind[:1].isupper()
        if is_critical or kind in PNG_KEPT or _has_orientation(kind, chunk[8:-4]):
            kept.append(chunk)
        position += 12 + length
    return b"".join(kept)


def _has_orientation(kind: bytes, text: bytes) -> bool:
    """Whether a text chunk may hold the orientation, and is small enough for Pillow to read it."""
    name, _, rest = text.partition(b"\0")
    if name not in ORIENTATION_TEXTS or len(text) > PngImagePlugin.MAX_TEXT_CHUNK:
        return False
    compressed = b""
    if kind == b"zTXt":
        compressed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        compressed = rest[2:].split(b"\0", 2)[-1]
    elif kind not in (b"tEXt", b"iTXt"):
        return False
    try:
        decompressor = zlib.decompressobj()
        decompressor.decompress(compressed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:
        return False
    return not decompressor.unconsumed_tail
