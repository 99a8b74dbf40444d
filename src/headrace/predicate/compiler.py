"""From sqlglot's tree to kernels: a node, or an argument of one, that is not handled here is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlglot import exp

from headrace.predicate.columns import Reference
from headrace.predicate.nodes import Kernel, Node, aligned, call, cast, constant, numbers, whole, whole_if_equal
from headrace.predicate.words import refused, shown

_ROUND_MAX = 15
_UNKNOWN = pa.scalar(None, pa.bool_())


class Compiler:
    """Compiles a tree whose columns are numbers of ``references``."""

    def __init__(self, references: Sequence[Reference]) -> None:
        self.references = references

    def predicate(self, tree: exp.Expression) -> Node:
        """The whole expression, which must be true or false."""
        root = self.node(tree)
        if root.kind not in ("boolean", "null"):
            raise refused(f"where must be true or false for each row, but it is {root.name}", hint="add a comparison")
        return cast(root, pa.bool_())

    def node(self, tree: exp.Expression) -> Node:
        """One node and what is below it."""
        handler = _HANDLERS.get(type(tree))
        if handler is None:
            raise refused(f"{_name(tree)} is not allowed", _start(tree))
        return handler(self, tree)

    def column(self, tree: exp.Expression) -> Node:
        """A column by its number."""
        (name,) = _args(tree, "this")
        # sqlglot takes a lone keyword such as IS for a column; the real ones are numbers in quotes.
        if not isinstance(name, exp.Identifier) or not name.args.get("quoted"):
            raise refused(f"{shown(tree.name)} cannot stand for a column", _start(tree))
        index = int(name.name)
        reference = self.references[index]
        return Node(reference.name, reference.type, lambda rows: rows[index])

    def junction(self, tree: exp.Expression) -> Node:
        """A chain of AND, or of OR, as one flat fold: a long chain would recurse at each of its links."""
        kernel, name = (pc.and_kleene, "AND") if isinstance(tree, exp.And) else (pc.or_kleene, "OR")
        operands: list[Node] = []
        stack = [tree]
        while stack:
            part = stack.pop()
            if type(part) is type(tree):
                this, other = _args(part, "this", "expression")
                stack += [other, this]
            else:
                operands.append(cast(self.node(part).needs("boolean", name, _start(part)), pa.bool_()))
        return call(name, _start(tree), lambda *values: reduce(kernel, values), *operands)

    def negation(self, tree: exp.Expression) -> Node:
        """NOT."""
        (this,) = _args(tree, "this")
        return call(
            "NOT", _start(this), pc.invert, cast(self.node(this).needs("boolean", "NOT", _start(this)), pa.bool_())
        )

    def is_null(self, tree: exp.Expression) -> Node:
        """IS NULL."""
        this, what = _args(tree, "this", "expression")
        if not isinstance(what, exp.Null):
            raise refused("IS takes only NULL or NOT NULL", _start(tree))
        return call("IS NULL", _start(tree), pc.is_null, self.node(this))

    def comparison(self, tree: exp.Expression) -> Node:
        """= != < <= > >=."""
        this, other = _args(tree, "this", "expression")
        return _compared(_COMPARISONS[type(tree)], self.node(this), self.node(other), _start(tree))

    def between(self, tree: exp.Expression) -> Node:
        """BETWEEN, both ends included."""
        this, low, high = (self.node(part) for part in _args(tree, "this", "low", "high"))
        start = _start(tree)
        above, below = _compared(pc.greater_equal, this, low, start), _compared(pc.less_equal, this, high, start)
        return call("BETWEEN", start, pc.and_kleene, above, below)

    def among(self, tree: exp.Expression) -> Node:
        """IN: one look-up for the values of the column's own type, comparisons for the others (NULL, decimals …)."""
        this, listed = _args(tree, "this", "expressions")
        start = _start(tree)
        subject = self.node(this)
        plain: list[Any] = []
        found: list[Node] = []
        for item in map(self.node, listed):
            if item.value is None:
                raise refused(f"IN takes a list of literals, not {item.name}", start)
            left, right = _comparable(subject, item, start)
            if (
                left is subject
                and subject.value is None
                and right.type == left.type
                and right.value is not None
                and right.value.is_valid
            ):
                plain.append(right.value.as_py())
            else:
                found.append(_compared(pc.equal, subject, item, start))
        if plain:
            found.append(call("IN", start, _look_up(pa.array(plain, subject.type)), subject))
        return call("IN", start, lambda *parts: reduce(pc.or_kleene, parts), *found)

    def like(self, tree: exp.Expression) -> Node:
        """LIKE and ILIKE, with a literal pattern."""
        # Depending on its version, sqlglot writes NOT LIKE as a NOT around LIKE or as this argument of it.
        negated = bool(tree.args.get("negate"))
        this, pattern = _args(tree, "this", "expression", *(["negate"] if negated else []))[:2]
        start, name = _start(tree), _name(tree)
        subject = self.node(this).needs("text", name, start)
        wanted = self._literal_text(pattern, f"the pattern of {name}")
        if wanted is None:
            return constant(_UNKNOWN, "NULL")
        if (len(wanted) - len(wanted.rstrip("\\"))) % 2:
            raise refused(
                f"the pattern of {name} ends in a backslash that escapes nothing", start, "write two backslashes"
            )
        folded = isinstance(tree, exp.ILike)
        kernel: Kernel = lambda rows: pc.match_like(rows, wanted, ignore_case=folded)  # noqa: E731
        found = call(name, start, kernel, cast(subject, pa.large_string()))
        return call("NOT", start, pc.invert, found) if negated else found

    def starts_with(self, tree: exp.Expression) -> Node:
        """starts_with(text, literal)."""
        this, prefix = _args(tree, "this", "expression")
        start = _start(tree)
        subject = cast(self.node(this).needs("text", "starts_with", start), pa.large_string())
        wanted = self._literal_text(prefix, "the prefix of starts_with")
        if wanted is None:
            return constant(_UNKNOWN, "NULL")
        return call("starts_with", start, lambda rows: pc.starts_with(rows, wanted), subject)

    def _literal_text(self, tree: exp.Expression, what: str) -> str | None:
        node = self.node(tree).needs("text", what, _start(tree))
        if node.value is None:
            raise refused(f"{what} must be a literal, not {node.name}", _start(tree))
        return str(node.value) if node.value.is_valid else None

    def minus(self, tree: exp.Expression) -> Node:
        """A sign; with a literal number it makes one literal, so that the least int64 can be written."""
        (this,) = _args(tree, "this")
        if isinstance(this, exp.Literal) and not this.is_string:
            return _literal(this, "-")
        return call("-", _start(tree), pc.negate_checked, self._operand(this, "-"))

    def arithmetic(self, tree: exp.Expression) -> Node:
        """+ - * / %, on int64 or float64."""
        this, other = _args(tree, "this", "expression")
        name, kernel = _ARITHMETIC[type(tree)]
        start = _start(tree)
        left, right = numbers(self._operand(this, name), self._operand(other, name), start)
        if isinstance(tree, exp.Mod) and pa.types.is_floating(left.type):
            raise refused(f"% takes whole numbers, not {left.name} and {right.name}", start)
        return call(name, start, kernel, left, right)

    def _operand(self, tree: exp.Expression, name: str) -> Node:
        node = self.node(tree).needs("number", name, _start(tree))
        return node if node.type in (pa.int64(), pa.float64()) else _simple(node)

    def text_function(self, tree: exp.Expression) -> Node:
        """lower, upper, length (in code points)."""
        (this,) = _args(tree, "this")
        name, kernel = _TEXT_FUNCTIONS[type(tree)]
        return call(
            name, _start(tree), kernel, cast(self.node(this).needs("text", name, _start(tree)), pa.large_string())
        )

    def absolute(self, tree: exp.Expression) -> Node:
        """abs."""
        return call("abs", _start(tree), pc.abs_checked, self._operand(_args(tree, "this")[0], "abs"))

    def rounded(self, tree: exp.Expression) -> Node:
        """round, half away from zero; whole numbers stay whole."""
        this, *places = _args(tree, "this", *(["decimals"] if tree.args.get("decimals") else []))
        digits = self.node(places[0]).value if places else pa.scalar(0)
        count = digits.as_py() if digits is not None else None
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _ROUND_MAX:
            raise refused(f"round takes 0 to {_ROUND_MAX} decimals, as a literal", _start(tree))
        node = self._operand(this, "round")
        if pa.types.is_integer(node.type):
            return node
        return call("round", _start(tree), lambda v: pc.round(v, count, round_mode="half_towards_infinity"), node)

    def coalesce(self, tree: exp.Expression) -> Node:
        """The first that is not null."""
        this, rest = _args(tree, "this", "expressions")
        start = _start(tree)
        found = self.node(this)
        for part in rest:
            found, other = aligned(found, self.node(part), start)
            if found.type != other.type and found.kind == "number":
                found, other = cast(found, pa.float64(), start), cast(other, pa.float64(), start)
            found = call("coalesce", start, pc.coalesce, found, other)
        return found


