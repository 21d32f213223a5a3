"""Texts tokenised ahead of the device: open_clip's tokenizers take longer over a text than a GPU does.

Threads would not do: a tokenizer is Python, and would hold back the thread that feeds the device.
"""

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

from pipeline.core.prefetch import batches
from pipeline.core.workers import die_with_parent
from shards_spec.models import import_extensions, load_tokenizer
from shards_spec.open_clip_plugins import without_remote_code_prompt

BLOCK = 256  # texts that a process is given at once
_worker_tokenizer: list[Any] = []  # of a tokenising process


def tokenise(tokenizer: Any, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Tokens (context_length,) int64 of each text."""
    for block in batches(texts, BLOCK):
        yield from tokenizer(block).numpy()


class TokenPool:
    """``processes`` processes that tokenise with the tokenizer of ``model``, each with its own copy."""

    def __init__(self, processes: int, model: str, trusted: bool) -> None:
        self._processes = processes
        self._executor = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(model, trusted)
        )

    def start(self) -> None:
        """Start the processes now: Linux ends them with the thread that did, which is else the first to `tokenise`."""
        for _ in range(self._processes):
            self._executor.submit(int)

    def tokenise(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """As the function `tokenise`; work begins at once."""
        return chain.from_iterable(self._executor.map(_tokenise_in_worker, batches(texts, BLOCK)))

    def shutdown(self) -> None:
        """End the processes, after the blocks that they have begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _start_worker(model: str, trusted: bool) -> None:
    import torch

    die_with_parent()
    torch.set_num_threads(1)
    import_extensions()
    with without_remote_code_prompt():
        _worker_tokenizer.append(load_tokenizer(model, trusted))


def _tokenise_in_worker(texts: list[str]) -> np.ndarray:
    """(N, context_length) int64."""
    tokens: np.ndarray = _worker_tokenizer[0](texts).numpy()
    return tokens
