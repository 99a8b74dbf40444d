"""Verbs for who runs an exchange: serve it, work for it, let people in."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli import out
from headrace.lazy import load

tokens = typer.Typer(help="Make, list and end access tokens.", no_args_is_help=True, rich_markup_mode=None)

ROLES = ("admin", "producer", "consumer")


def serve(
    root: out.Root = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 7070,
    open: Annotated[
        bool,
        typer.Option("--open", help="Let anyone on this machine use /upload and /get_data without a token."),
    ] = False,
) -> None:
    """Run an exchange: its server and its worker. Prints the URL, and on the first start an admin token, once."""
    load("headrace.server.serve").serve(out.root_folder(root), host, port, open)


def worker(root: out.Root = None) -> None:
    """Run another worker on the same exchange."""
    load("headrace.server.worker").main(out.root_folder(root))


@tokens.command("create")
def token_create(
    name: Annotated[str, typer.Argument(help="Who it is for.")],
    role: Annotated[str, typer.Option(help=f"What it may do: {', '.join(ROLES)}.")] = "consumer",
    dataset: Annotated[
        list[str] | None, typer.Option(help="Dataset or pattern it holds for; may be repeated. [default: all]")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, help="Days until it ends. [default: never]")] = None,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Make a token and print it, this once."""
    if role not in ROLES:
        raise typer.BadParameter(f"{role!r} is none of {', '.join(ROLES)}", param_hint="--role")
    with out.connect(root, url, token, new=True) as session:
        made = session.create_token(name, role, dataset or ["*"], days)
    if json:
        return out.print_json(made)
    typer.echo(made.secret or "")
    return out.note(
        f"{made.role} {made.principal}, datasets {', '.join(made.datasets)}, id {made.id}: it is shown only now"
    )


@tokens.command("list")
def token_list(root: out.Root = None, url: out.Url = None, token: out.Secret = None, json: out.Json = False) -> None:
    """List tokens, without their secrets."""
    with out.connect(root, url, token) as session:
        found = session.tokens()
    if json:
        return out.print_json(found)
    rows = [
        (
            t.id,
            t.principal,
            t.role,
            t.datasets,
            out.moment(t.created_at),
            out.moment(t.expires_at),
            out.moment(t.revoked_at),
        )
        for t in found
    ]
    return out.table(("ID", "NAME", "ROLE", "DATASETS", "MADE", "ENDS", "REVOKED"), rows, "no tokens")


@tokens.command("revoke")
def token_revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="The token's id, from `headrace token list`.")],
    yes: out.Yes = False,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """End a token at once."""
    out.confirm(f"End token {out.clean(id)} for good?", yes)
    with out.connect(root, url, token) as session:
        session.revoke_token(id)
    return out.print_json({"revoked": id}) if json else typer.echo(f"token {id} has ended")


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for verb in (serve, worker):
        app.command()(verb)
    app.add_typer(tokens, name="token")
