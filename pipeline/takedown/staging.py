"""New files beside the dataset, put in place all together: a takedown that is killed is as if not begun, or goes on.

All new files are written below ``ROOT/.takedown/new/`` first; a takedown that is killed then has changed nothing. The
journal, written when all are there, says which file takes which place: putting them there needs nothing else, and can
be done again from the start.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from shards_spec.files import exists, join, read_json, remove, remove_tree, replace_file, sha256_file, write_json
from shards_spec.layout import JOURNAL, STAGING
from shards_spec.messages import counted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileChange:
    """A file below ROOT that changes: samples or rows ``removed``, its sha256 before and after.

    ``before`` is None where there was no such file, ``after`` where it is deleted.
    """

    path: str
    removed: int
    before: str | None
    after: str | None


@dataclass
class TakedownJournal:
    """What a takedown does.

    ``report`` is what its report says apart from the files; ``searched`` are the values that must be in no file
    afterwards, by kind. The journal holds them in the clear, and is deleted at the end.
    """

    changes: list[FileChange] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    searched: dict[str, list[str]] = field(default_factory=dict)


class TakedownStaging:
    """The folder of the new files, and the journal."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.changes = list[FileChange]()

    def read_journal(self) -> TakedownJournal | None:
        """The journal of a takedown that was interrupted while it put files in place; None when there is none."""
        path = join(self._root, JOURNAL)
        if not exists(path):
            return None
        content = read_json(path, "restore it from a copy")
        changes = [FileChange(**change) for change in content["changes"]]
        return TakedownJournal(changes, content["report"], content["searched"])

    def clear(self) -> None:
        """Delete the folder."""
        remove(join(self._root, JOURNAL))  # first: a journal without its files would be followed
        remove_tree(join(self._root, STAGING))

    def stage(self, path: str, write: Callable[[str], object], removed: int = 0) -> str:
        """Let ``write`` make the new file of a path below ROOT, at the path it is given; returns its sha256."""
        new = self.new_path(path)
        write(new)
        before = sha256_file(join(self._root, path)) if exists(join(self._root, path)) else None
        after = sha256_file(new)
        self.changes.append(FileChange(path, removed, before, after))
        return after

    def stage_removal(self, path: str, removed: int = 0) -> None:
        """Note a file that will be deleted."""
        self.changes.append(FileChange(path, removed, sha256_file(join(self._root, path)), None))

    def commit(self, journal: TakedownJournal) -> None:
        """Write the journal, and put all files in place."""
        write_json(join(self._root, JOURNAL), asdict(journal))
        self.follow(journal)

    def follow(self, journal: TakedownJournal) -> None:
        """Put the files of a journal in place, those that are not there yet."""
        log.info("takedown: %s put in place", counted(len(journal.changes), "file"))
        for change in journal.changes:
            if change.after is None:
                remove(join(self._root, change.path))
            else:
                replace_file(join(self._root, change.path), self.new_path(change.path))

    def new_path(self, path: str) -> str:
        """Where the new file of a path below ROOT lies until it is put in place."""
        return join(self._root, STAGING, "new", path)
