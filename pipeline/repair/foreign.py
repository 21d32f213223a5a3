"""Raw shards that img2dataset made: imported again where they came from, else without the samples that are lost."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.repair.folder import Folder
from pipeline.repair.raw import LOST, RawOutcome, RefusedError
from pipeline.repair.raw_evidence import lenient_json, lenient_table
from pipeline.repair.recorded import Recorded, file_sha256, is_foreign, sound_record
from pipeline.repair.salvage import Members, image_of, looks_right, raw_samples, row_of_json
from shards_spec.files import DataError, UserError, exists, join, sha256_bytes, write_json
from shards_spec.layout import RAW, parquet_path, raw_parquet, raw_tar, stats_path, tar_path
from shards_spec.manifest import Done, forget
from shards_spec.messages import counted
from shards_spec.parquet import write_table
from shards_spec.sample import Sample
from shards_spec.tar import shard_keys, write_shard


@dataclass
class ForeignRepair:
    """One raw shard of img2dataset; its members keep their bytes and order.

    ``sources`` are folders that it may have been imported from.
    """

    recorded: Recorded
    folder: Folder
    shard: int
    sources: tuple[str, ...]

    def describe(self) -> str:
        """What will be done, in a few words."""
        if self._can_import:
            return f"imported again from {self.sources[0]}"
        rows, kept = self._rows_and_samples()
        lost = sum(row["status"] == "success" and row["key"] not in kept for row in rows)
        return f"{counted(len(kept), 'sample')} restored from what can be read, {lost} dropped as {LOST!r}"

    @property
    def _can_import(self) -> bool:
        """Whether it was imported from another folder that is still there."""
        raw = join(self.recorded.root, RAW)
        is_imported = not is_foreign(self.recorded.root, self.shard)
        return is_imported and bool(self.sources) and self.sources[0].rstrip("/") != raw

    def run(self) -> RawOutcome:
        """Import the shard, or write what is left of it. Raises UserError, DataError, RefusedError."""
        root = self.recorded.root
        if not self._can_import:
            return self._write_rest()
        done = sound_record(root, "ingest", self.shard)
        forget(join(root, RAW), self.shard)
        ingest(IngestConfig(root, self.sources, format="img2dataset", workers=1))
        again = sound_record(root, "ingest", self.shard)
        is_exact = done is None or (again is not None and done.outputs == again.outputs)
        return RawOutcome(is_exact=is_exact, dropped={}, moved=[])

    def _rows_and_samples(self) -> tuple[list[dict[str, Any]], dict[str, Members]]:
        """The rows of the shard, and the samples whose images are right, in the order of the tar."""
        root, shard = self.recorded.root, self.shard
        samples = raw_samples(raw_tar(root, shard))
        table = lenient_table(raw_parquet(root, shard))
        found = [row_of_json(members, key) for key, members in samples.items()]
        rows = table.to_pylist() if table is not None else [row for row in found if row is not None]
        by_key = {row["key"]: row for row in rows}
        kept = {key: members for key, members in samples.items() if _is_right(members, by_key.get(key))}
        return rows, kept

    def _write_rest(self) -> RawOutcome:
        """Write the samples that are left, the rows with the reason of those that are lost, and the stats."""
        root, shard = self.recorded.root, self.shard
        folder = self.folder
        rows, kept = self._rows_and_samples()
        if not rows:
            raise RefusedError(f"{raw_tar(root, shard)}: nothing of the shard can be read; get its three files again")
        lost = [row for row in rows if row["status"] == "success" and row["key"] not in kept]
        for row in lost:
            row.update(status="failed_to_download", error_message=LOST)
        table = lenient_table(raw_parquet(root, shard))
        rewritten = pa.Table.from_pylist(rows, table.schema if table is not None else None)
        tar, parquet = tar_path(RAW, shard), parquet_path(RAW, shard)
        outputs = {path: str(file_sha256(join(root, path))) for path in (tar, parquet)}
        if lost or not _is_readable(raw_tar(root, shard)):
            outputs[tar] = write_shard(join(folder.scratch, tar), (Sample(*sample) for sample in kept.items()))[1]
        if lost or table is None:
            outputs[parquet] = write_table(join(folder.scratch, parquet), rewritten)
        made = [path for path in outputs if exists(join(folder.scratch, path))]
        counts = Counter(str(row["error_message"] or row["status"]) for row in rows if row["status"] != "success")
        counts["success"] = len(kept)
        moved = [folder.copy_away(path) for path in made if exists(join(root, path))]
        stats = self._stats(counts)
        if "clipmill" in stats or "ingest" in self.recorded.configs:
            folder.publish(self._done(stats, counts, outputs), RAW)
        else:  # stats without a done-record, as img2dataset writes them
            for path in made:
                folder.put(path)
            write_json(stats_path(join(root, RAW), shard), stats)
        return RawOutcome(is_exact=False, dropped={LOST: len(lost)} if lost else {}, moved=moved)

    def _stats(self, counts: Counter[str]) -> dict[str, Any]:
        """img2dataset's stats with the counts as they are now; those of before as far as they can be read."""
        stats: dict[str, Any] = lenient_json(stats_path(join(self.recorded.root, RAW), self.shard))
        failed = sum(counts.values()) - counts["success"]
        now = {"count": sum(counts.values()), "successes": counts["success"], "failed_to_download": failed}
        return {**stats, **now, "failed_to_resize": 0, "status_dict": dict(sorted(counts.items()))}

    def _done(self, stats: dict[str, Any], counts: Counter[str], outputs: dict[str, str]) -> Done:
        """The done-record of an imported shard."""
        record = stats.get("clipmill")
        inputs = record.get("inputs") if isinstance(record, dict) else None
        return Done(
            stage="ingest",
            shard=self.shard,
            config={"kind": "img2dataset"},
            counts=dict(counts),
            inputs=inputs if isinstance(inputs, dict) else {"parquet": "not there"},
            outputs=outputs,
        )


def _is_readable(path: str) -> bool:
    """Whether all of a tar can be read."""
    try:
        return bool(shard_keys(path))
    except (DataError, UserError, OSError):
        return False


def _is_right(members: Members, row: dict[str, Any] | None) -> bool:
    """Whether a sample is as its row says, as far as that can be told without a hash of its bytes."""
    image = image_of(members)
    if image is None or row is None or row["status"] != "success":
        return False
    return row.get("sha256") == sha256_bytes(image) or looks_right(image, row)
