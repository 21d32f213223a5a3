"""Beam search over `pipeline/caption/coca.py`.

A hypothesis' score is its log-probability (start token and prefix not counted) divided by its length, the end token
counted, to the power ``length_penalty``. At each token the ``num_beams`` best open hypotheses are kept; one that
ends is finished when it is among the ``num_beams`` best of that token (Hugging Face's rule). An image is done when no
open hypothesis can still beat its finished ones, so stopping early never changes a result. open_clip's own beam search
sums logits that are no log-probabilities, and by default runs the same two beams three times over (three groups
without a diversity penalty).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.caption.coca import Coca, EncodedImages
from pipeline.caption.decoding import Decoding
from pipeline.caption.sampling import Caption, adjusted, begin, written


@dataclass(frozen=True)
class _Candidate:
    """An open hypothesis of row ``row`` and one more ``token``; ``total`` is what is searched by, ``logprob`` the
    model's own (they differ by the repetition penalty)."""

    row: int
    token: int
    total: float
    logprob: float


@dataclass
class _Image:
    """One image's search; ``finished`` holds its best captions with their scores, best first."""

    decoding: Decoding
    longest: int
    end: int
    finished: list[tuple[float, Caption]] = field(default_factory=list)

    def extend(self, candidates: list[_Candidate], texts: list[list[int]], length: int) -> list[_Candidate]:
        """Finish what ends among the candidates (best first, ``length`` tokens long, ``texts`` their rows' tokens so
        far) and return what goes on; nothing when the image is done."""
        beams, ahead = self.decoding.num_beams, list[_Candidate]()
        for rank, candidate in enumerate(candidates):
            if candidate.token != self.end and length < self.longest:
                ahead.append(candidate)
            elif rank < beams:
                caption = written([*texts[candidate.row], candidate.token], candidate.logprob, self.end)
                self.finished.append((self._score(candidate.total, length), caption))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[:beams]
        if not ahead:
            return []
        last = self.longest if self.decoding.length_penalty >= 0 else length + 1
        attainable = self._score(ahead[0].total, last)
        return [] if len(self.finished) == beams and attainable <= self.finished[-1][0] else ahead[:beams]

    def _score(self, total: float, length: int) -> float:
        return total / length**self.decoding.length_penalty


@torch.inference_mode()
def beam_search(coca: Coca, images: EncodedImages, num_captions: int, decoding: Decoding) -> list[list[Caption]]:
    """The best ``num_captions`` of ``decoding.num_beams`` hypotheses per image, best first.

    Raises UserError when the model's logits are not finite.
    """
    rows, logits, longest = begin(coca, images, decoding)
    begun = rows.position
    results = [_Image(decoding, longest, coca.end) for _ in range(len(images.features))]
    going = results
    totals = torch.zeros(len(going), 1, dtype=torch.float64, device=coca.device)  # (images, beams)
    logprobs = totals
    for position in range(longest):
        texts = rows.tokens[:, begun : rows.position].tolist()
        kept, still = list[_Candidate](), list[_Image]()
        allowed = adjusted(raw := logits.log_softmax(-1), rows.tokens[:, 1 : rows.position], coca, decoding, position)
        for image, candidates in zip(going, _candidates(raw, allowed, totals, logprobs, decoding), strict=True):
            if ahead := image.extend(candidates, texts, position + 1):
                filler = _Candidate(ahead[0].row, coca.end, -torch.inf, -torch.inf)
                kept += [*ahead, *[filler] * (decoding.num_beams - len(ahead))]
                still.append(image)
        if not still:
            break
        going = still
        columns = zip(*((c.row, c.token, c.total, c.logprob) for c in kept), strict=True)
        index, newest, totals, logprobs = (torch.tensor(column, device=coca.device) for column in columns)
        totals, logprobs = (x.double().view(-1, decoding.num_beams) for x in (totals, logprobs))
        rows.select(index)
        logits = rows.feed(newest[:, None])
    return [[caption for _, caption in image.finished[:num_captions]] for image in results]


def _candidates(
    raw: Tensor, allowed: Tensor, totals: Tensor, logprobs: Tensor, decoding: Decoding
) -> list[list[_Candidate]]:
    """Per image the 2·num_beams best extensions of its hypotheses, best first; ``raw`` and ``allowed`` (R, V)."""
    images, width = totals.shape
    vocabulary = raw.shape[-1]

    def summed(before: Tensor, gained: Tensor) -> Tensor:
        return (before[..., None] + gained.view(images, width, vocabulary)).flatten(1)

    best, places = summed(totals, allowed).topk(min(2 * decoding.num_beams, width * vocabulary))
    gained = summed(logprobs, raw).gather(1, places)
    found = []
    for number, columns in enumerate(zip(best.tolist(), places.tolist(), gained.tolist(), strict=True)):
        rows = ((total, *divmod(place, vocabulary), logprob) for total, place, logprob in zip(*columns, strict=True))
        found.append([_Candidate(number * width + b, t, total, lp) for total, b, t, lp in rows if total > -torch.inf])
    return found
