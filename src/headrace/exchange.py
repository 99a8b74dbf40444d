"""The one deep interface: every method takes the principal first, decides, and does. REST and sessions are skins."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from headrace import arrivals, deliver, govern, quarantine, reading, recipe
from headrace.catalog import Catalog, now
from headrace.clean.keys import row_keys
from headrace.errors import BadRequest, Busy, HeadraceError, NotFound, Unauthenticated, from_dict
from headrace.inbox import InboxReader, Snapshot
from headrace.model import (
    SYSTEM_COLUMNS,
    Dataset,
    Diff,
    Manifest,
    Principal,
    Quarantined,
    Receipt,
    Ref,
    Run,
    Token,
    TracedRow,
    Version,
    check_name,
    check_tag,
)
from headrace.order import Shuffle
from headrace.predicate import compile_where
from headrace.root import Root
from headrace.rows import SYSTEM, records
from headrace.settings import integer
from headrace.store.types import narrow

OPEN_DATASET = "default"
PREVIEW_SECONDS = 600.0
PREVIEWS_MOST = 4
"""Previews that wait for a worker at once: each holds a thread that others would answer from."""
_SAMPLE = 10


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows on their way out: true types, bounded batches. ``version`` is None where only the inbox holds rows."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]
    version: int | None
    etag: str


@dataclass(frozen=True, slots=True)
class GetData:
    """The text of one JSON array, in chunks."""

    etag: str
    chunks: Iterator[bytes]


class Exchange:
    """One exchange. Needs no worker to answer; flushing and running recipes is the worker's."""

    def __init__(self, root: Root) -> None:
        self._place = root
        self.root = root.path
        self.catalog = Catalog(root.catalog)
        self.reader = InboxReader(root.path)
        self._signer = deliver.Signer(root)
        self._previews = threading.BoundedSemaphore(PREVIEWS_MOST)
        self._known: set[str] = set(self.catalog.dataset_names())

    def close(self) -> None:
        """Let files and connections go."""
        self.reader.close()
        self.catalog.close()

    # Who calls

    def first_token(self) -> Token | None:
        """An admin token, the first time an exchange is served; None ever after."""
        return None if self.catalog.tokens() else self._new_token("admin", "admin", ("*",), None)

    def owner_token(self) -> str:
        """The secret by which programs that may read the root's files talk to the server that owns it."""
        path = self._place.keys / "owner"
        if path.exists() and self.catalog.token_by_hash(_hash(path.read_text())) is not None:
            return path.read_text()
        token = self._new_token(govern.OWNER.name, "admin", ("*",), None)
        handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(str(token.secret))
        return str(token.secret)

    def authenticate(self, secret: str) -> Principal:
        """The principal of a token; Unauthenticated if it is unknown, expired or revoked."""
        token = self.catalog.token_by_hash(_hash(secret))
        if token is None:
            raise Unauthenticated("this token is not known here", hint="check it, or ask an admin for a new one")
        if token.revoked_at is not None:
            raise Unauthenticated("this token was revoked", hint="ask an admin for a new one")
        if token.expires_at is not None and token.expires_at < now():
            raise Unauthenticated("this token has expired", hint="ask an admin for a new one")
        return Principal(token.principal, token.role, token.datasets)

    def _new_token(self, name: str, role: str, datasets: Sequence[str], days: int | None) -> Token:
        secret = f"hr_{secrets.token_urlsafe(32)}"
        ends = None if days is None else (datetime.now(UTC) + timedelta(days=days)).isoformat().replace("+00:00", "Z")
        token = Token(secrets.token_hex(8), name, role, tuple(datasets), now(), ends)
        self.catalog.add_token(token, _hash(secret))
        return replace(token, secret=secret)

    def create_token(
        self, principal: Principal, name: str, role: str, datasets: Sequence[str], days: int | None
    ) -> Token:
        """A new token; the answer alone holds its secret."""
        govern.allow(principal, govern.ADMIN)
        check_name(name, "principal")
        if role not in govern.ROLES:
            raise BadRequest(f"{role!r} is not a role", hint=f"one of {', '.join(govern.ROLES)}")
        if days is not None and not 1 <= days <= 36500:
            raise BadRequest(f"{days} days is no life for a token", hint="1 to 36500, or none for no end")
        if not datasets or any(not pattern or len(pattern) > 128 for pattern in datasets):
            raise BadRequest("a token needs dataset patterns", hint="'*' means all, 'web-*' those that begin with web-")
        return self._new_token(name, role, datasets, days)

    def tokens(self, principal: Principal) -> list[Token]:
        """All tokens, without secrets."""
        govern.allow(principal, govern.ADMIN)
        return [token for token in self.catalog.tokens() if token.principal != govern.OWNER.name]

    def revoke_token(self, principal: Principal, token_id: str) -> Token:
        """End a token."""
        govern.allow(principal, govern.ADMIN)
        return self.catalog.revoke_token(token_id)

    # Data in

    def admit(self, principal: Principal, dataset: str, key: str | None, idem: str | None) -> None:  # noqa: ARG002
        """Assert that ``principal`` may upload to ``dataset``; Forbidden, BadRef or BadRequest. Changes nothing."""
        check_name(dataset)
        govern.allow(principal, govern.WRITE, dataset)
        if key is not None and (not key or len(key) > 255):
            raise BadRequest("key names one column of the records", hint="?key=patient_no")

    def make_known(self, dataset: str) -> None:
        """List ``dataset``, once an upload to it was judged and before it is stored; does nothing if it is listed."""
        if dataset not in self._known:
            self.catalog.create_dataset(dataset)
            self._known.add(dataset)

    def flushed(self) -> dict[str, int]:
        """Dataset → the inbox seq up to which its uploads are committed."""
        return self.catalog.marks()

    def receipt(self, principal: Principal, receipt_id: str) -> Receipt:
        """What became of an upload."""
        found = self.reader.receipt(receipt_id)
        if found is None or not govern.may(principal, govern.READ, found.dataset):
            raise NotFound(f"there is no receipt {receipt_id[:64]!r}", hint="receipts are kept for some days only")
        made = Receipt(found.receipt, found.dataset, found.rows, found.rejected, 0, found.errors)
        if found.seq > self.catalog.mark(found.dataset):
            return made
        versions = self.catalog.versions(found.dataset, 1000)
        version = min((v.version for v in versions if v.inbox_seq >= found.seq), default=None)
        return replace(made, state="committed", version=version, quarantined=self._held_of(found.dataset, receipt_id))

    def _held_of(self, dataset: str, receipt_id: str) -> int:
        return quarantine.count_of(self._place, self.catalog, dataset, "inbox", receipt_id)

    # Datasets and versions

    def datasets(self, principal: Principal) -> list[Dataset]:
        """The datasets that the principal may read."""
        waiting = {p.dataset: p.rows for p in self._pending()}
        names = [n for n in self.catalog.dataset_names() if govern.may(principal, govern.READ, n)]
        return [replace(self.catalog.dataset(name), pending=waiting.get(name, 0)) for name in names]

    def _pending(self) -> list[Any]:
        marks = self.catalog.marks()
        return [p for p in self.reader.pending() if p.last_seq > marks.get(p.dataset, 0)]

    def dataset(self, principal: Principal, name: str) -> Dataset:
        """One dataset."""
        govern.allow(principal, govern.READ, check_name(name))
        pending = sum(p.rows for p in self._pending() if p.dataset == name)
        return replace(self.catalog.dataset(name), pending=pending)

    def versions(
        self, principal: Principal, name: str, limit: int, page_token: str | None
    ) -> tuple[list[Version], str | None]:
        """A page of versions, newest first."""
        self.dataset(principal, name)
        limit = _page_size(limit)
        found = self.catalog.versions(name, limit, _number(page_token))
        return found, str(found[-1].version) if len(found) == limit and found[-1].version > 0 else None

    def version(self, principal: Principal, ref: Ref) -> Version:
        """One version."""
        govern.allow(principal, govern.READ, ref.dataset)
        return self.catalog.resolve(ref)

    def tag(self, principal: Principal, ref: Ref, name: str) -> Version:
        """Point a tag at a version."""
        govern.allow(principal, govern.WRITE, ref.dataset)
        version = self.catalog.resolve(replace(ref, split=None))
        self.catalog.tag(ref.dataset, check_tag(name), version.version)
        return self.catalog.resolve(Ref(ref.dataset, str(version.version)))

    def quarantine(
        self, principal: Principal, name: str, rule: str | None, limit: int, page_token: str | None
    ) -> tuple[list[Quarantined], str | None]:
        """A page of the dropped, refused and merged records, oldest first."""
        self.dataset(principal, name)
        skip = _number(page_token) or 0
        found, more = quarantine.read(self._place, self.catalog, name, rule, _page_size(limit), skip)
        return found, None if more is None else str(more)

    def diff(self, principal: Principal, base: Ref, other: Ref) -> Diff:
        """Records added, removed and changed from ``base`` to ``other``, matched by ``_id``."""
        govern.allow(principal, govern.READ, base.dataset)
        govern.allow(principal, govern.READ, other.dataset)
        one, two = self.catalog.resolve(base), self.catalog.resolve(other)
        most = integer("diff_rows_max")
        if max(one.rows, two.rows) > most:
            raise BadRequest(f"a diff of more than {most} rows is not made here", hint="compare the Parquet files")
        shared = [c["name"] for c in one.schema if any(c["name"] == d["name"] for d in two.schema)]
        old, new = self._digests(base, shared), self._digests(other, shared)
        added, removed = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
        both = old.keys() & new.keys()
        changed = sorted(key for key in both if old[key] != new[key])
        names = [{c["name"] for c in v.schema} - set(SYSTEM_COLUMNS) for v in (one, two)]
        return Diff(
            one.ref, two.ref, len(added), len(removed), len(changed), len(both) - len(changed),
            tuple(sorted(names[1] - names[0])), tuple(sorted(names[0] - names[1])),
            tuple(added[:_SAMPLE]), tuple(removed[:_SAMPLE]), tuple(changed[:_SAMPLE]),
        )  # fmt: skip

    def _digests(self, ref: Ref, columns: Sequence[str]) -> dict[str, bytes]:
        """``_id`` → digest of the row's shared user columns."""
        user = [name for name in columns if name not in SYSTEM_COLUMNS]
        found: dict[str, bytes] = {}
        for batch in reading.scan(self._place, self.catalog, ref, ["_id", *user]):
            none = np.zeros(batch.num_rows, bool)
            keys = row_keys([batch.column(name) for name in user], none, collapse=False) if user else None
            digests = keys.to_pylist() if keys is not None else [b""] * batch.num_rows
            found.update(zip(batch.column("_id").to_pylist(), digests, strict=True))
        return found

    # Data out

    def read(
        self,
        principal: Principal,
        ref: Ref,
        columns: Sequence[str] | None = None,
        where: str | None = None,
        limit: int | None = None,
    ) -> Reading:
        """Rows behind a ref, user columns by default. Of ``latest``: its files, then what waits in the inbox."""
        govern.allow(principal, govern.READ, ref.dataset)
        self.catalog.dataset(ref.dataset)
        live = ref.at == "latest" and ref.split is None
        if not live:
            return self._rows(ref, self.catalog.resolve(ref), None, columns, where, limit)
        # The inbox first: what is flushed between the two reads is then dropped by its seq, never missed.
        snapshot = self._snapshot(ref.dataset)
        return self._rows(ref, self.catalog.latest(ref.dataset), snapshot, columns, where, limit)

    def _snapshot(self, dataset: str) -> Any:
        return self.reader.snapshot(dataset, self.catalog.mark(dataset))

    def _rows(
        self,
        ref: Ref,
        version: Version | None,
        held: Any,
        columns: Sequence[str] | None,
        where: str | None,
        limit: int | None,
    ) -> Reading:
        stored = reading.schema_of(self.catalog, version)
        opened = held.__enter__() if held is not None else None
        tail = _beyond(opened, version)
        schema = stored
        if tail and opened is not None:
            user = arrivals.user_schema(stored)
            for part in arrivals.projected(tail, opened.open, user):
                user = part.schema
            schema = pa.schema([*user, *(f for f in stored or SYSTEM if f.name in SYSTEM_COLUMNS)])
        if schema is None:
            schema = pa.schema([*SYSTEM])
        chosen = list(columns) if columns is not None else [n for n in schema.names if n not in SYSTEM_COLUMNS]
        rows = self._chosen(self._all(ref, version, opened, tail, schema), schema, chosen, where, limit)
        batches = reading.Stream(rows, lambda: held.__exit__(None, None, None) if held is not None else None)
        etag = hashlib.sha256(
            json.dumps(
                [str(ref), version.ref if version else None, chosen, where, limit, [e.seq for e in tail]]
            ).encode()
        ).hexdigest()[:32]
        out = pa.schema([schema.field(name) for name in chosen])
        return Reading(out, batches, version.version if version else None, f'"{etag}"')

    def _all(
        self, ref: Ref, version: Version | None, opened: Snapshot | None, tail: Sequence[Any], schema: pa.Schema
    ) -> Iterator[pa.RecordBatch]:
        if version is not None:
            pinned = Ref(ref.dataset, str(version.version), ref.split)
            for batch in reading.scan(self._place, self.catalog, pinned):
                yield _true(batch, schema)
        if tail and opened is not None:
            stored = reading.schema_of(self.catalog, version)
            for part in arrivals.projected(tail, opened.open, arrivals.user_schema(stored)):
                if part.batch.num_rows:
                    yield reading.conform(part.batch, schema)

    def _chosen(
        self,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        columns: Sequence[str],
        where: str | None,
        limit: int | None,
    ) -> Iterator[pa.RecordBatch]:
        for name in columns:
            if name not in schema.names:
                raise BadRequest(f"there is no column {name!r}", hint=f"columns: {', '.join(schema.names)}")
        chosen = compile_where(where, schema) if where is not None else None
        return _limited(batches, columns, chosen, limit)

    def get_data(self, principal: Principal, limit: int | None = None, offset: int = 0) -> GetData:
        """The records of ``default`` as they were uploaded, in order of arrival, as one JSON array."""
        govern.allow(principal, govern.READ, OPEN_DATASET)
        held = self._snapshot(OPEN_DATASET)
        opened = held.__enter__()
        version = self.catalog.latest(OPEN_DATASET) if OPEN_DATASET in self.catalog.dataset_names() else None
        tail = _beyond(opened, version)
        what = json.dumps([version.ref if version else None, limit, offset, [e.seq for e in tail]])
        etag = f'"{hashlib.sha256(what.encode()).hexdigest()[:32]}"'
        texts = self._texts(version, opened, tail, offset)
        return GetData(etag, reading.Stream(_array(texts, limit), lambda: held.__exit__(None, None, None)))

    def _texts(
        self, version: Version | None, opened: Snapshot, tail: Sequence[Any], offset: int
    ) -> Iterator[list[bytes]]:
        skip = offset
        if version is not None:
            yield from self._committed_texts(version, skip)
            skip = max(0, skip - version.rows)
        user = arrivals.user_schema(reading.schema_of(self.catalog, version))
        for part in arrivals.projected(tail, opened.open, user) if tail else ():
            texts = records(part.batch)
            yield texts[skip:]
            skip = max(0, skip - len(texts))

    def _committed_texts(self, version: Version, skip: int) -> Iterator[list[bytes]]:
        pinned = Ref(version.dataset, str(version.version))
        if "_raw" not in [column["name"] for column in version.schema]:
            yield from map(records, reading.scan(self._place, self.catalog, pinned, skip=skip))
            return
        for batch in reading.scan(self._place, self.catalog, pinned, ["_raw"], skip):
            if batch.column("_raw").null_count == 0:
                yield records(batch)
            else:
                # Some of these rows came as CSV, Arrow or Parquet: their text is made from their columns.
                rows = reading.scan(self._place, self.catalog, pinned, skip=skip, limit=batch.num_rows)
                yield from map(records, rows)
            skip += batch.num_rows

    # The feed

    def manifest(
        self, principal: Principal, ref: Ref, columns: Sequence[str] | None = None, page_token: str | None = None
    ) -> Manifest:
        """One page of the files behind a ref."""
        govern.allow(principal, govern.READ, ref.dataset)
        return deliver.manifest(self.catalog, ref, columns, page_token)

    def sign(self, principal: Principal, ids: Sequence[str]) -> dict[str, tuple[int, str]]:
        """For each file id: when its URL ends, and its signature."""
        if len(ids) > integer("page_items"):
            raise BadRequest(f"{len(ids)} ids are too many", hint=f"ask for {integer('page_items')} at a time")
        signed: dict[str, tuple[int, str]] = {}
        for file_id in ids:
            dataset, _ = self.catalog.file(file_id)
            if not govern.may(principal, govern.READ, dataset):
                # As of a file that is not there: the id of another's file tells neither that it is one nor of what.
                raise NotFound("there is no such file", hint="ask for the manifest again")
            signed[file_id] = self._signer.sign(file_id, principal.name)
        return signed

    def file_path(self, file_id: str, expires: int, by: str, signature: str) -> Path:
        """Where the bytes of a signed file id lie; Forbidden unless the signature holds."""
        self._signer.check(file_id, expires, by, signature)
        dataset, entry = self.catalog.file(file_id)
        return self._place.table(dataset) / entry.path

    def local_path(self, principal: Principal, file_id: str) -> Path:
        """Where the bytes of a file lie, for a feed in this process."""
        dataset, entry = self.catalog.file(file_id)
        govern.allow(principal, govern.READ, dataset)
        return self._place.table(dataset) / entry.path

    def tokenizer(self, principal: Principal, ref: Ref) -> bytes:
        """The tokenizer.json that made the tokens of a version; NotFound if it has none."""
        govern.allow(principal, govern.READ, ref.dataset)
        version = self.catalog.resolve(ref)
        for step in version.fitted.values():
            path = self._place.tokenizers / f"{step.get('tokenizer', '')}.json"
            if "sha256" in step and path.is_file():
                return path.read_bytes()
        raise NotFound(f"{version.ref} was not tokenised with a tokenizer.json", hint="its recipe has no such step")

    def trace(
        self,
        principal: Principal,
        ref: Ref,
        step: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        batch_size: int = 32,
        world_size: int = 1,
        shuffle: str = "window",
        row: str | None = None,
        source: str | None = None,
    ) -> list[TracedRow]:
        """From a training step to its rows and their sources, or from a row or source to the steps that saw it."""
        govern.allow(principal, govern.READ, ref.dataset)
        kinds: dict[str, Shuffle] = {"window": "window", "true": "window", "global": "global", "false": False}
        if str(shuffle).lower() not in kinds:
            raise BadRequest(f"{shuffle!r} is not an order", hint="window, global or false")
        return deliver.trace(
            self._place, self.catalog, ref, step=step, row=row, source=source, seed=seed, epoch=epoch,
            batch_size=batch_size, world_size=world_size, shuffle=kinds[str(shuffle).lower()],
        )  # fmt: skip

    # Recipes and runs

    def check_recipe(self, principal: Principal, text: str, base: str) -> list[dict[str, Any]]:
        """What is wrong with a recipe; nothing if it can run."""
        govern.allow(principal, govern.READ)
        trusted = govern.may(principal, govern.MANAGE)
        return recipe.problems(text, Path(base) if base else None, trusted=trusted)

    def run(self, principal: Principal, text: str, base: str, preview_rows: int = 0) -> Run:
        """Queue a run. The recipe is checked in full first, and so is the right to read and write what it names."""
        made = recipe.parse(text, Path(base) if base else None, trusted=govern.may(principal, govern.MANAGE))
        govern.allow(principal, govern.WRITE, made.dataset)
        for entry in made.collect:
            if entry.ref is not None:
                govern.allow(principal, govern.READ, entry.ref.dataset)
                self._must_exist(entry.ref)
            else:
                # Files are read with the exchange's own rights, so only those who manage it may name them.
                govern.allow(principal, govern.MANAGE)
        if any(step.paths() for step in (*made.clean, *made.transform)):
            govern.allow(principal, govern.MANAGE)
        for step in (*made.clean, *made.transform):
            step.check({"tokenizers": str(self._place.tokenizers)})
        if self.catalog.count_runs("queued") >= integer("runs_queued_max"):
            raise Busy("too many runs wait for a worker", hint="retry later", details={"retry_after": 10})
        run = Run(uuid.uuid4().hex, made.dataset, "queued", now(), recipe=text, preview_rows=preview_rows)
        self.catalog.add_run(run, principal.name, base)
        return run

    def _must_exist(self, ref: Ref) -> None:
        waiting = any(p.dataset == ref.dataset for p in self.reader.pending())
        if ref.at != "latest" or ref.split is not None or not waiting:
            self.catalog.resolve(ref)

    def runs(self, principal: Principal) -> list[Run]:
        """Runs on datasets that the principal may read, newest first."""
        found = self.catalog.runs(integer("page_items"))
        return [r for r in found if not r.preview_rows and govern.may(principal, govern.READ, r.dataset)]

    def run_status(self, principal: Principal, run_id: str) -> Run:
        """One run."""
        run, _, _ = self.catalog.run(run_id)
        govern.allow(principal, govern.READ, run.dataset)
        return run

    def preview(self, principal: Principal, text: str, base: str, rows: int) -> dict[str, Any]:
        """The effect of a recipe on its first records, as a worker finds it. Commits nothing."""
        if not 1 <= rows <= 100_000:
            raise BadRequest(f"a preview of {rows} rows is not possible", hint="1 to 100000")
        if not self._previews.acquire(blocking=False):
            raise Busy(f"{PREVIEWS_MOST} previews are at work already", hint="try again in a moment")
        try:
            return self._previewed(self.run(principal, text, base, preview_rows=rows))
        finally:
            self._previews.release()

    def _previewed(self, run: Run) -> dict[str, Any]:
        answer = self._place.preview(run.id)
        end, pause = time.monotonic() + PREVIEW_SECONDS, 0.02
        while not answer.exists():
            if time.monotonic() > end:
                raise BadRequest("the preview took too long", hint="preview fewer rows")
            time.sleep(pause)
            pause = min(0.5, pause * 1.5)
        found = cast(dict[str, Any], json.loads(answer.read_bytes()))
        answer.unlink()
        if "error" in found:
            raise from_dict(found, 500)
        return found

    def health(self) -> dict[str, Any]:
        """What a monitor asks."""
        pending = self._pending()
        return {"pending_rows": sum(p.rows for p in pending), "pending_bytes": sum(p.bytes for p in pending)}


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _page_size(limit: int) -> int:
    most = integer("page_items")
    if not 1 <= limit <= most:
        raise BadRequest(f"a page of {limit} items is not possible", hint=f"limit is 1 to {most}")
    return limit


