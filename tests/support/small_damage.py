"""Random damage to the files of a dataset, and what its files are before and after a repair."""

import random
from pathlib import Path

from shards_spec.files import sha256_file

KINDS = ("flip", "flip", "cut", "empty", "garbage", "missing", "swap", "extra")
FIRST, BEYOND = "00000", "00070"  # the number of a shard that is there, and of one that is not
States = dict[str, tuple[str, int]]


def states(root: Path) -> States:
    """Path below ROOT to (sha256, mtime in ns) of all files but logs and hidden ones."""
    found = States()
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and "logs" not in inside.parts and not inside.as_posix().startswith("."):
            found[inside.as_posix()] = (sha256_file(str(path)), path.stat().st_mtime_ns)
    return found


def damage(root: Path, rng: random.Random, kind: str = "") -> tuple[str, list[str]]:
    """One damage of a kind, by default a random one: what it is, and the files below ROOT that it is in."""
    paths = list(states(root))
    kind = kind or rng.choice(KINDS)
    name = rng.choice([path for path in paths if FIRST in path] if kind == "extra" else paths)
    path = root / name
    data = path.read_bytes()
    match kind:
        case "flip":
            place = rng.randrange(len(data))
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        case "cut":
            path.write_bytes(data[: rng.randrange(len(data))])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(rng.randbytes(1000))
        case "missing":
            path.unlink()
        case "swap":
            other = rng.choice([own for own in paths if (root / own).read_bytes() != data])
            path.write_bytes((root / other).read_bytes())
            (root / other).write_bytes(data)
            return kind, [name, other]
        case "extra":
            extra = name.replace(FIRST, BEYOND)
            (root / extra).write_bytes(data)
            return kind, [extra]
    return kind, [name]


def is_named(problems: list[str], name: str) -> bool:
    """Whether a problem names a file or its shard; of a file that is gone, the shard's number in its folder."""
    folder, _, base = name.rpartition("/")
    number = base[:5]
    if not number.isdigit():
        return any(name in problem for problem in problems)
    missing = f"{folder}: shards ["
    return any(f"{folder}/{number}" in problem or missing in problem for problem in problems)
