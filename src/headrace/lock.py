"""One owner per root: a lock that names the live process, and its URL if it serves."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from headrace.errors import Conflict


class RootLock:
    """Held from construction to ``release``, or to the end of the process however it ends. Raises Conflict if taken."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            owner = owner_of(path)
            raise Conflict(
                f"{path.parent} is in use by process {owner.get('pid', '?')}",
                hint=f"it serves {owner['url']}" if owner.get("url") else "stop that process, or use another root",
                details=owner,
            ) from None
        self.announce(None)

    def announce(self, url: str | None) -> None:
        """Write down who holds the root, and where it answers."""
        text = orjson.dumps({"pid": os.getpid(), "url": url})
        os.pwrite(self._handle, text, 0)
        os.ftruncate(self._handle, len(text))

    def release(self) -> None:
        """Let the root go."""
        os.ftruncate(self._handle, 0)
        os.close(self._handle)

    def __enter__(self) -> RootLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def owner_of(path: Path) -> dict[str, Any]:
    """Who wrote the lock file: ``{"pid", "url"}``, empty if nobody can be told. Says nothing about whether it lives."""
    try:
        owner = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return owner if isinstance(owner, dict) else {}
