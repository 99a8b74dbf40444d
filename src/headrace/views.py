"""What a principal may see: the one place that policies pass through on every way out.

``Views.seen(principal, dataset)`` gives the catalog itself to whom no policy concerns, and to all others a ``Seen``:
the same questions, answered as if hidden rows and values did not exist. Each data file has one view per policy and
mask key: a Parquet file like any other, made when it is first asked about, and again after it gave way to newer ones.
So rows, bytes, statistics, positions and hashes are those of what is visible, and it is read as fast as any file.

Views are made in the background. A call waits for them for some seconds, then hears Busy and how far they are; the
sizes of a version are added up once all its views are there, and kept in the catalog.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace import policy, quarantine, reading
from headrace.catalog import Catalog
from headrace.errors import Busy
from headrace.model import SYSTEM_COLUMNS, Dataset, FileEntry, Principal, Quarantined, Ref, Run, Version
from headrace.policies import PolicyBook, Totals
from headrace.policy import Compiled, Effective
from headrace.root import Root
from headrace.rows import SYSTEM, to_json
from headrace.settings import integer, number
from headrace.store.types import decode_schema, describe, encode_schema
from headrace.viewfiles import ViewFiles, gone

_TOTALS_MOST = 4096
_COMPILED_MOST = 256
_CHUNK = 64
_JOBS_MOST = 8
"""Versions whose views are made at once."""
_WAITING_MOST = 8
"""Calls that wait for views at once: each holds a thread that others would answer from."""


class _Job:
    """The making of the views of one version under one policy."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.progress = 0.0


