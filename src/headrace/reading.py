"""Reading versions: files and schemas from the catalog, rows from Parquet. Needs no Delta, so the server can use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa

from headrace.catalog import Catalog
from headrace.model import FileEntry, Ref, Version
from headrace.root import Root
from headrace.settings import integer
from headrace.store.parquet import read_batches
from headrace.store.types import decode_schema, to_stored


def schema_of(catalog: Catalog, version: Version | None) -> pa.Schema | None:
    """The true Arrow schema of a version, system columns included."""
    return None if version is None else decode_schema(catalog.details(version.dataset, version.version)[0])


def paths_of(root: Root, dataset: str, files: Iterable[FileEntry]) -> list[Path]:
    """Where the files of a version lie."""
    return [root.table(dataset) / entry.path for entry in files]


def scan(
    root: Root,
    catalog: Catalog,
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
        paths_of(root, ref.dataset, files), to_stored(schema), columns, integer("batch_rows"), skip, limit
    )


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """``batch`` in the columns and types of ``schema``; numbers and nested fields widen, missing columns are null."""
    columns = []
    for wanted in schema:
        at = batch.schema.get_field_index(wanted.name)
        column = pa.nulls(batch.num_rows, wanted.type) if at < 0 else batch.column(at)
        columns.append(column if column.type == wanted.type else _widen(column, wanted.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


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
