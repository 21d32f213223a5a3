"""The command line of a stage or recipe: options in groups, an example in the help, one-line messages for mistakes.

tyro reads dataclasses and writes the help. It is given the fields of a command's config in groups of our own, and the
config is built from what it read. So a config may be flat or composed of others, as its stage likes it.
"""

import ast
import contextlib
import dataclasses
import errno
import inspect
import io
import linecache
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, NoReturn, cast, get_type_hints

import tyro

from shards_spec.files import UserError
from shards_spec.messages import flag
from shards_spec.suggest import did_you_mean
from shards_spec.unused_options import refuse_unused

Root = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT")]  # the first field of a stage's config
# command (of a recipe: "train RECIPE") to the arguments that its help shows; those of "submit STAGE" are the stage's
EXAMPLES = {
    "ingest": "/data/cc3m --source Train_GCC-training.tsv",
    "dedup": "/data/cc3m",
    "caption": "/data/cc3m --model coca_ViT-L-14 --pretrained mscoco_finetuned_laion2b_s13b_b90k --num-captions 5",
    "pack": "/data/cc3m",
    "vocab": "/data/cc3m --min-count 500",
    "select": "/data/cc3m --name good --where 'cosine > 0.2 and language == \"en\"' --captions-where 'cosine > 0.18'",
    "plan": "Train_GCC-training.tsv --views 8 --dtype int8",
    "classes": "classnames.txt --vocabulary /data/cc3m/vocab/all.tsv --out imagenet.tsv",
    "cache": "/data/cc3m --model ViT-L-14 --pretrained datacomp_xl_s13b_b90k --views 8 --ops 2",
    "evalset": "/data/eval/imagenet --classes /data/imagenet/val",
    "eval": "runs/clip --data /data/eval/flickr30k",
    "search": "runs/clip --images photos --text 'a dog on a beach' --html found.html",
    "export": "runs/clip --to exported",
    "report": "/data/cc3m",
    "compare": "runs/clip runs/tinyclip --data /data/eval/flickr30k",
    "check": "/data/cc3m",
    "why": "/data/cc3m 000120042 --run runs/tinyclip",
    "takedown": "/data/cc3m --list requests.txt",
    "jobs": "/data/cc3m",
    "train clip": "--data /data/cc3m --model ViT-B-32 --out runs/clip",
    "train tinyclip": "--data /data/cc3m --model ViT-M-32 --out runs/tinyclip",
    "train siclip": "--data /data/cc3m --base-weights mobileclip_s0.pt --out runs/siclip",
    "train catlip": "--data /data/cc3m --out runs/catlip",
    "train tinymim": "--data /data/cc3m --model timm:vit_base_patch16_224 --out runs/tinymim",
    "train minivit": "--data /data/imagenet --teacher timm:swin_base_patch4_window7_224 --out runs/minivit",
    "train coca": "--data /data/cc3m --model coca_ViT-B-32 --out runs/coca",
    "train probe": "--data /data/cifar10 --model runs/catlip --out runs/probe",
    "train finetune": "--data /data/cifar10 --model runs/catlip --out runs/finetune",
    "submit pipeline": "/data/cc3m --array 16 -- ingest --source Train_GCC-training.tsv -- dedup -- pack -- vocab "
    "-- cache --views 8 --ops 2 -- train tinyclip --model ViT-M-32 --out runs/tinyclip",
    "submit train": "tinyclip --data /data/cc3m --model ViT-M-32 --out runs/tinyclip --gpus-per-node 4",
}
# command to its groups of options, in the order of the help; an option that is in no group comes after them
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "ingest": {
        "basic": (
            "root",
            "source",
            "format",
            "url_col",
            "caption_col",
            "shard_size",
            "image_size",
            "retry_failed",
            "overwrite",
        ),
        "selection": (
            "min_size",
            "max_aspect_ratio",
            "min_caption_chars",
            "max_caption_chars",
            "sane_captions",
            "dedup",
            "near_bits",
            "exclude",
            "max_bytes",
            "max_pixels",
        ),
    },
    "caption": {
        "basic": (
            "root",
            "model",
            "pretrained",
            "name",
            "num_captions",
            "similarity",
            "from_",
            "server",
            "device",
            "batch_size",
            "overwrite",
        ),
    },
    "pack": {
        "basic": (
            "root",
            "captioner",
            "min_similarity",
            "shard_size",
            "workers",
            "overwrite",
        ),
    },
    "cache": {
        "basic": (
            "root",
            "model",
            "pretrained",
            "name",
            "views",
            "dtype",
            "device",
            "batch_size",
            "overwrite",
        ),
    },
    "train": {
        "basic": (
            "data",
            "out",
            "model",
            "pretrained",
            "base",
            "base_weights",
            "inherit",
            "teacher_weights",
            "sparsity",
            "stages",
            "vocabulary",
            "teacher",
            "batch_size",
            "steps",
            "epochs",
            "lr",
            "precision",
            "device",
            "fit",
            "smoke",
            "predict_memory",
        ),
    },
}
HELP = ("-h", "--help")
TOO_MANY = re.compile(r"^Unrecognized options: (?P<word>[^-\s,][^\s,]*)(, .*)?$")
NO_TYPE = re.compile(
    r"Error parsing (?P<flag>--\S+): no type matching (?P<types>.+?) could be instantiated from \[(?P<values>.*?)\]\..*"
)
REQUIRED = ("data",)  # options that every recipe needs; their default is empty, so that a config can be made without


