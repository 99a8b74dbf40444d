"""What the exchange knows: datasets, versions, files, tags, runs, tokens, marks. The only SQL on our own tables.

Several processes write it, so the SQLite file keeps a rollback journal: WAL with more than one writer is unsafe
before SQLite 3.51.3. Writes are few (one per flush, tag or run step), so the slower journal costs nothing that shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from headrace.errors import Conflict, NotFound
from headrace.model import Dataset, FileEntry, Ref, Run, Token, Version, from_dict, to_dict

SCHEMA_VERSION = 1
_meta = sa.MetaData()

_about = sa.Table("about", _meta, sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.String))
_datasets = sa.Table(
    "datasets",
    _meta,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("created_at", sa.String, nullable=False),
)
_versions = sa.Table(
    "versions",
    _meta,
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("delta_version", sa.Integer, nullable=False),
    sa.Column("inbox_seq", sa.Integer, nullable=False),
    sa.Column("arrow_schema", sa.String, nullable=False),
    sa.Column("fingerprint_state", sa.String, nullable=False),
    sa.Column("body", sa.String, nullable=False),
)
_files = sa.Table(
    "files",
    _meta,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("dataset", sa.String, nullable=False),
    sa.Column("path", sa.String, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("start", sa.Integer, nullable=False),
    sa.Column("split", sa.String),
    sa.Column("added", sa.Integer, nullable=False),
    sa.Column("removed", sa.Integer),
    sa.Index("files_of", "dataset", "start"),
)
_tags = sa.Table(
    "tags",
    _meta,
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)
_marks = sa.Table(
    "marks",
    _meta,
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("inbox_seq", sa.Integer, nullable=False),
)
_quarantine = sa.Table(
    "quarantine_files",
    _meta,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("dataset", sa.String, nullable=False),
    sa.Column("path", sa.String, nullable=False, unique=True),
    sa.Column("run", sa.String, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("rules", sa.String, nullable=False),
    sa.Index("quarantine_of", "dataset", "number"),
)
_runs = sa.Table(
    "runs",
    _meta,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("dataset", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("principal", sa.String, nullable=False),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("worker", sa.String),
    sa.Column("body", sa.String, nullable=False),
    sa.Index("runs_by_status", "status"),
)
_tokens = sa.Table(
    "tokens",
    _meta,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("hash", sa.String, nullable=False, unique=True),
    sa.Column("body", sa.String, nullable=False),
)


def now() -> str:
    """The present in UTC, as the catalog writes time."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def live_files(dataset: str, version: int, split: str | None = None) -> sa.Select[Any]:
    """The query for the files of a version, for joins with other tables of this database."""
    query = sa.select(_files).where(
        _files.c.dataset == dataset,
        _files.c.added <= version,
        sa.or_(_files.c.removed.is_(None), _files.c.removed > version),
    )
    return query if split is None else query.where(_files.c.split == split)


def entries_of(rows: Iterable[Any]) -> list[FileEntry]:
    """The files that ``live_files`` found."""
    return [FileEntry(r.id, r.rows, r.bytes, r.sha256, r.start, r.path, r.split) for r in rows]


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver's own transaction handling would defer BEGIN; ours is explicit, below.
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.info.get("writes") else "BEGIN")

    return engine


