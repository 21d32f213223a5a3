"""Options that have no effect beside others are refused, so that nobody takes them for having one."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from shards_spec.files import UserError
from shards_spec.messages import flag


class Unused(NamedTuple):
    """Fields of a config that nothing reads.

    Attributes:
        fields: Their names; they may be those of the configs that it is composed of.
        why: The end of "--option would not be used ...".
    """

    fields: Iterable[str]
    why: str


@runtime_checkable
class KnowsUnused(Protocol):
    """A config that says which of its options have no effect beside the others."""

    def unused(self) -> Iterator[Unused]:
        """Yield the fields without effect."""
        ...


def refuse_unused(config: Any, given: Collection[str]) -> None:
    """Raise UserError where a field that was given has no effect.

    Args:
        config: A dataclass, maybe composed of others; those among them that have ``unused`` are asked.
        given: Names of the fields that somebody gave a value, be it the default.
    """
    values = field_values(config)
    for names, why in _unused(config):
        for name in names:
            if name in given:
                raise UserError(f"{as_given(name, values[name])} would not be used {why}")


def field_values(config: Any) -> dict[str, Any]:
    """Return the fields of a config and of those that it is composed of, by name."""
    values = dict[str, Any]()
    for field in fields(config):
        value = getattr(config, field.name)
        values |= field_values(value) if is_dataclass(value) else {field.name: value}
    return values


def changed_fields(config: Any, *defaults: Any) -> set[str]:
    """Return the names of the fields that have no default's value: neither that of their class nor of ``defaults``.

    What is given as its default is not told from what is not given: a command line knows that.

    Args:
        config: A dataclass, maybe composed of others.
        defaults: Configs of the same kind.
    """
    usual = [_class_defaults(config), *map(field_values, defaults)]
    return {name for name, value in field_values(config).items() if all(value != one[name] for one in usual)}


def asking(config: Any, names: Iterable[str]) -> list[str]:
    """Return the names of those fields of a config that ask for something, which 0, None and the like do not."""
    return [name for name in names if getattr(config, name)]


def as_given(name: str, value: Any) -> str:
    """Return an option as a command line has it."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    given = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"{flag(name)} {given}".rstrip()  # of a tuple there may be nothing


def _unused(config: Any) -> Iterator[Unused]:
    """What a config and those that it is composed of say."""
    if isinstance(config, KnowsUnused):
        yield from config.unused()
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _unused(value)


def _class_defaults(config: Any) -> dict[str, Any]:
    """The defaults of the classes of a config and of those that it is composed of, by field."""
    values = dict[str, Any]()
    for field in fields(config):
        value = getattr(config, field.name)
        values |= _class_defaults(value) if is_dataclass(value) else {field.name: field.default}
    return values
