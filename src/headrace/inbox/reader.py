"""Readers of an inbox, in any process: what is pending, the next bodies, a snapshot of one dataset's tail."""

from __future__ import annotations

import io
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from headrace.inbox.values import SCHEMA, Arrived, Entry, Pending, TailEntry, row_errors

_SNAPSHOT_MEMORY = 8 << 20
_TAIL = """
SELECT b.seq, u.receipt, u.format, u.rows, u.bytes, u.at, u.key_column, b.path, b.body
FROM bodies b JOIN uploads u USING(seq) WHERE b.dataset = ? AND b.seq > ? ORDER BY b.seq
"""


class _Shared(io.RawIOBase):
    """Reads a descriptor of somebody else's at a position of its own, and leaves it open."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._at, os.fstat(self._handle).st_size)[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        read = os.preadv(self._handle, [buffer], self._at)
        self._at += read
        return read


class Snapshot:
    """The uploads of one dataset at one instant: ``entries`` first, each ``body`` when asked for.

    What the flusher commits or the writer forgets meanwhile changes nothing here. Memory stays below a few MiB.
    """

    def __init__(self) -> None:
        self.entries: list[TailEntry] = []
        self._bodies: IO[bytes] = tempfile.SpooledTemporaryFile(_SNAPSHOT_MEMORY)  # noqa: SIM115
        self._places: dict[int, int | IO[bytes]] = {}
        self._lock = threading.Lock()

    def _add(self, row: tuple[Any, ...], folder: Path) -> None:
        *header, path, body = row
        entry = TailEntry(*header)
        if path is None:
            self._places[entry.seq] = self._bodies.tell()
            self._bodies.write(body)
        else:
            self._places[entry.seq] = (folder / path).open("rb")
        self.entries.append(entry)

    def open(self, entry: TailEntry) -> IO[bytes]:
        """A new binary file at the start of the body of ``entry``; the caller closes it, before the snapshot."""
        place = self._places[entry.seq]
        if isinstance(place, int):
            return io.BytesIO(self.body(entry))
        return io.BufferedReader(_Shared(place.fileno()), 1 << 20)

    def body(self, entry: TailEntry) -> bytes:
        """The whole body of ``entry``."""
        place = self._places[entry.seq]
        file, start = (self._bodies, place) if isinstance(place, int) else (place, 0)
        with self._lock:
            file.seek(start)
            return file.read(entry.bytes)

    def close(self) -> None:
        """Let go of the files."""
        self._bodies.close()
        for place in self._places.values():
            if not isinstance(place, int):
                place.close()


class InboxReader:
    """The readers' side, for any process: short read-only transactions, never a checkpoint. Thread-safe.

    Before the first upload there may be no inbox yet; it then reads as empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._idle: list[sqlite3.Connection] = []

    def _connect(self) -> sqlite3.Connection:
        path = (self.root / "inbox.db").absolute().as_uri()
        db = sqlite3.connect(f"{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False, timeout=30)
        db.execute("PRAGMA wal_autocheckpoint=0").fetchall()
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            db = self._idle.pop()
        except IndexError:
            db = self._connect() if (self.root / "inbox.db").exists() else _empty()
        try:
            db.execute("BEGIN")
            yield db
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        if db.execute("PRAGMA database_list").fetchone()[2]:
            self._idle.append(db)
        else:
            db.close()

    def pending(self) -> list[Pending]:
        """What waits for the flusher, one item per dataset."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT dataset, count(*), sum(rows), sum(bytes), min(at), max(seq) FROM bodies GROUP BY dataset"
            ).fetchall()
        return [Pending(*row) for row in rows]

    def take(self, dataset: str, after_seq: int, max_bytes: int) -> list[Entry]:
        """The next uploads of ``dataset`` in order of arrival, up to ``max_bytes`` of bodies but at least one."""
        entries: list[Entry] = []
        size = 0
        with self._transaction() as db, closing(db.execute(_TAIL, (dataset, after_seq))) as found:
            for seq, receipt, form, rows, length, at, key, path, body in found:
                size += length
                if entries and size > max_bytes:
                    break
                entries.append(Entry(seq, receipt, form, rows, at, key, self.root / "inbox" / path if path else body))
        return entries

    @contextmanager
    def snapshot(self, dataset: str, after_seq: int = 0) -> Iterator[Snapshot]:
        """The uploads of ``dataset`` beyond ``after_seq`` as they are now; the block holds no database lock."""
        snapshot = self._capture(dataset, after_seq)
        try:
            yield snapshot
        finally:
            snapshot.close()

    def _capture(self, dataset: str, after_seq: int) -> Snapshot:
        while True:
            snapshot = Snapshot()
            try:
                with self._transaction() as db, closing(db.execute(_TAIL, (dataset, after_seq))) as found:
                    for row in found:
                        snapshot._add(row, self.root / "inbox")
                return snapshot
            except FileNotFoundError:
                # Forgotten between our read and our open, so it is committed elsewhere: look again.
                snapshot.close()
            except BaseException:
                snapshot.close()
                raise

    def receipt(self, receipt: str) -> Arrived | None:
        """What is remembered of one receipt, or None."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT seq, receipt, dataset, format, rows, bytes, at, rejected, errors,"
                " EXISTS(SELECT 1 FROM bodies b WHERE b.seq = u.seq) FROM uploads u WHERE receipt = ?",
                (receipt,),
            ).fetchone()
        if row is None:
            return None
        fields: tuple[Any, ...] = (*row[:8], row_errors(row[8]), bool(row[9]))
        return Arrived(*fields)

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()


def _empty() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.executescript(SCHEMA)
    return db
