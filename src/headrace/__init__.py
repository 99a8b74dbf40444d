"""Headrace: a data exchange for model training. ``connect`` is the way in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import BadRequest
from headrace.lazy import load

if TYPE_CHECKING:
    from headrace.client.session import Session

__all__ = ["connect"]
__version__ = "0.1.0"

ROOT = "headrace-data"


def connect(target: str | Path | None = None, token: str | None = None) -> Session:
    """Open an exchange: ``http(s)://host:port`` for a running one, a folder for one embedded in this process.

    Without ``target``: HEADRACE_URL, else HEADRACE_ROOT, else ./headrace-data. ``token`` defaults to HEADRACE_TOKEN.
    A URL is not called before it is used. Raises BadRequest for a malformed URL or a folder that cannot be used.
    """
    where = target or os.environ.get("HEADRACE_URL") or os.environ.get("HEADRACE_ROOT") or ROOT
    if isinstance(where, str) and where.startswith(("http://", "https://")):
        remote: Session = load("headrace.client.connect").RemoteSession(where, token)
        return remote
    if isinstance(where, str) and "://" in where:
        raise BadRequest(
            f"{where.split('://')[0]}:// is not how an exchange is reached", hint="give http://host:7070 or a folder"
        )
    embedded: Session = load("headrace.embedded").open_session(Path(where))
    return embedded
