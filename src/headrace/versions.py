"""Making versions: rows become files, files one Delta commit, the commit a catalog entry; each may be done again."""

from __future__ import annotations

import fcntl
import json
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace import __version__, quarantine, reading
from headrace.catalog import Catalog, now
from headrace.model import FileEntry, StepCount, Version, from_dict, to_dict
from headrace.root import Root
from headrace.settings import KiB, MiB, integer
from headrace.store.fingerprint import BLOCK_ROWS, Fingerprint
from headrace.store.parquet import read_batches
from headrace.store.tables import DataFile, Table
from headrace.store.types import decode_schema, describe, encode_schema, to_stored

CODE = f"headrace {__version__}"
_TIERS = (32 * MiB, 4 * MiB, 512 * KiB, 64 * KiB)
_TIER_FILES = 8
_LOOK_BACK = 256
_PART_BYTES = 32 * MiB
_tables: dict[Path, Table] = {}
_tables_lock = threading.Lock()


@dataclass(frozen=True)
class About:
    """What a version says of its making, besides its rows."""

    kind: str
    run: str | None = None
    recipe: str | None = None
    inputs: tuple[Mapping[str, Any], ...] = ()
    counts: tuple[StepCount, ...] = ()
    fitted: Mapping[str, Any] = field(default_factory=dict)
    inbox_seq: int = 0
    tag: str | None = None


@contextmanager
def locked(root: Root, dataset: str) -> Iterator[None]:
    """One committer per dataset at a time, in whatever process."""
    path = root.path / "tables" / f".{dataset}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def recover(root: Root, catalog: Catalog, dataset: str) -> None:
    """Bring the catalog up to the table, where a crash came between the Delta commit and its registration."""
    table = table_at(root.table(dataset))
    table.recover()
    if not table.exists():
        return
    latest = catalog.latest(dataset)
    for commit in table.history(latest.delta_version if latest else -1):
        made = (commit.meta or {}).get("version")
        if made is not None and (latest is None or made["version"] > latest.version):
            _register(catalog, commit.meta or {}, commit.version)


def _register(catalog: Catalog, meta: Mapping[str, Any], delta_version: int) -> Version:
    version = replace(from_dict(Version, meta["version"]), delta_version=delta_version)
    catalog.register(
        version,
        [from_dict(FileEntry, entry) for entry in meta["files"]],
        gone=meta["gone"],
        arrow_schema=meta["arrow_schema"],
        fingerprint_state=meta["fingerprint_state"],
        tag=meta["tag"],
    )
    return version


def append(
    root: Root,
    catalog: Catalog,
    dataset: str,
    batches: Sequence[pa.RecordBatch],
    schema: pa.Schema,
    about: About,
    app: str,
) -> Version:
    """Add rows (true types, system columns included) as one version; exactly once per ``about.inbox_seq`` of ``app``.

    Small files at the end of the table are merged in the same commit, without a data change.
    """
    latest = catalog.latest(dataset)
    files = catalog.last_files(dataset, latest.version, _LOOK_BACK) if latest else []
    table, stored = table_at(root.table(dataset)), to_stored(schema)
    hashed = _resume(root, catalog, latest, files)
    hashed.add_columns(schema)
    added = _write_side_by_side(table, batches, stored, latest.rows if latest else 0, hashed)
    merging = _mergeable(files)
    merged = [_write(table, _read(root, dataset, merging, stored), stored, merging[0].start)] if merging else []
    entries = [_entry(made) for made in (*merged, *added)]
    version = _version(dataset, latest, about, hashed, schema, _sizes(latest, entries, merging), _width(batches))
    meta = _meta(version, entries, [entry.id for entry in merging], schema, hashed, about.tag)
    delta = table.create_or_append(
        added, stored, (app, about.inbox_seq), meta,
        removes=[e.path for e in merging], compacted=merged,
    )  # fmt: skip
    return _register(catalog, meta, delta)


def rewrite(
    root: Root,
    catalog: Catalog,
    dataset: str,
    batches: Sequence[pa.RecordBatch],
    schema: pa.Schema,
    about: About,
    app: str,
) -> Version:
    """As ``append``, where the type of a stored column must change: every row is written again under ``schema``."""
    latest = catalog.latest(dataset)
    files = catalog.files(dataset, latest.version) if latest else []
    stored = to_stored(schema)
    old = (reading.conform(batch, stored) for batch in _read(root, dataset, files, None))
    with Writer(root, dataset, schema) as writer:
        for batch in chain(old, batches):
            writer.write(reading.conform(batch, stored))
        writer.finish()
    return publish(catalog, dataset, writer, about, (app, about.inbox_seq))


