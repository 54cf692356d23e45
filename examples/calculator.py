"""A calculator for a chat model that solves word problems, in two ways.

``calculate`` is a tool (tools.yaml): the model calls it as it was trained to call tools. With the
environment ``Calculator`` (calculator.yaml), a message that ends in ``<calc>12 * 7</calc>`` gets
the result as a reply, also from a model that knows no tools. A message without a call ends the
response.
"""

import ast
import operator
import re
from collections.abc import Callable

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(formula: str) -> str:
    """Computes a formula.

    Args:
        formula: Numbers, + - * / and parentheses, such as (12 + 3) * 7.
    """
    return f"{value(ast.parse(formula.strip(), mode='eval').body):.10g}"


class Calculator:
    """The environment of one response."""

    def __init__(self) -> None:
        self._right = self._wrong = 0

    def reply(self, text: str) -> str | None:
        """Gets each message of the policy; returns the result of the last call in it."""
        calls = CALL.findall(text)
        if not calls:
            return None
        try:
            result = calculate(calls[-1])
        except (SyntaxError, ValueError, ArithmeticError, RecursionError):
            # The policy reads this and can correct itself; an exception would pause the run.
            self._wrong += 1
            return "error: only numbers, + - * / and parentheses"
        self._right += 1
        return result

    def well_called(self) -> float | None:
        """The share of calls that could be computed; None, which adds nothing, without any."""
        calls = self._right + self._wrong
        return self._right / calls if calls else None


def value(node: ast.expr) -> float:
    """Computes a parsed formula without running it. Raises ValueError, ArithmeticError."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in OPERATIONS:
            return OPERATIONS[type(operation)](value(left), value(right))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")
