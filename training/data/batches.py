"""Batches of rows that are read by position, on one process or on several worker processes."""

import logging
import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat, tee
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from shards_spec.files import DataError, UserError
from shards_spec.messages import counted
from shards_spec.models import LoadedModel
from shards_spec.pixels import rgbx
from training.data.order import BatchPlan, Order
from training.losses.multilabel import PAD, pad_labels

log = logging.getLogger(__name__)
PIECE_SIZE = 64  # rows that a worker reads at a time
LISTS = ("keys", "epochs", "skipped", "blank")  # what a batch has that is no tensor

Index = int | tuple[int, int | None]  # a position, or a position and the side of its image in pixels


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used; ``reason`` names file and key."""

    reason: str


# A row: ``key``, ``position`` and ``epoch``, tensors by name, perhaps ``labels`` (list of class indices) and ``blank``
# (whether its text is empty). Errors are values, since an error raised in a worker process would reach the user wrapped
# in the worker's traceback.
Item = dict[str, Any] | Skipped | DataError | UserError


class TrainingRows(Protocol):
    """What batches are made of and the trainer reads: rows by position of an endless stream, like `Samples`."""

    @property
    def student(self) -> LoadedModel:
        """The model that the rows are made for."""
        ...

    @property
    def order(self) -> Order:
        """Which sample stands at which position."""
        ...

    @property
    def plan(self) -> BatchPlan:
        """Sizes of the batches."""
        ...

    def __getitem__(self, index: Index) -> Item: ...


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, S, S) uint8."""
    return torch.from_numpy(np.ascontiguousarray(rgbx(image)[..., :3].transpose(2, 0, 1)))


