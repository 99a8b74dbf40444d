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

Data files are flushed first, then the commit (see ``log.py``). delta-rs reads the table, makes checkpoints, and reads
back what was committed. It flushes nothing and checks neither files nor types, so the log's lines are written here.
"""

from __future__ import annotations

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
from headrace.store.log import META, Commit, DataFile, Log
from headrace.store.parquet import write_file
from headrace.store.types import to_stored, true_schema, type_text

__all__ = ["CHECKPOINT_COMMITS", "Commit", "DataFile", "Table"]

CHECKPOINT_COMMITS = 50
_TRIES = 200
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
        self._handle: DeltaTable | None = None
        self._recovered = False
        self._live: dict[str, DataFile] = {}
        self._replayed = -1

    def exists(self) -> bool:
        """Whether a first commit stands."""
        return self.version is not None

    @property
    def version(self) -> int | None:
        """The newest Delta version, or None before the first commit."""
        with self._lock:
            handle = self._open()
            return None if handle is None else int(handle.version())

    def schema(self) -> pa.Schema:
        """The stored schema, with true types in field metadata. Raises NotFound without a table."""
        with self._lock:
            return self._schema(self._present())

    def file(self, path: str) -> Path:
        """Where a data file lies."""
        return self.path / path

    def files(self, version: int | None = None) -> list[DataFile]:
        """The live files by position of their first row, of the newest or an older Delta version."""
        with self._lock:
            newest = int(self._present().version())
            if version is not None and not 0 <= version <= newest:
                raise NotFound(f"the table has no Delta version {version}", hint=f"the newest is {newest}")
            live = self._replay(newest) if version is None else _fold({}, self._log.since(-1, version))
            return sorted(live.values(), key=lambda file: (file.start, file.path))

    def transaction(self, app_id: str) -> int | None:
        """The newest transaction version committed for ``app_id``."""
        with self._lock:
            handle = self._open()
            return None if handle is None else handle.transaction_version(app_id)

    def history(self, since: int = -1) -> list[Commit]:
        """The commits later than Delta version ``since``, oldest first."""
        with self._lock:
            handle = self._open()
            return [] if handle is None else list(self._log.since(since, int(handle.version())))

    def recover(self) -> list[Path]:
        """Move aside commits and checkpoints that a power loss tore. The first use of a Table does this too."""
        with self._lock:
            self._handle, self._live, self._replayed = None, {}, -1
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
                handle = self._open()
                if handle is not None and (done := self._done(handle, change.app)) is not None:
                    return done
                standing = -1 if handle is None else int(handle.version())
                if change.expected is not None and change.expected != standing:
                    raise Conflict(
                        f"the table stands at version {standing}, not {change.expected}", hint="read it again and retry"
                    )
                if handle is not None and standing - self._log.last_checkpoint() >= CHECKPOINT_COMMITS:
                    handle.create_checkpoint()
                    self._log.sync_checkpoint()
                try:
                    text = self._log.write(standing + 1, self._actions(handle, change))
                except FileExistsError:
                    continue
                self._read_back(standing + 1, text, change)
                return standing + 1
        raise Busy("other writers keep committing to this table", hint="retry later", details={"retry_after": 1})

    def _done(self, handle: DeltaTable, app: tuple[str, int] | None) -> int | None:
        """The version that already carries ``app``, made durable; None if it is not committed."""
        if (
            app is None
            or (handle.transaction_version(app[0]) or -1) < app[1]
            or handle.transaction_version(app[0]) is None
        ):
            return None
        found = int(handle.version())
        for version in range(found, -1, -1):
            carried = self._log.read(version).app.get(app[0])
            if carried is not None and carried < app[1]:
                break
            if carried is not None:
                found = version
                if carried == app[1]:
                    break
        self._log.sync(found)
        return found

    def _actions(self, handle: DeltaTable | None, change: _Change) -> list[dict[str, Any]]:
        now = time.time_ns() // 1_000_000
        live = {} if handle is None else self._replay(int(handle.version()))
        added = [file for file in change.files if not (change.replace and file.path in live)]
        again = [file.path for file in (*added, *change.compacted) if file.path in live]
        gone = [path for path in change.removes if path not in live]
        if again or gone:
            text = f"already in the table: {again[:3]}" if again else f"no longer in the table: {gone[:3]}"
            raise Conflict(f"data files are {text}", hint="read the table again and retry")
        kept = {file.path for file in change.files}
        removed = (
            [live[path] for path in live if path not in kept]
            if change.replace
            else [live[path] for path in change.removes]
        )
        mode = "Overwrite" if change.replace else "Append"
        info = {"timestamp": now, "operation": "WRITE", "operationParameters": {"mode": mode}, "engineInfo": "headrace"}
        actions: list[dict[str, Any]] = [{"commitInfo": {**info, META: change.meta}}, *self._shape(handle, change, now)]
        if change.app is not None:
            actions.append({"txn": {"appId": change.app[0], "version": change.app[1], "lastUpdated": now}})
        actions += [file.remove_action(now, data_change=change.replace) for file in removed]
        actions += [file.add_action(now, data_change=False) for file in change.compacted]
        return actions + [file.add_action(now, data_change=True) for file in added]

    def _shape(self, handle: DeltaTable | None, change: _Change, now: int) -> list[dict[str, Any]]:
        """The protocol of a new table, and the schema where it changes."""
        if handle is None:
            protocol: dict[str, Any] = {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}
            return [protocol, _metadata_action(str(uuid.uuid4()), now, _CONFIGURATION, change.schema)]
        if handle.protocol().min_writer_version > 2:
            raise Conflict(
                "another tool upgraded this table to features that are not written here",
                hint="publish to a new dataset",
            )
        before = self._schema(handle)
        after = change.schema if change.replace else _wider(before, change.schema)
        if after.equals(before, check_metadata=True):
            return []
        known = handle.metadata()
        return [_metadata_action(str(known.id), int(known.created_time), dict(known.configuration), after)]

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

    def _open(self) -> DeltaTable | None:
        """The newest snapshot, or None without a table."""
        if not self._recovered:
            self._log.recover()
            self._recovered = True
        try:
            if self._handle is not None:
                self._handle.update_incremental()
            elif self._log.last() is not None:
                self._handle = DeltaTable(str(self.path))
        except DeltaError as error:
            self._handle = None
            raise Damaged(f"table {self.path.name} cannot be opened: {error}", hint="run 'headrace doctor'") from None
        return self._handle

    def _present(self) -> DeltaTable:
        handle = self._open()
        if handle is None:
            raise NotFound(f"table {self.path.name} has no commit yet")
        return handle

    def _schema(self, handle: DeltaTable) -> pa.Schema:
        return to_stored(true_schema(pa.schema(handle.schema().to_arrow())))

    def _replay(self, version: int) -> dict[str, DataFile]:
        """The live files at ``version``, which never runs backwards within one Table."""
        self._live = _fold(self._live, self._log.since(self._replayed, version))
        self._replayed = version
        return self._live

    def _read_back(self, version: int, text: bytes, change: _Change) -> None:
        """Look at the commit through delta-rs, as any other reader will. Raises Damaged if it is not what was meant."""
        same = self.disk.read(self._log.path(version)) == text
        handle = self._open()
        if not same or handle is None or int(handle.version()) < version:
            raise Damaged(f"commit {version} does not read back as it was written", hint="run 'headrace doctor'")
        if int(handle.version()) > version:
            return
        wanted = {file.path for file in (*change.files, *change.compacted)}
        seen = set(pa.table(handle.get_add_actions()).column("path").to_pylist())
        if not wanted <= seen or seen & set(change.removes) or (change.replace and seen != wanted):
            raise Damaged(f"commit {version} does not show the files that it holds", hint="run 'headrace doctor'")
        if change.app is not None and handle.transaction_version(change.app[0]) != change.app[1]:
            raise Damaged(f"commit {version} does not show its transaction", hint="run 'headrace doctor'")


def _fold(live: dict[str, DataFile], commits: Iterable[Commit]) -> dict[str, DataFile]:
    now = dict(live)
    for commit in commits:
        for path in commit.removed:
            now.pop(path, None)
        now.update((file.path, file) for file in commit.added)
    return now


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