def _start(tree: exp.Expression) -> int | None:
    starts = [part.meta["start"] for part in tree.walk() if "start" in part.meta]
    return min(starts, default=None)


def _name(tree: exp.Expression) -> str:
    return type(tree).__name__.upper()


def _args(tree: exp.Expression, *names: str) -> list[Any]:
    """Exactly these arguments of a node: another one could change its meaning."""
    extra = [name for name, value in tree.args.items() if name not in names and value]
    missing = [name for name in names if not tree.args.get(name)]
    if extra or missing:
        raise refused(f"{_name(tree)} cannot be used in this way", _start(tree))
    return [tree.args[name] for name in names]


def _literal(tree: exp.Expression, sign: str = "") -> Node:
    text = tree.name
    if tree.is_string:
        return constant(pa.scalar(text, pa.large_string()), f"the text {shown(text)}")
    name = f"the number {sign}{text}"
    try:
        if text.isascii() and text.isdigit():
            return whole(int(sign + text), name)
        fraction = float(sign + text)
        if math.isfinite(fraction):
            return constant(pa.scalar(fraction, pa.float64()), name)
    except (ValueError, pa.ArrowException):
        pass
    raise refused(f"{shown(sign + text)} is no number", _start(tree), "whole numbers have at most 38 digits")


