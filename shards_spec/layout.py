"""What lies where below ROOT, and the one table of the stages that put it there.

Paths are plain strings, for local folders and fsspec URLs alike. A done-record names files relative to ROOT, so the
folder functions and constants are relative to it (``tar_path(RAW, 3)`` is ``raw/00003.tar``), and the functions that
take ``root`` give the path to open (``raw_tar(root, 3)``). This module imports nothing but the standard library: the
help page of the command line is made from it.
"""

import re
from dataclasses import dataclass

RAW = "raw"
DEDUP = "dedup"
CAPTIONS = "captions"
PLAN = "plan"
SHARDS = "shards"
VOCAB = "vocab"
TEACHER = "teacher"
SELECT = "select"
LOGS = "logs"
TAKEDOWN = "takedown"
FOLDERS = (RAW, DEDUP, CAPTIONS, PLAN, SHARDS, VOCAB, TEACHER, SELECT, LOGS, TAKEDOWN)
REPAIRED = ".repair"  # what a repair moved away, and what it has half made
DATASET = "dataset.json"
STAGING = ".takedown"  # new files of a takedown at work
JOURNAL = f"{STAGING}/journal.json"  # which of them takes which place, once all are there
CLASS_NAMES = "classnames.txt"  # of labelled images: a class per line
SIZES = f"{SHARDS}/sizes.json"  # samples per final shard: open_clip's file

STATS_PATTERN = re.compile(r"(\d+)_stats\.json")
STAGE_FOLDER = re.compile(
    rf"(?P<root>.+)/(?P<folder>{RAW}|{DEDUP}|{PLAN}|{SHARDS}|{CAPTIONS}/[^/]+|{TEACHER}/[^/]+|{SELECT}/[^/]+)"
)
FILE_PATTERN = re.compile(r"(\d+)(\.tar|(-\d+)?\.parquet|_stats\.json)")


@dataclass(frozen=True)
class StageInfo:
    """One stage of the pipeline.

    ``reads`` is the stage whose shards it takes, None for the one that reads the source. ``writes`` is a folder below
    ROOT (or a file), with ``{name}`` where there may be several side by side. ``config`` and ``function`` are the
    dataclass of its options and what runs it, as ``package.module:name``; both are empty for a stage that another one
    runs and that has no command. ``help`` is its line of the help page. ``has_shards``: it makes a shard of each shard
    and returns totals. ``array``: a Slurm array can divide its shards. ``parts`` is a hidden folder below ROOT, as
    ``writes`` is written, for a stage whose result depends on all shards: it makes a part of each shard there, which an
    array can divide, then sums the parts up and deletes the folder.
    """

    name: str
    reads: str | None
    writes: str
    config: str = ""
    function: str = ""
    help: str = ""
    has_shards: bool = True
    array: bool = False
    parts: str = ""

    def folder(self, name: str = "") -> str:
        """The folder or file below ROOT; ``name`` says which of several."""
        return self.writes.format(name=name)

    def array_folder(self, name: str = "") -> str:
        """The folder below ROOT whose shards an array makes; ``name`` says which of several."""
        return (self.parts or self.writes).format(name=name)

    @property
    def is_named(self) -> bool:
        """Whether several may lie side by side; then ``dataset.json`` has a block ``STAGE/NAME`` for each."""
        return "{name}" in self.writes

    @property
    def reads_folder(self) -> str:
        """The folder below ROOT whose shards it takes; raises KeyError for the stage that reads the source."""
        return STAGES[self.reads or ""].writes


