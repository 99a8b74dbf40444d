"""The content hash of a version: sha256 over the typed user columns in row order, whatever files carry them.

``Fingerprint(schema=None)`` · ``.update(batch)`` · ``.rows`` · ``.tail`` (ints) · ``.digest() -> str`` (64 hex) ·
``.add_columns(schema)`` · ``.state() -> dict`` (JSON) · ``Fingerprint.resume(state, tail_batches) -> Fingerprint`` ·
``fingerprint_of(batches, schema=None) -> str``

Rows are cut by position into blocks of BLOCK_ROWS. Per column, a block has a digest over canonical streams (validity,
lengths, values), and a chain: chain = sha256(chain || block digest). The last, partial block is hashed when asked.
So an append needs the state and the rows of the partial block (``tail`` of them), nothing else.
A column that appears later counts as null in the rows before it. System columns take no part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import BadData
from headrace.model import SYSTEM_COLUMNS
from headrace.store.types import decode_schema, encode_schema, logical, narrow, true_schema, type_text

BLOCK_ROWS = 16_384
_DOMAIN = b"headrace.fingerprint.1"


class _Streams:
    """The canonical streams of one column within one block: a tree of hashes, fed piece by piece."""

    def __init__(self, kind: pa.DataType) -> None:
        self.kind = kind
        self.hashes = [hashlib.sha256() for _ in range(3)]
        self.children = [_Streams(child) for child in _children(kind)]

    def feed(self, array: Any) -> None:
        """Take the next rows. Values in null slots and below null parents are not seen."""
        valid, lengths, values = self.hashes
        valid.update(_validity(array))
        if self.children:
            if not pa.types.is_struct(self.kind) and not pa.types.is_fixed_size_list(self.kind):
                lengths.update(_lengths(array))
            for child, part in zip(self.children, _parts(array), strict=True):
                child.feed(part)
        elif pa.types.is_string(self.kind) or pa.types.is_binary(self.kind):
            for piece in _text(array, lengths):
                values.update(piece)
        else:
            values.update(_fixed(array))

    def digest(self) -> bytes:
        """The digest of what was fed so far; feeding may go on."""
        whole = hashlib.sha256()
        for part in self.hashes:
            whole.update(part.digest())
        for child in self.children:
            whole.update(child.digest())
        return whole.digest()


def _children(kind: pa.DataType) -> list[pa.DataType]:
    if pa.types.is_struct(kind):
        return [child.type for child in kind]
    if pa.types.is_map(kind):
        return [kind.key_type, kind.item_type]
    return [kind.value_type] if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else []


def _validity(array: Any) -> Any:
    if array.null_count == 0:
        return np.ones(len(array), np.uint8)
    return pc.is_valid(array).to_numpy(zero_copy_only=False).view(np.uint8)


def _lengths(array: Any) -> Any:
    if pa.types.is_map(array.type):
        array = array.cast(_entries(array.type))
    return pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype("<i8")


def _entries(kind: pa.MapType) -> pa.DataType:
    return pa.list_(pa.struct([pa.field("key", kind.key_type), pa.field("value", kind.item_type)]))


def _parts(array: Any) -> list[Any]:
    if pa.types.is_struct(array.type):
        return list((array.drop_null() if array.null_count else array).flatten())
    if pa.types.is_map(array.type):
        return list(array.cast(_entries(array.type)).flatten().flatten())
    return [array.flatten()]


def _text(array: Any, lengths: Any) -> Iterator[Any]:
    """Feed the lengths in bytes, and give the bytes of the values that are not null."""
    offsets = (
        np.frombuffer(array.buffers()[1], np.int32, len(array) + 1, array.offset * 4)
        if len(array)
        else np.zeros(1, np.int32)
    )
    sizes = np.diff(offsets).astype("<i8")
    if array.null_count:
        sizes[array.is_null().to_numpy(zero_copy_only=False)] = 0
    lengths.update(sizes)
    first, last = int(offsets[0]), int(offsets[-1])
    if int(sizes.sum()) == last - first:
        if last > first:
            yield memoryview(array.buffers()[2])[first:last]
    else:
        yield from _text(array.drop_null(), hashlib.sha256())


def _fixed(array: Any) -> Any:
    """Values of one width, little-endian; null slots are zero and NaN has one form."""
    kind = array.type
    if pa.types.is_boolean(kind):
        return pc.fill_null(array, False).to_numpy(zero_copy_only=False).view(np.uint8)
    width = kind.bit_width // 8
    values = (
        np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
        if len(array)
        else np.zeros(0, np.uint8)
    )
    if pa.types.is_floating(kind):
        numbers = values.view(f"<f{width}")
        wrong = np.isnan(numbers)
        if wrong.any():
            values = np.where(wrong, np.array(np.nan, f"<f{width}"), numbers).view(np.uint8)
    if array.null_count:
        valid = pc.is_valid(array).to_numpy(zero_copy_only=False)
        values = (values.reshape(len(array), width) * valid[:, None]).reshape(-1)
    return np.ascontiguousarray(values)


class _Column:
    """One column: the chain over its complete blocks and the streams of the current one."""

    def __init__(self, kind: pa.DataType, chain: bytes = b"\0" * 32) -> None:
        self.kind = kind
        self.chain = chain
        self.streams = _Streams(kind)

    def close_block(self) -> None:
        self.chain = hashlib.sha256(self.chain + self.streams.digest()).digest()
        self.streams = _Streams(self.kind)


class Fingerprint:
    """Takes the rows of a version in order; ``digest`` may be asked at any time."""

    def __init__(self, schema: pa.Schema | None = None) -> None:
        self.rows = 0
        self._columns: dict[str, _Column] = {}
        self._schema = pa.schema([])
        if schema is not None:
            self.add_columns(schema)

    @property
    def tail(self) -> int:
        """Rows in the partial block: what ``resume`` must be given again."""
        return self.rows % BLOCK_ROWS

    def add_columns(self, schema: pa.Schema) -> None:
        """Make the user columns of ``schema`` (true or stored) part of the hash, null in all rows so far."""
        for field in true_schema(schema):
            if field.name in SYSTEM_COLUMNS:
                continue
            known = self._columns.get(field.name)
            if known is None:
                self._columns[field.name] = self._nulls(field.type)
                self._schema = self._schema.append(field)
            elif known.kind != field.type:
                was, now = type_text(known.kind), type_text(field.type)
                raise BadData(f"column {field.name!r} is {was} in the rows before and {now} now")

    def _nulls(self, kind: pa.DataType) -> _Column:
        column = _Column(kind)
        if self.rows >= BLOCK_ROWS:
            column.streams.feed(pa.nulls(BLOCK_ROWS, kind))
            block = column.streams.digest()
            for _ in range(self.rows // BLOCK_ROWS):
                column.chain = hashlib.sha256(column.chain + block).digest()
            column.streams = _Streams(kind)
        if self.tail:
            column.streams.feed(pa.nulls(self.tail, kind))
        return column

    def update(self, batch: pa.RecordBatch) -> None:
        """Take the next rows, in true or stored types; columns not seen before are added, missing ones are null."""
        if batch.num_rows == 0:
            return
        names = [field.name for field in batch.schema if field.name not in SYSTEM_COLUMNS]
        batch = batch.select(names)
        self.add_columns(pa.schema([f for f in batch.schema if f.name not in self._columns]))
        batch = narrow(batch, self._schema)
        start = 0
        while start < batch.num_rows:
            count = min(batch.num_rows - start, BLOCK_ROWS - self.tail)
            for column, array in zip(self._columns.values(), batch.slice(start, count).columns, strict=True):
                column.streams.feed(array)
            self.rows += count
            start += count
            if self.tail == 0:
                for column in self._columns.values():
                    column.close_block()

    def digest(self) -> str:
        """The content hash in hex: names, types and values of all user columns in schema order, and the row count."""
        whole = hashlib.sha256(_DOMAIN + self.rows.to_bytes(8, "little"))
        for name, column in self._columns.items():
            chain = column.chain
            if self.tail:
                chain = hashlib.sha256(chain + column.streams.digest()).digest()
            whole.update(json.dumps([name, type_text(column.kind)]).encode() + chain)
        return whole.hexdigest()

    def state(self) -> dict[str, Any]:
        """JSON from which ``resume`` goes on: the schema, and per column the chain over the complete blocks."""
        chains = [column.chain.hex() for column in self._columns.values()]
        return {"format": 1, "rows": self.rows, "schema": encode_schema(self._schema), "chains": chains}

    @classmethod
    def resume(cls, state: Mapping[str, Any], tail_batches: Iterable[pa.RecordBatch]) -> Fingerprint:
        """Go on from ``state``; ``tail_batches`` hold the last ``rows % BLOCK_ROWS`` rows, else BadData is raised."""
        if state.get("format") != 1:
            raise BadData("the state of a fingerprint has an unknown format", hint="compute the fingerprint anew")
        made = cls()
        schema = decode_schema(str(state["schema"]))
        made._schema = logical(schema)
        made.rows = int(state["rows"]) // BLOCK_ROWS * BLOCK_ROWS
        for field, chain in zip(made._schema, state["chains"], strict=True):
            made._columns[field.name] = _Column(field.type, bytes.fromhex(chain))
        for batch in tail_batches:
            made.update(batch)
        if made.rows != int(state["rows"]):
            raise BadData(
                f"the fingerprint needs the last {int(state['rows']) % BLOCK_ROWS} rows again, not {made.tail}"
            )
        return made


def fingerprint_of(batches: Iterable[pa.RecordBatch], schema: pa.Schema | None = None) -> str:
    """The content hash of all ``batches``; ``schema`` names columns that no batch may carry."""
    made = Fingerprint(schema)
    for batch in batches:
        made.update(batch)
    return made.digest()
