"""A tool to begin with: `rollout.tools: poweropd.rollouts.turns.calculator:calculate`."""

import ast
import operator
from collections.abc import Callable

_OPERATIONS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculate(expression: str) -> str:
    """
    Calculates an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as (3+4)*5.
    """
    return str(_value_of(ast.parse(expression.strip(), mode="eval").body))


def _value_of(node: ast.expr) -> float:
    """Returns the value of an expression of numbers; raises ValueError for anything else."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op, operand) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value_of(operand))
        case ast.BinOp(left, op, right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value_of(left), _value_of(right))
    raise ValueError(f"expected numbers and + - * / // % **, got {ast.unparse(node)}")
