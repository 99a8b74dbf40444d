"""128-bit keys of typed values, and which rows share one: the two halves of ``dedup`` and ``check.unique``."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.errors import BadRecipe, Damaged
from headrace.steps import NO_VERDICTS, Position, fired

KEY = pa.binary(16)
WIDE_SPACES = r"[\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"

Bytes = npt.NDArray[np.uint8]


def _daft() -> Any:
    # Daft reports usage to its makers unless told otherwise before it is imported.
    os.environ["DO_NOT_TRACK"] = "1"
    import daft  # noqa: PLC0415

    return daft


def normal_text(texts: pa.Array) -> pa.Array:
    """Texts as dedup compares them: NFC, wide white space as plain spaces (runs of them are collapsed later)."""
    wide = pc.invert(pc.string_is_ascii(texts)).fill_null(False)
    if not wide.true_count:
        return texts
    # pyarrow 23 leaves NFC decomposed, so the standard library does it.
    some = pa.array([normalize("NFC", text) for text in texts.filter(wide).to_pylist()], texts.type)
    if pc.match_substring_regex(some, WIDE_SPACES).true_count:
        some = pc.replace_substring_regex(some, WIDE_SPACES, " ")
    return pc.replace_with_mask(texts, wide, some)


def _digests(chunks: Sequence[bytes] | Any) -> Bytes:
    joined = b"".join(blake2b(chunk, digest_size=16).digest() for chunk in chunks)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 16)


def _values(array: pa.Array) -> tuple[memoryview, list[int]]:
    """The bytes behind a large_binary array and the offsets of its values in them."""
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64, count=array.offset + len(array) + 1)[array.offset :]
    return memoryview(data if data is not None else b""), bounds.tolist()


def _text_digests(texts: pa.Array, collapse: bool) -> Bytes:
    array = (normal_text(texts) if collapse else texts).cast(pa.large_string()).cast(pa.large_binary())
    view, bounds = _values(array)
    if not collapse:
        return _digests(view[a:b] for a, b in pairwise(bounds))
    data, parts = np.frombuffer(view, dtype=np.uint8), []
    for low, high in _groups(bounds):
        first = bounds[low]
        flat, moved = _collapse(data[first : bounds[high]], np.array(bounds[low : high + 1]) - first)
        ends = moved.tolist()
        parts.append(_digests(flat[a:b].strip(b" ") for a, b in pairwise(ends)))
    return np.vstack([np.zeros((0, 16), dtype=np.uint8), *parts])


def _groups(bounds: list[int]) -> Iterator[tuple[int, int]]:
    """Cut values into runs of about 256 KiB, whose temporaries stay in the processor's cache."""
    low, last = 0, len(bounds) - 1
    while low < last:
        high = max(low + 1, bisect_right(bounds, bounds[low] + (256 << 10)) - 1)
        yield low, high
        low = high


