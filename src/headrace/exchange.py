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

import pyarrow as pa

from headrace import arrivals, compare, deliver, govern, quarantine, reading, recipe
from headrace.catalog import Catalog, now
from headrace.errors import BadRequest, Busy, Forbidden, NotFound, Unauthenticated, from_dict
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
from headrace.policy import Compiled
from headrace.predicate import compile_where
from headrace.root import Root
from headrace.rows import SYSTEM, records
from headrace.settings import integer
from headrace.stewards import Stewards
from headrace.viewfiles import is_view
from headrace.views import Seen, Views, veiled_run

OPEN_DATASET = "default"
PREVIEW_SECONDS = 600.0
PREVIEWS_MOST = 4
"""Previews that wait for a worker at once: each holds a thread that others would answer from."""


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


class Exchange(Stewards):
    """One exchange. Needs no worker to answer; flushing and running recipes is the worker's."""

    def __init__(self, root: Root) -> None:
        self._place = root
        self.root = root.path
        self.catalog = Catalog(root.catalog)
        self.reader = InboxReader(root.path)
        self._signer = deliver.Signer(root)
        self._views = Views(root, self.catalog)
        self._previews = threading.BoundedSemaphore(PREVIEWS_MOST)
        self._known: set[str] = set(self.catalog.dataset_names())

    def close(self) -> None:
        """Let files and connections go."""
        self._views.close()
        self.reader.close()
        self.catalog.close()

    def _seen(self, principal: Principal, dataset: str) -> reading.Contents:
        """What policies let ``principal`` see of ``dataset``. Every way out asks this, never the catalog itself."""
        return self._views.seen(principal, dataset)

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
        hidden = self._views.restricts(principal, found.dataset)
        if hidden and not govern.may(principal, govern.WRITE, found.dataset):
            raise NotFound(f"there is no receipt {receipt_id[:64]!r}", hint="receipts are kept for some days only")
        made = Receipt(found.receipt, found.dataset, found.rows, found.rejected, 0, () if hidden else found.errors)
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
        return [self._described(principal, name, waiting.get(name, 0)) for name in names]

    def _described(self, principal: Principal, name: str, pending: int) -> Dataset:
        seen = self._seen(principal, name)
        # How much waits is known of all rows only, not of the visible ones.
        return replace(seen.dataset(name), pending=0 if isinstance(seen, Seen) else pending)

    def _pending(self) -> list[Any]:
        marks = self.catalog.marks()
        return [p for p in self.reader.pending() if p.last_seq > marks.get(p.dataset, 0)]

    def dataset(self, principal: Principal, name: str) -> Dataset:
        """One dataset."""
        govern.allow(principal, govern.READ, check_name(name))
        pending = sum(p.rows for p in self._pending() if p.dataset == name)
        return self._described(principal, name, pending)

    def versions(
        self, principal: Principal, name: str, limit: int, page_token: str | None
    ) -> tuple[list[Version], str | None]:
        """A page of versions, newest first."""
        govern.allow(principal, govern.READ, check_name(name))
        self.catalog.dataset(name)
        limit = _page_size(limit)
        found = self._seen(principal, name).versions(name, limit, _number(page_token))
        return found, str(found[-1].version) if len(found) == limit and found[-1].version > 0 else None

    def version(self, principal: Principal, ref: Ref) -> Version:
        """One version."""
        govern.allow(principal, govern.READ, ref.dataset)
        return self._seen(principal, ref.dataset).resolve(ref)

    def tag(self, principal: Principal, ref: Ref, name: str) -> Version:
        """Point a tag at a version."""
        govern.allow(principal, govern.WRITE, ref.dataset)
        version = self.catalog.resolve(replace(ref, split=None))
        self.catalog.tag(ref.dataset, check_tag(name), version.version)
        return self._seen(principal, ref.dataset).resolve(Ref(ref.dataset, str(version.version)))

    def quarantine(
        self, principal: Principal, name: str, rule: str | None, limit: int, page_token: str | None
    ) -> tuple[list[Quarantined], str | None]:
        """A page of the dropped, refused and merged records, oldest first."""
        govern.allow(principal, govern.READ, check_name(name))
        self.catalog.dataset(name)
        skip, seen = _number(page_token) or 0, self._seen(principal, name)
        if isinstance(seen, Seen):
            found, more = seen.quarantine(name, rule, _page_size(limit), skip)
        else:
            found, more = quarantine.read(self._place, self.catalog, name, rule, _page_size(limit), skip)
        return found, None if more is None else str(more)

    def diff(self, principal: Principal, base: Ref, other: Ref) -> Diff:
        """Records added, removed and changed from ``base`` to ``other``, matched by ``_id``."""
        govern.allow(principal, govern.READ, base.dataset)
        govern.allow(principal, govern.READ, other.dataset)
        old, new = self._seen(principal, base.dataset), self._seen(principal, other.dataset)
        return compare.diff(self._place, old, base, new, other)

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
            return self._rows(principal, ref, self.catalog.resolve(ref), None, columns, where, limit)
        # The inbox first: what is flushed between the two reads is then dropped by its seq, never missed.
        snapshot = self._snapshot(ref.dataset)
        return self._rows(principal, ref, self.catalog.latest(ref.dataset), snapshot, columns, where, limit)

    def _snapshot(self, dataset: str) -> Any:
        return self.reader.snapshot(dataset, self.catalog.mark(dataset))

    def _rows(
        self,
        principal: Principal,
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
        seen = self._seen(principal, ref.dataset)
        policy = seen.compile(schema) if isinstance(seen, Seen) else None
        visible = schema if policy is None else policy.schema
        chosen = list(columns) if columns is not None else [n for n in visible.names if n not in SYSTEM_COLUMNS]
        rows = self._chosen(self._all(ref, seen, version, opened, tail, schema, policy), visible, chosen, where, limit)
        batches = reading.Stream(rows, lambda: held.__exit__(None, None, None) if held is not None else None)
        policy_key = policy.key if policy is not None else ""
        etag = hashlib.sha256(
            json.dumps(
                [str(ref), version.ref if version else None, chosen, where, limit, [e.seq for e in tail], policy_key]
            ).encode()
        ).hexdigest()[:32]
        out = pa.schema([visible.field(name) for name in chosen])
        return Reading(out, batches, version.version if version else None, f'"{etag}"')

    def _all(
        self,
        ref: Ref,
        seen: reading.Contents,
        version: Version | None,
        opened: Snapshot | None,
        tail: Sequence[Any],
        schema: pa.Schema,
        policy: Compiled | None,
    ) -> Iterator[pa.RecordBatch]:
        visible = schema if policy is None else policy.schema
        if version is not None:
            pinned = Ref(ref.dataset, str(version.version), ref.split)
            for batch in reading.scan(self._place, seen, pinned):
                yield reading.true(batch, visible)
        if tail and opened is not None:
            stored = reading.schema_of(self.catalog, version)
            for part in arrivals.projected(tail, opened.open, arrivals.user_schema(stored)):
                if part.batch.num_rows:
                    batch = reading.conform(part.batch, schema)
                    yield batch if policy is None else policy.apply(batch)

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
        return reading.limited(batches, columns, chosen, limit)

    def get_data(self, principal: Principal, limit: int | None = None, offset: int = 0) -> GetData:
        """The records of ``default`` as they were uploaded, in order of arrival, as one JSON array."""
        govern.allow(principal, govern.READ, OPEN_DATASET)
        held = self._snapshot(OPEN_DATASET)
        opened = held.__enter__()
        version = self.catalog.latest(OPEN_DATASET) if OPEN_DATASET in self.catalog.dataset_names() else None
        tail = _beyond(opened, version)
        seen = self._seen(principal, OPEN_DATASET)
        shown = f"{self._views.book.epoch()}:{principal.name}" if isinstance(seen, Seen) else ""
        what = json.dumps([version.ref if version else None, limit, offset, [e.seq for e in tail], shown])
        etag = f'"{hashlib.sha256(what.encode()).hexdigest()[:32]}"'
        texts = self._texts(seen, version, opened, tail, offset)
        return GetData(etag, reading.Stream(reading.json_array(texts, limit), lambda: held.__exit__(None, None, None)))

    def _texts(
        self,
        seen: reading.Contents,
        version: Version | None,
        opened: Snapshot,
        tail: Sequence[Any],
        offset: int,
    ) -> Iterator[list[bytes]]:
        skip = offset
        if version is not None:
            shown = seen.resolve(Ref(version.dataset, str(version.version)))
            yield from self._committed_texts(seen, shown, skip)
            skip = max(0, skip - shown.rows)
        user = arrivals.user_schema(reading.schema_of(self.catalog, version))
        for part in arrivals.projected(tail, opened.open, user) if tail else ():
            policy = seen.compile(part.batch.schema) if isinstance(seen, Seen) else None
            texts = records(part.batch if policy is None else policy.apply(part.batch))
            yield texts[skip:]
            skip = max(0, skip - len(texts))

    def _committed_texts(self, seen: reading.Contents, version: Version, skip: int) -> Iterator[list[bytes]]:
        pinned = Ref(version.dataset, str(version.version))
        if "_raw" not in [column["name"] for column in version.schema]:
            yield from map(records, reading.scan(self._place, seen, pinned, skip=skip))
            return
        for batch in reading.scan(self._place, seen, pinned, ["_raw"], skip):
            if batch.column("_raw").null_count == 0:
                yield records(batch)
            else:
                # Some of these rows came as CSV, Arrow or Parquet: their text is made from their columns.
                rows = reading.scan(self._place, seen, pinned, skip=skip, limit=batch.num_rows)
                yield from map(records, rows)
            skip += batch.num_rows

    # The feed

    def manifest(
        self, principal: Principal, ref: Ref, columns: Sequence[str] | None = None, page_token: str | None = None
    ) -> Manifest:
        """One page of the files behind a ref."""
        govern.allow(principal, govern.READ, ref.dataset)
        return deliver.manifest(self._seen(principal, ref.dataset), ref, columns, page_token)

    def sign(self, principal: Principal, ids: Sequence[str]) -> dict[str, tuple[int, str]]:
        """For each file id: when its URL ends, and its signature."""
        if len(ids) > integer("page_items"):
            raise BadRequest(f"{len(ids)} ids are too many", hint=f"ask for {integer('page_items')} at a time")
        signed: dict[str, tuple[int, str]] = {}
        for file_id in ids:
            self._assert_visible(principal, file_id)
            signed[file_id] = self._signer.sign(self._bound(file_id), principal.name)
        return signed

    def _assert_visible(self, principal: Principal, file_id: str) -> None:
        """NotFound for a file of which ``principal`` sees nothing, or not in this form."""
        viewed = is_view(file_id)
        dataset = self._views.dataset_of(principal, file_id) if viewed else self.catalog.file(file_id)[0]
        if not govern.may(principal, govern.READ, dataset) or (
            not viewed and self._views.restricts(principal, dataset)
        ):
            # As of a file that is not there: the id of another's file tells neither that it is one nor of what.
            raise NotFound("there is no such file", hint="ask for the manifest again")

    def _bound(self, file_id: str) -> str:
        """What a signature is for: a change of any policy ends all that were given before."""
        return f"{self._views.book.epoch()}:{file_id}"

    def _path(self, file_id: str) -> Path:
        if is_view(file_id):
            return self._views.path(file_id, exact=True)
        dataset, entry = self.catalog.file(file_id)
        return self._place.table(dataset) / entry.path

    def file_path(self, file_id: str, expires: int, by: str, signature: str) -> Path:
        """Where the bytes of a signed file id lie; Forbidden unless the signature holds."""
        self._signer.check(self._bound(file_id), expires, by, signature)
        return self._path(file_id)

    def local_path(self, principal: Principal, file_id: str) -> Path:
        """Where the bytes of a file lie, for a feed in this process."""
        self._assert_visible(principal, file_id)
        return self._path(file_id)

    def tokenizer(self, principal: Principal, ref: Ref) -> bytes:
        """The tokenizer.json that made the tokens of a version; NotFound if it has none."""
        govern.allow(principal, govern.READ, ref.dataset)
        # A tokenizer learns words from the rows, hidden ones too: behind a policy a version names none.
        version = self._seen(principal, ref.dataset).resolve(ref)
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
            self._place, self._seen(principal, ref.dataset), ref, step=step, row=row, source=source,
            seed=seed, epoch=epoch, batch_size=batch_size, world_size=world_size, shuffle=kinds[str(shuffle).lower()],
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
                if self._views.restricts(principal, entry.ref.dataset):
                    raise Forbidden(
                        f"a policy hides part of {entry.ref.dataset!r} from {principal.name!r}",
                        hint="a recipe reads all of it: ask someone who may to run it",
                    )
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
        shown = [r for r in found if not r.preview_rows and govern.may(principal, govern.READ, r.dataset)]
        hidden = {name for name in {r.dataset for r in shown} if self._views.restricts(principal, name)}
        return [veiled_run(r) if r.dataset in hidden else r for r in shown]

    def run_status(self, principal: Principal, run_id: str) -> Run:
        """One run."""
        run, _, _ = self.catalog.run(run_id)
        govern.allow(principal, govern.READ, run.dataset)
        return veiled_run(run) if self._views.restricts(principal, run.dataset) else run

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
        """Raise if the inbox or the catalog cannot be read. Tells no counts: anyone may ask."""
        self._pending()
        return {}


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
