"""Columns kept beside the body of an upload: made while it was checked, so that its texts need no second parse.

They are a convenience. Whoever finds none, or not those it needs, projects the texts; so nothing here is synced to the
disk, and what was written before the machine's last start is not believed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa

_BYTES, _ROWS, _START, _ASSUMED, _OWN = b"bytes", b"rows", b"start", b"assumed", b"own"


@dataclass(frozen=True, slots=True)
class Part:
    """Whole lines of a body: their ``bytes`` and ``rows``, and if ``batch`` is given, all of them typed.

    ``batch`` has the schema that ``project_json`` made of ``assumed``; it accepted every line and widened nothing.
    """

    bytes: int
    rows: int
    assumed: pa.Schema | None = None
    batch: pa.RecordBatch | None = None


class Writer:
    """Writes parts in the order of the body. A full disk ends it quietly: the rest is projected from the texts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._full = False

    def write(self, part: Part) -> None:
        """Append one part. After a failure none is: what came next would be read as the torn part's bytes."""
        if self._full:
            return
        own = pa.schema([]) if part.batch is None else part.batch.schema
        told = {_BYTES: str(part.bytes), _ROWS: str(part.rows), _START: _start()}
        if part.assumed is not None:
            # The schema's own metadata must come back as it was, so it travels whole.
            told |= {_ASSUMED: part.assumed.serialize().to_pybytes(), _OWN: own.serialize().to_pybytes()}
        try:
            with pa.ipc.new_stream(self._file, own.with_metadata(told)) as stream:
                if part.batch is not None:
                    stream.write_batch(part.batch.replace_schema_metadata(told))
        except OSError:
            self._full = True

    def close(self) -> None:
        """Let go of the file."""
        with suppress(OSError):
            self._file.close()

    def abandon(self) -> None:
        """Remove the file; harmless after another ``abandon``."""
        self.close()
        self._path.unlink(missing_ok=True)


def parts(path: Path) -> Iterator[Part]:
    """The parts at ``path`` in order, none where nothing usable is kept; batches lie in the mapped file."""
    try:
        file = pa.memory_map(str(path))
    except (OSError, pa.ArrowException):
        return
    with file:
        while file.tell() < file.size():
            try:
                part = _part(file)
            except (OSError, KeyError, ValueError):
                return
            if part is None:
                return
            yield part


def _part(file: pa.NativeFile) -> Part | None:
    stream = pa.ipc.open_stream(file)
    told = stream.schema.metadata or {}
    if told[_START] != _start():
        return None
    size, rows = int(told[_BYTES]), int(told[_ROWS])
    batches = list(stream)
    if _ASSUMED not in told:
        return Part(size, rows)
    if len(batches) != 1 or batches[0].num_rows != rows:
        return None
    own = pa.ipc.read_schema(pa.py_buffer(told[_OWN]))
    batch = pa.RecordBatch.from_arrays(batches[0].columns, schema=own) if len(own) else batches[0]
    return Part(size, rows, pa.ipc.read_schema(pa.py_buffer(told[_ASSUMED])), batch)


@cache
def _start() -> bytes:
    """What tells this start of the machine from others: the page cache holds what was not synced no longer than it."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    return os.urandom(16)
