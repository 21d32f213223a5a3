"""How many rows a source has, without reading it."""

import zlib
from typing import NamedTuple

from pipeline.ingest.source_files import Format, SourceFile, source_files
from pipeline.ingest.source_io import BROKEN_GZIP, GZIP_MAGIC, expected_errors, open_parquet
from pipeline.ingest.tar_samples import mean_sample_bytes
from shards_spec.files import DataError, UserError, open_read

HEAD_BYTES = 1 << 20  # of a list whose lines are counted
MAX_UNPACKED_BYTES = 16 * HEAD_BYTES  # of such a head that is gzip
MAX_FOOTERS = 100  # of Parquet files that are read
SAMPLES = 100  # of a tar whose mean size is taken
UNREADABLE: tuple[type[Exception], ...] = (*BROKEN_GZIP, DataError, UserError)


def estimate_rows(source: str, form: Format) -> tuple[int, bool] | None:
    """(rows, whether that is exact); None when only reading the source would tell."""
    if form in ("folder", "classes", "img2dataset"):
        return None
    try:
        files = [file for file in source_files(source, form) if file.size]
        if not files:
            return None
        if form in ("parquet", "hf-parquet"):
            return _estimate_parquet(files)
        if form in ("webdataset", "datacompdr"):
            return _estimate_tars(files)
        return _estimate_text(files, form)
    except UNREADABLE + expected_errors(source):
        return None  # reading the source gives the reason


def _estimate_parquet(files: list[SourceFile]) -> tuple[int, bool]:
    step = -(-len(files) // MAX_FOOTERS)
    chosen = files[::step]
    rows = 0
    for file in chosen:
        with open_parquet(file.path) as table:
            rows += table.metadata.num_rows
    if len(chosen) == len(files):
        return rows, True
    return round(rows * _total_bytes(files) / _total_bytes(chosen)), False


def _estimate_tars(files: list[SourceFile]) -> tuple[int, bool] | None:
    mean = mean_sample_bytes(files[0].path, SAMPLES)
    return (round(_total_bytes(files) / mean), False) if mean else None


def _estimate_text(files: list[SourceFile], form: Format) -> tuple[int, bool]:
    head = _count_lines(files[0])
    has_header = form == "csv"
    lines = round(head.lines * _total_bytes(files) / max(head.file_bytes, 1))
    rows = max(0, lines - (len(files) if has_header else 0))
    return rows, head.is_whole and len(files) == 1 and form != "csv"  # a row of a CSV may have several lines


def _total_bytes(files: list[SourceFile]) -> int:
    return sum(file.size for file in files)


class _Head(NamedTuple):
    """The first lines of a file."""

    lines: int
    file_bytes: int  # that they take in the file, packed when it is gzip
    is_whole: bool  # whether that is all of the file


def _count_lines(file: SourceFile) -> _Head:
    """The lines in the first `HEAD_BYTES` of a file."""
    with open_read(file.path) as opened:
        head = opened.read(HEAD_BYTES)
    text = head
    file_bytes = len(head)
    if head.startswith(GZIP_MAGIC):
        unpacker = zlib.decompressobj(wbits=31)  # gzip
        text = unpacker.decompress(head, MAX_UNPACKED_BYTES)
        file_bytes -= len(unpacker.unused_data)  # belongs to a further gzip member
        file_bytes -= len(unpacker.unconsumed_tail)  # is beyond MAX_UNPACKED_BYTES
    is_whole = file_bytes >= file.size
    lines = text.count(b"\n") or text.count(b"\r")
    if is_whole and text and not text.endswith((b"\n", b"\r")):
        lines += 1  # the last one has no end
    return _Head(lines, file_bytes, is_whole)
