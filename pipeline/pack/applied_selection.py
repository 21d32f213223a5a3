"""`pack --select`: what `clipmill select` chose of final shards, by the raw shards that they were made from."""

from dataclasses import dataclass
from typing import NamedTuple

from shards_spec.files import DataError, UserError, join
from shards_spec.layout import RAW, SELECT, parquet_path, raw_tar, select_folder, select_parquet, tar_path
from shards_spec.manifest import file_hash, finished_shards, read_dataset, read_done
from shards_spec.selection import CAPTIONS_OF, check_begun, read_selection

NOT_SELECTED = "not among the samples that select had"  # a reason on disk


class ChosenSample(NamedTuple):
    """Why a sample is left out, None where it is not; and the captions that it keeps, None for all."""

    reason: str | None
    captions: list[int] | None


@dataclass(frozen=True)
class AppliedSelection:
    """A selection by raw shards; sent to worker processes. ``shards`` maps a raw shard to the selection's shards."""

    name: str
    shards: dict[int, tuple[int, ...]]

    def inputs(self, raw_shard: int) -> list[tuple[str, str]]:
        """(folder, path) of the files that belong to a raw shard."""
        folder = select_folder(self.name)
        return [(folder, parquet_path(folder, shard)) for shard in self.shards.get(raw_shard, ())]

    def choices(self, root: str, raw_shard: int) -> dict[str, ChosenSample]:
        """Key to choice of the samples of the final shards that a raw shard went into. Raises DataError."""
        choices = dict[str, ChosenSample]()
        for shard in self.shards.get(raw_shard, ()):
            selection = read_selection(root, self.name, shard)
            columns = (selection.keys, selection.reasons, selection.captions)
            choices |= {key: ChosenSample(reason, captions) for key, reason, captions in zip(*columns, strict=True)}
        return choices


def find_applied_selection(root: str, name: str, captions_of: dict[str, object]) -> AppliedSelection:
    """The selection of a name, finished and made from the present raw shards.

    ``captions_of`` is what decides which captions a sample has (`CAPTIONS_OF`): a selection counts them. Raises
    UserError, and DataError when it is of other raw shards.
    """
    check_begun(root, name)
    block = read_dataset(root)["stages"].get(f"select/{name}")
    shards = finished_shards(join(root, select_folder(name)))
    if block is None or block.get("shards") != len(shards):
        raise UserError(
            f"--select {name}: {join(root, SELECT, name)} is not finished; run `clipmill select {root} --name {name}` "
            "with its rules first"
        )
    counted_of = block.get("config", {}).get(CAPTIONS_OF)
    if counted_of != captions_of:
        raise UserError(
            f"--select {name} counts the captions of shards packed with {counted_of}, not with {captions_of}: pack "
            f"with those options, or run `clipmill select {root} --name {name}` again after packing with these"
        )
    by_raw = dict[int, tuple[int, ...]]()
    for shard in shards:
        done = read_done(join(root, select_folder(name)), shard)
        if done is None:
            continue
        for raw in done.raw_shards:
            tar = tar_path(RAW, raw)
            if file_hash(root, RAW, raw, tar) != done.inputs[tar]:
                raise DataError(
                    f"{select_parquet(root, name, shard)}: made from another {raw_tar(root, raw)} than the one there; "
                    f"pack without --select and run `clipmill select {root} --name {name}` again"
                )
            by_raw[raw] = (*by_raw.get(raw, ()), shard)
    return AppliedSelection(name, by_raw)


def require_samples(root: str, name: str) -> None:
    """Raise UserError unless a finished selection has a sample: shards of none would replace those that are there."""
    folder = join(root, select_folder(name))
    records = (read_done(folder, shard) for shard in finished_shards(folder))
    if not any(done is not None and done.successes for done in records):
        raise UserError(
            f"--select {name}: no sample is selected, so that no shard would have one; run `clipmill select {root} "
            f"--name {name} --overwrite` with weaker rules"
        )
