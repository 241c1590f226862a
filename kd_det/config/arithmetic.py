"""
Numbers that a config file writes as an expression, worked out without running it.

Detectron2's RetinaNet files give their anchor sizes as
`[[x, x * 2**(1.0/3), x * 2**(2.0/3)] for x in [32, 64, 128, 256, 512]]`.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_MAX_LENGTH = 1000  # characters of an expression
_MAX_STEPS = 10_000  # parts of it worked out, those of a comprehension once per item
_MAX_EXPONENT = 64
_MAX_NUMBER = 1e18

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def evaluate(expression: str) -> Any:
    """
    Work out an expression of numbers, lists and tuples.

    Args:
        expression: Python's syntax; numbers, + - * / ** on numbers, brackets, lists, tuples, and
            lists written as `[... for x in [...]]`.

    Returns:
        A number, or lists and tuples of numbers; all finite and of at most 1e18.

    Raises:
        ValueError: it holds anything else, or takes too long; the message says what.
    """
    if len(expression) > _MAX_LENGTH:
        raise ValueError(f"it has {len(expression)} characters, at most {_MAX_LENGTH} are read")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _Evaluator().value(tree.body, {})
    except (SyntaxError, ArithmeticError, MemoryError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


class _Evaluator:
    """Works out one expression and counts its steps."""

    def __init__(self) -> None:
        self._steps = 0

    def value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise ValueError(f"it takes more than {_MAX_STEPS} steps")
        if isinstance(node, ast.Constant):
            return _number(node.value)
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.List):
            return [self.value(item, names) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item, names) for item in node.elts)
        if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
            return _SIGNS[type(node.op)](_number(self.value(node.operand, names)))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self._operation(node, names)
        if isinstance(node, ast.ListComp):
            return [self.value(node.elt, scope) for scope in self._scopes(node.generators, names)]
        raise ValueError(f"{ast.unparse(node)!r:.60} is no number, list or arithmetic")

    def _operation(self, node: ast.BinOp, names: Mapping[str, Any]) -> Any:
        left, right = (_number(self.value(side, names)) for side in (node.left, node.right))
        if isinstance(node.op, ast.Pow) and abs(right) > _MAX_EXPONENT:
            raise ValueError(f"the exponent {right} is not between -{_MAX_EXPONENT} and it")
        return _number(_OPERATORS[type(node.op)](left, right))

    def _scopes(
        self, generators: list[ast.comprehension], names: Mapping[str, Any]
    ) -> Iterator[Mapping[str, Any]]:
        """Yield what the names of a comprehension mean, once per item."""
        if not generators:
            yield names
            return
        first, *rest = generators
        if first.ifs or first.is_async or not isinstance(first.target, ast.Name):
            raise ValueError("only lists of the form [... for x in [...]] are read")
        items = self.value(first.iter, names)
        if not isinstance(items, list | tuple):
            raise ValueError(f"{ast.unparse(first.iter)!r:.60} is no list to go through")
        for item in items:
            yield from self._scopes(rest, {**names, first.target.id: item})


def _number(value: Any) -> Any:
    """Return a value that is a number of reasonable size; refuse others."""
    if type(value) not in (int, float):
        raise ValueError(f"{value!r:.60} is no number")
    if not (abs(value) <= _MAX_NUMBER and math.isfinite(value)):
        raise ValueError(f"a number in it is not between -{_MAX_NUMBER:g} and {_MAX_NUMBER:g}")
    return value
