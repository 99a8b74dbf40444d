"""Verbs on data: put it in, look at it, compare it, follow it back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import out
from headrace.errors import BadRequest, NotFound
from headrace.lazy import load
from headrace.model import to_dict

if TYPE_CHECKING:
    from headrace.client.session import Session
    from headrace.model import Quarantined, Receipt, TracedRow, Version

DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="A dataset's name.")]
RefText = Annotated[
    str, typer.Argument(metavar="REF", help="name, name@7, name@tag or name@latest, then :split if any.")
]

STDIN_FORMAT = "ndjson"
WIDE = 200


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar of bytes on a terminal; a plain line before and after otherwise. Both on stderr."""
    if not sys.stderr.isatty():
        out.note(f"uploading {label}")
        yield lambda _done, _total: None
        return
    rich = load("rich.progress")
    bar = rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        console=load("rich.console").Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(out.clean(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _send(session: Session, dataset: str, source: str, options: dict[str, Any], quiet: bool) -> Receipt:
    records: Any = sys.stdin.buffer if source == "-" else Path(source)
    if source == "-" and options["format"] is None:
        options = {**options, "format": STDIN_FORMAT}
    if quiet:
        return session.upload(dataset, records, **options)
    label = "standard input" if source == "-" else Path(source).name
    with _bar(label) as heard:
        return session.upload(dataset, records, on_progress=heard, **options)


def _check_files(files: list[str]) -> None:
    """Look before anything is sent, so that a misspelt name does not leave half of the files uploaded."""
    for name in files:
        if name != "-" and Path(name).is_dir():
            raise BadRequest(f"{name!r} is a folder", hint="name its files, for example with a pattern of your shell")
        if name != "-" and not Path(name).exists():
            raise NotFound(f"there is no file {name!r}", hint="check the path; nothing was sent")


def _print_receipt(receipt: Receipt) -> None:
    said = [f"{receipt.dataset}: {out.count(receipt.accepted)} accepted"]
    said += [f"{out.count(receipt.rejected)} rejected"] if receipt.rejected else []
    said += [f"{out.count(receipt.duplicates)} already there"] if receipt.duplicates else []
    typer.echo(", ".join(said) + f"   receipt {receipt.receipt}")
    for error in receipt.errors:
        out.note(f"  record {error.index}: {out.clean(error.reason, 400)}")


def upload(
    dataset: DatasetName,
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="Files to send; - reads standard input.")],
    format: Annotated[
        str | None,
        typer.Option(help="json, ndjson, csv, tsv, parquet or arrow, if the name does not say it (- is ndjson)."),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Column whose value becomes each record's _id.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Name of this upload: sent again under it, nothing is stored twice.")
    ] = None,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Send files into a dataset. What is accepted is safe on disk. Exits with 1 if any record was rejected."""
    if idempotency_key is not None and len(files) > 1:
        raise BadRequest("one --idempotency-key cannot name several files", hint="upload them one by one")
    _check_files(files)
    options = {"format": format, "key": key, "idempotency_key": idempotency_key}
    receipts: list[Receipt] = []
    with out.connect(root, url, token, new=True) as session:
        for source in files:
            receipts.append(_send(session, dataset, source, options, quiet=json))
            if not json:
                _print_receipt(receipts[-1])
    if json:
        out.print_json(receipts if len(files) > 1 else receipts[0])
    if any(receipt.rejected for receipt in receipts):
        raise typer.Exit(1)


def datasets(root: out.Root = None, url: out.Url = None, token: out.Secret = None, json: out.Json = False) -> None:
    """List the datasets, with version, rows and tags."""
    with out.connect(root, url, token) as session:
        found = session.datasets()
    if json:
        return out.print_json(found)
    rows = [
        (
            d.name,
            d.version,
            out.count(d.rows),
            "-" if d.bytes is None else out.size(d.bytes),
            out.count(d.pending),
            out.count(d.quarantined),
            d.tags,
        )
        for d in found
    ]
    names = ("DATASET", "VERSION", "ROWS", "SIZE", "ON THE WAY", "QUARANTINED", "TAGS")
    return out.table(names, rows, "no datasets yet; `headrace upload NAME FILE` makes one")


def versions(
    dataset: DatasetName,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """List the versions of a dataset, the newest first."""
    with out.connect(root, url, token) as session:
        found = session.versions(dataset)
    if json:
        return out.print_json(found)
    rows = [
        (v.ref, v.kind, out.count(v.rows), out.size(v.bytes), out.moment(v.created_at), v.tags, v.fingerprint[:12])
        for v in found
    ]
    return out.table(("REF", "KIND", "ROWS", "SIZE", "MADE", "TAGS", "FINGERPRINT"), rows, "no versions yet")


def print_counts(counts: Any) -> None:
    """The table of what each step did, with its rules."""
    rows = [
        (c.step, out.count(c.rows_in), out.count(c.rows_out), out.count(c.quarantined), out.count(c.merged), c.rules,
         f"{c.seconds:.2f}")
        for c in counts
    ]  # fmt: skip
    if rows:
        out.table(("STEP", "IN", "OUT", "QUARANTINED", "MERGED", "BY RULE", "SECONDS"), rows, "")


def _print_version(version: Version) -> None:
    out.fields(
        {
            "ref": version.ref,
            "kind": version.kind,
            "made": out.moment(version.created_at),
            "rows": out.count(version.rows),
            "size": f"{out.size(version.bytes)} in {out.count(version.files)} files",
            "tags": version.tags,
            "splits": version.splits,
            "fingerprint": version.fingerprint,
            "run": version.run,
            "inputs": version.inputs,
            "fitted": version.fitted,
        }
    )
    typer.echo("")
    out.table(("COLUMN", "TYPE"), [(c.get("name"), c.get("type")) for c in version.schema], "no columns", WIDE)
    if version.counts:
        typer.echo("")
        print_counts(version.counts)


def show(
    ref: RefText, root: out.Root = None, url: out.Url = None, token: out.Secret = None, json: out.Json = False
) -> None:
    """Show one version: schema, counts, inputs, fingerprint."""
    with out.connect(root, url, token) as session:
        version = session.show(ref)
    return out.print_json(version) if json else _print_version(version)


def tokenizer(ref: RefText, root: out.Root = None, url: out.Url = None, token: out.Secret = None) -> None:
    """Print the tokenizer.json that made a version's tokens."""
    with out.connect(root, url, token) as session:
        typer.echo(session.tokenizer(ref))


def head(
    ref: RefText,
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="How many rows.")] = 10,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Show the first rows."""
    with out.connect(root, url, token) as session:
        found = session.head(ref, rows)
    if json:
        return out.print_json(found)
    names = list(found[0]) if found else []
    return out.table([out.clean(name) for name in names], [[row[name] for name in names] for row in found], "no rows")


def tag(
    ref: RefText,
    name: Annotated[str, typer.Argument(help="The tag, with at least one letter.")],
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Give a version a name; a tag that stood elsewhere moves."""
    with out.connect(root, url, token) as session:
        version = session.tag(ref, name)
    return out.print_json(version) if json else typer.echo(f"{version.dataset}@{name} is {version.ref}")


