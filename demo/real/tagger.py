"""A Penn tagger for `clipmill pack --nouns-only`: NLTK's perceptron with the weights of textblob-aptagger.

    PYTHONPATH=demo/real PACKAGES=demo-run/packages clipmill pack ROOT --nouns-only --tagger tagger:tag

NLTK's own weights come from a download that is not everywhere at hand. NLTK's code is a port of the package's
(Matthew Honnibal's averaged perceptron, MIT), so its weights fit. They are a pickle, of which nothing but containers
of numbers and texts is read.
"""

import io
import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any

from nltk.tag.perceptron import PerceptronTagger

FILE = "textblob_aptagger/trontagger-0.1.0.pickle"


class _DataUnpickler(pickle.Unpickler):
    """Refuses everything but dicts, tuples, sets, numbers and texts."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != ("__builtin__", "set"):
            raise pickle.UnpicklingError(f"{FILE} wants {module}.{name}, which is no data")
        return set


@cache
def _tagger() -> PerceptronTagger:
    data = Path(os.environ.get("PACKAGES", "demo-run/packages"), FILE).read_bytes()
    tagger = PerceptronTagger(load=False)
    trained = _DataUnpickler(io.BytesIO(data), encoding="utf-8").load()
    tagger.model.weights = trained[0]
    tagger.tagdict = trained[1]
    tagger.model.classes = trained[2]
    tagger.classes = tagger.model.classes
    return tagger


def tag(words: list[str]) -> list[str]:
    """Return the Penn tag of each word of a caption."""
    return [found for _, found in _tagger().tag(words)]
