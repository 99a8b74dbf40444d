"""How bytes are judged before they are acknowledged: content codings, JSON, NDJSON, CSV, Arrow and Parquet.

JSON is judged as RFC 8259 and kept verbatim; orjson has the last word in every path, so a fast path only ever accepts
what the slow one accepts too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from headrace import settings
from headrace.collect import parquet
from headrace.collect.codings import BLOCK_BYTES, Decompressor, decompress
from headrace.errors import BadData, TooLarge, UnsupportedType
from headrace.model import RowError

BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
# Below this many bytes the set-up of Arrow's parser costs more than it saves.
_SMALL = 1 << 14

__all__ = [
    "Decompressor",
    "Limits",
    "Records",
    "check_ndjson",
    "check_table",
    "decompress",
    "format_of_path",
    "format_of_type",
    "loads",
    "read_table",
    "record_problem",
    "split_json",
    "table_schema",
]

CONTENT_TYPES = {
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "application/x-jsonlines": "ndjson",
    "text/csv": "csv",
    "text/tab-separated-values": "tsv",
    "application/vnd.apache.arrow.stream": "arrow",
    "application/vnd.apache.arrow.file": "arrow",
    "application/vnd.apache.parquet": "parquet",
    "application/x-parquet": "parquet",
}
SUFFIXES = {
    ".json": "json",
    ".jsonl": "ndjson",
    ".ndjson": "ndjson",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES = ("csv", "tsv", "arrow", "parquet")

Source = Path | bytes


def format_of_type(content_type: str) -> str:
    """The format behind a Content-Type (parameters and case ignored); raises UnsupportedType."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in CONTENT_TYPES:
        return CONTENT_TYPES[kind]
    raise UnsupportedType(
        f"content type {kind[:80]!r} is not read here", hint="send one of " + ", ".join(CONTENT_TYPES)
    )


def format_of_path(path: str | PurePath) -> tuple[str, str]:
    """(format, compression) by a file's suffixes, compression is identity, gzip or zstd; raises UnsupportedType."""
    name = PurePath(path).name
    pure = PurePath(name.lower())
    compression = COMPRESSIONS.get(pure.suffix, "identity")
    suffix = pure.with_suffix("").suffix if compression != "identity" else pure.suffix
    if suffix in SUFFIXES:
        return SUFFIXES[suffix], compression
    known = ", ".join([*SUFFIXES, "each with .gz or .zst"])
    raise UnsupportedType(
        f"the name of {name[:200]!r} does not tell its format", hint=f"use {known}, or say the format"
    )


# ---------------------------------------------------------------------------------------------- JSON


@dataclass(frozen=True, slots=True)
class Limits:
    """Most of JSON: ``depth`` of a record in levels (flat: 1), ``bytes`` of its text, ``records`` of an array."""

    depth: int
    bytes: int
    records: int = 1_000_000

    @classmethod
    def of_settings(cls) -> Limits:
        """The limits in force; take them once where many small bodies are judged."""
        return cls(
            settings.integer("json_depth_max"),
            settings.integer("record_bytes_max"),
            settings.integer("json_array_max"),
        )


@dataclass(frozen=True, slots=True)
class Records:
    """The accepted records of a JSON body as verbatim texts, in order, and why the others were not accepted."""

    texts: list[bytes]
    errors: list[RowError]


_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[-+0-9.eE]++', re.DOTALL)
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD]")
_NOT_A_NUMBER = (
    (b"NaN", re.compile(rb"NaN[ \t\r\n]*[,}\]]")),
    (b"Inf", re.compile(rb"Inf(?:inity)?[ \t\r\n]*[,}\]]")),
)


def _small(token: re.Match[bytes]) -> bytes:
    text = token[0]
    return b"0" if text[:1] != b'"' and _NUMBER.fullmatch(text) else text


def depth(text: bytes) -> int:
    """How deep a JSON text nests; a flat object is 1."""
    deepest = level = 0
    for mark in re.findall(rb"[][{}]", _STRING.sub(b"", text)):
        level += 1 if mark in b"[{" else -1
        deepest = max(deepest, level)
    return deepest


def _too_deep(text: bytes, limit: int) -> str | None:
    if text.count(b"{") + text.count(b"[") <= limit or depth(text) <= limit:
        return None
    return f"nested deeper than {limit} levels"


def record_problem(text: bytes, limit: int) -> str | None:
    """Why one JSON text is no record of at most ``limit`` levels, or None if it is one."""
    deep = _too_deep(text, limit)
    if deep:
        return deep
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        # Numbers beyond a float are valid JSON text; let the judge see the rest of the record without them.
        try:
            value = orjson.loads(_TOKEN.sub(_small, text))
        except orjson.JSONDecodeError:
            return f"not valid JSON: {error}"
    return None if isinstance(value, dict) else f"a record is a JSON object, not {_kind(value)}"


