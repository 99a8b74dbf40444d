"""``headrace doctor``: look at this machine and an exchange's folder, and say what to do about what is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from headrace import settings
from headrace.cli import out
from headrace.errors import BadRequest, HeadraceError
from headrace.lazy import load

OK, WARN, FAIL = "ok", "warn", "fail"
PYTHON_LEAST = (3, 11)
# Earlier ones have a rare bug in WAL resets: https://sqlite.org/changes.html
SQLITE_SOUND = (3, 51, 3)
DISK_WARN, DISK_FAIL = 5 * settings.GiB, 512 * settings.MiB
EPOCH_2024 = 1_704_067_200
CLIENT = ("httpx", "numpy", "orjson", "pyarrow", "rich", "typer")
SERVER = (
    "daft",
    "dbos",
    "deltalake",
    "fastapi",
    "granian",
    "pyyaml",
    "sqlalchemy",
    "sqlglot",
    "tokenizers",
    "zstandard",
)
TRAINING = ("torch",)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: ``state`` is ok, warn or fail; ``do`` says what helps."""

    name: str
    state: str
    found: str
    do: str = ""


def _python() -> Iterator[Check]:
    found = (
        f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    new = sys.version_info[:2] >= PYTHON_LEAST
    yield Check("python", OK if new else FAIL, found, "" if new else "install Python 3.11 or later")


def _versions(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    there, missing = [], []
    for name in names:
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return there, missing


def _libraries() -> Iterator[Check]:
    for what, names, extra, state in (
        ("client libraries", CLIENT, "", FAIL),
        ("server libraries", SERVER, "[server]", WARN),
        ("training libraries", TRAINING, "[torch]", WARN),
    ):
        there, missing = _versions(names)
        if missing:
            yield Check(
                what, state, f"missing: {', '.join(missing)}", f"if you need them: pip install 'headrace{extra}'"
            )
        else:
            yield Check(what, OK, ", ".join(there))


def _sqlite() -> Iterator[Check]:
    sound = sqlite3.sqlite_version_info >= SQLITE_SOUND
    yield Check(
        "sqlite",
        OK if sound else WARN,
        sqlite3.sqlite_version,
        "" if sound else "a rare bug in write-ahead logs is fixed in 3.51.3; one writer per file, as here, avoids it",
    )


def _standing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _root(root: Path) -> Iterator[Check]:
    folder = _standing(root.absolute())
    if not folder.is_dir():
        yield Check("root", FAIL, f"{folder} is not a folder", "name another with --root")
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"headrace")
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            spent = (time.perf_counter() - start) * 1000
    except OSError as error:
        yield Check(
            "root", FAIL, f"{folder} cannot be written: {error.strerror}", "give this user access, or name another"
        )
        return
    yield Check(
        "root", OK, f"{root} is writable, fsync {spent:.1f} ms" + ("" if root.is_dir() else " (made when first used)")
    )
    free = shutil.disk_usage(folder).free
    state = FAIL if free < DISK_FAIL else WARN if free < DISK_WARN else OK
    yield Check(
        "disk", state, f"{out.size(free)} free", "" if state == OK else "free some space: every version stays on disk"
    )


def _server(root: Path, url: str | None, token: str | None) -> Iterator[Check]:
    lock = root / "lock"
    told = url or _live_url(lock)
    if told is None:
        yield Check("server", OK, "none is running on this root")
        return
    try:
        with load("headrace").connect(told, token) as session:
            session.health()
    except HeadraceError as error:
        yield Check("server", FAIL, error.message, error.hint)
        return
    yield Check("server", OK, f"{told} answers")


def _live_url(lock: Path) -> str | None:
    """The URL in a root's lock, if the process that wrote it lives."""
    try:
        said = load("orjson").loads(lock.read_bytes())
        os.kill(int(said["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    url: str | None = said.get("url")
    return url


def _clock() -> Iterator[Check]:
    sound = time.time() > EPOCH_2024
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    yield Check("clock", OK if sound else FAIL, now, "" if sound else "set the clock: ids and signatures depend on it")


def _settings() -> Iterator[Check]:
    changed = []
    for setting in settings.TABLE:
        try:
            if settings.get(setting.name) != setting.default:
                changed.append(f"{setting.name}={settings.get(setting.name)}")
        except BadRequest as error:
            yield Check("settings", FAIL, error.message, error.hint)
    yield Check("settings", OK, ", ".join(changed) or "all defaults")


def checks(root: Path, url: str | None, token: str | None) -> list[Check]:
    """Everything that ``headrace doctor`` looks at, in the order it is shown."""
    looks: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _libraries,
        _sqlite,
        _clock,
        _settings,
        lambda: _root(root),
        lambda: _server(root, url, token),
    )
    return [check for look in looks for check in look()]


def doctor(root: out.Root = None, url: out.Url = None, token: out.Secret = None, json: out.Json = False) -> None:
    """Check this machine and an exchange, and say what to do. Exits with 1 if something fails."""
    found = checks(out.root_folder(root), url or (None if root else os.environ.get("HEADRACE_URL")), token)
    if json:
        out.print_json(found)
    else:
        for check in found:
            typer.echo(f"{check.state:<5} {check.name}: {out.clean(check.found, None)}")
            if check.do:
                typer.echo(f"      do: {out.clean(check.do, None)}")
    if any(check.state == FAIL for check in found):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command()(doctor)
