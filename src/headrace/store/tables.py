"""Delta tables on a local disk: one atomic, durable commit per call, exactly once per application transaction.

``Table(path, disk=DISK)``, with ``files`` as ``DataFile(path, rows, bytes, sha256, stats="", start=0, split=None)``:
  ``.exists() -> bool`` · ``.version -> int | None`` (None: no table) · ``.schema() -> Schema`` (stored)
  ``.files(version=None) -> list[DataFile]`` by start · ``.file(path) -> Path`` (absolute)
  ``.write(path, batches, schema, start=0, split=None, row_group_rows=None) -> DataFile``: durable, not yet committed
  ``.create_or_append(files, schema, app=None, meta=None, removes=(), compacted=(), expected=None)``
  ``.overwrite(files, schema, app=None, meta=None, expected=None)``: both give the Delta version
  ``.transaction(app_id) -> int | None`` · ``.history(since=-1) -> list[Commit]``: later than ``since``, oldest first
  ``.recover() -> list[Path]``: what an interrupted commit left behind, moved aside
``Commit(version, timestamp_ms, app, meta, added, removed)``: ``app`` is {app_id: version}, ``meta`` the dict given

Data files are flushed first, then the commit (see ``log.py``). delta-rs flushes nothing and checks neither files nor
types, so the log's lines are written and read here; it makes the checkpoints, and it reads back what other readers will
see, whenever the schema or the whole table changes and at each checkpoint (more would slow commits down as files grow).
"""

from __future__ import annotations

import functools
import json
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import DeltaError

from headrace.errors import BadRequest, Busy, Conflict, Damaged, NotFound
from headrace.store.disk import DISK, Disk
from headrace.store.log import META, Commit, DataFile, Log, State
from headrace.store.parquet import write_file
from headrace.store.types import to_stored, true_schema, type_text

__all__ = ["CHECKPOINT_COMMITS", "Commit", "DataFile", "Table"]

CHECKPOINT_COMMITS = 50
_TRIES = 200
_DOCTOR = "run 'headrace doctor'"
_CONFIGURATION = {
    "delta.checkpointInterval": str(CHECKPOINT_COMMITS),
    "delta.enableExpiredLogCleanup": "false",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
}


@dataclass(frozen=True, slots=True)
class _Change:
    """What one commit is asked to do, independent of the version it will stand on."""

    files: tuple[DataFile, ...]
    schema: pa.Schema
    app: tuple[str, int] | None
    meta: str
    removes: tuple[str, ...] = ()
    compacted: tuple[DataFile, ...] = ()
    expected: int | None = None
    replace: bool = False


