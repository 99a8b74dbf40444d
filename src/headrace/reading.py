"""Reading versions: files and schemas from the catalog, rows from Parquet. Needs no Delta, so the server can use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from headrace.errors import HeadraceError
from headrace.model import Dataset, FileEntry, Ref, Version
from headrace.root import Root
from headrace.settings import integer
from headrace.store.parquet import read_batches
from headrace.store.types import decode_schema, narrow, to_stored


class Contents(Protocol):
    """What can be asked about versions and their files: of the catalog, or of what a principal may see of it."""

    def dataset(self, name: str) -> Dataset:
        """One dataset."""

    def latest(self, name: str) -> Version | None:
        """The newest version of a dataset, or None."""

    def versions(self, name: str, limit: int, before: int | None = None) -> list[Version]:
        """Versions newest first."""

    def resolve(self, ref: Ref) -> Version:
        """The version that a ref means."""

    def details(self, dataset: str, version: int) -> tuple[str, str]:
        """The encoded true schema of a version, and the state of its fingerprint."""

    def files(
        self, dataset: str, version: int, split: str | None = None, after: int = -1, limit: int | None = None
    ) -> list[FileEntry]:
        """The files of a version in row order."""

    def path(self, table: Path, entry: FileEntry) -> Path:
        """Where the bytes of a file lie."""


def schema_of(catalog: Contents, version: Version | None) -> pa.Schema | None:
    """The true Arrow schema of a version, system columns included."""
    return None if version is None else decode_schema(catalog.details(version.dataset, version.version)[0])


def paths_of(root: Root, dataset: str, files: Iterable[FileEntry]) -> list[Path]:
    """Where the files of a version lie."""
    return [root.table(dataset) / entry.path for entry in files]


def located(root: Root, catalog: Contents, dataset: str, files: Iterable[FileEntry]) -> Iterator[Path]:
    """Where the files of a version lie, each asked for when its turn comes: a view may have to be made first."""
    return (catalog.path(root.table(dataset), entry) for entry in files)


def scan(
    root: Root,
    catalog: Contents,
    ref: Ref,
    columns: Sequence[str] | None = None,
    skip: int = 0,
    limit: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """The rows of a version in order, in stored types, at most one row group held."""
    version = catalog.resolve(ref)
    schema = schema_of(catalog, version)
    assert schema is not None
    files = catalog.files(ref.dataset, version.version, ref.split)
    yield from read_batches(
        located(root, catalog, ref.dataset, files), to_stored(schema), columns, integer("batch_rows"), skip, limit
    )


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """``batch`` in the columns and types of ``schema``; numbers and nested fields widen, missing columns are null."""
    columns = []
    for wanted in schema:
        at = batch.schema.get_field_index(wanted.name)
        column = pa.nulls(batch.num_rows, wanted.type) if at < 0 else batch.column(at)
        columns.append(column if column.type == wanted.type else _widen(column, wanted.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def true(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A stored batch in the true types of ``schema``, which may have grown since."""
    held = pa.schema([schema.field(n) for n in schema.names if n in batch.schema.names])
    try:
        return conform(narrow(batch, held), schema)
    except (HeadraceError, pa.ArrowException):
        return conform(batch, schema)


def block_rows(width: float) -> int:
    """Rows of one shuffle block, each ``width`` bytes: a power of two over about ``block_bytes``, 256 to 65,536."""
    rows = integer("block_bytes") / max(1.0, width)
    return 1 << min(16, max(8, round(math.log2(max(1.0, rows)))))


def _widen(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_struct(kind) and pa.types.is_struct(column.type):
        fields = {f.name: i for i, f in enumerate(column.type)}
        parts = [
            _widen(column.field(fields[f.name]), f.type) if f.name in fields else pa.nulls(len(column), f.type)
            for f in kind
        ]
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=column.is_null())
    if pa.types.is_list(kind) and pa.types.is_list(column.type) and len(column):
        values = _widen(column.values, kind.value_type)
        mask = column.is_null() if column.null_count else None
        return pa.ListArray.from_arrays(column.offsets, values, type=kind, mask=mask)
    return column if column.type == kind else column.cast(kind, safe=pa.types.is_nested(kind))


def limited(
    batches: Iterator[pa.RecordBatch], columns: Sequence[str], where: Any, limit: int | None
) -> Iterator[pa.RecordBatch]:
    """``columns`` of the first ``limit`` rows for which a compiled ``where`` is true."""
    left = limit
    for batch in batches:
        kept = batch if where is None else where.apply(batch)
        if left is not None:
            kept = kept.slice(0, left)
            left -= kept.num_rows
        if kept.num_rows:
            yield kept.select(list(columns))
        if left == 0:
            return


def json_array(parts: Iterator[list[bytes]], limit: int | None) -> Iterator[bytes]:
    """One JSON array from lists of JSON texts, at most ``limit`` of them."""
    yield b"["
    first, left = True, limit
    for part in parts:
        texts = part if left is None else part[:left]
        if texts:
            yield (b"" if first else b",") + b",".join(texts)
            first = False
        if left is not None:
            left -= len(texts)
            if left <= 0:
                break
    yield b"]"


def origins_path(root: Root, dataset: str, run: str) -> Path:
    """Where a run that packed documents keeps ``_id`` and ``_source`` of each; Delta readers pass over the folder."""
    return root.table(dataset) / "_origins" / f"{run}.parquet"


T = TypeVar("T")


class Stream(Iterator[T], Generic[T]):
    """An iterator that lets go of what it reads from when it ends, is closed, or is forgotten before its first item."""

    def __init__(self, source: Iterator[T], release: Callable[[], None]) -> None:
        self._source = source
        self._release: Callable[[], None] | None = release

    def __next__(self) -> T:
        try:
            return next(self._source)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release, once."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        self.close()
