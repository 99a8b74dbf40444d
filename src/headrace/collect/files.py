"""The ``files`` source: a path pattern becomes tasks, and a task becomes batches with ids that a rerun repeats."""

from __future__ import annotations

import glob
import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from headrace import settings
from headrace.collect import formats, tabular
from headrace.collect.codings import Decompressor
from headrace.collect.formats import Limits
from headrace.collect.kinds import TEXT
from headrace.collect.project import Projection, project_json
from headrace.errors import BadData, Forbidden, TooLarge
from headrace.rows import SOURCE, STAMP

SAMPLE_RECORDS = 10_000
_PIECE = 1 << 20
# Files are the owner's own: they may decompress to any size, since they are read in bounded pieces.
_UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file or a range of it: ``start`` to ``stop`` in bytes (NDJSON) or row groups (Parquet), else 0 and -1 for all.

    ``first`` is the index within the file of the part's first record (for NDJSON: line); ``mtime_us`` its time stamp.
    """

    path: str
    name: str
    format: str
    compression: str
    bytes: int
    mtime_us: int
    start: int = 0
    stop: int = -1
    first: int = 0


@dataclass(frozen=True, slots=True)
class FileTask:
    """What one map task reads, in order. Goes through ``model.to_dict`` and ``model.from_dict``."""

    index: int
    parts: tuple[FilePart, ...]


@dataclass(frozen=True, slots=True)
class RefusedRecord:
    """A record that is no row: where it stands, why, and its text as found."""

    id: str
    locator: str
    field: str | None
    value: str | None
    reason: str
    raw: str


@dataclass(frozen=True, slots=True)
class FileBatch:
    """Rows in file order: the user columns, then ``_id``, ``_source``, ``_ingested_at``; and the records refused."""

    batch: pa.RecordBatch
    refused: tuple[RefusedRecord, ...]


# ---------------------------------------------------------------------------------------------- plan


def plan(
    pattern: str,
    base: Path,
    format: str = "auto",
    task_bytes: int | None = None,
    allowed: Sequence[Path] | None = None,
) -> list[FileTask]:
    """The tasks behind a path, folder or glob pattern relative to ``base``, in order of the files' names.

    NDJSON is cut at line ends and Parquet between row groups where larger than ``task_bytes``; small files share a
    task. Raises BadData if nothing matches, UnsupportedType for an unknown format, Forbidden outside ``allowed``.
    """
    size = task_bytes or settings.integer("task_bytes")
    parts = [
        part for path in _matches(pattern, base, format, allowed) for part in _cut(_part(path, base, format), size)
    ]
    tasks: list[FileTask] = []
    group: list[FilePart] = []
    for part in parts:
        if group and sum(p.bytes for p in group) + part.bytes > size:
            tasks.append(FileTask(len(tasks), tuple(group)))
            group = []
        group.append(part)
    return [*tasks, FileTask(len(tasks), tuple(group))]


def _matches(pattern: str, base: Path, format: str, allowed: Sequence[Path] | None) -> list[Path]:
    where = base / pattern
    folder = where.is_dir()
    found = (
        [where]
        if where.is_file()
        else [Path(p) for p in glob.glob(str(where / "**" / "*" if folder else where), recursive=True)]
    )
    files = sorted({p for p in found if p.is_file()}, key=lambda p: _name(p, base))
    if folder and format == "auto":
        files = [p for p in files if _has_format(p)]
    if not files:
        place = "" if Path(pattern).is_absolute() else f" in {base}"
        raise BadData(f"no file matches {pattern!r}{place}", hint="check the path; '**' reaches into folders")
    for path in files:
        real = path.resolve()
        if allowed is not None and not any(real.is_relative_to(root.resolve()) for root in allowed):
            raise Forbidden(
                f"{_name(path, base)} lies outside the folders that recipes may read", hint="ask the owner to allow it"
            )
    return files


def _has_format(path: Path) -> bool:
    name = path.name.lower()
    for ending in formats.COMPRESSIONS:
        name = name.removesuffix(ending)
    return Path(name).suffix in formats.SUFFIXES


def _name(path: Path, base: Path) -> str:
    whole, root = path.absolute(), base.absolute()
    whole, root = Path(*_normal(whole)), Path(*_normal(root))
    return (whole.relative_to(root) if whole.is_relative_to(root) else whole).as_posix()


def _normal(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and len(parts) > 1:
            parts.pop()
        elif part != "..":
            parts.append(part)
    return parts


def _part(path: Path, base: Path, format: str) -> FilePart:
    stat = path.stat()
    if format == "auto":
        format, compression = formats.format_of_path(path)
    else:
        compression = formats.COMPRESSIONS.get(path.suffix.lower(), "identity")
    stamp = stat.st_mtime_ns // 1000
    part = FilePart(str(path.absolute()), _name(path, base), format, compression, stat.st_size, stamp)
    if format == "json" and _is_lines(part):
        part = FilePart(part.path, part.name, "ndjson", compression, part.bytes, stamp)
    return part


def _is_lines(part: FilePart) -> bool:
    """Whether a .json file is NDJSON in truth: its first line is a record, and another follows."""
    head = next(_pieces(part, part.path), b"").lstrip(formats.BOM).lstrip()
    line, _, rest = head.partition(b"\n")
    return bool(rest.strip()) and formats.record_problem(line, Limits.of_settings().depth) is None


def _cut(part: FilePart, size: int) -> Iterator[FilePart]:
    if part.bytes <= size or part.compression != "identity" or part.format not in ("ndjson", "parquet"):
        yield part
    elif part.format == "parquet":
        yield from _cut_groups(part, size)
    else:
        yield from _cut_lines(part, size)


def _ranged(part: FilePart, size: int, start: int, stop: int, first: int) -> FilePart:
    return FilePart(part.path, part.name, part.format, part.compression, size, part.mtime_us, start, stop, first)


def _cut_lines(part: FilePart, size: int) -> Iterator[FilePart]:
    """Ranges of ``size`` bytes, each stretched to its line's end; the lines before each are counted on the way."""
    start = lines = counted = at = 0
    with open(part.path, "rb") as file:
        while piece := file.read(_PIECE):
            begin = 0
            while at + len(piece) > (goal := start + size):
                end = piece.find(b"\n", max(begin, goal - at - 1)) + 1
                if not end:
                    break
                yield _ranged(part, at + end - start, start, at + end, lines)
                counted += piece.count(b"\n", begin, end)
                start, lines, begin = at + end, counted, end
            counted += piece.count(b"\n", begin)
            at += len(piece)
    if start < at:
        yield _ranged(part, at - start, start, at, lines)


