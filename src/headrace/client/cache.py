"""A trainer's disk cache: each data file verified once, narrowed to its true types, mapped as one record batch."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import itertools
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace import settings
from headrace.errors import BadData, BadRequest, Busy, Damaged, Forbidden
from headrace.model import SYSTEM_COLUMNS, WIRE, FileEntry, Manifest

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_TRIES = 10
_numbers = itertools.count()


def default_folder() -> Path:
    """``HEADRACE_CACHE_DIR``, else ``~/.cache/headrace``."""
    named = os.environ.get("HEADRACE_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "headrace"


def parse_bytes(text: str | int) -> int:
    """Bytes from ``"50GB"``, ``"512 MiB"`` or a number; raises BadRequest."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise BadRequest(f"{text!r} is not a size", hint="for example 50GB, 512MiB or 1000000")
    return int(float(match[1]) * _UNITS[match[2]])


def true_schema(manifest: Manifest, columns: Sequence[str] | None) -> pa.Schema:
    """The true Arrow types of ``columns`` (None: all user columns) in that order; unknown names raise BadRequest."""
    whole = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(manifest.arrow_schema)))
    if columns is None:
        columns = [name for name in whole.names if name not in SYSTEM_COLUMNS]
    unknown = [name for name in columns if name not in whole.names]
    if unknown or not columns:
        have = ", ".join(whole.names)
        raise BadRequest(f"no column {unknown[0]!r}" if unknown else "no columns are chosen", hint=f"there are: {have}")
    return pa.schema([whole.field(name) for name in columns])