def _kind(value: object) -> str:
    names = {
        list: "an array",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "an object")


def loads(text: bytes) -> Any:
    """Parse an accepted JSON text; integers from 2**64 on become floats, numbers beyond a float become infinite."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _unmarked(body: bytes) -> bytes:
    return body[3:] if body.startswith(BOM) else body


def split_json(body: bytes, single: bool = False, limits: Limits | None = None) -> Records:
    """The verbatim text of a JSON object, or of each element of an array of objects (white space around them removed).

    With ``single`` an element that is no object refuses the whole body; else it is listed in ``errors`` by its index.
    Raises BadData for what is no JSON object or array, TooLarge beyond ``record_bytes_max``.
    """
    limits = limits or Limits.of_settings()
    if len(body) > limits.bytes:
        raise TooLarge(f"a JSON body is at most {limits.bytes} bytes", hint="send many records as application/x-ndjson")
    text = _unmarked(body).strip(_BLANK)
    if text.count(b"{") > limits.records and text.count(b"},") >= limits.records:
        raise TooLarge(f"a JSON array holds at most {limits.records} records", hint="send more as application/x-ndjson")
    if not text.startswith(b"["):
        problem = record_problem(text, limits.depth) if text else "the body is empty"
        if problem:
            raise BadData(problem, hint="send one JSON object, or an array of objects", details={"index": 0})
        return Records([text], [])
    lines = _plain_elements(text, limits)
    if lines:
        return Records(lines, [])
    records = Records([], [])
    for index, element in enumerate(_elements(text)):
        problem = record_problem(element, limits.depth)
        if problem is None:
            records.texts.append(element)
        elif single:
            raise BadData(
                f"record {index}: {problem}", hint="nothing of this body was stored", details={"index": index}
            )
        else:
            records.errors.append(RowError(index, problem))
    return records


def _plain_elements(body: bytes, limits: Limits) -> list[bytes]:
    """The elements of a large array, if cutting it between objects leaves nothing but valid objects; else none.

    Valid objects with commas between them are the elements: JSON can be read in one way only.
    """
    if len(body) < _SMALL or body[-1:] != b"]" or b"\n" in body:
        return []
    between = b"}, {" if b"}, {" in body[:_SMALL] else b"},{"
    text = body[1:-1].strip(_BLANK).replace(between, b"}\n{") + b"\n"
    return text.split(b"\n")[:-1] if count_plain_lines(text, limits) else []


_SCAN = json.JSONDecoder(parse_int=float)


def _elements(body: bytes) -> Iterator[bytes]:
    """The verbatim elements of a JSON array; only their bounds are found here, the judge sees each one."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BadData(f"the body is not valid UTF-8 at byte {error.start}", hint="send UTF-8") from None
    blank = re.compile(r"[ \t\r\n]*")
    at, end, index = _skip(blank, text, 1), len(text), 0
    if at < end and text[at] == "]":
        _assert_end(text, at + 1)
        return
    while True:
        try:
            _, stop = _SCAN.raw_decode(text, at)
        except RecursionError:
            raise BadData(f"record {index}: nested too deep", details={"index": index}) from None
        except ValueError as error:
            raise BadData(f"record {index}: not valid JSON: {error}", details={"index": index}) from None
        yield text[at:stop].encode()
        at = _skip(blank, text, stop)
        mark = text[at : at + 1]
        if mark == "]":
            _assert_end(text, at + 1)
            return
        if mark != ",":
            raise BadData(f"the array is not closed or lacks a comma after record {index}", details={"index": index})
        at, index = _skip(blank, text, at + 1), index + 1


def _skip(blank: re.Pattern[str], text: str, at: int) -> int:
    match = blank.match(text, at)
    return match.end() if match else at


def _assert_end(text: str, at: int) -> None:
    if at != len(text):
        raise BadData(
            "there is text after the end of the JSON array", hint="send one JSON value, or application/x-ndjson"
        )


# ---------------------------------------------------------------------------------------------- NDJSON


def check_ndjson(chunk: bytes, limits: Limits | None = None) -> tuple[bytes, int, list[RowError]]:
    """Judge a chunk of whole lines: (accepted lines verbatim, joined and ended by a newline; their number; the errors).

    Blank lines are no records. ``index`` counts the records of this chunk from 0, good and bad.
    """
    limits = limits or Limits.of_settings()
    text = normal_lines(chunk)
    count = count_plain_lines(text, limits) if len(text) >= _SMALL else 0
    return (text, count, []) if count else check_lines(text, limits)


