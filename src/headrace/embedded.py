"""An exchange within this process: the same methods as a remote one, over the root's files, with threads as workers."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace import arrivals
from headrace.client.connect import RemoteSession
from headrace.client.payload import Content, read_chunks
from headrace.client.session import Session
from headrace.collect.formats import format_of_type
from headrace.errors import BadRequest, Conflict, NotFound
from headrace.exchange import Exchange
from headrace.flush import Flusher
from headrace.govern import OWNER
from headrace.inbox import Inbox, Upload
from headrace.intake import Intake
from headrace.lazy import load
from headrace.lock import RootLock
from headrace.model import (
    ColumnTag,
    Dataset,
    Diff,
    FileEntry,
    Manifest,
    Policy,
    Quarantined,
    Receipt,
    Ref,
    Run,
    Token,
    TracedRow,
    Version,
)
from headrace.root import Root


def open_session(path: Path) -> Session:
    """The exchange at ``path``: embedded here, or the live server that owns it. Conflict if a program holds it."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    root = Root.at(path)
    try:
        lock = RootLock(root.lock)
    except Conflict as error:
        url, secret = error.details.get("url"), root.keys / "owner"
        if url and secret.exists():
            return RemoteSession(url, secret.read_text())
        raise
    return EmbeddedSession(root, lock)


class EmbeddedSession(Session):
    """Owns the root while it is open: flushes what is uploaded, and executes runs, in threads of this process."""

    def __init__(self, root: Root, lock: RootLock) -> None:
        self._root, self._lock, self._closed = root, lock, False
        self._inbox = Inbox(root.path)
        self._opened = Exchange(root)
        self._flusher = Flusher(root, self._opened.catalog, self._opened.reader, self._inbox.forget)
        self._flusher.recover()
        self._loop: Any = None
        self._stop = threading.Event()
        self._flushing = threading.Thread(target=self._flusher.run, args=(self._stop,), name="flusher", daemon=True)
        self._flushing.start()
        self._running: threading.Thread | None = None
        if any(run.status in ("queued", "running") for run in self._exchange.catalog.runs(1000)):
            self._work()

    @property
    def _exchange(self) -> Exchange:
        if self._closed:
            raise BadRequest("this exchange was closed", hint="open it again with headrace.connect")
        return self._opened

    def close(self) -> None:
        """Commit what was uploaded, finish, and let the root go."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        self._flushing.join()
        if self._running is not None:
            self._running.join()
        for pending in self._opened.reader.pending():
            self._flusher.flush_all(pending.dataset)
        if self._loop is not None:
            self._loop.close()
        self._inbox.close()
        self._opened.close()
        self._lock.release()

    def __repr__(self) -> str:
        return f"<Headrace exchange at {self._root.path}>"

    def _work(self) -> None:
        if self._running is None:
            # The engine's libraries take a second to load: only those who run recipes wait for them.
            engine = load("headrace.pipeline.run").Engine(self._root, self._exchange.catalog, self._flusher)
            self._loop = load("headrace.pipeline.durable").RunLoop(engine)
            self._running = threading.Thread(target=self._loop.run, args=(self._stop,), name="runs", daemon=True)
            self._running.start()

    def _upload(
        self,
        dataset: str,
        body: Content,
        content_type: str,
        encoding: str | None,
        key: str | None,
        idempotency_key: str | None,
    ) -> Receipt:
        self._exchange.admit(OWNER, dataset, key, idempotency_key)
        hashed = None if idempotency_key is None else key or ""
        form = format_of_type(content_type)
        known = partial(arrivals.columns_of, self._exchange.catalog, dataset)
        intake = Intake(self._inbox, form, encoding or "", strict=False, hashed=hashed, schema=known)
        try:
            for chunk in _chunks(body):
                intake.feed([chunk])
            judged = intake.finish()
        except BaseException:
            intake.abandon()
            raise
        self._exchange.make_known(dataset)
        upload = Upload(
            dataset, judged.format, judged.rows, judged.body, idempotency_key, key,
            judged.rejected, judged.errors, judged.body_sha,
        )  # fmt: skip
        return self._inbox.append(upload).result()

    def _get_data(self, limit: int | None, offset: int) -> Iterator[bytes]:
        return self._exchange.get_data(OWNER, limit, offset).chunks

    def _dataset(self, name: str) -> Dataset:
        return self._exchange.dataset(OWNER, name)

    def _versions(self, name: str, limit: int, page_token: str | None) -> tuple[list[Version], str | None]:
        return self._exchange.versions(OWNER, name, limit, page_token)

    def _version(self, ref: Ref) -> Version:
        return self._exchange.version(OWNER, ref)

    def _tag(self, ref: Ref, name: str) -> Version:
        return self._exchange.tag(OWNER, ref, name)

    def _diff(self, base: Ref, other: Ref) -> Diff:
        return self._exchange.diff(OWNER, base, other)

    def _quarantine(
        self, name: str, rule: str | None, limit: int, page_token: str | None
    ) -> tuple[list[Quarantined], str | None]:
        return self._exchange.quarantine(OWNER, name, rule, limit, page_token)

    def _read(
        self, ref: Ref, columns: Sequence[str] | None, where: str | None, limit: int | None
    ) -> pa.RecordBatchReader:
        reading = self._exchange.read(OWNER, ref, columns, where, limit)
        return pa.RecordBatchReader.from_batches(reading.schema, reading.batches)

    def _trace(
        self,
        ref: Ref,
        *,
        step: int | None,
        seed: int,
        epoch: int,
        batch_size: int,
        world_size: int,
        shuffle: str,
        row: str | None,
        source: str | None,
    ) -> list[TracedRow]:
        return self._exchange.trace(OWNER, ref, step, seed, epoch, batch_size, world_size, shuffle, row, source)

    def _check_recipe(self, text: str, base: str) -> list[dict[str, Any]]:
        return self._exchange.check_recipe(OWNER, text, base)

    def _start_run(self, text: str, base: str) -> Run:
        run = self._exchange.run(OWNER, text, base)
        self._work()
        return run

    def _preview(self, text: str, base: str, rows: int) -> dict[str, Any]:
        self._work()
        return self._exchange.preview(OWNER, text, base, rows)

    def _create_token(self, name: str, role: str, datasets: Sequence[str], days: int | None) -> Token:
        return self._exchange.create_token(OWNER, name, role, datasets, days)

    def _tokenizer(self, ref: Ref) -> bytes:
        return self._exchange.tokenizer(OWNER, ref)

    def datasets(self) -> list[Dataset]:
        """All datasets."""
        return self._exchange.datasets(OWNER)

    def receipt(self, id: str) -> Receipt:
        """What became of an upload; NotFound once it is older than ``receipts_keep_days``."""
        return self._exchange.receipt(OWNER, id)

    def runs(self) -> list[Run]:
        """Runs, the newest first."""
        return self._exchange.runs(OWNER)

    def run_status(self, id: str) -> Run:
        """One run as it stands; NotFound."""
        return self._exchange.run_status(OWNER, id)

    def tokens(self) -> list[Token]:
        """All tokens, without their secrets."""
        return self._exchange.tokens(OWNER)

    def revoke_token(self, id: str) -> None:
        """End a token at once; NotFound."""
        self._exchange.revoke_token(OWNER, id)

    def add_policy(
        self,
        dataset: str,
        subject: str,
        row_filter: str | None = None,
        masks: Mapping[str, str] | None = None,
    ) -> Policy:
        """Hide rows and columns; see ``Session``."""
        return self._exchange.add_policy(OWNER, dataset, subject, row_filter, masks)

    def policies(self, dataset: str | None = None) -> list[Policy]:
        """All policies, or those that match a dataset, oldest first."""
        return self._exchange.policies(OWNER, dataset)

    def policy(self, id: str) -> Policy:
        """One policy; NotFound."""
        return self._exchange.policy(OWNER, id)

    def remove_policy(self, id: str) -> Policy:
        """End a policy, at once; NotFound."""
        return self._exchange.remove_policy(OWNER, id)

    def column_tags(self, dataset: str) -> list[ColumnTag]:
        """The tags of a dataset's columns."""
        return self._exchange.column_tags(OWNER, dataset)

    def tag_column(self, dataset: str, column: str, tag: str) -> list[ColumnTag]:
        """Tag a column; the dataset's tags."""
        return self._exchange.tag_column(OWNER, dataset, column, tag)

    def untag_column(self, dataset: str, column: str, tag: str) -> list[ColumnTag]:
        """Take a tag from a column; the dataset's tags. NotFound."""
        return self._exchange.untag_column(OWNER, dataset, column, tag)

    def _classify(self, ref: Ref, rows: int, apply: bool) -> list[ColumnTag]:
        return self._exchange.classify(OWNER, ref, rows, apply)

    def health(self) -> dict[str, Any]:
        """Whether the exchange can take and give data."""
        return {"status": "ready", **self._exchange.health()}