class Views:
    """The policy views of one exchange: made once each, in whatever process, and limited in bytes."""

    def __init__(self, root: Root, catalog: Catalog) -> None:
        self.book = PolicyBook(catalog)
        self._root, self._catalog = root, catalog
        self._key = root.secret("masks")
        self._files = ViewFiles(root, self._key)
        self._compiled: OrderedDict[tuple[str, bytes], Compiled] = OrderedDict()
        self._totals: OrderedDict[tuple[str, int, str], Totals] = OrderedDict()
        self._jobs: dict[tuple[str, int, str], _Job] = {}
        self._waiting = threading.BoundedSemaphore(_WAITING_MOST)
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let what is being made end after the file at hand."""
        self._closed.set()
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.ended.wait()

    # Who sees what

    def effective(self, principal: Principal, dataset: str) -> Effective | None:
        """The policies that hold for ``principal`` on ``dataset`` as one, or None."""
        found = self.book.policies()
        return policy.effective(found, principal, dataset, self.book.tags(dataset)) if found else None

    def restricts(self, principal: Principal, dataset: str) -> bool:
        """Whether anything of ``dataset`` may be hidden from ``principal``."""
        return self.effective(principal, dataset) is not None

    def seen(self, principal: Principal, dataset: str) -> reading.Contents:
        """What ``principal`` may know of ``dataset``."""
        found = self.effective(principal, dataset)
        return self._catalog if found is None else Seen(self._root, self._catalog, self, found)

    def compiled(self, found: Effective, schema: pa.Schema) -> Compiled:
        """``found`` compiled for ``schema``, kept for the next time."""
        key = (found.body, schema.serialize().to_pybytes())
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        made = found.compile(schema, self._key)
        with self._lock:
            self._compiled[key] = made
            while len(self._compiled) > _COMPILED_MOST:
                self._compiled.popitem(last=False)
        return made

    def dataset_of(self, principal: Principal, view_id: str) -> str:
        """The dataset of a view that the policy in force shows ``principal``; NotFound for any other."""
        view = self.book.view(view_id)
        spec = self.book.spec(view.key) if view is not None else None
        if view is not None and spec is not None:
            found = self.effective(principal, view.dataset)
            if found is not None and found.body == spec[0]:
                return view.dataset
        raise gone()

    # Views of files

    def totals(self, version: Version, compiled: Compiled, *, patient: bool = True) -> Totals:
        """The sizes of ``version`` under a policy; makes the views that are missing. Busy while that takes long.

        Unless ``patient`` that is at once.
        """
        key = (version.dataset, version.version, compiled.key)
        with self._lock:
            if key in self._totals:
                self._totals.move_to_end(key)
                return self._totals[key]
        found = self.book.totals(compiled.key, version.dataset, version.version)
        if found is None:
            self._prepare(key, version, compiled, number("views_wait_s") if patient else 0.0)
            found = self.book.totals(compiled.key, version.dataset, version.version)
        if found is None:
            raise Busy("what a policy shows of this version changes", hint="retry", details={"retry_after": 1})
        with self._lock:
            self._totals[key] = found
            while len(self._totals) > _TOTALS_MOST:
                self._totals.popitem(last=False)
        return found

    def _prepare(self, key: tuple[str, int, str], version: Version, compiled: Compiled, seconds: float) -> None:
        with self._lock:
            job = self._jobs.get(key)
            if job is None:
                if len(self._jobs) >= _JOBS_MOST or self._closed.is_set():
                    raise Busy("policy views of other versions are being made", details={"retry_after": 5})
                job = self._jobs[key] = _Job()
                work = threading.Thread(target=self._work, args=(job, key, version, compiled), name="views")
                work.daemon = True
                work.start()
        ended = False
        if self._waiting.acquire(blocking=False):
            try:
                ended = job.ended.wait(seconds)
            finally:
                self._waiting.release()
        if not ended and not job.ended.is_set():
            raise Busy(
                f"what a policy shows of {version.ref} is being made: {job.progress:.1%} so far",
                hint="it goes on by itself; retry",
                details={"retry_after": 1, "progress": job.progress},
            )
        if job.error is not None:
            raise job.error

    def _work(self, job: _Job, key: tuple[str, int, str], version: Version, compiled: Compiled) -> None:
        try:
            self._make(job, version, compiled)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the job raises it
            job.error = error
        finally:
            with self._lock:
                del self._jobs[key]
            job.ended.set()

    def _make(self, job: _Job, version: Version, compiled: Compiled) -> None:
        made, all = self.book.progress(compiled.key, version.dataset, version.version)
        after = -1
        self.book.add_spec(compiled.key, compiled.policy.body, encode_schema(compiled.source))
        with ThreadPoolExecutor(integer("threads"), thread_name_prefix="view") as pool:
            while not self._closed.is_set():
                missing = self.book.missing(compiled.key, version.dataset, version.version, after, _CHUNK)
                if not missing:
                    break
                self.book.add_views(pool.map(partial(self._files.make, version.dataset, compiled), missing))
                made, after = made + len(missing), missing[-1].start
                job.progress = made / max(1, all)
        if self._closed.is_set():
            raise Busy("the exchange is closing", details={"retry_after": 5})
        self.book.total(compiled.key, version.dataset, version.version, version.splits)

    def path(self, view_id: str, *, exact: bool = False) -> Path:
        """Where the bytes of a view lie; they are made again if they had given way. NotFound, Damaged.

        After an upgrade they may come out otherwise, the same values as other bytes: then the view has another id, and
        with ``exact`` the old one is NotFound.
        """
        if self._files.touch(view_id):
            return self._files.file(view_id)
        view = self.book.view(view_id)
        spec = self.book.spec(view.key) if view is not None else None
        compiled = None if spec is None else self.compiled(Effective.of(spec[0]), decode_schema(spec[1]))
        if view is None or compiled is None or compiled.key != view.key:
            raise gone()
        made = self._files.again(view, compiled, self._catalog.file(view.file)[1])
        if made.id != view.id:
            self.book.replace_view(view, made)
            with self._lock:
                for key in [key for key in self._totals if key[0] == view.dataset]:
                    del self._totals[key]
            if exact:
                raise gone()
        return self._files.file(made.id)


class Seen:
    """The catalog's answers about one dataset, as far as a policy lets them be seen."""

    def __init__(self, root: Root, catalog: Catalog, views: Views, found: Effective) -> None:
        self._root, self._catalog, self._views, self._policy = root, catalog, views, found
        self.patient = True
        """Whether to wait for views that are being made."""

    def compile(self, schema: pa.Schema) -> Compiled:
        """The policy for rows of ``schema``."""
        return self._views.compiled(self._policy, schema)

    def _compiled(self, version: Version) -> Compiled:
        schema = decode_schema(self._catalog.details(version.dataset, version.version)[0])
        return self.compile(schema)

    def _shown(self, version: Version) -> Version:
        """A version without what its making tells: counts, fitted values, inputs, recipe."""
        compiled = self._compiled(version)
        found = self._views.totals(version, compiled, patient=self.patient)
        return replace(
            version,
            rows=found.rows,
            bytes=found.bytes,
            files=found.files,
            fingerprint=found.fingerprint,
            schema=describe(compiled.schema),
            block_rows=reading.block_rows(found.arrow_bytes / max(1, found.rows)),
            splits=dict(found.splits),
            run=None,
            recipe=None,
            inputs=(),
            counts=(),
            fitted={},
            inbox_seq=0,
        )

    def dataset(self, name: str) -> Dataset:
        """One dataset with the sizes of what is visible: None while that is being made."""
        whole = self._catalog.dataset(name)
        quarantined = 0 if self._policy.filters else whole.quarantined
        try:
            latest = self.latest(name)
        except Busy:
            return replace(whole, rows=None, bytes=None, quarantined=quarantined)
        rows, size = (latest.rows, latest.bytes) if latest else (0, 0)
        return replace(whole, rows=rows, bytes=size, quarantined=quarantined)

    def latest(self, name: str) -> Version | None:
        """The newest version, or None."""
        found = self._catalog.latest(name)
        return None if found is None else self._shown(found)

    def versions(self, name: str, limit: int, before: int | None = None) -> list[Version]:
        """Versions newest first, those below ``before`` if given."""
        return [self._shown(version) for version in self._catalog.versions(name, limit, before)]

    def resolve(self, ref: Ref) -> Version:
        """The version that a ref means; NotFound."""
        return self._shown(self._catalog.resolve(ref))

    def details(self, dataset: str, version: int) -> tuple[str, str]:
        """The true Arrow schema of what is visible; the hash of the whole cannot be resumed from here."""
        found = self._catalog.resolve(Ref(dataset, str(version)))
        return encode_schema(self._compiled(found).schema), "{}"

    def files(
        self, dataset: str, version: int, split: str | None = None, after: int = -1, limit: int | None = None
    ) -> list[FileEntry]:
        """The views of a version's files in row order; ``after`` and ``limit`` page by position."""
        whole = self._catalog.resolve(Ref(dataset, str(version)))
        compiled = self._compiled(whole)
        self._views.totals(whole, compiled)
        return self._views.book.listed(compiled.key, dataset, version, split, after, limit)

    def path(self, table: Path, entry: FileEntry) -> Path:  # noqa: ARG002
        """Where the bytes of a view lie."""
        return self._views.path(entry.id)

    def quarantine(self, name: str, rule: str | None, limit: int, skip: int) -> tuple[list[Quarantined], int | None]:
        """Dropped records by what columns are shown whole. Under a row filter none: it never judged them."""
        if self._policy.filters:
            return [], None
        found, more = quarantine.read(self._root, self._catalog, name, rule, limit, skip)
        latest = self._catalog.latest(name)
        compiled = self._views.compiled(self._policy, SYSTEM) if latest is None else self._compiled(latest)
        return [_veiled(one, compiled) for one in found], more


