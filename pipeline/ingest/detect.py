"""The form of a source, told from its first bytes or its file names."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice

from pipeline.ingest.datacompdr_source import is_datacompdr
from pipeline.ingest.metadata import METADATA
from pipeline.ingest.parquet_images import parquet_form
from pipeline.ingest.rows import Columns
from pipeline.ingest.source_files import Format, base_name, file_kind, source_files, source_info
from pipeline.ingest.source_io import BROKEN_GZIP, GZIP_MAGIC, expected_errors, open_list
from pipeline.ingest.text_lists import detect_text
from shards_spec.file_kinds import HEAD_BYTES, TAR_MAGIC, image_kind, packed_kind
from shards_spec.files import UserError, join, open_read
from shards_spec.folders import walk
from shards_spec.layout import STATS_PATTERN
from shards_spec.names import PACKED_ENDINGS, endings_line, file_ending, is_image

MAX_NAMES = 10_000  # of a folder that are looked at
MANIFEST = "manifest.jsonl"  # names and numbers of samples of the tars beside it, as DataCompDR-1B has it


def detect(source: str, columns: Columns = (None, None)) -> Format:
    """The form of a source, from its first lines or its file names.

    Raises UserError for a source whose form cannot be told, or that cannot be read.
    """
    info = source_info(source)
    if info is not None and info["type"] == "directory":
        form = _detect_folder(source, columns)
        if form is not None:
            return form
    files = source_files(source)
    if any(file_kind(file.path) == "tar" for file in files):
        files = [file for file in files if base_name(file.path) != MANIFEST]
    kinds = sorted({file_kind(file.path) or "other" for file in files})
    if len(kinds) > 1:
        raise UserError(
            f"--source {source}: has files of several kinds ({', '.join(kinds)}); name one with a glob "
            "such as '*.parquet', or with --format"
        )
    first = next((file.path for file in files if file.size), files[0].path)
    try:
        return _detect_file(first, columns)
    except BROKEN_GZIP as error:
        raise UserError(f"--source {source}: broken gzip file ({error}); download it again") from error
    except UserError:
        raise
    except expected_errors(source) as error:
        raise UserError(f"--source {source}: cannot be read ({error})") from error


def _detect_folder(source: str, columns: Columns) -> Format | None:
    """By the names in the folder; None when the content of its list files or tars has to tell."""
    names = _names_below(source)
    image = next((name for name in names if is_image(name)), None)
    has_stats = any(STATS_PATTERN.fullmatch(name) for name in names)
    # img2dataset's output format "files" has stats and images, but no tar: that is a folder of images
    if has_stats and (image is None or any(name.endswith(".tar") for name in names)):
        return "img2dataset"
    lists = [name for name in names if not base_name(name).startswith("_") and file_kind(name)]
    if image is None:
        if lists and all(base_name(name) in METADATA for name in lists):
            return _detect_metadata(join(source, lists[0]), columns)
        if not lists and (packed := _packed_files(names)):
            raise UserError(f"--source {source}: {packed}, which cannot be read in place; unpack them")
        return None if lists else "folder"
    for name in lists:
        if base_name(name) not in METADATA and file_kind(name) in ("tar", "parquet"):
            raise UserError(
                f"--source {source}: has images ({image}) and {name}; name what is meant with --format "
                "(folder, webdataset, parquet, hf-parquet), or with a glob such as '*.parquet'"
            )
    return "folder"


def _names_below(folder: str) -> list[str]:
    """Paths below a folder of its first `MAX_NAMES` files."""
    names: list[str] = []
    for prefix, files in walk(folder):
        names += [prefix + name for name in islice(files, MAX_NAMES - len(names))]
        if len(names) == MAX_NAMES:
            break
    return names


def _packed_files(names: Iterable[str]) -> str:
    """``has 12 .tar.gz``; empty when no file is packed in a way that cannot be read."""
    endings = Counter(ending for ending in map(file_ending, names) if ending in PACKED_ENDINGS)
    return f"has {endings_line(endings)}" if endings else ""


def _detect_metadata(path: str, columns: Columns) -> Format | None:
    """Of a folder with nothing but ``metadata.csv``: its images are missing, unless that is a list of URLs."""
    try:
        _detect_file(path, columns)
    except UserError:
        return "folder"
    return None


def _detect_file(path: str, columns: Columns) -> Format:
    with open_list(path) as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return parquet_form(path, columns)
    if head[TAR_MAGIC] == b"ustar" or (path.lower().endswith(".tar") and not packed_kind(head)):
        if _is_gzip(path):
            raise UserError(
                f"--source {path}: a tar packed with gzip cannot be read in parts; unpack it first (gunzip)"
            )
        return "datacompdr" if is_datacompdr(path) else "webdataset"
    if is_image(path) or image_kind(head):
        raise UserError(f"--source {path}: {image_kind(head) or 'an image'}; give its folder, or a list of links")
    if (packed := packed_kind(head)) is not None:
        raise UserError(f"--source {path}: {packed}; unpack it first")
    return detect_text(path, columns)


def _is_gzip(path: str) -> bool:
    with open_read(path) as file:
        return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
