"""What a principal may see: the one place that policies pass through on every way out.

``Views.seen(principal, dataset)`` gives the catalog itself to whom no policy concerns, and to all others a ``Seen``:
the same questions, answered as if hidden rows and values did not exist. Each data file has one view per policy and
mask key: a Parquet file like any other, made when it is first asked about, and again after it gave way to newer ones.
So rows, bytes, statistics, positions and hashes are those of what is visible, and it is read as fast as any file.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import threading
import uuid
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace import policy, quarantine, reading
from headrace.catalog import Catalog
from headrace.errors import Damaged, NotFound
from headrace.model import SYSTEM_COLUMNS, Dataset, FileEntry, Principal, Quarantined, Ref, Run, Version
from headrace.policies import PolicyBook, View
from headrace.policy import Compiled, Effective
from headrace.root import Root
from headrace.rows import SYSTEM, to_json
from headrace.settings import integer
from headrace.store.parquet import Written, read_batches, write_file
from headrace.store.types import decode_schema, describe, encode_schema, to_stored

_LISTED_MOST = 300_000
"""Files of the listings that are kept in memory, over all policies and versions."""
_COMPILED_MOST = 256
_CHUNK = 64
_LOCKS = 64
_PREFIX = "v"
"""What the id of a view begins with; those of data files are hexadecimal."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one version as a policy shows them, those without a visible row left out."""

    files: tuple[FileEntry, ...]
    rows: int
    bytes: int
    arrow_bytes: int
    splits: dict[str, int]
    fingerprint: str


def is_view(file_id: str) -> bool:
    """Whether a file id is that of a policy view."""
    return file_id.startswith(_PREFIX)


class Views:
    """The policy views of one exchange: made once each, in whatever process, and limited in bytes."""

    def __init__(self, root: Root, catalog: Catalog) -> None:
        self.book = PolicyBook(catalog)
        self._root, self._catalog = root, catalog
        self._folder = root.views
        self._key = root.secret("masks")
        self._compiled: OrderedDict[tuple[str, bytes], Compiled] = OrderedDict()
        self._listings: OrderedDict[tuple[str, int, str], Listing] = OrderedDict()
        self._held: int | None = None
        self._lock = threading.Lock()

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

    def compile(self, principal: Principal, dataset: str, schema: pa.Schema) -> Compiled | None:
        """The policy for rows of ``schema``; None if all is visible."""
        found = self.effective(principal, dataset)
        return None if found is None else self.compiled(found, schema)

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
        raise NotFound("there is no such file", hint="ask for the manifest again")

    # Views of files

    def listing(self, version: Version, compiled: Compiled) -> Listing:
        """The files of ``version`` under a policy; makes the views that are missing."""
        key = (version.dataset, version.version, compiled.key)
        with self._lock:
            if key in self._listings:
                self._listings.move_to_end(key)
                return self._listings[key]
        files = self._catalog.files(version.dataset, version.version)
        views = self._complete(version.dataset, files, compiled)
        made = _listing(files, views, version, compiled)
        with self._lock:
            self._listings[key] = made
            while len(self._listings) > 1 and sum(len(one.files) + 1 for one in self._listings.values()) > _LISTED_MOST:
                self._listings.popitem(last=False)
        return made

    def _complete(self, dataset: str, files: Sequence[FileEntry], compiled: Compiled) -> dict[str, View]:
        known = self.book.views(compiled.key, dataset)
        missing = [entry for entry in files if entry.id not in known]
        if not missing:
            return known
        self.book.add_spec(compiled.key, compiled.policy.body, encode_schema(compiled.source))
        with ThreadPoolExecutor(integer("threads")) as pool:
            for start in range(0, len(missing), _CHUNK):
                made = list(pool.map(partial(self._made, dataset, compiled), missing[start : start + _CHUNK]))
                known.update((view.file, view) for view in made)
        return known

    def _made(self, dataset: str, compiled: Compiled, entry: FileEntry) -> View:
        text = f"view\0{dataset}\0{entry.id}\0{entry.sha256}\0{compiled.key}"
        view_id = _PREFIX + hmac.digest(self._key, text.encode(), "sha256")[:16].hex()
        with self._locked(view_id):
            known = self.book.view(view_id)
            if known is not None:
                return known
            written, arrow_bytes = self._write(view_id, dataset, compiled, entry)
            view = View(
                view_id, compiled.key, dataset, entry.id, written.rows, written.bytes, arrow_bytes, written.sha256
            )
            self.book.add_views([view])
            return view

    def _write(self, view_id: str, dataset: str, compiled: Compiled, entry: FileEntry) -> tuple[Written, int]:
        """Write a view, whole or not at all, and make room for it. Without visible rows no file is left."""
        sizes: list[int] = []

        def visible() -> Iterator[pa.RecordBatch]:
            source = self._root.table(dataset) / entry.path
            for batch in read_batches([source], to_stored(compiled.source), None, integer("batch_rows")):
                shown = compiled.apply(reading.true(batch, compiled.source))
                sizes.append(shown.nbytes)
                yield shown

        path = self._folder / f"{uuid.uuid4().hex}.making"
        written = write_file(path, visible(), to_stored(compiled.schema))
        if written.rows:
            path.replace(self._folder / f"{view_id}.parquet")
            self._make_room(written.bytes, f"{view_id}.parquet")
        else:
            path.unlink()
        return written, sum(sizes)

    def path(self, view_id: str) -> Path:
        """Where the bytes of a view lie; they are made again if they had given way. NotFound, Damaged."""
        path = self._folder / f"{view_id}.parquet"
        try:
            os.utime(path)
        except FileNotFoundError:
            self._again(view_id)
        return path

    def _again(self, view_id: str) -> None:
        view = self.book.view(view_id)
        spec = self.book.spec(view.key) if view is not None else None
        compiled = None if spec is None else self.compiled(Effective.of(spec[0]), decode_schema(spec[1]))
        if view is None or compiled is None or compiled.key != view.key:
            raise NotFound("there is no such file", hint="ask for the manifest again")
        with self._locked(view_id):
            if not (self._folder / f"{view_id}.parquet").exists():
                written, _ = self._write(view_id, view.dataset, compiled, self._catalog.file(view.file)[1])
                if written.sha256 != view.sha256:
                    raise Damaged("a policy view came out otherwise than before", hint="run 'headrace doctor'")

    @contextmanager
    def _locked(self, view_id: str) -> Iterator[None]:
        """One maker per view, in whatever thread or process."""
        path = self._folder / f".{int(view_id[1:5], 16) % _LOCKS}.lock" if is_view(view_id) else None
        if path is None:
            raise NotFound("there is no such file", hint="ask for the manifest again")
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, added: int, newest: str) -> None:
        """Remove the views that were not used for longest where there are too many bytes."""
        with self._lock:
            most = integer("views_bytes_max")
            self._held = None if self._held is None else self._held + added
            if self._held is not None and self._held <= most:
                return
            found = sorted((item.stat().st_mtime_ns, item) for item in self._folder.glob("*.parquet"))
            sizes = {item: item.stat().st_size for _, item in found}
            self._held = sum(sizes.values())
            for _, item in found if self._held > most else ():
                if self._held <= most * 0.9:
                    break
                if item.name != newest:
                    item.unlink(missing_ok=True)
                    self._held -= sizes[item]


