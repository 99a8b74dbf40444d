"""The columns that a ``where`` names: found in the schema, and loaded from a batch in one of a few types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from headrace.predicate.words import nearest, refused

_LISTED = 20


@dataclass(frozen=True)
class Reference:
    """A column, or a field within a struct column, with its stored type and the type it is computed in."""

    path: tuple[str, ...]
    stored: pa.DataType
    type: pa.DataType

    @property
    def name(self) -> str:
        """For messages."""
        return f"column {'.'.join(self.path)} ({self.stored})"

    def load(self, batch: pa.RecordBatch) -> pa.Array:
        """The column as ``type``; BadRequest if ``batch`` lacks it or has another type."""
        if batch.schema.names.count(self.path[0]) != 1:
            raise refused(f"where needs the column {self.path[0]}, which these rows lack", hint="read that column too")
        found = batch.column(self.path[0])
        for name in self.path[1:]:
            if not pa.types.is_struct(found.type) or found.type.get_field_index(name) < 0:
                raise self._changed(found.type)
            found = pc.struct_field(found, [name])
        array = _widened(found)
        if array.type != self.type:
            raise self._changed(found.type)
        return array

    def _changed(self, kind: pa.DataType) -> Exception:
        return refused(f"where was checked for {self.name}, but these rows have {kind}", hint="use one schema for both")


def _widened(array: pa.Array) -> pa.Array:
    """As int64, float64, decimal, large_string or date32 where the type is of their kind; others as they are."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _widened(array.storage)
    if pa.types.is_dictionary(kind):
        return _widened(array.cast(kind.value_type))
    if kind == pa.uint64():
        return array.cast(pa.decimal128(20, 0))
    if pa.types.is_integer(kind):
        return array.cast(pa.int64())
    if pa.types.is_floating(kind):
        return array.cast(pa.float64())
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.large_string())
    return array.cast(pa.date32()) if pa.types.is_date64(kind) else array


class References:
    """The columns that one expression names, each once, in order of appearance."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.found: list[Reference] = []

    def index(self, parts: tuple[str, ...], start: int, reserved: str) -> int:
        """The number of the column written as ``parts``; BadRequest for one that is unknown or not unique."""
        path, stored = self._resolve(parts, start, reserved)
        reference = Reference(path, stored, _widened(pa.nulls(0, stored)).type)
        if reference not in self.found:
            self.found.append(reference)
        return self.found.index(reference)

    def _resolve(self, parts: tuple[str, ...], start: int, reserved: str) -> tuple[tuple[str, ...], pa.DataType]:
        whole = ".".join(parts)
        if parts[0] not in self.schema.names and self.schema.names.count(whole) == 1:
            return (whole,), self.schema.field(whole).type
        path: list[str] = []
        fields, stored = list(self.schema), pa.null()
        for part in parts:
            if path and not pa.types.is_struct(stored):
                raise refused(f"column {'.'.join(path)} is {stored} and has no field {part}", start)
            chosen = _choose(part, fields, path, start, reserved)
            path.append(chosen.name)
            stored = chosen.type
            fields = [stored.field(i) for i in range(stored.num_fields)] if pa.types.is_struct(stored) else []
        return tuple(path), stored


def _choose(part: str, fields: Sequence[pa.Field], path: Sequence[str], start: int, reserved: str) -> pa.Field:
    same = [field for field in fields if field.name == part]
    same = same or [field for field in fields if field.name.casefold() == part.casefold()]
    if len(same) == 1:
        return same[0]
    name = ".".join([*path, part])
    if same:
        raise refused(f"column {name} could be any of {', '.join(f.name for f in same)}", start, "write the exact name")
    names = [field.name for field in fields]
    if reserved and not path:
        raise refused(f"{reserved} is not allowed, and no column has that name{nearest(part, names)}", start)
    listed = ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
    raise refused(f"there is no column {name}{nearest(part, names)}", start, f"the columns are {listed}")