def _cut_groups(part: FilePart, size: int) -> Iterator[FilePart]:
    with _named(part):
        footer = pq.read_metadata(part.path)
    start = rows = first = held = 0
    for group in range(footer.num_row_groups):
        held = math.ceil(part.bytes * (group + 1 - start) / footer.num_row_groups)
        rows += footer.row_group(group).num_rows
        if held >= size or group == footer.num_row_groups - 1:
            yield _ranged(part, held, start, group + 1, first)
            start, first, held = group + 1, rows, 0


# ---------------------------------------------------------------------------------------------- read


@contextmanager
def _named(part: FilePart) -> Iterator[None]:
    """Errors about bytes name the file."""
    try:
        yield
    except (BadData, TooLarge) as error:
        raise BadData(f"{part.name}: {error.message}", hint=error.hint, details=error.details) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise BadData(f"{part.name}: cannot be read: {error}", hint="is it still there, and whole?") from None


def _pieces(part: FilePart, path: str) -> Iterator[bytes]:
    coding = Decompressor(part.compression, bytes_max=_UNBOUNDED, ratio_max=_UNBOUNDED)
    with open(path, "rb") as file:
        file.seek(part.start)
        left = part.stop - part.start if part.stop >= 0 else _UNBOUNDED
        while left > 0 and (chunk := file.read(min(_PIECE, left))):
            left -= len(chunk)
            yield from coding.pieces(chunk)
    if part.stop < 0 and part.bytes:
        coding.finish()


def _lines(part: FilePart) -> Iterator[list[bytes]]:
    """Runs of whole lines, blank ones too; a line beyond ``record_bytes_max`` raises TooLarge."""
    held: list[bytes] = []
    limit, size, marked = settings.integer("record_bytes_max"), 0, part.start == 0
    for piece in _pieces(part, part.path):
        if marked:
            piece, marked = piece.removeprefix(formats.BOM), False
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield (b"".join(held) + piece[: cut - 1]).split(b"\n")
            held, size = [], 0
        held.append(piece[cut:])
        size += len(held[-1])
        if size > limit:
            raise TooLarge(f"a line is longer than {limit} bytes", hint="raise record_bytes_max, or give it line ends")
    if size:
        yield [b"".join(held)]


