"""What people hand to ``upload`` (dicts, tables, frames, files) as a body with its content type; large ones stream."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import itertools
import json
import math
import typing
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from headrace.errors import BadData, BadRequest, NotFound

CHUNK = 1 << 20
RECORDS = 512

NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
CSV = "text/csv"
FORMATS: Mapping[str, str] = {
    "json": "application/json",
    "jsonl": NDJSON,
    "ndjson": NDJSON,
    "csv": CSV,
    "tsv": CSV,
    "parquet": "application/vnd.apache.parquet",
    "arrow": ARROW,
}
ENCODINGS: Mapping[str, str] = {"gz": "gzip", "zst": "zstd"}
_HINT = f"known formats: {', '.join(FORMATS)}; each may end in .gz or .zst"

Content = bytes | Path | Iterable[bytes]


@dataclass(frozen=True, slots=True)
class Payload:
    """A body ready to send: ``content`` gives the same bytes each time it is iterated, unless it is an iterator."""

    content: Content
    content_type: str
    encoding: str | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """Chunks of bytes that can be produced again from the start, so that a broken upload can be repeated."""

    chunks: Callable[[], Iterator[bytes]]

    def __iter__(self) -> Iterator[bytes]:
        return self.chunks()


def _plain(value: Any) -> Any:
    """JSON types for what JSON encoders do not know; TypeError for the rest."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID | Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, bytes):
        raise TypeError("bytes have no JSON form: send an Arrow table, or base64 text")
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} has no JSON form")


def _not_finite(value: Any, path: str = "") -> str | None:
    """The path of the first NaN or infinity, which JSON cannot say."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path or "."
    if isinstance(value, Mapping):
        return next((p for k, v in value.items() if (p := _not_finite(v, f"{path}.{k}"))), None)
    if isinstance(value, list | tuple):
        return next((p for i, v in enumerate(value) if (p := _not_finite(v, f"{path}[{i}]"))), None)
    return _not_finite(value.tolist(), path) if hasattr(value, "tolist") else None


def _line(index: int, record: Any) -> bytes:
    if not isinstance(record, Mapping):
        raise BadData(f"record {index} is of type {type(record).__name__}, not a dict", hint="upload a list of dicts")
    try:
        line = orjson.dumps(record, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        # orjson stops at 64-bit integers and at text keys; the standard encoder knows both.
        try:
            line = json.dumps(record, default=_plain, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise BadData(f"record {index} cannot be written as JSON: {error}", hint="use plain JSON values") from None
    if b"null" in line and (path := _not_finite(record)):
        # orjson writes null for NaN; a value must not change on its way.
        raise BadData(
            f"record {index} holds NaN or infinity at {path.lstrip('.') or 'its root'}",
            hint="JSON cannot say NaN: use None, or upload an Arrow table or data frame",
        )
    return line


def _ndjson(records: Iterable[Any]) -> Iterator[bytes]:
    lines = (_line(index, record) for index, record in enumerate(records))
    while group := list(itertools.islice(lines, RECORDS)):
        yield b"\n".join(group) + b"\n"


class _Sink(io.RawIOBase):
    """Collects what an Arrow writer writes until it is taken."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken, self.parts = b"".join(self.parts), []
        return taken


