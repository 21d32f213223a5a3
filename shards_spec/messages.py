"""What messages are made of: numbers with their noun, options by the flag that sets them."""

import shlex

from shards_spec.files import UserError


def counted(number: int, noun: str, plural: str = "", *, style: str = "") -> str:
    """``1 shard``, ``2 shards``, ``0 images``.

    ``plural`` is that of a noun that does not just take an s. ``style`` is the number's, as `format` takes it:
    ``counted(5000, "row", style=",")`` is ``5,000 rows``.
    """
    return f"{number:{style}} {noun if number == 1 else plural or f'{noun}s'}"


def flag(field: str) -> str:
    """The option that sets a field of a config: ``--batch-size``; ``--from`` of ``from_``, as Python owns the word."""
    return f"--{field.rstrip('_').replace('_', '-')}"


def conversion(encoding: str, path: str) -> str:
    """The command that makes a text file UTF-8."""
    return f"`iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > NEW` converts it"


def require(is_fine: bool, field: str, value: object, allowed: str) -> None:
    """Raise UserError that names a field's flag, its value and what is allowed, unless ``is_fine``."""
    if not is_fine:
        given = " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
        raise UserError(f"{flag(field)} {given}: must be {allowed}")
