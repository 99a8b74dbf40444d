"""Arrived records as rows: what waits in the inbox, projected under the schema that the records before it made.

The flusher commits these rows; a read of the latest state shows them before that. Both see the same verdicts, as each
record is judged by what came before it alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace import reading
from headrace.catalog import Catalog
from headrace.collect import ahead, formats
from headrace.collect.project import Projection, project_json
from headrace.collect.tabular import project_table, reading_schema
from headrace.inbox import RECORD_SEPARATOR, columns_path
from headrace.model import SYSTEM_COLUMNS
from headrace.rows import SOURCE, STAMP, SYSTEM, to_json
from headrace.settings import MiB, integer

_PIECE_BYTES, _FIRST_BYTES = 8 * MiB, 1 * MiB


class Arrival(Protocol):
    """An upload in the inbox, without its body."""

    @property
    def seq(self) -> int:
        """Its number in the inbox."""
        ...

    @property
    def receipt(self) -> str:
        """Its receipt."""
        ...

    @property
    def format(self) -> str:
        """json, ndjson, csv, parquet or arrow."""
        ...

    @property
    def rows(self) -> int:
        """Records in it."""
        ...

    @property
    def at(self) -> float:
        """Arrival, in seconds since 1970."""
        ...

    @property
    def key_column(self) -> str | None:
        """The column that gives ``_id``, if the sender named one."""
        ...


Body: TypeAlias = bytes | Path | IO[bytes]
Bodies: TypeAlias = Callable[[Any], Body]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some records and where each came from: JSON ``texts``, or one on each of ``lines``, or typed ``rows``.

    ``kept`` may hold what ``lines`` were projected to when they were checked. Rows of a CSV are texts still; ``found``
    is what their columns look like.
    """

    origin: pa.RecordBatch
    texts: Any = None
    rows: pa.RecordBatch | None = None
    lines: bytes | None = None
    kept: ahead.Part | None = None
    found: pa.Schema | None = None


def _origin(entries: Sequence[Arrival], counts: Sequence[int], first: Sequence[int]) -> pa.RecordBatch:
    """Where each record came from: ``counts`` records per entry, the first of them at index ``first`` of its upload."""
    repeat = np.repeat(np.arange(len(entries)), counts)
    starts = np.cumsum(counts) - counts
    index = np.arange(len(repeat)) - np.asarray(starts)[repeat] + np.asarray(first)[repeat]
    times = pa.array([round(e.at * 1e6) for e in entries], pa.int64()).cast(STAMP)
    take = pa.array(repeat)
    return pa.RecordBatch.from_arrays(
        [
            pa.array(np.asarray([e.seq for e in entries], np.int64)[repeat]),
            pa.array([e.receipt for e in entries], pa.string()).take(take),
            pa.array(index, pa.int64()),
            times.take(take),
            pa.array([e.key_column for e in entries], pa.string()).take(take),
        ],
        names=["seq", "receipt", "index", "at", "key"],
    )


def _lines(body: bytes, separator: bytes) -> pa.Array:
    """The texts of a body as one Arrow array, without a Python object per record."""
    if not body.endswith(separator):
        body += separator
    ends = np.flatnonzero(np.frombuffer(body, np.uint8) == separator[0])
    # The separators are taken out, so each text ends by as many bytes earlier as texts end before it.
    offsets = np.concatenate([[0], ends - np.arange(len(ends))]).astype(np.int64)
    bare = body.replace(separator, b"")
    return pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(bare))


def _read(body: Body) -> bytes:
    if isinstance(body, bytes):
        return body
    return body.read_bytes() if isinstance(body, Path) else body.read()


def _pieces_of_file(file: IO[bytes]) -> Iterator[bytes]:
    # A short first piece shows the schema early: those that follow are projected side by side under it.
    size = _FIRST_BYTES
    while body := file.read(size):
        yield body + file.readline()
        size = _PIECE_BYTES


class _Held:
    """Small JSON uploads, gathered so that one Arrow array holds the texts of many."""

    def __init__(self) -> None:
        self.entries: list[Arrival] = []
        self.counts: list[int] = []
        self.arrays: list[pa.Array] = []
        self.singles: list[bytes] = []
        self.bytes = 0

    def add(self, entry: Arrival, body: bytes) -> None:
        self.bytes += len(body)
        self.entries.append(entry)
        if entry.rows == 1:
            self.counts.append(1)
            self.singles.append(body.rstrip(b"\n") if entry.format == "ndjson" else body)
            return
        self._gather()
        self.arrays.append(_lines(body, RECORD_SEPARATOR if entry.format == "json" else b"\n"))
        self.counts.append(len(self.arrays[-1]))

    def _gather(self) -> None:
        if self.singles:
            self.arrays.append(pa.array(self.singles, pa.large_binary()).cast(pa.large_string()))
            self.singles = []

    def piece(self) -> _Piece:
        self._gather()
        return _Piece(_origin(self.entries, self.counts, [0] * len(self.entries)), pa.concat_arrays(self.arrays))


