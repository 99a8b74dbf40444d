"""Columns of mapped files as NumPy views, and the gather of many rows from many files.

A batch costs one ``take`` per column. Where its rows lie in several files, about two MiB of rows are first collected
file by file into one small array that stays in the processor's cache, and batches are taken from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.errors import BadData

Ints: TypeAlias = npt.NDArray[np.int64]
Array: TypeAlias = npt.NDArray[Any]
Dtypes: TypeAlias = Mapping[str, np.dtype[Any]]
Scratch: TypeAlias = dict[str, Array]


def _target(dtype: np.dtype[Any], asked: np.dtype[Any] | None) -> np.dtype[Any]:
    """Models take int64 and float32 unless told otherwise; booleans stay."""
    if dtype.kind == "b":
        return dtype
    return asked or np.dtype(np.float32 if dtype.kind == "f" else np.int64)


def _cast(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    if values.dtype == dtype:
        return values
    found: Array = values.astype(dtype)
    if values.dtype == np.uint64 and dtype.kind == "i" and (found < 0).any():
        raise BadData(f"column {name!r} has values of 2^63 or more", hint=f'dtype={{"{name}": "uint64"}} keeps them')
    return found


@dataclass(frozen=True, slots=True)
class Dense:
    """Rows of one shape, [rows, ...], in the stored type."""

    name: str
    values: Array
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of differing length: row i is values[offsets[i]:offsets[i + 1]]; ``valid`` where rows may be null."""

    name: str
    values: Array
    offsets: Array
    valid: npt.NDArray[np.bool_] | None
    dtype: np.dtype[Any]

    def take(self, at: Ints) -> list[Any]:
        """One array per row, None for null."""
        starts, stops = self.offsets[at].tolist(), self.offsets[at + 1].tolist()
        found: list[Any] = [self.values[a:b].astype(self.dtype) for a, b in zip(starts, stops, strict=True)]
        if self.valid is not None:
            found = [row if ok else None for row, ok in zip(found, self.valid[at].tolist(), strict=True)]
        return found


@dataclass(frozen=True, slots=True)
class Objects:
    """Strings, bytes and whatever has no NumPy form: Python values."""

    name: str
    array: pa.Array

    def take(self, at: Ints) -> list[Any]:
        """One Python value per row, None for null."""
        at = np.ascontiguousarray(at)
        found: list[Any] = self.array.take(
            pa.Array.from_buffers(pa.int64(), len(at), [None, pa.py_buffer(at)])
        ).to_pylist()
        return found


@dataclass(frozen=True, slots=True)
class Fields:
    """A struct: its columns by name."""

    name: str
    columns: Mapping[str, Column]


Column: TypeAlias = Dense | Ragged | Objects | Fields


def _valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    bits = np.frombuffer(array.buffers()[0], dtype=np.uint8)
    found = np.unpackbits(bits, count=array.offset + len(array), bitorder="little")[array.offset :]
    return found.view(np.bool_)


def _fill(values: Array, array: pa.Array, name: str) -> Array:
    """Nulls of floats become NaN; other kinds have no such value."""
    if not array.null_count:
        return values
    if values.dtype.kind != "f":
        raise BadData(
            f"column {name!r} has nulls, which a {array.type} batch cannot hold",
            hint="drop or fill them in the recipe (drop_nulls), or leave the column out",
        )
    values = values.copy()
    values[~_valid(array)] = np.nan
    return values


