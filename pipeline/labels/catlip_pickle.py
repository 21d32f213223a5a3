"""CatLIP's own vocabulary file: a pickled dictionary from key (``n2084071``) to count, in the order of the classes.

A pickle from the web may run any code when it is loaded, so nothing is unpickled here: the file's opcodes are read
(`pickletools`), and only those that make one dictionary of strings and integers are known.
"""

import pickle
import pickletools
import re
from collections.abc import Mapping
from typing import Any

from shards_spec.files import DataError
from shards_spec.vocab import Vocabulary

KEY = re.compile(r"n[0-9]{1,8}")
NO_EFFECT = {"PROTO", "FRAME"}
STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
INTEGERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"}


def read_catlip(data: bytes, path: str) -> dict[str, int]:
    """WNID (ImageNet's form) to count, in the file's order. Raises DataError, naming ``path``, for anything else."""
    try:
        dictionary = _read_dictionary(data)
        counts = {f"n{int(key[1:]):08d}": count for key, count in dictionary.items() if KEY.fullmatch(key)}
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a pickled dictionary of keys like n2084071 and counts ({error}); save it as "
            "pickle.dump({str(key): int(count) for key, count in x.items()}, file)"
        ) from error
    wrong = [repr(pair)[:80] for pair in dictionary.items() if not KEY.fullmatch(pair[0]) or type(pair[1]) is not int]
    if wrong or len(counts) != len(dictionary):
        raise DataError(
            f"{path}: {wrong[0] if wrong else 'a key twice'}; expected keys like n2084071, once, and counts"
        )
    return counts


def _read_dictionary(data: bytes) -> dict[Any, Any]:
    """Run the opcodes on a stack, as an unpickler does. Raises ValueError for one that is not needed."""
    stack = list[Any]()
    marks = list[int]()
    memo = dict[int, Any]()
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in STRINGS or name in INTEGERS:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            start = len(stack) - 2 if name == "SETITEM" else marks.pop()
            items = stack[start:]
            del stack[start:]
            if name == "DICT":
                stack.append({})
            if not isinstance(stack[-1], dict):
                raise ValueError(f"{name} of something that is no dictionary")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in NO_EFFECT and name != "STOP":
            raise ValueError(f"it holds {name}")
    if len(stack) != 1 or not isinstance(stack[0], dict):
        raise ValueError("it holds no dictionary, or more than one thing")
    return stack[0]


def catlip_bytes(vocabulary: Vocabulary) -> bytes:
    """The vocabulary as CatLIP's code loads it: unpadded keys, insertion order is the rank."""
    counts: Mapping[str, int] = {f"n{int(wnid[1:])}": count for wnid, _, count, _ in vocabulary.rows}
    return pickle.dumps(counts, protocol=4)
