"""From the inbox to versions: what was pushed becomes typed rows of its dataset, or quarantine, once in total.

A flush takes uploads in order of arrival and judges each record against the schema that the records before it made,
so the verdict on a record never depends on where one flush ends and the next begins. That makes a redo after a crash
exact: quarantine rows are committed first, then the rows with the inbox mark in one Delta commit, then the catalog.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from headrace import arrivals, quarantine, reading, versions
from headrace.catalog import Catalog
from headrace.inbox import Entry, InboxReader
from headrace.model import Version
from headrace.root import Root
from headrace.rows import SYSTEM
from headrace.settings import integer, number

APP = "inbox"
_RETRY_SECONDS = 2.0
_REST_SECONDS = 5.0

log = structlog.get_logger("headrace.flush")


class Flusher:
    """Turns the inbox into versions, dataset by dataset, when enough bytes or time have gathered."""

    def __init__(self, root: Root, catalog: Catalog, reader: InboxReader, on_commit: Callable[[str, int], Any]) -> None:
        self.root, self.catalog, self.reader, self.on_commit = root, catalog, reader, on_commit

    def recover(self) -> None:
        """After a start: bring the catalog up to what was committed before the stop."""
        for name in self.catalog.dataset_names():
            with versions.locked(self.root, name):
                versions.recover(self.root, self.catalog, name)
                versions.recover_quarantine(self.root, self.catalog, name)

    def run(self, stop: threading.Event, poll: float = 0.02) -> None:
        """Flush what is due until ``stop``. An error is logged and tried again; nothing leaves the inbox meanwhile."""
        busy: float | None = None
        later: dict[str, float] = {}
        while not stop.wait(poll):
            for dataset in self._due_or_none():
                if later.get(dataset, 0.0) > time.monotonic():
                    continue
                busy = time.monotonic()
                try:
                    self.flush(dataset)
                except Exception as error:
                    log.error("a flush failed and will be tried again", dataset=dataset, exc_info=error)
                    later[dataset] = time.monotonic() + _RETRY_SECONDS
            if busy is not None and time.monotonic() - busy > _REST_SECONDS:
                # Flushes come in a row: what one held the next takes over, and after the last it goes back.
                pa.default_memory_pool().release_unused()
                busy = None

    def _due_or_none(self) -> list[str]:
        try:
            return self.due()
        except (sqlite3.Error, SQLAlchemyError, OSError) as error:
            log.error("the inbox cannot be looked at; trying again", exc_info=error)
            return []

    def due(self) -> list[str]:
        """Datasets whose part of the inbox is large or old enough."""
        marks = self.catalog.marks() if (pending := self.reader.pending()) else {}
        ripe = time.time() - number("flush_age_s")
        return [
            p.dataset
            for p in pending
            if p.last_seq > marks.get(p.dataset, 0) and (p.oldest_at <= ripe or p.bytes >= integer("flush_bytes"))
        ]

    def flush(self, dataset: str) -> Version | None:
        """Commit what the inbox holds of ``dataset``, up to ``flush_batch_bytes``. None if no row was added."""
        with versions.locked(self.root, dataset):
            versions.recover(self.root, self.catalog, dataset)
            entries = self.reader.take(dataset, self.catalog.mark(dataset), integer("flush_batch_bytes"))
            if not entries:
                return None
            self.catalog.create_dataset(dataset)
            version = self._commit(dataset, entries)
        self.on_commit(dataset, entries[-1].seq)
        return version

    def flush_all(self, dataset: str) -> None:
        """Flush until nothing that had arrived before the call is pending."""
        last = max((p.last_seq for p in self.reader.pending() if p.dataset == dataset), default=0)
        while self.catalog.mark(dataset) < last:
            self.flush(dataset)

    def _commit(self, dataset: str, entries: Sequence[Entry]) -> Version | None:
        latest = self.catalog.latest(dataset)
        stored = reading.schema_of(self.catalog, latest)
        gathered = arrivals.gather(entries, lambda entry: entry.body, arrivals.user_schema(stored))
        last = entries[-1].seq
        self._quarantine(dataset, gathered.refused, last)
        if not gathered.batches:
            self.catalog.set_mark(dataset, last)
            return None
        schema = pa.schema([*gathered.schema, *SYSTEM])
        batches = [reading.conform(batch, schema) for batch in gathered.batches]
        about = versions.About("flush", inbox_seq=last)
        retyped = stored is not None and any(name in stored.names for name in gathered.widened)
        make = versions.rewrite if retyped else versions.append
        return make(self.root, self.catalog, dataset, batches, schema, about, APP)

    def _quarantine(self, dataset: str, refused: Sequence[dict[str, Any]], last: int) -> None:
        done = versions.quarantined_upto(self.root, dataset, APP)
        rows = [{key: value for key, value in row.items() if key != "seq"} for row in refused if row["seq"] > done]
        if rows:
            held = quarantine.refused(rows, "inbox", "schema", datetime.now(UTC))
            versions.quarantine_rows(self.root, self.catalog, dataset, [held], "inbox", (APP, last))
