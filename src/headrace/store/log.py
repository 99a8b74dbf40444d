"""The Delta log on a local disk: its commits as values, read, written durably, and repaired after a power loss.

A commit is one file ``_delta_log/N.json`` of one JSON action per line. It is written under another name, flushed, and
only then linked to its own name, which fails if that is taken: a commit is complete, or absent, or another writer's.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.errors import BadRequest, Damaged
from headrace.store.disk import Disk

META = "headrace"
_COMMIT = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint.*\.parquet")
_TEMPORARY = re.compile(r"\.commit-(\d+)-[0-9a-f]+\.tmp")
_DATA_PATH = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class DataFile:
    """One Parquet file of a table: ``path`` below the table's folder, ``start`` the position of its first row."""

    path: str
    rows: int
    bytes: int
    sha256: str
    stats: str = ""
    start: int = 0
    split: str | None = None

    def __post_init__(self) -> None:
        if not _DATA_PATH.fullmatch(self.path):
            raise BadRequest(
                f"{self.path[:80]!r} cannot name a data file", hint="use letters, digits, '.', '_', '-' and '/'"
            )

    def add_action(self, modified_ms: int, data_change: bool) -> dict[str, Any]:
        """The log's line that makes this file part of the table."""
        tags = {f"{META}.sha256": self.sha256, f"{META}.start": str(self.start)}
        if self.split is not None:
            tags[f"{META}.split"] = self.split
        stats = self.stats or json.dumps({"numRecords": self.rows})
        add = {"path": self.path, "partitionValues": {}, "size": self.bytes, "modificationTime": modified_ms}
        return {"add": {**add, "dataChange": data_change, "stats": stats, "tags": tags}}

    def remove_action(self, now_ms: int, data_change: bool) -> dict[str, Any]:
        """The log's line that takes this file out of the table; its bytes stay for older versions."""
        fields = {"path": self.path, "deletionTimestamp": now_ms, "dataChange": data_change}
        return {"remove": {**fields, "extendedFileMetadata": True, "partitionValues": {}, "size": self.bytes}}

    @classmethod
    def from_add(cls, add: Mapping[str, Any]) -> DataFile:
        """The file behind a line of the log, also one that another Delta writer made."""
        tags = add.get("tags") or {}
        stats = add.get("stats") or "{}"
        return cls(
            path=add["path"],
            rows=int(json.loads(stats).get("numRecords", 0)),
            bytes=int(add["size"]),
            sha256=tags.get(f"{META}.sha256", ""),
            stats=stats,
            start=int(tags.get(f"{META}.start", 0)),
            split=tags.get(f"{META}.split"),
        )


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit: its application transactions, the ``meta`` given with it, files added, and paths removed."""

    version: int
    timestamp_ms: int
    app: Mapping[str, int] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    added: tuple[DataFile, ...] = ()
    removed: tuple[str, ...] = ()
    table: Mapping[str, Any] | None = None
    protocol: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A table at one version: live files by path, transactions, the ``metaData`` and ``protocol`` in force."""

    version: int = -1
    live: Mapping[str, DataFile] = field(default_factory=dict)
    app: Mapping[str, int] = field(default_factory=dict)
    table: Mapping[str, Any] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def after(self, commit: Commit) -> State:
        """The state that the next commit makes."""
        live = {path: file for path, file in self.live.items() if path not in commit.removed}
        live.update((file.path, file) for file in commit.added)
        table, protocol = commit.table or self.table, commit.protocol or self.protocol
        return State(commit.version, live, {**self.app, **commit.app}, table, protocol)


def _parse(version: int, text: bytes) -> Commit:
    """Raises ValueError for an empty, torn or alien text."""
    if not text.endswith(b"}\n") and not text.endswith(b"}"):
        raise ValueError("cut off")
    actions = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(action, dict) for action in actions):
        raise ValueError("not a list of actions")
    info: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    return Commit(
        version=version,
        timestamp_ms=int(info.get("timestamp", 0)),
        app={action["txn"]["appId"]: int(action["txn"]["version"]) for action in actions if "txn" in action},
        meta=json.loads(info.get(META) or "{}"),
        added=tuple(DataFile.from_add(action["add"]) for action in actions if "add" in action),
        removed=tuple(action["remove"]["path"] for action in actions if "remove" in action),
        table=next((action["metaData"] for action in actions if "metaData" in action), None),
        protocol=next((action["protocol"] for action in actions if "protocol" in action), None),
    )


def _from_checkpoint(version: int, path: Path) -> State:
    """The state that a checkpoint holds. Maps come from Parquet as lists of pairs."""
    rows = pq.ParquetFile(path).read(columns=["add", "txn", "metaData", "protocol"]).to_pylist()
    adds = [row["add"] for row in rows if row["add"]]
    files = [DataFile.from_add({**add, "tags": dict(add.get("tags") or ())}) for add in adds]
    txns = [row["txn"] for row in rows if row["txn"]]
    table = next(row["metaData"] for row in rows if row["metaData"])
    return State(
        version=version,
        live={file.path: file for file in files},
        app={txn["appId"]: int(txn["version"]) for txn in txns},
        table={**table, "configuration": dict(table.get("configuration") or ())},
        protocol=next(row["protocol"] for row in rows if row["protocol"]),
    )