@dataclass(frozen=True, slots=True)
class _Texts:
    """JSON records with their indices in the file, and what is no record: (index, text, reason)."""

    texts: list[bytes]
    indices: list[int]
    bad: list[tuple[int, bytes, str]]


def _json_texts(part: FilePart, rows: int, size: int) -> Iterator[_Texts]:
    limits = Limits.of_settings()
    if part.format == "json":
        body = b"".join(_pieces(part, part.path))
        records = formats.split_json(body, single=True)
        for start, stop in _bounds([len(t) for t in records.texts], rows, size):
            yield _Texts(records.texts[start:stop], list(range(start, stop)), [])
        return
    first = part.first
    for lines in _lines(part):
        for start, stop in _bounds([len(line) for line in lines], rows, size):
            yield _judged(lines[start:stop], first + start, limits)
        first += len(lines)


def _bounds(sizes: list[int], rows: int, size: int) -> Iterator[tuple[int, int]]:
    start = held = 0
    for at, bytes_here in enumerate(sizes):
        if at > start and (at - start == rows or held + bytes_here > size):
            yield start, at
            start, held = at, 0
        held += bytes_here
    if start < len(sizes):
        yield start, len(sizes)


def _judged(lines: list[bytes], first: int, limits: Limits) -> _Texts:
    if formats.count_plain_lines(b"\n".join(lines) + b"\n", limits) == len(lines):
        return _Texts(lines, list(range(first, first + len(lines))), [])
    found = _Texts([], [], [])
    for index, line in enumerate(lines, first):
        text = line.strip()
        if not text:
            continue
        problem = formats.record_problem(text, limits.depth)
        if problem is None:
            found.texts.append(text)
            found.indices.append(index)
        else:
            found.bad.append((index, line, problem))
    return found


def read(
    task: FileTask, schema: pa.Schema, batch_rows: int, batch_bytes: int, source: str = "files"
) -> Iterator[FileBatch]:
    """The batches of a task under ``schema`` (user columns, from ``infer_schema``), the same at every run.

    What is no record, or does not fit the schema, is in ``refused``. Raises BadData, naming the file, for one that
    cannot be read at all.
    """
    for part in task.parts:
        with _named(part):
            if part.format in ("json", "ndjson"):
                yield from _read_json(part, schema, batch_rows, batch_bytes, source)
            elif part.format == "text":
                yield _read_text(part, schema, source)
            else:
                yield from _read_table(part, schema, batch_rows, source)


def _read_json(part: FilePart, schema: pa.Schema, rows: int, size: int, source: str) -> Iterator[FileBatch]:
    for found in _json_texts(part, rows, size):
        result = project_json(found.texts, schema, fixed=True)
        raws = {i: found.texts[i] for i in (r.index for r in result.refused)}
        refused = [_refused(part, source, index, None, None, why, raw) for index, raw, why in found.bad]
        for r in result.refused:
            refused.append(_refused(part, source, found.indices[r.index], r.field, r.value, r.reason, raws[r.index]))
        yield _batch(part, source, result, np.asarray(found.indices, dtype=np.int64)[result.accepted], refused)


def _read_text(part: FilePart, schema: pa.Schema, source: str) -> FileBatch:
    limit = settings.integer("record_bytes_max")
    body, problem, text = b"", None, ""
    for piece in _pieces(part, part.path):
        body += piece
        if len(body) > limit:
            raise TooLarge(f"the text is longer than {limit} bytes", hint="raise record_bytes_max")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 at byte {error.start}"
    row = {"text": text, "path": part.name}
    result = project_json([] if problem else [orjson.dumps(row)], schema, fixed=True)
    refused = [_refused(part, source, 0, r.field, r.value, r.reason, body) for r in result.refused]
    refused += [_refused(part, source, 0, None, None, problem, body)] if problem else []
    return _batch(part, source, result, result.accepted, refused)


def _read_table(part: FilePart, schema: pa.Schema, rows: int, source: str) -> Iterator[FileBatch]:
    first = part.first
    for given in _table_batches(part):
        for start in range(0, given.num_rows, rows):
            some = given.slice(start, rows)
            result = tabular.project_table(some, schema)
            if result.schema != schema:
                raise BadData("its columns are not those that were sampled", hint="did the file change meanwhile?")
            refused = [
                _refused(part, source, first + r.index, r.field, r.value, r.reason, _row_text(some, r.index))
                for r in result.refused
            ]
            yield _batch(part, source, result, result.accepted + first, refused)
            first += some.num_rows