class Writer:
    """Writes the rows of a coming version into files of about ``file_bytes`` of Arrow data, per split, in row order.

    Rows come in the order of the version; rows of several splits may come mixed, each split keeps its order.
    """

    def __init__(self, root: Root, dataset: str, schema: pa.Schema) -> None:
        self.schema, self.stored = schema, to_stored(schema)
        self.table = table_at(root.table(dataset))
        self._held: dict[str | None, list[pa.RecordBatch]] = {}
        self._bytes: dict[str | None, int] = {}
        self._made: dict[str | None, list[DataFile]] = {}
        self.files: list[DataFile] = []
        self.hashed = Fingerprint(schema)
        self.arrow_bytes = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for made in chain.from_iterable(self._made.values()):
                self.table.file(made.path).unlink(missing_ok=True)

    def write(self, batch: pa.RecordBatch, split: str | None = None) -> None:
        """Take the next rows of a split."""
        size = batch.nbytes
        if split is None:
            self.hashed.update(batch)
        self._held.setdefault(split, []).append(batch)
        self._bytes[split] = self._bytes.get(split, 0) + size
        self.arrow_bytes += size
        if self._bytes[split] >= integer("file_bytes"):
            self._flush(split)

    def _flush(self, split: str | None) -> None:
        batches = self._held.pop(split, [])
        self._bytes[split] = 0
        if batches:
            self._made.setdefault(split, []).append(_write(self.table, batches, self.stored, 0, split))

    def finish(self, splits: Sequence[str] = ()) -> None:
        """Write what is held. Rows stand split by split in a version, so positions are set only now."""
        for split in list(self._held):
            self._flush(split)
        start = 0
        for split in [*splits, *(s for s in self._made if s not in splits)]:
            for made in self._made.get(split, ()):
                self.files.append(replace(made, start=start))
                start += made.rows
        if set(self._made) - {None}:
            # Only now is the order of the rows known: hash them once more from the files.
            self.hashed = Fingerprint(self.schema)
            for batch in read_batches([self.table.file(f.path) for f in self.files], self.stored):
                self.hashed.update(batch)


def publish(catalog: Catalog, dataset: str, writer: Writer, about: About, app: tuple[str, int]) -> Version:
    """Commit what a finished writer holds as the whole content of the next version; exactly once per ``app``."""
    latest = catalog.latest(dataset)
    entries = [_entry(made) for made in writer.files]
    width = writer.arrow_bytes / max(1, sum(entry.rows for entry in entries))
    sizes = _sizes(None, entries, ())
    version = _version(dataset, latest, about, writer.hashed, writer.schema, sizes, width)
    meta = _meta(version, entries, None, writer.schema, writer.hashed, about.tag)
    delta = writer.table.overwrite(writer.files, writer.stored, app, meta)
    return _register(catalog, meta, delta)


def _read(root: Root, dataset: str, files: Sequence[FileEntry], schema: pa.Schema | None) -> Iterator[pa.RecordBatch]:
    return read_batches(reading.paths_of(root, dataset, files), schema, None, integer("batch_rows"))


def _write(
    table: Table, batches: Iterable[pa.RecordBatch], stored: pa.Schema, start: int, split: str | None = None
) -> DataFile:
    return table.write(f"{uuid.uuid4().hex}.parquet", batches, stored, start=start, split=split)


