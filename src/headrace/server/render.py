"""Record batches as NDJSON, JSON, CSV, an Arrow stream or Parquet: batch by batch, in bounded memory."""

from __future__ import annotations

import base64
import datetime
import decimal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from headrace import settings
from headrace.errors import BadRequest

_ROWS = 1024
NDJSON = "application/x-ndjson"
PARQUET = "application/vnd.apache.parquet"
_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS


class NotAcceptable(BadRequest):
    """No form that the client accepts can be given."""

    code, status = "not_acceptable", 406


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    raise TypeError(f"no JSON form for {type(value).__name__}")


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[list[dict[str, Any]]]:
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS).to_pylist()


def _ndjson(_: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    for rows in _rows(batches):
        yield b"".join([orjson.dumps(row, _plain, _OPTIONS | orjson.OPT_APPEND_NEWLINE) for row in rows])


def _json(_: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    mark = b"["
    for rows in _rows(batches):
        if rows:
            yield mark + b",".join([orjson.dumps(row, _plain, _OPTIONS) for row in rows])
            mark = b","
    yield b"]" if mark == b"," else b"[]"


def _flat(array: pa.Array) -> pa.Array:
    """CSV knows no nesting and no bytes: such values become JSON texts."""
    if pa.types.is_nested(array.type):
        texts = [None if v is None else orjson.dumps(v, _plain, _OPTIONS).decode() for v in array.to_pylist()]
        return pa.array(texts, pa.string())
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        return pa.array([None if v is None else base64.b64encode(v).decode() for v in array.to_pylist()], pa.string())
    if pa.types.is_dictionary(array.type):
        return array.dictionary_decode()
    return array


def _csv(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    header = pa.schema([pa.field(name, pa.string()) for name in schema.names]).empty_table()
    sink = pa.BufferOutputStream()
    pa_csv.write_csv(header, sink)
    yield sink.getvalue().to_pybytes()
    options = pa_csv.WriteOptions(include_header=False)
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            part = batch.slice(start, _ROWS)
            flat = pa.RecordBatch.from_arrays([_flat(column) for column in part.columns], names=schema.names)
            sink = pa.BufferOutputStream()
            pa_csv.write_csv(flat, sink, options)
            yield sink.getvalue().to_pybytes()


class _Pipe:
    """A file to write to, whose bytes are taken out as they come."""

    closed = False

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def take(self) -> bytes:
        taken = b"".join(self.parts)
        self.parts.clear()
        return taken


def _arrow(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    pipe = _Pipe()
    with pa.ipc.new_stream(pa.PythonFile(pipe, "w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            yield pipe.take()
    yield pipe.take()


Renderer = Callable[[pa.Schema, Iterator[pa.RecordBatch]], Iterator[bytes]]

STREAMS: dict[str, Renderer] = {
    NDJSON: _ndjson,
    "application/ndjson": _ndjson,
    "application/json": _json,
    "text/csv": _csv,
    "application/vnd.apache.arrow.stream": _arrow,
}
TEXTS = frozenset(STREAMS) - {"application/vnd.apache.arrow.stream"}


def choose(accept: str) -> str:
    """The content type to answer, by an Accept header (the highest weight, then the first); raises NotAcceptable."""
    best, weight = "", 0.0
    for part in (accept or "*/*").split(","):
        kind, *parameters = [piece.strip().lower() for piece in part.split(";")]
        if kind in ("*/*", "application/*"):
            kind = NDJSON
        elif kind == "text/*":
            kind = "text/csv"
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            rank = float(quality)
        except ValueError:
            rank = 0.0
        if (kind in STREAMS or kind == PARQUET) and rank > weight:
            best, weight = kind, rank
    if not best:
        known = ", ".join([*STREAMS, PARQUET])
        raise NotAcceptable(f"records cannot be given as {accept[:100]!r}", hint=f"accept one of {known}")
    return best


def parquet_file(schema: pa.Schema, batches: Iterator[pa.RecordBatch], folder: Path) -> Path:
    """Write the batches to a new temporary Parquet file below ``folder``; the caller removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = settings.integer("row_group_rows")
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".parquet", delete=False) as file:
        path = Path(file.name)
    try:
        with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
            for batch in batches:
                writer.write_batch(batch, row_group_size=rows)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
