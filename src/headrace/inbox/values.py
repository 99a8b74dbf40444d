"""The inbox's tables, and the values that go in and come out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import orjson

from headrace.model import RowError

RECORD_SEPARATOR = b"\x1e"
"""Joins the verbatim texts of a ``json`` body: JSON never contains this byte."""


def columns_path(body: Path) -> Path:
    """Where what was projected of a spooled body while it was checked is kept, if anything is."""
    return body.with_suffix(".columns")


SCHEMA = """
CREATE TABLE IF NOT EXISTS uploads(
  seq INTEGER PRIMARY KEY, receipt TEXT NOT NULL, dataset TEXT NOT NULL, format TEXT NOT NULL, rows INTEGER NOT NULL,
  bytes INTEGER NOT NULL, at REAL NOT NULL, key_column TEXT, idem TEXT, body_sha TEXT, rejected INTEGER NOT NULL,
  errors TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS uploads_receipt ON uploads(receipt);
CREATE UNIQUE INDEX IF NOT EXISTS uploads_idem ON uploads(dataset, idem) WHERE idem IS NOT NULL;
CREATE TABLE IF NOT EXISTS bodies(
  seq INTEGER PRIMARY KEY, dataset TEXT NOT NULL, rows INTEGER NOT NULL, bytes INTEGER NOT NULL, at REAL NOT NULL,
  path TEXT, body BLOB);
CREATE INDEX IF NOT EXISTS bodies_dataset ON bodies(dataset, seq, rows, bytes, at);
"""


@dataclass(frozen=True, slots=True)
class Upload:
    """Checked records on their way in. ``format`` is json (texts joined by 0x1E), ndjson, csv, parquet or arrow.

    A ``body`` that is a path must come from ``Inbox.spool``; the inbox takes the file over.
    """

    dataset: str
    format: str
    rows: int
    body: bytes | Path
    idem: str | None = None
    key_column: str | None = None
    rejected: int = 0
    errors: tuple[RowError, ...] = ()
    body_sha: str | None = None


@dataclass(frozen=True, slots=True)
class Pending:
    """What waits for the flusher in one dataset. ``oldest_at`` is in seconds since 1970."""

    dataset: str
    uploads: int
    rows: int
    bytes: int
    oldest_at: float
    last_seq: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One upload with its body: bytes, or the path of its spooled file. ``at`` is in seconds since 1970."""

    seq: int
    receipt: str
    format: str
    rows: int
    at: float
    key_column: str | None
    body: bytes | Path


@dataclass(frozen=True, slots=True)
class Arrived:
    """An upload as remembered by its receipt; ``pending`` says that its body still waits for the flusher."""

    seq: int
    receipt: str
    dataset: str
    format: str
    rows: int
    bytes: int
    at: float
    rejected: int
    errors: tuple[RowError, ...]
    pending: bool


@dataclass(frozen=True, slots=True)
class TailEntry:
    """The header of one upload in a snapshot. ``bytes`` is the size of its body."""

    seq: int
    receipt: str
    format: str
    rows: int
    bytes: int
    at: float
    key_column: str | None


def row_errors(text: str | None) -> tuple[RowError, ...]:
    """The rejected records of an upload, from the JSON of its row."""
    return tuple(RowError(e["index"], e["reason"]) for e in orjson.loads(text)) if text else ()
