"""What leaves the exchange towards a trainer: manifests, signed URLs, and the way back from a step to its sources."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace import reading
from headrace.errors import BadRequest, Forbidden, NotFound
from headrace.model import FileEntry, Manifest, Ref, TracedRow, Version
from headrace.order import Order, Shuffle
from headrace.reading import Contents
from headrace.root import Root
from headrace.settings import integer
from headrace.store.parquet import read_batches
from headrace.store.types import decode_schema, describe, encode_schema, to_stored

TRACED_MAX = 100_000


def manifest(catalog: Contents, ref: Ref, columns: Sequence[str] | None, page_token: str | None) -> Manifest:
    """One page of the files behind a ref; positions count from the first row of the ref's split."""
    version = catalog.resolve(ref)
    whole = decode_schema(catalog.details(version.dataset, version.version)[0])
    names = list(columns) if columns is not None else [f.name for f in whole if not f.name.startswith("_")]
    unknown = [name for name in names if name not in whole.names]
    if unknown:
        raise BadRequest(f"{version.ref} has no column {unknown[0]!r}", hint=f"its columns: {', '.join(whole.names)}")
    schema = pa.schema([whole.field(name) for name in names])
    first = _split_start(catalog, version, ref.split)
    limit = integer("manifest_page_files")
    after = -1 if page_token is None else _page(page_token)
    files = catalog.files(version.dataset, version.version, ref.split, after, limit)
    more = str(files[-1].start) if len(files) == limit else None
    return Manifest(
        dataset=version.dataset,
        version=version.version,
        fingerprint=_fingerprint(version, ref.split),
        schema=describe(schema),
        arrow_schema=encode_schema(schema),
        rows=version.rows if ref.split is None else version.splits[ref.split],
        block_rows=version.block_rows,
        files=tuple(replace(entry, start=entry.start - first, path="") for entry in files),
        split=ref.split,
        next_page_token=more,
    )


def _page(token: str) -> int:
    if not (token.isascii() and token.isdigit()) or len(token) > 18:
        raise BadRequest("the page_token is not one of ours", hint="use next_page_token of the last page")
    return int(token)


def _fingerprint(version: Version, split: str | None) -> str:
    """The content hash; a split's is bound to its name, as its rows are fixed by the content and the name."""
    if split is None:
        return version.fingerprint
    return hashlib.sha256(f"{version.fingerprint}:{split}".encode()).hexdigest()


def _split_start(catalog: Contents, version: Version, split: str | None) -> int:
    if split is None:
        return 0
    first = catalog.files(version.dataset, version.version, split, limit=1)
    return first[0].start if first else 0


class Signer:
    """Signs file ids for a principal and a time with the key of the root, which is made on first use."""

    def __init__(self, root: Root) -> None:
        self._key = root.secret("urls")

    def sign(self, file_id: str, principal: str) -> tuple[int, str]:
        """When the signature ends (seconds since 1970), and the signature."""
        expires = int(time.time()) + integer("url_seconds")
        return expires, self._mac(file_id, expires, principal)

    def check(self, file_id: str, expires: int, principal: str, signature: str) -> None:
        """Raise Forbidden unless ``sign`` made this signature and its time is not over."""
        good = hmac.compare_digest(self._mac(file_id, expires, principal).encode(), signature.encode())
        if not good or expires < time.time():
            raise Forbidden(
                "the URL of this file has expired" if good else "the signature of this URL is not valid",
                hint="POST /v1/files:sign gives a new one",
            )

    def _mac(self, file_id: str, expires: int, principal: str) -> str:
        text = f"{file_id}\n{expires}\n{principal}".encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()


