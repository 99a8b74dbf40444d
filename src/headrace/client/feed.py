"""The feed: a manifest read in a deterministic order, as batches of NumPy arrays; knows no framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from headrace.errors import BadRequest
from headrace.model import FileEntry, Manifest, TracedRow

PROVIDERS = "headrace.providers"


@runtime_checkable
class Provider(Protocol):
    """Where a feed gets manifests and files from: an exchange over HTTP, or an embedded one. Threads share it."""

    def manifest(self, ref: str, columns: Sequence[str] | None) -> Manifest:
        """The whole manifest of ``ref``, all pages joined. ``columns`` None: all user columns."""
        ...

    def fetch(self, entry: FileEntry, into: Path) -> None:
        """Write the bytes of one data file to the path ``into``. The caller checks size and hash. Must time out."""
        ...

    def trace(self, ref: str, **query: Any) -> list[TracedRow]:
        """The rows of a training step with their sources; ``query`` as in the REST interface."""
        ...

    def close(self) -> None:
        """Release connections; the provider is not used afterwards."""
        ...


OpenProvider: TypeAlias = Callable[[str, str | None], tuple[Provider, str]]


def open_provider(source: str, token: str | None = None) -> tuple[Provider, str]:
    """Find who serves ``source`` (``http://host:port/REF`` or ``ROOT/REF``) and return it with the ref.

    Providers are entry points of the group ``headrace.providers``: ``http`` for URLs, ``file`` for all else, each a
    callable ``(source, token) -> (provider, ref)``. Raises BadRequest where none is installed.
    """
    scheme = "http" if source.startswith(("http://", "https://")) else "file"
    for entry in entry_points(group=PROVIDERS, name=scheme):
        try:
            found: OpenProvider = entry.load()
        except ImportError as error:
            hint = 'pip install "headrace[server]" to read a local root, or give the URL of an exchange'
            raise BadRequest(f"{source!r} cannot be opened: {error}", hint=hint) from error
        return found(source, token)
    raise BadRequest(f"nothing installed here opens {source!r}", hint="reinstall headrace")
