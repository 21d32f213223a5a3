"""Weights from a file: safetensors, or torch's own formats, of which only tensors and plain values are unpickled.

A pickle can run its maker's code when it is loaded. So `torch.load` gets ``weights_only``, and the types that training
loops (open_clip's, timm's) keep next to weights are allowed: numpy's scalars and argparse's Namespace. ``trust`` loads
a file that holds more. torch is imported inside the functions only.
"""

import pickle
import pickletools
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from shards_spec.files import UserError, open_read
from shards_spec.library_errors import LONGEST, checkpoint_errors, short

WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where training loops keep weights, timm's order
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "n_averaged")  # OpenAI's archives, AveragedModel
LEGACY_PICKLES = 5  # magic number, protocol, system, the object, names of storages
SHOWN = 3  # names in a message
TRUST = "take a safetensors file, or give --trust-checkpoint if you trust whoever made it: it runs their code"


def read_checkpoint(path: str, trust: bool = False, given: bool = True, fix: str = "") -> Any:
    """What a checkpoint file holds, on the CPU. ``trust`` unpickles anything, so the file can run code.

    ``given``: it is the user's file and not one that this package wrote. Raises UserError and DataError.
    """
    import torch

    with checkpoint_errors(path, given, fix):
        with open_read(path) as file:
            head = file.read(9)
        if head[8:] == b"{":  # safetensors: a length, then JSON, whatever the file is called
            from safetensors.torch import load_file

            return load_file(path)
        if head[:2] != b"PK" and not trust:
            _check_names(path)
        others = _other_types(path) if given and not trust else []
        if others:
            raise UserError(f"{path} holds Python objects besides tensors ({_name_some(others)}); {TRUST}")
        with open_read(path) as file, warnings.catch_warnings(), torch.serialization.safe_globals(_allowed()):
            warnings.simplefilter("ignore")  # about pickle's protocol and TorchScript, which `_unpickling` tells
            try:
                return torch.load(file, map_location="cpu", weights_only=not trust)  # of a path, its ending would count
            except ImportError as error:
                raise UserError(
                    f"{path} needs a Python package that is not here ({short(error)}); install it"
                ) from error
            except (pickle.UnpicklingError, RuntimeError) as error:
                raise _unpickling(path, error, given) from error


def _unpickling(path: str, error: Exception, given: bool) -> Exception:
    """What is behind torch's paragraph about ``weights_only``: code in the file, or a file of another kind."""
    text = str(error)
    if "TorchScript" in text:
        return UserError(f"{path} is a TorchScript archive, a program; {TRUST}")
    if found := re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)", text):
        held = f"holds Python objects besides tensors ({found[1] or found[2]})"
        return UserError(f"{path} {held}; {TRUST}") if given else ValueError(held)
    if isinstance(error, pickle.UnpicklingError):
        return ValueError("neither safetensors nor a format of torch's")
    return ValueError(f"cut short or damaged: {text.partition('. ')[0]}")


def load_checkpoint(path: str, trust: bool = False, own: Collection[str] = ()) -> dict[str, Any]:
    """The weights in a checkpoint file by name, on the CPU, without the names that wrappers put before their modules.

    ``own`` are the names of the model that they are for. Raises UserError when there are none, or NaN among them.
    """
    content = read_checkpoint(path, trust)
    if isinstance(content, Mapping) and {"task", "progress"} <= set(content):
        raise UserError(f"{path} is a checkpoint of a RUN; name the RUN folder, or what `clipmill export` made of it")
    if isinstance(content, Mapping):
        content = next((content[name] for name in NESTED if isinstance(content.get(name), Mapping)), content)
    weights = _tensors(content)
    if not weights:
        held = (
            f"a mapping of {_name_some(map(str, content)) or 'nothing'}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise UserError(f"{path} holds no weights by name but {held}; give a state dict")
    names = {name: strip_wrappers(name, own) for name in weights}
    if len(set(names.values())) < len(names):
        raise UserError(f"{path} holds some weights twice, with and without module. or _orig_mod. before their names")
    for name, value in weights.items():
        if value.is_floating_point() and value.itemsize > 1 and value.isnan().any():  # torch tests no 8-bit floats
            raise UserError(f"{path}: {name} holds values that are no numbers (NaN); take an earlier or another file")
    return {names[name]: value for name, value in weights.items()}


def strip_wrappers(name: str, own: Collection[str] = ()) -> str:
    """A weight's name without ``module.`` and ``_orig_mod.``, wherever they stand.

    Where the model has modules of that name itself (timm's iformer), only those in front go.
    """
    parts = name.split(".")
    inner = [wrapper for wrapper in WRAPPERS if not any(f".{wrapper}." in f".{mine}" for mine in own)]
    while len(parts) > 1 and parts[0] in WRAPPERS and name not in own:
        parts = parts[1:]
    return ".".join([part for part in parts[:-1] if part not in inner] + parts[-1:])


def describe_mismatch(error: BaseException) -> str:
    """What `torch.nn.Module.load_state_dict` says, which is thousands of names for another architecture, in a line."""
    text, found = str(error), list[str]()
    for said, pattern in (
        ("missing", r"Missing key\(s\) in state_dict: (.*)"),
        ("left over", r"Unexpected key\(s\).*?: (.*)"),
    ):
        names = re.findall(r'"([^"]+)"', " ".join(re.findall(pattern, text)))
        if names:
            found.append(f"{len(names)} weights {said} ({_name_some(names)})")
    shapes = re.findall(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", text)
    if shapes:
        name, there, wanted = shapes[0]
        found.append(f"{len(shapes)} of another shape ({name} is {there}, the model's {wanted})")
    return "; ".join(found)[: 2 * LONGEST] or short(error)


def _name_some(names: Any) -> str:
    """The first `SHOWN` names, for a message."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 80 else f"{name[:80]}..." for name in names[:SHOWN])
    return shown + (", ..." if len(names) > SHOWN else "")


def _tensors(found: Any) -> dict[str, Any]:
    import torch

    if isinstance(found, torch.jit.ScriptModule):
        found = found.state_dict()
    items = found.items() if isinstance(found, Mapping) else ()
    return {
        name: value
        for name, value in items
        if isinstance(name, str) and isinstance(value, torch.Tensor) and name not in NOT_WEIGHTS
    }


def _allowed() -> list[Any]:
    """Types that are safe: numpy's scalars, under the names of numpy 1 and 2, its dtypes, and argparse's Namespace."""
    import argparse

    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDG"]
    places = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [argparse.Namespace, np.dtype, *dict.fromkeys(dtypes), *((scalar, f"{place}.scalar") for place in places)]


def _check_names(path: str) -> None:
    """Raise ValueError for a type's name of thousands of characters in a file of before torch 1.6.

    torch puts it into its message and takes the square of its length to look that through: minutes.
    """
    try:
        with open_read(path) as file:
            for _ in range(LEGACY_PICKLES):
                for code, argument, _place in pickletools.genops(file):
                    if code.name in ("GLOBAL", "INST") and len(str(argument)) > LONGEST:
                        raise _LongNameError(f"it names a type of {len(str(argument))} characters")
    except _LongNameError:
        raise
    except Exception:  # damaged or no pickle: loading it will tell
        return


class _LongNameError(ValueError):
    pass


def _other_types(path: str) -> list[str]:
    """Types that a pickled checkpoint names and that are not loaded; empty where torch cannot tell."""
    import torch

    try:
        with torch.serialization.safe_globals(_allowed()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or of the format before torch 1.6: loading it will tell
        return []