@dataclasses.dataclass(frozen=True)
class _Option:
    """An option: a field of the config, the group of the help that it is in, and what tyro needs to know."""

    name: str
    group: str
    hint: Any
    help: str
    default: Any

    @property
    def flags(self) -> tuple[str, ...]:
        if isinstance(self.default, bool):
            return flag(self.name), flag(f"no_{self.name}")
        return (flag(self.name),)

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def field(self) -> tuple[str, Any, Any]:
        """As `dataclasses.make_dataclass` takes it."""
        default = dataclasses.field() if self.is_required else dataclasses.field(default=self.default)
        name = self.name.rstrip("_") if self.name.endswith("_") else None  # tyro would keep the underscore in the flag
        return self.name, Annotated[self.hint, tyro.conf.arg(help=self.help, name=name)], default

    @property
    def shown_name(self) -> str:
        """What the help calls it: its flag, or the name in capitals of a positional argument."""
        for note in getattr(self.hint, "__metadata__", ()):
            if metavar := getattr(note, "metavar", None):
                return str(metavar)
        return self.flags[0]


def parse(command: str, config_class: Any, args: list[str], default: Any = None) -> Any:
    """The config that command-line arguments make. Raises UserError, one line, for arguments that make none."""
    return parse_several(command, {"": (config_class, default)}, args)[0]


def parse_several(command: str, parts: dict[str, tuple[Any, Any]], args: list[str]) -> list[Any]:
    """Several configs from one command line: ``parts`` maps a name to (dataclass, default or None).

    The fields of a named part are in a group of that name, unless one of the command's groups has them. Raises
    UserError, one line, for arguments that make no config or have no effect, and PermissionError for a folder that
    cannot be read.
    """
    if not {*HELP}.isdisjoint(args):
        args = ["--help"]  # after other arguments tyro's help would leave out what they gave
    options = list[_Option]()
    for name, (kind, default) in parts.items():
        options += _options(kind, default, name)
    is_recipe = command.removeprefix("submit ").startswith("train ")
    if is_recipe:
        options = [_with_required(option) for option in options]
    groups = GROUPS.get(command.removeprefix("submit ").split(" ")[0], {})
    description = _description(command, next(iter(parts.values()))[0])
    with _mistakes_in_one_line(command, options, args):
        parsed = tyro.cli(_grouped(options, groups), args=args, prog=f"clipmill {command}", description=description)
    values = dict[str, Any]()
    for group in vars(parsed).values():
        values |= vars(group)
    for option in options:
        _check_value(command, option, values[option.name])
    for name in ("root", "data", "out") if is_recipe else ("root",):
        _check_folder(name, values.get(name, ""))
    configs = [_build(kind, default, values) for kind, default in parts.values()]
    words = _flags_of(args)
    given = {option.name for option in options if not words.keys().isdisjoint(option.flags)}
    for config in configs:
        refuse_unused(config, given)
    return configs