def _collapse(data: Bytes, bounds: npt.NDArray[np.int64]) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Every run of ASCII white space as one space, over a whole buffer of values; the bounds move along.

    A value that begins with white space may lose it to the end of the value before: both are stripped afterwards.
    """
    # Unsigned wrap-around makes each test one comparison: 9 to 13 are tab to carriage return, 28 to 31 separators.
    space = (data == 32) | (data - np.uint8(9) < 5) | (data - np.uint8(28) < 4)
    data = np.where(space, np.uint8(32), data)
    again = np.flatnonzero(space[1:] & space[:-1]) + 1
    if not len(again):
        return data.tobytes(), bounds
    keep = np.ones(len(data), dtype=bool)
    keep[again] = False
    return data[keep].tobytes(), bounds - np.searchsorted(again, bounds)


def _number_bytes(array: pa.Array) -> Bytes:
    kind = array.type
    if pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    elif pa.types.is_float16(kind) or pa.types.is_float32(kind):
        array = array.cast(pa.float64())
    if pa.types.is_temporal(kind):
        array = array.view(pa.int32() if kind.bit_width == 32 else pa.int64())
    values = pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f":
        # One bit pattern per value: -0.0 becomes 0.0, and every NaN the same one.
        values = np.where(np.isnan(values), np.nan, values + 0.0)
    elif values.dtype.kind in "iu":
        values = values.astype(np.uint64 if values.dtype == np.uint64 else np.int64)
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(array), values.dtype.itemsize)


def _list_digests(array: pa.Array, collapse: bool) -> Bytes:
    items = pc.list_flatten(array)
    matrix = value_bytes(items, collapse)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64) * matrix.shape[1]
    flat = memoryview(np.ascontiguousarray(matrix).tobytes())
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    return _digests(flat[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True))


def value_bytes(array: pa.Array, collapse: bool) -> Bytes:
    """One row of bytes per value, uint8 [len, width], equal exactly for equal values; null equals null alone."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if pa.types.is_null(kind):
        body = np.zeros((len(array), 0), dtype=np.uint8)
    elif pa.types.is_struct(kind):
        parts = [value_bytes(part, collapse) for part in array.flatten()]
        body = np.hstack([np.zeros((len(array), 0), dtype=np.uint8), *parts])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        body = _list_digests(array, collapse)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        body = _text_digests(array, collapse)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        view, bounds = _values(array.cast(pa.binary()).cast(pa.large_binary()))
        body = _digests(view[a:b] for a, b in pairwise(bounds))
    elif pa.types.is_primitive(kind):
        body = _number_bytes(array)
    else:
        body = _text_digests(array.cast(pa.string()), False)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    body = np.where(valid[:, None], body, 0)
    return np.hstack([body, valid[:, None].astype(np.uint8)]).astype(np.uint8, copy=False)


def row_keys(columns: Sequence[pa.Array], absent: npt.NDArray[np.bool_], collapse: bool) -> pa.Array:
    """One 16-byte key per row over the typed values of ``columns``; null where ``absent``."""
    matrix = np.ascontiguousarray(np.hstack([value_bytes(one, collapse) for one in columns]))
    width, flat = matrix.shape[1], memoryview(matrix.tobytes())
    digests = _digests(flat[at : at + width] for at in range(0, len(flat), width))
    keys = pa.Array.from_buffers(KEY, len(absent), [None, pa.py_buffer(digests.tobytes())])
    return pc.if_else(pa.array(absent), pa.scalar(None, KEY), keys) if absent.any() else keys


def duplicates(keys: Sequence[Path], name: str, out: Path) -> dict[str, Any]:
    """Find the rows that share a key (column ``name`` of the ``keys`` files) with one of smaller ``_id``.

    Daft groups the keys; one sorted Parquet file per task (``_row``, ``kept``) goes below ``out``.
    Of rows with equal ``_id`` too, the first in task order is kept. Returns the JSON state for ``marked``.
    """
    out.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"folder": str(out), "tasks": {}}
    if not keys:
        return state
    daft = _daft()
    col, lit = daft.col, daft.lit
    place = [col(part).cast(daft.DataType.string()).lpad(20, "0") for part in ("_task", "_row")]
    rank = col("_id") + lit("\x00") + place[0] + place[1]
    frame = daft.read_parquet([str(path) for path in keys]).where(col(name).not_null())
    # Of fixed size: a join on binary keys of any length matches every row with every key (Daft 0.7.26).
    frame = frame.select(
        col(name).cast(daft.DataType.fixed_size_binary(16)).alias("key"),
        col("_task"),
        col("_row"),
        rank.alias("rank"),
    )
    groups = frame.groupby("key").agg(col("rank").min().alias("first"), col("rank").count().alias("rows"))
    groups = groups.where(col("rows") > 1).select(col("key"), col("first")).to_arrow()
    found = np.array(groups.column("key").to_pylist(), dtype="S16")
    order = np.argsort(found)
    first = groups.column("first").cast(pa.string()).combine_chunks().take(pa.array(order))
    for path in keys:
        _mark(path, name, found[order], first, out, state)
    return state


