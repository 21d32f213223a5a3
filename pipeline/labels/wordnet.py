"""The noun side of WordNet 3.0: lemmas, first senses, and NLTK 3.8.1's lemmatiser.

The files are parsed directly: a fraction of the time and memory of NLTK's reader, none of its data packages, and the
lemmatiser stays what the released code of CatLIP (arXiv 2404.15653) pinned; NLTK's own changed in 3.9.
"""

import contextlib
import io
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from shards_spec.files import UserError

WORDNET_VERSION = "3.0"
DOG = "n02084071"  # WNID of "dog", which tells versions apart: WordNet 3.1 has another offset
LEMMAS = 117_798  # nouns in WordNet 3.0
SYNSETS = 82_115
FILES = ("index.noun", "data.noun", "noun.exc")
DEBIAN_FOLDERS = ("/usr/share/wordnet", "/usr/share/wordnet-3.0/dict", "/usr/local/WordNet-3.0/dict")
SUFFIXES = (  # (of a plural, of its lemma)
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)


@dataclass(frozen=True)
class WordNet:
    """The nouns of WordNet 3.0.

    ``first_sense`` maps a lemma to the WNID of its sense 1, ``heads`` a WNID to the first lemma of its synset,
    ``exceptions`` an irregular form to its lemmas (noun.exc).
    """

    first_sense: dict[str, str]
    heads: dict[str, str]
    exceptions: dict[str, list[str]]

    def lemmatise(self, token: str) -> str:
        """NLTK 3.8.1's ``WordNetLemmatizer().lemmatize(token)``: shortest known form, first on ties, else itself."""
        if token in self.exceptions:
            known = self._known([token, *self.exceptions[token]])
        else:
            forms = _strip_suffixes([token])
            known = self._known([token, *forms])
            while forms and not known:
                forms = _strip_suffixes(forms)
                known = self._known(forms)
        return min(known, key=len) if known else token

    def _known(self, forms: list[str]) -> list[str]:
        return [form for form in forms if form in self.first_sense]

    def synset(self, token: str, synonyms: bool = False) -> str | None:
        """WNID of the first sense of a token's lemma, or None.

        The lemma must be the first name of that synset, else "bike" would be a motorcycle; ``synonyms`` lifts that.
        """
        lemma = self.lemmatise(token)
        wnid = self.first_sense.get(lemma)
        if wnid is None or synonyms or self.heads[wnid].lower() == lemma:
            return wnid
        return None


def _strip_suffixes(forms: Iterable[str]) -> list[str]:
    stripped = list[str]()
    for form in forms:
        stripped += [form.removesuffix(old) + new for old, new in SUFFIXES if form.endswith(old)]
    return stripped


def find_wordnet(folder: str | None = None, download: bool = False) -> Path:
    """Where the three noun files are: a folder, or ``wordnet.zip`` as NLTK's downloader writes it.

    Looks in ``folder`` alone when it is given, else in NLTK's data folders, then Debian's. ``download`` asks NLTK's
    downloader for it when it is not found. Raises UserError that says how to get it.
    """
    for candidate in [folder] if folder else [*_nltk_folders(), *DEBIAN_FOLDERS]:
        path = Path(candidate).expanduser()
        if all((path / name).is_file() for name in FILES):
            return path
        archive = path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")
        if archive.is_file() and zipfile.is_zipfile(archive):
            return archive
    if download and not folder:
        _download()
        return find_wordnet()
    raise UserError(
        f"WordNet 3.0 is not in {folder or 'any usual place'}: apt-get install wordnet-base, or pack "
        "--download-wordnet (NLTK's, 10 MB), or --wordnet DIR with index.noun, data.noun, noun.exc"
    )


def _nltk_folders() -> list[str]:
    """The same as ``nltk.data.path``, without importing NLTK, which takes longer than reading WordNet."""
    prefixes = [os.path.join(sys.prefix, *part) for part in ((), ("share",), ("lib",))]
    prefixes += ["~", "/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib"]
    roots = [root for root in os.environ.get("NLTK_DATA", "").split(os.pathsep) if root]
    roots += [os.path.join(prefix, "nltk_data") for prefix in prefixes]
    return [os.path.join(root, "corpora", "wordnet") for root in roots]


def _download() -> None:
    from nltk.downloader import Downloader

    try:
        Downloader().download("wordnet", quiet=True, raise_on_error=True, print_error_to=io.StringIO())
    except (ValueError, OSError) as error:
        raise UserError(
            f"NLTK's downloader cannot get WordNet ({error}): apt-get install wordnet-base, or --wordnet DIR with "
            "index.noun, data.noun, noun.exc"
        ) from error


@lru_cache(maxsize=2)
def load_wordnet(folder: str | None = None) -> WordNet:
    """Parse the noun files once per process: 0.3 s, 30 MB. Raises UserError when absent, damaged or not WordNet 3.0."""
    path = find_wordnet(folder)
    advice = "WNIDs of other versions do not match ImageNet's. Give --wordnet a folder of version 3.0"
    try:
        heads = {f"n{fields[0]}": fields[4] for fields in _rows(path, "data.noun", 5)}
        interned = {wnid: wnid for wnid in heads}  # one string object per WNID, to save memory
        senses = ((fields[0], f"n{fields[6 + int(fields[3])]}") for fields in _rows(path, "index.noun"))
        first_sense = {lemma: interned.get(wnid, wnid) for lemma, wnid in senses}
        exceptions = {form: lemmas for form, *lemmas in _rows(path, "noun.exc")}
    except (IndexError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as WordNet 3.0 ({error}): {advice}") from error
    if first_sense.get("dog") != DOG:
        raise UserError(f"{path} is not WordNet 3.0: dog is {first_sense.get('dog')}, expected {DOG}; {advice}")
    if (len(first_sense), len(heads)) != (LEMMAS, SYNSETS):
        raise UserError(
            f"{path} is not the whole of WordNet 3.0: {len(first_sense)} nouns and {len(heads)} synsets, expected "
            f"{LEMMAS} and {SYNSETS}; install it again"
        )
    return WordNet(first_sense, heads, exceptions)


@lru_cache(maxsize=2)
def load_hypernyms(folder: str | None = None) -> dict[str, tuple[str, ...]]:
    """WNID to its hypernyms, one level up, also of instances ("@" and "@i" in WordNet's files). Raises UserError."""
    load_wordnet(folder)  # raises UserError for files that are damaged
    hypernyms = dict[str, tuple[str, ...]]()
    for fields in _rows(find_wordnet(folder), "data.noun"):
        first = 4 + 2 * int(fields[3], 16)  # after the words comes the number of pointers, then four fields of each
        pointers = (fields[first + 1 + 4 * number :][:2] for number in range(int(fields[first])))
        hypernyms[f"n{fields[0]}"] = tuple(f"n{target}" for symbol, target in pointers if symbol in ("@", "@i"))
    return hypernyms


def _rows(path: Path, name: str, splits: int = -1) -> Iterator[list[str]]:
    """Fields of each line of a file of WordNet; after ``splits`` fields the rest of the line is one field."""
    with contextlib.ExitStack() as stack:
        if path.suffix == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(path))
            binary: IO[bytes] = stack.enter_context(archive.open(f"wordnet/{name}"))
        else:
            binary = stack.enter_context(open(path / name, "rb"))
        for line in io.TextIOWrapper(binary, "latin-1"):
            if not line.startswith("  "):  # the licence
                yield line.split(maxsplit=splits)
