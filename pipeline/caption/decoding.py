"""How a captioner chooses tokens: settings only, no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from shards_spec.files import UserError
from shards_spec.messages import require


@dataclass(frozen=True)
class Decoding:
    """Settings of one decoding method. The end token counts as a token, start token and prefix do not."""

    method: Literal["greedy", "top_k", "nucleus", "beam"] = "nucleus"
    """greedy: the likeliest token; top_k, nucleus: sampled from the likeliest ones; beam: the likeliest captions"""
    top_p: float = 0.9
    """nucleus: the smallest set of likeliest tokens that reaches this probability; 1 samples from all"""
    top_k: int = 50
    """top_k: that many likeliest tokens"""
    temperature: float = 1.0
    """top_k, nucleus: logits are divided by it before the set is chosen"""
    num_beams: int = 6
    """beam: hypotheses kept at each token"""
    length_penalty: float = 1.0
    """beam: a caption's log-probability is divided by its length to this power; above 0 favours long ones"""
    repetition_penalty: float = 1.0
    """logits of tokens that are there already are divided by it, multiplied where negative; 1 is none"""
    min_tokens: int = 5
    """shortest caption in tokens: open_clip's min_seq_len - 1, which counts the start token"""
    max_tokens: int = 30
    """longest caption in tokens: open_clip's seq_len - 2, which counts the start token and forces the end token"""
    prefix: str = ""
    """words that every caption begins with, such as 'a photo of'; they are part of the caption"""

    def __post_init__(self) -> None:
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.top_k >= 1, "top_k", self.top_k, "1 or more")
        greedy = "above 0; --method greedy always takes the likeliest token"
        require(0 < self.temperature < math.inf, "temperature", self.temperature, greedy)
        require(self.num_beams >= 1, "num_beams", self.num_beams, "1 or more")
        is_penalty = 0 < self.repetition_penalty < math.inf
        require(is_penalty, "repetition_penalty", self.repetition_penalty, "above 0; 1 is none")
        require(abs(self.length_penalty) < math.inf, "length_penalty", self.length_penalty, "a number; 0 is none")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        below = f"0 or more, below --max-tokens {self.max_tokens}"
        require(0 <= self.min_tokens < self.max_tokens, "min_tokens", self.min_tokens, below)

    @property
    def is_sampling(self) -> bool:
        """Whether tokens are chosen at random."""
        return self.method in ("top_k", "nucleus")

    def check_num_captions(self, num_captions: int) -> None:
        """Raise UserError when the method cannot give this many different captions of an image."""
        require(num_captions >= 1, "num_captions", num_captions, "1 or more")
        most = {"greedy": 1, "beam": self.num_beams}.get(self.method, num_captions)
        require(num_captions <= most, "num_captions", num_captions, f"at most {most} with --method {self.method}")

    def longest_caption(self, context_length: int, prompt_length: int) -> int:
        """The most tokens that a caption can have in a model's context, start token and prompt not counted.

        Raises UserError when that is not above ``min_tokens``.
        """
        longest = min(self.max_tokens, context_length - 1 - prompt_length)
        if longest <= self.min_tokens:
            raise UserError(
                f"the model has {context_length} places: with a prefix of {prompt_length} tokens there is no room for "
                f"captions above --min-tokens {self.min_tokens}"
            )
        return longest
