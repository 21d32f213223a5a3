"""Suggestions for a misspelt name."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

SHORT = 24  # names that a message lists in full
CLOSE = 0.08  # a name is suggested when its similarity is this close to the highest


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A phrase for a message: the known names most similar to ``word``.

    Without a similar one it lists all names where they are few, else it tells their number.
    """
    by_lower = {name.lower().lstrip("-"): name for name in known}
    word = word.lower().lstrip("-")
    near = [word] if word in by_lower else get_close_matches(word, by_lower, cutoff=0.7)
    if near:
        similarity = [SequenceMatcher(None, word, name).ratio() for name in near]
        near = [name for name, own in zip(near, similarity, strict=True) if own > max(similarity) - CLOSE]
        return f"did you mean {' or '.join(by_lower[name] for name in near)}?"
    if len(by_lower) <= SHORT:
        return f"there are {', '.join(by_lower.values())}"
    return f"none of the {len(by_lower)} names is like it"
