"""What lies below ROOT beside the finished shards and may show a sample: pages, logs, a search index, lost shards."""

import numpy as np
import pyarrow as pa

from pipeline.core.file_edits import write_like, write_without_vectors
from pipeline.takedown.edits import stage_folders
from pipeline.takedown.proof import IN_TAR, TakedownSearch, all_files
from pipeline.takedown.staging import TakedownStaging
from shards_spec.embeddings import EmbeddingFile
from shards_spec.files import exists, join, open_read, read_bytes, write_bytes
from shards_spec.layout import CHECK, FILE_PATTERN, LOGS, REPAIRED, STAGES, stats_path
from shards_spec.manifest import read_done
from shards_spec.parquet import column_names, read_table

INDEX = ".clipmill-search/"  # the folder of `clipmill search` below the images
STAGE_FOLDERS = {stage.writes.split("/")[0] for stage in STAGES.values()}
CHECKED = CHECK.writes.split("/")[0]  # folders of parts of its arrays
PAGE = b'<meta name="generator" content="clipmill'  # in the head of our pages
HEAD_BYTES = 4096


def stage_other_files(root: str, search: TakedownSearch, staging: TakedownStaging) -> list[str]:
    """Stage the logs and the index of a dataset; delete pages, files that a repair or a killed stage left.

    Returns the paths of the pages.
    """
    pages = list[str]()
    folders = {folder for _, folder in stage_folders(root)}
    for path in all_files(root):
        folder, _, name = path.rpartition("/")
        if _is_of_parts(path) or path.startswith(f"{REPAIRED}/"):  # what a repair moved away may hold anything
            staging.stage_removal(path)
        elif folder in folders:
            if _is_unfinished(root, folder, name) and any(search.search_file(path)):
                staging.stage_removal(path)
        elif path.startswith(INDEX) and path.endswith(".parquet"):
            _stage_index(root, path, search, staging)
        elif path.endswith(".html") and _is_page(join(root, path)):
            staging.stage_removal(path)
            pages.append(path)
        elif path.startswith(f"{LOGS}/") and any(search.search_file(path)):
            _stage_log(root, path, search, staging)
    return pages


def _is_of_parts(path: str) -> bool:
    """Whether a file lies in a hidden folder of a stage or a check that was killed, which makes it again."""
    top, *folders = path.split("/")[:-1] or [""]
    return top == CHECKED or (top in STAGE_FOLDERS and any(folder.startswith(".") for folder in folders))


def _is_unfinished(root: str, folder: str, name: str) -> bool:
    """Whether a file is of a shard without a done-record, or one that the record does not name."""
    match = FILE_PATTERN.fullmatch(name)
    if match is None or match[2] == "_stats.json":
        return False
    if not exists(join(root, stats_path(folder, int(match[1])))):
        return True
    done = read_done(join(root, folder), int(match[1]))
    return done is not None and f"{folder}/{name}" not in done.outputs


def _is_page(path: str) -> bool:
    with open_read(path) as file:
        return PAGE in file.read(HEAD_BYTES)


def _stage_index(root: str, path: str, search: TakedownSearch, staging: TakedownStaging) -> None:
    """Rows of the index go: of its listing of tars, or of its embeddings."""
    old = join(root, path)
    keys = list(search.keys)
    if "tar" in column_names(old):
        table = read_table(old)
        stays = ~np.isin(table.column("key").to_pylist(), keys)
        if not stays.all():
            new_table = table.filter(pa.array(stays))
            staging.stage(path, lambda new: write_like(old, new, new_table), int((~stays).sum()))
        return
    names = [key.rpartition(IN_TAR)[2] for key in EmbeddingFile(old).keys]
    stays = ~np.isin(names, keys)
    if not stays.all():
        rows = np.flatnonzero(stays)
        staging.stage(path, lambda new: write_without_vectors(old, new, rows), int((~stays).sum()))


def _stage_log(root: str, path: str, search: TakedownSearch, staging: TakedownStaging) -> None:
    """Lines of a log that name what goes."""
    lines = read_bytes(join(root, path)).splitlines(keepends=True)
    kept = [line for line in lines if not search.names_any(line)]
    staging.stage(path, lambda new: write_bytes(new, b"".join(kept)), len(lines) - len(kept))
