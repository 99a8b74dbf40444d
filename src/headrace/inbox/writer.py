"""The one writer of an inbox: group commit, idempotency, limits, and the deletion of what was flushed."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import random
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from headrace import settings
from headrace.errors import Busy, Conflict, HeadraceError
from headrace.inbox.values import SCHEMA, Upload, columns_path, row_errors
from headrace.model import Receipt, to_dict

_CHECKPOINT_PAGES = 4096
_FORGET_ROWS = 4096
_INSERT_ROWS = (256, 64, 16, 4, 1)
_Row = tuple[str | int | float | bytes | None, ...]


class ReceiptClock:
    """Makes receipt ids: 32 hex digits in the layout of UUID version 7, strictly growing, also after a restart."""

    def __init__(self, last: str | None = None) -> None:
        # Not the system's generator: each call would give the interpreter lock away. Receipts are no secrets.
        self._random = random.Random(secrets.randbits(128))  # noqa: S311
        number = int(last, 16) if last else 0
        self._ms = number >> 80
        self._low = (number >> 64 & 0xFFF) << 62 | number & (1 << 62) - 1

    def next(self, now: float) -> str:
        """The next id at ``now`` seconds since 1970; a clock that stands or goes back only counts on."""
        ms = int(now * 1000)
        if ms > self._ms:
            self._ms, self._low = ms, self._random.getrandbits(73)
        else:
            self._low += 1 + self._random.getrandbits(32)
            if self._low >> 74:
                self._ms, self._low = self._ms + 1, self._random.getrandbits(73)
        number = self._ms << 80 | 7 << 76 | (self._low >> 62) << 64 | 2 << 62 | self._low & (1 << 62) - 1
        return f"{number:032x}"


class Spool:
    """A body on its way to a file of the inbox: ``write`` pieces, then ``finish`` for its path, or ``abandon``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / secrets.token_hex(16)
        self.bytes = 0
        self._file = self.path.open("xb", buffering=0)

    def write(self, piece: bytes | memoryview) -> None:
        """Append one piece; raises OSError when the disk is full."""
        view = memoryview(piece)
        while view:
            written = self._file.write(view) or 0
            self.bytes += written
            view = view[written:]

    def finish(self) -> Path:
        """Make the file durable and give its path."""
        os.fsync(self._file.fileno())
        self._file.close()
        return self.path

    def abandon(self) -> None:
        """Remove the file; harmless after another ``abandon``."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def remove_body(path: Path) -> None:
    """Remove a spooled body, and what may be kept beside it."""
    path.unlink(missing_ok=True)
    columns_path(path).unlink(missing_ok=True)


@dataclass(slots=True)
class _Job:
    upload: Upload
    bytes: int
    future: Future[Receipt] | asyncio.Future[Receipt]
    outcome: Receipt | HeadraceError | None = None
    stored: bool = False


@dataclass(slots=True)
class _Chore:
    work: Callable[[], int | None]
    future: Future[int]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(body: bytes | Path) -> str:
    if isinstance(body, bytes):
        return hashlib.sha256(body).hexdigest()
    with body.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _again(upload: Upload, sha: str | None, first: Receipt | HeadraceError | None) -> Receipt | HeadraceError | None:
    """The outcome of an upload whose idempotency key is known from ``first``."""
    if sha != upload.body_sha:
        return Conflict("this Idempotency-Key was used with another body", hint="use a new key for each upload")
    return dataclasses.replace(first, duplicates=first.accepted) if isinstance(first, Receipt) else first


def _insert(db: sqlite3.Connection, table: str, rows: list[_Row]) -> None:
    # Each statement gives the interpreter lock away and must win it back from a busy event loop: few, wide ones.
    start = 0
    for width in _INSERT_ROWS:
        while len(rows) - start >= width:
            part = rows[start : start + width]
            marks = "(" + ",".join("?" * len(part[0])) + ")"
            values = ",".join([marks] * width)
            db.execute(f"INSERT INTO {table} VALUES {values}", [field for row in part for field in row])  # noqa: S608
            start += width


def _settle(jobs: list[_Job]) -> None:
    for job in jobs:
        if job.future.done():
            continue
        if isinstance(job.outcome, Receipt):
            job.future.set_result(job.outcome)
        elif job.outcome is not None:
            job.future.set_exception(job.outcome)


class Inbox:
    """The writer's side; one per root and process. All methods may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.folder = self.root / "inbox"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # For this user alone: what SQLite makes itself, and the files beside it after its example, anyone might read.
        os.close(os.open(self.root / "inbox.db", os.O_CREAT | os.O_RDWR, 0o600))
        self._memory = settings.integer("upload_memory_bytes")
        self._group = settings.integer("inbox_group_max")
        self._queue_max = settings.integer("inbox_queue_max")
        self._bytes_max = settings.integer("inbox_bytes_max")
        self._db = sqlite3.connect(self.root / "inbox.db", isolation_level=None, check_same_thread=False, timeout=30)
        self._prepare()
        self._jobs: deque[_Job] = deque()
        self._chores: deque[_Chore] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="headrace-inbox", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        db = self._db
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"wal_autocheckpoint={_CHECKPOINT_PAGES}"):
            db.execute(f"PRAGMA {pragma}").fetchall()
        db.executescript(SCHEMA)
        _sync_folder(self.root)
        self._seq, last = db.execute("SELECT coalesce(max(seq), 0), max(receipt) FROM uploads").fetchone()
        self._receipts = ReceiptClock(last)
        self._held: int = db.execute("SELECT coalesce(sum(bytes), 0) FROM bodies").fetchone()[0]
        known = {name for (name,) in db.execute("SELECT path FROM bodies WHERE path IS NOT NULL")}
        for path in self.folder.iterdir():
            # A file without a row belongs to an upload that was never acknowledged.
            if path.name not in known:
                path.unlink()

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies that are queued or wait for the flusher."""
        return self._held

    def spool(self) -> Spool:
        """A new file for a body too large for memory."""
        return Spool(self.folder)

    def append(self, upload: Upload) -> Future[Receipt]:
        """Queue one upload: the future gives its receipt once durable, or Conflict or Busy. Raises Busy at a limit."""
        future: Future[Receipt] = Future()
        future.set_running_or_notify_cancel()
        self._put(upload, future)
        return future

    def append_async(self, upload: Upload) -> asyncio.Future[Receipt]:
        """``append`` for the running event loop: no extra thread hop per upload, one wake-up per group."""
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._put(upload, future)
        return future

    def _put(self, upload: Upload, future: Future[Receipt] | asyncio.Future[Receipt]) -> None:
        if upload.idem is not None and upload.body_sha is None:
            upload = dataclasses.replace(upload, body_sha=_sha256(upload.body))
        size = len(upload.body) if isinstance(upload.body, bytes) else upload.body.stat().st_size
        if len(self._jobs) >= self._queue_max:
            raise Busy("too many uploads wait for the disk", hint="retry later", details={"retry_after": 1})
        if self._held + size > self._bytes_max:
            raise Busy(
                "the inbox is full",
                hint="retry when the worker has caught up; see inbox_bytes_max",
                details={"retry_after": 5},
            )
        if isinstance(upload.body, bytes) and size > self._memory:
            upload = dataclasses.replace(upload, body=self._spool_bytes(upload.body))
        with self._wake:
            if self._closing:
                raise Busy("the exchange is stopping", hint="retry when it is back", details={"retry_after": 5})
            self._held += size
            self._jobs.append(_Job(upload, size, future))
            self._wake.notify()

    def _spool_bytes(self, body: bytes) -> Path:
        spool = self.spool()
        try:
            spool.write(body)
            return spool.finish()
        except OSError as error:
            spool.abandon()
            raise Busy(f"the upload could not be written: {error.strerror}", details={"retry_after": 10}) from None

    def forget(self, dataset: str, upto_seq: int) -> Future[int]:
        """Delete the bodies of ``dataset`` up to and with ``upto_seq``; call only when they are durable elsewhere."""
        return self._chore(lambda: self._forget_some(dataset, upto_seq))

    def prune(self, before: float) -> Future[int]:
        """Delete receipts and idempotency keys older than ``before`` (seconds since 1970), but none still pending."""
        return self._chore(lambda: self._prune_all(before))

    def _chore(self, work: Callable[[], int | None]) -> Future[int]:
        chore = _Chore(work, Future())
        with self._wake:
            if self._closing:
                raise Busy("the exchange is stopping", details={"retry_after": 5})
            self._chores.append(chore)
            self._wake.notify()
        return chore.future

    def close(self) -> None:
        """Commit what is queued, refuse what comes, and stop the writer."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._db.close()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._jobs or self._chores or self._closing):
                        self._wake.wait()
                    if not self._jobs and not self._chores:
                        return
                    jobs = [self._jobs.popleft() for _ in range(min(len(self._jobs), self._group))]
                    chore = self._chores.popleft() if self._chores else None
                if jobs:
                    self._commit(jobs)
                    self._answer(jobs)
                if chore:
                    self._tidy(chore)
        finally:
            # Nobody may wait for a writer that is gone.
            with self._wake:
                self._closing = True
                left, chores = list(self._jobs), list(self._chores)
                self._jobs.clear()
            for job in left:
                job.outcome = Busy("the exchange is stopping", details={"retry_after": 5})
            self._answer(left)
            for chore in chores:
                chore.future.cancel()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _commit(self, jobs: list[_Job]) -> None:
        seq = self._seq
        try:
            if any(isinstance(job.upload.body, Path) for job in jobs):
                _sync_folder(self.folder)
            with self._transaction() as db:
                uploads, bodies = self._admit(jobs, time.time())
                _insert(db, "uploads", uploads)
                _insert(db, "bodies", bodies)
        except (sqlite3.Error, OSError) as error:
            self._seq = seq
            for job in jobs:
                job.stored = False
                job.outcome = Busy(
                    f"the upload could not be stored: {error}", hint="is the disk full?", details={"retry_after": 10}
                )
        self._release([job for job in jobs if not job.stored])

    def _admit(self, jobs: list[_Job], now: float) -> tuple[list[_Row], list[_Row]]:
        """Give each job its outcome, and the rows of those that are new."""
        uploads: list[_Row] = []
        bodies: list[_Row] = []
        group: dict[tuple[str, str], _Job] = {}
        for job in jobs:
            up = job.upload
            if up.idem is not None:
                twin = group.get((up.dataset, up.idem))
                job.outcome = self._known(up) if twin is None else _again(up, twin.upload.body_sha, twin.outcome)
                if job.outcome is not None:
                    continue
                group[up.dataset, up.idem] = job
            self._seq += 1
            receipt = self._receipts.next(now)
            errors = orjson.dumps(to_dict(up.errors)).decode() if up.errors else None
            job.outcome = Receipt(receipt, up.dataset, up.rows, up.rejected, errors=up.errors)
            head = (self._seq, receipt, up.dataset, up.format, up.rows, job.bytes, now)
            uploads.append((*head, up.key_column, up.idem, up.body_sha, up.rejected, errors))
            # An upload without records leaves its receipt only.
            if up.rows:
                job.stored = True
                path, body = (up.body.name, None) if isinstance(up.body, Path) else (None, up.body)
                bodies.append((self._seq, up.dataset, up.rows, job.bytes, now, path, body))
        return uploads, bodies

    def _release(self, refused: list[_Job]) -> None:
        with self._wake:
            self._held -= sum(job.bytes for job in refused)
        for job in refused:
            if isinstance(job.upload.body, Path):
                remove_body(job.upload.body)

    def _known(self, upload: Upload) -> Receipt | HeadraceError | None:
        row = self._db.execute(
            "SELECT receipt, rows, rejected, errors, body_sha FROM uploads WHERE dataset = ? AND idem = ?",
            (upload.dataset, upload.idem),
        ).fetchone()
        if row is None:
            return None
        return _again(upload, row[4], Receipt(row[0], upload.dataset, row[1], row[2], errors=row_errors(row[3])))

    @staticmethod
    def _answer(jobs: list[_Job]) -> None:
        groups: dict[asyncio.AbstractEventLoop | None, list[_Job]] = {}
        for job in jobs:
            groups.setdefault(job.future.get_loop() if isinstance(job.future, asyncio.Future) else None, []).append(job)
        for loop, group in groups.items():
            if loop is None:
                _settle(group)
            else:
                # A loop that has closed has nobody left to tell.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(_settle, group)

    def _tidy(self, chore: _Chore) -> None:
        try:
            done = chore.work()
        except (sqlite3.Error, OSError) as error:
            chore.future.set_exception(Busy(f"the inbox could not be tidied: {error}", details={"retry_after": 10}))
            return
        if done is None:
            with self._wake:
                self._chores.append(chore)
        else:
            chore.future.set_result(done)

    def _forget_some(self, dataset: str, upto_seq: int) -> int | None:
        # Small steps, so that uploads do not wait for a long deletion.
        rows = self._db.execute(
            "SELECT seq, bytes FROM bodies WHERE dataset = ? AND seq <= ? ORDER BY seq LIMIT ?",
            (dataset, upto_seq, _FORGET_ROWS),
        ).fetchall()
        if not rows:
            return 0
        range_ = (dataset, rows[0][0], rows[-1][0])
        where = "WHERE dataset = ? AND seq BETWEEN ? AND ?"
        paths = [name for (name,) in self._db.execute(f"SELECT path FROM bodies {where}", range_) if name]  # noqa: S608
        with self._transaction() as db:
            db.execute(f"DELETE FROM bodies {where}", range_)  # noqa: S608
        with self._wake:
            self._held -= sum(size for _, size in rows)
        for name in paths:
            remove_body(self.folder / name)
        return len(rows) if len(rows) < _FORGET_ROWS else None

    def _prune_all(self, before: float) -> int:
        with self._transaction() as db:
            # The newest row stays: sequence numbers must never be used twice.
            found = db.execute(
                "DELETE FROM uploads WHERE at < ? AND seq < (SELECT max(seq) FROM uploads)"
                " AND seq NOT IN (SELECT seq FROM bodies)",
                (before,),
            )
            return found.rowcount
