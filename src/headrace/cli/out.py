"""What all verbs share: their common options, the session they open, and how results and errors are printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.errors import BadRequest, HeadraceError, NotFound
from headrace.lazy import load
from headrace.model import to_dict

if TYPE_CHECKING:
    from headrace.client.session import Session

ROOT = "headrace-data"
CELL_CHARS = 60
PROBLEMS_SHOWN = 20

Root = Annotated[
    Path | None,
    typer.Option(help="Folder of an exchange on this machine. [env: HEADRACE_ROOT] [default: ./headrace-data]"),
]
Url = Annotated[str | None, typer.Option(help="URL of a running exchange. [env: HEADRACE_URL]")]
Secret = Annotated[
    str | None, typer.Option(help="Access token; safer in the environment than here. [env: HEADRACE_TOKEN]")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


def root_folder(root: Path | None) -> Path:
    """The folder given, else HEADRACE_ROOT, else ./headrace-data."""
    return root or Path(os.environ.get("HEADRACE_ROOT") or ROOT)


def connect(root: Path | None, url: str | None, token: str | None, new: bool = False) -> Session:
    """The exchange that the options and the environment name. Unless ``new``, a folder that is missing is NotFound."""
    if root is not None and url is not None:
        raise BadRequest("--root and --url name two exchanges", hint="give one of them")
    url = url or (None if root is not None else os.environ.get("HEADRACE_URL"))
    if url:
        if "://" not in url:
            raise BadRequest(f"{clean(url)!r} is no URL of an exchange", hint="for example --url http://127.0.0.1:7070")
        session: Session = load("headrace").connect(url, token)
        return session
    folder = root_folder(root)
    if not new and not folder.is_dir():
        raise NotFound(
            f"there is no exchange at {folder}",
            hint="`headrace serve` or `headrace upload` starts one; --root, --url name another",
        )
    load("headrace.logs").for_people()
    embedded: Session = load("headrace").connect(folder, token)
    return embedded


def clean(value: Any, chars: int | None = CELL_CHARS) -> str:
    """``value`` as one line that is safe on a terminal: control characters are spelled out, long texts cut."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {clean(item)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(clean(item) for item in value[:16]) + (", …" if len(value) > 16 else "")
    else:
        text = "" if value is None else str(value)
    if chars is not None and len(text) > chars:
        text = text[: chars - 1] + "…"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def count(number: int | None) -> str:
    """A whole number with thousands apart; '-' for None."""
    return "-" if number is None else f"{number:,}"


def size(number: float) -> str:
    """Bytes in the unit that suits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def moment(iso: str | None) -> str:
    """A moment of UTC to the second, as 2026-01-31 12:00:00Z."""
    return f"{iso[:19].replace('T', ' ')}Z" if iso else "-"


def print_json(value: Any) -> None:
    """Print a value of model.py, or plain values, as indented JSON."""
    orjson = load("orjson")
    text: bytes = orjson.dumps(to_dict(value), default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    typer.echo(text.decode())


def table(names: Sequence[str], rows: Iterable[Sequence[Any]], empty: str, chars: int = CELL_CHARS) -> None:
    """Print rows under names, each cell of at most ``chars``, numbers to the right. Without rows print ``empty``."""
    cells = [[clean(value, chars) for value in row] for row in rows]
    if not cells:
        typer.echo(empty)
        return
    terminal = sys.stdout.isatty()
    # A pipe has no width: there nothing is wrapped or cut.
    console = load("rich.console").Console(width=None if terminal else 10_000, highlight=False)
    text = load("rich.text").Text
    shown = load("rich.table").Table(box=None, pad_edge=False, header_style="bold")
    for column, name in enumerate(names):
        numbers = all(row[column].replace(",", "").replace(".", "").lstrip("-").isdecimal() for row in cells)
        shown.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        shown.add_row(*(text(cell) for cell in row))
    with console.capture() as lines:
        console.print(shown)
    typer.echo("\n".join(line.rstrip() for line in lines.get().rstrip("\n").split("\n")))


def fields(values: Mapping[str, Any]) -> None:
    """Print names and values, one per line; empty values are left out."""
    shown = {name: value for name, value in values.items() if value not in (None, "", (), [], {})}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        typer.echo(f"{name:<{width}}  {clean(value, 400)}")


def note(text: str) -> None:
    """Print a line that is not the result: to stderr, so that results can be piped."""
    typer.echo(text, err=True)


def report(error: HeadraceError, verb: str, as_json: bool) -> None:
    """Print an error: what, why, what to do; or its JSON object. Always to stderr."""
    if as_json:
        typer.echo(load("orjson").dumps(error.to_dict(), default=str).decode(), err=True)
        return
    note(f"headrace {verb}: {error.code.replace('_', ' ')}")
    problems = list(error.details.get("problems") or [])
    if len(problems) <= 1:
        note(f"  why: {clean(error.message, None)}")
        if error.hint:
            note(f"  do:  {clean(error.hint, None)}")
        return
    # Each problem brings its own remedy; the message and hint would only repeat the first.
    note(f"  why: {clean(error.details.get('file', 'the recipe'))} has {len(problems)} problems")
    for problem in problems[:PROBLEMS_SHOWN]:
        note(f"       {problem_line(problem)}")
    more = len(problems) - PROBLEMS_SHOWN
    note(f"  do:  mend these lines{f', then see the {more} others' if more > 0 else ''}")


def problem_line(problem: Mapping[str, Any]) -> str:
    """One problem of a recipe in one line: where, what is wrong, and what to write instead."""
    remedy = f"; {problem['hint']}" if problem.get("hint") else ""
    return clean(f"line {problem.get('line', '?')}: {problem.get('message', '')}{remedy}", None)


def confirm(question: str, yes: bool) -> None:
    """Ask before something that cannot be undone; without a terminal ``--yes`` is needed."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise BadRequest(f"{question} There is no terminal to ask.", hint="add --yes")
    typer.confirm(question, abort=True)
