"""Parquet from outside, read without trust: a few hundred bytes may claim to be gigabytes.

A dictionary can repeat one long value in every row. So texts are read as dictionaries, measured, and only then decoded,
in slices of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace import settings
from headrace.errors import TooLarge

FREE_BYTES = 64 << 20
"""Decoded bytes that any file may have, whatever its own size."""


def batches(source: pa.NativeFile, trusted: bool) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file in order, in batches of about ``batch_bytes`` decoded bytes.

    Unless ``trusted``, TooLarge beyond ``upload_ratio_max`` times the file's size, or ``upload_bytes_max``.
    """
    size = source.size()
    texts = [field.name for field in pq.ParquetFile(source).schema_arrow if _is_text(field.type)]
    file = pq.ParquetFile(source, read_dictionary=texts)
    limit = min(settings.integer("upload_bytes_max"), max(FREE_BYTES, size * settings.integer("upload_ratio_max")))
    declared = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    total = 0
    if not trusted:
        _assert_within(declared, limit)
    for batch in file.iter_batches(settings.integer("batch_rows")):
        decoded = sum(_decoded(column) for column in batch.columns)
        total += decoded
        if not trusted:
            _assert_within(total, limit)
        yield from _plain(batch, decoded)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _assert_within(decoded: int, limit: int) -> None:
    if decoded > limit:
        raise TooLarge(
            f"the Parquet file decodes to more than {limit} bytes", hint="see upload_ratio_max and upload_bytes_max"
        )


def _decoded(column: pa.Array) -> int:
    """The bytes of a column once its dictionary is spelled out."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0) + 8 * len(column)


def _plain(batch: pa.RecordBatch, decoded: int) -> Iterator[pa.RecordBatch]:
    parts = max(1, min(batch.num_rows, -(-decoded // settings.integer("batch_bytes"))))
    step = -(-batch.num_rows // parts)
    for start in range(0, batch.num_rows, max(1, step)):
        columns = [
            column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            for column in batch.slice(start, step).columns
        ]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
