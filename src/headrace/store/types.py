"""Arrow types at rest. Delta has no unsigned, half or fixed-size types: these are widened, the true type kept aside.

``to_stored(schema) -> Schema`` · ``cast_to_stored(batch) -> RecordBatch`` · ``true_schema(stored) -> Schema`` ·
``narrow(batch, schema) -> RecordBatch`` (missing columns become null) · ``logical(schema) -> Schema`` ·
``encode_schema(schema) -> str`` · ``decode_schema(text) -> Schema`` · ``describe(schema) -> ({"name", "type"}, ...)`` ·
``type_text(type) -> str``

Encodings are no types: ``large_string``, ``string_view`` and dictionaries of strings are all ``string`` here.
Columns of Arrow's null type hold nothing and are left out of a stored schema.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import BadData

TYPE_KEY = b"headrace.type"
"""Field metadata of a widened column: base64 of the IPC form of a schema that holds the true field alone."""

_UTC = pa.timestamp("us", "UTC")
_PLAIN = {
    pa.large_string(): pa.string(),
    pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(),
    pa.binary_view(): pa.binary(),
}
_WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.float16(): pa.float32(),
    pa.date64(): pa.date32(),
    pa.time32("s"): pa.int32(),
    pa.time32("ms"): pa.int32(),
    pa.time64("us"): pa.int64(),
    pa.time64("ns"): pa.int64(),
}
_SAME = frozenset(
    [
        pa.int8(),
        pa.int16(),
        pa.int32(),
        pa.int64(),
        pa.float32(),
        pa.float64(),
        pa.bool_(),
        pa.string(),
        pa.binary(),
        pa.date32(),
    ]
)


def _nested(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType | None:
    """``kind`` with ``change`` applied to its children, nullable throughout; None for a type without children."""
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(change(kind.value_type), kind.list_size)
    if _is_list(kind):
        return pa.list_(change(kind.value_type))
    if pa.types.is_map(kind):
        return pa.map_(change(kind.key_type), change(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(child.name, change(child.type)) for child in kind])
    return None


def _is_list(kind: pa.DataType) -> bool:
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
    return any(check(kind) for check in checks)


def _logical(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _logical(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _logical(kind.value_type)
    if pa.types.is_decimal(kind) and kind.precision <= 38:
        return pa.decimal128(kind.precision, kind.scale)
    return _nested(kind, _logical) or _PLAIN.get(kind, kind)


def _stored(kind: pa.DataType) -> pa.DataType:
    """The Delta-safe form of a logical type."""
    if pa.types.is_fixed_size_list(kind) and kind.list_size > 0:
        return pa.list_(_stored(kind.value_type))
    if pa.types.is_struct(kind):
        _check_names([child.name for child in kind])
    if not pa.types.is_fixed_size_list(kind) and (nested := _nested(kind, _stored)) is not None:
        return nested
    if pa.types.is_timestamp(kind):
        return _UTC
    if pa.types.is_duration(kind):
        return pa.int64()
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if kind in _SAME or pa.types.is_decimal128(kind):
        return kind
    if kind in _WIDER:
        return _WIDER[kind]
    raise BadData(
        f"columns of type {type_text(kind)} cannot be stored",
        hint="cast the column first, as int64, string or decimal128",
    )


def _check_names(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if seen.setdefault(name.lower(), name) != name or not name:
            raise BadData(
                f"the column names {seen[name.lower()]!r} and {name!r} differ in case only"
                if name
                else "a column has an empty name",
                hint="rename one of them; names are compared without case at rest",
            )
    if not names or len(seen) < len(names):
        raise BadData(
            "a column name is given twice" if names else "a table or struct has no columns",
            hint="every column needs its own name",
        )


def _encode_type(kind: pa.DataType) -> bytes:
    return base64.b64encode(pa.schema([pa.field("true", kind)]).serialize().to_pybytes())


def logical(schema: pa.Schema) -> pa.Schema:
    """The schema without encodings, null columns, metadata and nullability: what a value is, not how it is laid out."""
    kinds = [(field.name, _logical(field.type)) for field in schema]
    return pa.schema([pa.field(name, kind) for name, kind in kinds if not pa.types.is_null(kind)])


def to_stored(schema: pa.Schema) -> pa.Schema:
    """The Delta-safe schema of a true one (a stored one stays as it is). Raises BadData for what has no safe form."""
    true = true_schema(schema)
    _check_names(true.names)
    fields = []
    for field in true:
        try:
            kind = _stored(field.type)
        except BadData as error:
            raise BadData(f"column {field.name!r}: {error.message}", hint=error.hint) from None
        fields.append(
            pa.field(field.name, kind, metadata=None if kind == field.type else {TYPE_KEY: _encode_type(field.type)})
        )
    return pa.schema(fields)


def true_schema(schema: pa.Schema) -> pa.Schema:
    """The true logical types of a stored schema, restored from field metadata. Raises BadData where that is damaged."""
    fields = []
    for field in schema:
        kept = (field.metadata or {}).get(TYPE_KEY)
        fields.append(
            field if kept is None else pa.field(field.name, decode_schema(kept.decode("ascii")).field(0).type)
        )
    return logical(pa.schema(fields))


def encode_schema(schema: pa.Schema) -> str:
    """Base64 of the IPC form of a schema, as ``Manifest.arrow_schema`` carries it."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode("ascii")