class Table:
    """One Delta table. Safe for several threads and processes: a commit that loses a race looks again and retries."""

    def __init__(self, path: Path | str, disk: Disk = DISK) -> None:
        self.path = Path(path).absolute()
        self.disk = disk
        self._log = Log(self.path, disk)
        self._lock = threading.Lock()
        self._state: State | None = None
        self._recovered = False
        self._checkpoint = -1

    def exists(self) -> bool:
        """Whether a first commit stands."""
        return self.version is not None

    @property
    def version(self) -> int | None:
        """The newest Delta version, or None before the first commit."""
        with self._lock:
            state = self._open()
            return None if state is None else state.version

    def schema(self) -> pa.Schema:
        """The stored schema, with true types in field metadata. Raises NotFound without a table."""
        with self._lock:
            return _schema(self._present())

    def file(self, path: str) -> Path:
        """Where a data file lies."""
        return self.path / path

    def files(self, version: int | None = None) -> list[DataFile]:
        """The live files by position of their first row, of the newest or an older Delta version."""
        with self._lock:
            state = self._present()
            if version is not None and not 0 <= version <= state.version:
                raise NotFound(f"the table has no Delta version {version}", hint=f"the newest is {state.version}")
            if version is not None:
                state = functools.reduce(State.after, self._log.since(-1, version), State())
            return sorted(state.live.values(), key=lambda file: (file.start, file.path))

    def transaction(self, app_id: str) -> int | None:
        """The newest transaction version committed for ``app_id``."""
        with self._lock:
            state = self._open()
            return None if state is None else state.app.get(app_id)

    def history(self, since: int = -1) -> list[Commit]:
        """The commits later than Delta version ``since``, oldest first."""
        with self._lock:
            state = self._open()
            return [] if state is None else list(self._log.since(since, state.version))

    def recover(self) -> list[Path]:
        """Move aside commits and checkpoints that a power loss tore. The first use of a Table does this too."""
        with self._lock:
            self._state = None
            moved = self._log.recover()
            self._recovered = True
            return moved

    def write(
        self,
        path: str,
        batches: Iterable[pa.RecordBatch],
        schema: pa.Schema,
        start: int = 0,
        split: str | None = None,
        row_group_rows: int | None = None,
    ) -> DataFile:
        """Write a data file below the table, durably; it belongs to the table once committed."""
        empty = DataFile(path, 0, 0, "", start=start, split=split)
        made = write_file(self.file(empty.path), batches, to_stored(schema), row_group_rows, self.disk)
        return DataFile(path, made.rows, made.bytes, made.sha256, made.stats, start, split)

    def create_or_append(
        self,
        files: Sequence[DataFile],
        schema: pa.Schema,
        app: tuple[str, int] | None = None,
        meta: Mapping[str, Any] | None = None,
        removes: Sequence[str] = (),
        compacted: Sequence[DataFile] = (),
        expected: int | None = None,
    ) -> int:
        """Append ``files``, replace ``removes`` by ``compacted`` (the same rows), in one commit; return its version.

        ``app`` already committed at this version or later: nothing happens, the version of that commit is returned.
        New columns of ``schema`` are added; a column of another type raises Conflict, as does a version other than
        ``expected``.
        """
        text = _meta_text(meta)
        change = _Change(tuple(files), to_stored(schema), app, text, tuple(removes), tuple(compacted), expected)
        return self._commit(change)

    def overwrite(
        self,
        files: Sequence[DataFile],
        schema: pa.Schema,
        app: tuple[str, int] | None = None,
        meta: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> int:
        """Make ``files`` and ``schema`` the whole table in one commit; older versions keep theirs. Else as an append.

        Give ``expected``, the version this content was made for, where another writer's append must not be replaced.
        """
        change = _Change(tuple(files), to_stored(schema), app, _meta_text(meta), expected=expected, replace=True)
        return self._commit(change)

    def _commit(self, change: _Change) -> int:
        self._check_files(change)
        with self._lock:
            for _ in range(_TRIES):
                state = self._open() or State()
                if change.app is not None and state.app.get(change.app[0], -1) >= change.app[1]:
                    return self._done(state, change.app)
                if change.expected is not None and change.expected != state.version:
                    message = f"the table stands at version {state.version}, not {change.expected}"
                    raise Conflict(message, hint="read it again and retry")
                if state.version - self._checkpoint >= CHECKPOINT_COMMITS:
                    self._make_checkpoint(state)
                actions = self._actions(state, change)
                try:
                    text = self._log.write(state.version + 1, actions)
                except FileExistsError:
                    continue
                self._read_back(state.version + 1, text)
                return state.version + 1
        raise Busy("other writers keep committing to this table", hint="retry later", details={"retry_after": 1})

    def _make_checkpoint(self, state: State) -> None:
        """Before a commit, not after it: a failure here must not look like one of the commit."""
        self._checkpoint = self._log.last_checkpoint()
        if state.version - self._checkpoint >= CHECKPOINT_COMMITS:
            self._look(state).create_checkpoint()
            self._log.sync_checkpoint()
            self._checkpoint = state.version

    def _done(self, state: State, app: tuple[str, int]) -> int:
        """The version that already carries ``app``, made durable: the oldest commit at or beyond its version."""
        found = state.version
        for version in range(state.version, -1, -1):
            carried = self._log.read(version).app.get(app[0])
            if carried is not None and carried >= app[1]:
                found = version
            if carried is not None and carried <= app[1]:
                break
        self._log.sync(found)
        return found

    def _actions(self, state: State, change: _Change) -> list[dict[str, Any]]:
        now, live = time.time_ns() // 1_000_000, state.live
        added = [file for file in change.files if not (change.replace and file.path in live)]
        again = [file.path for file in (*added, *change.compacted) if file.path in live]
        gone = [path for path in change.removes if path not in live]
        if again or gone:
            text = f"already in the table: {again[:3]}" if again else f"no longer in the table: {gone[:3]}"
            raise Conflict(f"data files are {text}", hint="read the table again and retry")
        kept = {file.path for file in change.files}
        removed = [path for path in live if path not in kept] if change.replace else change.removes
        mode = "Overwrite" if change.replace else "Append"
        info = {"timestamp": now, "operation": "WRITE", "operationParameters": {"mode": mode}, "engineInfo": "headrace"}
        actions: list[dict[str, Any]] = [{"commitInfo": {**info, META: change.meta}}, *_shape(state, change, now)]
        if change.app is not None:
            actions.append({"txn": {"appId": change.app[0], "version": change.app[1], "lastUpdated": now}})
        actions += [live[path].remove_action(now, data_change=change.replace) for path in removed]
        actions += [file.add_action(now, data_change=False) for file in change.compacted]
        return actions + [file.add_action(now, data_change=True) for file in added]

    def _check_files(self, change: _Change) -> None:
        if change.app is not None and change.app[1] < 0:
            raise BadRequest("a transaction's version cannot be negative")
        paths = [file.path for file in (*change.files, *change.compacted)]
        if len(set(paths)) < len(paths):
            raise BadRequest("a data file is given twice in one commit")
        for file in (*change.files, *change.compacted):
            path = self.file(file.path)
            if not path.is_file() or path.stat().st_size != file.bytes:
                raise Damaged(
                    f"data file {file.path} is missing or does not have {file.bytes} bytes", hint="write it again"
                )

    def _open(self) -> State | None:
        """The newest state, or None without a table."""
        if not self._recovered:
            self._log.recover()
            self._recovered = True
        known = self._state
        if known is None or not self._log.path(known.version).exists():
            state = self._log.load()
        else:
            state = self._log.advance(known)
        self._state = None if state.version < 0 else state
        return self._state

    def _present(self) -> State:
        state = self._open()
        if state is None:
            raise NotFound(f"table {self.path.name} has no commit yet")
        return state

    def _read_back(self, version: int, text: bytes) -> None:
        """Raise Damaged unless the commit stands as it was meant, here and for any other reader."""
        before = self._state.table if self._state else None
        same = self.disk.read(self._log.path(version)) == text
        state = self._open()
        if not same or state is None or state.version < version:
            raise Damaged(f"commit {version} does not read back as it was written", hint=_DOCTOR)
        if state.table != before or version % CHECKPOINT_COMMITS == 0:
            self._look(state)

    def _look(self, state: State) -> DeltaTable:
        """The table as delta-rs sees it. Raises Damaged if its files, columns or transactions differ from ``state``."""
        try:
            handle = DeltaTable(str(self.path), version=state.version)
            seen = set(pa.table(handle.get_add_actions()).column("path").to_pylist())
            columns = pa.schema(handle.schema().to_arrow())
        except DeltaError as error:
            raise Damaged(f"table {self.path.name} cannot be opened: {error}", hint=_DOCTOR) from None
        txns = all(handle.transaction_version(app) == version for app, version in list(state.app.items())[-16:])
        if seen != set(state.live) or not txns or not columns.equals(_schema(state)):
            raise Damaged(
                f"version {state.version} of {self.path.name} reads otherwise than it was written", hint=_DOCTOR
            )
        return handle


def _schema(state: State) -> pa.Schema:
    return to_stored(true_schema(pa.schema(DeltaSchema.from_json(state.table["schemaString"]).to_arrow())))


def _shape(state: State, change: _Change, now: int) -> list[dict[str, Any]]:
    """The protocol of a new table, and the schema where it changes."""
    if state.version < 0:
        protocol: dict[str, Any] = {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}
        return [protocol, _metadata_action(str(uuid.uuid4()), now, _CONFIGURATION, change.schema)]
    if state.protocol["minWriterVersion"] > 2:
        message = "another tool upgraded this table to features that are not written here"
        raise Conflict(message, hint="publish to a new dataset")
    before = _schema(state)
    after = change.schema if change.replace else _wider(before, change.schema)
    if after.equals(before, check_metadata=True):
        return []
    known = state.table
    return [_metadata_action(known["id"], known.get("createdTime") or now, known.get("configuration") or {}, after)]


def _meta_text(meta: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(meta or {}), separators=(",", ":"), sort_keys=True)


def _metadata_action(
    table_id: str, created_ms: int, configuration: Mapping[str, str], schema: pa.Schema
) -> dict[str, Any]:
    text = DeltaSchema.from_arrow(schema).to_json()
    body = {
        "id": table_id,
        "format": {"provider": "parquet", "options": {}},
        "schemaString": text,
        "partitionColumns": [],
    }
    return {"metaData": {**body, "configuration": dict(configuration), "createdTime": created_ms}}


def _wider(before: pa.Schema, given: pa.Schema) -> pa.Schema:
    """``before`` with the new columns of ``given`` at its end; raises Conflict for a column of another true type."""
    known = true_schema(before)
    fields = list(before)
    for field, true in zip(given, true_schema(given), strict=True):
        at = known.get_field_index(field.name)
        if at < 0:
            fields.append(field)
        elif known.field(at).type != true.type:
            was, now = type_text(known.field(at).type), type_text(true.type)
            raise Conflict(
                f"column {field.name!r} is {was} in the table and {now} here",
                hint="cast the column, or overwrite the table",
            )
    return to_stored(pa.schema(fields))
