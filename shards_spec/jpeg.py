"""JPEGs decoded by simplejpeg where it gives Pillow's pixels: both are libjpeg-turbo, with less around it here.

Pillow hands libjpeg-turbo a part of the file at a time and copies row by row; simplejpeg decodes from memory to memory,
and Pillow takes that memory over as it is. What an image is stays Pillow's to say: it has read the header before. It
also decodes all that is rare, all that libjpeg-turbo warns of (so that damaged files have the same pixels or the same
reason), and everything where the two differ on a few test images. `tests/bench/decode.py` measures both.
"""

import io
import logging
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, __version__

from shards_spec.decode_cost import jpeg_frame
from shards_spec.pixels import from_rgbx

try:
    import simplejpeg
except ImportError:  # it makes decoding faster and nothing else
    simplejpeg = None

log = logging.getLogger(__name__)

FRAMES = (b"\xc0", b"\xc1", b"\xc2")  # baseline, extended, progressive; not lossless ones or arithmetic coding
SAMPLINGS = (  # samples of a component across and down: grey in two ways, 4:4:4, 4:2:2, 4:2:0
    [(1, 1)],
    [(2, 2)],
    [(1, 1), (1, 1), (1, 1)],
    [(2, 1), (1, 1), (1, 1)],
    [(2, 2), (1, 1), (1, 1)],
)
MIN_SIDE = 16  # of the longer side; smaller images have the same size at several of libjpeg-turbo's scales
SCALES = (1, 2, 4, 8)  # the parts of its size that Pillow's `draft` decodes an image at


def decode_jpeg(image: ImageFile.ImageFile, data: bytes) -> Image.Image | None:
    """The pixels as RGB that Pillow would load, at the size that ``draft`` left; None where Pillow shall load them.

    ``image`` is what Pillow opened ``data`` as. The result is not turned.
    """
    return _decode(image, data) if _is_plain(image, data) and _agrees_with_pillow() else None


def _is_plain(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether it is a JPEG of a usual kind, which every libjpeg-turbo decodes alike."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.format != "JPEG" or max(image.size) < MIN_SIDE:
        return False
    sampling = [(across, down) for _, across, down, _ in image.layer]
    return sampling in SAMPLINGS and jpeg_frame(data) in FRAMES


def _decode(image: ImageFile.ImageFile, data: bytes) -> Image.Image | None:
    """`decode_jpeg` without a look at what the image is; None when simplejpeg refuses it, as it does for a warning."""
    width, height = image.size
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGBX", min_width=width, min_height=height, strict=True)
    except (ValueError, MemoryError):
        return None
    if pixels.shape != (height, width, 4):
        return None
    return from_rgbx(pixels)


@cache
def _agrees_with_pillow() -> bool:
    """Whether simplejpeg is installed and decodes the test images to Pillow's pixels, at every scale."""
    if simplejpeg is None:
        return False
    for data in _test_images():
        for scale in SCALES:
            image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
            image.draft(None, (image.width // scale, image.height // scale))
            decoded = _decode(image, data)
            if decoded is None or decoded.tobytes() != image.convert("RGB").tobytes():
                log.warning(
                    "simplejpeg %s and Pillow %s decode a test image differently: Pillow decodes all JPEGs",
                    simplejpeg.__version__,
                    __version__,
                )
                return False
    return True


def _test_images() -> Iterator[bytes]:
    """JPEGs of each kind that simplejpeg decodes here, and a progressive one without its last scans.

    What is missing of the latter libjpeg-turbo estimates from the neighbourhood, in a way that has changed once.
    """
    down, across = np.mgrid[:43, :75]
    colours = np.stack([down * 5 + across * 3, down * across, (down ^ across) * 7], -1).astype(np.uint8)
    image = Image.fromarray(colours)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield _encoded(image, subsampling=subsampling)
    for subsampling in ("4:4:4", "4:2:0"):
        yield _encoded(image.convert("L"), subsampling=subsampling)
    progressive = _encoded(image, progressive=True)
    yield progressive
    scans = progressive.split(b"\xff\xda")
    yield b"\xff\xda".join(scans[:3]) + b"\xff\xd9"


def _encoded(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()
