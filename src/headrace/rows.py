"""Rows as JSON text: one place that turns typed columns back into what an interface shows."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from headrace.steps import user_columns

STAMP = pa.timestamp("us", "UTC")
SOURCE = pa.struct([("source", pa.string()), ("locator", pa.string()), ("collected_at", STAMP)])
"""Where a record came from: the type of ``_source``."""
SYSTEM = pa.schema([("_id", pa.string()), ("_source", SOURCE), ("_ingested_at", STAMP), ("_raw", pa.string())])
"""The system columns of a raw dataset."""


def json_default(value: Any) -> Any:
    """What JSON has no type for: bytes as base64, decimals and durations as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Decimal | timedelta):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def to_json(value: Any) -> bytes:
    """Compact JSON of plain values, times in ISO form; NaN and infinities become null, as JSON has no such numbers."""
    return orjson.dumps(value, default=json_default, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS)


def json_rows(batch: pa.RecordBatch, finish: Callable[[dict[str, Any]], Any] | None = None) -> list[bytes]:
    """Each row of ``batch`` as one JSON object, columns in order, nulls included."""
    rows = batch.to_pylist()
    return [to_json(row if finish is None else finish(row)) for row in rows]


def records(batch: pa.RecordBatch) -> list[bytes]:
    """Each record as its sender wrote it where ``_raw`` has that, else the JSON of its user columns."""
    names = user_columns(batch.schema)
    raw = batch.column("_raw") if "_raw" in batch.schema.names else None
    if raw is not None and raw.null_count == 0:
        texts: list[bytes] = pc.cast(raw, pa.binary()).to_pylist()
        return texts
    typed = json_rows(batch.select(names))
    if raw is None:
        return typed
    return [text if sent is None else sent.encode() for sent, text in zip(raw.to_pylist(), typed, strict=True)]
