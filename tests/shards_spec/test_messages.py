"""The words of messages: numbers with their noun, flags, refused values."""

import re
from pathlib import Path

import pytest

from shards_spec.files import UserError
from shards_spec.messages import counted, flag, require

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "shards_spec", "slurm", "training")


def test_a_number_and_its_noun_agree():
    assert [counted(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]
    assert counted(5000, "row", style=",") == "5,000 rows"


def test_flags():
    assert flag("batch_size") == "--batch-size"


def test_a_refused_value_is_named_by_its_flag():
    require(True, "batch_size", 1, "1 or more")
    with pytest.raises(UserError, match=r"^--batch-size 0: must be 1 or more$"):
        require(False, "batch_size", 0, "1 or more")
    with pytest.raises(UserError, match=r"^--scale 0.5 2: must be in order$"):
        require(False, "scale", (0.5, 2), "in order")
    with pytest.raises(UserError, match=r"^--source 'x': must be all$"):
        require(False, "source", "x", "all")


def test_messages_name_flags_and_agree_with_their_numbers():
    """A length before a plural, and a field's name before its value, are written by the helpers."""
    plural = re.compile(r"\{len\([^{}]*\)\} (shards|samples|rows|images|keys|captions|classes|lines|problems|files)\b")
    field = re.compile(r"""Error\(\s*f?["'](\w+ )?[a-z]+_[a-z_]+ (is )?\{""")
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            assert not plural.search(text), (path, plural.search(text))
            assert not field.search(text), (path, field.search(text))