def _flags_of(args: list[str]) -> dict[str, None]:
    """The options among arguments, as their help writes them, in the order of the arguments."""
    return {arg.partition("=")[0].replace("_", "-"): None for arg in args if arg.startswith("--")}


def _description(command: str, kind: Any) -> str:
    """What stands above the options in the help of a command."""
    description = inspect.cleandoc(kind.__doc__ or "")
    if example := _example(command):
        description += f"\n\nFor example: clipmill {command} {example}"
    return description


def _example(command: str) -> str | None:
    return EXAMPLES.get(command) or EXAMPLES.get(command.removeprefix("submit "))


def _check_value(command: str, option: _Option, value: Any) -> None:
    """Raise UserError for what no option means: an empty text, or a number that no array has places for."""
    if value == "" and option.default != "":
        raise UserError(f"{command}: {option.shown_name} is empty; is a variable of the shell unset?")
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, int) and abs(part) > sys.maxsize:
            raise UserError(f"{command}: {option.shown_name} {part} is too large; the most is {sys.maxsize}")


def _check_folder(name: str, path: Any) -> None:
    if os.path.isfile(path):
        raise UserError(f"{path} is a file: {'ROOT' if name == 'root' else flag(name)} is a folder or its URL")
    if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def option_names(kind: Any) -> list[str]:
    """The fields that the options of a config set, also those of configs that it is composed of."""
    return [option.name for option in _options(kind, None, "")]


def print_help(command: str, kind: Any, note: str) -> NoReturn:
    """Print the options of a config; ``note`` ends its description. Raises SystemExit, as all help does."""
    description = f"{_description(command, kind)}\n\n{note}"
    tyro.cli(kind, args=["--help"], prog=f"clipmill {command}", description=description)
    raise SystemExit(0)


def words_of_others(args: list[str], kind: Any) -> list[str]:
    """The arguments that are none of the options of a config, nor their values; all are known to be right."""
    flags = set[str]()
    for option in _options(kind, None, ""):
        flags.update(option.flags)
    words, is_others = list[str](), True
    for arg in args:
        if arg.startswith("--"):
            is_others = flags.isdisjoint(_flags_of([arg]))
        if is_others:
            words.append(arg)
    return words


@contextlib.contextmanager
def _mistakes_in_one_line(command: str, options: list[_Option], args: list[str]) -> Iterator[None]:
    """Turn what tyro prints about a mistake, a page, into a UserError of one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as leave:
        if not leave.code:
            raise
        raise UserError(_mistake(command, options, args, printed.getvalue())) from None


def _options(kind: Any, default: Any, group: str) -> Iterator[_Option]:
    """The fields of a config, and of the configs that it is composed of."""
    hints = get_type_hints(kind, include_extras=True)
    helps = _field_docstrings(kind)
    for field in dataclasses.fields(kind):
        value = _default(field, default)
        if dataclasses.is_dataclass(value):
            yield from _options(type(value), value, field.name)
        else:
            yield _Option(field.name, group, hints[field.name], helps.get(field.name, ""), value)


def _default(field: Any, default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@cache
def _field_docstrings(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of its bases, by field."""
    docstrings = dict[str, str]()
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        for line, after in pairwise(_class_bodies(inspect.getfile(base))[base.__qualname__]):
            if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(line.target, ast.Name):
                docstrings[line.target.id] = inspect.cleandoc(ast.literal_eval(after.value)).replace("\n", " ")
    return docstrings


@cache
def _class_bodies(path: str) -> dict[str, list[ast.stmt]]:
    """The statements of the classes of a file: it is parsed once, however many configs it has."""
    statements = ast.parse("".join(linecache.getlines(path))).body
    return {one.name: one.body for one in statements if isinstance(one, ast.ClassDef)}


