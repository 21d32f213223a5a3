"""Beam search over `pipeline/caption/coca.py`.

A hypothesis' score is its log-probability (start token and prefix not counted) divided by its length, the end token
counted, to the power ``length_penalty``. At each token the ``num_beams`` best open hypotheses are kept; one that
ends is finished when it is among the ``num_beams`` best of that token (Hugging Face's rule). An image is done when no
open hypothesis can still beat its finished ones, so stopping early never changes a result. open_clip's own beam search
sums logits that are no log-probabilities, and by default runs the same two beams three times over (three groups
without a diversity penalty).

It has no CUDA graphs: the host decides after every token which hypotheses go on, so the device waits for it anyway, and
as many rows of an image are copied as its hypotheses have moved.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.caption.coca import Coca, EncodedImages
from pipeline.caption.decoding import Decoding
from pipeline.caption.sampling import DecodedTokens, prefill, process_logits, truncate_at_eos


@dataclass(frozen=True)
class _Candidate:
    """An open hypothesis, row ``row`` of the decoder's state, extended by one more ``token``.

    The search goes by ``total``; ``logprob`` is the model's own. They differ by the repetition penalty.
    """

    row: int
    token: int
    total: float
    logprob: float


@dataclass
class _ImageBeams:
    """One image's search; ``finished`` holds its best captions with their scores, best first."""

    decoding: Decoding
    longest: int
    end: int
    finished: list[tuple[float, DecodedTokens]] = field(default_factory=list)

    def advance(self, candidates: list[_Candidate], texts: list[list[int]], length: int) -> list[_Candidate]:
        """Finish the candidates that end; return the ones to extend further, none when the image is done.

        ``candidates`` are ``length`` tokens long, best first; ``texts`` are the tokens so far of all rows.
        """
        num_beams = self.decoding.num_beams
        still_open = list[_Candidate]()
        for rank, candidate in enumerate(candidates):
            if candidate.token != self.end and length < self.longest:
                still_open.append(candidate)
            elif rank < num_beams:
                tokens = [*texts[candidate.row], candidate.token]
                caption = truncate_at_eos(tokens, candidate.logprob, self.end)
                self.finished.append((self._score(candidate.total, length), caption))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[:num_beams]
        if not still_open:
            return []
        # the best score that an open hypothesis can reach: as long as possible where length is rewarded
        best_length = self.longest if self.decoding.length_penalty >= 0 else length + 1
        attainable = self._score(still_open[0].total, best_length)
        if len(self.finished) == num_beams and attainable <= self.finished[-1][0]:
            return []
        return still_open[:num_beams]

    def _score(self, total: float, length: int) -> float:
        return total / float(length**self.decoding.length_penalty)


@torch.inference_mode()
def beam_search(coca: Coca, images: EncodedImages, num_captions: int, decoding: Decoding) -> list[list[DecodedTokens]]:
    """The best ``num_captions`` of ``decoding.num_beams`` hypotheses per image, best first.

    Raises UserError when the model's logits are not finite.
    """
    num_beams = decoding.num_beams
    state, logits, longest = prefill(coca, images, decoding)
    prompt_end = state.position
    results = [_ImageBeams(decoding, longest, coca.end) for _ in range(len(images.features))]
    searching = results
    totals = torch.zeros(len(searching), 1, dtype=torch.float64, device=coca.device)  # (images, beams)
    logprobs = totals
    for position in range(longest):
        texts = state.tokens[:, prompt_end : state.position].tolist()
        raw = logits.log_softmax(-1)
        scores = process_logits(raw, state.tokens[:, 1 : state.position], coca, decoding, position)
        kept = list[_Candidate]()
        unfinished = list[_ImageBeams]()
        extensions = _best_extensions(raw, scores, totals, logprobs, num_beams)
        for image, candidates in zip(searching, extensions, strict=True):
            still_open = image.advance(candidates, texts, position + 1)
            if still_open:
                filler = _Candidate(still_open[0].row, coca.end, -torch.inf, -torch.inf)
                kept += still_open
                kept += [filler] * (num_beams - len(still_open))
                unfinished.append(image)
        if not unfinished:
            break
        searching = unfinished
        totals = _column([candidate.total for candidate in kept], coca).double().view(-1, num_beams)
        logprobs = _column([candidate.logprob for candidate in kept], coca).double().view(-1, num_beams)
        state.select(_column([candidate.row for candidate in kept], coca))
        newest = _column([candidate.token for candidate in kept], coca)
        logits = state.step(newest[:, None])
    return [[caption for _, caption in image.finished[:num_captions]] for image in results]


def _column(values: list[int] | list[float], coca: Coca) -> Tensor:
    return torch.tensor(values, device=coca.device)


def _best_extensions(
    raw: Tensor, scores: Tensor, totals: Tensor, logprobs: Tensor, num_beams: int
) -> list[list[_Candidate]]:
    """Per image the 2·num_beams best extensions of its hypotheses, best first.

    ``raw`` (R, V) are the model's log-probabilities, ``scores`` (R, V) what the search goes by; ``totals`` and
    ``logprobs`` (images, beams) are their sums so far.
    """
    images, width = totals.shape
    vocabulary = raw.shape[-1]

    def summed(before: Tensor, gained: Tensor) -> Tensor:
        return (before[..., None] + gained.view(images, width, vocabulary)).flatten(1)

    best, flat_indices = summed(totals, scores).topk(min(2 * num_beams, width * vocabulary))
    best_logprobs = summed(logprobs, raw).gather(1, flat_indices)
    extensions = []
    columns = zip(best.tolist(), flat_indices.tolist(), best_logprobs.tolist(), strict=True)
    for image, (image_totals, image_indices, image_logprobs) in enumerate(columns):
        candidates = list[_Candidate]()
        for total, flat_index, logprob in zip(image_totals, image_indices, image_logprobs, strict=True):
            beam, token = divmod(flat_index, vocabulary)
            if total > -torch.inf:
                candidates.append(_Candidate(image * width + beam, token, total, logprob))
        extensions.append(candidates)
    return extensions