def diff(
    base: RefText,
    other: RefText,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Compare two versions record by record, matched by _id."""
    with out.connect(root, url, token) as session:
        found = session.diff(base, other)
    if json:
        return out.print_json(found)
    rows = [
        (what, out.count(number), sample)
        for what, number, sample in (
            ("added", found.added, found.sample_added),
            ("removed", found.removed, found.sample_removed),
            ("changed", found.changed, found.sample_changed),
            ("same", found.same, ()),
        )
    ]
    typer.echo(f"from {found.base} to {found.other}")
    out.table(("RECORDS", "COUNT", "FOR EXAMPLE"), rows, "")
    return out.fields({"columns added": found.columns_added, "columns removed": found.columns_removed})


def _quarantine_row(q: Quarantined) -> tuple[Any, ...]:
    return (q.id, q.step, q.rule, q.field, q.value, q.reason, q.record)


def quarantine(
    dataset: DatasetName,
    rule: Annotated[str | None, typer.Option(help="Only what this rule dropped.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many records.")] = 100,
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """List dropped and refused records.

    Each comes with the rule, the value that decided and the reason.
    """
    with out.connect(root, url, token) as session:
        found = session.quarantine(dataset, rule, limit)
    if json:
        return out.print_json(found)
    under = "" if rule is None else f" under rule {rule!r}"
    names = ("ID", "STEP", "RULE", "FIELD", "VALUE", "REASON", "RECORD")
    return out.table(names, [_quarantine_row(q) for q in found], f"nothing is in quarantine{under}")


def _came_from(row: TracedRow, source: Mapping[str, Any]) -> str:
    """Where a source record came from, in words; its own ``_id`` only if it is not that of the row."""
    told = [f"{source.get('source') or 'unknown'}: {source.get('locator') or '-'}"]
    told += [f"record {source['id']}"] if source.get("id") not in (None, row.id) else []
    if source.get("length") is not None:
        told.append(f"from position {source.get('start', 0)}, {source['length']} long")
    told += [f"collected {out.moment(source['collected_at'])}"] if source.get("collected_at") else []
    return ", ".join(told)


def _traced_rows(found: list[TracedRow]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for row in found:
        for nth, source in enumerate(row.sources or ({},)):
            first = (row.step, row.rank, row.row, row.id) if nth == 0 else ("", "", "", "")
            rows.append((*first, _came_from(row, source)))
    return rows


def trace(
    ref: RefText,
    step: Annotated[int | None, typer.Option(min=0, help="A training step, counted from 0.")] = None,
    row: Annotated[str | None, typer.Option(metavar="ID", help="The _id of a row.")] = None,
    source: Annotated[str | None, typer.Option(metavar="LOCATOR", help="Where a record came from.")] = None,
    seed: Annotated[int, typer.Option(help="The feed's seed.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="The feed's epoch, counted from 0.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of one rank.")] = 32,
    world: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    shuffle: Annotated[str, typer.Option(help="window, global or false.")] = "window",
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Follow a training step to its sources.

    Or find a row by its _id, or the rows that a source record became. Give exactly one of --step, --row and --source.
    """
    if sum(asked is not None for asked in (step, row, source)) != 1:
        raise BadRequest("give exactly one of --step, --row and --source", hint="for example --step 1200")
    with out.connect(root, url, token) as session:
        found = session.trace(
            ref,
            step=step,
            seed=seed,
            epoch=epoch,
            batch_size=batch,
            world_size=world,
            shuffle=shuffle,
            row=row,
            source=source,
        )
    if json:
        return out.print_json(found)
    return out.table(("STEP", "RANK", "ROW", "ID", "SOURCE"), _traced_rows(found), "no rows", WIDE)


def receipt(
    id: Annotated[str, typer.Argument(metavar="RECEIPT", help="The receipt's number.")],
    root: out.Root = None,
    url: out.Url = None,
    token: out.Secret = None,
    json: out.Json = False,
) -> None:
    """Say what became of an upload."""
    with out.connect(root, url, token) as session:
        found = session.receipt(id)
    return out.print_json(found) if json else out.fields(to_dict(found))


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for verb in (upload, datasets, versions, show, head, tokenizer, tag, diff, quarantine, trace, receipt):
        app.command()(verb)
