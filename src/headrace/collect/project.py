"""Typed columns out of JSON texts and foreign tables, under a schema that grows.

The meaning is a fold over the records in order: the first value that is not null decides what a column holds, integers
turn into floats once a number needs it, objects gain fields, and a record that contradicts what came before is refused
whole, with field and reason, and leaves no trace in the schema. So a prefix of the records has the same verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from headrace import settings
from headrace.collect import flat, formats
from headrace.collect.codings import BLOCK_BYTES
from headrace.collect.kinds import (
    BOOL,
    FLOAT,
    INT,
    TEXT,
    Contradiction,
    Object,
    fit,
    grow_object,
    named_field,
    object_of,
    original_name,
    schema_of,
    short_text,
    stored_name,
    struct_of,
)
from headrace.model import SYSTEM_COLUMNS, RowError

_CHUNK_ROWS = 8192
_SAMPLE_ROWS = 64


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that could not be held: its index, the field's path, the value as short text, and why in plain words."""

    index: int
    field: str | None
    value: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Projection:
    """``batch`` holds the accepted records' typed columns, in order, under ``schema``, the grown one.

    ``accepted`` are their indices (int64); ``widened`` names the columns that existed and had to change their type.
    """

    batch: pa.RecordBatch
    schema: pa.Schema
    accepted: npt.NDArray[np.int64]
    refused: list[Refused]
    widened: tuple[str, ...]


# ---------------------------------------------------------------------------------------------- the fold


def project_json(
    texts: pa.Array | Sequence[bytes], schema: pa.Schema, fixed: bool = False, lines: bytes | None = None
) -> Projection:
    """Project JSON texts, each accepted by ``formats`` as one object, under ``schema`` (user columns, may be empty).

    A text that is no JSON object after all is refused too. At most 2 GiB of text at once. With ``fixed`` the schema
    stands: a record that would change it is refused. ``lines``, where at hand, holds the same texts, one a line.
    """
    user = pa.schema([f for f in schema if f.name not in SYSTEM_COLUMNS])
    fast = _project_fast(texts, user, lines)
    return fast if fast and not (fixed and fast.schema != user) else project_slowly(texts, user, fixed)


def project_slowly(texts: pa.Array | Sequence[bytes], schema: pa.Schema, fixed: bool = False) -> Projection:
    """``project_json`` record by record: the reference that the fast path must equal."""
    kinds = object_of(schema)
    accepted: list[int] = []
    refused: list[Refused] = []
    limit = settings.integer("columns_max")
    for index, text in enumerate(_each(texts)):
        try:
            kinds = _grown_by(kinds, text, limit, fixed)
        except Contradiction as no:
            refused.append(Refused(index, no.path or None, short_text(no.value), no.reason))
        else:
            accepted.append(index)
    grown = schema_of(schema, kinds)
    rows = np.array(accepted, dtype=np.int64)
    batch = _materialise(_take(texts, rows, bool(refused)), kinds, grown)
    return Projection(batch, grown, rows, refused, widened_columns(schema, grown))


