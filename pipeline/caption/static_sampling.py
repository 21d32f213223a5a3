"""Captions token by token in memory that stays where it is, as CUDA graphs want it: greedy, top-k and nucleus sampling.

`pipeline/caption/sampling.py` launches some five hundred kernels per token, waits for the device twice, and changes its
shapes as it likes: a GPU is idle most of that time. Here the same functions run on the first rows of buffers, so that a
token's work (text tower, decoder, cross-attention, choosing) is a CUDA graph, one per position and number of rows.
Attention sees the tokens up to its position, without a mask: kernels and results are those of the other module.

What depends on values is left to the host, every few tokens: captions that ended are dropped when fewer rows suffice,
and at the end captions are written again by the other module where choosing needed more candidates than are looked at.
For nuclei a kernel spares that (`pipeline/caption/sampling_kernels.py`).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.caption.coca import Coca, DecoderState, EncodedImages
from pipeline.caption.cuda_graphs import GraphCache
from pipeline.caption.decoding import Decoding
from pipeline.caption.kernels import nucleus_kernel
from pipeline.caption.sampling import (
    FIRST_CANDIDATES,
    MORE_CANDIDATES,
    DecodedTokens,
    generate,
    log_probability,
    log_totals,
    noise_seeds,
    not_finite,
    process_logits,
    sample_among,
    truncate_at_eos,
    with_temperature,
)
from pipeline.caption.static_buffers import Buffers, Layout

CHECK_EVERY = 4  # tokens between two looks at which captions ended
GROW_ABOVE = 0.1  # of a batch's captions that need more candidates: later batches look at more
WRITE_AGAIN = 8  # parts of a batch in which captions are written again, so that they take little memory


class StaticSampler:
    """Writes captions as `sampling.generate` does, in memory that it keeps from batch to batch.

    For a model whose text tower is causal, and any method but beam search.
    """

    def __init__(self, coca: Coca, decoding: Decoding, graphs: GraphCache) -> None:
        self.coca = coca
        self.decoding = decoding
        self.graphs = graphs
        self.prompt = [coca.start, *coca.prompt_tokens(decoding.prefix)]
        self.longest = decoding.longest_caption(coca.context_length, len(self.prompt) - 1)
        self.vocabulary = int(coca.decoder.text_projection.shape[1])
        self.sample_incomplete = nucleus_kernel(coca.device) if decoding.method == "nucleus" else None
        first = FIRST_CANDIDATES
        if decoding.method == "top_k":
            first = max(FIRST_CANDIDATES, 2 * decoding.top_k)
        elif self.sample_incomplete is None:
            first = FIRST_CANDIDATES * MORE_CANDIDATES
        self.candidates = min(first, self.vocabulary)
        self._buffers: Buffers | None = None

    @torch.inference_mode()
    def generate(self, images: EncodedImages, owners: Sequence[int], names: Sequence[str]) -> list[DecodedTokens]:
        """A caption per row: row r describes image ``owners[r]``, with random numbers that belong to ``names[r]``.

        ``owners`` ascend and have every image at least once. Raises UserError when the model's logits are not finite.
        """
        owner = np.asarray(owners)
        buffers = self._room_for(images, int(np.bincount(owner).max()))
        buffers.load(images, noise_seeds(names, self.decoding, self.longest), self.coca.end)
        layout = Layout.of(owner, np.arange(len(names)), buffers.capacity, buffers.state.slots)
        buffers.place(layout)
        for position in range(self.longest):
            name = (layout.rows, layout.images, layout.scattered, position)
            self.graphs.run(name, partial(self._write_token, buffers, layout, position))
            could_end = position + 1 - self.decoding.min_tokens  # tokens so far after which a caption could end
            if could_end > 0 and could_end % CHECK_EVERY == 0 and position + 1 < self.longest:
                running = np.flatnonzero(buffers.running[: len(layout.image)].cpu().numpy())
                if not len(running):
                    break
                layout = self._compact(buffers, layout, running, len(self.prompt) + position)
        if not bool(buffers.finite):
            raise not_finite()
        return self._results(buffers, images, owner, names)

    def release(self) -> None:
        """Give the memory back; the next batch takes what it needs."""
        self._buffers = None
        self.graphs.clear()

    def _room_for(self, images: EncodedImages, slots: int) -> Buffers:
        """Buffers for the images with ``slots`` captions each; they grow to the largest batch so far."""
        count = len(images.features)
        if self._buffers is not None:
            if self._buffers.holds(count, slots):
                return self._buffers
            count = max(count, self._buffers.capacity)
            slots = max(slots, self._buffers.state.slots)
            self.release()
        self._buffers = Buffers.for_captions(self.coca, self.prompt, self.longest, images.room(count), slots)
        return self._buffers

    def _write_token(self, buffers: Buffers, layout: Layout, position: int) -> None:
        """Choose the token at ``position`` of each caption: what a CUDA graph is made of.

        Nothing here may wait for the device or depend on values that are there.
        """
        rows = layout.rows
        before = len(self.prompt) + position - 1  # tokens whose keys and values are there
        state = buffers.first(layout, before if position else 0)
        if position:
            logits = state.step(buffers.newest[:rows, None])
        else:
            logits = self._prefill(buffers, state)
        totals = log_totals(logits)
        past = state.tokens[:, 1 : state.position]
        scores = process_logits(logits, past, self.coca, self.decoding, position, keep=False)
        running = buffers.running[:rows]
        result = buffers.places[2, :rows]
        chosen, complete = self._choose(scores, buffers.seeds[result, position])
        buffers.logprobs[result] += log_probability(logits, chosen, totals).masked_fill(~running, 0.0)
        buffers.written[result, position] = chosen.masked_fill(~running, self.coca.end)
        buffers.incomplete[result] |= running & ~complete
        buffers.newest[:rows].copy_(chosen)
        running &= chosen != self.coca.end

    def _prefill(self, buffers: Buffers, state: DecoderState) -> Tensor:
        """Write the prompt, once per image, into the caches of all rows; the logits (R, V) that follow."""
        length = len(self.prompt)
        once = DecoderState.empty(self.coca, state.images, length)
        logits = once.step(buffers.prompt.expand(len(once.tokens), -1))
        buffers.finite.copy_(torch.isfinite(logits).all())
        for new, old in zip(state.text_caches + state.caches, once.text_caches + once.caches, strict=True):
            new.keys[:, :, :length] = old.keys[state.image]
            new.values[:, :, :length] = old.values[state.image]
        state.tokens[:, :length] = buffers.prompt
        state.position = length
        return logits[state.image]

    def _choose(self, scores: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (R,), and whether they were chosen among all that could be (R,)."""
        if not self.decoding.is_sampling:
            chosen = scores.argmax(-1)
            return chosen, torch.ones_like(chosen, dtype=torch.bool)
        scores = with_temperature(scores, self.decoding)
        chosen, complete = sample_among(scores, self.decoding, seeds, self.candidates)
        if self.candidates == self.vocabulary:
            return chosen, torch.ones_like(complete)
        if self.sample_incomplete is not None:
            self.sample_incomplete(scores, seeds, self.decoding.top_p, chosen, complete)
            return chosen, torch.ones_like(complete)
        return chosen, complete

    def _compact(self, buffers: Buffers, layout: Layout, running: np.ndarray, filled: int) -> Layout:
        """Drop the rows that are not ``running`` where fewer rows or images then suffice."""
        images, image = np.unique(layout.image[running], return_inverse=True)
        smaller = Layout.of(image, layout.result[running], buffers.capacity, buffers.state.slots)
        if (smaller.rows, smaller.images) == (layout.rows, layout.images):
            return layout
        buffers.keep(running, images, filled)
        buffers.place(smaller)
        return smaller

    def _results(
        self, buffers: Buffers, images: EncodedImages, owner: np.ndarray, names: Sequence[str]
    ) -> list[DecodedTokens]:
        count = len(names)
        rows = zip(buffers.written[:count].tolist(), buffers.logprobs[:count].tolist(), strict=True)
        captions = [truncate_at_eos(tokens, logprob, self.coca.end) for tokens, logprob in rows]
        incomplete = np.flatnonzero(buffers.incomplete[:count].cpu().numpy())
        at_once = -(-count // WRITE_AGAIN)
        for first in range(0, len(incomplete), at_once):
            again = incomplete[first : first + at_once]
            described, owners = np.unique(owner[again], return_inverse=True)
            some = images.select(torch.from_numpy(described).to(self.coca.device))
            written = generate(self.coca, some, owners.tolist(), [names[row] for row in again], self.decoding)
            for row, caption in zip(again, written, strict=True):
                captions[row] = caption
        if len(incomplete) > GROW_ABOVE * count and self.candidates < self.vocabulary:
            self.candidates = min(MORE_CANDIDATES * self.candidates, self.vocabulary)
            self.graphs.clear()
        return captions
