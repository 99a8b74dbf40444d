"""The command ``headrace``: a thin skin on the session; each verb works on a folder and on a running exchange."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from headrace import __version__
from headrace.cli import admin, data, doctor, out, policies, runs
from headrace.errors import HeadraceError

# Help and usage errors stay plain text: quick to print, easy to pipe. Tracebacks never show local values.
app = typer.Typer(
    name="headrace",
    help="Headrace brings data to training: collect, clean, transform, version, feed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runs.register(app)
data.register(app)
admin.register(app)
policies.register(app)
doctor.register(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


@app.callback()
def _headrace(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Headrace brings data to training: collect, clean, transform, version, feed.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not allowed, 4 not found, 5 conflict.
    """
    del version


def _refused(problem: OSError) -> HeadraceError:
    what = f": {problem.filename}" if problem.filename else ""
    return HeadraceError(
        f"{problem.strerror or type(problem).__name__}{what}", hint="`headrace doctor` looks for causes"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 failed, 2 wrong usage, 3 not allowed, 4 not found, 5 conflict."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given, prog_name="headrace")
    except (HeadraceError, OSError) as problem:
        # What the machine refuses (a full disk, a missing right) is told like any other error.
        error = problem if isinstance(problem, HeadraceError) else _refused(problem)
        verb = next((word for word in given if not word.startswith("-")), "")
        out.report(error, verb, "--json" in given)
        sys.exit(error.exit_code)