def _narrow(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast to the true type. Values that do not fit raise ArrowInvalid: nothing is cut silently."""
    if array.type == target:
        return array
    if pa.types.is_fixed_size_list(target) and not array.null_count and not pa.types.is_fixed_size_list(array.type):
        lengths = array.value_lengths()
        if len(array) and not (lengths.to_numpy() == target.list_size).all():
            raise pa.ArrowInvalid(f"a list is not of length {target.list_size}")
        return pa.FixedSizeListArray.from_arrays(_narrow(array.flatten(), target.value_type), type=target)
    return array.cast(target)


@dataclass(eq=False)
class Lease:
    """One mapped file. As long as this, or an array over it, lives, no process evicts the file."""

    batch: pa.RecordBatch
    bytes: int
    _map: mmap.mmap


@dataclass(eq=False)
class Cache:
    """Content-addressed files below ``folder`` (mode 0700), at most ``limit`` bytes besides those in use.

    Processes and threads share a folder: an entry is made under a file lock and appears by one rename. A reader holds a
    shared ``flock`` on the entry, which the kernel releases with the mapping, so that a killed process leaves nothing.
    """

    folder: Path = field(default_factory=default_folder)
    limit: int = field(default_factory=lambda: settings.integer("cache_bytes"))
    _own: set[Path] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).expanduser()

    def path(self) -> Path:
        """The folder."""
        return self.folder

    def _part(self, name: str) -> Path:
        part = self.folder / name
        if not part.is_dir():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._assert_own(self.folder)
            self.folder.chmod(0o700)
            part.mkdir(mode=0o700, exist_ok=True)
        if part not in self._own:
            self._assert_own(self.folder)
            self._assert_own(part)
            self._own.add(part)
        return part

    def _assert_own(self, folder: Path) -> None:
        # Entries are verified when they are made, not when they are mapped: nobody else may put any here.
        if folder.stat().st_uid != os.geteuid():
            raise Forbidden(f"the cache folder {folder} belongs to another user", hint="choose another cache_dir")
        if folder.stat().st_mode & 0o022:
            folder.chmod(0o700)

    def key(self, entry: FileEntry, schema: pa.Schema) -> str:
        """The entry's name: a hash of file content, chosen columns with their types, and wire version."""
        typed = schema.remove_metadata().serialize().to_pybytes()
        return hashlib.sha256(f"{WIRE}\n{entry.sha256}\n".encode() + typed).hexdigest()[:40]

    def holds(self, entry: FileEntry, schema: pa.Schema) -> bool:
        """Whether the entry is here now."""
        return (self.folder / "files" / f"{self.key(entry, schema)}.arrow").exists()

    def ensure(self, entry: FileEntry, schema: pa.Schema, fetch: Callable[[FileEntry, Path], None]) -> Path:
        """Make the entry unless it is here. Bytes that differ from size or hash raise Damaged, naming the file."""
        key = self.key(entry, schema)
        final = self._part("files") / f"{key}.arrow"
        if final.exists():
            return final
        with self._locked(key):
            self._sweep(key)
            if not final.exists():
                scratch = self._part("partial") / f"{key}-{os.getpid()}-{next(_numbers)}"
                scratch.mkdir(mode=0o700)
                try:
                    self._convert(entry, schema, fetch, scratch, final)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
        self.evict(keep=final)
        return final

    def open(self, entry: FileEntry, schema: pa.Schema, fetch: Callable[[FileEntry, Path], None]) -> Lease:
        """The entry as one mapped record batch of ``entry.rows`` rows, made first if it is missing."""
        for _ in range(_TRIES):
            path = self.ensure(entry, schema, fetch)
            lease = self._lease(path)
            if lease is None:
                continue  # another process evicted it between the two calls: make it again
            if lease.batch.num_rows == entry.rows and lease.batch.schema.equals(schema):
                return lease
            path.unlink(missing_ok=True)
            raise Damaged(f"cached file {path} does not hold the {entry.rows} rows of {entry.id}", hint="try again")
        raise Busy(f"file {entry.id} was evicted {_TRIES} times before it could be opened", hint="raise cache_limit")

    def _lease(self, path: Path) -> Lease | None:
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if not os.fstat(file.fileno()).st_nlink:
                    return None
                # mmap duplicates the descriptor, so the lock lives until the mapping goes.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        os.utime(path)
        try:
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            return Lease(reader.get_batch(0), len(mapped), mapped)
        except pa.ArrowInvalid as error:
            path.unlink(missing_ok=True)
            raise Damaged(f"cached file {path} is damaged: {error}", hint="it was removed; try again") from error

    @contextmanager
    def _locked(self, key: str, wait: bool = True) -> Iterator[bool]:
        with (self._part("locks") / key).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                # Closing would not do: a child forked meanwhile holds the same open file, and the lock with it.
                fcntl.flock(lock, fcntl.LOCK_UN)

    def _sweep(self, key: str) -> None:
        # The entry's lock is ours, so whoever left these has died.
        for left in self._part("partial").glob(f"{key}-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _convert(
        self, entry: FileEntry, schema: pa.Schema, fetch: Callable[[FileEntry, Path], None], scratch: Path, final: Path
    ) -> None:
        raw, made = scratch / "data.parquet", scratch / "data.arrow"
        fetch(entry, raw)
        with raw.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.sha256:
            size = raw.stat().st_size
            raise Damaged(
                f"file {entry.id} arrived with sha256 {found} ({size} bytes); the manifest says {entry.sha256} "
                f"({entry.bytes} bytes)",
                hint="fetch again; if it repeats, the stored file is damaged",
                details={"file": entry.id, "expected": entry.sha256, "found": found},
            )
        with made.open("wb") as file:
            file.write(self._arrow(entry, schema, raw))
            file.flush()
            os.fsync(file.fileno())
        made.rename(final)
        descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _arrow(self, entry: FileEntry, schema: pa.Schema, raw: Path) -> pa.Buffer:
        try:
            with pq.ParquetFile(raw, memory_map=True) as parquet:
                table = parquet.read(columns=schema.names).combine_chunks()
            if table.num_rows != entry.rows:
                raise Damaged(f"file {entry.id} has {table.num_rows} rows; the manifest says {entry.rows}")
            columns: list[Any] = []
            for wanted in schema:
                chunks = table.column(wanted.name).chunks
                array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks or [pa.nulls(0, wanted.type)])
                columns.append(_narrow(array, wanted.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
            raise BadData(f"file {entry.id} does not hold what its manifest says: {error}") from error
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        return sink.getvalue()

    def _entries(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in (self.folder / "files").glob("*.arrow"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process evicts too
            found.append((stat.st_mtime, stat.st_size, path))
        return sorted(found)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    def evict(self, limit: int | None = None, keep: Path | None = None) -> int:
        """Remove the entries unused for longest until ``limit`` holds, never a leased one; returns bytes removed."""
        limit = self.limit if limit is None else limit
        entries, removed = self._entries(), 0
        over = sum(size for _, size, _ in entries) - limit
        for _, size, path in entries:
            if removed >= over:
                break
            if path != keep and self._remove(path):
                removed += size
        return removed

    def _remove(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except (BlockingIOError, FileNotFoundError):
            return False
        return True

    def clear(self) -> int:
        """Remove every entry not in use and what dead processes left; returns bytes removed."""
        removed = self.evict(limit=0)
        partial = self.folder / "partial"
        for left in list(partial.iterdir()) if partial.is_dir() else []:
            with self._locked(left.name.split("-")[0], wait=False) as ours:
                if ours:
                    shutil.rmtree(left, ignore_errors=True)
        return removed