def _arrow(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    sink = _Sink()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            yield sink.take()
    yield sink.take()


def _table(table: pa.Table) -> Payload:
    return Payload(Replay(lambda: _arrow(table.schema, table.to_batches(max_chunksize=65536))), ARROW)


def _frame(value: Any) -> Payload | None:
    """Arrow tables, readers and data frames, told apart by what they can do; their packages are not imported."""
    if isinstance(value, pa.Table):
        return _table(value)
    if isinstance(value, pa.RecordBatch):
        return _table(pa.Table.from_batches([value]))
    if isinstance(value, pa.RecordBatchReader):
        return Payload(_arrow(value.schema, value), ARROW)
    if type(value).__module__.split(".")[0] == "pandas" and hasattr(value, "columns"):
        return _table(pa.Table.from_pandas(value, preserve_index=False).replace_schema_metadata(None))
    if hasattr(value, "collect_schema") and hasattr(value, "collect"):
        value = value.collect() if not hasattr(value, "to_arrow") else value
    if hasattr(value, "to_arrow") and isinstance(found := value.to_arrow(), pa.Table):
        return _table(found)
    if hasattr(value, "__arrow_c_stream__"):
        reader = pa.RecordBatchReader.from_stream(value)
        return Payload(_arrow(reader.schema, reader), ARROW)
    return None


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, 1 MiB at a time."""
    with path.open("rb") as file:
        yield from _chunks(file)


def _rewound(file: BinaryIO) -> Content:
    """The rest of an open file; repeatable if the file can seek."""
    if not file.seekable():
        return _chunks(file)
    start = file.tell()

    def again() -> Iterator[bytes]:
        file.seek(start)
        return _chunks(file)

    return Replay(again)


def _tabs_to_commas(path: Path, encoding: str | None) -> Iterator[bytes]:
    with io.TextIOWrapper(pa.input_stream(str(path), compression=encoding), encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t")
        while group := list(itertools.islice(rows, RECORDS)):
            out = io.StringIO(newline="")
            csv.writer(out, lineterminator="\n").writerows(group)
            yield out.getvalue().encode()


def _is_arrow_file(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) == b"ARROW1"


def _arrow_file(path: Path) -> Iterator[bytes]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        yield from _arrow(reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches)))


def format_of(name: str) -> tuple[str, str | None]:
    """Format and content encoding by the suffixes of a file name; BadRequest if they are not known."""
    parts = name.lower().split(".")[1:]
    encoding = ENCODINGS.get(parts[-1]) if parts else None
    kind = parts[-2 if encoding else -1] if len(parts) > bool(encoding) else ""
    kind = {"feather": "arrow", "ipc": "arrow", "arrows": "arrow", "pq": "parquet"}.get(kind, kind)
    if kind not in FORMATS:
        raise BadRequest(f"{name!r} does not say its format", hint=_HINT)
    return kind, encoding


def content_type(kind: str) -> str:
    """The content type of a format's name; BadRequest with the known ones otherwise."""
    if kind not in FORMATS:
        raise BadRequest(f"{kind!r} is not a format that uploads take", hint=_HINT)
    return FORMATS[kind]


def _file(path: Path, kind: str | None) -> Payload:
    if not path.is_file():
        raise NotFound(f"there is no file {str(path)!r}", hint="check the path, or pass records instead of a file name")
    encoding: str | None = ENCODINGS.get(path.suffix.lower().lstrip("."))
    if kind is None:
        kind, encoding = format_of(path.name)
    kind_type = content_type(kind)
    if kind == "tsv":
        return Payload(Replay(lambda: _tabs_to_commas(path, encoding)), CSV)
    if kind == "arrow" and encoding is None and _is_arrow_file(path):
        return Payload(Replay(lambda: _arrow_file(path)), ARROW)
    return Payload(path, kind_type, encoding)


def payload(records: Any, kind: str | None = None) -> Payload:
    """Turn ``records`` into a body: dicts, an Arrow or data frame value, a path (format by suffix), or a binary file.

    ``kind`` names the format of a file whose name does not (json, jsonl, ndjson, csv, tsv, parquet, arrow).
    Raises BadData for values without a JSON form, BadRequest for what is not uploadable, NotFound for a missing file.
    """
    if isinstance(records, str | Path):
        return _file(Path(records), kind)
    if isinstance(records, Mapping):
        return Payload(_line(0, records) + b"\n", NDJSON)
    if (found := _frame(records)) is not None:
        return found
    if isinstance(records, bytes | bytearray | memoryview):
        return _open_bytes(bytes(records), kind)
    if hasattr(records, "read"):
        return _open_file(typing.cast(BinaryIO, records), kind)
    if isinstance(records, list | tuple) and len(records) <= RECORDS:
        return Payload(b"".join(_ndjson(records)), NDJSON)
    if isinstance(records, list | tuple):
        return Payload(Replay(lambda: _ndjson(records)), NDJSON)
    if isinstance(records, Iterable):
        return Payload(_ndjson(records), NDJSON)
    raise BadRequest(
        f"a value of type {type(records).__name__} cannot be uploaded",
        hint="pass dicts, a table, a data frame or a path",
    )


def _named(kind: str | None) -> str:
    if kind is None or kind == "tsv":
        raise BadRequest(
            "bytes do not say their format", hint="pass format='ndjson', 'json', 'csv', 'parquet' or 'arrow'"
        )
    return content_type(kind)


def _open_bytes(body: bytes, kind: str | None) -> Payload:
    return Payload(body, _named(kind))


def _open_file(file: BinaryIO, kind: str | None) -> Payload:
    if not isinstance(file.read(0), bytes):
        raise BadRequest("the file is open as text", hint="open it with mode 'rb'")
    name = getattr(file, "name", None)
    encoding = None
    if kind is None and isinstance(name, str):
        kind, encoding = format_of(Path(name).name)
    return Payload(_rewound(file), _named(kind), encoding)


def size_of(content: Content) -> int | None:
    """Bytes of a body if known before it is read."""
    if isinstance(content, bytes):
        return len(content)
    return content.stat().st_size if isinstance(content, Path) else None


def watched(content: Content, heard: Callable[[int, int | None], None]) -> Content:
    """The same body, telling ``heard`` (bytes so far, bytes in all or None) as it is read."""
    total = size_of(content)

    def counted() -> Iterator[bytes]:
        done = 0
        source: Iterable[bytes]
        if isinstance(content, bytes):
            source = (content[i : i + CHUNK] for i in range(0, len(content), CHUNK))
        else:
            source = read_chunks(content) if isinstance(content, Path) else content
        for chunk in source:
            yield chunk
            done += len(chunk)
            heard(done, total)

    return Replay(counted) if isinstance(content, bytes | Path | Replay) else counted()
