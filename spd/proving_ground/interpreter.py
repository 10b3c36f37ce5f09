"""Runs one-line functions without running Python: a whitelist over the syntax tree, with everything bounded.

What a model writes is never passed to `exec` or `eval`. The only program accepted is

    def name(arguments): return expression

where the expression is built from literals, arguments, arithmetic, comparisons, `and` / `or` / `not`, conditional
expressions, subscripts, a few builtins and a few string methods. There are no loops, no names from outside, no
other attributes and no power, and integers, strings and lists are bounded, so that work is bounded by the number
of nodes. Anything else raises `Refused`.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable
from typing import Any

MAX_SOURCE = 400
MAX_NODES = 120
MAX_INT = 10**12
MAX_LENGTH = 256


class Refused(Exception):
    """The program is outside the language, fails while it runs, or grows past a bound."""


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_BUILTINS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "bool": bool,
    "int": int,
    "len": len,
    "list": list,
    "max": max,
    "min": min,
    "sorted": sorted,
    "str": str,
    "sum": lambda values: sum(_numbers(values)),
}
_SEQUENCES = (str, list, tuple)
_METHODS = frozenset({"upper", "lower", "count", "replace", "startswith", "endswith", "strip", "title"})


def function(source: str) -> Callable[..., Any]:
    """The function a source line defines.

    Raises:
        Refused: the source is not one function of the accepted language. Calling the result may raise it too.
    """
    definition = _parse(source)
    if not isinstance(definition, ast.FunctionDef):
        raise Refused("not a function definition")
    signature = definition.args
    if (
        definition.decorator_list
        or definition.returns is not None
        or getattr(definition, "type_params", None)
        or signature.posonlyargs
        or signature.kwonlyargs
        or signature.vararg
        or signature.kwarg
        or signature.defaults
        or any(argument.annotation for argument in signature.args)
    ):
        raise Refused("only plain arguments")
    names = [argument.arg for argument in signature.args]
    if len(set(names)) != len(names):
        raise Refused("an argument appears twice")
    if len(definition.body) != 1 or not isinstance(definition.body[0], ast.Return) or definition.body[0].value is None:
        raise Refused("the body is not one return statement")
    expression = definition.body[0].value

    def call(*values: Any) -> Any:
        if len(values) != len(names):
            raise Refused(f"takes {len(names)} arguments, got {len(values)}")
        return _evaluate(expression, dict(zip(names, values, strict=True)))

    call.__name__ = definition.name
    return call


def passes(source: str, asserts: list[str]) -> bool:
    """Whether the function defined by `source` satisfies every `assert name(literals) == literal` line."""
    try:
        defined = function(source)
        return all(_holds(defined, line) for line in asserts)
    except Refused:
        return False


def _holds(defined: Callable[..., Any], line: str) -> bool:
    statement = _parse(line)
    if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)):
        raise Refused(f"not an assert of a comparison: {line!r}")
    test = statement.test
    if not (len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq) and isinstance(test.left, ast.Call)):
        raise Refused(f"not an assert of one equality: {line!r}")
    call = test.left
    if not (isinstance(call.func, ast.Name) and call.func.id == defined.__name__ and not call.keywords):
        return False
    value = defined(*(_evaluate(argument, {}) for argument in call.args))
    expected = _evaluate(test.comparators[0], {})
    return type(value) is type(expected) and bool(value == expected)


def _parse(source: str) -> ast.stmt:
    if len(source) > MAX_SOURCE:
        raise Refused(f"longer than {MAX_SOURCE} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(f"not Python: {error}") from error
    if len(body) != 1:
        raise Refused("not exactly one statement")
    if sum(1 for _ in ast.walk(body[0])) > MAX_NODES:
        raise Refused(f"more than {MAX_NODES} nodes")
    return body[0]


def _evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    try:
        return _bounded(_value(node, names))
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise Refused(f"fails while it runs: {error}") from error


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    def value(child: ast.expr) -> Any:
        return _bounded(_value(child, names))

    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            if node.id not in names:
                raise Refused(f"unknown name {node.id!r}")
            return names[node.id]
        case ast.List():
            return [value(element) for element in node.elts]
        case ast.Tuple():
            return tuple(value(element) for element in node.elts)
        case ast.UnaryOp(op=op) if type(op) in _UNARY:
            return _UNARY[type(op)](value(node.operand))
        case ast.BinOp(op=op) if type(op) in _BINARY:
            return _binary(op, value(node.left), value(node.right))
        case ast.BoolOp():
            stop_at = isinstance(node.op, ast.Or)
            result: Any = None
            for child in node.values:
                result = value(child)
                if bool(result) is stop_at:
                    break
            return result
        case ast.Compare():
            left = value(node.left)
            for comparison, right_node in zip(node.ops, node.comparators, strict=True):
                if type(comparison) not in _COMPARE:
                    raise Refused(f"comparison {type(comparison).__name__}")
                right = value(right_node)
                if not _COMPARE[type(comparison)](left, right):
                    return False
                left = right
            return True
        case ast.IfExp():
            return value(node.body) if value(node.test) else value(node.orelse)
        case ast.Subscript(slice=ast.Slice() as part):
            edges = [None if edge is None else value(edge) for edge in (part.lower, part.upper, part.step)]
            return value(node.value)[slice(*edges)]
        case ast.Subscript():
            return value(node.value)[value(node.slice)]
        case ast.Call():
            return _call(node, value)
        case _:
            raise Refused(f"{type(node).__name__} is outside the language")


def _binary(op: ast.operator, left: Any, right: Any) -> Any:
    for value in (left, right):
        if isinstance(value, _SEQUENCES) and not isinstance(op, (ast.Add, ast.Mult)):
            raise Refused(f"{type(op).__name__} on a {type(value).__name__}")
    if isinstance(op, ast.Mult):
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, _SEQUENCES) and isinstance(times, int) and len(repeated) * times > MAX_LENGTH:
                raise Refused("a repetition that is too long")
    return _BINARY[type(op)](left, right)


def _call(node: ast.Call, value: Callable[[ast.expr], Any]) -> Any:
    match node:
        case ast.Call(func=ast.Name(id="sorted"), args=[values], keywords=[ast.keyword(arg="reverse", value=order)]):
            return sorted(value(values), reverse=bool(value(order)))
        case ast.Call(keywords=[_, *_]):
            raise Refused("keyword arguments")
    match node.func:
        case ast.Name(id=name) if name in _BUILTINS:
            return _BUILTINS[name](*map(value, node.args))
        case ast.Attribute(attr=method, value=owner) if method in _METHODS:
            text = value(owner)
            if not isinstance(text, str):
                raise Refused(f".{method} of a {type(text).__name__}")
            return getattr(text, method)(*map(value, node.args))
        case _:
            raise Refused("a call that is not on the list")


def _numbers(values: Any) -> list[int | float]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, (int, float)) for value in values):
        raise Refused("sum of something that is not a list of numbers")
    return list(values)


def _bounded(value: Any) -> Any:
    """The value itself, if it is of a known type and small. Lists hold no lists, so sizes cannot compound."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            raise Refused("an integer that is too large")
        return value
    if isinstance(value, _SEQUENCES):
        if len(value) > MAX_LENGTH:
            raise Refused(f"a {type(value).__name__} that is too long")
        if not isinstance(value, str):
            for element in value:
                if isinstance(element, (list, tuple)):
                    raise Refused("a nested list")
                _bounded(element)
        return value
    raise Refused(f"a value of type {type(value).__name__}")