class Log:
    """The ``_delta_log`` folder of one table."""

    def __init__(self, table: Path, disk: Disk) -> None:
        self.folder = table / "_delta_log"
        self.disk = disk

    def path(self, version: int) -> Path:
        """The file of one commit."""
        return self.folder / f"{version:020d}.json"

    def last(self) -> int | None:
        """The newest commit's version, or None for no table."""
        return max(self._numbers(_COMMIT), default=None)

    def _numbers(self, pattern: re.Pattern[str]) -> list[int]:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [int(found[1]) for name in names if (found := pattern.fullmatch(name))]

    def read(self, version: int) -> Commit:
        """One commit; raises Damaged if it cannot be read."""
        try:
            return _parse(version, self.disk.read(self.path(version)))
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            message = f"commit {version} of {self.folder.parent.name} cannot be read: {error}"
            raise Damaged(message, hint="restore the table's _delta_log from a backup") from None

    def load(self) -> State:
        """The newest state: that of the newest checkpoint, and the commits after it."""
        version = self.last_checkpoint()
        whole = self.folder / f"{version:020d}.checkpoint.parquet"
        return self.advance(_from_checkpoint(version, whole) if whole.is_file() else State())

    def advance(self, state: State) -> State:
        """The state after the commits made since ``state``."""
        while self.path(state.version + 1).exists():
            state = state.after(self.read(state.version + 1))
        return state

    def since(self, version: int, until: int) -> Iterator[Commit]:
        """The commits after ``version`` up to and with ``until``, oldest first."""
        return (self.read(number) for number in range(version + 1, until + 1))

    def write(self, version: int, actions: list[dict[str, Any]]) -> bytes:
        """Commit durably; raises FileExistsError if another writer took this version. Returns the bytes written."""
        text = b"".join(json.dumps(action, separators=(",", ":")).encode() + b"\n" for action in actions)
        self.disk.mkdir(self.folder)
        temporary = self.folder / f".commit-{os.getpid()}-{secrets.token_hex(8)}.tmp"
        try:
            with self.disk.create(temporary) as file:
                self.disk.write(file, text)
                self.disk.sync(file)
            self.disk.link(temporary, self.path(version))
        finally:
            temporary.unlink(missing_ok=True)
        self.disk.sync_folder(self.folder)
        return text

    def sync(self, version: int) -> None:
        """Make a commit durable that was found, not made: its writer may have been stopped before it could."""
        self.disk.sync_path(self.path(version))
        self.disk.sync_folder(self.folder)

    def last_checkpoint(self) -> int:
        """The version of the newest checkpoint, or -1."""
        return max(self._numbers(_CHECKPOINT), default=-1)

    def sync_checkpoint(self) -> None:
        """Make the newest checkpoint durable."""
        for path in self.folder.glob(f"{self.last_checkpoint():020d}.checkpoint*.parquet"):
            self.disk.sync_path(path)
        self.disk.sync_path(self.folder / "_last_checkpoint")
        self.disk.sync_folder(self.folder)

    def recover(self) -> list[Path]:
        """Move aside what a power loss tore: the newest commits if unreadable, and checkpoints. Returns the new names.

        Every acknowledged commit was flushed before, so a torn one was never acknowledged.
        """
        if not self.folder.is_dir():
            return []
        moved = [self._aside(path) for path in self._torn_commits()]
        moved += [self._aside(path) for path in self._torn_checkpoints()]
        for path in self.folder.glob(".commit-*.tmp"):
            if (found := _TEMPORARY.fullmatch(path.name)) and not _alive(int(found[1])):
                self.disk.remove(path)
        if moved:
            self.disk.sync_folder(self.folder)
        return moved

    def _torn_commits(self) -> list[Path]:
        torn: list[Path] = []
        for version in sorted(self._numbers(_COMMIT), reverse=True):
            try:
                _parse(version, self.disk.read(self.path(version)))
                break
            except (ValueError, KeyError, TypeError):
                torn.append(self.path(version))
        return torn

    def _torn_checkpoints(self) -> list[Path]:
        last = self.last()
        torn = []
        for path in self.folder.glob("*.checkpoint*.parquet"):
            found = _CHECKPOINT.fullmatch(path.name)
            if found and (last is None or int(found[1]) > last or not _readable(path)):
                torn.append(path)
        hint = self.folder / "_last_checkpoint"
        if hint.exists():
            try:
                version = int(json.loads(self.disk.read(hint))["version"])
            except (ValueError, KeyError, TypeError):
                version = -1
            whole = [path for path in self.folder.glob(f"{version:020d}.checkpoint*.parquet") if path not in torn]
            torn += [] if whole else [hint]
        return torn

    def _aside(self, path: Path) -> Path:
        name = path.with_name(f".torn-{path.name}-{secrets.token_hex(4)}")
        self.disk.rename(path, name)
        return name


def _readable(path: Path) -> bool:
    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