def _veiled(found: Quarantined, compiled: Compiled) -> Quarantined:
    """A dropped record with its columns that no mask is on; value and reason could quote any other."""
    bare = {name for name in compiled.schema.names if name not in compiled.masks and name not in SYSTEM_COLUMNS}
    try:
        record = json.loads(found.record)
    except ValueError:
        record = {}
    kept = {name: value for name, value in record.items() if name in bare} if isinstance(record, dict) else {}

    def veil(text: str | None) -> Any:
        return None if text is None else compiled.veil("_id", pa.array([text], pa.string()))[0].as_py()

    source = None
    if found.source is not None and found.source.get("locator") is not None:
        source = {**found.source, "locator": veil(found.source["locator"])}
    return replace(
        found,
        id=veil(found.id),
        record=to_json(kept).decode(),
        field=found.field if found.field in bare else None,
        value=None,
        reason="hidden by a policy",
        kept=veil(found.kept),
        source=source,
    )


def veiled_run(run: Run) -> Run:
    """A run without what it tells of the rows that it read and made."""
    return replace(
        run,
        recipe="",
        rows_in=0,
        rows_out=0,
        quarantined=0,
        merged=0,
        steps=(),
        error=None if run.error is None else "the run failed; a policy hides why",
        hint=None,
    )
