"""Options of the stage `pack`."""

import os
from dataclasses import dataclass

from pipeline.core.command_line import Root
from pipeline.labels.labeler import FUNCTION_WORDS, LabelRule
from shards_spec.files import UserError, read_bytes
from shards_spec.library_errors import decode_text, short
from shards_spec.messages import require


@dataclass(frozen=True)
class PackConfig:
    """Join images, captions and WordNet synsets into the final shards."""

    root: Root
    """the dataset; reads raw/, captions/NAME/ and, if there is one, dedup/; writes shards/"""
    captioner: tuple[str, ...] = ()
    """folders below captions/, joined in this order; by default the only one; 'none': original captions only"""
    min_similarity: float | None = None
    """leave out captions, also original ones, whose cosine with the image is lower; needs caption --similarity"""
    select: str | None = None
    """folder below select/ that `clipmill select` filled: only its samples and captions become final shards"""
    wordnet: str | None = None
    """folder (or NLTK's zip) with WordNet 3.0's index.noun, data.noun, noun.exc; by default NLTK's or Debian's"""
    download_wordnet: bool = False
    """fetch WordNet with NLTK's downloader when it is not found"""
    nouns_only: bool = False
    """synsets of nouns only, by part-of-speech tag, as CatLIP's paper says; its released code takes every word"""
    tagger: str = "nltk"
    """tagger for --nouns-only: nltk, or MODULE:FUNCTION from a list of words to a list of Penn tags"""
    collocations: bool = False
    """synsets of nouns of several words, the longest first"""
    synonyms: bool = False
    """also keep synsets whose first name is another word: a bike is then a motorcycle"""
    stop_words: str | None = None
    """words that get no synset: a text file, or 'function' for a short list of function words"""
    max_caption_chars: int = 10_000
    """samples with a longer original caption are left out; 0: no limit"""
    shard_size: int | None = None
    """samples in each final shard but the last; by default final shard i is what stays of raw shard i"""
    workers: int = os.cpu_count() or 1
    """worker processes"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", self.workers, "1 or more")
        require(self.shard_size is None or self.shard_size >= 1, "shard_size", self.shard_size, "1 or more")
        is_cosine = self.min_similarity is None or -1 <= self.min_similarity <= 1
        require(is_cosine, "min_similarity", self.min_similarity, "a cosine, -1 to 1")
        require(self.max_caption_chars >= 0, "max_caption_chars", self.max_caption_chars, "0 (no limit) or more")

    @property
    def rule(self) -> LabelRule:
        """How captions become synsets. Raises UserError when the file of stop words cannot be read."""
        return LabelRule(
            nouns_only=self.nouns_only,
            tagger=self.tagger,
            collocations=self.collocations,
            synonyms=self.synonyms,
            stop_words=_read_stop_words(self.stop_words) if self.stop_words else (),
        )


def _read_stop_words(source: str) -> tuple[str, ...]:
    """The lower-cased words of a text file, ascending."""
    if source == "function":
        return FUNCTION_WORDS
    try:
        text = decode_text(source, read_bytes(source))
    except OSError as error:
        raise UserError(f"--stop-words {source} cannot be read ({short(error)}): give a text file of words") from error
    return tuple(sorted(set(text.lower().split())))
