"""Headrace: a data exchange for model training. ``connect`` is the way in."""

from __future__ import annotations

import importlib
import os
import types
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import BadRequest

if TYPE_CHECKING:
    from headrace.client.session import Session

__all__ = ["connect"]
__version__ = "0.1.0"

ROOT = "headrace-data"


def _lazily(module: str) -> types.ModuleType:
    """Import when needed: ``import headrace`` stays light, the client works without the exchange's libraries."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "headrace":
            raise
        raise BadRequest(
            f"an exchange in this process needs {error.name}, which is not installed",
            hint="pip install 'headrace[server]', or connect to the URL of a running exchange",
        ) from None


def connect(target: str | Path | None = None, token: str | None = None) -> Session:
    """Open an exchange: ``http(s)://host:port`` for a running one, a folder for one embedded in this process.

    Without ``target``: HEADRACE_URL, else HEADRACE_ROOT, else ./headrace-data. ``token`` defaults to HEADRACE_TOKEN.
    Nothing is sent until the first call. Raises BadRequest for a malformed URL or a folder that cannot be used.
    """
    where = target or os.environ.get("HEADRACE_URL") or os.environ.get("HEADRACE_ROOT") or ROOT
    if isinstance(where, str) and where.startswith(("http://", "https://")):
        remote: Session = _lazily("headrace.client.connect").RemoteSession(where, token)
        return remote
    if isinstance(where, str) and "://" in where:
        raise BadRequest(
            f"{where.split('://')[0]}:// is not how an exchange is reached", hint="give http://host:7070 or a folder"
        )
    embedded: Session = _lazily("headrace.exchange").open_session(Path(where))
    return embedded
