"""What a column holds, and how that grows value by value: the lattice of types, and the names of columns.

A kind is None (only nulls and empties so far), an Arrow leaf type, a list of a kind, or an object of named kinds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import orjson
import pyarrow as pa

ORIGINAL_NAME = b"headrace.name"
_VALUE_CHARS = 120
_REFUSED_BY_DELTA = re.compile(r"[ ,;{}()\n\t=]")


def original_name(field: pa.Field) -> str:
    """The name under which records carry this column."""
    name = (field.metadata or {}).get(ORIGINAL_NAME)
    return name.decode() if name is not None else str(field.name)


def stored_name(original: str, taken: Iterable[str], top: bool = True) -> str:
    """The column name for ``original``: allowed by Delta, no system column, unlike ``taken`` in any case."""
    name = _REFUSED_BY_DELTA.sub("_", original) or "_"
    if top and name.startswith("_"):
        name = "_" + name
    used = {other.lower() for other in taken}
    number, free = 1, name
    while free.lower() in used:
        number += 1
        free = f"{name}__{number}"
    return free


def named_field(stored: str, original: str, type: pa.DataType) -> pa.Field:
    """A field that remembers the name it has in records, if that differs."""
    return pa.field(stored, type, metadata=None if stored == original else {ORIGINAL_NAME: original.encode()})


# ---------------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class List:
    """A list whose values are of one kind."""

    item: Kind


@dataclass(frozen=True)
class Object:
    """Typed fields by original name, each with its stored name."""

    fields: Mapping[str, tuple[str, Kind]]

    @cached_property
    def width(self) -> int:
        """Named fields, nested ones included."""
        return len(self.fields) + sum(_width(kind) for _, kind in self.fields.values())


# None: nothing but nulls and empties so far.
Kind: TypeAlias = "pa.DataType | List | Object | None"
_NOTHING = Object({})
INT, FLOAT, TEXT, BOOL = pa.int64(), pa.float64(), pa.string(), pa.bool_()
_BOUNDS = {
    t: (int(np.iinfo(t.to_pandas_dtype()).min), int(np.iinfo(t.to_pandas_dtype()).max))
    for t in (pa.int64(), pa.int32(), pa.int16(), pa.int8(), pa.uint64(), pa.uint32(), pa.uint16(), pa.uint8())
}
_INT_LOW, _INT_HIGH = _BOUNDS[INT]
_PLAIN = {type: type for type in (TEXT, FLOAT, INT, BOOL)}


def _width(kind: Kind) -> int:
    while isinstance(kind, List):
        kind = kind.item
    return kind.width if isinstance(kind, Object) else 0


def kind_of(type: pa.DataType) -> Kind:
    """The kind of an Arrow type."""
    if pa.types.is_null(type):
        return None
    if pa.types.is_struct(type):
        return object_of(type.fields)
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return List(kind_of(type.value_type))
    return _PLAIN.get(type, type)


def object_of(fields: Iterable[pa.Field]) -> Object:
    """The kind of a record or struct with these fields."""
    return Object({original_name(f): (f.name, kind_of(f.type)) for f in fields})


def arrow_of(kind: Kind) -> pa.DataType:
    """The Arrow type of a kind; nested fields carry their original names."""
    if kind is None:
        return pa.null()
    if isinstance(kind, List):
        return pa.list_(arrow_of(kind.item))
    if isinstance(kind, Object):
        return pa.struct([named_field(stored, name, arrow_of(k)) for name, (stored, k) in kind.fields.items()])
    return kind


class Contradiction(Exception):
    """A value that its column cannot hold; the path grows on the way up."""

    def __init__(self, value: Any, reason: str) -> None:
        super().__init__(reason)
        self.value, self.reason, self.path = value, reason, ""

    def below(self, step: str) -> Contradiction:
        """The same, seen from one level up."""
        self.path = step + (f".{self.path}" if self.path and not self.path.startswith("[") else self.path)
        return self


def _noun(kind: Kind) -> str:
    if isinstance(kind, List):
        return "lists"
    if isinstance(kind, Object):
        return "objects"
    if kind is not None and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return "numbers"
    return {BOOL: "true or false", TEXT: "strings"}.get(kind, f"values of type {kind}")


_NOUNS = {bool: "true or false", str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _contradiction(kind: Kind, value: Any) -> Contradiction:
    return Contradiction(value, f"the column holds {_noun(kind)}, and this is {_NOUNS[type(value)]}")


def _grow(kind: Kind, value: Any) -> Kind:
    """What a column of ``kind`` holds once ``value`` is in it too; the same object if nothing changes."""
    if value is None:
        return kind
    if isinstance(value, dict):
        if kind is not None and not isinstance(kind, Object):
            raise _contradiction(kind, value)
        return grow_object(kind or _NOTHING, value, top=False) if kind or value else kind
    if isinstance(value, list):
        return _grow_list(kind, value)
    if isinstance(kind, List | Object):
        raise _contradiction(kind, value)
    return _grow_leaf(kind, value)


def grow_object(kind: Object, value: Mapping[str, Any], top: bool) -> Object | None:
    """The object with the fields of ``value``; None for one that is still without typed fields below the top."""
    changed: dict[str, tuple[str, Kind]] = {}
    for name, item in value.items():
        if item is None:
            continue
        stored, before = kind.fields.get(name, ("", None))
        if _is_surely_held(before, item):
            continue
        try:
            after = _grow(before, item)
        except Contradiction as contradiction:
            raise contradiction.below(name) from None
        if after is before:
            continue
        if not stored:
            taken = [s for s, _ in kind.fields.values()] + [s for s, _ in changed.values()]
            stored = stored_name(name, taken, top)
        changed[name] = (stored, after)
    if changed:
        return Object({**kind.fields, **changed})
    return kind if kind.fields or top else None


def _is_surely_held(kind: Kind, value: Any) -> bool:
    """The common cases, by identity: most values of most records change nothing."""
    if kind is TEXT:
        return type(value) is str
    if kind is FLOAT:
        return type(value) is float and math.isfinite(value)
    if kind is INT:
        return type(value) is int and _INT_LOW <= value <= _INT_HIGH
    return kind is BOOL and type(value) is bool


def _grow_list(kind: Kind, value: list[Any]) -> Kind:
    if kind is not None and not isinstance(kind, List):
        if isinstance(kind, pa.DataType) and pa.types.is_fixed_size_list(kind):
            return _grow_other(kind, value)
        raise _contradiction(kind, value)
    before = item = kind.item if kind else None
    for index, element in enumerate(value):
        if _is_surely_held(item, element):
            continue
        try:
            item = _grow(item, element)
        except Contradiction as contradiction:
            raise contradiction.below(f"[{index}]") from None
    return kind if item is before else List(item)


def _grow_leaf(kind: pa.DataType | None, value: str | float | bool) -> pa.DataType:
    if isinstance(value, bool):
        return _same_or_refused(kind, BOOL, value)
    if isinstance(value, str):
        if kind is not None and (pa.types.is_large_string(kind) or _is_other(kind)):
            return kind if pa.types.is_large_string(kind) else _grow_other(kind, value)
        return _same_or_refused(kind, TEXT, value)
    if kind is not None and pa.types.is_decimal(kind):
        return _grow_other(kind, value)
    if kind is not None and not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise _contradiction(kind, value)
    if isinstance(value, int):
        return _grow_integer(kind, value)
    if not math.isfinite(value):
        raise Contradiction(value, "the number is beyond the range of a 64-bit float")
    return kind if kind is not None and pa.types.is_floating(kind) else FLOAT


def _same_or_refused(kind: pa.DataType | None, wanted: pa.DataType, value: Any) -> pa.DataType:
    if kind is not None and kind != wanted:
        raise _contradiction(kind, value)
    return wanted if kind is None else kind


def _grow_integer(kind: pa.DataType | None, value: int) -> pa.DataType:
    if kind is not None and pa.types.is_floating(kind):
        return kind
    for candidate in (kind or INT, INT):
        low, high = _BOUNDS[candidate]
        if low <= value <= high:
            return candidate
    return FLOAT


def _is_other(kind: pa.DataType) -> bool:
    """A type that JSON has no form for: dates, times, binaries … reach it as text, if the text can be read as one."""
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return not plain and kind != TEXT


def _grow_other(kind: pa.DataType, value: Any) -> pa.DataType:
    try:
        _as_other(kind, value)
    except (pa.ArrowException, ValueError, TypeError):
        raise _contradiction(kind, value) from None
    return kind


def _as_other(kind: pa.DataType, value: Any) -> Any:
    return pa.array([value], type=kind)[0].as_py() if isinstance(value, list) else pa.scalar(value).cast(kind).as_py()


def fit(kind: Kind, value: Any) -> Any:
    """``value`` as pyarrow takes it for ``kind``; an empty list or object under another kind reads as null."""
    if value is None or kind is None:
        return None
    if kind is TEXT or kind is INT or kind is BOOL:
        return None if isinstance(value, dict | list) else value
    if isinstance(kind, Object):
        if not isinstance(value, dict):
            return None
        return {stored: fit(k, value.get(name)) for name, (stored, k) in kind.fields.items()}
    if isinstance(kind, List):
        return [fit(kind.item, v) for v in value] if isinstance(value, list) else None
    if isinstance(value, dict) or (isinstance(value, list) and not pa.types.is_fixed_size_list(kind)):
        return None
    if pa.types.is_floating(kind):
        return float(value)
    return _as_other(kind, value) if _is_other(kind) else value


def schema_of(schema: pa.Schema, kinds: Object) -> pa.Schema:
    """The schema of ``kinds``: unchanged columns keep their field with its metadata, then new ones by appearance."""
    before = {f.name: f for f in schema}
    fields = []
    for name, (stored, kind) in kinds.fields.items():
        old = before.get(stored)
        if old is not None and kind_of(old.type) == kind:
            fields.append(old)
        else:
            fields.append(named_field(stored, name, arrow_of(kind)))
    return pa.schema(fields)


def short_text(value: Any) -> str | None:
    """A value as a text short enough for a message."""
    if value is None:
        return None
    shown = (
        value
        if isinstance(value, str)
        else str(value)
        if isinstance(value, float)
        else orjson.dumps(value, default=str).decode()
    )
    return shown if len(shown) <= _VALUE_CHARS else shown[: _VALUE_CHARS - 1] + "…"


def struct_of(arrays: Sequence[pa.Array], schema: pa.Schema, rows: int) -> pa.StructArray:
    """The arrays as one struct array of ``rows`` rows; that many even without columns."""
    # A RecordBatch without columns forgets its rows, unless it comes from a struct of that length.
    if arrays:
        return pa.StructArray.from_arrays(arrays, fields=list(schema))
    return pa.array([{}] * rows, type=pa.struct([]))