STAGES = {
    stage.name: stage
    for stage in (
        StageInfo(
            name="ingest",
            reads=None,
            writes=RAW,
            config="pipeline.ingest.config:IngestConfig",
            function="pipeline.ingest.stage:ingest",
            help="list, folder or img2dataset shards -> ROOT/raw",
            array=True,
        ),
        StageInfo(
            name="dedup",
            reads="ingest",
            writes=DEDUP,
            config="pipeline.dedup.config:DedupConfig",
            function="pipeline.dedup.stage:dedup",
            help="duplicates over all shards -> ROOT/dedup, which pack obeys",
            array=True,
            parts=DEDUP + "/.signatures",
        ),
        StageInfo(
            name="caption",
            reads="ingest",
            writes=CAPTIONS + "/{name}",
            config="pipeline.caption.config:CaptionConfig",
            function="pipeline.caption.stage:caption",
            help="N CoCa captions per image -> ROOT/captions/NAME",
            array=True,
        ),
        StageInfo(name="plan", reads="ingest", writes=PLAN),  # pack --shard-size: which samples stay
        StageInfo(
            name="pack",
            reads="ingest",
            writes=SHARDS,
            config="pipeline.pack.config:PackConfig",
            function="pipeline.pack.stage:pack",
            help="images, captions, WordNet synsets -> ROOT/shards",
            array=True,
        ),
        StageInfo(
            name="vocab",
            reads="pack",
            writes=VOCAB + "/{name}.tsv",
            config="pipeline.labels.vocab_stage:VocabConfig",
            function="pipeline.labels.vocab_stage:vocab",
            help="synsets by frequency -> ROOT/vocab/NAME.tsv",
            has_shards=False,
            array=True,
            parts=VOCAB + "/.{name}",
        ),
        StageInfo(
            name="cache",
            reads="pack",
            writes=TEACHER + "/{name}",
            config="pipeline.cache.config:CacheConfig",
            function="pipeline.cache.stage:cache",
            help="teacher embeddings of K views -> ROOT/teacher/NAME",
            array=True,
        ),
        StageInfo(
            name="select",
            reads="pack",
            writes=SELECT + "/{name}",
            config="pipeline.select.config:SelectConfig",
            function="pipeline.select.stage:select",
            help="which samples and captions are used, by rules -> ROOT/select/NAME",
            array=True,
        ),
        StageInfo(name="cache-lists", reads="cache", writes=TEACHER + "/{name}/lists"),  # cache --export-lists
    )
}
STAGE_COMMANDS = tuple(name for name, stage in STAGES.items() if stage.function)
# What an array of `check` makes below ROOT, a folder of parts for each submission; it is deleted when they are summed
# up. It is no stage: no block of dataset.json is of it, and nothing else reads what it writes.
CHECK = StageInfo(
    name="check",
    reads=None,
    writes=".check/{name}",
    config="pipeline.check.config:CheckJobConfig",
    function="pipeline.check.divided:check_array",
    has_shards=False,
    array=True,
)
SUBMITTED = {**{name: STAGES[name] for name in STAGE_COMMANDS}, CHECK.name: CHECK}  # that `submit` takes, beside train


def stage_output(key: str) -> str | None:
    """The file or folder below ROOT of a block of ``dataset.json`` (``pack``, ``cache/NAME``); None if not known."""
    kind, _, name = key.partition("/")
    stage = STAGES.get(kind)
    return stage.folder(name) if stage is not None and stage.is_named == bool(name) else None


def is_named_folder(folder: str) -> bool:
    """Whether a folder below ROOT is one of several that a stage makes side by side, such as ``teacher/NAME``."""
    head, _, name = folder.partition("/")
    return head in (CAPTIONS, TEACHER, SELECT) and bool(name)


def shard_name(shard: int) -> str:
    """Five digits, as img2dataset writes them; more when there are more than 100,000 shards."""
    return f"{shard:05d}"


def remake_advice(path: str, otherwise: str = "make the shard again") -> str:
    """What brings back a file of a shard that was deleted: its stage looks at the done-record alone.

    ``path`` is the file's; ``otherwise`` is the advice for one that is in no stage's folder.
    """
    folder, _, name = path.rpartition("/")
    match = FILE_PATTERN.fullmatch(name)
    if match is None or STAGE_FOLDER.fullmatch(folder) is None:
        return otherwise
    return f"delete {stats_path(folder, int(match[1]))} and {remake_folder_advice(folder)}"


def remake_folder_advice(folder: str) -> str:
    """What makes the missing files of a stage's folder below ROOT: its command, or a repair.

    Of several folders of a stage, such as ``teacher/NAME``, each was made with options of its own, which `check
    --repair` takes from its records.
    """
    match, advice = STAGE_FOLDER.fullmatch(folder), resume_advice(folder)
    if match is None or "/" not in match["folder"]:
        return advice
    return f"{advice}, or `clipmill check {match['root']} --repair`"


