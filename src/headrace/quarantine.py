"""The dropped and refused records of a dataset: a table beside it, each record once, with every rule that fired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headrace.catalog import Catalog
from headrace.model import Quarantined
from headrace.root import Root
from headrace.rows import records, to_json
from headrace.store.parquet import read_batches

_FIRED = pa.struct(
    [
        ("rule", pa.string()),
        ("field", pa.string()),
        ("value", pa.string()),
        ("reason", pa.string()),
        ("kept", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("run", pa.string()),
        ("step", pa.string()),
        ("rule", pa.string()),
        ("field", pa.string()),
        ("value", pa.string()),
        ("reason", pa.string()),
        ("kept", pa.string()),
        ("fired", pa.list_(_FIRED)),
        ("record", pa.string()),
        (
            "source",
            pa.struct([("source", pa.string()), ("locator", pa.string()), ("collected_at", pa.timestamp("us", "UTC"))]),
        ),
        ("at", pa.timestamp("us", "UTC")),
    ]
)
"""Frozen. ``rule`` to ``kept`` belong to the first rule that fired, ``fired`` lists all; ``kept`` is the twin."""


def held(batch: pa.RecordBatch, verdicts: pa.RecordBatch, run: str, step: str, at: Any) -> pa.RecordBatch:
    """The quarantine rows of one step's verdicts on ``batch``: one per record, in row order, stamped ``at``."""
    by_row: dict[int, list[dict[str, Any]]] = {}
    for verdict in verdicts.to_pylist():
        by_row.setdefault(verdict.pop("row"), []).append(verdict)
    order = sorted(by_row)
    dropped = batch.take(pa.array(order, pa.int64()))
    texts = records(dropped)
    ids = dropped.column("_id").to_pylist()
    sources = dropped.column("_source").to_pylist() if "_source" in dropped.schema.names else [None] * len(order)
    rows = []
    for row, text, row_id, source in zip(order, texts, ids, sources, strict=True):
        fired = by_row[row]
        rows.append(
            {
                **fired[0],
                "id": row_id,
                "run": run,
                "step": step,
                "fired": fired,
                "record": text.decode(),
                "source": source,
                "at": at,
            }
        )
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def refused(rows: Sequence[dict[str, Any]], run: str, step: str, at: Any) -> pa.RecordBatch:
    """Quarantine rows of records that never became rows: dicts with id, rule, field, value, reason, record, source."""
    keys = ("rule", "field", "value", "reason")
    complete = [
        {
            **row,
            "run": run,
            "step": step,
            "kept": None,
            "at": at,
            "fired": [{**{k: row[k] for k in keys}, "kept": None}],
        }
        for row in rows
    ]
    return pa.RecordBatch.from_pylist(complete, schema=SCHEMA)


def rules_of(batches: Iterable[pa.RecordBatch]) -> dict[str, int]:
    """Records per first rule."""
    counts: Counter[str] = Counter()
    for batch in batches:
        for pair in pc.value_counts(batch.column("rule")).to_pylist():
            counts[pair["values"]] += pair["counts"]
    return dict(sorted(counts.items()))


def read(
    root: Root, catalog: Catalog, dataset: str, rule: str | None, limit: int, skip: int
) -> tuple[list[Quarantined], int | None]:
    """``limit`` quarantined records after ``skip``, oldest first, and where the next page starts, or None."""
    found: list[Quarantined] = []
    position = 0
    for _, path, _, rows, rules in catalog.quarantine_files(dataset):
        matching = rows if rule is None else rules.get(rule, 0)
        if position + matching <= skip:
            position += matching
            continue
        for batch in read_batches([root.quarantine(dataset) / path], SCHEMA):
            chosen = batch if rule is None else batch.filter(pc.equal(batch.column("rule"), rule))
            for row in chosen.slice(max(0, skip - position)).to_pylist():
                if len(found) == limit:
                    return found, skip + limit
                found.append(shown(row))
            position += chosen.num_rows
    return found, None


def shown(row: dict[str, Any]) -> Quarantined:
    """A row of the quarantine table as the interfaces show it."""
    source = row.pop("source")
    row.pop("fired")
    row["at"] = row["at"].isoformat().replace("+00:00", "Z")
    if source is not None:
        source = {k: v.isoformat().replace("+00:00", "Z") if hasattr(v, "isoformat") else v for k, v in source.items()}
    return Quarantined(**row, source=source)


def count_of(root: Root, catalog: Catalog, dataset: str, run: str, receipt: str) -> int:
    """How many records of one upload are held."""
    total = 0
    for _, path, made_by, _, _ in catalog.quarantine_files(dataset):
        if made_by == run:
            for batch in read_batches([root.quarantine(dataset) / path], SCHEMA, ["id"]):
                total += pc.sum(pc.starts_with(batch.column("id"), f"{receipt}-")).as_py() or 0
    return total


def short(value: Any, limit: int = 200) -> str:
    """A deciding value as text, cut to ``limit`` characters."""
    text = value if isinstance(value, str) else to_json(value).decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"