def _listing(files: Sequence[FileEntry], views: dict[str, View], version: Version, compiled: Compiled) -> Listing:
    entries: list[FileEntry] = []
    splits = dict.fromkeys(version.splits, 0)
    rows = arrow_bytes = 0
    content = hashlib.sha256(compiled.key.encode())
    for entry in files:
        view = views[entry.id]
        if not view.rows:
            continue
        entries.append(FileEntry(view.id, view.rows, view.bytes, view.sha256, rows, "", entry.split))
        content.update(f"{view.sha256}:{entry.split or ''}\n".encode())
        if entry.split is not None:
            splits[entry.split] += view.rows
        rows += view.rows
        arrow_bytes += view.arrow_bytes
    size = sum(entry.bytes for entry in entries)
    return Listing(tuple(entries), rows, size, arrow_bytes, splits, content.hexdigest())


class Seen:
    """The catalog's answers about one dataset, as far as a policy lets them be seen."""

    def __init__(self, root: Root, catalog: Catalog, views: Views, found: Effective) -> None:
        self._root, self._catalog, self._views, self._policy = root, catalog, views, found

    def _compiled(self, version: Version) -> Compiled:
        schema = decode_schema(self._catalog.details(version.dataset, version.version)[0])
        return self._views.compiled(self._policy, schema)

    def _shown(self, version: Version) -> Version:
        """A version without what its making tells: counts, fitted values, inputs, recipe."""
        compiled = self._compiled(version)
        found = self._views.listing(version, compiled)
        return replace(
            version,
            rows=found.rows,
            bytes=found.bytes,
            files=len(found.files),
            fingerprint=found.fingerprint,
            schema=describe(compiled.schema),
            block_rows=reading.block_rows(found.arrow_bytes / max(1, found.rows)),
            splits=found.splits,
            run=None,
            recipe=None,
            inputs=(),
            counts=(),
            fitted={},
            inbox_seq=0,
        )

    def dataset(self, name: str) -> Dataset:
        """One dataset with the sizes of what is visible."""
        whole, latest = self._catalog.dataset(name), self.latest(name)
        return replace(
            whole,
            rows=latest.rows if latest else 0,
            bytes=latest.bytes if latest else 0,
            quarantined=0 if self._policy.filters else whole.quarantined,
        )

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
        files: Sequence[FileEntry] = self._views.listing(whole, self._compiled(whole)).files
        if split is not None:
            files = [entry for entry in files if entry.split == split]
        first = bisect_right(files, after, key=lambda entry: entry.start)
        return list(files[first : None if limit is None else first + limit])

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
