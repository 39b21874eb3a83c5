"""Checks of a claim: arithmetic over named values with comparisons, read by Python's grammar and never executed.

Allowed: numbers, names of values, + - * / and brackets, min, max, abs, and < <= > >= (chains as in 0 < a < b).
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping

from data_pipelines.errors import ConfigError

ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def _spoilt(pick: Callable[..., float]) -> Callable[..., float]:
    """The same where every value is a number, NaN where one is not."""
    return lambda *values: math.nan if any(map(math.isnan, values)) else pick(values)


FUNCTIONS: dict[str, Callable[..., float]] = {"min": _spoilt(min), "max": _spoilt(max), "abs": abs}
ALLOWED = "numbers, names of values, + - * /, min, max, abs, and one of < <= > >="


def parse(check: str) -> ast.Compare:
    """The comparison that a check is. Raises ConfigError for anything else."""
    try:
        found = ast.parse(check, mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"check {check!r} cannot be read ({error.msg}); allowed: {ALLOWED}") from error
    if not isinstance(found, ast.Compare) or not all(type(sign) in COMPARISONS for sign in found.ops):
        raise ConfigError(f"check {check!r} compares nothing; allowed: {ALLOWED}")
    for side in (found.left, *found.comparators):
        _verify(side, check)
    return found


def _verify(node: ast.expr, check: str) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        parts = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        parts = [node.operand]
    elif (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        and node.args and not node.keywords
    ):  # fmt: skip
        parts = list(node.args)
    elif isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
        parts = []
    else:
        raise ConfigError(f"check {check!r}: {ast.unparse(node)!r} is not allowed; allowed: {ALLOWED}")
    for part in parts:
        _verify(part, check)


def names_in(check: ast.Compare) -> set[str]:
    """Names of the values it speaks of."""
    return {node.id for node in ast.walk(check) if isinstance(node, ast.Name)} - FUNCTIONS.keys()


def value(node: ast.expr, values: Mapping[str, float]) -> float:
    """What an expression that `parse` let through comes to; division by zero gives NaN, which fails every check."""
    if isinstance(node, ast.Constant):
        return float(str(node.value))
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        return -value(node.operand, values)
    if isinstance(node, ast.BinOp):
        left, right = value(node.left, values), value(node.right, values)
        return float("nan") if isinstance(node.op, ast.Div) and right == 0 else ARITHMETIC[type(node.op)](left, right)
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return FUNCTIONS[node.func.id](*(value(part, values) for part in node.args))


def holds(check: str, values: Mapping[str, float]) -> bool:
    """Whether a check is true of these values."""
    found = parse(check)
    sides = [value(side, values) for side in (found.left, *found.comparators)]
    return all(
        COMPARISONS[type(sign)](left, right) for sign, left, right in zip(found.ops, sides[:-1], sides[1:], strict=True)
    )


def left_side(check: str, values: Mapping[str, float]) -> float:
    """What the left side comes to: the number that a check is about."""
    return value(parse(check).left, values)
