"""What happens to the body of an upload on its way in: decoded, judged and kept piece by piece, in bounded memory."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from headrace import settings
from headrace.collect import ahead, formats
from headrace.collect.project import Projection, check_and_project
from headrace.errors import BadData, TooLarge
from headrace.inbox import RECORD_SEPARATOR, Inbox, Spool, columns_path
from headrace.model import RowError

LINES_BYTES = 4 << 20
_FIRST_BYTES = 1 << 20
_MISSES_MOST = 3
_CHECKED_AHEAD = 2
_CHECKERS = ThreadPoolExecutor(2, thread_name_prefix="headrace-check")


class Limits:
    """The settings that bound an upload, read once: looking into the environment costs more than a small upload."""

    def __init__(self) -> None:
        self.upload_bytes = settings.integer("upload_bytes_max")
        self.ratio = settings.integer("upload_ratio_max")
        self.memory = settings.integer("upload_memory_bytes")
        self.record_bytes = settings.integer("record_bytes_max")
        self.errors = settings.integer("upload_errors_max")
        self.idle_seconds = settings.number("http_seconds")
        self.judge = formats.Limits.of_settings()


@dataclass(frozen=True, slots=True)
class Judged:
    """The good records of a body, ready for the inbox, and why the others were refused."""

    format: str
    rows: int
    body: bytes | Path
    rejected: int
    errors: tuple[RowError, ...]
    body_sha: str | None


def small_json(body: bytes, strict: bool, limits: Limits) -> Judged | None:
    """A JSON body all of whose records are good, without the machinery that large and other bodies need; else None."""
    records = formats.split_json(body, single=strict, limits=limits.judge)
    if records.errors:
        return None
    return Judged("json", len(records.texts), RECORD_SEPARATOR.join(records.texts), 0, (), None)


class _Kept:
    """Bytes in memory up to ``upload_memory_bytes``, beyond that in a spooled file."""

    def __init__(self, inbox: Inbox, limit: int) -> None:
        self._inbox = inbox
        self._limit = limit
        self._parts: list[bytes] = []
        self._bytes = 0
        self._spool: Spool | None = None

    @property
    def path(self) -> Path | None:
        """Where the bytes go; None while they are in memory."""
        return None if self._spool is None else self._spool.path

    def write(self, piece: bytes) -> None:
        self._bytes += len(piece)
        if self._spool is None and self._bytes > self._limit:
            self._spool = self._inbox.spool()
            for part in self._parts:
                self._spool.write(part)
            self._parts.clear()
        if self._spool is None:
            self._parts.append(piece)
        else:
            self._spool.write(piece)

    def finish(self) -> bytes | Path:
        return b"".join(self._parts) if self._spool is None else self._spool.finish()

    def abandon(self) -> None:
        if self._spool is not None:
            self._spool.abandon()


class _Columns:
    """Keeps what was projected of lines beside the file that holds them; in memory as long as they are.

    Lines are projected under the schema that those before them made of ``schema``, the dataset's. Should that be
    another one at the flush, they are projected there. After a few chunks that could not be, no more is tried.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema: pa.Schema | None = schema
        self._misses = 0
        self._held: list[ahead.Part] = []
        self._file: ahead.Writer | None = None

    def keep(
        self, lines: bytes, rows: int, assumed: pa.Schema | None, made: Projection | None, path: Path | None
    ) -> None:
        """Take the next lines; ``path`` is where their text went."""
        if made is not None:
            self.schema, self._misses = made.schema, 0
            self._held.append(ahead.Part(len(lines), rows, assumed, made.batch))
        else:
            self._held.append(ahead.Part(len(lines), rows))
            self._misses += 1
            if self._misses == _MISSES_MOST:
                self.schema = None
        if path is None:
            return
        if self._file is None:
            self._file = ahead.Writer(columns_path(path))
        for part in self._held:
            self._file.write(part)
        self._held.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def abandon(self) -> None:
        if self._file is not None:
            self._file.abandon()


_Checked: TypeAlias = tuple[bytes, int, list[RowError], Projection | None]


def _checked(lines: bytes, limits: formats.Limits, assumed: pa.Schema | None) -> _Checked:
    if assumed is None:
        return (*formats.check_ndjson(lines, limits), None)
    return check_and_project(lines, limits, assumed)


