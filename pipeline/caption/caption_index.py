"""The captions of a list by image, on disk: a list of any length is joined with shards one at a time.

SQLite keeps them in a database without a name, which lies in the folder for temporary files, is gone with the process,
and takes a bounded part of the memory. Only rows of images that are in raw/ are kept.
"""

import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np

from pipeline.caption.caption_lists import NO_TEXT, ListedRow
from pipeline.core.prefetch import batches
from shards_spec.content_id import content_ids
from shards_spec.files import UserError
from shards_spec.messages import counted

log = logging.getLogger(__name__)
CACHE_KIB = 1 << 16  # of the database in memory
BATCH_ROWS = 4096
MOST_NAMES = 500  # in a query: older builds of SQLite take 999
UNKNOWN = "rows of images that raw/ does not have"


class RowCaptions(NamedTuple):
    """The captions of one row of a list, and why further ones of it are left out."""

    texts: list[str]
    left_out: list[str]


class CaptionIndex:
    """Captions by the names of images.

    ``known``: `content_ids` of the names of all images of raw/, ascending (8 bytes an image).
    """

    def __init__(self, known: np.ndarray) -> None:
        self._known = known
        self._database = sqlite3.connect("")
        for setting in (f"cache_size=-{CACHE_KIB}", "journal_mode=OFF", "synchronous=OFF", "temp_store=FILE"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE listed (id INTEGER, place INTEGER, name TEXT, captions TEXT)")
        self.left_out = Counter[str]()
        self.first_unknown: str | None = None  # the first name that no image has
        self._first = dict[str, str]()  # where each problem comes first
        self._not_text = 0
        self._rows = 0

    def close(self) -> None:
        """Delete the database."""
        self._database.close()

    def fill(self, rows: Iterable[ListedRow]) -> None:
        """Take in the rows of images that are known; others are counted in ``left_out``. Raises UserError."""
        place = 0
        with _disk_errors():
            for batch in batches(rows, BATCH_ROWS):
                self._count_problems(batch)
                named = [row for row in batch if row.name is not None]
                ids = content_ids(row.name for row in named)
                is_known = self._is_known(ids)
                unknown = np.flatnonzero(~is_known)
                if len(unknown) and self.first_unknown is None:
                    self.first_unknown = named[int(unknown[0])].name
                    self._first[UNKNOWN] = repr(self.first_unknown)
                self.left_out[UNKNOWN] += len(unknown)
                kept = np.flatnonzero(is_known)
                rows_kept = [named[number] for number in kept.tolist()]
                stored = [json.dumps(row.captions()) for row in rows_kept]
                columns = (ids.view(np.int64)[kept].tolist(), (place + kept).tolist())
                values = zip(*columns, (row.name for row in rows_kept), stored, strict=True)
                self._database.executemany("INSERT INTO listed VALUES (?, ?, ?, ?)", values)
                place += len(batch)
            self._database.execute("CREATE INDEX by_id ON listed (id, place)")
        self.left_out += Counter()  # drops zeros
        self._rows = place

    def report(self) -> None:
        """Log the number of rows, and warn of what is left out, with the first of each kind."""
        for problem, number in self.left_out.items():
            log.warning("--from: %s left out: %s (the first: %s)", f"{number:,}", problem, self._first[problem])
        if self._not_text:
            no_texts = counted(self._not_text, "value that is no text", "values that are no text", style=",")
            log.warning("--from: %s in place of captions (the first: %s)", no_texts, self._first[NO_TEXT])
        log.info("--from: %s read", counted(self._rows, "row", style=","))

    def find(self, names: list[str]) -> dict[str, list[RowCaptions]]:
        """The captions of images by their names, row by row in the order of the files. Raises UserError."""
        found = dict[str, list[RowCaptions]]({name: [] for name in names})
        with _disk_errors():
            for part in batches(found, MOST_NAMES):
                ids = content_ids(part).view(np.int64).tolist()
                marks = ",".join("?" * len(ids))
                query = f"SELECT name, captions FROM listed WHERE id IN ({marks}) ORDER BY place"
                with closing(self._database.execute(query, ids)) as rows:
                    for name, stored in rows:
                        if name in found:  # another name of the same 64 bits is not
                            found[name].append(RowCaptions(*json.loads(stored)))
        return found

    def _count_problems(self, rows: list[ListedRow]) -> None:
        for row in rows:
            if row.name is None:
                self.left_out[row.problem] += 1
                self._first.setdefault(row.problem, row.place)
            elif row.not_text:
                self._not_text += row.not_text
                self._first.setdefault(NO_TEXT, row.place)

    def _is_known(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id is among the known ones: bool [ids]."""
        places = np.searchsorted(self._known, ids)
        is_known = places < len(self._known)
        is_known[is_known] = self._known[places[is_known]] == ids[is_known]
        return is_known


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk as a UserError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" not in str(error) and "disk I/O" not in str(error):
            raise
        raise UserError(
            f"the captions of --from do not fit on the disk of temporary files ({error}): free some space there, or "
            "name another folder with TMPDIR, and rerun the same command"
        ) from error