def trace(
    root: Root,
    catalog: Contents,
    ref: Ref,
    *,
    step: int | None,
    row: str | None,
    source: str | None,
    seed: int,
    epoch: int,
    batch_size: int,
    world_size: int,
    shuffle: Shuffle,
) -> list[TracedRow]:
    """The rows of a training step; or those with an ``_id`` or source locator, and the step and rank that saw them."""
    if sum(asked is not None for asked in (step, row, source)) != 1:
        raise BadRequest("ask for a step, a row or a source", hint="give exactly one of step, row, source")
    version = catalog.resolve(ref)
    rows = version.rows if ref.split is None else version.splits[ref.split]
    together = batch_size * world_size
    if together > TRACED_MAX:
        raise BadRequest(f"a step of {together} rows is too large", hint=f"at most {TRACED_MAX}")
    order = Order(rows, seed, epoch, shuffle, version.block_rows)
    if step is not None:
        if not 0 <= step < order.steps(batch_size, world_size, drop_last=False):
            raise BadRequest(
                f"step {step} is beyond the epoch",
                hint=f"{version.ref} has {rows} rows, {together} per step",
            )
        # A last, incomplete step is padded from the epoch's beginning when it is fed; the padding is left out here.
        places = np.arange(step * together, min((step + 1) * together, rows))
        wanted, ranks = order.rows_at(places), places % together // batch_size
        found = _resolved(root, version, _rows(root, catalog, version, ref.split, wanted))
        return [replace(found[int(w)], rank=int(r), step=step) for w, r in zip(wanted, ranks, strict=True)]
    found = _resolved(root, version, _search(root, catalog, version, ref.split, row, source))
    if not found:
        raise NotFound(f"{version.ref} has no such row", hint="an _id or a source locator is compared whole")
    positions = order.position_of(np.array(sorted(found)))
    return [
        replace(found[at], step=int(p) // together, rank=int(p) % together // batch_size)
        for at, p in zip(sorted(found), positions, strict=True)
    ]


def _resolved(root: Root, version: Version, rows: dict[int, TracedRow]) -> dict[int, TracedRow]:
    """``rows`` with source and locator for each document that was packed into them."""
    path = reading.origins_path(root, version.dataset, version.run or "")
    if not path.exists():
        return rows
    wanted = pa.array(sorted({part["id"] for row in rows.values() for part in row.sources}), pa.string())
    known: dict[str, dict[str, Any]] = {}
    for batch in read_batches([path]):
        hits = batch.filter(pc.is_in(batch.column("_id"), wanted))
        known.update((line["_id"], _source(line["_source"])) for line in hits.to_pylist())
    return {
        at: replace(row, sources=tuple({**known.get(part["id"], {}), **part} for part in row.sources))
        for at, row in rows.items()
    }


def _columns(version: Version) -> list[str]:
    held = {column["name"] for column in version.schema}
    return [name for name in ("_id", "_source", "_sources") if name in held]


def _stored(catalog: Contents, version: Version) -> pa.Schema:
    return to_stored(decode_schema(catalog.details(version.dataset, version.version)[0]))


def _rows(root: Root, catalog: Contents, version: Version, split: str | None, wanted: Any) -> dict[int, TracedRow]:
    """The rows at some positions, reading only the row groups that hold them."""
    files = catalog.files(version.dataset, version.version, split)
    starts = [0, *accumulate(entry.rows for entry in files)]
    schema, columns = _stored(catalog, version), _columns(version)
    places = np.unique(np.asarray(wanted, np.int64))
    found: dict[int, TracedRow] = {}
    while len(places):
        # Each file is gone through once, batch by batch, from the first place in it to the last.
        number = int(np.searchsorted(starts, places[0], "right")) - 1
        mine, places = np.split(places, [int(np.searchsorted(places, starts[number + 1]))])
        at, count = int(mine[0]), int(mine[-1] - mine[0]) + 1
        path = reading.located(root, catalog, version.dataset, [files[number]])
        for batch in read_batches(path, schema, columns, None, at - starts[number], count):
            here = mine[(mine >= at) & (mine < at + batch.num_rows)]
            rows = batch.take(pa.array(here - at)).to_pylist()
            found.update((int(place), _traced(int(place), row)) for place, row in zip(here, rows, strict=True))
            at += batch.num_rows
    return found


def _search(
    root: Root, catalog: Contents, version: Version, split: str | None, row: str | None, source: str | None
) -> dict[int, TracedRow]:
    files: Sequence[FileEntry] = catalog.files(version.dataset, version.version, split)
    schema, columns = _stored(catalog, version), _columns(version)
    ids = _documents(root, version, row, source)
    found: dict[int, TracedRow] = {}
    start = 0
    for batch in read_batches(reading.located(root, catalog, version.dataset, files), schema, columns):
        for index in np.flatnonzero(_matches(batch, ids, source)).tolist():
            found[start + index] = _traced(start + index, batch.slice(index, 1).to_pylist()[0])
            if len(found) > TRACED_MAX:
                raise BadRequest("too many rows match", hint="trace an _id, or a narrower source")
        start += batch.num_rows
    return found


def _documents(root: Root, version: Version, row: str | None, source: str | None) -> pa.Array:
    """The ids asked for: ``row`` itself, or the packed documents that came from ``source``."""
    found = [] if row is None else [row]
    path = reading.origins_path(root, version.dataset, version.run or "")
    if source is not None and path.exists():
        for batch in read_batches([path]):
            hits = pc.equal(pc.struct_field(batch.column("_source"), "locator"), source)
            found += batch.filter(pc.fill_null(hits, False)).column("_id").to_pylist()
    return pa.array(found, pa.string())


def _matches(batch: pa.RecordBatch, ids: pa.Array, source: str | None) -> Any:
    hit = pc.is_in(batch.column("_id"), ids)
    if "_sources" in batch.schema.names:
        packed = batch.column("_sources")
        inside = pc.is_in(pc.struct_field(pc.list_flatten(packed), "id"), ids)
        owners = pc.list_parent_indices(packed).filter(inside)
        hit = pc.or_(hit, pc.is_in(pa.array(range(batch.num_rows)), owners.cast(pa.int64())))
    elif source is not None:
        hit = pc.or_(hit, pc.fill_null(pc.equal(pc.struct_field(batch.column("_source"), "locator"), source), False))
    return hit.to_numpy(zero_copy_only=False)


def _source(source: Mapping[str, Any] | None) -> dict[str, Any]:
    when = (source or {}).get("collected_at")
    return {**(source or {}), "collected_at": None if when is None else when.isoformat().replace("+00:00", "Z")}


def _traced(position: int, row: Mapping[str, Any]) -> TracedRow:
    source = row.get("_source")
    sources: list[dict[str, Any]] = []
    if row.get("_sources") is not None:
        sources = [dict(part) for part in row["_sources"]]
    elif source is not None:
        sources = [{**_source(source), "id": row["_id"]}]
    return TracedRow(position, row["_id"], tuple(sources))
