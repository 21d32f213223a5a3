"""Parquet files as lists of URLs and captions."""

from collections.abc import Iterator
from itertools import chain, islice

from pipeline.ingest.cells import files_folder, make_row, pick_columns
from pipeline.ingest.parquet_cells import CELL_TOO_LARGE, check_types, other_columns, read_cells, source_errors
from pipeline.ingest.rows import Columns, Row, decode_text
from pipeline.ingest.source_io import open_parquet


def parquet_rows(source: str, columns: Columns) -> Iterator[Row]:
    """Rows of a list; of a row with a list of captions, one each. Raises UserError."""
    with source_errors(source), open_parquet(source) as table:
        schema = table.schema_arrow
        caption, url = (schema.names[index] for index in pick_columns(source, schema.names, columns))
        check_types(source, schema, caption, url)
        cells = read_cells(source, table, caption, url, other_columns(schema, [caption, url]))
        head = list(islice(cells, 1))
        first_url = decode_text(head[0].url)[0] if head and head[0] is not None else None
        folder = files_folder(source, url, first_url)
        for row in chain(head, cells):
            if row is None:
                yield Row(None, None, CELL_TOO_LARGE)
                continue
            for text in row.captions:
                yield make_row(text, row.url, folder, row.others)
