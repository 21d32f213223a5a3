"""The configs of stages as their records have them, and the commands that would run them."""

import dataclasses
import shlex
from typing import Any

from pipeline.cache.config import CacheConfig
from pipeline.caption.config import CaptionConfig
from pipeline.caption.decoding import Decoding
from pipeline.dedup.config import DedupConfig
from pipeline.labels.labeler import FUNCTION_WORDS, LabelRule
from pipeline.labels.vocab_stage import VocabConfig
from pipeline.pack.caption_cleaning import RULES_VERSION
from pipeline.pack.config import PackConfig
from pipeline.select.config import SelectConfig
from shards_spec.files import UserError
from shards_spec.layout import teacher_parquet
from shards_spec.messages import flag
from shards_spec.precision import precision_of
from shards_spec.selection import CAPTIONS_OF
from shards_spec.views import parse_view_spec
from shards_spec.vocab import rule_of

Record = dict[str, Any]  # a stage's config as a done-record has it
NOUNS = "nouns:"
SELECT_OPTIONS = ("where", "captions_where", "teacher", "captioner", CAPTIONS_OF)
SELECT_NUMBERS = ("semantic_duplicates", "cells", "top", "by", "balance", "weight", "seed")


def dedup_config(root: str, record: Record) -> DedupConfig:
    """Of `dedup`."""
    return DedupConfig(root, near_bits=record["near_bits"])


def caption_config(root: str, name: str, record: Record, model: str, device: str) -> CaptionConfig:
    """Of `caption`, with a model that may be the recorded one."""
    return CaptionConfig(
        root,
        model,
        record["pretrained"],
        name,
        record["num_captions"],
        Decoding(**{field.name: record[field.name] for field in dataclasses.fields(Decoding)}),
        redraws=record["redraws"],
        similarity=record.get("similarity", False),
        precision=record["precision"],
        batch_size=record["batch_size"],
        seed=record["seed"],
        device=device,
    )


def cache_config(root: str, name: str, record: Record, model: str, device: str) -> CacheConfig:
    """Of `cache`, with a teacher that may be the recorded one. Raises DataError for views of another Pillow."""
    spec = parse_view_spec(teacher_parquet(root, name, 0), record["views"])
    soft = record.get("soft_labels")
    return CacheConfig(
        root,
        model,
        record["pretrained"],
        name,
        record["num_views"],
        soft_labels=soft,
        dtype="float16" if soft is not None else record["dtype"],
        spec=spec,
        augment=spec.scale is not None,
        precision=precision_of(record["precision"]),
        device=device,
    )


def pack_config(root: str, record: Record, stop_words: str) -> PackConfig:
    """Of `pack`; ``stop_words`` is where a list of words will be, if it needs one.

    Raises UserError when this version makes other shards from these settings.
    """
    captioner = record["captioner"] or "none"
    rule = label_rule(record)
    words = rule.stop_words
    source = stop_words if words else None
    if words == FUNCTION_WORDS:
        source = "function"
    if rule.describe() != rule_of(record) or record["caption_hygiene"] != RULES_VERSION:
        raise UserError(
            f"{root}: its shards were packed by rules of another version ({record['rule']}, captions cleaned by "
            f"{record['caption_hygiene']}); `clipmill pack --overwrite` makes all of them again"
        )
    return PackConfig(
        root,
        (captioner,) if isinstance(captioner, str) else tuple(captioner),
        min_similarity=record.get("min_similarity"),
        nouns_only=rule.nouns_only,
        tagger=rule.tagger,
        collocations=rule.collocations,
        synonyms=rule.synonyms,
        stop_words=source,
        max_caption_chars=record["max_caption_chars"],
        shard_size=record.get("shard_size"),
        select=record.get("select"),
        workers=1,
    )


def label_rule(record: Record) -> LabelRule:
    """The rule of a record, from its name."""
    options = str(record["rule"]).split("+")[1:]
    tagger = next((option.removeprefix(NOUNS) for option in options if option.startswith(NOUNS)), None)
    return LabelRule(
        nouns_only=tagger is not None,
        **({} if tagger is None else {"tagger": tagger}),
        collocations="collocations" in options,
        synonyms="synonyms" in options,
        stop_words=tuple(record.get("stop_words", ())),
    )


def select_config(root: str, name: str, record: Record) -> SelectConfig:
    """Of `select`. Raises UserError for rules that only its command line can name."""
    if unknown := sorted(
        name for name, value in record.items() if value and name not in {*SELECT_OPTIONS, *SELECT_NUMBERS}
    ):
        raise UserError(f"its rules ({', '.join(unknown)}) have to be given again; run `clipmill select --name {name}`")
    return SelectConfig(
        root,
        name,
        where=tuple(record["where"]),
        captions_where=tuple(record["captions_where"]),
        teacher=tuple(record["teacher"]),
        captioner=record["captioner"],
        workers=1,
        **{name: record[name] for name in SELECT_NUMBERS if name in record},
    )


def vocab_config(root: str, name: str, header: Record) -> VocabConfig:
    """Of `vocab`, from a vocabulary's header. Raises UserError for one that was imported from CatLIP's file."""
    if header.get("source") == "catlip":
        raise UserError(
            f"vocab/{name}.tsv was imported from CatLIP's file; run "
            f"`clipmill vocab {shlex.quote(root)} --name {name} --import-catlip FILE`"
        )
    return VocabConfig(root, name, header["min_count"], header["top_k"], header["source"])


def command_line(command: str, config: Any) -> str:
    """The command that runs a stage with a config: all options that differ from their defaults."""
    words = ["clipmill", command, shlex.quote(config.root), *_options(config)]
    return " ".join(words)


def _options(config: Any) -> list[str]:
    words = list[str]()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(value):
            words += _options(value)
        elif field.name != "root" and value != default and field.name not in ("workers", "threads"):
            words += _option(field.name, value)
    return words


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    values = value if isinstance(value, tuple) else (value,)
    return [flag(name), *(shlex.quote(str(part)) for part in values)]
