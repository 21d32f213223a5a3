"""The captions of one shard's images, whoever wrote them: what is wrong with one, what is counted, the file."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa

from pipeline.caption.requests import GeneratedCaption
from pipeline.core.runner import Stage
from shards_spec.files import UserError, join
from shards_spec.manifest import finished_shards, read_done
from shards_spec.shard_writer import ShardWriter

LOOP = re.compile(r"(?<!\S)(\S+(?: \S+){0,3})(?: \1){2,}(?!\S)")  # up to four words, three times in a row
FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("captions", pa.list_(pa.string())),
    pa.field("logprobs", pa.list_(pa.float32())),
    pa.field("num_tokens", pa.list_(pa.int32())),
]
SIMILARITY_FIELDS = [
    pa.field("similarities", pa.list_(pa.float32())),
    pa.field("original_similarity", pa.float32()),
]
REASON_FIELD = pa.field("reason", pa.string())
WRITERS = {"from": "--from", "server_model": "--server", "weights_sha256": "a model"}  # by a setting of each alone


def check_writer(root: str, stage: Stage, overwrite: bool) -> None:
    """Raise UserError where the finished captions of this name came in another way, unless they are made again."""
    folder = join(root, stage.folder)
    finished = [] if overwrite else finished_shards(folder)
    done = read_done(folder, finished[0]) if finished else None
    if done is None:
        return
    before, now = (next((WRITERS[name] for name in WRITERS if name in own), "") for own in (done.config, stage.config))
    if before and before != now:
        raise UserError(
            f"{stage.folder} came from {before}, not from {now}: take another --name, or make it again with --overwrite"
        )


def caption_defect(text: str, others: list[str]) -> str | None:
    """Why a caption should be sampled again, None when it is fine.

    ``empty``; ``degenerate``: no letter, or words in a loop; ``repeated``: one of the image's ``others`` is the same.
    """
    if not text:
        return "empty"
    if _is_degenerate(text):
        return "degenerate"
    return "repeated" if text in others else None


@lru_cache(maxsize=2**16)  # a shard's captions: they are counted at its end, when a GPU has nothing to do
def _is_degenerate(text: str) -> bool:
    return not any(letter.isalpha() for letter in text) or LOOP.search(text) is not None


@dataclass
class ImageCaptions:
    """One image's captions by index, in the order in which the indices were first asked for.

    ``reason`` says why an image that may well decode has none.
    """

    captions: dict[int, GeneratedCaption] = field(default_factory=dict)
    original_similarity: float | None = None
    reason: str | None = None

    def defect(self, index: int) -> str | None:
        """What is wrong with a caption, compared with all others of the image."""
        others = [caption.text for other, caption in self.captions.items() if other != index]
        return caption_defect(self.captions[index].text, others)


class ShardCaptions:
    """The images of a shard by key, in the shard's order, and how many captions were sampled again."""

    def __init__(self) -> None:
        self.rows = dict[str, ImageCaptions]()
        self.redrawn = 0

    def counters(self) -> dict[str, int]:
        """Numbers of captions: all, sampled again, cut at the longest length, and the defects that are left."""
        counters = Counter({"redrawn": self.redrawn})
        for row in self.rows.values():
            counters["captions"] += len(row.captions)
            counters["cut at max_tokens"] += sum(not caption.ended for caption in row.captions.values())
            texts = [caption.text for caption in row.captions.values()]
            for position, text in enumerate(texts):
                defect = caption_defect(text, texts[:position])
                if defect:
                    counters[defect] += 1
        return {name: number for name, number in sorted(counters.items()) if number}

    def write(self, root: str, stage: Stage, shard: int, more_fields: list[pa.Field]) -> dict[str, str]:
        """Write the shard's Parquet file, with ``more_fields`` than every captioner has; returns its path to sha256."""
        schema = pa.schema([*FIELDS, *more_fields], {"clipmill": json.dumps(stage.config)})
        files = ShardWriter(root, stage.folder, shard)
        columns = self._columns()
        files.write_parquet(pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema))
        return files.outputs

    def _columns(self) -> dict[str, list[Any]]:
        """Columns of the Parquet file; lists of rows would take twenty times as long to become a table."""
        rows = [(key, row, None if row.reason else list(row.captions.values())) for key, row in self.rows.items()]

        def of_each(name: str) -> list[list[Any] | None]:
            """One attribute of all captions, image by image."""
            return [None if own is None else [getattr(caption, name) for caption in own] for _, _, own in rows]

        return {
            "key": [key for key, _, _ in rows],
            "captions": of_each("text"),
            "logprobs": of_each("logprob"),
            "num_tokens": of_each("num_tokens"),
            "similarities": of_each("similarity"),
            "original_similarity": [row.original_similarity for _, row, _ in rows],
            "reason": [row.reason for _, row, _ in rows],
        }
