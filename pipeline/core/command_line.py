"""Options of a command on the command line: in groups, with an example on top, and mistakes told in one line.

tyro reads dataclasses and writes help. It is given the fields of a command's config in groups of our own, and the
config is built of what it read: so configs stay as flat or as composed as their stages like them.
"""

import ast
import contextlib
import dataclasses
import errno
import inspect
import io
import os
import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, cast, get_type_hints

import tyro

from shards_spec.files import UserError
from shards_spec.suggest import did_you_mean

# command (of a recipe: "train RECIPE"): an example, then the options in groups; what is in none stands in the last one
EXAMPLES = {
    "ingest": "/data/cc3m --source Train_GCC-training.tsv",
    "dedup": "/data/cc3m",
    "caption": "/data/cc3m --model coca_ViT-L-14 --pretrained mscoco_finetuned_laion2b_s13b_b90k --num-captions 5",
    "pack": "/data/cc3m",
    "vocab": "/data/cc3m --min-count 500",
    "classes": "classnames.txt --vocabulary /data/cc3m/vocab/all.tsv --out imagenet.tsv",
    "cache": "/data/cc3m --model ViT-L-14 --pretrained datacomp_xl_s13b_b90k --views 8 --ops 2",
    "eval": "runs/clip --data /data/eval/flickr30k",
    "export": "runs/clip --to exported",
    "report": "/data/cc3m",
    "check": "/data/cc3m",
    "jobs": "/data/cc3m",
    "train clip": "--data /data/cc3m --model ViT-B-32 --out runs/clip",
    "train affinity": "--data /data/cc3m --model ViT-M-32 --out runs/affinity",
    "train siclip": "--data /data/cc3m --base-weights mobileclip_s0.pt --out runs/siclip",
    "train catlip": "--data /data/cc3m --out runs/catlip",
    "train coca": "--data /data/cc3m --model coca_ViT-B-32 --out runs/coca",
    "train probe": "--data /data/cifar10 --model runs/catlip --out runs/probe",
    "train finetune": "--data /data/cifar10 --model runs/catlip --out runs/finetune",
}
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "ingest": {
        "basic": ("root", "source", "format", "url_col", "caption_col", "shard_size", "image_size", "retry_failed",
                  "overwrite"),
        "selection": ("min_size", "max_aspect_ratio", "min_caption_chars", "max_caption_chars", "sane_captions",
                      "dedup", "near_bits", "exclude", "max_bytes", "max_pixels"),
    },
    "caption": {
        "basic": ("root", "model", "pretrained", "name", "num_captions", "similarity", "device", "batch_size",
                  "overwrite"),
    },
    "pack": {
        "basic": ("root", "captioner", "min_similarity", "shard_size", "workers", "overwrite"),
    },
    "cache": {
        "basic": ("root", "model", "pretrained", "name", "views", "dtype", "device", "batch_size", "overwrite"),
    },
    "train": {
        "basic": ("data", "out", "model", "pretrained", "base", "base_weights", "vocabulary", "teacher", "batch_size",
                  "steps", "epochs", "lr", "precision", "device", "fit", "smoke", "predict_memory"),
    },
}  # fmt: skip
REQUIRED = ("data",)  # by every recipe; its default is empty so that a config can be made without it


@dataclasses.dataclass(frozen=True)
class Tries:
    """What a recipe can do besides training."""

    smoke: bool = False
    """train four small steps of eight pairs, to see that all fits together"""
    predict_memory: bool = False
    """only say what memory a step takes"""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An option: where its value belongs in the config, and all that tyro wants to know."""

    name: str
    group: str
    hint: Any
    help: str
    default: Any

    @property
    def flags(self) -> tuple[str, ...]:
        flag = self.name.replace("_", "-")
        return (f"--{flag}", f"--no-{flag}") if isinstance(self.default, bool) else (f"--{flag}",)

    @property
    def field(self) -> tuple[str, Any, Any]:
        default = (
            dataclasses.field() if self.default is dataclasses.MISSING else dataclasses.field(default=self.default)
        )
        return self.name, Annotated[self.hint, tyro.conf.arg(help=self.help)], default


def parse(command: str, config_class: Any, words: list[str], default: Any = None) -> Any:
    """The config that the words of a command line make. Raises UserError, one line, for words that make none."""
    return parse_several(command, {"": (config_class, default)}, words)[0]


def parse_several(command: str, parts: dict[str, tuple[Any, Any]], words: list[str]) -> list[Any]:
    """Several configs from one command line: ``parts`` is name -> (dataclass, default or None).

    Fields of a part that has a name stand in a group of that name, unless the command's groups name them.
    """
    leaves = [leaf for name, (kind, default) in parts.items() for leaf in _leaves(kind, default, name)]
    recipe = command.startswith("train ")
    if recipe:
        leaves = [_required(leaf) if leaf.name in REQUIRED and leaf.default == "" else leaf for leaf in leaves]
    groups = GROUPS.get(command.removeprefix("submit ").split(" ")[0], {})
    about = (next(iter(parts.values()))[0].__doc__ or "").strip()
    if example := EXAMPLES.get(command.removeprefix("submit ")):
        about += f"\n\nFor example: clipmill {command} {example}"
    with _in_one_line(command, leaves, words):
        read = tyro.cli(_grouped(leaves, groups), args=words, prog=f"clipmill {command}", description=about)
    values = {name: value for group in vars(read).values() for name, value in vars(group).items()}
    for name in ("root", "data", "out") if recipe else ("root",):
        if os.path.isfile(value := values.get(name, "")):
            raise UserError(f"{value} is a file: {'ROOT' if name == 'root' else f'--{name}'} is a folder or its URL")
        if os.path.isdir(value) and not os.access(value, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), value)
    return [_build(kind, default, values) for kind, default in parts.values()]


def parse_known(command: str, kind: Any, default: Any, words: list[str]) -> tuple[Any, list[str]]:
    """The config that some of the words make, and the other words. Raises UserError."""
    with _in_one_line(command, [], words):
        return tyro.cli(kind, args=words, prog=f"clipmill {command}", default=default, return_unknown_args=True)


@contextlib.contextmanager
def _in_one_line(command: str, leaves: list["_Leaf"], words: list[str]) -> Iterator[None]:
    """What tyro says of a mistake, which is a page, becomes a UserError of a line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as leave:
        if not leave.code:
            raise
        raise UserError(_mistake(command, leaves, words, said.getvalue())) from None