def _with_required(option: _Option) -> _Option:
    """The option, without its default when every recipe needs it and the default is empty."""
    if option.name in REQUIRED and option.default == "":
        return dataclasses.replace(option, default=dataclasses.MISSING)
    return option


def _grouped(options: list[_Option], groups: dict[str, tuple[str, ...]]) -> Any:
    """A dataclass with a dataclass for each group; the command's own groups come first."""
    group_of = dict[str, str]()
    for group, names in groups.items():
        group_of |= dict.fromkeys(names, group)
    order = {name: position for position, name in enumerate(group_of)}
    rest = "more" if groups else "command"
    members = dict[str, list[_Option]]({group: [] for group in groups})
    for option in sorted(options, key=lambda option: order.get(option.name, len(order))):
        members.setdefault(group_of.get(option.name, option.group or rest), []).append(option)
    fields = list[tuple[str, Any]]()
    without_prefix = cast(Any, tyro.conf.OmitArgPrefixes)
    for group, own in members.items():
        if own:
            required_first = sorted(own, key=lambda option: not option.is_required)  # as dataclasses demand
            group_class = dataclasses.make_dataclass(group, [option.field for option in required_first])
            group_class.__doc__ = ""
            fields.append((group, without_prefix[group_class]))
    without_comments = cast(Any, tyro.conf.HelptextFromCommentsOff)  # tyro would look for the source of these classes
    return without_comments[dataclasses.make_dataclass("Options", fields)]


def _build(kind: Any, default: Any, values: dict[str, Any]) -> Any:
    arguments = dict[str, Any]()
    for field in dataclasses.fields(kind):
        value = _default(field, default)
        is_composed = dataclasses.is_dataclass(value)
        arguments[field.name] = _build(type(value), value, values) if is_composed else values[field.name]
    return kind(**arguments)


def _mistake(command: str, options: list[_Option], args: list[str], printed: str) -> str:
    """What is wrong with the arguments, in one line; tyro ``printed`` it at length."""
    help_command = f"clipmill {command} --help"
    known = list[str]()
    for own in options:
        known += own.flags
    given = _flags_of(args)
    for option in given:
        if known and option not in known:
            near = did_you_mean(option, known)
            advice = near if near.startswith("did") else f"{help_command} shows all"
            return f"{command}: no option {option}; {advice}"
    required = [own.shown_name for own in options if own.is_required]
    missing = [name for name in required if name not in given and re.search(rf"(?m)^\W*{re.escape(name)}\b", printed)]
    if missing:
        example = _example(command)
        advice = f"for example: clipmill {command} {example}" if example else help_command
        return f"{command}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed; {advice}"
    # tyro's message is between the title of its box and the option's help; boxes are ASCII where the terminal is
    sections = re.split(r"[─-]{10,}.*", printed)[1:]
    message = next((section for section in sections if re.search(r"\w", section)), "cannot be read")
    line = " ".join(re.sub("[│╮]", " ", message).split()).rstrip(".")
    line = NO_TYPE.sub(_describe_types, line)
    line = TOO_MANY.sub(lambda found: _describe_surplus(found["word"], args) or found[0], line)
    return f"{command}: {line}; {help_command} shows all options"


def _describe_surplus(word: str, args: list[str]) -> str:
    """``--teacher a b: b is one value too many``; nothing where no option stands before the word."""
    before = args[: args.index(word)] if word in args else []
    named = [index for index, arg in enumerate(before) if arg.startswith("--")]
    return f"{' '.join([*before[named[-1] :], word])}: {word} is one value too many" if named else ""


def _describe_types(found: re.Match[str]) -> str:
    """``--scale 0.5: give FLOAT FLOAT or None``, of what tyro says at length."""
    types = sorted((name.strip("{}") for name in found["types"].split("|")), key=lambda name: name == "None")
    values = " ".join(ast.literal_eval(f"[{found['values']}]"))
    return f"{found['flag']} {values}: give {' or '.join(types)}"
