"""`clipmill check --repair`: from the raw shards to the caches, each damaged file made again from what is whole.

Stages are mended in their order, so that every one is made of whole shards. What a file was is told by hashes alone: a
file whose bytes are as they were written is not touched, and one that has to be written again with the same bytes keeps
its time. Nothing is deleted that no stage makes again; it is moved to ``ROOT/.repair/moved``.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.check.config import CheckConfig
from pipeline.check.records import Findings, check_vocabularies
from pipeline.check.shard import shard_problems
from pipeline.check.stage import check
from pipeline.check.validators import shard_folder_of
from pipeline.core.runner import ShardsFailed
from pipeline.core.taken_down import check_takedown_hashes
from pipeline.labels.vocab_stage import vocab
from pipeline.pack.stage import final_sizes
from pipeline.repair.classes import restore_class_names
from pipeline.repair.folder import Folder
from pipeline.repair.foreign import ForeignRepair
from pipeline.repair.inventory import Inventory, misplaced, put_back, surplus, take_inventory
from pipeline.repair.raw import RawRepair, RefusedError, find_sources, retry_task, source_tasks
from pipeline.repair.raw_evidence import gather_evidence
from pipeline.repair.recorded import Recorded, is_foreign, is_gone, read_recorded, recorded_hashes, records_of
from pipeline.repair.remake import Remaker, cut_caches, cut_captions, cuttable_caches, stale_shards
from pipeline.repair.settings import vocab_config
from pipeline.repair.totals import is_ours, update_block, write_dataset
from shards_spec.files import DataError, UserError, exists, join, names, read_json, write_json
from shards_spec.layout import (
    DATASET,
    FILE_PATTERN,
    PLAN,
    RAW,
    SHARDS,
    SIZES,
    VOCAB,
    class_names_txt,
    dataset_json,
    resume_advice,
    shard_name,
    sizes_json,
    stage_output,
    vocabulary_tsv,
)
from shards_spec.lock import locked
from shards_spec.manifest import check_no_takedown, finished_shards, remove_stage

LOCK = ".repair.lock"  # below ROOT
SHARDS_NAMED = 5  # of those that a stage makes again because what they were made of has changed
Say = Callable[[str], None]


def repair(config: CheckConfig, say: Say) -> list[str]:
    """Repair a dataset; every action, and everything that is refused, is a line to ``say``.

    Returns the problems that are left, as `check` finds them, or else what was refused; with ``dry_run`` nothing is
    written and all are left.
    Raises UserError when ROOT is no dataset, or when another process repairs it.
    """
    root = config.root
    if not exists(join(root, RAW)) and not exists(join(root, SHARDS)):
        raise UserError(f"{root}: no raw/ and no shards/ in it; it is not a clipmill dataset")
    check_no_takedown(root)
    plain = CheckConfig(root)
    if config.dry_run:
        refused = _Repair(config, say).run()
    else:
        with locked(join(root, LOCK), root):
            refused = _Repair(config, say).run()
    return check(plain) or refused  # captions of an image that is another one now are no problem to `check`


def _shown(shards: list[int]) -> str:
    """The first names of a list of shards."""
    more = f" and {len(shards) - SHARDS_NAMED} more" if len(shards) > SHARDS_NAMED else ""
    return ", ".join(map(shard_name, shards[:SHARDS_NAMED])) + more


class _Repair:
    """One run over a dataset."""

    def __init__(self, config: CheckConfig, say: Say) -> None:
        self._config = config
        self._root = config.root
        self._dry = config.dry_run
        self._say = say
        self._folder = Folder(config.root)
        self._remaker = Remaker(config, self._folder)
        self._recorded = Recorded(config.root, "")
        self._inventory = Inventory(config.root)
        self._broken_plan = list[int]()
        self._refused = list[str]()
        self._ingest_is_unfinished = False

    def run(self) -> list[str]:
        """All steps, in the order of the stages; returns the lines of what was refused."""
        if not self._dry:
            for path in self._folder.finish_killed():
                self._say(f"{path}: finished what a killed repair had made")
        self._move_folders()
        self._take_inventory()
        self._put_back()
        self._take_out_gone()
        self._move_surplus()
        self._mend_dataset()
        if not self._dry or read_recorded(self._root).is_sound:  # a dry run leaves a damaged dataset.json
            with self._saying("takedown"):
                check_takedown_hashes(self._root)
        for key in self._recorded.stages():
            with self._saying(stage_output(key) or key):
                self._mend_stage(key)
            if key == "ingest":
                self._mend_classes()
            if key == "pack":
                if "plan" in self._recorded.stages():
                    self._mend_block("plan")
                self._mend_sizes()
                self._mend_vocabularies()
        if not self._dry:
            self._inventory.keep_times()
            self._folder.forget_changes()
        return self._refused

    @contextlib.contextmanager
    def _saying(self, what: str) -> Iterator[None]:
        """Around a step: what it raises over damaged files is a refusal, and the next step follows."""
        try:
            yield
        except (DataError, UserError, OSError) as error:
            self._refuse(f"{what}: refused: {error}")

    def _refuse(self, line: str) -> None:
        self._refused.append(line)
        self._say(line)

    def _move_folders(self) -> None:
        """Folders in the place of a shard's files."""
        for key in read_recorded(self._root).stages():
            folder = stage_output(key) or ""
            for name in names(join(self._root, folder)):
                if FILE_PATTERN.fullmatch(name) and os.path.isdir(join(self._root, folder, name)):
                    self._move_away(f"{folder}/{name}", "a folder in the place of a file")

    def _take_inventory(self) -> None:
        self._recorded = read_recorded(self._root)
        self._inventory = take_inventory(self._recorded)

    def _put_back(self) -> None:
        """Files that lie in each other's places, records first, since they tell where the others belong."""
        for _ in range(2):
            places = misplaced(self._inventory)
            for path, place in sorted(places.items()):
                self._say(f"{path}: is {place}; it is moved back there")
            if self._dry:
                self._inventory.take_as_whole(places)
                for problem in self._inventory.hidden:
                    self._say(f"{problem}; looked at when its shard's files are in their places")
                for path, place in places.items():
                    if place == DATASET:
                        self._recorded = read_recorded(self._root, join(self._root, path))
            if not places or self._dry:
                return
            put_back(self._root, places, self._folder)
            times = {places.get(path, path): time for path, time in self._inventory.times.items()}
            self._take_inventory()
            self._inventory.times = {**self._inventory.times, **times}

    def _take_out_gone(self) -> None:
        """The blocks of outputs with a name whose whole folder was deleted; what was made of them stays valid."""
        awaited = {key for key, _ in self._inventory.assumed_whole}  # of a dry run, that would put files back
        named = {*self._recorded.blocks, *self._recorded.configs} - awaited
        for key in self._recorded.stages():
            folder = stage_output(key) or ""
            if key not in named or not is_gone(self._root, folder):
                continue
            self._say(f"{folder} is gone: its block is taken out of {DATASET}{self._made_with(folder)}")
            if not self._dry and self._recorded.is_sound:  # else it is written again without it
                remove_stage(self._root, key)
            self._recorded.forget(key)
            self._inventory.damage.pop(key, None)

    def _made_with(self, folder: str) -> str:
        """Which shards say in their records that files of a folder went into them."""
        told = ""
        for key in self._recorded.stages():
            made = [
                done.shard
                for done in records_of(self._root, [key])
                if any(path.startswith(f"{folder}/") for path in done.inputs)
            ]
            if made:
                told += f"; {stage_output(key)}: {_shown(made)}, made with it, stay as they are"
        return told

    def _move_surplus(self) -> None:
        for path in surplus(self._recorded):
            if path in self._inventory.strays or path not in self._inventory.hashes:
                self._move_away(path, "no record names it")
                self._inventory.forget_shard_of(path)

    def _move_away(self, path: str, why: str) -> None:
        moved = self._folder.target(path) if self._dry else self._folder.move_away(path)
        self._say(f"{path}: {why}; it is moved to {moved}")

    def _mend_dataset(self) -> None:
        """Write ``dataset.json`` again when it is damaged, with what is sound in it."""
        recorded = self._recorded
        if recorded.is_sound or not is_ours(recorded):
            return
        self._ingest_is_unfinished = not recorded.is_there and recorded.stages() == ["ingest"]
        if self._ingest_is_unfinished:
            return
        source = "its source is not known any more"
        if recorded.source is not None:
            source = f"source {recorded.source}, as it can be read"
        self._say(f"{DATASET}: damaged or not there; written again from the records, {source}")
        if self._dry:
            return
        self._folder.note_lost_blocks([key for key in recorded.stages() if key not in recorded.blocks])
        if os.path.isdir(dataset_json(self._root)):
            self._folder.move_away("dataset.json")
        write_dataset(recorded)

    def _mend_stage(self, key: str) -> None:
        """One stage with shards: what is broken or stale, then its totals."""
        if self._is_unfinished(key):
            return
        if key == "ingest":
            self._mend_raw()
        else:
            self._mend_shards(key)
        if self._recorded.is_sound or is_ours(self._recorded):
            self._mend_block(key)

    def _is_unfinished(self, key: str) -> bool:
        """Whether a stage has not ended yet, which is no damage."""
        recorded = self._recorded
        if self._ingest_is_unfinished:
            self._refuse(f"{RAW}: refused: without dataset.json `ingest` has not finished; run it again, then repair")
            return True
        if key in recorded.blocks or not recorded.is_sound or key in self._folder.lost_blocks():
            return False
        if key == "ingest" or not finished_shards(join(self._root, stage_output(key) or "")):
            return key != "ingest"
        folder = stage_output(key) or ""
        self._say(f"{folder}: has not been finished; {resume_advice(join(self._root, folder))}, refused here")
        return True

    def _mend_block(self, key: str) -> None:
        if self._dry and self._inventory.damage.get(key):
            return  # its shards are made again first
        if not self._dry:
            self._recorded.blocks = read_recorded(self._root).blocks
        if update_block(self._recorded, key, dry_run=self._dry):
            self._say(
                f"dataset.json: the block of {key} is not the sum of its shards; written again from their records"
            )

    # raw shards

    def _mend_raw(self) -> None:
        broken = dict(self._inventory.damaged("ingest"))
        shard_folder = shard_folder_of("ingest")
        for shard in finished_shards(join(self._root, RAW)):
            is_assumed = ("ingest", shard) in self._inventory.assumed_whole
            if shard not in broken and not is_assumed and (problems := shard_problems(self._root, shard_folder, shard)):
                broken[shard] = self._short(problems[0])
        if not broken:
            return
        config = self._recorded.config("ingest") or {"kind": "img2dataset"}  # without any record of ours it is foreign
        sources = find_sources(self._recorded, self._config.source)
        tasks = source_tasks(self._recorded, set(broken), self._config.source)
        keys = self._recorded.stages()
        hashes = recorded_hashes(self._root, keys)
        for shard, problem in sorted(broken.items()):
            try:
                if config.get("kind") == "img2dataset" or is_foreign(self._root, shard):
                    work: Any = ForeignRepair(self._recorded, self._folder, shard, sources)
                else:
                    evidence = gather_evidence(self._recorded, shard, hashes=hashes, keys=keys)
                    evidence.use_task(tasks.get(shard) or retry_task(evidence))
                    work = RawRepair.plan(evidence, self._folder, self._recorded, sources)
                self._say(f"{problem}; {work.describe()}")
                if not self._dry:
                    self._say(f"{RAW}/{shard_name(shard)}: {work.run().describe()}")
            except (RefusedError, UserError, DataError, OSError) as error:
                self._refuse(f"{problem}; refused: {error}")

    # stages after it

    def _mend_shards(self, key: str) -> None:
        """A stage that is made of another one."""
        broken = dict(self._inventory.damaged(key))
        cut = self._cut(key)
        if not self._dry:
            broken = self._still_broken(key, broken)
        stale = [shard for shard in self._stale(key) if shard not in {*broken, *cut}]
        if not broken and not stale and not (key == "pack" and self._broken_plan):
            return
        for shard in sorted(broken):
            self._say(f"{broken[shard]}; to be made again")
        if key == "plan":  # which `pack` makes, when its own shards are known
            self._broken_plan = sorted(broken)
            return
        if stale:
            line = f"{stage_output(key)}: {_shown(stale)} were made of what has changed; to be made again"
            self._say(line + self._condition)
        record = self._recorded.config(key)
        if record is None:
            self._refuse(f"{stage_output(key)}: refused: no record says how it was made; run its stage again")
            return
        again = [(stage_output(key) or "", shard) for shard in sorted(broken)]
        again += [(PLAN, shard) for shard in self._broken_plan] if key == "pack" else []
        try:
            stage = self._remaker.prepare(key, record)
            if not self._dry:
                self._remaker.run(stage, again)
        except RefusedError as error:
            self._refuse(f"{stage_output(key)}: refused: {error}")

    def _stale(self, key: str) -> list[int]:
        """Shards that were made of what has changed; none in a dry run where files are not in their places yet."""
        return [] if self._dry and self._inventory.assumed_whole else stale_shards(self._root, key)

    def _cut(self, key: str) -> list[int]:
        """Where only rows vanished, shorten what was made of them; no model is needed for that. Returns the shards."""
        kind = key.partition("/")[0]
        cut = list[int]()
        try:
            if kind == "cache" and self._dry:
                cut = cuttable_caches(self._root, key)
            elif kind == "caption" and not self._dry:
                cut = cut_captions(self._root, key, self._folder)
            elif kind == "cache" and not self._dry:
                cut = cut_caches(self._root, key, self._folder)
        except (DataError, UserError, OSError) as error:
            self._say(f"{stage_output(key)}: {self._short(str(error))}")
        for shard in cut:
            line = f"{stage_output(key)}/{shard_name(shard)}: brought in line with its shard; nothing computed anew"
            self._say(line + self._condition)
        return cut

    @property
    def _condition(self) -> str:
        """What a dry run adds where damaged shards may come back as they were: then nothing follows from them."""
        return "; looked at when the damaged shards are whole" if self._dry and self._inventory.damage else ""

    def _still_broken(self, key: str, damaged: dict[int, str]) -> dict[int, str]:
        """Shards with damaged files of their own, or that do not fit the shards that they were made of."""
        shard_folder = shard_folder_of(key)
        broken = dict(damaged)
        if self._refused:
            return broken  # whole shards may fail to fit what is still broken before them
        stale = set(stale_shards(self._root, key))
        for shard in finished_shards(join(self._root, shard_folder.folder)):
            if shard in broken or shard in stale:
                continue
            if problems := shard_problems(self._root, shard_folder, shard):
                broken[shard] = self._short(problems[0])
        return broken

    # files beside the shards

    def _mend_classes(self) -> None:
        line = restore_class_names(self._recorded, find_sources(self._recorded, self._config.source), dry_run=self._dry)
        if line is not None:
            self._say(f"{class_names_txt('').strip('/')}: {line}")

    def _mend_sizes(self) -> None:
        """Write ``sizes.json`` again when it is not what the final shards' records say."""
        if self._dry and self._inventory.damage.get("pack"):
            return  # they are made again first
        path = sizes_json(self._root)
        total = len(finished_shards(join(self._root, SHARDS)))
        if total != self._recorded.number_of_shards("pack"):
            return  # one is still missing, which has been said
        try:
            expected = final_sizes(self._root, total)
        except (DataError, UserError):
            return  # a final shard is still broken, which has been said
        try:
            if read_json(path) == expected:
                return
        except (DataError, UserError, OSError):
            pass
        self._say(f"{SIZES}: not the sizes of the final shards; written again from their records")
        if not self._dry:
            if os.path.isdir(path):
                self._folder.move_away(SIZES)
            write_json(path, expected)

    def _mend_vocabularies(self) -> None:
        recorded = self._recorded
        known = recorded.vocabularies()
        for name in names(join(self._root, VOCAB)):
            if name.removesuffix(".tsv") not in known or not name.endswith(".tsv"):
                self._move_away(f"{VOCAB}/{name}", "no vocabulary")
        for name in known:
            problem = self._vocabulary_problem(name)
            if problem is None:
                continue
            key = f"vocab/{name}"
            header = recorded.configs.get(key) or recorded.blocks.get(key, {}).get("config")
            if header is None and key not in recorded.blocks:
                self._move_away(f"{VOCAB}/{name}.tsv", f"{problem}, and no record says how it was made")
                continue
            self._say(f"{VOCAB}/{name}.tsv: {problem}; counted again")
            self._count(name, header or {})

    def _vocabulary_problem(self, name: str) -> str | None:
        if not exists(vocabulary_tsv(self._root, name)):
            return "is not there"
        findings = Findings()
        check_vocabularies(self._root, self._recorded.blocks, findings)
        path = vocabulary_tsv(self._root, name)
        problem = next((problem for problem in findings.problems if path in problem), None)
        return None if problem is None else self._short(problem.removeprefix(path).lstrip(": "))

    def _count(self, name: str, header: dict[str, Any]) -> None:
        if self._dry:
            return
        try:
            config = vocab_config(self._root, name, header)
            if os.path.isdir(vocabulary_tsv(self._root, name)):
                self._folder.move_away(f"{VOCAB}/{name}.tsv")
            vocab(config)
        except (UserError, DataError, ShardsFailed, OSError, KeyError) as error:
            self._say(f"{VOCAB}/{name}.tsv: refused: {error}")

    def _short(self, problem: str) -> str:
        """A problem without ROOT and without `check`'s advice."""
        return problem.replace(f"{self._root.rstrip('/')}/", "").partition("; ")[0]
