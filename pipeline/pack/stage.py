"""Stage `pack`: raw shard + captions + synsets → final shard. The only stage after ingest that writes images.

Raw shard i becomes final shard i, or, with a shard size, the samples that stay become shards of equal size (`reshard`).
Raw shards at the end of which nothing stays make no shards of their own: the last final shard counts their losses.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from pipeline.core.runner import (
    ALL,
    Root,
    RunOptions,
    ShardAssignment,
    Stage,
    Summary,
    Task,
    read_compatible_record,
    run_stage,
    upstream_shards,
)
from pipeline.dedup.stage import check_fresh
from pipeline.labels.labeler import FUNCTION_WORDS, LabelRule, load_labeller
from pipeline.labels.wordnet import find_wordnet
from pipeline.pack import caption_cleaning as hygiene
from pipeline.pack.final_shard import NEED_SIMILARITY, Choice, Part, write_final_shard
from pipeline.pack.reshard import forget_plan, inputs_of, plan, ranges
from shards_spec.files import DataError, UserError, exists, join, names, read_bytes, write_json
from shards_spec.layout import (
    CAPTIONS,
    DEDUP,
    RAW,
    SHARDS,
    captions_folder,
    captions_parquet,
    shard_name,
    sizes_json,
    stats_path,
    tar_path,
)
from shards_spec.lock import locked
from shards_spec.manifest import finished_shards, read_done
from shards_spec.parquet import column_names

log = logging.getLogger(__name__)
LOCK = ".pack.lock"  # below ROOT


@dataclass(frozen=True)
class PackConfig:
    """Join images, captions and WordNet synsets into the final shards."""

    root: Root
    """the dataset; reads raw/, captions/NAME/ and, where it is there, dedup/; writes shards/"""
    captioner: tuple[str, ...] = ()
    """folders below captions/, joined in this order; by default the only one there; 'none': original captions alone"""
    min_similarity: float | None = None
    """leave out captions, original ones too, of a lower cosine with the image; needs caption --similarity"""
    wordnet: str | None = None
    """folder (or NLTK's zip) with WordNet 3.0's index.noun, data.noun, noun.exc; by default NLTK's or Debian's"""
    download_wordnet: bool = False
    """fetch WordNet with NLTK's downloader when it is nowhere"""
    nouns_only: bool = False
    """synsets of nouns only, by part-of-speech tag, as CatLIP's paper says; its released code takes every word"""
    tagger: str = "nltk"
    """tagger for --nouns-only: nltk, or MODULE:FUNCTION from a list of words to a list of Penn tags"""
    collocations: bool = False
    """synsets of nouns of several words, the longest first"""
    synonyms: bool = False
    """keep synsets whose first name is another word: bike is a motorcycle then"""
    stop_words: str | None = None
    """words that get no synset: a text file, or 'function' for a short list of function words"""
    max_caption_chars: int = 10_000
    """samples with a longer original caption are left out; 0: none is"""
    shard_size: int | None = None
    """samples in every final shard but the last; by default final shard i is what stays of raw shard i"""
    workers: int = os.cpu_count() or 1
    """processes"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers {self.workers} must be at least 1")
        if self.shard_size is not None and self.shard_size < 1:
            raise UserError(f"shard_size {self.shard_size} must be at least 1")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise UserError(f"min_similarity {self.min_similarity} must be a cosine, -1 to 1")
        if self.max_caption_chars < 0:
            raise UserError(f"max_caption_chars {self.max_caption_chars} must be 0 (no limit) or more")

    @property
    def rule(self) -> LabelRule:
        """How captions become synsets. Raises UserError when the file of stop words cannot be read."""
        stop = _stop_words(self.stop_words) if self.stop_words else ()
        return LabelRule(self.nouns_only, self.tagger, self.collocations, self.synonyms, stop)


def _stop_words(source: str) -> tuple[str, ...]:
    if source == "function":
        return FUNCTION_WORDS
    try:
        words = read_bytes(source).decode().lower().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--stop-words {source} is no text file that can be read ({error})") from error
    return tuple(sorted(set(words)))


def pack(config: PackConfig, assignment: ShardAssignment = ALL) -> Summary:
    """Run the stage and write ``shards/sizes.json``. Raises UserError, also when another one runs, and ShardsFailed.

    With a shard size there is one ``assignment``: where a final shard begins depends on all raw ones.
    """
    shards = upstream_shards(config.root, RAW, "ingest")
    if assignment is not ALL:  # its claims keep it apart from others
        return _pack(config, assignment, shards)
    with locked(join(config.root, LOCK), join(config.root, SHARDS)):
        return _pack(config, assignment, shards)


def _pack(config: PackConfig, assignment: ShardAssignment, shards: list[int]) -> Summary:
    root, choice = config.root, _choice(config, shards)
    wordnet, rule = str(find_wordnet(config.wordnet, config.download_wordnet)), config.rule
    load_labeller(wordnet, rule)  # an unusable WordNet or tagger is an error now, not in a worker
    captioner, deciding = _deciding(choice)
    size = {} if config.shard_size is None else {"shard_size": config.shard_size}
    stage = Stage("pack", SHARDS, {**captioner, **rule.describe(), **deciding, **size})
    if not config.overwrite:
        read_compatible_record(join(root, SHARDS), stage, 0)  # before a plan is made for nothing
    if config.shard_size is None:
        forget_plan(root)
        last = _last(root, shards, choice)
        tasks: Iterable[Task] = _one_to_one(root, shards, choice, assignment, last)
        total = last + 1
    else:
        planned = plan(root, shards, choice, {**captioner, **deciding}, config.workers, config.overwrite)
        staying = planned.counts.get("success", 0)
        tasks, total = ranges(root, shards, choice, config.shard_size), max(1, -(-staying // config.shard_size))
    work = partial(write_final_shard, choice=choice, wordnet=wordnet, rule=rule)

    def run(tasks: Iterable[Task], total: int, overwrite: bool, assignment: ShardAssignment) -> Summary:
        workers = min(config.workers, total)
        options = RunOptions(workers=workers, assignment=assignment, overwrite=overwrite, total=total)
        return run_stage(root, stage, tasks, work, options)

    summary = run(tasks, total, config.overwrite, assignment)
    if not assignment.is_complete:
        return summary
    sizes = _sizes(root, summary.shards)
    if config.shard_size is None:
        last = max((shard for shard, size in enumerate(sizes.values()) if size), default=0)
        if last + 1 < len(sizes) and not exists(sizes_json(root)):  # one that was finished with empty shards stays so
            again = run(_one_to_one(root, shards, choice, ALL, last), last + 1, False, ALL)
            summary, sizes = (
                replace(again, made=min(summary.made, again.shards), seconds=summary.seconds),
                _sizes(root, last + 1),
            )
        _warn_of_empty(sizes)
    write_json(sizes_json(root), sizes)
    return summary


def _warn_of_empty(sizes: dict[str, int]) -> None:
    if empty := [name for name, size in sizes.items() if not size]:
        log.warning(
            "pack: %d final shards have no sample (%s first), so that numbers have no gaps; for readers that refuse "
            "such (Megatron-Energon; datasets without features= when the first is one) --shard-size makes none",
            len(empty), empty[0],
        )  # fmt: skip


def _last(root: str, shards: list[int], choice: Choice) -> int:
    """The number of the last final shard: that of the last raw one, or what an earlier run found to be the last one of
    which a sample stays, when the raw shards behind it are still the same."""
    there = finished_shards(join(root, SHARDS))
    done = read_done(join(root, SHARDS), there[-1]) if there else None
    if done is None or there[-1] >= shards[-1] or tar_path(RAW, shards[-1]) not in done.inputs:
        return shards[-1]
    return there[-1] if done.inputs == _merged(root, shards[there[-1] :], choice).inputs else shards[-1]


def _one_to_one(root: str, shards: list[int], choice: Choice, assignment: ShardAssignment, last: int) -> Iterator[Task]:
    """A task per raw shard of the assignment up to ``last``; the last one takes in those behind, which are empty."""
    for shard in filter(assignment.claim, shards[: last + 1]):
        yield _merged(root, shards[last:] if shard == last else [shard], choice)


def _merged(root: str, shards: list[int], choice: Choice) -> Task:
    """One final shard of several raw ones."""
    inputs = {path: digest for shard in shards for path, digest in inputs_of(root, shard, choice).items()}
    return Task(shards[0], inputs, tuple(map(Part, shards)))


def _choice(config: PackConfig, shards: list[int]) -> Choice:
    """What stays, once captions and dedup's lists are there for every raw shard. Raises UserError when they are not."""
    captioners = _pick_captioners(config)
    for name in captioners:
        captioned = upstream_shards(config.root, captions_folder(name), f"caption/{name}")
        if captioned != shards:
            raise UserError(f"captions/{name} has {len(captioned)} shards, raw/ has {len(shards)}: run caption again")
    if config.min_similarity is not None:
        _need_similarities(config, captioners, shards)
    if deduplicated := exists(join(config.root, DEDUP)):
        check_fresh(config.root, shards)
    return Choice(captioners, deduplicated, config.max_caption_chars, config.min_similarity)


def _deciding(choice: Choice) -> tuple[dict[str, object], dict[str, object]]:
    """The part of the config that decides which samples and captions stay: the captioners, and the rest."""
    captioner = choice.captioners[0] if len(choice.captioners) == 1 else list(choice.captioners) or None
    least = {} if choice.min_similarity is None else {"min_similarity": choice.min_similarity}
    hygienic = {"caption_hygiene": hygiene.VERSION, "max_caption_chars": choice.max_caption_chars}
    return {"captioner": captioner}, {**hygienic, **least}


def _pick_captioners(config: PackConfig) -> tuple[str, ...]:
    if config.captioner == ("none",):
        return ()
    there = names(join(config.root, CAPTIONS))
    if unknown := [name for name in config.captioner if name not in there]:
        also = " ('none' stands alone)" if "none" in unknown else ""
        raise UserError(f"no captions/{unknown[0]} in {config.root}; there: {there or 'none'}{also}")
    if len(set(config.captioner)) < len(config.captioner):
        raise UserError(f"--captioner {' '.join(config.captioner)}: name each once")
    if not config.captioner and len(there) > 1:
        raise UserError(f"several captioners in {config.root}/captions: {there}; say --captioner NAME, or several")
    return config.captioner or tuple(there)


def _need_similarities(config: PackConfig, captioners: tuple[str, ...], shards: list[int]) -> None:
    if not captioners:
        raise UserError(f"{NEED_SIMILARITY}, and no captions are packed; leave it out")
    for name in captioners:
        path = captions_parquet(config.root, name, shards[0])
        with contextlib.suppress(DataError):  # the shard's own work tells a broken one
            if "similarities" not in column_names(path):
                raise UserError(f"captions/{name} has no column similarities: {NEED_SIMILARITY}")


def _sizes(root: str, total: int) -> dict[str, int]:
    sizes = {}
    for shard in range(total):
        done = read_done(join(root, SHARDS), shard)
        if done is None:
            raise UserError(
                f"{stats_path(join(root, SHARDS), shard)} is not there any more: does another pack run "
                "on this ROOT? Run this one again when it has ended"
            )
        sizes[f"{shard_name(shard)}.tar"] = done.successes
    return sizes
