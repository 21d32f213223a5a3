"""ImageNet's 1,000 classes and CLIP's prompts for them, for folders named by WNIDs or by numbers.

Names and prompts are open_clip's (`open_clip.zero_shot_metadata`), the WNIDs timm's (`timm.data.ImageNetInfo`); both
are ordered by WNID. ImageNet's val, Sketch, -R and -A have WNID folders, of 1,000, 1,000, 200 and 200 classes, and
ImageNet-V2 has folders 0 to 999.
"""

import pkgutil
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from shards_spec.files import UserError
from shards_spec.messages import counted

WNID = re.compile(r"n[0-9]{8}")
CLASSES = 1000
SAME_WORDS = 950


@cache
def _synsets() -> Any:
    """Timm's table of the 1,000 classes. Imported where it is used, since that takes a second."""
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo()


@cache
def wnids() -> tuple[str, ...]:
    """Return the WNIDs of the 1,000 classes in the order of their labels."""
    return tuple(_synsets().label_names())


def are_synset_words(names: Sequence[str]) -> bool:
    """Return whether names are the words of the 1,000 synsets in order, as Hugging Face's imagenet-1k has them.

    ``tench, Tinca tinca``: the first word counts, and some may be spelt otherwise.
    """
    if len(names) != CLASSES:
        return False
    words = [_synsets().index_to_description(label) for label in range(CLASSES)]
    same = sum(_first_word(one) == _first_word(other) for one, other in zip(names, words, strict=True))
    return same >= SAME_WORDS


def _first_word(names: str) -> str:
    return names.partition(",")[0].strip().lower().replace("_", " ")


@cache
def class_names() -> tuple[str, ...]:
    """Return the names that CLIP is evaluated with, in the order of the labels."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


@cache
def prompts() -> tuple[str, ...]:
    """Return CLIP's 80 prompts, with ``{c}`` for the class."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{c}") for template in OPENAI_IMAGENET_TEMPLATES)


@cache
def labels_of_variant(letter: Literal["a", "r"]) -> tuple[int, ...]:
    """Return the labels of the 200 classes that ImageNet-A or ImageNet-R has, ascending."""
    data = pkgutil.get_data("timm.data", f"_info/imagenet_{letter}_indices.txt") or b""
    return tuple(map(int, data.split()))


def labels_of_folders(folders: Sequence[str], where: str, fix: str) -> dict[str, int] | None:
    """Return for each class folder its class of the 1,000; None for folders that are not named as ImageNet's.

    Args:
        folders: Names of the folders, without doubles.
        where: The folder that has them, for messages.
        fix: What to do where they are WNIDs of other classes.

    Raises:
        UserError: All folders are WNIDs and some are none of ImageNet's.
    """
    if not folders:
        return None
    if all(WNID.fullmatch(name) for name in folders):
        number = {wnid: label for label, wnid in enumerate(wnids())}
        if unknown := sorted({*folders} - number.keys()):
            raise UserError(
                f"{where}: {counted(len(unknown), 'class folder')} of {len(folders)} ({', '.join(unknown[:3])}) "
                f"named by a WNID that is none of ImageNet's 1,000: {fix}"
            )
        return {name: number[name] for name in folders}
    if {*folders} == {str(label) for label in range(CLASSES)}:  # ImageNet-V2
        return {name: int(name) for name in folders}
    return None