def _dense(array: pa.Array, name: str) -> Array | None:
    """A view [rows, ...] over the Arrow buffers (a copy for booleans and nulls), or None for other kinds."""
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        inner = _dense(array.values.slice(array.offset * size, len(array) * size), name)
        return None if inner is None else _fill(inner.reshape(len(array), size, *inner.shape[1:]), array, name)
    if pa.types.is_boolean(kind):
        bits = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
        flags = np.unpackbits(bits, count=array.offset + len(array), bitorder="little")[array.offset :]
        return _fill(flags.view(np.bool_), array, name)
    if pa.types.is_decimal(kind):
        array = array.cast(pa.float64())
    elif pa.types.is_date32(kind) or pa.types.is_time32(kind):
        array = array.view(pa.int32())
    elif pa.types.is_temporal(kind) and kind.bit_width == 64:
        array = array.view(pa.int64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    whole = np.frombuffer(array.buffers()[1] or b"", dtype=np.dtype(array.type.to_pandas_dtype()))
    return _fill(whole[array.offset : array.offset + len(array)], array, name)


def column(array: pa.Array, name: str, asked: np.dtype[Any] | None) -> Column:
    """The column of one file. Whole numbers with nulls raise BadData; times count in their stored unit."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    values = _dense(array, name)
    if values is not None:
        return Dense(name, values, _target(values.dtype, asked))
    if pa.types.is_struct(kind):
        parts = zip(kind, array.flatten(), strict=True)
        return Fields(name, {part.name: column(child, f"{name}.{part.name}", asked) for part, child in parts})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _dense(array.values, name)
        if inner is not None:
            word = np.int32 if pa.types.is_list(kind) else np.int64
            offsets = np.frombuffer(array.buffers()[1] or word(0).tobytes(), dtype=word)
            offsets = offsets[array.offset : array.offset + len(array) + 1]
            valid = _valid(array) if array.null_count else None
            return Ragged(name, inner, offsets, valid, _target(inner.dtype, asked))
    return Objects(name, array)


def columns(batch: pa.RecordBatch, dtypes: Dtypes) -> dict[str, Column]:
    """All columns of one mapped file; ``dtypes`` by column name, ``"*"`` for the others."""
    return {
        name: column(array, name, dtypes.get(name, dtypes.get("*")))
        for name, array in zip(batch.schema.names, batch.columns, strict=True)
    }


class Pool:
    """One column of the collected rows: ``batch(a, b)`` are rows a..b in the order asked for."""

    __slots__ = ("_base", "_dtype", "_index", "_name", "_parts")

    def __init__(self, parts: Sequence[tuple[Column, Ints]], index: Ints, scratch: Scratch) -> None:
        """``parts``: per file its column and the row numbers wanted; ``index``: place of each row in their sequence.

        ``scratch`` is the memory of the pool before, which must not be read any more.
        """
        first = parts[0][0]
        self._name, self._index = first.name, index
        self._base: Array | None = None
        self._dtype: np.dtype[Any] | None = None
        self._parts: dict[str, Pool] | list[Any] | None = None
        if isinstance(first, Dense):
            self._dtype = first.dtype
            self._collect([(part, at) for part, at in parts if isinstance(part, Dense)], scratch)
        elif isinstance(first, Fields):
            self._parts = {
                name: Pool([(part.columns[name], at) for part, at in parts if isinstance(part, Fields)], index, scratch)
                for name in first.columns
            }
        else:
            self._parts = [row for part, at in parts if isinstance(part, Ragged | Objects) for row in part.take(at)]

    def _collect(self, parts: Sequence[tuple[Dense, Ints]], scratch: Scratch) -> None:
        if len(parts) == 1:
            self._base, at = parts[0][0].values, parts[0][1]
            self._index = at[self._index]
            return
        first = parts[0][0].values
        total = sum(len(at) for _, at in parts)
        base = scratch.get(self._name)
        if base is None or len(base) < total:
            base = scratch[self._name] = np.empty((total, *first.shape[1:]), dtype=first.dtype)
        start = 0
        for part, at in parts:
            # The row numbers are in range, and "clip" spares NumPy a buffered copy of `out`.
            part.values.take(at, axis=0, out=base[start : start + len(at)], mode="clip")
            start += len(at)
        self._base = base

    def batch(self, start: int, stop: int) -> Any:
        """An array [stop - start, ...] in the target type, a list, or a dict of such for a struct."""
        if self._base is not None:
            assert self._dtype is not None
            return _cast(self._base.take(self._index[start:stop], axis=0), self._dtype, self._name)
        if isinstance(self._parts, dict):
            return {name: pool.batch(start, stop) for name, pool in self._parts.items()}
        assert self._parts is not None
        parts = self._parts
        return [parts[i] for i in self._index[start:stop].tolist()]


def pools(files: Sequence[tuple[Mapping[str, Column], Ints]], index: Ints, scratch: Scratch) -> dict[str, Pool]:
    """Collect rows: per file its columns and wanted row numbers, then where each wanted row lies in that sequence."""
    names = files[0][0]
    return {name: Pool([(held[name], at) for held, at in files], index, scratch) for name in names}