def normal_lines(chunk: bytes) -> bytes:
    """The chunk without byte order mark, with ``\\n`` at the end of each line."""
    text = _unmarked(chunk)
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    return text + b"\n" if text and not text.endswith(b"\n") else text


def count_plain_lines(text: bytes, limits: Limits) -> int:
    """The number of lines if each is surely one valid record, else 0 (which says nothing about them).

    Arrow's parser checks at C speed but is laxer, so what it takes and RFC 8259 does not is ruled out first. A line
    that begins with ``{`` and ends with ``}`` cannot continue on a line that begins with ``{``; so as many rows as
    lines means exactly one object on each.
    """
    framed = framed_lines(text, limits)
    if framed is None or any(word in text and bad.search(text) for word, bad in _NOT_A_NUMBER):
        return 0
    ends, longest = framed
    try:
        table = pa_json.read_json(
            pa.BufferReader(text),
            read_options=pa_json.ReadOptions(block_size=max(BLOCK_BYTES, longest + 1), use_threads=False),
            parse_options=pa_json.ParseOptions(explicit_schema=pa.schema([]), unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        return 0
    return len(ends) if table.num_rows == len(ends) else 0


def framed_lines(text: bytes, limits: Limits) -> tuple[npt.NDArray[np.intp], int] | None:
    """Where the lines end, and the bytes of the longest; None if one may be what Arrow takes and RFC 8259 does not.

    What is left to the caller: numbers that are none (``NaN``, ``Infinity``), and whether Arrow finds a row per line.
    """
    if b"\0" in text or (b"\\" in text and _SURROGATE.search(text)):
        return None
    view = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(view == ord("\n"))
    longest = _longest_line(view, ends, limits)
    if not longest:
        return None
    try:
        text.decode()
    except UnicodeDecodeError:
        return None
    return ends, longest


def _longest_line(view: np.ndarray[Any, Any], ends: np.ndarray[Any, Any], limits: Limits) -> int:
    """Bytes of the longest line with its end, or 0 if one is not framed by braces, too long, or perhaps too deep."""
    if not len(ends) or ends[-1] != len(view) - 1:
        return 0
    starts = np.concatenate([[0], ends[:-1] + 1])
    longest = int((ends - starts).max()) + 1
    if longest > limits.bytes or (view[starts] != ord("{")).any() or (view[ends - 1] != ord("}")).any():
        return 0
    # Each level takes two bytes at least; only longer lines need their opening brackets counted.
    if longest <= 2 * limits.depth:
        return longest
    # '{' and '[' differ in one bit, and no other byte equals them without it.
    openers = np.flatnonzero((view & 0xDF) == ord("["))
    most = int(np.diff(np.searchsorted(openers, ends), prepend=0).max())
    return longest if most <= limits.depth else 0


def check_lines(text: bytes, limits: Limits) -> tuple[bytes, int, list[RowError]]:
    """``check_ndjson`` line by line: the reference that the fast path must equal."""
    good: list[bytes] = []
    errors: list[RowError] = []
    for line in text.split(b"\n"):
        record = line.strip(_BLANK)
        if not record:
            continue
        problem = (
            f"longer than {limits.bytes} bytes" if len(record) > limits.bytes else record_problem(record, limits.depth)
        )
        if problem is None:
            good.append(record)
        else:
            errors.append(RowError(len(good) + len(errors), problem))
    return b"".join([record + b"\n" for record in good]), len(good), errors


# ---------------------------------------------------------------------------------------------- tables


@contextmanager
def _readable(format: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = str(error).strip().partition("\n")[0][:300]
        raise BadData(f"not readable as {format}: {reason}", hint="is the file whole, and of this format?") from None


def _open(source: Source) -> pa.NativeFile:
    return pa.OSFile(str(source), "rb") if isinstance(source, Path) else pa.BufferReader(source)


def check_table(format: str, source: Source) -> tuple[int, pa.Schema]:
    """(rows, schema) after decoding all of a CSV, TSV, Arrow or Parquet body once, batch by batch; raises BadData."""
    with _readable(format):
        schema = table_schema(format, source)
        rows = sum(batch.num_rows for batch in read_table(format, source, schema, trusted=False))
    return rows, schema


def table_schema(format: str, source: Source) -> pa.Schema:
    """The schema that ``read_table`` will give. For CSV and TSV this reads the whole body; raises BadData."""
    with _readable(format):
        if format in ("csv", "tsv"):
            return _csv_schema(format, source)
        if format == "parquet":
            with _open(source) as file:
                schema = pq.ParquetFile(file).schema_arrow
        elif format == "arrow":
            with _open(source) as file:
                schema = _ipc(file)[0]
        else:
            raise UnsupportedType(f"{format!r} is not a table format", hint="use " + ", ".join(TABLES))
    _assert_names(schema.names)
    return schema


def read_table(
    format: str, source: Source, schema: pa.Schema | None = None, trusted: bool = True
) -> Iterator[pa.RecordBatch]:
    """The batches of a CSV, TSV, Arrow or Parquet body, in order, in bounded memory; raises BadData.

    ``schema`` spares a CSV body its first pass; it must come from ``table_schema`` of the same body. What nobody has
    looked at yet is not ``trusted``: TooLarge where it decodes to far more than its size.
    """
    schema = schema or table_schema(format, source)
    with _readable(format), _open(source) as file:
        if format in ("csv", "tsv"):
            yield from _csv_reader(file, format, {field.name: pa.string() for field in schema}, schema)
        elif format == "parquet":
            yield from _validated(parquet.batches(file, trusted))
        else:
            yield from _validated(_ipc(file)[1])


def _validated(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _ipc(file: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    magic = file.read(6)
    file.seek(0)
    if magic != b"ARROW1":
        stream = pa.ipc.open_stream(file)
        return stream.schema, iter(stream)
    reader = pa.ipc.open_file(file)
    return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))


def _assert_names(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    if twice:
        raise BadData(f"the column {twice[0][:80]!r} appears more than once", hint="give every column its own name")


def _csv_reader(
    file: pa.NativeFile, format: str, types: dict[str, pa.DataType], schema: pa.Schema | None = None
) -> Iterator[pa.RecordBatch]:
    reader = pa_csv.open_csv(
        file,
        read_options=pa_csv.ReadOptions(block_size=settings.integer("batch_bytes"), use_threads=False),
        parse_options=pa_csv.ParseOptions(delimiter="\t" if format == "tsv" else ",", newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )
    for batch in reader:
        yield batch if schema is None else typed(batch, schema)


def typed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch of texts in the types of ``schema``, which must be able to hold them."""
    columns = [batch.column(i).cast(field.type) for i, field in enumerate(schema)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


_FLOAT = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE](-[0-9]{1,3}|\+?[0-9]{1,2}))?$"
# What a column of texts may be, narrowest first. 007 or 2**63 are names rather than counts: such columns stay strings.
_CSV_KINDS: tuple[tuple[pa.DataType, str], ...] = (
    (pa.bool_(), r"^(true|false|True|False|TRUE|FALSE)$"),
    (pa.int64(), r"^-?(0|[1-9][0-9]{0,17})$"),
    (pa.float64(), _FLOAT),
)
_TEXT = len(_CSV_KINDS)
_CSV_CODE = r"^[-+]?0[0-9]|^[-+]?[0-9]{19}"


def _csv_schema(format: str, source: Source) -> pa.Schema:
    names = csv_names(format, source)
    kinds: dict[str, int] = {}
    with _open(source) as file:
        for batch in _csv_reader(file, format, dict.fromkeys(names, pa.string())):
            for name, column in zip(names, batch.columns, strict=True):
                if column.null_count < len(column):
                    kinds[name] = _csv_kind(column, kinds.get(name))
    types = [_CSV_KINDS[k][0] if (k := kinds.get(name, _TEXT)) < _TEXT else pa.string() for name in names]
    return pa.schema(list(zip(names, types, strict=True)))


def _csv_kind(column: pa.Array, before: int | None) -> int:
    """The first kind that holds every value so far; a column of true and false never turns into numbers, nor back."""
    kinds = range(_TEXT) if before is None else range(before, _TEXT if before else 1)
    for kind in kinds:
        if not pc.all(pc.match_substring_regex(column, _CSV_KINDS[kind][1]), min_count=0).as_py():
            continue
        coded = kind > 0 and pc.any(pc.match_substring_regex(column, _CSV_CODE), min_count=0).as_py()
        return _TEXT if coded else kind
    return _TEXT


def csv_names(format: str, source: Source) -> list[str]:
    """The column names in the first line of a CSV or TSV body; raises BadData."""
    options = pa_csv.ParseOptions(delimiter="\t" if format == "tsv" else ",", newlines_in_values=True)
    read = pa_csv.ReadOptions(block_size=settings.integer("batch_bytes"), use_threads=False)
    with _readable(format), _open(source) as file:
        names: list[str] = pa_csv.open_csv(file, read_options=read, parse_options=options).schema.names
    if any(not name.strip() for name in names) or all(re.match(_FLOAT, name) for name in names):
        raise BadData("the first line does not name the columns", hint="a CSV body begins with a header")
    _assert_names(names)
    return names