class Catalog:
    """All of the catalog's questions and changes. Thread-safe; every change is one transaction."""

    def __init__(self, path: Path) -> None:
        self._engine = _engine(path)
        with self._write() as db:
            _meta.create_all(db)
            found = db.execute(sa.select(_about.c.value).where(_about.c.key == "schema")).scalar()
            if found is None:
                db.execute(_about.insert().values(key="schema", value=str(SCHEMA_VERSION)))
            elif int(found) > SCHEMA_VERSION:
                raise Conflict(
                    f"the catalog has schema {found}, this Headrace knows {SCHEMA_VERSION}", hint="upgrade headrace"
                )

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._engine.connect() as connection:
            connection.info["writes"] = True
            try:
                with connection.begin():
                    yield connection
            finally:
                connection.info.pop("writes", None)

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._engine.connect() as connection:
            yield connection

    def transaction(self, *, writes: bool) -> AbstractContextManager[sa.Connection]:
        """One transaction, for the tables that other modules keep in this database."""
        return self._write() if writes else self._read()

    # Datasets, versions, tags

    def create_dataset(self, name: str) -> None:
        """Make the dataset known; nothing happens if it is."""
        with self._write() as db:
            if db.execute(sa.select(_datasets.c.name).where(_datasets.c.name == name)).first() is None:
                db.execute(_datasets.insert().values(name=name, created_at=now()))

    def dataset_names(self) -> list[str]:
        """All names, sorted."""
        with self._read() as db:
            return list(db.execute(sa.select(_datasets.c.name).order_by(_datasets.c.name)).scalars())

    def dataset(self, name: str) -> Dataset:
        """One dataset with its latest version, tags and quarantine count; NotFound if there is none of this name."""
        with self._read() as db:
            row = db.execute(sa.select(_datasets).where(_datasets.c.name == name)).first()
            if row is None:
                raise NotFound(f"there is no dataset {name!r}", hint="'headrace datasets' lists those you may see")
            latest = self._latest(db, name)
            tags = db.execute(sa.select(_tags.c.name, _tags.c.version).where(_tags.c.dataset == name)).all()
            held = db.execute(sa.select(sa.func.sum(_quarantine.c.rows)).where(_quarantine.c.dataset == name)).scalar()
        return Dataset(
            name=name,
            created_at=row.created_at,
            version=latest.version if latest else None,
            rows=latest.rows if latest else 0,
            bytes=latest.bytes if latest else 0,
            quarantined=int(held or 0),
            tags=dict(sorted((t.name, t.version) for t in tags)),
        )

    def _latest(self, db: sa.Connection, name: str) -> Version | None:
        row = db.execute(
            sa.select(_versions.c.body).where(_versions.c.dataset == name).order_by(_versions.c.version.desc()).limit(1)
        ).first()
        return from_dict(Version, json.loads(row.body)) if row else None

    def latest(self, name: str) -> Version | None:
        """The newest version of a dataset, or None."""
        with self._read() as db:
            return self._latest(db, name)

    def versions(self, name: str, limit: int, before: int | None = None) -> list[Version]:
        """Versions newest first, those below ``before`` if given."""
        query = sa.select(_versions.c.body).where(_versions.c.dataset == name)
        if before is not None:
            query = query.where(_versions.c.version < before)
        with self._read() as db:
            rows = db.execute(query.order_by(_versions.c.version.desc()).limit(limit)).all()
            names = self._tag_names(db, name)
        found = [from_dict(Version, json.loads(row.body)) for row in rows]
        return [replace(v, tags=tuple(names.get(v.version, ()))) for v in found]

    def _tag_names(self, db: sa.Connection, name: str) -> dict[int, list[str]]:
        names: dict[int, list[str]] = {}
        for tag in db.execute(sa.select(_tags).where(_tags.c.dataset == name).order_by(_tags.c.name)):
            names.setdefault(tag.version, []).append(tag.name)
        return names

    def resolve(self, ref: Ref) -> Version:
        """The version that a ref means; NotFound says what exists instead."""
        with self._read() as db:
            if db.execute(sa.select(_datasets.c.name).where(_datasets.c.name == ref.dataset)).first() is None:
                raise NotFound(
                    f"there is no dataset {ref.dataset!r}", hint="'headrace datasets' lists those you may see"
                )
            number = self._number(db, ref)
            row = db.execute(
                sa.select(_versions.c.body).where(_versions.c.dataset == ref.dataset, _versions.c.version == number)
            ).first()
            names = self._tag_names(db, ref.dataset)
        if row is None:
            raise NotFound(
                f"{ref.dataset!r} has no version {ref.at}", hint=f"'headrace versions {ref.dataset}' lists them"
            )
        version = from_dict(Version, json.loads(row.body))
        if ref.split is not None and ref.split not in version.splits:
            known = ", ".join(sorted(version.splits)) or "none"
            raise NotFound(f"{version.ref} has no split {ref.split!r}", hint=f"its splits: {known}")
        return replace(version, tags=tuple(names.get(version.version, ())))

    def _number(self, db: sa.Connection, ref: Ref) -> int:
        if ref.at == "latest":
            found = db.execute(
                sa.select(sa.func.max(_versions.c.version)).where(_versions.c.dataset == ref.dataset)
            ).scalar()
            if found is None:
                raise NotFound(f"{ref.dataset!r} has no version yet", hint="upload records to it, or run its recipe")
            return int(found)
        if ref.at.isdecimal():
            return min(int(ref.at), 2**62)
        found = db.execute(
            sa.select(_tags.c.version).where(_tags.c.dataset == ref.dataset, _tags.c.name == ref.at)
        ).scalar()
        if found is None:
            raise NotFound(
                f"{ref.dataset!r} has no tag {ref.at!r}",
                hint=f"'headrace versions {ref.dataset}' lists versions and tags",
            )
        return int(found)

    def tag(self, dataset: str, name: str, version: int) -> None:
        """Point a tag at a version; an existing tag moves."""
        with self._write() as db:
            db.execute(_tags.delete().where(_tags.c.dataset == dataset, _tags.c.name == name))
            db.execute(_tags.insert().values(dataset=dataset, name=name, version=version))

    # Commits

    def register(
        self,
        version: Version,
        files: Sequence[FileEntry],
        *,
        gone: Sequence[str] | None,
        arrow_schema: str,
        fingerprint_state: str,
        tag: str | None = None,
    ) -> None:
        """Record a committed version: ``files`` are new, ``gone`` the ids it no longer has (None: all it had before).

        Registering the same version again changes nothing, so a redo after a crash is safe.
        """
        with self._write() as db:
            self._insert_version(db, version, arrow_schema, fingerprint_state)
            live = sa.and_(
                _files.c.dataset == version.dataset, _files.c.removed.is_(None), _files.c.added < version.version
            )
            if gone is None:
                db.execute(_files.update().where(live).values(removed=version.version))
            for start in range(0, len(gone or ()), 500):
                chunk = (gone or ())[start : start + 500]
                db.execute(_files.update().where(live, _files.c.id.in_(chunk)).values(removed=version.version))
            ids = [entry.id for entry in files]
            known: set[str] = set()
            for start in range(0, len(ids), 500):
                chunk = ids[start : start + 500]
                known.update(db.execute(sa.select(_files.c.id).where(_files.c.id.in_(chunk))).scalars())
            rows = [
                {**to_dict(entry), "dataset": version.dataset, "added": version.version, "removed": None}
                for entry in files
                if entry.id not in known
            ]
            if rows:
                db.execute(_files.insert(), rows)
            self._set_mark(db, version.dataset, version.inbox_seq)
            if tag is not None:
                db.execute(_tags.delete().where(_tags.c.dataset == version.dataset, _tags.c.name == tag))
                db.execute(_tags.insert().values(dataset=version.dataset, name=tag, version=version.version))

    def _insert_version(self, db: sa.Connection, version: Version, arrow_schema: str, state: str) -> None:
        if db.execute(sa.select(_datasets.c.name).where(_datasets.c.name == version.dataset)).first() is None:
            db.execute(_datasets.insert().values(name=version.dataset, created_at=now()))
        key = sa.and_(_versions.c.dataset == version.dataset, _versions.c.version == version.version)
        found = db.execute(sa.select(_versions.c.fingerprint).where(key)).scalar()
        if found is not None and found != version.fingerprint:
            raise Conflict(f"{version.ref} exists with other content", hint="run 'headrace doctor' and report this")
        if found is None:
            db.execute(
                _versions.insert().values(
                    dataset=version.dataset,
                    version=version.version,
                    fingerprint=version.fingerprint,
                    delta_version=version.delta_version,
                    inbox_seq=version.inbox_seq,
                    arrow_schema=arrow_schema,
                    fingerprint_state=state,
                    body=json.dumps(to_dict(version)),
                )
            )

    def details(self, dataset: str, version: int) -> tuple[str, str]:
        """The true Arrow schema (base64 IPC) and the fingerprint's resumable state (JSON) of a version."""
        with self._read() as db:
            row = db.execute(
                sa.select(_versions.c.arrow_schema, _versions.c.fingerprint_state).where(
                    _versions.c.dataset == dataset, _versions.c.version == version
                )
            ).one()
        return row.arrow_schema, row.fingerprint_state

    def files(
        self, dataset: str, version: int, split: str | None = None, after: int = -1, limit: int | None = None
    ) -> list[FileEntry]:
        """The files of a version in row order; ``after`` and ``limit`` page by the position of the first row."""
        query = live_files(dataset, version, split).where(_files.c.start > after)
        with self._read() as db:
            return entries_of(db.execute(query.order_by(_files.c.start).limit(limit)))

    def last_files(self, dataset: str, version: int, count: int) -> list[FileEntry]:
        """The last ``count`` files of a version, in row order."""
        query = live_files(dataset, version).order_by(_files.c.start.desc()).limit(count)
        with self._read() as db:
            return entries_of(db.execute(query))[::-1]

    def file(self, file_id: str) -> tuple[str, FileEntry]:
        """The dataset and entry of one file id; NotFound if there is none."""
        with self._read() as db:
            r = db.execute(sa.select(_files).where(_files.c.id == file_id)).first()
        if r is None:
            raise NotFound("there is no such file", hint="ask for the manifest again")
        return r.dataset, entries_of([r])[0]

    def path(self, table: Path, entry: FileEntry) -> Path:
        """Where the bytes of a file lie, below the folder of its dataset's table."""
        return table / entry.path

    # Inbox marks

    def _set_mark(self, db: sa.Connection, dataset: str, seq: int) -> None:
        found = db.execute(sa.select(_marks.c.inbox_seq).where(_marks.c.dataset == dataset)).scalar()
        if found is None:
            db.execute(_marks.insert().values(dataset=dataset, inbox_seq=seq))
        elif seq > found:
            db.execute(_marks.update().where(_marks.c.dataset == dataset).values(inbox_seq=seq))

    def set_mark(self, dataset: str, seq: int) -> None:
        """Everything of this dataset up to inbox ``seq`` is committed; marks never go back."""
        with self._write() as db:
            self._set_mark(db, dataset, seq)

    def marks(self) -> dict[str, int]:
        """Dataset → last committed inbox seq."""
        with self._read() as db:
            return {row.dataset: row.inbox_seq for row in db.execute(sa.select(_marks))}

    def mark(self, dataset: str) -> int:
        """The last committed inbox seq of one dataset; 0 before the first."""
        return self.marks().get(dataset, 0)

    # Quarantine

    def add_quarantine(self, dataset: str, path: str, run: str, rules: Mapping[str, int]) -> None:
        """Record a committed quarantine file; recording it again changes nothing."""
        with self._write() as db:
            if db.execute(sa.select(_quarantine.c.path).where(_quarantine.c.path == path)).first() is None:
                rows = {"path": path, "run": run, "rows": sum(rules.values()), "rules": json.dumps(dict(rules))}
                db.execute(_quarantine.insert().values(dataset=dataset, **rows))

    def quarantine_files(self, dataset: str, after: int = 0) -> list[tuple[int, str, str, int, dict[str, int]]]:
        """(number, path, run, rows, rows per rule) of the quarantine files above ``after``, oldest first."""
        query = sa.select(_quarantine).where(_quarantine.c.dataset == dataset, _quarantine.c.number > after)
        with self._read() as db:
            rows = db.execute(query.order_by(_quarantine.c.number)).all()
        return [(r.number, r.path, r.run, r.rows, json.loads(r.rules)) for r in rows]

    # Runs

    def add_run(self, run: Run, principal: str, base: str) -> None:
        """Queue a run."""
        with self._write() as db:
            db.execute(
                _runs.insert().values(
                    id=run.id, dataset=run.dataset, status=run.status, created_at=run.created_at,
                    principal=principal, base=base, body=json.dumps(to_dict(run)),
                )
            )  # fmt: skip

    def update_run(self, run: Run) -> None:
        """Replace what is known of a run."""
        with self._write() as db:
            values = {"status": run.status, "body": json.dumps(to_dict(run))}
            db.execute(_runs.update().where(_runs.c.id == run.id).values(**values))

    def claim_run(self, worker: str) -> Run | None:
        """Take the oldest queued run for this worker, or None."""
        with self._write() as db:
            row = db.execute(
                sa.select(_runs).where(_runs.c.status == "queued").order_by(_runs.c.created_at, _runs.c.id).limit(1)
            ).first()
            if row is None:
                return None
            run = replace(from_dict(Run, json.loads(row.body)), status="running", started_at=now())
            values = {"status": run.status, "worker": worker, "body": json.dumps(to_dict(run))}
            db.execute(_runs.update().where(_runs.c.id == run.id).values(**values))
        return run

    def has_queued(self) -> bool:
        """Whether a run waits for a worker; takes no write lock."""
        with self._read() as db:
            return db.execute(sa.select(_runs.c.id).where(_runs.c.status == "queued").limit(1)).first() is not None

    def count_runs(self, status: str) -> int:
        """How many runs have this status."""
        with self._read() as db:
            query = sa.select(sa.func.count()).select_from(_runs).where(_runs.c.status == status)
            return int(db.execute(query).scalar() or 0)

    def run(self, run_id: str) -> tuple[Run, str, str]:
        """A run, its principal and the folder its recipe's paths start from; NotFound if there is none."""
        with self._read() as db:
            row = db.execute(sa.select(_runs).where(_runs.c.id == run_id)).first()
        if row is None:
            raise NotFound(f"there is no run {run_id!r}", hint="'headrace runs' lists them")
        return from_dict(Run, json.loads(row.body)), row.principal, row.base

    def runs(self, limit: int, status: str | None = None) -> list[Run]:
        """Runs newest first."""
        query = sa.select(_runs.c.body)
        if status is not None:
            query = query.where(_runs.c.status == status)
        with self._read() as db:
            rows = db.execute(query.order_by(_runs.c.created_at.desc(), _runs.c.id.desc()).limit(limit)).all()
        return [from_dict(Run, json.loads(row.body)) for row in rows]

    # Tokens

    def add_token(self, token: Token, secret_hash: str) -> None:
        """Store a token by the hash of its secret; the secret itself never gets here."""
        with self._write() as db:
            db.execute(_tokens.insert().values(id=token.id, hash=secret_hash, body=json.dumps(to_dict(token))))

    def token_by_hash(self, secret_hash: str) -> Token | None:
        """The token whose secret has this hash, or None."""
        with self._read() as db:
            row = db.execute(sa.select(_tokens.c.body).where(_tokens.c.hash == secret_hash)).first()
        return from_dict(Token, json.loads(row.body)) if row else None

    def tokens(self) -> list[Token]:
        """All tokens, without secrets."""
        with self._read() as db:
            return [from_dict(Token, json.loads(r.body)) for r in db.execute(sa.select(_tokens).order_by(_tokens.c.id))]

    def revoke_token(self, token_id: str) -> Token:
        """Mark a token revoked now; NotFound if there is none."""
        with self._write() as db:
            row = db.execute(sa.select(_tokens).where(_tokens.c.id == token_id)).first()
            if row is None:
                raise NotFound(f"there is no token {token_id!r}", hint="'headrace token list' lists them")
            token = from_dict(Token, json.loads(row.body))
            if token.revoked_at is None:
                token = replace(token, revoked_at=now())
                db.execute(_tokens.update().where(_tokens.c.id == token_id).values(body=json.dumps(to_dict(token))))
        return token
