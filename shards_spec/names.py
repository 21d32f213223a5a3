"""Names of files: endings of images, names that are ignored, and what a user may call a folder of the dataset.

All readers of folders and tars ask here.
"""

import os
import re
from collections import Counter

from shards_spec.files import UserError

# What the decoder takes (formats in `images.py`); of several images of a sample the first ending here wins.
IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "jpe",
    "jfif",
    "jif",
    "pjpeg",
    "pjp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
    "jp2",
    "j2k",
    "j2c",
    "jpc",
    "jpf",
    "jpx",
    "mpo",
    "apng",
    "ppm",
    "pgm",
    "pbm",
    "pnm",
    "ico",
)
# Images that are not decoded here: they are counted, and never taken for something else.
UNDECODED_EXTENSIONS = (
    "heic",
    "heif",
    "hif",
    "jxl",
    "dib",
    "svg",
    "svgz",
    "eps",
    "psd",
    "psb",
    "xcf",
    "tga",
    "exr",
    "hdr",
    "dds",
    "qoi",
    "jxr",
    "wdp",
    "bpg",
    "pcx",
    "dng",
    "cr2",
    "cr3",
    "nef",
    "arw",
    "orf",
    "rw2",
    "raf",
)
IMAGE_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
UNDECODED_ENDINGS = tuple(f".{extension}" for extension in UNDECODED_EXTENSIONS)
# Of macOS, Windows, Synology, Python, ext4. Names that begin with a dot need no list.
SYSTEM_NAMES = frozenset(
    {
        "__macosx",
        "__pycache__",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "@eadir",
        "#recycle",
        "#snapshot",
        "lost+found",
        "icon\r",
    }
)
MOST_ENDINGS = 10  # in one line of a message
PACKED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z", ".rar")
# Of captions, caches, vocabularies: one part of a path that is not hidden and no flag, without characters that a shell,
# a glob, a URL or a brace list treats specially.
NAME_PATTERN = re.compile(r"\w([\w .,+=@%~()-]*[\w.+=@%~()-])?")
MAX_NAME_BYTES = 200  # of the 255 of a file system: ".tsv" and what a temporary name adds must fit too


def is_ignored(path: str) -> bool:
    """Whether a file is ignored: a part of its path (below the folder that the user named) is hidden or a system's.

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
    """The lower-case ending with its dot (``.tar.gz`` is one); empty when there is none."""
    lowered = name.lower()
    return next((ending for ending in PACKED_ENDINGS if lowered.endswith(ending)), os.path.splitext(lowered)[1])


def clean_name(name: str) -> str:
    """The name with bytes that are no UTF-8 replaced."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def endings_line(endings: Counter[str]) -> str:
    """``12 .pdf, 3 .heic, 1 without an ending``: the most frequent ones, then how many files have others."""
    named = endings.most_common(MOST_ENDINGS)
    texts = [f"{count} {ending or 'without an ending'}" for ending, count in named]
    if rest := endings.total() - sum(count for _, count in named):
        texts.append(f"{rest} with other endings")
    return ", ".join(texts)


def check_name(name: str, option: str = "--name") -> str:
    """The name itself when it can be a folder or file below the dataset. Raises UserError naming the ``option``."""
    if not NAME_PATTERN.fullmatch(name) or len(name.encode()) > MAX_NAME_BYTES:
        shown = name if len(name) <= 60 else f"{name[:60]}..."
        raise UserError(
            f"{option} {shown!r} cannot be the name of a folder: take letters, digits, spaces and _-.,+=@%~(), the "
            f"first one a letter, digit or _, the last one no space or comma, at most {MAX_NAME_BYTES} bytes"
        )
    return name
