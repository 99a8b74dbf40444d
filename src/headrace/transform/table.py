"""Choose, rename and retype columns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import BadRecipe
from headrace.model import SYSTEM_COLUMNS
from headrace.steps import Outcome, Position, Step, column, drop, fired, replaced

TYPES: Mapping[str, pa.DataType] = {
    **{
        name: pa.type_for_alias(name)
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "binary": pa.binary(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
}
"""The types ``cast`` knows, by name."""

_ZONED = r"[T ].*(Z|[+-]\d\d(:?\d\d)?)$"


@dataclass(frozen=True)
class Select(Step):
    """Keep only ``columns``, in that order; system columns stay."""

    name: ClassVar[str] = "select"
    whole: ClassVar[str | None] = "columns"

    columns: tuple[str, ...]

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """Every row, fewer columns."""
        for name in self.columns:
            column(batch, name, self.name)
        wanted = dict.fromkeys(name for name in self.columns if name not in SYSTEM_COLUMNS)
        return Outcome(batch.select([*wanted, *(name for name in batch.schema.names if name in SYSTEM_COLUMNS)]))


@dataclass(frozen=True)
class Rename(Step):
    """Give columns other names: old name to new name."""

    name: ClassVar[str] = "rename"
    whole: ClassVar[str | None] = "columns"

    columns: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in (*self.columns, *self.columns.values()):
            if name in SYSTEM_COLUMNS or not name:
                raise BadRecipe(f"rename: {name!r} cannot be renamed or given", hint="system columns keep their names")

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """Every row, other names. Two columns of one name raise BadRecipe."""
        for name in self.columns:
            column(batch, name, self.name)
        names = [self.columns.get(name, name) for name in batch.schema.names]
        twice = [name for name in self.columns.values() if names.count(name) > 1]
        if twice:
            raise BadRecipe(
                f"step 'rename': two columns would be {twice[0]!r}", hint="choose another name, or select first"
            )
        return Outcome(batch.rename_columns(names))


def _prepared(values: pa.Array, target: pa.DataType) -> pa.Array:
    """Texts as Arrow reads them: trimmed, and times without a zone taken as UTC."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) or pa.types.is_string(target):
        return values
    values = pc.utf8_trim_whitespace(values)
    if not pa.types.is_timestamp(target):
        return values
    zoned = pc.match_substring_regex(values, _ZONED)
    day = pc.equal(pc.utf8_length(values), 10)
    ends = pc.if_else(zoned, "", pc.if_else(day, "T00:00:00Z", "Z")).cast(values.type)
    return pc.binary_join_element_wise(values, ends, pa.scalar("", values.type))


def _cast(values: pa.Array, target: pa.DataType) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """``values`` as ``target`` with null where that cannot be, and those places. Halves failing ranges down to one."""
    options = pc.CastOptions(target, allow_float_truncate=pa.types.is_integer(values.type))
    whole = _prepared(values, target)
    parts: list[pa.Array] = []
    bad: list[int] = []
    todo = [(0, len(values))]
    while todo:
        low, high = todo.pop()
        try:
            parts.append(pc.cast(whole.slice(low, high - low), options=options))
        except pa.ArrowInvalid:
            if high - low == 1:
                bad.append(low)
                parts.append(pa.nulls(1, target))
            else:
                middle = (low + high) // 2
                todo += [(middle, high), (low, middle)]
    return pa.concat_arrays(parts) if parts else pa.nulls(0, target), np.array(bad, dtype=np.int64)


@dataclass(frozen=True)
class Cast(Step):
    """Give columns other types; in a list column the elements'. A value that does not fit drops its row.

    Times without a zone are UTC. Whole numbers cast to floats may lose digits; floats with a fraction are no integers.
    """

    name: ClassVar[str] = "cast"
    whole: ClassVar[str | None] = "columns"

    columns: Mapping[str, str]

    def __post_init__(self) -> None:
        for name, kind in self.columns.items():
            if kind not in TYPES:
                near = difflib.get_close_matches(kind, TYPES, 1, 0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"types: {', '.join(TYPES)}"
                raise BadRecipe(f"cast: {kind!r} of column {name!r} is not a type", hint=hint)
            if name in SYSTEM_COLUMNS:
                raise BadRecipe(f"cast: {name!r} is a system column", hint="system columns keep their types")

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """Rows whose values fit; verdicts ``cast`` name the values that do not."""
        found = []
        for name, kind in self.columns.items():
            values = column(batch, name, self.name)
            try:
                clean, lines = self._column(name, values, TYPES[kind])
            except pa.ArrowNotImplementedError:
                raise BadRecipe(
                    f"step 'cast': {name!r} is {values.type}, which cannot become {kind}", hint=""
                ) from None
            batch = replaced(batch, name, clean)
            found.append(lines)
        return drop(batch, found)

    def _column(self, name: str, values: pa.Array, target: pa.DataType) -> tuple[pa.Array, pa.RecordBatch]:
        kind = values.type
        nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        items = pc.list_flatten(values) if nested else values
        clean, bad = _cast(items, target)
        texts = [str(value)[:200] for value in items.take(pa.array(bad)).to_pylist()]
        reasons = [f"{name} is {text!r}, which is not a {self.columns[name]}" for text in texts]
        rows = bad
        if nested:
            rows = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)[bad]
            lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            clean = pa.ListArray.from_arrays(offsets, clean, mask=values.is_null())
        return clean, fired(rows, "cast", reasons, field=name, values=texts)