def _json_pieces(entries: Sequence[Arrival], bodies: Bodies) -> Iterator[_Piece]:
    held = _Held()
    for entry in entries:
        body = bodies(entry)
        if entry.format == "ndjson" and not isinstance(body, bytes):
            if held.entries:
                yield held.piece()
                held = _Held()
            yield from _large_pieces(entry, body)
            continue
        held.add(entry, _read(body))
        if held.bytes >= _PIECE_BYTES:
            yield held.piece()
            held = _Held()
    if held.entries:
        yield held.piece()


def _large_pieces(entry: Arrival, body: Path | IO[bytes]) -> Iterator[_Piece]:
    first = 0
    with body.open("rb") if isinstance(body, Path) else body as file:
        for kept in ahead.parts(columns_path(body)) if isinstance(body, Path) else ():
            yield _Piece(_origin([entry], [kept.rows], [first]), lines=file.read(kept.bytes), kept=kept)
            first += kept.rows
        for part in _pieces_of_file(file):
            rows = part.count(b"\n")
            yield _Piece(_origin([entry], [rows], [first]), lines=part)
            first += rows


def _pieces(entries: Sequence[Arrival], bodies: Bodies) -> Iterator[_Piece]:
    """The records of ``entries`` in order of arrival, in pieces of bounded size."""
    run: list[Arrival] = []
    for entry in entries:
        if entry.format in ("json", "ndjson"):
            run.append(entry)
            continue
        yield from _json_pieces(run, bodies)
        run = []
        first = 0
        given = bodies(entry)
        body = given if isinstance(given, bytes | Path) else given.read()
        # A CSV is read as text: what its columns are depends on what the dataset holds when their turn comes.
        found = formats.table_schema(entry.format, body) if entry.format in ("csv", "tsv") else None
        as_text = None if found is None else pa.schema([(field.name, pa.string()) for field in found])
        for rows in formats.read_table(entry.format, body, as_text):
            yield _Piece(_origin([entry], [rows.num_rows], [first]), rows=rows, found=found)
            first += rows.num_rows
    yield from _json_pieces(run, bodies)


# "0000" to "9999": a number's digits are looked up by fours, which takes a tenth of the time of a cast and a pad.
_FOURS = np.frombuffer(b"".join(b"%04d" % n for n in range(10_000)), "S4")


