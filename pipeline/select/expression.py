"""Conditions such as ``similarity > 0.28 and NSFW == "UNLIKELY"``, over columns of facts.

They have Python's syntax, are parsed by Python's own parser and computed by PyArrow; nothing of them is executed. A
condition that compares a missing value is neither true nor false, and what is not true does not hold.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards_spec.files import UserError
from shards_spec.suggest import did_you_mean

Columns = Callable[[str], pa.Array]  # name -> its values, one per row; raises KeyError for a name that is not known
COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,  # by `_quotient`
}
ALLOWED = (
    "names of facts, numbers, texts in quotes, == != < <= > >=, in (...), 'text' in NAME, and, or, not, is None, "
    "+ - * /"
)


@dataclass(frozen=True)
class FactCondition:
    """One condition; ``text`` is how it was written, ``option`` where."""

    text: str
    option: str
    tree: ast.expr

    @property
    def reason(self) -> str:
        """Why a sample that does not meet it is left out."""
        return f"not ({self.text})" if isinstance(self.tree, ast.BoolOp | ast.UnaryOp) else f"not {self.text}"

    def names(self) -> set[str]:
        """The facts that it needs."""
        return {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}

    def holds(self, columns: Columns, rows: int) -> pa.BooleanArray:
        """Whether each of so many rows meets it. Raises UserError for what cannot be compared."""
        return pc.fill_null(self._computed(_truth, columns, rows), False)

    def numbers(self, columns: Columns, rows: int) -> np.ndarray:
        """Its value as a number for each of so many rows, float64, NaN where not known. Raises UserError for none."""
        values = self._computed(_number_of, columns, rows)
        numbers: np.ndarray = values.fill_null(np.nan).to_numpy(zero_copy_only=False)
        return numbers

    def _computed(self, compute: Callable[[ast.expr, Columns], Any], columns: Columns, rows: int) -> Any:
        try:
            value = compute(self.tree, columns)
        except (pa.ArrowException, TypeError) as error:
            raise UserError(f"{self.option} {self.text!r}: {str(error).splitlines()[0]}") from error
        return pa.repeat(value, rows) if isinstance(value, pa.Scalar) else value


def parse_conditions(texts: tuple[str, ...], option: str) -> tuple[FactCondition, ...]:
    """Parse the values of an option; those that are joined by ``and`` become conditions of their own.

    Raises UserError naming the text and what is not allowed in it.
    """
    return tuple(chain.from_iterable(_parse(text, option) for text in texts))


def parse_number(text: str, option: str) -> FactCondition:
    """Parse the value of an option that is a number for each row, such as ``cosine / 0.25``. Raises UserError."""
    tree = _tree(text, option)
    _check_allowed(tree, text, option)
    return FactCondition(ast.unparse(tree), option, tree)


def check_names(conditions: tuple[FactCondition, ...], known: list[str], source: str) -> None:
    """Raise UserError for a name that is not ``known``; ``source`` says of what."""
    for condition in conditions:
        for name in sorted(condition.names() - set(known)):
            raise UserError(
                f"{condition.option} {condition.text!r}: no fact {name!r} {source}; {_suggestion(name, known)}there "
                f"are {', '.join(known)} (signs in a name of a column or cache as _); a text stands in quotes"
            )


def _suggestion(name: str, known: list[str]) -> str:
    """The names most similar to one, and the beginning of the sentence of all names; nothing without a similar one."""
    near = did_you_mean(name, known)
    return f"{near} In all, " if near.endswith("?") else ""


def _parse(text: str, option: str) -> Iterator[FactCondition]:
    tree = _tree(text, option)
    clauses = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    for clause in clauses:
        _check_allowed(clause, text, option)
        yield FactCondition(ast.unparse(clause), option, clause)


def _tree(text: str, option: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(
            f"{option} {text!r} is no condition ({reason}): write one such as "
            f"'similarity > 0.28 and NSFW == \"UNLIKELY\"'; allowed are {ALLOWED}"
        ) from error


def _check_allowed(tree: ast.expr, text: str, option: str) -> None:
    """Raise UserError for a part of an expression that is not one of ours."""
    plain = (ast.Name, ast.Load, ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp)
    lists = (ast.List, ast.Tuple, ast.In, ast.NotIn, ast.Is, ast.IsNot)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            is_allowed = node.value is None or isinstance(node.value, str | int | float)
        else:
            is_allowed = isinstance(node, (*plain, *lists, *COMPARE, *ARITHMETIC))
        if not is_allowed:
            part = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
            raise UserError(f"{option} {text!r}: {part!r} is not allowed in a condition; allowed are {ALLOWED}")


def _evaluate(node: ast.expr, columns: Columns) -> Any:
    """The value of an expression: an array, or a scalar where no column is in it."""
    match node:
        case ast.Name():
            return columns(node.id)
        case ast.Constant():
            return pa.scalar(node.value)
        case ast.BoolOp():
            join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            return reduce(join, [_truth(value, columns) for value in node.values])
        case ast.UnaryOp(op=ast.Not()):
            return pc.invert(_truth(node.operand, columns))
        case ast.UnaryOp():
            return pc.negate(_evaluate(node.operand, columns))
        case ast.BinOp():
            left, right = _alike(*(_countable(_evaluate(side, columns)) for side in (node.left, node.right)))
            if isinstance(node.op, ast.Div):
                return _quotient(left, right)
            return ARITHMETIC[type(node.op)](left, right)
        case ast.Compare():
            return _compare(node, columns)
    raise TypeError(f"{ast.unparse(node)!r} has no value of its own")


def _quotient(left: Any, right: Any) -> Any:
    """A number by another, float64; missing where that is 0."""
    divisor = pc.cast(right, pa.float64())
    return pc.divide(
        pc.cast(left, pa.float64()), pc.if_else(pc.equal(divisor, 0.0), pa.scalar(None, pa.float64()), divisor)
    )


def _truth(node: ast.expr, columns: Columns) -> Any:
    """As `_evaluate`, of what is true or false. Raises TypeError for a number or a text."""
    value = _evaluate(node, columns)
    if not pa.types.is_boolean(value.type):
        raise TypeError(f"{ast.unparse(node)!r} is neither true nor false, but of type {value.type}; compare it")
    return value


def _number_of(node: ast.expr, columns: Columns) -> Any:
    """As `_evaluate`, of a number; true is 1, false is 0. Raises TypeError for a text in quotes."""
    value = _evaluate(node, columns)
    return numbers_of(value)


def _compare(node: ast.Compare, columns: Columns) -> Any:
    """``a < b <= c``, ``a in (...)``, ``a is None``."""
    results = []
    left = node.left
    for sign, right in zip(node.ops, node.comparators, strict=True):
        results.append(_compare_two(left, sign, right, columns))
        left = right
    return reduce(pc.and_kleene, results)


def _compare_two(left: ast.expr, sign: ast.cmpop, right: ast.expr, columns: Columns) -> Any:
    value = _evaluate(left, columns)
    is_none = isinstance(right, ast.Constant) and right.value is None
    if isinstance(sign, ast.Is | ast.IsNot):
        if not is_none:
            raise TypeError("after `is` only None can stand")
        return pc.is_null(value) if isinstance(sign, ast.Is) else pc.is_valid(value)
    if is_none:
        raise TypeError("a missing value is equal to nothing: write `is None` or `is not None`")
    if isinstance(sign, ast.In | ast.NotIn):
        found = _is_in(value, right, columns)
        return pc.invert(found) if isinstance(sign, ast.NotIn) else found
    return COMPARE[type(sign)](*_alike(value, _evaluate(right, columns)))


def _is_in(value: Any, right: ast.expr, columns: Columns) -> Any:
    """Whether a value is one of a list, or a text is part of another, in the same case."""
    if isinstance(right, ast.List | ast.Tuple):
        return reduce(pc.or_kleene, [_equal(value, _evaluate(one, columns)) for one in right.elts], pa.scalar(False))
    whole = _evaluate(right, columns)
    if not (isinstance(value, pa.Scalar) and _is_text(value) and _is_text(whole)):
        raise TypeError("`in` needs a list behind it, such as ('en', 'de'), or a text in quotes before a name of texts")
    return pc.match_substring(whole, value.as_py())


def _equal(left: Any, right: Any) -> Any:
    return pc.equal(*_alike(left, right))


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Two values as they can be compared: a column of text, as a CSV list has it, is read as numbers beside one."""
    if _is_text(left) and _is_number(right):
        return _numbers(left), right
    if _is_text(right) and _is_number(left):
        return left, _numbers(right)
    return left, right


def _countable(value: Any) -> Any:
    """A value that is computed with: true is 1, false is 0."""
    return pc.cast(value, pa.int64()) if pa.types.is_boolean(value.type) else value


def _is_text(value: Any) -> bool:
    return bool(pa.types.is_string(value.type) or pa.types.is_large_string(value.type))


def _is_number(value: Any) -> bool:
    return bool(pa.types.is_integer(value.type) or pa.types.is_floating(value.type))


def numbers_of(column: pa.Array) -> pa.Array:
    """A column as float64; text is read as numbers, null where there is none. Raises pyarrow.ArrowException."""
    numbers: pa.Array = _numbers(column) if _is_text(column) else column.cast(pa.float64())
    return numbers


def _numbers(texts: Any) -> Any:
    """The numbers in a column of text, null where there is none."""
    if isinstance(texts, pa.Scalar):
        raise TypeError(f"{texts.as_py()!r} in quotes is a text, and is compared with a number")
    return pa.array([_number(text) for text in texts.to_pylist()], pa.float64())


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
