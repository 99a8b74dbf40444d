"""Typed batches (CSV, Arrow, Parquet) fitted into a dataset's growing schema."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace import settings
from headrace.collect.kinds import (
    FLOAT,
    TEXT,
    Kind,
    List,
    Object,
    kind_of,
    object_of,
    original_name,
    schema_of,
    short_text,
    stored_name,
    struct_of,
)
from headrace.collect.project import Projection, Refused, widened_columns
from headrace.errors import BadData
from headrace.model import SYSTEM_COLUMNS


def reading_schema(found: pa.Schema, schema: pa.Schema) -> pa.Schema:
    """How to read a CSV body whose own inference gave ``found``: as text where the dataset holds strings already."""
    known = {original_name(f): f.type for f in schema}
    return pa.schema([pa.field(f.name, TEXT) if known.get(f.name) == TEXT else f for f in found])


def merge_schemas(schema: pa.Schema, found: pa.Schema, text_wins: bool = False) -> pa.Schema:
    """``schema`` grown to hold tables of ``found``. ``text_wins``: leaves that disagree with strings become strings."""
    kinds = object_of(schema)
    if text_wins:
        fields = {f.name: f.type for f in found}
        disagree = {n for n, (_, k) in kinds.fields.items() if TEXT in (k, fields.get(n, k)) and k != fields.get(n, k)}
        kinds = Object({n: (s, TEXT if n in disagree else k) for n, (s, k) in kinds.fields.items()})
    columns = {f.name: pa.array([], type=_simple_type(f.type)) for f in found if not pa.types.is_null(f.type)}
    return schema_of(schema, _grown_kinds(kinds, columns, keep_whole=False))


def project_table(batch: pa.RecordBatch, schema: pa.Schema) -> Projection:
    """Fit the columns of a typed batch, matched by name, into ``schema``; new columns and nested fields are added.

    Values are cast where nothing is lost; a row with a value that cannot be held is refused. An integer column that
    meets a fraction becomes a float column, as in ``project_json``. Raises BadData beyond ``columns_max``.
    """
    user = pa.schema([f for f in schema if f.name not in SYSTEM_COLUMNS])
    columns = {f.name: _simple(c) for f, c in zip(batch.schema, batch.columns, strict=True)}
    columns = {name: column for name, column in columns.items() if not pa.types.is_null(column.type)}
    kinds = _grown_kinds(object_of(user), columns)
    grown = schema_of(user, kinds)
    kept = np.ones(batch.num_rows, dtype=np.bool_)
    refused: dict[int, Refused] = {}
    arrays = []
    for name, field in zip(kinds.fields, grown, strict=True):
        if name not in columns:
            arrays.append(pa.nulls(batch.num_rows, field.type))
            continue
        array, bad = conform(columns[name], field.type)
        arrays.append(array)
        kept[bad] = False
        for row in bad.tolist():
            shown = short_text(columns[name][row].as_py())
            reason = f"the column holds {field.type}, and the value is no such one without loss"
            refused.setdefault(row, Refused(row, name, shown, reason))
    whole = struct_of(arrays, grown, batch.num_rows).filter(pa.array(kept))
    out = pa.RecordBatch.from_struct_array(whole)
    out = pa.RecordBatch.from_arrays(out.columns, schema=grown) if len(grown) else out
    return Projection(
        out, grown, np.flatnonzero(kept), [refused[r] for r in sorted(refused)], widened_columns(user, grown)
    )


def _grown_kinds(kinds: Object, columns: dict[str, pa.Array], keep_whole: bool = True) -> Object:
    fields, limit = dict(kinds.fields), settings.integer("columns_max")
    for name, column in columns.items():
        stored, before = fields.get(name, ("", None))
        if not stored and len(fields) >= limit:
            raise BadData(f"column {name[:80]!r} would be one more than the {limit} that are allowed")
        after = merged(before, kind_of(column.type))
        if keep_whole and after == FLOAT and before != FLOAT and before is not None and _is_whole(column):
            after = before
        if after is not None:
            fields[name] = (stored or stored_name(name, [s for s, _ in fields.values()]), after)
    return Object(fields)


def merged(before: Kind, given: Kind) -> Kind:
    """What a column of ``before`` holds to take ``given``: fields are added, integers become floats, else unchanged."""
    if given is None:
        return before
    if isinstance(given, List):
        if before is None or isinstance(before, List):
            item = merged(before.item if before else None, given.item)
            return before if before and item == before.item else List(item) if item is not None else before
        return before
    if isinstance(given, Object):
        return _merged_objects(before or Object({}), given) if before is None or isinstance(before, Object) else before
    if before is None:
        return given
    if not isinstance(before, List | Object) and pa.types.is_integer(before) and pa.types.is_floating(given):
        return FLOAT
    return before


def _merged_objects(before: Object, given: Object) -> Kind:
    fields = dict(before.fields)
    for name, (_, kind) in given.fields.items():
        stored, old = fields.get(name, ("", None))
        new = merged(old, kind)
        if new is not None:
            fields[name] = (stored or stored_name(name, [s for s, _ in fields.values()], top=False), new)
    return Object(fields) if fields else None


def conform(array: pa.Array, wanted: pa.DataType) -> tuple[pa.Array, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """(the array as ``wanted``, rows that cannot be): struct fields are matched by name, leaves are cast safely."""
    if array.type == wanted:
        return array, np.empty(0, dtype=np.int64)
    if pa.types.is_struct(wanted) and pa.types.is_struct(array.type):
        return _conform_struct(array, wanted)
    if pa.types.is_list(wanted) and (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        return _conform_list(array, wanted)
    valid = np.flatnonzero(np.asarray(array.is_valid()))
    if _crosses(array.type, wanted):
        return pa.nulls(len(array), wanted), valid
    try:
        return array.cast(wanted), np.empty(0, dtype=np.int64)
    except pa.ArrowNotImplementedError:
        return pa.nulls(len(array), wanted), valid
    except pa.ArrowInvalid:
        if len(array) == 1:
            return pa.nulls(1, wanted), np.zeros(1, dtype=np.int64)
    half = len(array) // 2
    left, bad_left = conform(array.slice(0, half), wanted)
    right, bad_right = conform(array.slice(half), wanted)
    return pa.concat_arrays([left, right]), np.concatenate([bad_left, bad_right + half])


def _conform_struct(
    array: pa.Array, wanted: pa.DataType
) -> tuple[pa.Array, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    children = {original_name(f): c for f, c in zip(array.type.fields, array.flatten(), strict=True)}
    arrays, bad = [], [np.empty(0, dtype=np.int64)]
    for field in wanted.fields:
        child = children.get(original_name(field))
        fitted, rows = (pa.nulls(len(array), field.type), bad[0]) if child is None else conform(child, field.type)
        arrays.append(fitted)
        bad.append(rows)
    struct = pa.StructArray.from_arrays(arrays, fields=wanted.fields, mask=array.is_null())
    return struct, np.unique(np.concatenate(bad))


def _conform_list(array: pa.Array, wanted: pa.DataType) -> tuple[pa.Array, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    lengths = np.asarray(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64)
    values, bad = conform(array.flatten(), wanted.value_type)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    fitted = pa.ListArray.from_arrays(offsets, values, type=wanted, mask=array.is_null())
    return fitted, np.unique(np.repeat(np.arange(len(array)), lengths)[bad])


def _crosses(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Arrow would cast these, but a truth is no number and a number no time."""

    def group(type: pa.DataType) -> str:
        if pa.types.is_boolean(type):
            return "truth"
        if pa.types.is_temporal(type):
            return "time"
        return "number" if pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type) else ""

    return bool(group(given) and group(wanted) and group(given) != group(wanted))


def _is_whole(column: pa.Array) -> bool:
    if not pa.types.is_floating(column.type):
        return False
    try:
        column.cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def _simple(array: pa.Array) -> pa.Array:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    wanted = _simple_type(array.type)
    return array if wanted == array.type else array.cast(wanted)


def _simple_type(type: pa.DataType) -> pa.DataType:
    """The type without encodings that only Arrow knows: dictionaries, views, 64-bit offsets."""
    if pa.types.is_dictionary(type):
        return _simple_type(type.value_type)
    if pa.types.is_large_string(type) or pa.types.is_string_view(type):
        return TEXT
    if pa.types.is_large_binary(type) or pa.types.is_binary_view(type):
        return pa.binary()
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return pa.list_(_simple_type(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([f.with_type(_simple_type(f.type)) for f in type.fields])
    return type