def _chunks(body: Content) -> Iterator[bytes]:
    if isinstance(body, bytes):
        return iter([body])
    return read_chunks(body) if isinstance(body, Path) else iter(body)


class RootProvider:
    """Manifests and files of a root on this machine, for a feed; reads beside whoever owns the root."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: Exchange | None = None

    @property
    def _exchange(self) -> Exchange:
        # Opened where it is used: a provider may have been pickled, or carried over a fork, before that.
        if self._opened is None:
            self._opened = Exchange(Root.at(self._path))
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_opened": None}

    def manifest(self, ref: str, columns: Sequence[str] | None) -> Manifest:
        """The whole manifest of ``ref``."""
        pages = [self._exchange.manifest(OWNER, Ref.parse(ref), columns)]
        while pages[-1].next_page_token is not None:
            pinned = Ref(pages[0].dataset, str(pages[0].version), pages[0].split)
            pages.append(self._exchange.manifest(OWNER, pinned, columns, pages[-1].next_page_token))
        files = tuple(entry for page in pages for entry in page.files)
        first = pages[0]
        return Manifest(
            first.dataset, first.version, first.fingerprint, first.schema, first.arrow_schema, first.rows,
            first.block_rows, files, first.split,
        )  # fmt: skip

    def fetch(self, entry: FileEntry, into: Path) -> None:
        """Copy the bytes of one data file to ``into``."""
        shutil.copyfile(self._exchange.local_path(OWNER, entry.id), into)

    def trace(self, ref: str, **query: Any) -> list[TracedRow]:
        """The rows of a training step with their sources."""
        return self._exchange.trace(OWNER, Ref.parse(ref), **query)

    def close(self) -> None:
        """Close the catalog."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def open_provider(source: str, token: str | None = None) -> tuple[RootProvider, str]:  # noqa: ARG001
    """The provider of ``ROOT/REF``, and the ref. Raises NotFound if no exchange lies there."""
    path = Path(source).expanduser().absolute()
    if not (path.parent / "catalog.db").exists():
        raise NotFound(f"no exchange lies at {path.parent}", hint="give ROOT/NAME@VERSION, or the URL of an exchange")
    if not path.name:
        raise BadRequest(f"{source!r} names no dataset", hint="give ROOT/NAME@VERSION")
    return RootProvider(path.parent), path.name
