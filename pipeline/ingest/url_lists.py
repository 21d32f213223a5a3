"""The rows of a source of any form, in a fixed order.

A row that cannot be used (no URL, a caption that is not UTF-8) is still a row, with its problem named. The files of a
folder or a glob are read as one list, by name.
"""

from collections.abc import Iterator
from itertools import chain

from pipeline.ingest.datacompdr_source import datacompdr_rows
from pipeline.ingest.delimited import CC3M, CC12M
from pipeline.ingest.image_folder import folder_rows, warn_of_no_caption
from pipeline.ingest.labelled_sources import class_rows
from pipeline.ingest.parquet_images import image_parquet_rows
from pipeline.ingest.parquet_lists import parquet_rows
from pipeline.ingest.rows import Columns, Row
from pipeline.ingest.source_files import Format, SourceFile, source_files
from pipeline.ingest.source_io import BROKEN_GZIP, expected_errors
from pipeline.ingest.text_lists import delimited_rows, headless_rows, json_rows, url_rows
from pipeline.ingest.webdataset_source import webdataset_rows
from shards_spec.files import UserError


def list_rows(
    source: str, form: Format, columns: Columns = (None, None), original_captions: str | None = None
) -> Iterator[Row]:
    """Rows of a source in the order of its files, in bounded memory; warns when none has a caption.

    ``original_captions`` are the tars that DataCompDR's captions come from.
    Raises UserError for a file that cannot be read or lacks a column.
    """
    if form == "folder":
        yield from folder_rows(source, columns)
        return
    if form == "classes":
        yield from class_rows(source)
        return
    files = source_files(source, form)
    try:
        if form == "datacompdr":
            rows = datacompdr_rows(files, original_captions)
        else:
            rows = _file_rows(files, form, columns)
        if form in ("txt", "webdataset", "datacompdr"):  # these have no captions, or warn themselves
            yield from rows
        else:
            hint = "the caption's column has none; name another with --caption-col"
            yield from warn_of_no_caption(rows, source, lambda: hint)
    except UserError:
        raise
    except expected_errors(source) as error:
        raise UserError(f"--source {source}: cannot be read ({error})") from error


def _file_rows(files: list[SourceFile], form: Format, columns: Columns) -> Iterator[Row]:
    if form == "webdataset":
        return webdataset_rows(files, columns)
    if form == "hf-parquet":
        return image_parquet_rows(files, columns)
    return chain.from_iterable(_list_rows(file.path, form, columns) for file in files)


def _list_rows(path: str, form: Format, columns: Columns) -> Iterator[Row]:
    """Rows of one list. Raises UserError."""
    try:
        match form:
            case "parquet":
                yield from parquet_rows(path, columns)
            case "csv":
                yield from delimited_rows(path, columns)
            case "jsonl":
                yield from json_rows(path, columns)
            case "txt":
                yield from url_rows(path, columns)
            case "cc3m":
                yield from headless_rows(path, CC3M)
            case "cc12m":
                yield from headless_rows(path, CC12M)
            case _:
                raise ValueError(f"{form} is not a form of lists")
    except BROKEN_GZIP as error:
        raise UserError(f"--source {path}: broken gzip file ({error}); download it again") from error