def _mark(path: Path, name: str, known: Any, first: pa.Array, out: Path, state: dict[str, Any]) -> None:
    """Look the keys of one file up among those that several rows share, and write its tasks' tables of later twins."""
    table = pq.ParquetFile(path).read(columns=[name, "_task", "_row", "_id"])
    table = table.filter(table.column(name).is_valid())
    if not len(known) or not table.num_rows:
        return
    mine = np.array(table.column(name).to_pylist(), dtype="S16")
    at = np.minimum(np.searchsorted(known, mine), len(known) - 1)
    shared = pa.array(known[at] == mine)
    table, firsts = table.filter(shared), first.take(pa.array(at).filter(shared))
    kept = pc.utf8_slice_codeunits(firsts, 0, -41)
    place = pc.utf8_slice_codeunits(firsts, -40)
    parts = [pc.utf8_lpad(table.column(one).cast(pa.string()), 20, "0") for one in ("_task", "_row")]
    own = pc.binary_join_element_wise(*parts, "")
    later = pc.or_(pc.not_equal(table.column("_id"), kept), pc.not_equal(own, place))
    marks = table.select(["_task", "_row"]).append_column("kept", kept).filter(later)
    for task in marks.column("_task").unique().to_pylist():
        mine_only = marks.filter(pc.equal(marks.column("_task"), task)).sort_by("_row")
        pq.write_table(mine_only, out / f"task-{task:08d}.parquet", compression="zstd")
        state["tasks"][str(task)] = mine_only.num_rows


@lru_cache(maxsize=16)
def _read_marks(path: str, rows: int, _modified: int) -> tuple[npt.NDArray[np.int64], pa.Array]:
    table = pq.ParquetFile(path).read(columns=["_row", "kept"])
    if table.num_rows != rows:
        raise Damaged(f"{path} holds {table.num_rows} rows, not {rows}", hint="run the recipe again")
    return table.column("_row").to_numpy(), table.column("kept").combine_chunks()


def marked(state: Mapping[str, Any], at: Position, rows: int) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Which of the ``rows`` rows at ``at`` are later twins: their places in the batch, and their twins' ``_id``."""
    count = state["tasks"].get(str(at.task), 0)
    if not count:
        return np.zeros(0, dtype=np.int64), pa.array([], pa.string())
    path = Path(state["folder"]) / f"task-{at.task:08d}.parquet"
    if not path.is_file():
        raise Damaged(f"the table of duplicates {path} is missing", hint="run the recipe again")
    places, kept = _read_marks(str(path), count, path.stat().st_mtime_ns)
    low, high = np.searchsorted(places, [at.row, at.row + rows])
    return places[low:high] - at.row, kept.slice(low, high - low)


def twins(state: Mapping[str, Any], at: Position, rows: int, rule: str, field: str | None = None) -> pa.RecordBatch:
    """Verdicts of ``rule`` on the later twins of a batch; without ``field`` they merge into the twin they name."""
    places, kept = marked(state, at, rows)
    if not len(places):
        return NO_VERDICTS
    names = kept.to_pylist()
    if field is None:
        return fired(places, rule, [f"the same content as record {name}, which is kept" for name in names], kept=kept)
    return fired(places, rule, [f"{field} has the same value as in record {name}" for name in names], field=field)


def check_text_or_numbers(columns: Sequence[pa.Array], names: Sequence[str], step: str) -> None:
    """Raise BadRecipe for a column whose type has no defined equality here (maps and unions)."""
    for one, name in zip(columns, names, strict=True):
        if pa.types.is_map(one.type) or pa.types.is_union(one.type):
            raise BadRecipe(
                f"step {step!r}: column {name!r} of type {one.type} cannot be compared", hint="leave it out of columns"
            )
