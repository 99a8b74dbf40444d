"""Verbs for who decides what is visible: policies, column tags, classification."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli import out
from headrace.model import ColumnTag, Policy

policies = typer.Typer(
    help="Say what is hidden from whom: rows and columns.", no_args_is_help=True, rich_markup_mode=None
)
column_tags = typer.Typer(
    help="Tag columns, so that policies can name them by a tag.", no_args_is_help=True, rich_markup_mode=None
)

Dataset = Annotated[str, typer.Argument(help="Name of a dataset.")]
Column = Annotated[str, typer.Argument(help="Name of a column.")]
Tag = Annotated[str, typer.Argument(help="A tag, such as pii.email.")]


def _masks(given: list[str]) -> dict[str, str]:
    masks: dict[str, str] = {}
    for one in given:
        column, sign, mask = one.partition("=")
        if not sign or not column or not mask:
            raise typer.BadParameter(f"{one!r} is not COLUMN=MASK", param_hint="--mask")
        masks[column] = mask
    return masks


def _shown(policy: Policy) -> None:
    masks = {f"mask {column}": mask for column, mask in policy.masks.items()}
    made = {"id": policy.id, "dataset": policy.dataset, "subject": policy.subject, "row filter": policy.row_filter}
    out.fields({**made, **masks, "made": out.moment(policy.created_at)})


@policies.command("add")
def policy_add(
    dataset: Annotated[str, typer.Argument(help="Dataset or pattern, such as 'patients-*'.")],
    subject: Annotated[str, typer.Argument(help="principal:NAME, role:NAME, group:NAME, or '*' for all but admins.")],
    row_filter: Annotated[
        str | None, typer.Option("--row-filter", help="SQL condition; rows for which it is not true are hidden.")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=MASK",
            help="null, constant:TEXT, hash[:NAME], last:N, month, bucket:WIDTH, redact[:KIND,KIND]; the column may be "
            "tag:PATTERN; may be repeated.",
        ),
    ] = None,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Hide rows and columns, at once and on every way out."""
    masks = _masks(mask or [])
    with out.connect(root, url, token) as session:
        made = session.add_policy(dataset, subject, row_filter, masks)
    return out.print_json(made) if json else _shown(made)


@policies.command("list")
def policy_list(
    dataset: Annotated[str | None, typer.Option(help="Only those that match this dataset.")] = None,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """List policies, oldest first."""
    with out.connect(root, url, token) as session:
        found = session.policies(dataset)
    if json:
        return out.print_json(found)
    rows = [(p.id, p.dataset, p.subject, p.row_filter, p.masks, out.moment(p.created_at)) for p in found]
    return out.table(("ID", "DATASET", "SUBJECT", "ROW FILTER", "MASKS", "MADE"), rows, "no policies")


@policies.command("show")
def policy_show(
    id: Annotated[str, typer.Argument(metavar="ID", help="The policy's id, from `headrace policy list`.")],
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Show one policy."""
    with out.connect(root, url, token) as session:
        found = session.policy(id)
    return out.print_json(found) if json else _shown(found)


@policies.command("remove")
def policy_remove(
    id: Annotated[str, typer.Argument(metavar="ID", help="The policy's id, from `headrace policy list`.")],
    yes: out.Yes = False,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """End a policy, at once: what it hid is visible again."""
    out.confirm(f"End policy {out.clean(id)} and show what it hides?", yes)
    with out.connect(root, url, token) as session:
        gone = session.remove_policy(id)
    return out.print_json(gone) if json else typer.echo(f"policy {out.clean(id)} has ended")


def _print_tags(found: list[ColumnTag], json: bool) -> None:
    if json:
        return out.print_json(found)
    return out.table(("COLUMN", "TAG"), [(one.column, one.tag) for one in found], "no column tags")


@column_tags.command("list")
def column_tag_list(
    dataset: Dataset,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """List the tags of a dataset's columns."""
    with out.connect(root, url, token) as session:
        return _print_tags(session.column_tags(dataset), json)


@column_tags.command("add")
def column_tag_add(
    dataset: Dataset,
    column: Column,
    tag: Tag,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Tag a column; policies that name the tag hold for it at once."""
    with out.connect(root, url, token) as session:
        return _print_tags(session.tag_column(dataset, column, tag), json)


@column_tags.command("remove")
def column_tag_remove(
    dataset: Dataset,
    column: Column,
    tag: Tag,
    yes: out.Yes = False,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Take a tag from a column; policies that name the tag no longer hold for it."""
    out.confirm(f"Take {out.clean(tag)} from {out.clean(column)}? What policies hid by it is visible then.", yes)
    with out.connect(root, url, token) as session:
        return _print_tags(session.untag_column(dataset, column, tag), json)


def classify(
    ref: Annotated[str, typer.Argument(help="A version: name, name@7, name@tag.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows to look at.")] = 10_000,
    apply: Annotated[bool, typer.Option("--apply", help="Tag the columns as proposed.")] = False,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Look for personal data in a version and propose column tags."""
    with out.connect(root, url, token) as session:
        found = session.classify(ref, rows, apply)
    if json:
        return out.print_json(found)
    lines = [(one.column, one.tag, out.count(one.values), out.count(one.found)) for one in found]
    out.table(("COLUMN", "TAG", "VALUES", "FOUND"), lines, "no personal data found")
    if found:
        out.note("the columns are tagged so" if apply else "proposals; --apply tags the columns so")
    return None


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.add_typer(policies, name="policy")
    app.add_typer(column_tags, name="column-tag")
    app.command()(classify)
