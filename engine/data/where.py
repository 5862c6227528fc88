"""`--where`: a condition on a sample's metadata, evaluated without running anybody's code.

Written as Python writes conditions: `punsafe < 0.3 and similarity > 0.25 and NSFW != 'NSFW'`. A name stands for a
metadata column; one that a sample lacks is unknown, and unknown things are neither true nor false (SQL's logic).
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

from ..errors import DataError
from .images import Rejected

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
FUNCTIONS = {"len": 1, "lower": 1, "matches": 2}
"""Name -> number of arguments: length of a text, the text in small letters, whether a regular expression is found."""
HELP = (
    "a condition such as \"punsafe < 0.3 and NSFW != 'NSFW'\": columns, numbers, texts, comparisons, in, and, or, not, "
    "+ - * / %, len(x), lower(x), matches(x, 'regex')"
)


class Where:
    """A condition, ready to be asked of samples."""

    def __init__(self, text: str) -> None:
        """Raises DataError, showing the place, where `text` is not a condition."""
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise DataError(f"--where {text!r}: {getattr(error, 'msg', error)}; give {HELP}") from None
        self.names = frozenset(self._check(self._tree))
        """The columns it reads."""

    def _check(self, node: ast.expr) -> set[str]:
        """The names in an expression. Raises DataError at what is not allowed."""
        children: list[ast.expr]
        match node:
            case ast.Constant(value=str() | int() | float() | bool() | None):
                return set()
            case ast.Name(id=name):
                return {name}
            case ast.BoolOp(values=children) | ast.List(elts=children) | ast.Tuple(elts=children):
                pass
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd(), operand=operand):
                children = [operand]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                children = [left, right]
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(map(_is_comparison, ops, rest)):
                children = [left, *rest]
            case ast.Call(func=ast.Name(id=name), args=children, keywords=[]) if FUNCTIONS.get(name) == len(children):
                self._check_pattern(node)
            case _:
                raise DataError(f"--where {self.text!r}: {ast.unparse(node)!r} is not allowed; give {HELP}")
        return set().union(*map(self._check, children))

    def _check_pattern(self, call: ast.Call) -> None:
        for argument in call.args[1:]:
            if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                raise DataError(f"--where {self.text!r}: the second argument of matches must be a text in quotes")
            try:
                re.compile(argument.value)
            except re.error as error:
                raise DataError(f"--where {self.text!r}: {argument.value!r}: {error}") from None

    def require(self, columns: Mapping[str, Any]) -> None:
        """Raises Rejected unless the condition is true of a sample's `columns`."""
        verdict = _value(self._tree, columns)
        if verdict is None:
            missing = sorted(name for name in self.names if _known(columns.get(name)) is None)
            raise Rejected(f"left out by --where: no usable {', '.join(missing) or 'value'}")
        if not verdict:
            raise Rejected("left out by --where")


@cache
def where(text: str) -> Where:
    """The condition `text`, read once per process."""
    return Where(text)


def _is_comparison(op: ast.cmpop, right: ast.expr) -> bool:
    """`is` and `is not` only with None."""
    if isinstance(op, ast.Is | ast.IsNot):
        return isinstance(right, ast.Constant) and right.value is None
    return type(op) in COMPARISONS


def _known(value: Any) -> Any:
    """None for what tables use in place of a value."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _value(node: ast.expr, columns: Mapping[str, Any]) -> Any:
    """The value of an expression that was checked; None if it is unknown."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return _known(columns.get(name))
        case ast.BoolOp(op=op, values=values):
            return _all_or_any(isinstance(op, ast.And), [_value(v, columns) for v in values])
        case ast.UnaryOp(op=op, operand=operand):
            return _unary(op, _value(operand, columns))
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, _value(left, columns), _value(right, columns))
        case ast.Compare(left=left, ops=ops, comparators=rest):
            values = [_value(v, columns) for v in (left, *rest)]
            pairs = zip(ops, values[:-1], values[1:], strict=True)
            return _all_or_any(True, [_compare(op, a, b) for op, a, b in pairs])
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(v, columns) for v in elements]
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _call(name, [_value(v, columns) for v in arguments])
    raise AssertionError(ast.dump(node))


def _all_or_any(everything: bool, values: list[Any]) -> bool | None:
    """`and` or `or` of truth values that may be unknown."""
    truths = [None if value is None else bool(value) for value in values]
    if (not everything) in truths:
        return not everything
    return None if None in truths else everything


def _unary(op: ast.unaryop, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(op, ast.Not):
        return not value
    number = _number(value)
    return None if number is None else -number if isinstance(op, ast.USub) else number


def _number(value: Any) -> Any:
    """A number, also from a text that spells one (tables of text hold nothing else); None if it is none."""
    if isinstance(value, int | float):
        return value
    try:
        return _known(float(value))
    except (TypeError, ValueError):
        return None


def _arithmetic(op: ast.operator, a: Any, b: Any) -> Any:
    a, b = _number(a), _number(b)
    if a is None or b is None:
        return None
    try:
        return ARITHMETIC[type(op)](a, b)
    except (ZeroDivisionError, OverflowError):
        return None


def _compare(op: ast.cmpop, a: Any, b: Any) -> bool | None:
    if isinstance(op, ast.Is | ast.IsNot):
        return (a is None) == isinstance(op, ast.Is)
    if a is None or b is None:
        return None
    if isinstance(op, ast.In | ast.NotIn):
        return None if not isinstance(b, str | list) or (isinstance(b, str) and not isinstance(a, str)) else (
            COMPARISONS[type(op)](a, b)
        )  # fmt: skip
    if isinstance(a, int | float) != isinstance(b, int | float):
        a, b = _number(a), _number(b)
        if a is None or b is None:
            return None
    try:
        return bool(COMPARISONS[type(op)](a, b))
    except TypeError:
        return None


def _call(name: str, arguments: list[Any]) -> Any:
    text = arguments[0]
    if not isinstance(text, str):
        return len(text) if name == "len" and isinstance(text, list) else None
    if name == "len":
        return len(text)
    return text.lower() if name == "lower" else _pattern(arguments[1]).search(text) is not None


@lru_cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text)
