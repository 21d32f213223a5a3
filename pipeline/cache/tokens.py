"""Texts tokenised ahead of the device: open_clip's tokenizers take longer over a text than a GPU does.

Threads would not do: a tokenizer is Python, and would hold back the thread that feeds the device.
"""

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np

from pipeline.core.prefetch import batches
from pipeline.core.workers import die_with_parent
from shards_spec.models import import_extensions, load_tokenizer
from shards_spec.open_clip_plugins import without_remote_code_prompt

BLOCK = 256  # texts that a process is given at once


def tokenise(tokenizer: Any, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Tokens (context_length,) int64 of each text."""
    for block in batches(texts, BLOCK):
        yield from tokenizer(block).numpy()


class TokenPool:
    """``processes`` processes that tokenise with the tokenizer of ``model``, each with its own copy.

    They start when this is made: to import what a tokenizer needs takes seconds.
    """

    def __init__(self, processes: int, model: str, trusted: bool) -> None:
        self._executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_start_worker)
        self._tokenise = partial(_tokenise_in_worker, model, trusted)
        for _ in range(processes):
            self._executor.submit(int)

    def tokenise(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """As the function `tokenise`; work begins at once."""
        return chain.from_iterable(self._executor.map(self._tokenise, batches(texts, BLOCK)))

    def shutdown(self) -> None:
        """End the processes, after the blocks that they have begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    die_with_parent()
    import open_clip  # noqa: F401  # seconds, which pass while the teacher is loaded
    import torch

    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _tokenizer(model: str, trusted: bool) -> Any:
    """Loaded with the first texts: by then the model's name is known to be right."""
    import_extensions()
    with without_remote_code_prompt():
        return load_tokenizer(model, trusted)


def _tokenise_in_worker(model: str, trusted: bool, texts: list[str]) -> np.ndarray:
    """(N, context_length) int64."""
    tokens: np.ndarray = _tokenizer(model, trusted)(texts).numpy()
    return tokens
