"""Reading samples of tar shards in place, by shard and index."""

from dataclasses import dataclass
from typing import Literal

from shards_spec.files import DataError, UserError, join, read_buffer, read_json
from shards_spec.layout import RAW, SHARDS, remake_advice, stats_path, tar_path
from shards_spec.manifest import is_count, shard_ids, shard_sizes
from shards_spec.messages import counted
from shards_spec.sample import Sample
from shards_spec.tar import index_shard, read_sample
from shards_spec.tar_members import Member
from training.data.local_copies import LocalFileCache
from training.data.lru import LRUCache


@dataclass(frozen=True)
class _OpenShard:
    buffer: memoryview
    keys: list[str]
    members: list[dict[str, Member]]


class ShardReader:
    """Reads samples of ``root/folder/NNNNN.tar``.

    Args:
        root: The dataset.
        folder: The folder of its shards.
        sizes: Number of samples of each shard, by the dataset's records.
        capacity: Number of shards that stay open (mapped into memory, with an index of their members).
        file_cache: Where copies of remote shards are kept.
    """

    def __init__(
        self, root: str, folder: str, sizes: list[int], capacity: int = 24, file_cache: LocalFileCache | None = None
    ) -> None:
        self.root = root
        self.folder = folder
        self.sizes = sizes
        self.file_cache = file_cache or LocalFileCache()
        self.open_shards: LRUCache[int, _OpenShard] = LRUCache(capacity)

    def path(self, shard: int) -> str:
        """Return the path or URL of a shard's tar."""
        return tar_path(join(self.root, self.folder), shard)

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard in file order. Raises DataError as `sample` does."""
        return self._shard(shard).keys

    def sample(self, shard: int, index: int) -> Sample:
        """Return a sample. Raises DataError naming the file when the shard is missing, damaged, or of another size."""
        opened = self._shard(shard)
        return read_sample(opened.buffer, opened.keys[index], opened.members[index])

    def _shard(self, shard: int) -> _OpenShard:
        return self.open_shards.get(shard, lambda: self._open(shard))

    def _open(self, shard: int) -> _OpenShard:
        path = self.path(shard)
        try:
            with read_buffer(self.file_cache.get(path)) as buffer:
                samples = list(index_shard(buffer, path))
        except FileNotFoundError as error:
            raise DataError(f"{path} is not there; {remake_advice(path)}") from error
        if len(samples) != self.sizes[shard]:
            raise DataError(
                f"{path}: {counted(len(samples), 'sample')}, its records say {self.sizes[shard]}; {remake_advice(path)}"
            )
        return _OpenShard(buffer, [key for key, _ in samples], [members for _, members in samples])


def dataset_sizes(root: str, folder: Literal["shards", "raw"]) -> list[int]:
    """Return the number of samples of each shard.

    Raises UserError when the stage has not finished or made none, DataError where its records are damaged.
    """
    if folder == SHARDS:
        return shard_sizes(root)
    shards = shard_ids(join(root, RAW))
    if not shards:
        raise UserError(f"{join(root, RAW)} has no finished shards: run `clipmill ingest {root}` first")
    return [_raw_size(stats_path(join(root, RAW), shard)) for shard in shards]


def _raw_size(path: str) -> int:
    stats = read_json(path, remake_advice(path))
    if not isinstance(stats, dict) or not is_count(stats.get("successes")):
        raise DataError(f"{path}: says no number of successes; {remake_advice(path)}")
    size: int = stats["successes"]
    return size
