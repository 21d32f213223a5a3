"""What a teacher cache holds of one shard: a column counts as the newest file has it."""

from collections.abc import Callable

from shards_spec.embeddings import EmbeddingFile
from shards_spec.files import DataError, exists, join
from shards_spec.layout import remake_advice, resume_advice, teacher_folder, teacher_parquet
from shards_spec.manifest import read_done


class TeacherShard:
    """The files of ``ROOT/teacher/NAME`` that a shard's done-record names. ``config`` and ``inputs`` are the record's.

    ``resolve_path`` maps a file's path to that of a local copy, or to the bytes where they are in memory. Raises
    DataError when the shard is unfinished, or a file broken or gone.
    """

    def __init__(self, root: str, name: str, shard: int, resolve_path: Callable[[str], str | memoryview] = str) -> None:
        folder = join(root, teacher_folder(name))
        self._folder = folder
        self.path = teacher_parquet(root, name, shard)
        record = read_done(folder, shard)
        if record is None:
            raise DataError(f"{self.path}: not finished; {resume_advice(folder)}")
        self.config, self.inputs = record.config, record.inputs
        paths = [join(root, path) for path in record.outputs]
        for path in paths:
            if not exists(path):
                raise DataError(f"{path}: is not there any more; {remake_advice(path)}")
        self.files = [EmbeddingFile(path, resolve_path(path)) for path in paths]

    @property
    def captions(self) -> int:
        """Number of caption columns, the original's included."""
        return sum(name.startswith("text_") for name in self._columns())

    def find(self, column: str) -> EmbeddingFile | None:
        """The newest file that has a column; None when no file has it."""
        return next((file for file in reversed(self.files) if column in file.names), None)

    def file(self, column: str) -> EmbeddingFile:
        """As `find`. Raises DataError when no file has the column."""
        file = self.find(column)
        if file is None:
            columns = sorted(self._columns())
            raise DataError(
                f"{self.path}: no column {column}, it has {columns}; {resume_advice(self._folder)} and more --views"
            )
        return file

    def _columns(self) -> set[str]:
        return set[str]().union(*(file.names for file in self.files))
