"""Policy views as files: each made whole or not at all, limited in bytes, and made again after it gave way."""

from __future__ import annotations

import fcntl
import hmac
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from headrace import reading
from headrace.errors import Damaged, NotFound
from headrace.model import FileEntry
from headrace.policies import View
from headrace.policy import Compiled
from headrace.root import Root
from headrace.settings import integer
from headrace.store.fingerprint import Fingerprint
from headrace.store.parquet import read_batches, write_file
from headrace.store.types import to_stored

_LOCKS = 64
_PREFIX = "v"
"""What the id of a view begins with; those of data files are hexadecimal."""


def is_view(file_id: str) -> bool:
    """Whether a file id is that of a policy view."""
    return file_id.startswith(_PREFIX)


def gone() -> NotFound:
    """The error for a view that is not there, or not for this caller."""
    return NotFound("there is no such file", hint="ask for the manifest again")


class ViewFiles:
    """The folder of views. Thread-safe, and safe beside other processes."""

    def __init__(self, root: Root, key: bytes) -> None:
        self._root, self._key = root, key
        self._folder = root.views
        self._held: int | None = None
        self._lock = threading.Lock()

    def id_of(self, dataset: str, entry: FileEntry, compiled: Compiled) -> str:
        """The id of a view: it tells nothing to whom the key is not known."""
        return self._id(f"view\0{dataset}\0{entry.id}\0{entry.sha256}\0{compiled.key}")

    def _id(self, text: str) -> str:
        return _PREFIX + hmac.digest(self._key, text.encode(), "sha256")[:16].hex()

    def make(self, dataset: str, compiled: Compiled, entry: FileEntry) -> View:
        """The view of a data file, written."""
        view_id = self.id_of(dataset, entry, compiled)
        with self._locked(view_id):
            return self._write(view_id, dataset, compiled, entry)

    def again(self, view: View, compiled: Compiled, entry: FileEntry) -> View:
        """A view that gave way, made again. Where it has other bytes now, it has another id. Damaged."""
        with self._locked(view.id):
            if (self._folder / f"{view.id}.parquet").exists():
                return view
            made = self._write(view.id, view.dataset, compiled, entry)
            if (made.rows, made.content) != (view.rows, view.content):
                self.file(made.id).unlink(missing_ok=True)
                raise Damaged("a policy view came out otherwise than before", hint="run 'headrace doctor'")
            if made.sha256 == view.sha256:
                return view
            other = replace(made, id=self._id(f"again\0{view.id}\0{made.sha256}"))
            self.file(made.id).replace(self.file(other.id))
            return other

    def file(self, view_id: str) -> Path:
        """Where the bytes of a view lie, if they are there."""
        if not is_view(view_id) or not view_id.isalnum():
            raise gone()
        return self._folder / f"{view_id}.parquet"

    def touch(self, view_id: str) -> bool:
        """Mark a view as used; False if its bytes are not there."""
        try:
            os.utime(self.file(view_id))
        except FileNotFoundError:
            return False
        return True

    def _write(self, view_id: str, dataset: str, compiled: Compiled, entry: FileEntry) -> View:
        """Write a view, and make room for it. Without visible rows no file is left."""
        content, sizes = Fingerprint(compiled.schema), 0
        source = self._root.table(dataset) / entry.path

        def visible() -> Iterator[pa.RecordBatch]:
            nonlocal sizes
            for batch in read_batches([source], to_stored(compiled.source), None, integer("batch_rows")):
                shown = compiled.apply(reading.true(batch, compiled.source))
                content.update(shown)
                sizes += sum(map(_size, shown.columns))
                yield shown

        path = self._folder / f"{uuid.uuid4().hex}.making"
        written = write_file(path, visible(), to_stored(compiled.schema))
        if written.rows:
            path.replace(self._folder / f"{view_id}.parquet")
            self._make_room(written.bytes, f"{view_id}.parquet")
        else:
            path.unlink()
        return View(
            view_id, compiled.key, dataset, entry.id, written.rows, written.bytes, sizes, written.sha256,
            content.digest(),
        )  # fmt: skip

    @contextmanager
    def _locked(self, view_id: str) -> Iterator[None]:
        """One maker per view, in whatever thread or process."""
        self.file(view_id)
        path = self._folder / f".{int(view_id[1:5], 16) % _LOCKS}.lock"
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, added: int, newest: str) -> None:
        """Remove the views that were not used for longest where there are too many bytes."""
        with self._lock:
            most = integer("views_bytes_max")
            self._held = None if self._held is None else self._held + added
            if self._held is not None and self._held <= most:
                return
            found = sorted((item.stat().st_mtime_ns, item) for item in self._folder.glob("*.parquet"))
            sizes = {item: item.stat().st_size for _, item in found}
            self._held = sum(sizes.values())
            for _, item in found if self._held > most else ():
                if self._held <= most * 0.9:
                    break
                if item.name != newest:
                    item.unlink(missing_ok=True)
                    self._held -= sizes[item]


def _size(array: pa.Array) -> int:
    """Bytes of the values in memory, whatever buffers carry them: how many rows lay hidden between must not show."""
    kind = array.type
    if pa.types.is_struct(kind):
        return sum(map(_size, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return 4 * len(array) + _size(array.flatten())
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return 4 * len(array) + int(pc.sum(pc.binary_length(array)).as_py() or 0)
    try:
        return len(array) * int(kind.bit_width) // 8
    except ValueError:
        return len(str(array.to_pylist()))
