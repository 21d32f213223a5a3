"""Soft labels as a teacher cache stores them: a classifier's largest probabilities of a view, or all of its logits.

A row of ``soft_V`` is a record of little-endian numbers. Where the k largest of C probabilities are kept: k uint16
classes, from the most probable one on, then their k float16 probabilities (softmax at temperature 1), then one float32,
the rest: the sum of all other probabilities. Where all are kept: C float16 logits, less the largest one.

All are logits because float16 has no probabilities between 0 and 6e-8 and few below 6e-5: the tails of large class
lists would be lost, and with them every temperature above 1. Logits less the largest are most exact where probabilities
are large. Of a few probabilities another temperature would need the shape of the rest, which is not there.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shards_spec.files import DataError
from shards_spec.layout import resume_advice

if TYPE_CHECKING:
    from torch import Tensor

Kept = int | Literal["all"]
MOST_CLASSES = 1 << 16  # that uint16 counts
LEAST_LOGIT = -65504.0  # float16's
SUM_TOLERANCE = 2e-3  # of probabilities that were rounded to float16


@dataclass(frozen=True)
class SoftLabelFormat:
    """How a row is stored: ``kept`` probabilities of ``classes`` classes, fewer than these, or all as logits."""

    classes: int
    kept: Kept

    @cached_property
    def record(self) -> "np.dtype[Any]":
        """The numbers of a row."""
        if self.kept == "all":
            return np.dtype([("logits", "<f2", (self.classes,))])
        return np.dtype([("classes", "<u2", (self.kept,)), ("probabilities", "<f2", (self.kept,)), ("rest", "<f4")])

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self.record.itemsize

    def encode(self, logits: "Tensor") -> "Tensor":
        """Rows (n, width) uint8 of a classifier's logits (n, C), on their device."""
        import torch

        if self.kept == "all":
            centred = logits.float() - logits.float().amax(dim=1, keepdim=True)
            return centred.clamp(min=LEAST_LOGIT).half().view(torch.uint8)
        probabilities = logits.double().softmax(dim=1)
        largest, classes = probabilities.topk(self.kept, dim=1)
        rest = (1 - largest.sum(dim=1, keepdim=True)).clamp(min=0)
        # torch counts in int16; the bits of its negative numbers are those of uint16's upper half
        parts = (classes.to(torch.int16), largest.half(), rest.float())
        return torch.cat([part.view(torch.uint8) for part in parts], dim=1)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Records (n,) of rows (n, width) uint8: fields as in `record`."""
        records: np.ndarray = np.ascontiguousarray(rows).view(self.record)[:, 0]
        return records

    def distributions(self, rows: np.ndarray) -> np.ndarray:
        """(n, C) float32 probabilities of rows (n, width), the rest spread evenly over the classes not kept."""
        records = self.decode(rows)
        if self.kept == "all":
            powers = np.exp(records["logits"].astype(np.float64))
            full: np.ndarray = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
            return full
        spread = records["rest"] / (self.classes - self.kept)
        full = np.repeat(spread[:, None], self.classes, axis=1)
        np.put_along_axis(full, records["classes"].astype(np.int64), records["probabilities"].astype(np.float32), 1)
        full /= full.sum(axis=1, keepdims=True)
        return full

    def check(self, rows: np.ndarray) -> tuple[int, str] | None:
        """The first of ``rows`` (n, width) that is no soft label, and why; None where all are."""
        records = self.decode(rows)
        if self.kept == "all":
            logits = records["logits"].astype(np.float32)
            is_centred = np.isfinite(logits).all(axis=1) & (logits.max(axis=1) == 0)
            return _first({"logits that are not finite with the largest at 0": ~is_centred})
        classes, rest = records["classes"], records["rest"].astype(np.float64)
        probabilities = records["probabilities"].astype(np.float64)
        ascending = np.sort(classes, axis=1)
        total = probabilities.sum(axis=1) + rest
        return _first(
            {
                f"a class that is not below {self.classes}": (classes >= self.classes).any(axis=1),
                "a class twice": (ascending[:, 1:] == ascending[:, :-1]).any(axis=1),
                "probabilities that do not descend from at most 1 to 0": ~_descends(probabilities),
                "probabilities that with the rest do not add up to 1": ~(np.abs(total - 1) <= SUM_TOLERANCE),
                "a rest below 0": ~(rest >= 0),
            }
        )


def _descends(probabilities: np.ndarray) -> np.ndarray:
    """(n,) whether each row (n, k) descends within [0, 1]."""
    bounded = np.pad(probabilities, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0)))
    descends: np.ndarray = np.all(bounded[:, 1:] <= bounded[:, :-1], axis=1)
    return descends


def _first(broken: dict[str, Any]) -> tuple[int, str] | None:
    """The first row that one of the reasons holds for."""
    for reason, rows in broken.items():
        if rows.any():
            return int(rows.argmax()), reason
    return None


def format_of(path: str, meta: dict[str, Any]) -> SoftLabelFormat | None:
    """The format that a cache's metadata names; None of a cache of vectors. Raises DataError where it is damaged."""
    kept = meta.get("soft_labels")
    if kept is None:
        return None
    classes = meta.get("classes")
    fits = kept == "all" or (isinstance(kept, int) and isinstance(classes, int) and 1 <= kept < classes)
    if not isinstance(classes, int) or classes < 1 or not fits:
        raise DataError(
            f"{path}: its metadata says soft_labels {kept!r} of {classes!r} classes; "
            f"{resume_advice(path.rpartition('/')[0])} and --overwrite"
        )
    return SoftLabelFormat(classes, kept)
