"""Which files count: endings of image files, and files that are nobody's. All readers of folders and tars ask here."""

import os
from collections import Counter

# what the decoder takes (formats in `images.py`), the preferred ones of several first
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "jpe", "jfif", "jif", "pjpeg", "pjp", "gif", "bmp", "dib", "tif", "tiff", "avif",
    "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "mpo", "apng", "ppm", "pgm", "pbm", "pnm", "ico",
)  # fmt: skip
# images that are not decoded here: counted, never taken for something else
UNDECODED_EXTENSIONS = (
    "heic", "heif", "hif", "jxl", "svg", "svgz", "eps", "psd", "psb", "xcf", "tga", "exr", "hdr", "dds", "qoi", "jxr",
    "wdp", "bpg", "pcx", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf",
)  # fmt: skip
IMAGE_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
UNDECODED_ENDINGS = tuple(f".{extension}" for extension in UNDECODED_EXTENSIONS)
# of macOS, Windows, Synology, Python, ext4; names that begin with a dot need no list
SYSTEM_NAMES = frozenset(
    {
        "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin",
        "system volume information", "@eadir", "#recycle", "#snapshot", "lost+found", "icon\r",
    }
)  # fmt: skip
MOST_ENDINGS = 10  # named in one line


def is_ignored(path: str) -> bool:
    """Whether a file is nobody's: a part of its path (below what the user named) is hidden or a system's own.

    Such as ``._x.jpg``, ``__MACOSX/``, ``.ipynb_checkpoints/``, ``.Trash-1000/``, ``.cache/``, ``Thumbs.db``, and this
    package's temporary files. webdataset and datasets' imagefolder leave hidden files out too.
    """
    return any(
        part.lower() in SYSTEM_NAMES or (part.startswith(".") and part not in (".", "..")) for part in path.split("/")
    )


def is_image(name: str) -> bool:
    """Whether a file or a tar member (``jpg``, ``image.jpg``, ``x.JPG``) has the ending of an image that is decoded."""
    return f".{name}".lower().endswith(IMAGE_ENDINGS)


def undecoded_ending(name: str) -> str | None:
    """The ending (``.heic``) of an image of a format that is not decoded here; None for all else."""
    lowered = f".{name}".lower()
    return next((ending for ending in UNDECODED_ENDINGS if lowered.endswith(ending)), None)


def file_ending(name: str) -> str:
    """The lower-case ending with its dot; empty when there is none."""
    return os.path.splitext(name)[1].lower()


def endings_line(endings: Counter[str]) -> str:
    """``12 .pdf, 3 .heic, 1 without an ending``: the most frequent ones, then how many files have others."""
    named = endings.most_common(MOST_ENDINGS)
    texts = [f"{count} {ending or 'without an ending'}" for ending, count in named]
    if rest := endings.total() - sum(count for _, count in named):
        texts.append(f"{rest} with other endings")
    return ", ".join(texts)
