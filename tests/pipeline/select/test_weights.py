"""`select --weight`: how often an epoch has a sample."""

import numpy as np
import pytest

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.select.config import SelectConfig
from pipeline.select.stage import select
from shards_spec.counter_rng import uniform_draws
from shards_spec.files import UserError
from shards_spec.selection import read_selection, selected_sizes


def copies_of(root: str, **rules) -> dict[str, int]:
    select(SelectConfig(root, workers=1, overwrite=True, **rules))
    found = {}
    for shard in range(2):
        one = read_selection(root, "selected", shard)
        found |= dict(zip(one.keys, one.copies.tolist(), strict=True))
    return found


def test_whole_numbers_and_drawn_fractions(root):
    found = copies_of(root, weight="5 * similarity", seed=3)  # 0, 0.5, 1, 1.5 ... 3.5
    assert list(found) == [f"0000{shard}000{index}" for shard in range(2) for index in range(4)]
    for number, (key, copies) in enumerate(found.items()):
        draw = uniform_draws(f"3/weight/{key}", 1)[0]
        assert copies == number // 2 + (number % 2 == 1 and draw < 0.5)
    assert sum(selected_sizes(root, "selected", 2)[0]) == sum(found.values())
    reasons = read_selection(root, "selected", 0).reasons
    assert reasons[0] == "not drawn by --weight"
    assert check(CheckConfig(root)) == []


def test_conditions_count_as_one_and_zero(root):
    found = copies_of(root, weight="1 + (similarity > 0.35) * 2", where=('NSFW == "UNLIKELY"',))
    assert list(found.values()) == [1, 0, 1, 0, 3, 0, 3, 0]


def test_a_missing_or_negative_weight_is_none(root):
    assert sum(copies_of(root, weight="similarity - 5 + language_confidence", where=("width > 0",)).values()) == 0
    found = copies_of(root, weight="2 * (similarity > 0.15)", top=0.5, by="similarity")
    assert list(found.values()) == [0, 0, 0, 0, 0, 2, 2, 2]  # the best three of six


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("similarity * 1000", r"--weight .* 300 for key 0000\d000\d"),
        ("'a'", "--weight"),
        ("smilarity", "did you mean similarity"),
        ("similarity >", "--weight 'similarity >'"),
    ],
)
def test_what_is_refused(root, weight, message):
    with pytest.raises(UserError, match=message):
        select(SelectConfig(root, workers=1, weight=weight))


def test_draws_keep_the_share(root):
    draws = np.array([uniform_draws(f"0/weight/{number:09d}", 1)[0] for number in range(4000)])
    assert 0.27 < (draws < 0.3).mean() < 0.33
