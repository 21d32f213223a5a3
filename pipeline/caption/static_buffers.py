"""The memory of `pipeline/caption/static_sampling.py`, and which captions its rows hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from pipeline.caption.coca import Coca, DecoderState, DecodingBlock, EncodedImages, KeyValueCache

SMALLEST = 16  # images, or rows per slot: fewer are not faster


def size_for(count: int, capacity: int) -> int:
    """The smallest size that holds ``count``: ``capacity``, half of it, a quarter, down to `SMALLEST`."""
    size = capacity
    while size > SMALLEST and -(-size // 2) >= count:
        size = -(-size // 2)
    return size


@dataclass(frozen=True)
class Layout:
    """Which captions the first n rows hold: ``image`` and ``result`` (n,), both ascending. Known to the host.

    Work is done on ``rows`` rows and ``images`` images, at least as many as there are. ``grid`` (rows,) is each row's
    place in the grid (images, slots) of cross-attention; ``scattered``: the rows in their order do not fill it.
    """

    image: np.ndarray
    result: np.ndarray
    grid: np.ndarray
    rows: int
    images: int
    scattered: bool

    @classmethod
    def of(cls, image: np.ndarray, result: np.ndarray, capacity: int, slots: int) -> "Layout":
        """The smallest sizes that hold these captions, of at most ``slots`` per image."""
        count = len(image)
        images = size_for(int(image[-1]) + 1, capacity)
        rows = slots * size_for(-(-count // slots), capacity)  # at most images * slots, because count is
        taken = image * slots + np.arange(count) - np.searchsorted(image, image)
        free = np.setdiff1d(np.arange(images * slots), taken)
        grid = np.concatenate([taken, free[: rows - count]])
        scattered = rows != images * slots or not np.array_equal(grid, np.arange(rows))
        return cls(image, result, grid, rows, images, scattered)


@dataclass
class Buffers:
    """Tensors that stay where they are, for ``capacity`` images and ``slots`` rows of each.

    ``state`` has all rows. ``places`` (3, rows): each row's place in the grid, its image, its result. Results have one
    row more, for rows without a caption: ``seeds`` and ``written`` (results, longest), ``logprobs`` (results,), and
    ``incomplete`` (results,): a token was chosen among too few. ``newest`` (rows,) are the tokens chosen last,
    ``running`` (rows,) the captions that have not ended, ``finite`` () is about the first logits.
    """

    state: DecoderState
    prompt: Tensor
    places: Tensor
    newest: Tensor
    running: Tensor
    seeds: Tensor
    written: Tensor
    logprobs: Tensor
    incomplete: Tensor
    finite: Tensor

    @classmethod
    def for_captions(
        cls, coca: Coca, prompt: Sequence[int], longest: int, images: EncodedImages, slots: int
    ) -> "Buffers":
        """For captions of ``longest`` tokens after ``prompt``, with memory for ``images``, which is kept."""
        rows = len(images.features) * slots
        length = len(prompt) + longest
        weight = coca.decoder.text_projection

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=coca.device)

        def caches(blocks: Sequence[DecodingBlock]) -> list[KeyValueCache]:
            return [KeyValueCache.empty(block, rows, length, weight) for block in blocks]

        places = zeros(3, rows)
        tokens = zeros(rows, length)
        state = DecoderState(coca, images, tokens, caches(coca.text_blocks or ()), caches(coca.blocks), places[1])
        state.slots = slots
        return cls(
            state,
            prompt=torch.tensor([prompt], device=coca.device),
            places=places,
            newest=zeros(rows),
            running=zeros(rows, dtype=torch.bool),
            seeds=zeros(rows + 1, longest),
            written=zeros(rows + 1, longest),
            logprobs=zeros(rows + 1, dtype=torch.float64),
            incomplete=zeros(rows + 1, dtype=torch.bool),
            finite=zeros(dtype=torch.bool),
        )

    @property
    def capacity(self) -> int:
        """The most images."""
        return len(self.state.images.features)

    def holds(self, images: int, slots: int) -> bool:
        """Whether there is room for that many images with that many captions each."""
        return images <= self.capacity and slots <= self.state.slots

    def load(self, images: EncodedImages, seeds: Tensor, end: int) -> None:
        """Take over a batch; ``seeds`` (n, longest) are of its captions."""
        mine = self.state.images
        for new, old in zip([*mine.keys, *mine.values], [*images.keys, *images.values], strict=True):
            new[: len(old)].copy_(old)
        self.seeds[: len(seeds)].copy_(seeds)
        self.written.fill_(end)
        self.logprobs.zero_()
        self.incomplete.zero_()

    def place(self, layout: Layout) -> None:
        """Put the rows in their places; all their captions are running."""
        count = len(layout.image)
        nowhere = np.full(layout.rows - count, len(self.seeds) - 1)
        places = np.stack([layout.grid, layout.grid // self.state.slots, np.concatenate([layout.result, nowhere])])
        self.places[:, : layout.rows].copy_(torch.from_numpy(places))
        self.running[:count].fill_(True)
        self.running[count : layout.rows].fill_(False)

    def keep(self, rows: np.ndarray, images: np.ndarray, filled: int) -> None:
        """Move these rows and images, ascending, to the front; of the caches the first ``filled`` tokens."""
        state = self.state
        device = self.newest.device
        kept = torch.from_numpy(rows).to(device)
        for cache in chain(state.text_caches, state.caches):
            for tensor in (cache.keys, cache.values):
                tensor[: len(rows), :, :filled] = tensor[kept, :, :filled]
        state.tokens[: len(rows)] = state.tokens[kept]
        self.newest[: len(rows)] = self.newest[kept]
        if images[-1] >= len(images):
            kept = torch.from_numpy(images).to(device)
            for tensor in chain(state.images.keys, state.images.values):
                tensor[: len(images)] = tensor[kept]

    def first(self, layout: Layout, position: int) -> DecoderState:
        """The state of the layout's rows, with ``position`` tokens so far; it shares this memory."""
        state = self.state
        rows = layout.rows
        return DecoderState(
            state.coca,
            state.images.first(layout.images),
            state.tokens[:rows],
            [cache.first(rows) for cache in state.text_caches],
            [cache.first(rows) for cache in state.caches],
            image=self.places[1, :rows],
            grid=self.places[0, :rows] if layout.scattered else None,
            slots=state.slots,
            position=position,
        )