def _grown_by(kinds: Object, text: bytes, limit: int, fixed: bool) -> Object:
    try:
        record = formats.loads(text)
    except ValueError as error:
        raise Contradiction(text.decode(errors="replace"), f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise Contradiction(record, "a record is a JSON object")
    grown = grow_object(kinds, record, top=True) or kinds
    if fixed and grown is not kinds:
        name = next(n for n in grown.fields if grown.fields[n] != kinds.fields.get(n))
        was = "is a new field" if name not in kinds.fields else "needs another type than the sampled records showed"
        raise Contradiction(record.get(name), f"{name[:80]!r} {was}, and the columns are fixed").below(name)
    if grown is not kinds and grown.width > max(limit, kinds.width):
        raise Contradiction(None, f"its fields would make {grown.width} columns, and {limit} are allowed")
    return grown


def _each(texts: pa.Array | Sequence[bytes]) -> Iterator[bytes]:
    if not isinstance(texts, pa.Array):
        yield from texts
        return
    for start in range(0, len(texts), _CHUNK_ROWS):
        yield from texts.slice(start, _CHUNK_ROWS).cast(pa.large_binary()).to_pylist()


def _take(texts: pa.Array | Sequence[bytes], rows: npt.NDArray[np.int64], some: bool) -> pa.Array | Sequence[bytes]:
    if not some:
        return texts
    return texts.take(pa.array(rows)) if isinstance(texts, pa.Array) else [texts[i] for i in rows]


def widened_columns(before: pa.Schema, after: pa.Schema) -> tuple[str, ...]:
    """Columns of ``before`` whose type is another one in ``after``."""
    return tuple(f.name for f in before if after.field(f.name).type != f.type)


def _materialise(texts: pa.Array | Sequence[bytes], kinds: Object, schema: pa.Schema) -> pa.RecordBatch:
    """Second pass, in chunks: parsed records are many times their text, so they are not kept from the first."""
    chunks: list[pa.RecordBatch] = []
    rows: list[dict[str, Any]] = []

    def cut() -> None:
        arrays = []
        for field, (name, (_, kind)) in zip(schema, kinds.fields.items(), strict=True):
            arrays.append(pa.array([fit(kind, row.get(name)) for row in rows], type=field.type))
        chunks.append(pa.RecordBatch.from_struct_array(struct_of(arrays, schema, len(rows))))
        rows.clear()

    for text in _each(texts):
        rows.append(formats.loads(text))
        if len(rows) == _CHUNK_ROWS:
            cut()
    cut()
    return _one_batch(pa.Table.from_batches(chunks), schema)


def _one_batch(table: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.concat_arrays(c.chunks) if c.num_chunks else pa.array([], type=c.type) for c in table.columns]
    batch = pa.RecordBatch.from_struct_array(struct_of(arrays, schema, table.num_rows))
    return pa.RecordBatch.from_arrays(batch.columns, schema=schema) if arrays else batch


# ---------------------------------------------------------------------------------------------- the fast path


def check_and_project(
    chunk: bytes, limits: formats.Limits, schema: pa.Schema
) -> tuple[bytes, int, list[RowError], Projection | None]:
    """``formats.check_ndjson``, and with one parse for both the projection of the same lines under ``schema``.

    The projection is there only if it came without cost: it then accepted every line and widened nothing.
    """
    text = formats.normal_lines(chunk)
    framed = formats.framed_lines(text, limits)
    if framed is not None:
        ends, longest = framed
        columns = flat.parse(text, len(ends), schema)
        if columns is not None:
            return text, len(ends), [], Projection(columns, schema, np.arange(len(ends), dtype=np.int64), [], ())
        offsets = np.concatenate([[0], ends + 1]).astype(np.int64)
        texts = pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(text))
        made = _project_fast(texts, schema, text, longest)
        if made is not None:
            return text, len(ends), [], made
    return (*formats.check_ndjson(chunk, limits), None)


_PLAIN = (BOOL, INT, FLOAT, TEXT)
_MINUS_ZERO_BITS = np.iinfo(np.int64).min
_MINUS_ZERO = re.compile(rb"-0[ \t\r\n]*[,}\]]")


def _is_plain(type: pa.DataType) -> bool:
    return type in _PLAIN or (pa.types.is_list(type) and type.value_type in _PLAIN)


def _project_fast(
    texts: pa.Array | Sequence[bytes], schema: pa.Schema, lines: bytes | None = None, longest: int = 0
) -> Projection | None:
    """The same through Arrow's parser, or None where that is not sure to equal the fold.

    If Arrow reads every value of a column as one plain type, no record contradicts another, so none is refused. Known
    columns are pinned to their types; strings are pinned too, or Arrow would see times in them. What differs is left to
    the fold: objects, ``-0`` in a float column, numbers beyond a float, keys that appear twice, mixed columns.
    """
    if len(texts) < _SAMPLE_ROWS or not all(_is_plain(f.type) for f in schema):
        return None
    if lines is None:
        joined, longest = _joined(texts)
    else:
        joined, longest = pa.py_buffer(lines), longest or _longest(texts)
    known = {original_name(f): f.type for f in schema}
    strings = _sampled_strings(texts)
    if strings is None:
        return None
    table = _parse(joined, max(4 * BLOCK_BYTES, longest + 2), known, strings)
    if table is None or table.num_rows != len(texts):
        return None
    new = _new_columns(table, texts, {original_name(f) for f in schema})
    if new is None:
        return None
    grown = _schema_with(schema, new, table)
    if len(grown) > max(settings.integer("columns_max"), len(schema)) or _has_odd_floats(table, joined):
        return None
    columns = [table.column(original_name(f)) for f in grown]
    batch = _one_batch(pa.Table.from_arrays(columns, schema=grown) if columns else table.select([]), grown)
    return Projection(batch, grown, np.arange(len(texts), dtype=np.int64), [], ())


def _longest(texts: pa.Array | Sequence[bytes]) -> int:
    if not isinstance(texts, pa.Array):
        return max(map(len, texts), default=0)
    return int(pc.max(pc.binary_length(texts)).as_py() or 0)


def _joined(texts: pa.Array | Sequence[bytes]) -> tuple[pa.Buffer, int]:
    """One text a line, and the longest's bytes; line ends within a text can only be white space between its tokens."""
    if not isinstance(texts, pa.Array):
        whole = b"".join([t.replace(b"\n", b" ") + b"\n" if b"\n" in t else t + b"\n" for t in texts])
        return pa.py_buffer(whole), _longest(texts)
    lines = texts.cast(pa.large_string())
    if pc.any(pc.match_substring(lines, "\n")).as_py():
        lines = pc.replace_substring(lines, "\n", " ")
    empty = pa.scalar("", pa.large_string())
    ended = pc.binary_join_element_wise(lines, empty, pa.scalar("\n", pa.large_string()))
    offsets = np.frombuffer(ended.buffers()[1], dtype=np.int64)[ended.offset : ended.offset + len(ended) + 1]
    return ended.buffers()[2].slice(int(offsets[0]), int(offsets[-1] - offsets[0])), _longest(texts)