class Intake:
    """Takes one body: ``feed`` its chunks, then ``finish``; or ``abandon`` it. May block; one thread at a time.

    With ``strict`` one bad record refuses the whole body. ``hashed`` asks for the hash that idempotency compares.
    ``schema`` gives the dataset's user columns: of a large NDJSON body, columns are then made while it is checked.
    """

    def __init__(
        self,
        inbox: Inbox,
        format: str,
        encoding: str,
        *,
        strict: bool = False,
        hashed: str | None = None,
        limits: Limits | None = None,
        schema: Callable[[], pa.Schema] | None = None,
    ) -> None:
        limits = limits or Limits()
        self._format = format
        self._strict = strict
        self._coding = formats.Decompressor(encoding, bytes_max=limits.upload_bytes, ratio_max=limits.ratio)
        self._kept = _Kept(inbox, limits.memory)
        self._sha = None if hashed is None else hashlib.sha256(f"{format}\0{hashed}\0".encode())
        self._judge = limits.judge
        self._errors_max = limits.errors
        self._record_max = limits.record_bytes
        self._open: list[bytes] = []
        self._open_bytes = 0
        self._rows = 0
        self._rejected = 0
        self._errors: list[RowError] = []
        self._checking: deque[tuple[pa.Schema | None, Future[_Checked]]] = deque()
        self._schema = schema
        self._columns: _Columns | None = None

    def feed(self, chunks: list[bytes]) -> None:
        """Take chunks as they came over the wire; raises BadData, TooLarge, OSError."""
        for chunk in chunks:
            for piece in self._coding.pieces(chunk):
                if self._sha is not None:
                    self._sha.update(piece)
                self._take(piece)

    def _take(self, piece: bytes) -> None:
        if self._format not in ("json", "ndjson"):
            self._kept.write(piece)
            return
        enough = LINES_BYTES if self._rows or self._checking else _FIRST_BYTES
        cut = 0
        if self._format == "ndjson" and self._open_bytes + len(piece) >= enough:
            cut = piece.rfind(b"\n") + 1
        if not cut:
            self._open.append(piece)
            self._open_bytes += len(piece)
        else:
            lines = b"".join([*self._open, piece[:cut]])
            self._open = [piece[cut:]]
            self._open_bytes = len(piece) - cut
            if self._columns is None and self._schema is not None:
                self._columns = _Columns(self._schema())
                # A short first chunk, and waited for: under its columns those that follow are projected side by side.
                self._check(lines, 0)
            else:
                self._check(lines)
        if self._open_bytes > self._record_max + LINES_BYTES:
            raise TooLarge(
                f"a record, or a JSON body, is at most {self._record_max} bytes", hint="send application/x-ndjson"
            )

    def _check(self, text: bytes, ahead: int = _CHECKED_AHEAD) -> None:
        """Judge whole lines in a thread while more come; the outcomes are taken in order, few at a time."""
        assumed = self._columns.schema if self._columns is not None else None
        self._checking.append((assumed, _CHECKERS.submit(_checked, text, self._judge, assumed)))
        while len(self._checking) > ahead:
            self._settle()

    def _settle(self) -> None:
        assumed, future = self._checking.popleft()
        good, rows, errors, made = future.result()
        self._refuse(errors, self._rows + self._rejected)
        self._rows += rows
        self._kept.write(good)
        if self._columns is not None:
            self._columns.keep(good, rows, assumed, made, self._kept.path)

    def _refuse(self, errors: list[RowError], offset: int) -> None:
        self._rejected += len(errors)
        room = self._errors_max - len(self._errors)
        self._errors += [RowError(offset + error.index, error.reason) for error in errors[:room]]

    def finish(self) -> Judged:
        """Judge what is left and make it ready; raises BadData if nothing of the body is good."""
        self._coding.finish()
        form, rows = self._format, self._rows
        if form == "json":
            records = formats.split_json(b"".join(self._open), self._strict, self._judge)
            self._refuse(records.errors, 0)
            rows = len(records.texts)
            self._kept.write(RECORD_SEPARATOR.join(records.texts))
        elif form == "ndjson":
            self._check(b"".join(self._open))
            while self._checking:
                self._settle()
            rows = self._rows
        if self._rejected and not rows:
            raise BadData(
                f"no record is good; the first: {self._errors[0].reason}",
                hint="nothing was stored",
                details={"errors": [{"index": error.index, "reason": error.reason} for error in self._errors]},
            )
        body = self._kept.finish()
        if self._columns is not None:
            self._columns.close()
        if form not in ("json", "ndjson"):
            rows = formats.check_table(form, body)[0]
        sha = None if self._sha is None else self._sha.hexdigest()
        return Judged(form, rows, body, self._rejected, tuple(self._errors), sha)

    def abandon(self) -> None:
        """Leave nothing behind."""
        for _, check in self._checking:
            check.cancel()
        if self._columns is not None:
            self._columns.abandon()
        self._kept.abandon()
