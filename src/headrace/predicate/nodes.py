"""The parts of a compiled ``where``: typed kernels over arrays, and how two of them are brought to one type."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pyarrow as pa

from headrace.predicate.words import ALLOWED, refused

Kernel = Callable[..., Any]
"""Arrays or scalars of Arrow in, one out."""

_KINDS: tuple[tuple[str, Callable[[pa.DataType], bool]], ...] = (
    ("null", pa.types.is_null),
    ("boolean", pa.types.is_boolean),
    ("number", lambda t: pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t)),
    ("text", pa.types.is_large_string),
    ("time", lambda t: pa.types.is_date(t) or pa.types.is_timestamp(t)),
)
_ARTICLES = {"boolean": "a boolean", "number": "a number", "text": "text"}
_UNITS = ("s", "ms", "us", "ns")
_FINER_THAN_MICROSECONDS = re.compile(r"[.,]\d{6}\d*[1-9]")
_CLASH_HINTS = {
    ("number", "text"): "write numbers without quotes, and text in single quotes",
    ("boolean", "number"): "write the boolean column alone, or compare it with TRUE or FALSE",
    ("number", "time"): "write dates as text, such as '2024-01-31'",
}


@dataclass(frozen=True)
class Node:
    """A compiled part: its Arrow type, how to compute it from the loaded columns, and its value if that is constant."""

    name: str
    type: pa.DataType
    run: Callable[[Sequence[pa.Array]], Any]
    value: pa.Scalar | None = None

    @property
    def kind(self) -> str:
        """null, boolean, number, text or time, each comparable with its like; "" for other types."""
        return next((name for name, test in _KINDS if test(self.type)), "")

    def needs(self, kind: str, what: str, start: int | None) -> Node:
        """This node, or BadRequest if it is neither of ``kind`` nor NULL."""
        if self.kind not in (kind, "null"):
            raise refused(f"{what} takes {_ARTICLES[kind]}, not {self.name}", start)
        return self


def constant(value: pa.Scalar, name: str) -> Node:
    """A part that is the same for all rows."""
    return Node(name, value.type, lambda _: value, value)


def whole(value: int, name: str) -> Node:
    """A whole number: int64, or a decimal beyond; ArrowInvalid beyond 38 digits."""
    if -(2**63) <= value < 2**63:
        return constant(pa.scalar(value, pa.int64()), name)
    return constant(pa.scalar(Decimal(value), pa.decimal128(38, 0)), name)


def call(name: str, start: int | None, kernel: Kernel, *nodes: Node) -> Node:
    """``kernel`` over ``nodes``. It runs once here: over no rows, for its type, or over constants, for its value."""
    samples = [pa.nulls(0, node.type) if node.value is None else node.value for node in nodes]
    try:
        sample = kernel(*samples)
    except pa.ArrowException as error:
        raise refused(f"{name} of {' and '.join(n.name for n in nodes)} cannot be computed: {error}", start) from None
    if isinstance(sample, pa.Scalar):
        return constant(sample, f"the result of {name}")
    described = f"the result of {name} ({sample.type})"
    return Node(described, sample.type, lambda rows: kernel(*[node.run(rows) for node in nodes]))


def cast(node: Node, kind: pa.DataType, start: int | None = None) -> Node:
    """``node`` as ``kind``, under its own name."""
    if node.type == kind:
        return node
    # Whole numbers beyond 2**53 round here instead of failing, as they do wherever SQL mixes them with fractions.
    lossy = pa.types.is_floating(kind)
    return replace(call("a conversion", start, lambda rows: rows.cast(kind, safe=not lossy), node), name=node.name)


def aligned(left: Node, right: Node, start: int | None) -> tuple[Node, Node]:
    """Both as types that Arrow compares, each itself where it can stay so; BadRequest that names both if none are."""
    kinds = (left.kind, right.kind)
    if "" not in kinds and "null" in kinds:
        return (cast(left, right.type, start), right) if left.kind == "null" else (left, cast(right, left.type, start))
    if kinds == ("time", "text") and right.value is not None and right.value.is_valid:
        return aligned(left, _instant(right, left, start), start)
    if kinds == ("text", "time") and left.value is not None and left.value.is_valid:
        return aligned(_instant(left, right, start), right, start)
    if "" in kinds:
        raise _clash(left, right, start, "nested and binary columns can only be tested with IS NULL")
    if kinds[0] != kinds[1]:
        low, high = sorted(kinds)
        raise _clash(left, right, start, _CLASH_HINTS.get((low, high), ALLOWED))
    if kinds[0] == "number":
        return numbers(left, right, start)
    return _times(left, right, start) if kinds[0] == "time" else (left, right)


def numbers(left: Node, right: Node, start: int | None) -> tuple[Node, Node]:
    """Both as float64 if one is, else as they are."""
    if pa.types.is_floating(left.type) or pa.types.is_floating(right.type):
        return cast(left, pa.float64(), start), cast(right, pa.float64(), start)
    return left, right


def whole_if_equal(number: Node, other: Node) -> Node:
    """A constant such as 3.0 as 3 beside whole numbers, so that these are compared exactly beyond 2**53."""
    value = None if number.value is None else number.value.as_py()
    if isinstance(value, float) and not pa.types.is_floating(other.type) and value.is_integer() and abs(value) < 1e37:
        return whole(int(value), number.name)
    return number


def _clash(left: Node, right: Node, start: int | None, hint: str) -> Exception:
    return refused(f"{left.name} cannot be compared with {right.name}", start, hint)


def _times(left: Node, right: Node, start: int | None) -> tuple[Node, Node]:
    if left.type == right.type:
        return left, right
    zoned = {bool(node.type.tz) for node in (left, right) if pa.types.is_timestamp(node.type)}
    if len(zoned) > 1:
        raise _clash(left, right, start, "only one of them has a time zone")
    units = [node.type.unit if pa.types.is_timestamp(node.type) else "us" for node in (left, right)]
    finest = pa.timestamp(max(units, key=_UNITS.index), "UTC" if True in zoned else None)
    return cast(left, finest, start), cast(right, finest, start)


def _instant(node: Node, other: Node, start: int | None) -> Node:
    """The text literal ``node`` as the date or timestamp that it means beside ``other``."""
    text = str(node.value)
    zone = getattr(other.type, "tz", None)
    try:
        if pa.types.is_date(other.type) and len(text) <= len("2024-W05-3"):
            return constant(pa.scalar(dt.date.fromisoformat(text), pa.date32()), node.name)
        if _FINER_THAN_MICROSECONDS.search(text):
            raise ValueError("it is finer than microseconds")
        moment = dt.datetime.fromisoformat(text)
        if zone is None and moment.tzinfo is not None:
            raise ValueError("it names a time zone, the column has none")
        moment = moment.replace(tzinfo=moment.tzinfo or dt.UTC).astimezone(dt.UTC)
        plain = pa.scalar(moment.replace(tzinfo=None), pa.timestamp("us"))
        return constant(plain.cast(pa.timestamp("us", "UTC")) if zone else plain, node.name)
    except (ValueError, OverflowError) as error:
        hint = "write it as '2024-01-31' or '2024-01-31T12:00:00Z'"
        raise refused(f"{node.name} cannot be compared with {other.name}: {error}", start, hint) from None
