"""A shard's teacher cache: the files that its done-record names, a column being the last file's that has it."""

from collections.abc import Callable

from shards_spec.embeddings import EmbeddingFile
from shards_spec.files import DataError, exists, join
from shards_spec.layout import shard_name, teacher_folder, teacher_parquet
from shards_spec.manifest import read_done


class CachedShard:
    """What ``ROOT/teacher/NAME`` holds of one shard. ``config`` and ``inputs`` are the done-record's.

    ``near`` maps a file's path to where its bytes are read (a local copy of a remote one). Raises DataError when the
    shard is unfinished, or a file broken or gone.
    """

    def __init__(self, root: str, name: str, shard: int, near: Callable[[str], str] = str) -> None:
        self.path = teacher_parquet(root, name, shard)
        record = read_done(join(root, teacher_folder(name)), shard)
        if record is None:
            raise DataError(f"{self.path}: not finished; run `clipmill cache {root}` again, it goes on")
        self.config, self.inputs = record.config, record.inputs
        if gone := [path for path in record.outputs if not exists(join(root, path))]:
            raise DataError(
                f"{join(root, gone[0])}: is not there any more; delete {shard_name(shard)}_stats.json beside it and "
                f"run `clipmill cache {root}` again"
            )
        self.files = [EmbeddingFile(join(root, path), near(join(root, path))) for path in record.outputs]

    @property
    def captions(self) -> int:
        """Caption columns, the original's counted."""
        return len({name for file in self.files for name in file.names if name.startswith("text_")})

    def find(self, column: str) -> EmbeddingFile | None:
        """The file whose ``column`` counts; None when there is no such column."""
        return next((file for file in reversed(self.files) if column in file.names), None)

    def file(self, column: str) -> EmbeddingFile:
        """As `find`. Raises DataError when there is no such column."""
        if (found := self.find(column)) is None:
            there = sorted({name for file in self.files for name in file.names})
            raise DataError(f"{self.path}: no column {column}, it has {there}; run `clipmill cache` with more views")
        return found