def _write_side_by_side(
    table: Table, batches: Sequence[pa.RecordBatch], stored: pa.Schema, start: int, hashed: Fingerprint
) -> list[DataFile]:
    """One file, or where there is much to write one per thread, in row order; the rows are hashed meanwhile."""
    parts = min(integer("threads"), 1 + sum(batch.nbytes for batch in batches) // _PART_BYTES, len(batches))
    size = -(-len(batches) // parts)
    groups = [batches[at : at + size] for at in range(0, len(batches), size)]
    starts = [start, *(start + rows for rows in accumulate(sum(b.num_rows for b in group) for group in groups))]
    with ThreadPoolExecutor(len(groups)) as pool:
        writing = [pool.submit(_write, table, group, stored, at) for group, at in zip(groups, starts, strict=False)]
        for batch in batches:
            hashed.update(batch)
        return [one.result() for one in writing]


def _entry(made: DataFile) -> FileEntry:
    return FileEntry(Path(made.path).stem, made.rows, made.bytes, made.sha256, made.start, made.path, made.split)


def table_at(path: Path) -> Table:
    """The Delta table below ``path``; one handle per process, as opening one reads its log."""
    with _tables_lock:
        return _tables.setdefault(path, Table(path))


def _mergeable(files: Sequence[FileEntry]) -> list[FileEntry]:
    """The small files at the table's end that are due for merging: eight of one size class become one of the next."""
    for tier in _TIERS:
        run: list[FileEntry] = []
        for entry in reversed(files):
            if entry.bytes >= tier or entry.split is not None:
                break
            run.append(entry)
        if len(run) >= _TIER_FILES and (tier == _TIERS[-1] or sum(e.bytes for e in run) >= tier):
            return run[::-1]
    return []


def _resume(root: Root, catalog: Catalog, latest: Version | None, files: Sequence[FileEntry]) -> Fingerprint:
    if latest is None:
        return Fingerprint()
    state = json.loads(catalog.details(latest.dataset, latest.version)[1])
    before = to_stored(decode_schema(catalog.details(latest.dataset, latest.version)[0]))
    tail = int(state["rows"]) % BLOCK_ROWS
    if not tail:
        return Fingerprint.resume(state, ())
    if latest.rows - tail < files[0].start:
        files = catalog.files(latest.dataset, latest.version)
    skip = latest.rows - tail - files[0].start
    return Fingerprint.resume(state, read_batches(reading.paths_of(root, latest.dataset, files), before, skip=skip))


def _width(batches: Sequence[pa.RecordBatch]) -> float:
    return float(sum(batch.nbytes for batch in batches) / max(1, sum(batch.num_rows for batch in batches)))


@dataclass(frozen=True)
class _Sizes:
    rows: int
    bytes: int
    files: int
    splits: Mapping[str, int]


def _sizes(before: Version | None, added: Sequence[FileEntry], gone: Sequence[FileEntry]) -> _Sizes:
    """The sizes of a version: those of the one before with files added and others gone, without a look at the rest."""
    splits = dict(before.splits) if before else {}
    for entry in added:
        if entry.split is not None:
            splits[entry.split] = splits.get(entry.split, 0) + entry.rows
    return _Sizes(
        (before.rows if before else 0) + sum(e.rows for e in added) - sum(e.rows for e in gone),
        (before.bytes if before else 0) + sum(e.bytes for e in added) - sum(e.bytes for e in gone),
        (before.files if before else 0) + len(added) - len(gone),
        splits,
    )


def _version(
    dataset: str,
    latest: Version | None,
    about: About,
    hashed: Fingerprint,
    schema: pa.Schema,
    sizes: _Sizes,
    width: float,
) -> Version:
    return Version(
        dataset=dataset,
        version=latest.version + 1 if latest else 0,
        created_at=now(),
        kind=about.kind,
        rows=sizes.rows,
        bytes=sizes.bytes,
        files=sizes.files,
        fingerprint=hashed.digest(),
        schema=describe(schema),
        block_rows=reading.block_rows(width),
        delta_version=-1,
        splits=sizes.splits,
        run=about.run,
        recipe=about.recipe,
        inputs=about.inputs,
        counts=about.counts,
        fitted=about.fitted,
        code=CODE,
        inbox_seq=about.inbox_seq,
    )


def _meta(
    version: Version,
    files: Sequence[FileEntry],
    gone: list[str] | None,
    schema: pa.Schema,
    hashed: Fingerprint,
    tag: str | None,
) -> dict[str, Any]:
    return {
        "version": to_dict(version),
        "files": [to_dict(entry) for entry in files],
        "gone": gone,
        "arrow_schema": encode_schema(schema),
        "fingerprint_state": json.dumps(hashed.state()),
        "tag": tag,
    }


def quarantine_rows(
    root: Root, catalog: Catalog, dataset: str, batches: Sequence[pa.RecordBatch], run: str, app: tuple[str, int]
) -> int:
    """Add quarantine rows, once per ``app`` (application id, number). Returns how many rows were added."""
    table = table_at(root.quarantine(dataset))
    done = table.transaction(app[0])
    if done is not None and done >= app[1]:
        recover_quarantine(root, catalog, dataset)
        return 0
    rules = quarantine.rules_of(batches)
    if not rules:
        return 0
    name = f"part-{uuid.uuid4().hex}.parquet"
    file = table.write(name, batches, quarantine.SCHEMA)
    table.create_or_append([file], quarantine.SCHEMA, app, {"quarantine": {"path": name, "run": run, "rules": rules}})
    catalog.add_quarantine(dataset, name, run, rules)
    return int(file.rows)


def recover_quarantine(root: Root, catalog: Catalog, dataset: str) -> None:
    """Bring the catalog up to the table: a crash may have come between their two commits."""
    table = table_at(root.quarantine(dataset))
    if not table.exists():
        return
    known = {path for _, path, _, _, _ in catalog.quarantine_files(dataset)}
    for commit in table.history():
        entry = commit.meta.get("quarantine") if commit.meta else None
        if entry and entry["path"] not in known:
            catalog.add_quarantine(dataset, entry["path"], entry["run"], entry["rules"])


def quarantined_upto(root: Root, dataset: str, app_id: str) -> int:
    """The last number committed under an application id; -1 before the first."""
    done = table_at(root.quarantine(dataset)).transaction(app_id)
    return -1 if done is None else done
