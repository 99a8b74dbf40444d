"""References to secrets: a recipe names them, and only the run that needs one looks it up."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from headrace.errors import BadRecipe

SECRET = re.compile(r"\$\{(\w+)(?::([^}]*))?\}")
BYTES_MAX = 64 << 10


def _read(path: Path) -> bytes:
    """The bytes of a plain, small file; OSError for others: a pipe would never answer, a device never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > BYTES_MAX:
            raise OSError
        return file.read(BYTES_MAX)


def resolve(text: str, base: Path | None = None) -> str:
    """``text`` with each ``${env:NAME}`` and ``${file:PATH}`` filled in; raises BadRecipe for one that cannot be."""
    return SECRET.sub(lambda match: _secret(match, base), text)


def _secret(match: re.Match[str], base: Path | None) -> str:
    kind, name = match[1], match[2] or ""
    if kind == "env" and name:
        value = os.environ.get(name)
        if value is None:
            raise BadRecipe(f"the environment has no variable {name!r}", hint=f"set {name} where Headrace runs")
        return value
    if kind == "file" and name:
        try:
            return _read((base or Path()) / Path(name).expanduser()).decode().rstrip("\r\n")
        except (OSError, ValueError, RuntimeError):
            raise BadRecipe(f"the file {name!r} of a secret cannot be read", hint="check its path and rights") from None
    raise BadRecipe(f"{match[0][:80]!r} is not a reference to a secret", hint="write ${env:NAME} or ${file:PATH}")