def _sampled_strings(texts: pa.Array | Sequence[bytes]) -> dict[str, pa.DataType] | None:
    """Columns that hold strings, or lists of them, in some evenly spaced records; None if one is no JSON object."""
    rows = np.linspace(0, len(texts) - 1, _SAMPLE_ROWS).astype(np.int64)
    found: dict[str, pa.DataType] = {}
    for text in _each(_take(texts, rows, True)):
        try:
            record = formats.loads(text)
        except ValueError:
            return None
        if not isinstance(record, dict):
            return None
        for name, value in record.items():
            if isinstance(value, str):
                found[name] = TEXT
            elif isinstance(value, list) and value and isinstance(value[0], str):
                found[name] = pa.list_(TEXT)
    return found


def _parse(
    joined: pa.Buffer, block: int, known: Mapping[str, pa.DataType], strings: Mapping[str, pa.DataType]
) -> pa.Table | None:
    pinned = {**strings, **known}
    for _ in range(3):
        try:
            table = pa_json.read_json(
                pa.BufferReader(joined),
                read_options=pa_json.ReadOptions(block_size=block, use_threads=False),
                parse_options=pa_json.ParseOptions(
                    explicit_schema=pa.schema(list(pinned.items())), unexpected_field_behavior="infer"
                ),
            )
        except pa.ArrowException:
            return None
        timed = {f.name: pinned_type for f in table.schema if (pinned_type := _without_times(f.type)) != f.type}
        if not timed:
            return table if _is_sound(table, pinned) else None
        pinned.update(timed)
    return None


def _is_sound(table: pa.Table, pinned: Mapping[str, pa.DataType]) -> bool:
    """Arrow may lose nulls that lead an inferred list; its offsets then exceed its values."""
    try:
        table.validate()
    except pa.ArrowInvalid:
        return False
    inferred = [c for f, c in zip(table.schema, table.columns, strict=True) if f.name not in pinned]
    lists = [chunk for c in inferred if pa.types.is_list(c.type) for chunk in c.chunks]
    return not any(chunk.values.null_count for chunk in lists if not pa.types.is_null(chunk.type.value_type))


def _without_times(type: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(type):
        return TEXT
    if pa.types.is_list(type):
        return pa.list_(_without_times(type.value_type))
    return type


def _new_columns(table: pa.Table, texts: pa.Array | Sequence[bytes], known: set[str]) -> list[str] | None:
    """The new typed columns in order of their first value; None if one is not plain."""
    first: dict[str, int] = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if field.name in known:
            continue
        row = _first_value(column)
        if row is None:
            continue
        if not _is_plain(field.type):
            return None
        first[field.name] = row
    places = {row: {name: i for i, name in enumerate(_keys(texts, row))} for row in set(first.values())}
    return sorted(first, key=lambda name: (first[name], places[first[name]][name]))


def _keys(texts: pa.Array | Sequence[bytes], row: int) -> list[str]:
    text = texts[row]
    return list(formats.loads(text if isinstance(text, bytes) else text.as_py().encode()))


def _first_value(column: pa.ChunkedArray) -> int | None:
    """The first row that gives the column a type: neither null nor a list without values. None if there is none."""
    start = 0
    for chunk in column.chunks:
        row = _first_in(chunk)
        if row is not None:
            return start + row
        start += len(chunk)
    return None


def _first_in(array: pa.Array) -> int | None:
    if pa.types.is_null(array.type) or (pa.types.is_struct(array.type) and array.type.num_fields == 0):
        return None
    if pa.types.is_list(array.type):
        inner = _first_in(array.flatten())
        return None if inner is None else int(array.value_parent_indices()[inner].as_py())
    row = int(pc.index(array.is_valid(), True).as_py())
    return row if row >= 0 else None


def _schema_with(schema: pa.Schema, new: Sequence[str], table: pa.Table) -> pa.Schema:
    fields = list(schema)
    for name in new:
        fields.append(named_field(stored_name(name, [f.name for f in fields]), name, table.schema.field(name).type))
    return pa.schema(fields)


def _has_odd_floats(table: pa.Table, joined: pa.Buffer) -> bool:
    """Floats that Arrow reads out of texts where JSON holds something else, or the fold another number."""
    zeros = False
    for column in table.columns:
        for chunk in column.chunks:
            flat = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
            if flat.type != FLOAT or not len(flat):
                continue
            if not pc.all(pc.is_finite(flat), min_count=0).as_py():
                return True
            bits = np.frombuffer(flat.buffers()[1], np.int64, len(flat), 8 * flat.offset)
            zeros = zeros or bool((bits == _MINUS_ZERO_BITS).any())
    return zeros and _MINUS_ZERO.search(memoryview(joined)) is not None