def load_batches(
    rows: TrainingRows,
    positions: Iterable[range],
    *,
    workers: int = 0,
    device: str = "cpu",
    sides: Iterable[int | None] | None = None,
    as_bytes: bool = False,
    prefetch: bool = True,
    skip_empty: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield one batch per range of positions, in order.

    Workers read pieces of `PIECE_SIZE` rows, not whole batches: so the first batch is ready sooner, and two batches are
    in flight however many workers there are. On CUDA one more is on the device already, as bytes.

    Args:
        rows: The rows.
        positions: The positions of each batch.
        workers: Number of processes that read ahead; 0 reads in this one.
        device: Where the tensors go.
        sides: Side of each batch's images in pixels; None is the student's own.
        as_bytes: Leave images as uint8 instead of normalised floats.
        prefetch: On CUDA, copy each batch while the one before it is used.
        skip_empty: Leave out a batch of which no row can be used, which is an error otherwise: a measurement goes on,
            a training step needs its batch.

    Yields:
        ``images`` (B, 3, S, S) float32 normalised, or uint8; ``positions`` (B,); ``keys`` and ``epochs``; the other
        tensors of the rows, such as ``tokens`` (B, T), ``teacher_image`` and ``teacher_text`` (B, D); ``labels`` (B, L)
        int64 padded with -1; ``skipped``, the reasons why the batch is smaller than its range, which are logged too;
        ``blank``, the keys of rows with an empty text, of which the first is logged.

    Raises:
        DataError: A file is damaged, or no row of a batch can be used without ``skip_empty``.
        UserError: A file or folder cannot be used.
    """
    lists_of_pieces = _read_batches(rows, zip(positions, sides or repeat(None), strict=False), workers, device)
    if prefetch and device.startswith("cuda"):
        lists_of_pieces = _copied_ahead(lists_of_pieces, device)
    for pieces in lists_of_pieces:
        if skip_empty and not any("positions" in piece for piece in pieces):
            continue
        batch = _join(pieces, rows.student, as_bytes)
        pieces.clear()  # joined they are copies: the step has their memory
        yield batch
        del batch  # while the next one is made


def _read_batches(
    rows: TrainingRows, batches: Iterator[tuple[range, int | None]], workers: int, device: str
) -> Iterator[list[dict[str, Any]]]:
    """Yield the pieces of each batch, on the device. Raises and logs what `load_batches` does."""
    first = next(batches, None)
    if first is None:
        return
    to_read, to_yield = tee(chain([first], batches))
    loader = _piece_loader(rows, to_read, workers, device, prefetch=2 * len(first[0]))
    piece_counts = (-(-len(batch) // PIECE_SIZE) for batch, _ in to_yield)
    missing = next(piece_counts)
    parts = []
    blank_reported = False
    # nothing but this loop refers to the loader's iterator: an error that leaves the loop ends the workers
    for piece in loader:
        if "error" in piece:
            raise piece["error"]
        for reason in piece["skipped"]:
            log.warning("sample skipped: %s", reason)
        if piece["blank"] and not blank_reported:
            blank_reported = True
            log.warning("key %s has no caption, so its text is empty (others may be, too)", piece["blank"][0])
        parts.append(_to_device(piece, device))
        missing -= 1
        if missing == 0:
            yield parts
            parts = []
            missing = next(piece_counts, 0)


def _copied_ahead(batches: Iterator[list[dict[str, Any]]], device: str) -> Iterator[list[dict[str, Any]]]:
    """Yield what ``batches`` yields, taken one ahead by a thread whose copies to the device have a stream of their own.

    Taking a batch out of the workers' queue and copying it then happen while the device is busy with the step before.
    Errors are raised where their batch would have been yielded.
    """
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def take() -> list[dict[str, Any]] | None:
        with torch.cuda.stream(copies):
            return next(batches, None)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        upcoming = thread.submit(take)
        while (pieces := upcoming.result()) is not None:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(copies)  # all that was copied before the next batch is asked for
            for piece in pieces:
                for value in piece.values():
                    if isinstance(value, Tensor):
                        value.record_stream(computing)  # its memory belongs to the other stream
            upcoming = thread.submit(take)
            yield pieces


def first_batch(rows: TrainingRows, count: int, side: int | None = None) -> dict[str, Any]:
    """Return the first ``count`` rows as `load_batches` would, on the CPU, without logging anything.

    Raises DataError and UserError.
    """
    piece = collate([rows[(position, side)] for position in range(count)])
    if "error" in piece:
        raise piece["error"]
    return _join([piece], rows.student, as_bytes=False)


def _pieces(batches: Iterable[tuple[range, int | None]]) -> Iterator[list[tuple[int, int | None]]]:
    """Indices of the rows of each piece of each batch."""
    for positions, side in batches:
        for start in range(0, len(positions), PIECE_SIZE):
            yield [(position, side) for position in positions[start : start + PIECE_SIZE]]


def _piece_loader(
    rows: TrainingRows, batches: Iterable[tuple[range, int | None]], workers: int, device: str, prefetch: int
) -> DataLoader[Any]:
    """Loader of the pieces of batches, in order; with workers about ``prefetch`` rows are read ahead."""
    # `warn_of_workers` says it once a run, not for every loader
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    return DataLoader(
        rows,  # type: ignore[arg-type]  # a Dataset in all but name
        batch_sampler=_pieces(batches),
        num_workers=workers,
        prefetch_factor=max(2, -(-prefetch // (PIECE_SIZE * workers))) if workers else None,
        collate_fn=collate,
        pin_memory=device != "cpu",
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own: the default would draw from the training's random stream
    )


def collate(items: list[Item]) -> dict[str, Any]:
    """Return the rows of a piece as tensors and lists, as `load_batches` describes them.

    Images are (B, 3, S, S) uint8. If a row is an error, it is {"error": the error}, which `load_batches` raises.
    """
    used: list[dict[str, Any]] = []
    skipped: list[str] = []
    for item in items:
        if isinstance(item, DataError | UserError):
            return {"error": item}
        if isinstance(item, Skipped):
            skipped.append(item.reason)
        else:
            used.append(item)
    piece: dict[str, Any] = {
        "keys": [item["key"] for item in used],
        "epochs": [item["epoch"] for item in used],
        "skipped": skipped,
        "blank": [item["key"] for item in used if item.get("blank")],
    }
    if used:
        piece["positions"] = torch.tensor([item["position"] for item in used])
        for name, value in used[0].items():
            if isinstance(value, Tensor):
                # in a worker straight into the memory that it shares, where the stack would be copied to once more
                piece[name] = default_collate([item[name] for item in used])
        if "labels" in used[0]:
            piece["labels"] = pad_labels([item["labels"] for item in used])
    return piece


def _to_device(piece: dict[str, Any], device: str) -> dict[str, Any]:
    moved = {}
    for name, value in piece.items():
        moved[name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
    return moved


def _join(pieces: list[dict[str, Any]], student: LoadedModel, as_bytes: bool) -> dict[str, Any]:
    """One batch of its pieces, images normalised unless ``as_bytes``. Raises DataError when it has no row."""
    batch: dict[str, Any] = {name: list(chain.from_iterable(piece[name] for piece in pieces)) for name in LISTS}
    used = [piece for piece in pieces if "positions" in piece]
    if not used:
        skipped = batch["skipped"]
        raise DataError(f"none of {counted(len(skipped), 'sample')} of a batch can be used, first {skipped[0]}")
    if "labels" in used[0]:
        _pad_to_longest(used)
    for name in used[0]:
        if name in LISTS:
            continue
        parts = [piece[name] for piece in used]
        if is_pixels(parts[0]) and not as_bytes:
            batch[name] = student.normalise(_as_floats(parts))
        else:
            batch[name] = torch.cat(parts)
    return batch


def is_pixels(value: Any) -> bool:
    """Return whether a field of a batch is images (B, 3, S, S) of 0 to 255 that are not yet normalised."""
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 4


def lay_out_images(batch: dict[str, Any]) -> None:
    """Put the channels of a batch's images innermost in memory, in place."""
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim == 4:
            batch[name] = value.contiguous(memory_format=torch.channels_last)


def _pad_to_longest(pieces: list[dict[str, Any]]) -> None:
    longest = max(piece["labels"].shape[1] for piece in pieces)
    for piece in pieces:
        piece["labels"] = F.pad(piece["labels"], (0, longest - piece["labels"].shape[1]), value=PAD)


def _as_floats(pieces: list[Tensor]) -> Tensor:
    """(b, 3, S, S) uint8 pieces as one float32 tensor, the same numbers from 0 to 255."""
    count = sum(len(piece) for piece in pieces)
    pixels = torch.empty(count, *pieces[0].shape[1:], device=pieces[0].device)
    start = 0
    for piece in pieces:
        # converts while it copies; joining the bytes first would read and write them once more
        pixels[start : start + len(piece)] = piece
        start += len(piece)
    return pixels


def _start_worker(worker: int) -> None:
    """Leave signals to the parent: Ctrl-C and Slurm signal the whole group, and the last step needs the workers.

    A tokenizer of transformers' keeps to this process: it warns of its threads after a fork, and other workers want the
    other cores.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