def _digits(numbers: pa.Array) -> pa.Array:
    """Numbers from 0 on as texts of eight digits; of more, should one need them."""
    values = numbers.to_numpy()
    if len(values) and values.max() >= 10**8:
        return pc.utf8_lpad(numbers.cast(pa.string()), 8, "0")
    texts = np.empty((len(values), 2), "S4")
    np.take(_FOURS, values // 10_000, out=texts[:, 0])
    np.take(_FOURS, values % 10_000, out=texts[:, 1])
    offsets = np.arange(0, 8 * len(values) + 8, 8, dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(texts))


def _ids(origin: pa.RecordBatch, batch: pa.RecordBatch) -> pa.Array:
    """``_id`` of each record: the value of the caller's key column as text, else receipt and index."""
    index = _digits(origin.column("index"))
    made = pc.binary_join_element_wise(origin.column("receipt"), index, "-")
    for key in pc.unique(origin.column("key").drop_null()).to_pylist():
        if key in batch.schema.names and not pa.types.is_nested(batch.schema.field(key).type):
            mine = pc.fill_null(pc.equal(origin.column("key"), key), False)
            given = batch.column(key).cast(pa.string())
            made = pc.if_else(pc.and_(mine, given.is_valid()), given, made)
    return made


def _with_system(batch: pa.RecordBatch, origin: pa.RecordBatch, raw: pa.Array) -> pa.RecordBatch:
    source = pa.StructArray.from_arrays(
        [pa.repeat("upload", batch.num_rows), origin.column("receipt"), origin.column("at")], fields=list(SOURCE)
    )
    columns = [_ids(origin, batch), source, origin.column("at"), raw]
    return pa.RecordBatch.from_arrays([*batch.columns, *columns], schema=pa.schema([*batch.schema, *SYSTEM]))


def user_schema(schema: pa.Schema | None) -> pa.Schema:
    """The user columns of a dataset's schema; none before its first version."""
    return pa.schema([f for f in schema or pa.schema([]) if f.name not in SYSTEM_COLUMNS])


def columns_of(catalog: Catalog, dataset: str) -> pa.Schema:
    """The user columns of a dataset's latest version; none before its first, nor of an unknown dataset."""
    return user_schema(reading.schema_of(catalog, catalog.latest(dataset)))


@dataclass
class Projected:
    """One piece after projection: its accepted rows with system columns, and what was refused."""

    batch: pa.RecordBatch
    schema: pa.Schema
    widened: tuple[str, ...]
    refused: list[dict[str, Any]]


def projected(entries: Sequence[Arrival], bodies: Bodies, schema: pa.Schema) -> Iterator[Projected]:
    """The rows of ``entries`` piece by piece, each under the schema that all before it made of ``schema``.

    Pieces are projected side by side under the schema known so far; if one of them changes it, those after it are
    projected anew. So the outcome is that of one after the other.
    """
    pieces = _pieces(entries, bodies)
    first = next(pieces, None)
    if first is None:
        return
    made = _projected(first, schema)
    yield made
    ahead: deque[tuple[_Piece, pa.Schema, Future[Projected]]] = deque()
    with ThreadPoolExecutor(integer("threads")) as pool:
        while True:
            while len(ahead) <= integer("threads") and (piece := next(pieces, None)) is not None:
                ahead.append((piece, made.schema, pool.submit(_projected, piece, made.schema)))
            if not ahead:
                return
            piece, assumed, future = ahead.popleft()
            early = future.result()
            made = early if assumed.equals(made.schema, check_metadata=True) else _projected(piece, made.schema)
            yield made


def _projection(piece: _Piece, schema: pa.Schema) -> Projection:
    if piece.rows is not None:
        found = piece.found
        return project_table(
            piece.rows if found is None else formats.typed(piece.rows, reading_schema(found, schema)), schema
        )
    kept = piece.kept
    if kept is not None and kept.batch is not None and schema.equals(kept.assumed, check_metadata=True):
        return Projection(kept.batch, kept.batch.schema, np.arange(kept.rows, dtype=np.int64), [], ())
    return project_json(piece.texts, schema, lines=piece.lines)


def _projected(piece: _Piece, schema: pa.Schema) -> Projected:
    rows = piece.rows
    if piece.texts is None and piece.lines is not None:
        piece = replace(piece, texts=_lines(piece.lines, b"\n"))
    made = _projection(piece, schema)
    some = len(made.accepted) < piece.origin.num_rows
    take = pa.array(made.accepted)
    origin = piece.origin.take(take) if some else piece.origin
    if rows is None:
        raw = (piece.texts.take(take) if some else piece.texts).cast(pa.string())
    else:
        raw = pa.nulls(made.batch.num_rows, pa.string())
    return Projected(_with_system(made.batch, origin, raw), made.schema, made.widened, _refusals(piece, made))


@dataclass
class Gathered:
    """All rows of some uploads: batches under schemas that grew, the last schema, and what was refused or widened."""

    schema: pa.Schema
    batches: list[pa.RecordBatch] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    widened: set[str] = field(default_factory=set)


def gather(entries: Sequence[Arrival], bodies: Bodies, schema: pa.Schema) -> Gathered:
    """Project all of ``entries``."""
    gathered = Gathered(schema)
    for part in projected(entries, bodies, schema):
        gathered.schema = part.schema
        gathered.widened.update(part.widened)
        gathered.refused.extend(part.refused)
        if part.batch.num_rows:
            gathered.batches.append(part.batch)
    return gathered


def _refusals(piece: _Piece, made: Projection) -> list[dict[str, Any]]:
    if not made.refused:
        return []
    where = pa.array([r.index for r in made.refused], pa.int64())
    origins = piece.origin.take(where).to_pylist()
    if piece.rows is None:
        texts = piece.texts.take(where).to_pylist()
    else:
        texts = [to_json(row).decode() for row in piece.rows.take(where).to_pylist()]
    return [
        {
            "id": f"{origin['receipt']}-{origin['index']:08d}",
            "rule": "schema",
            "field": refused.field,
            "value": refused.value,
            "reason": refused.reason,
            "record": text,
            "source": {"source": "upload", "locator": origin["receipt"], "collected_at": origin["at"]},
            "seq": origin["seq"],
        }
        for refused, origin, text in zip(made.refused, origins, texts, strict=True)
    ]