def resume_advice(folder: str) -> str:
    """The command that brings a stage's folder below ROOT to its end; with NAME where there are several."""
    match = STAGE_FOLDER.fullmatch(folder)
    if match is None:
        return "run its stage again"
    root, (head, _, name) = match["root"], match["folder"].partition("/")
    makers = [stage.name for stage in STAGES.values() if stage.function and stage.writes.split("/")[0] == head]
    command = makers[0] if makers else "pack"  # whose plan/ is of no command of its own
    if not name:
        return f"run `clipmill {command} {root}` again"
    return f"run `clipmill {command} {root} --name {name}` again with the options it had"


def tar_path(folder: str, shard: int) -> str:
    """The tar of a shard in a folder."""
    return f"{folder}/{shard_name(shard)}.tar"


def parquet_path(folder: str, shard: int, part: int = 0) -> str:
    """The Parquet file of a shard in a folder; a teacher cache has several ``part`` files of one shard."""
    return f"{folder}/{shard_name(shard)}{f'-{part}' if part else ''}.parquet"


def stats_path(folder: str, shard: int) -> str:
    """The done-record of a shard in a folder."""
    return f"{folder}/{shard_name(shard)}_stats.json"


def captions_folder(captioner: str) -> str:
    """Relative to ROOT: what `caption` wrote under a name."""
    return STAGES["caption"].folder(captioner)


def teacher_folder(teacher: str) -> str:
    """Relative to ROOT: the embeddings that `cache` wrote under a name."""
    return STAGES["cache"].folder(teacher)


def select_folder(name: str) -> str:
    """Relative to ROOT: which samples `select` chose under a name."""
    return STAGES["select"].folder(name)


def raw_tar(root: str, shard: int) -> str:
    """Images, texts and json members as they were ingested."""
    return tar_path(below(root, RAW), shard)


def raw_parquet(root: str, shard: int) -> str:
    """Every row of the source's slice, with its status and reason."""
    return parquet_path(below(root, RAW), shard)


def dedup_parquet(root: str, shard: int) -> str:
    """The keys of a raw shard that are duplicates."""
    return parquet_path(below(root, DEDUP), shard)


def captions_parquet(root: str, captioner: str, shard: int) -> str:
    """The synthetic captions of a raw shard."""
    return parquet_path(below(root, captions_folder(captioner)), shard)


def plan_parquet(root: str, shard: int) -> str:
    """Which samples of a raw shard stay, when final shards have equal sizes."""
    return parquet_path(below(root, PLAN), shard)


def final_tar(root: str, shard: int) -> str:
    """The samples that stay, with their captions and synsets."""
    return tar_path(below(root, SHARDS), shard)


def final_parquet(root: str, shard: int) -> str:
    """Captions, synsets and sizes of a final shard's samples."""
    return parquet_path(below(root, SHARDS), shard)


def teacher_parquet(root: str, teacher: str, shard: int) -> str:
    """The first file of a final shard's embeddings."""
    return parquet_path(below(root, teacher_folder(teacher)), shard)


def select_parquet(root: str, name: str, shard: int) -> str:
    """Which of a final shard's samples are selected."""
    return parquet_path(below(root, select_folder(name)), shard)


def vocabulary_tsv(root: str, name: str) -> str:
    """A vocabulary."""
    return below(root, STAGES["vocab"].folder(name))


def dataset_json(root: str) -> str:
    """What the dataset says of itself."""
    return below(root, DATASET)


def sizes_json(root: str) -> str:
    """Samples per final shard."""
    return below(root, SIZES)


def class_names_txt(root: str) -> str:
    """The classes of labelled images; absent in a dataset of image-text pairs."""
    return below(root, CLASS_NAMES)


def stage_log(root: str, key: str) -> str:
    """One line of JSON for every run of a stage (``pack``, ``cache/NAME``)."""
    return below(root, f"{LOGS}/{key.replace('/', '-')}.jsonl")


def below(root: str, path: str) -> str:
    """``root/path``."""
    return f"{root.rstrip('/')}/{path}"
