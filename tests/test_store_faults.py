"""Every step on the disk fails once, and the power fails at every step: a table is as before, or as meant."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import deltalake
import pyarrow as pa
import pytest

from headrace.errors import Damaged
from headrace.store import types
from headrace.store.disk import Disk
from headrace.store.parquet import read_batches, write_file
from headrace.store.tables import CHECKPOINT_COMMITS, Table

SCHEMA = pa.schema([("id", pa.int64()), ("tokens", pa.list_(pa.uint16()))])
WIDER = SCHEMA.append(pa.field("extra", pa.string()))


class DiskFailure(OSError):
    """What a failing device answers."""


class FaultyDisk(Disk):
    """A real disk that fails at step ``fail_at`` and, if ``dead``, at every later one; a failing write writes a half.

    It keeps count of what a power loss would take: files not flushed, and names whose folder was not flushed.
    """

    def __init__(self, fail_at: int = -1, dead: bool = False) -> None:
        self.fail_at = fail_at
        self.dead = dead
        self.steps = 0
        self.done: list[tuple[str, Path]] = []
        self.loose_bytes: set[Path] = set()
        self.loose_names: set[Path] = set()
        self._paths: dict[int, Path] = {}

    def _step(self, what: str, path: Path) -> None:
        at = self.steps
        self.steps += 1
        if at == self.fail_at or (self.dead and at > self.fail_at >= 0):
            raise DiskFailure(5, f"step {at} failed: {what} {path.name}")
        self.done.append((what, path))

    def mkdir(self, path: Path) -> None:
        self._step("mkdir", path)
        super().mkdir(path)

    def create(self, path: Path) -> IO[bytes]:
        self._step("create", path)
        file = super().create(path)
        self._paths[file.fileno()] = path
        self.loose_bytes.add(path)
        self.loose_names.add(path)
        return file

    def write(self, file: IO[bytes], data: bytes | memoryview) -> int:
        try:
            self._step("write", self._paths[file.fileno()])
        except DiskFailure:
            file.write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            raise
        return super().write(file, data)

    def sync(self, file: IO[bytes]) -> None:
        path = self._paths[file.fileno()]
        self._step("sync", path)
        super().sync(file)
        self.loose_bytes.discard(path)

    def sync_path(self, path: Path) -> None:
        self._step("sync", path)
        super().sync_path(path)
        self.loose_bytes.discard(path)

    def sync_folder(self, path: Path) -> None:
        self._step("sync_folder", path)
        super().sync_folder(path)
        self.loose_names -= {name for name in self.loose_names if name.parent == path}

    def link(self, source: Path, target: Path) -> None:
        self._step("link", target)
        super().link(source, target)
        self.loose_names.add(target)
        if source in self.loose_bytes:
            self.loose_bytes.add(target)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        super().remove(path)

    def read(self, path: Path) -> bytes:
        self._step("read", path)
        return super().read(path)

    def lose_power(self, names_too: bool) -> None:
        """Empty what was not flushed; with ``names_too`` also forget the names that were not."""
        for path in self.loose_bytes:
            if path.exists():
                os.truncate(path, 0)
        for path in self.loose_names if names_too else ():
            path.unlink(missing_ok=True)


def batch(first: int, count: int, schema: pa.Schema = SCHEMA) -> pa.RecordBatch:
    made = [{"id": i, "tokens": [i % 65536, 65535], "extra": "x"} for i in range(first, first + count)]
    return pa.RecordBatch.from_pylist([{name: row[name] for name in schema.names} for row in made], schema=schema)


def ids(path: Path) -> list[int]:
    """The ids that a fresh look at the table gives, the same for us and for plain readers; empty without a table."""
    table = Table(path)
    if not table.exists():
        return []
    paths = [table.file(file.path) for file in table.files()]
    ours = [i for part in read_batches(paths, table.schema(), ["id"]) for i in part["id"].to_pylist()]
    assert sorted(deltalake.DeltaTable(str(path)).to_pyarrow_table(columns=["id"])["id"].to_pylist()) == sorted(ours)
    return ours


@functools.cache
def template() -> Path:
    path = Path(tempfile.mkdtemp(prefix="headrace-store-")) / "t"
    atexit.register(shutil.rmtree, path.parent)
    table = Table(path)
    for k in range(2):
        file = table.write(f"old-{k}.parquet", [batch(k * 2, 2)], SCHEMA, start=k * 2)
        table.create_or_append([file], SCHEMA, ("inbox", k))
    return path


def start(path: Path) -> None:
    """A table of two files and two commits."""
    shutil.copytree(template(), path)


Job = Callable[[Path, Disk], int]


def create(path: Path, disk: Disk) -> int:
    table = Table(path, disk)
    return table.create_or_append([table.write("new.parquet", [batch(0, 3)], SCHEMA)], SCHEMA, ("inbox", 9))


def append(path: Path, disk: Disk) -> int:
    table = Table(path, disk)
    file = table.write("new.parquet", [batch(4, 3, WIDER)], WIDER, start=4)
    return table.create_or_append([file], WIDER, ("inbox", 9), {"why": "test"})


def compact(path: Path, disk: Disk) -> int:
    table = Table(path, disk)
    old = ["old-0.parquet", "old-1.parquet"]
    merged = table.write("merged.parquet", read_batches([table.file(name) for name in old]), SCHEMA)
    fresh = table.write("new.parquet", [batch(4, 1)], SCHEMA, start=4)
    return table.create_or_append([fresh], SCHEMA, ("inbox", 9), removes=old, compacted=[merged])


def overwrite(path: Path, disk: Disk) -> int:
    table = Table(path, disk)
    other = pa.record_batch([pa.array([70, 71], pa.uint16())], names=["id"])
    return table.overwrite([table.write("new.parquet", [other], other.schema)], other.schema, ("inbox", 9))


OLD = [0, 1, 2, 3]
JOBS = [
    pytest.param(create, [], [0, 1, 2], id="create"),
    pytest.param(append, OLD, [*OLD, 4, 5, 6], id="append"),
    pytest.param(compact, OLD, [*OLD, 4], id="compact"),
    pytest.param(overwrite, OLD, [70, 71], id="overwrite"),
]


def steps_of(job: Job, path: Path, old: list[int]) -> FaultyDisk:
    if old:
        start(path)
    disk = FaultyDisk()
    job(path, disk)
    return disk


@pytest.mark.parametrize(("job", "old", "new"), JOBS)
def test_after_any_failed_step_the_table_is_old_or_new_and_a_retry_finishes_once(
    tmp_path: Path, job: Job, old: list[int], new: list[int]
) -> None:
    count = steps_of(job, tmp_path / "count", old).steps
    assert count > 8
    for fail_at in range(count):
        path = tmp_path / str(fail_at)
        if old:
            start(path)
        with pytest.raises(DiskFailure):
            job(path, FaultyDisk(fail_at))
        seen = ids(path)
        assert seen in (old, new)
        version = job(path, Disk())
        assert ids(path) == new
        assert Table(path).version == version == (2 if old else 0)
        assert not list((path / "_delta_log").glob(".commit-*"))


@pytest.mark.parametrize("names_too", [False, True])
@pytest.mark.parametrize(("job", "old", "new"), JOBS)
def test_after_a_power_loss_at_any_step_the_table_is_old_or_new(
    tmp_path: Path, job: Job, old: list[int], new: list[int], names_too: bool
) -> None:
    whole = steps_of(job, tmp_path / "count", old)
    whole.lose_power(names_too)
    assert ids(tmp_path / "count") == new, "an acknowledged commit survives a power loss"
    for fail_at in range(whole.steps):
        path = tmp_path / str(fail_at)
        if old:
            start(path)
        disk = FaultyDisk(fail_at, dead=True)
        with pytest.raises(DiskFailure):
            job(path, disk)
        disk.lose_power(names_too)
        assert ids(path) in (old, new)
        job(path, Disk())
        assert ids(path) == new


def test_a_commit_is_flushed_in_the_order_that_keeps_it_whole(tmp_path: Path) -> None:
    disk = steps_of(append, tmp_path / "t", OLD)
    done = [(what, path.name if what != "sync_folder" else path.name + "/") for what, path in disk.done]
    log = "00000000000000000002.json"
    data = done.index(("sync", "new.parquet"))
    linked = done.index(("link", log))
    assert data < done.index(("sync_folder", "t/"), data) < linked < done.index(("sync_folder", "_delta_log/"), linked)
    assert any(what == "sync" and name.startswith(".commit-") for what, name in done[data + 1 : linked])
    assert not disk.loose_bytes - {path for path in disk.loose_bytes if not path.exists()}
    assert not [path for path in disk.loose_names if path.exists()]


def test_a_transaction_found_after_a_failed_flush_is_flushed_before_it_is_confirmed(tmp_path: Path) -> None:
    whole = steps_of(append, tmp_path / "count", OLD)
    last_flush = max(at for at, (what, _) in enumerate(whole.done) if what == "sync_folder")
    start(tmp_path / "t")
    with pytest.raises(DiskFailure):
        append(tmp_path / "t", FaultyDisk(last_flush))
    disk = FaultyDisk()
    assert append(tmp_path / "t", disk) == 2
    log = tmp_path / "t/_delta_log"
    assert disk.done[-2:] == [("sync", log / "00000000000000000002.json"), ("sync_folder", log)]


@pytest.mark.parametrize(
    "torn", [b"", b'{"commitInfo":{"times', b'{"commitInfo":{}}\n{"add":{"pa', b"\0" * 300, b"[1]\n", b"{}\n[]}\n"]
)
def test_a_torn_last_commit_counts_as_never_made(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "t"
    start(path)
    log = path / "_delta_log"
    (log / "00000000000000000002.json").write_bytes(torn)
    table = Table(path)
    (moved,) = table.recover()
    assert moved.read_bytes() == torn
    assert table.recover() == []
    assert (table.version, table.transaction("inbox")) == (1, 1)
    assert ids(path) == OLD
    append(path, Disk())
    assert ids(path) == [*OLD, 4, 5, 6]


def test_a_torn_commit_is_found_without_asking(tmp_path: Path) -> None:
    start(tmp_path / "t")
    (tmp_path / "t/_delta_log/00000000000000000002.json").touch()
    assert append(tmp_path / "t", Disk()) == 2
    assert ids(tmp_path / "t") == [*OLD, 4, 5, 6]


def test_a_torn_first_commit_is_no_table(tmp_path: Path) -> None:
    log = tmp_path / "t/_delta_log"
    log.mkdir(parents=True)
    (log / "00000000000000000000.json").touch()
    assert not Table(tmp_path / "t").exists()
    assert create(tmp_path / "t", Disk()) == 0


def test_a_torn_commit_below_others_is_damage(tmp_path: Path) -> None:
    start(tmp_path / "t")
    append(tmp_path / "t", Disk())
    (tmp_path / "t/_delta_log/00000000000000000001.json").write_bytes(b"")
    assert Table(tmp_path / "t").recover() == []
    with pytest.raises(Damaged, match="commit 1"):
        Table(tmp_path / "t").files()


def checkpointed(path: Path) -> Path:
    table = Table(path)
    for k in range(CHECKPOINT_COMMITS + 1):
        table.create_or_append([], SCHEMA, ("inbox", k))
    (checkpoint,) = (path / "_delta_log").glob("*.checkpoint.parquet")
    return checkpoint


@pytest.mark.parametrize("size", [0, 100])
def test_a_torn_checkpoint_is_put_aside(tmp_path: Path, size: int) -> None:
    checkpoint = checkpointed(tmp_path / "t")
    os.truncate(checkpoint, size)
    table = Table(tmp_path / "t")
    assert len(table.recover()) == 2
    assert (table.version, table.transaction("inbox")) == (CHECKPOINT_COMMITS, CHECKPOINT_COMMITS)
    append(tmp_path / "t", Disk())
    assert ids(tmp_path / "t") == []


@pytest.mark.parametrize("text", ["", "{", json.dumps({"version": 7, "size": 1})])
def test_a_torn_pointer_to_a_checkpoint_is_put_aside(tmp_path: Path, text: str) -> None:
    checkpoint = checkpointed(tmp_path / "t")
    (checkpoint.parent / "_last_checkpoint").write_text(text)
    table = Table(tmp_path / "t")
    assert len(table.recover()) == 1
    assert table.version == CHECKPOINT_COMMITS
    assert checkpoint.exists()


def test_checkpoints_are_flushed_before_the_next_commit(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    for _ in range(CHECKPOINT_COMMITS):
        table.create_or_append([], SCHEMA)
    disk = FaultyDisk()
    Table(tmp_path / "t", disk).create_or_append([], SCHEMA)
    names = [path.name for what, path in disk.done if what in ("sync", "link")]
    assert names[0].endswith(".checkpoint.parquet")
    assert names[1] == "_last_checkpoint"
    assert names[-1].endswith(".json")


def test_temporary_files_of_dead_writers_are_cleared(tmp_path: Path) -> None:
    start(tmp_path / "t")
    log = tmp_path / "t/_delta_log"
    dead, alive = log / ".commit-99999999-ab.tmp", log / f".commit-{os.getpid()}-ab.tmp"
    dead.touch()
    alive.touch()
    Table(tmp_path / "t").recover()
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    schema = types.to_stored(SCHEMA)
    disk = FaultyDisk()
    write_file(tmp_path / "whole.parquet", [batch(0, 100)], schema, 10, disk)
    for fail_at in range(disk.steps):
        with pytest.raises(DiskFailure):
            write_file(tmp_path / "part.parquet", [batch(0, 100)], schema, 10, FaultyDisk(fail_at))
        assert [path.name for path in tmp_path.iterdir()] == ["whole.parquet"]


def test_a_source_that_fails_midway_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[pa.RecordBatch]:
        yield batch(0, 20)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="broke"):
        write_file(tmp_path / "part.parquet", broken(), types.to_stored(SCHEMA), 10)
    assert list(tmp_path.iterdir()) == []


def test_a_lost_data_file_is_noticed_at_the_commit(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    file = table.write("new.parquet", [batch(0, 3)], SCHEMA)
    os.truncate(table.file(file.path), file.bytes - 1)
    with pytest.raises(Damaged, match=r"new\.parquet"):
        table.create_or_append([file], SCHEMA)
    assert not table.exists()
