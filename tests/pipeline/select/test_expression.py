"""Conditions: what they mean, and what is refused before anything is read."""

import operator

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.select.expression import check_names, parse_conditions
from shards_spec.files import UserError

COLUMNS = {
    "similarity": pa.array(["0.1", "0.3", "n/a", None]),  # as a CSV list has it
    "cosine": pa.array([0.5, -0.5, None, 0.2]),
    "width": pa.array([10, 20, 30, 40], pa.int32()),
    "NSFW": pa.array(["UNLIKELY", "UNSURE", "UNLIKELY", None]),
    "caption": pa.array(["a stock photo", "a dog", "", "A Stock Photo"]),
}


def holds(text: str) -> list[bool]:
    conditions = parse_conditions((text,), "--where")
    found = [condition.holds(COLUMNS.__getitem__, 4).to_pylist() for condition in conditions]
    return [all(row) for row in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("similarity > 0.2", [0, 1, 0, 0]),
        ("0.2 > similarity", [1, 0, 0, 0]),
        ("similarity is None", [0, 0, 0, 1]),
        ("cosine > 0 and width >= 20", [0, 0, 0, 1]),
        ("cosine > 0 or width >= 30", [1, 0, 1, 1]),
        ("not cosine > 0", [0, 1, 0, 0]),
        ("not (cosine > 0 and width < 15)", [0, 1, 1, 1]),
        ("-cosine > 0", [0, 1, 0, 0]),
        ("10 < width <= 30", [0, 1, 1, 0]),
        ("width / 4 > 5", [0, 0, 1, 1]),
        ("width * 2 + 1 == 41 or width - 10 == 0", [1, 1, 0, 0]),
        ("NSFW == 'UNLIKELY'", [1, 0, 1, 0]),
        ("NSFW != 'UNLIKELY'", [0, 1, 0, 0]),
        ("NSFW in ('UNLIKELY', 'UNSURE')", [1, 1, 1, 0]),
        ("NSFW not in ['UNLIKELY']", [0, 1, 0, 0]),
        ("width in ()", [0, 0, 0, 0]),
        ("'stock photo' in caption", [1, 0, 0, 0]),
        ("'o' not in caption", [0, 0, 1, 0]),
        ("cosine is not None and True", [1, 1, 0, 1]),
        ("1 < 2", [1, 1, 1, 1]),
    ],
)
def test_what_they_mean(text, expected):
    assert holds(text) == [bool(value) for value in expected]


def test_conditions_joined_by_and_have_reasons_of_their_own():
    conditions = parse_conditions(("width > 1 and (cosine > 0 or width > 5)", "not width < 3"), "--where")
    reasons = ["not width > 1", "not (cosine > 0 or width > 5)", "not (not width < 3)"]
    assert [condition.reason for condition in conditions] == reasons


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("similarity >", "is no condition"),
        ("", "is no condition"),
        ("width > 1; width", "is no condition"),
        ("(" * 300 + "width" + ")" * 300, "is no condition"),
        ("__import__('os').system('x')", "is not allowed"),
        ("caption[0] == 'a'", "is not allowed"),
        ("caption.lower() == 'a'", "is not allowed"),
        ("[x for x in width]", "is not allowed"),
        ("(lambda: 1)() > 0", "is not allowed"),
        ("width % 2 == 0", "'Mod' is not allowed"),
        ("f'{width}' == '1'", "is not allowed"),
        ("width == 1j", "is not allowed"),
        ("b'a' == caption", "is not allowed"),
        ("(w := width) > 1", "is not allowed"),
    ],
)
def test_what_is_no_condition(text, message):
    with pytest.raises(UserError, match=message):
        parse_conditions((text,), "--where")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosine", "neither true nor false"),
        ("not cosine", "neither true nor false"),
        ("width > 1 or caption", "neither true nor false"),
        ("width > 'x'", "is a text, and is compared with a number"),
        ("width + 'x' > 1", "is a text, and is compared with a number"),
        ("cosine == None", "write `is None`"),
        ("cosine is 1", "only None"),
        ("width in 3", "needs a list"),
        ("caption in caption", "needs a list"),
        ("(1, 2) == width", "has no value"),
    ],
)
def test_what_cannot_be_compared(text, message):
    with pytest.raises(UserError, match=message):
        holds(text)


def test_names_that_are_not_there():
    (condition,) = parse_conditions(("smilarity > 2",), "--where")
    with pytest.raises(UserError, match="did you mean similarity"):
        check_names((condition,), list(COLUMNS), "of samples")
    many = [f"fact{number}" for number in range(30)]
    with pytest.raises(UserError, match=r"no fact 'smilarity' of samples; there are fact0, .*\(signs in a name"):
        check_names((condition,), many, "of samples")


@pytest.mark.parametrize("text", ["a / b > -1", "a / b < 1", "not a / b > 9", "1 / 0 > 1", "a / 0.0 != 1"])
def test_a_number_divided_by_0_is_missing(text):
    (condition,) = parse_conditions((text,), "--where")
    columns = {"a": pa.array([1, 0, -1, 4], pa.int64()), "b": pa.array([0, 0, 0, 8])}
    expected = [False, False, False, "/ b" in text]
    assert condition.holds(columns.__getitem__, 4).to_pylist() == expected


NUMBERS = st.lists(st.none() | st.floats(-2, 2), min_size=1, max_size=8)
SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}


@given(NUMBERS, st.sampled_from(sorted(SIGNS)), st.floats(-2, 2), st.sampled_from(sorted(SIGNS)), st.booleans())
def test_two_comparisons_are_pythons_own(numbers, first, limit, second, joined_by_and):
    """With a missing value neither is true."""
    word = "and" if joined_by_and else "or"
    conditions = parse_conditions((f"x {first} {limit!r} {word} x {second} 0",), "--where")
    column = pa.array(numbers, pa.float64())
    found = [condition.holds({"x": column}.__getitem__, len(numbers)).to_pylist() for condition in conditions]
    join = all if joined_by_and else any
    expected = [x is not None and join((SIGNS[first](x, limit), SIGNS[second](x, 0))) for x in numbers]
    assert [all(row) for row in zip(*found, strict=True)] == expected