def _leaves(kind: Any, default: Any, group: str) -> Iterator[_Leaf]:
    """The fields of a config and of the configs that it is composed of."""
    hints, helps = get_type_hints(kind, include_extras=True), _helps(kind)
    for field in dataclasses.fields(kind):
        value = _default(field, default)
        if dataclasses.is_dataclass(value):
            yield from _leaves(type(value), value, field.name)
        else:
            yield _Leaf(field.name, group, hints[field.name], helps.get(field.name, ""), value)


def _default(field: Any, default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _helps(kind: type) -> dict[str, str]:
    """The strings that stand below the fields of a dataclass."""
    found = dict[str, str]()
    for one in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for line, after in pairwise(lines):
            if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(line.target, ast.Name):
                found[line.target.id] = inspect.cleandoc(ast.literal_eval(after.value)).replace("\n", " ")
    return found


def _required(leaf: _Leaf) -> _Leaf:
    return dataclasses.replace(leaf, default=dataclasses.MISSING)


def _grouped(leaves: list[_Leaf], groups: dict[str, tuple[str, ...]]) -> Any:
    """A dataclass of a dataclass per group; the command's own groups come first."""
    named = {name: group for group, names in groups.items() for name in names}
    order = {name: place for place, name in enumerate(named)}
    of = dict[str, list[_Leaf]]({group: [] for group in groups})
    for leaf in sorted(leaves, key=lambda leaf: order.get(leaf.name, len(order))):
        of.setdefault(named.get(leaf.name, leaf.group or ("more" if groups else "options")), []).append(leaf)
    pieces, without_prefix = list[tuple[str, Any]](), cast(Any, tyro.conf.OmitArgPrefixes)
    for group, own in of.items():
        if own:
            own = sorted(own, key=lambda leaf: leaf.default is not dataclasses.MISSING)  # as dataclasses want it
            piece = dataclasses.make_dataclass(group, [leaf.field for leaf in own])
            piece.__doc__ = ""
            pieces.append((group, without_prefix[piece]))
    return dataclasses.make_dataclass("Options", pieces)


def _build(kind: Any, default: Any, values: dict[str, Any]) -> Any:
    found = dict[str, Any]()
    for field in dataclasses.fields(kind):
        value = _default(field, default)
        composed = dataclasses.is_dataclass(value)
        found[field.name] = _build(type(value), value, values) if composed else values[field.name]
    return kind(**found)


def _mistake(command: str, leaves: list[_Leaf], words: list[str], said: str) -> str:
    """What is wrong with the words, as tyro ``said`` at length."""
    help_ = f"clipmill {command} --help"
    known = [flag for leaf in leaves for flag in leaf.flags]
    given = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    for flag in given:
        if known and flag not in known:
            near = did_you_mean(flag, known)
            return f"{command}: no option {flag}; {near if near.startswith('did') else f'{help_} shows all'}"
    needed = [_wanted(leaf) for leaf in leaves if leaf.default is dataclasses.MISSING]
    missing = [name for name in needed if name not in given and re.search(rf"(?m)^\W*{re.escape(name)}\b", said)]
    if missing:
        example = EXAMPLES.get(command)
        way = f"for example: clipmill {command} {example}" if example else help_
        return f"{command}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed; {way}"
    # below its title, above the option's help; lines of one box, in ASCII where the terminal is
    told = next((part for part in re.split(r"[─-]{10,}.*", said)[1:] if re.search(r"\w", part)), "cannot be read")
    return f"{command}: {' '.join(re.sub('[│╮]', ' ', told).split()).rstrip('.')}; {help_} shows all options"


def _wanted(leaf: _Leaf) -> str:
    """What stands for an option in tyro's words: its flag, or of a positional one its name in capitals."""
    for note in getattr(leaf.hint, "__metadata__", ()):
        if metavar := getattr(note, "metavar", None):
            return str(metavar)
    return leaf.flags[0]