def decode_schema(text: str) -> pa.Schema:
    """The schema of ``encode_schema``; raises BadData for anything else."""
    try:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))
    except (binascii.Error, pa.ArrowException, OSError) as error:
        raise BadData(f"not an encoded Arrow schema: {error}") from None


def type_text(kind: pa.DataType) -> str:
    """A logical type as text, such as ``list<uint16>``, whatever encoding, nullability and names of list items."""
    kind = _logical(kind)
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<{type_text(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list<{type_text(kind.value_type)}>"
    if pa.types.is_map(kind):
        return f"map<{type_text(kind.key_type)}, {type_text(kind.item_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{json.dumps(child.name)}: {type_text(child.type)}' for child in kind)}>"
    return str(kind)


def describe(schema: pa.Schema) -> tuple[dict[str, str], ...]:
    """Name and true type of every column of a true or stored schema, as ``Version.schema`` lists them."""
    return tuple({"name": field.name, "type": type_text(field.type)} for field in true_schema(schema))


def cast_to_stored(batch: pa.RecordBatch, schema: pa.Schema | None = None) -> pa.RecordBatch:
    """The batch in Delta-safe types: those of the stored ``schema``, missing columns null, or of its own schema.

    Raises BadData for a type without a safe form and for values that would change, such as nanoseconds.
    """
    return _fit(batch, to_stored(batch.schema) if schema is None else schema)


def narrow(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch in the true types of ``schema``, missing columns null. Raises BadData where a value does not fit."""
    return _fit(batch, schema)


def _fit(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    columns = []
    for field in schema:
        at = batch.schema.get_field_index(field.name)
        try:
            columns.append(pa.nulls(batch.num_rows, field.type) if at < 0 else _convert(batch.column(at), field.type))
        except (pa.ArrowException, ValueError) as error:
            was = "nothing" if at < 0 else type_text(batch.schema.field(at).type)
            raise BadData(f"column {field.name!r}: {was} does not fit {type_text(field.type)}: {error}") from None
    if not columns:
        return pa.RecordBatch.from_struct_array(pa.array([{}] * batch.num_rows, pa.struct([])))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _mask(array: Any) -> pa.Array | None:
    return array.is_null() if array.null_count else None


def _convert(array: Any, kind: pa.DataType) -> pa.Array:
    """Cast one array, values unchanged, whatever its encoding, offset and nulls; children of null parents go."""
    source = array.type
    if isinstance(source, pa.BaseExtensionType):
        return _convert(array.storage, kind)
    if pa.types.is_dictionary(source):
        return _convert(array.dictionary_decode(), kind)
    if pa.types.is_run_end_encoded(source):
        return _convert(pc.run_end_decode(array), kind)
    if source == kind:
        return array
    if pa.types.is_null(source):
        return pa.nulls(len(array), kind)
    if pa.types.is_struct(kind) and pa.types.is_struct(source):
        return _struct(array, kind)
    if pa.types.is_map(kind) and pa.types.is_map(source):
        return _map(array, kind)
    if pa.types.is_fixed_size_list(kind) and (_is_list(source) or pa.types.is_fixed_size_list(source)):
        return _fixed_list(array, kind)
    if pa.types.is_list(kind) and (_is_list(source) or pa.types.is_fixed_size_list(source)):
        values = _convert(array.flatten(), kind.value_type)
        return pa.ListArray.from_arrays(_offsets(array), values, type=kind, mask=_mask(array))
    return _leaf(array, kind)


def _offsets(array: Any) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    if ends[-1] > np.iinfo(np.int32).max:
        raise BadData("a batch holds more than 2^31 list items", hint="use smaller batches")
    return pa.array(ends.astype(np.int32))


def _struct(array: Any, kind: pa.StructType) -> pa.Array:
    children = array.flatten()
    columns = []
    for child in kind:
        at = array.type.get_field_index(child.name)
        columns.append(pa.nulls(len(array), child.type) if at < 0 else _convert(children[at], child.type))
    unknown = [child.name for child in array.type if kind.get_field_index(child.name) < 0]
    if unknown:
        raise ValueError(f"unknown fields {unknown}")
    return pa.StructArray.from_arrays(columns, fields=list(kind), mask=_mask(array))


def _map(array: Any, kind: pa.MapType) -> pa.Array:
    entries = array.cast(
        pa.list_(pa.struct([pa.field("key", array.type.key_type), pa.field("value", array.type.item_type)]))
    )
    keys, items = entries.flatten().flatten()
    return pa.MapArray.from_arrays(
        _offsets(entries), _convert(keys, kind.key_type), _convert(items, kind.item_type), type=kind, mask=_mask(array)
    )


def _fixed_list(array: Any, kind: pa.FixedSizeListType) -> pa.Array:
    size, values = kind.list_size, _convert(array.flatten(), kind.value_type)
    valid = pc.is_valid(array).to_numpy(zero_copy_only=False)
    if (
        len(values) != size * int(valid.sum())
        or not pc.all(pc.equal(pc.list_value_length(array), size), min_count=0).as_py()
    ):
        raise ValueError(f"a list does not have {size} items")
    if array.null_count:
        rows = pa.array(np.cumsum(valid) - 1, mask=~valid)
        starts = np.repeat(rows.fill_null(0).to_numpy(), size) * size + np.tile(np.arange(size), len(array))
        values = values.take(pa.array(starts, mask=np.repeat(~valid, size)))
    return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=_mask(array))


def _leaf(array: Any, kind: pa.DataType) -> pa.Array:
    source = array.type
    if pa.types.is_timestamp(kind) and pa.types.is_timestamp(source):
        return array.cast(pa.timestamp(kind.unit, source.tz)).view(pa.int64()).view(kind)
    if pa.types.is_duration(kind) and pa.types.is_integer(source):
        return array.cast(pa.int64()).view(kind)
    if _family(source) != _family(kind) or (pa.types.is_float64(source) and pa.types.is_floating(kind)):
        raise ValueError("values would change")
    return array.cast(kind)


def _family(kind: pa.DataType) -> str:
    """Which leaf types cast into each other without another meaning."""
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_date(kind):
        return "date"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_primitive(kind) and not pa.types.is_timestamp(kind):
        return "number"
    return "timestamp" if pa.types.is_timestamp(kind) else "number" if pa.types.is_decimal(kind) else "bytes"