def _number(token: str | None) -> int | None:
    if token is None:
        return None
    if not (token.isascii() and token.isdigit()) or len(token) > 18:
        raise BadRequest("the page_token is not one of ours", hint="use next_page_token of the last page")
    return int(token)


def _beyond(opened: Snapshot | None, version: Version | None) -> list[Any]:
    """The uploads of a snapshot that ``version`` does not hold."""
    mark = version.inbox_seq if version is not None else 0
    return [entry for entry in opened.entries if entry.seq > mark] if opened is not None else []


def _true(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A stored batch in the true types of ``schema``, which may have grown since."""
    held = pa.schema([schema.field(n) for n in schema.names if n in batch.schema.names])
    try:
        return reading.conform(narrow(batch, held), schema)
    except (HeadraceError, pa.ArrowException):
        return reading.conform(batch, schema)


def _limited(
    batches: Iterator[pa.RecordBatch], columns: Sequence[str], where: Any, limit: int | None
) -> Iterator[pa.RecordBatch]:
    left = limit
    for batch in batches:
        kept = batch if where is None else where.apply(batch)
        if left is not None:
            kept = kept.slice(0, left)
            left -= kept.num_rows
        if kept.num_rows:
            yield kept.select(list(columns))
        if left == 0:
            return


def _array(parts: Iterator[list[bytes]], limit: int | None) -> Iterator[bytes]:
    """One JSON array from lists of JSON texts, at most ``limit`` of them."""
    yield b"["
    first, left = True, limit
    for part in parts:
        texts = part if left is None else part[:left]
        if texts:
            yield (b"" if first else b",") + b",".join(texts)
            first = False
        if left is not None:
            left -= len(texts)
            if left <= 0:
                break
    yield b"]"
