"""Every step on a local disk that can fail, in one object that is passed in: tests make each step fail once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


class Disk:
    """The local disk. Durable means: file and folder are flushed to the device before the call returns."""

    def mkdir(self, path: Path) -> None:
        """Make a folder and its parents, durably; an existing one is fine."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self.sync_folder(folder.parent)

    def create(self, path: Path) -> IO[bytes]:
        """A new unbuffered file for writing; an existing one is emptied."""
        return path.open("wb", buffering=0)

    def write(self, file: IO[bytes], data: bytes | memoryview) -> int:
        """Write all of ``data``; return its length in bytes."""
        left = memoryview(data).cast("B")
        while left:
            left = left[file.write(left) :]
        return memoryview(data).nbytes

    def sync(self, file: IO[bytes]) -> None:
        """Flush one open file to the device."""
        os.fsync(file.fileno())

    def sync_path(self, path: Path) -> None:
        """Flush a closed file to the device."""
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Flush a folder's entries to the device."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; raises FileExistsError if the name is taken."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file over ``target`` in one step."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file; a missing one is fine."""
        path.unlink(missing_ok=True)

    def read(self, path: Path) -> bytes:
        """All bytes of a file."""
        return path.read_bytes()


DISK = Disk()
