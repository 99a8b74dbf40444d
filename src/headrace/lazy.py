"""Imports made when needed: a light start, and a clear word when an optional part is not installed."""

from __future__ import annotations

import importlib
from typing import Any

from headrace.errors import BadRequest


def load(module: str, extra: str = "server") -> Any:
    """Import ``module``; BadRequest naming the extra to install if a library it needs is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "headrace":
            raise
        raise BadRequest(
            f"this needs {missing}, which is not installed",
            hint=f"pip install 'headrace[{extra}]', or use the URL of a running exchange",
        ) from None