def _row_text(batch: pa.RecordBatch, row: int) -> bytes:
    return orjson.dumps(batch.slice(row, 1).to_pylist()[0], default=str, option=orjson.OPT_NON_STR_KEYS)


@contextmanager
def _plain_path(part: FilePart) -> Iterator[Path]:
    """The file itself, or a temporary copy without its compression: tables are not read front to back only."""
    if part.compression == "identity":
        yield Path(part.path)
        return
    with tempfile.NamedTemporaryFile(prefix="headrace-") as copy:
        for piece in _pieces(part, part.path):
            copy.write(piece)
        copy.flush()
        yield Path(copy.name)


def _table_batches(part: FilePart) -> Iterator[pa.RecordBatch]:
    with _plain_path(part) as path:
        if part.format == "parquet" and part.stop >= 0:
            groups = list(range(part.start, part.stop))
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(settings.integer("batch_rows"), row_groups=groups)
        elif part.format in ("csv", "tsv"):
            # As text: the schema already says what each column is, and a row that is not that is refused alone.
            names = formats.csv_names(part.format, path)
            yield from formats.read_table(part.format, path, pa.schema([(name, TEXT) for name in names]))
        else:
            yield from formats.read_table(part.format, path)


def _locator(part: FilePart, index: int) -> str:
    return f"{part.name}#{index}"


def _id(source: str, locator: str) -> str:
    return hashlib.sha256(f"{source}\n{locator}".encode()).hexdigest()[:32]


def _refused(
    part: FilePart, source: str, index: int, field: str | None, value: str | None, reason: str, raw: bytes
) -> RefusedRecord:
    locator = _locator(part, index)
    return RefusedRecord(_id(source, locator), locator, field, value, reason, raw.decode(errors="replace"))


def _batch(
    part: FilePart,
    source: str,
    result: Projection,
    indices: np.ndarray[tuple[int], np.dtype[np.int64]],
    refused: list[RefusedRecord],
) -> FileBatch:
    locators = [_locator(part, index) for index in indices.tolist()]
    stamps = pa.repeat(pa.scalar(part.mtime_us, STAMP), len(locators))
    origin = pa.StructArray.from_arrays(
        [pa.repeat(pa.scalar(source, pa.string()), len(locators)), pa.array(locators, pa.string()), stamps],
        fields=SOURCE.fields,
    )
    ids = pa.array([_id(source, locator) for locator in locators], pa.string())
    fields = [
        *result.schema,
        pa.field("_id", pa.string()),
        pa.field("_source", SOURCE),
        pa.field("_ingested_at", STAMP),
    ]
    batch = pa.RecordBatch.from_arrays([*result.batch.columns, ids, origin, stamps], schema=pa.schema(fields))
    return FileBatch(batch, tuple(refused))


# ---------------------------------------------------------------------------------------------- schema


def infer_schema(tasks: Sequence[FileTask], limit: int | None = SAMPLE_RECORDS) -> pa.Schema:
    """The common user columns of all files: the first ``limit`` records of every part (None: all), tables' own schemas.

    Raises BadData, naming the file, for one that cannot be read.
    """
    schema = pa.schema([])
    seen: set[str] = set()
    for part in (part for task in tasks for part in task.parts):
        with _named(part):
            if part.format in ("json", "ndjson"):
                schema = _sampled(part, schema, limit)
            elif part.path not in seen:
                schema = tabular.merge_schemas(schema, _own_schema(part), part.format in ("csv", "tsv"))
        seen.add(part.path)
    return schema


def _sampled(part: FilePart, schema: pa.Schema, limit: int | None) -> pa.Schema:
    left = _UNBOUNDED if limit is None else limit
    for found in _json_texts(part, settings.integer("batch_rows"), settings.integer("batch_bytes")):
        schema = project_json(found.texts[:left], schema).schema
        left -= len(found.texts)
        if left <= 0:
            break
    return schema


def _own_schema(part: FilePart) -> pa.Schema:
    if part.format == "text":
        return pa.schema([("text", TEXT), ("path", TEXT)])
    with _plain_path(part) as path:
        return formats.table_schema(part.format, path)
