"""Verbs on recipes and runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from json import dumps as json_text
from json import loads as json_value
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import out
from headrace.cli.data import print_counts
from headrace.errors import BadRequest, Conflict, HeadraceError, NotFound
from headrace.lazy import load
from headrace.model import Run, from_dict

if TYPE_CHECKING:
    from headrace.client.session import Session

RECIPE, SCHEMA = "recipe.yaml", "recipe.schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA}\n"

ENGINES = ("native",)


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder to write into.")] = Path(),
    yes: out.Yes = False,
    json: out.Json = False,
) -> None:
    """Write a commented recipe to start from.

    Its schema, for editors, goes beside it.
    """
    recipe = load("headrace.recipe")
    texts = {RECIPE: EDITOR_LINE + recipe.starter(), SCHEMA: json_text(recipe.schema_json(), indent=2) + "\n"}
    there = [name for name in texts if (folder / name).exists()]
    if there and not yes:
        raise Conflict(f"{folder / there[0]} exists already", hint="add --yes to overwrite it, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(
            f"{folder} cannot be written: {error.strerror}", hint="name a folder you may write to"
        ) from None
    written = [str(folder / name) for name in texts]
    if json:
        return out.print_json({"written": written})
    for name in written:
        typer.echo(f"wrote {name}")
    return typer.echo(f"edit it, then: headrace run {folder / RECIPE} --preview 100")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Run], None]]:
    """A bar with the stage on a terminal; a plain line per stage otherwise. Both on stderr."""
    if not sys.stderr.isatty():
        said: set[str] = set()

        def line(run: Run) -> None:
            text = f"{run.status} {run.stage}".strip()
            if text not in said:
                said.add(text)
                out.note(f"run {run.id}: {out.clean(text, 200)}")

        yield line
        return
    rich = load("rich.progress")
    bar = rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
        console=load("rich.console").Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("queued", total=1.0)
        yield lambda run: bar.update(task, completed=run.progress, description=out.clean(run.stage or run.status))


def _print_run(run: Run) -> None:
    print_counts(run.steps)
    if run.steps:
        typer.echo("")
    made = f"{run.dataset}@{run.version}" if run.version is not None else "no version"
    told = [f"{out.count(run.rows_in)} in", f"{out.count(run.rows_out)} out"]
    told += [f"{out.count(run.quarantined)} quarantined"] if run.quarantined else []
    told += [f"{out.count(run.merged)} merged"] if run.merged else []
    typer.echo(f"{made}: {', '.join(told)}   run {run.id} {run.status}")


def _records(texts: Any) -> list[dict[str, Any]]:
    """Records as dicts, whether they came as such or as JSON text."""
    made = [json_value(text) if isinstance(text, str) else text for text in texts]
    return [record for record in made if isinstance(record, dict)]


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    typer.echo(f"\n{title}:")
    out.table([out.clean(name) for name in names], [[row.get(name) for name in names] for row in rows], "none")


def _preview(session: Session, recipe: str, rows: int, json: bool) -> None:
    found = session.preview(recipe, rows)
    if json:
        return out.print_json(found)
    ran = from_dict(Run, found["run"])
    print_counts(ran.steps)
    _print_rows("rows as they would be", _records(found.get("sample", ())))
    shown = ("id", "step", "rule", "field", "value", "reason", "record")
    dropped = [{name: row.get(name) for name in shown} for row in _records(found.get("dropped", ()))]
    _print_rows("rows that would be dropped", dropped)
    return typer.echo("\nnothing was committed")


def _finish(session: Session, queued: Run, json: bool) -> Run:
    """Wait for a run; one that fails still shows what its steps did."""
    try:
        if json:
            return session.wait(queued.id)
        with _progress() as heard:
            return session.wait(queued.id, heard)
    except HeadraceError as error:
        if not json and error.details.get("run") == queued.id:
            _print_run(session.run_status(queued.id))
        raise


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe's file.")],
    preview: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Show the effect on N records; commit nothing.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Where the work is done: native is this machine.")] = "native",
    wait: Annotated[bool, typer.Option(help="Wait until the run has ended.")] = True,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Run a recipe and publish a version.

    It collects, cleans, transforms and publishes in one go: a new version, or none.
    """
    if engine not in ENGINES:
        raise BadRequest(f"there is no engine {engine!r} here", hint=f"--engine {' or '.join(ENGINES)}")
    if not Path(recipe).is_file():
        raise NotFound(f"there is no file {recipe!r}", hint="`headrace init` writes a recipe")
    if any(line.startswith("schedule:") for line in Path(recipe).read_text(errors="replace").splitlines()):
        typer.echo("note: schedule is kept with the recipe, but nothing runs by itself yet", err=True)
    with out.connect(root, url, token, new=True) as session:
        if preview is not None:
            return _preview(session, recipe, preview, json)
        queued = session.run(recipe, wait=False)
        ended = _finish(session, queued, json) if wait else queued
    return out.print_json(ended) if json else _print_run(ended)


def runs(
    id: Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run's number; all runs without it.")] = None,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """List runs, or show the steps of one."""
    with out.connect(root, url, token) as session:
        found = session.runs() if id is None else [session.run_status(id)]
    if json:
        return out.print_json(found if id is None else found[0])
    if id is not None:
        _print_run(found[0])
        return out.fields({"stage": found[0].stage, "error": found[0].error, "hint": found[0].hint})
    rows = [
        (r.id, r.dataset, r.status, r.version, out.count(r.rows_in), out.count(r.rows_out), out.moment(r.created_at))
        for r in found
    ]
    return out.table(("RUN", "DATASET", "STATUS", "VERSION", "IN", "OUT", "STARTED"), rows, "no runs yet")


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for verb in (init, run, runs):
        app.command()(verb)