def _word(tree: exp.Expression) -> Node:
    if isinstance(tree, exp.Null):
        return constant(pa.scalar(None), "NULL")
    return constant(pa.scalar(bool(tree.args.get("this"))), "TRUE" if tree.args.get("this") else "FALSE")


def _comparable(left: Node, right: Node, start: int | None) -> tuple[Node, Node]:
    if left.kind == right.kind == "number":
        left, right = whole_if_equal(left, right), whole_if_equal(right, left)
    return aligned(left, right, start)


def _compared(kernel: Kernel, left: Node, right: Node, start: int | None) -> Node:
    left, right = _comparable(left, right, start)
    if left.kind == "null":
        return constant(_UNKNOWN, "NULL")
    return call("a comparison", start, kernel, left, right)


def _look_up(values: pa.Array) -> Kernel:
    floating = pa.types.is_floating(values.type)

    def look_up(rows: pa.Array) -> pa.Array:
        # Arrow looks floats up by their bits: adding zero makes -0.0 the same as 0.0.
        found = pc.is_in(pc.add(rows, 0.0), pc.add(values, 0.0)) if floating else pc.is_in(rows, values)
        return pc.if_else(pc.is_valid(rows), found, _UNKNOWN)

    return look_up


def _simple(number: Node) -> Node:
    return cast(number, pa.int64() if number.kind == "null" else pa.float64())


def _divide(left: Any, right: Any) -> Any:
    return pc.divide_checked(left, _null_if_zero(right))


def _modulo(left: Any, right: Any) -> Any:
    # The remainder by -1 is that by 1; taken as such, the least int64 does not overflow on the way.
    divisor = pc.if_else(pc.equal(right, -1), pa.scalar(1, pa.int64()), _null_if_zero(right))
    return pc.subtract(left, pc.multiply(pc.divide_checked(left, divisor), divisor))


def _null_if_zero(values: Any) -> Any:
    return pc.if_else(pc.equal(values, pa.scalar(0, values.type)), pa.scalar(None, values.type), values)


_COMPARISONS: dict[type[Any], Kernel] = {
    exp.EQ: pc.equal,
    exp.NEQ: pc.not_equal,
    exp.LT: pc.less,
    exp.LTE: pc.less_equal,
    exp.GT: pc.greater,
    exp.GTE: pc.greater_equal,
}
_ARITHMETIC: dict[type[Any], tuple[str, Kernel]] = {
    exp.Add: ("+", pc.add_checked),
    exp.Sub: ("-", pc.subtract_checked),
    exp.Mul: ("*", pc.multiply_checked),
    exp.Div: ("/", _divide),
    exp.Mod: ("%", _modulo),
}
_TEXT_FUNCTIONS: dict[type[Any], tuple[str, Kernel]] = {
    exp.Lower: ("lower", pc.utf8_lower),
    exp.Upper: ("upper", pc.utf8_upper),
    exp.Length: ("length", pc.utf8_length),
}
_HANDLERS: dict[type[Any], Callable[[Compiler, Any], Node]] = {
    exp.Column: Compiler.column,
    exp.Literal: lambda _, tree: _literal(tree),
    exp.Boolean: lambda _, tree: _word(tree),
    exp.Null: lambda _, tree: _word(tree),
    exp.Paren: lambda compiler, tree: compiler.node(_args(tree, "this")[0]),
    exp.And: Compiler.junction,
    exp.Or: Compiler.junction,
    exp.Not: Compiler.negation,
    exp.Is: Compiler.is_null,
    exp.Between: Compiler.between,
    exp.In: Compiler.among,
    exp.Like: Compiler.like,
    exp.ILike: Compiler.like,
    exp.Neg: Compiler.minus,
    exp.StartsWith: Compiler.starts_with,
    exp.Abs: Compiler.absolute,
    exp.Round: Compiler.rounded,
    exp.Coalesce: Compiler.coalesce,
    **dict.fromkeys(_COMPARISONS, Compiler.comparison),
    **dict.fromkeys(_ARITHMETIC, Compiler.arithmetic),
    **dict.fromkeys(_TEXT_FUNCTIONS, Compiler.text_function),
}
