"""Policies, column tags and what is known of policy views: their tables beside the catalog's, in the same database."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from headrace.catalog import Catalog, entries_of, live_files
from headrace.errors import NotFound
from headrace.model import FileEntry, Policy, from_dict, to_dict

_STREAMED = 2000
_meta = sa.MetaData()
_policies = sa.Table(
    "policies",
    _meta,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("body", sa.String, nullable=False),
)
_tags = sa.Table(
    "column_tags",
    _meta,
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("column", sa.String, primary_key=True),
    sa.Column("tag", sa.String, primary_key=True),
)
_epoch = sa.Table("policy_epoch", _meta, sa.Column("number", sa.Integer, nullable=False))
_specs = sa.Table(
    "policy_specs",
    _meta,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("body", sa.String, nullable=False),
    sa.Column("arrow_schema", sa.String, nullable=False),
)
_views = sa.Table(
    "policy_views",
    _meta,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("key", sa.String, nullable=False),
    sa.Column("dataset", sa.String, nullable=False),
    sa.Column("file", sa.String, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("arrow_bytes", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("content", sa.String, nullable=False),
    sa.Index("policy_views_of_file", "key", "file"),
)
_totals = sa.Table(
    "policy_totals",
    _meta,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("dataset", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("body", sa.String, nullable=False),
)


# Spelled so that SQLite goes through the files in their order and looks each view up: the other way round it would
# gather and sort them all to give the first.
_SHOWN = sa.func.coalesce(_views.c.rows, 0) > 0


@dataclass(frozen=True, slots=True)
class View:
    """One data file as a policy shows it. ``key`` names the compiled policy; a view without rows has no file.

    ``sha256`` is of its bytes, ``content`` of its values: another version of the Parquet library may write the same
    values as other bytes.
    """

    id: str
    key: str
    dataset: str
    file: str
    rows: int
    bytes: int
    arrow_bytes: int
    sha256: str
    content: str


@dataclass(frozen=True, slots=True)
class Totals:
    """The sizes of one version as a policy shows it; files without a visible row are left out."""

    rows: int
    bytes: int
    arrow_bytes: int
    files: int
    splits: Mapping[str, int]
    fingerprint: str


class PolicyBook:
    """All questions to these tables and changes of them. Thread-safe; every change is one transaction."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        with catalog.transaction(writes=True) as db:
            _meta.create_all(db)
            if db.execute(sa.select(_epoch.c.number)).first() is None:
                db.execute(_epoch.insert().values(number=1))

    def epoch(self) -> int:
        """A number that grows with every change of what is hidden."""
        with self._catalog.transaction(writes=False) as db:
            return int(db.execute(sa.select(_epoch.c.number)).scalar_one())

    def _changed(self, db: sa.Connection) -> None:
        db.execute(_epoch.update().values(number=_epoch.c.number + 1))

    def add(self, policy: Policy) -> None:
        """Store a policy."""
        with self._catalog.transaction(writes=True) as db:
            db.execute(_policies.insert().values(id=policy.id, body=json.dumps(to_dict(policy))))
            self._changed(db)

    def remove(self, policy_id: str) -> Policy:
        """Forget a policy; NotFound."""
        found = self.policy(policy_id)
        with self._catalog.transaction(writes=True) as db:
            db.execute(_policies.delete().where(_policies.c.id == policy_id))
            self._changed(db)
        return found

    def policy(self, policy_id: str) -> Policy:
        """One policy; NotFound."""
        found = [policy for policy in self.policies() if policy.id == policy_id]
        if not found:
            raise NotFound(f"there is no policy {policy_id[:64]!r}", hint="'headrace policy list' lists them")
        return found[0]

    def policies(self) -> list[Policy]:
        """All policies, oldest first."""
        with self._catalog.transaction(writes=False) as db:
            bodies = list(db.execute(sa.select(_policies.c.body)).scalars())
        return sorted((from_dict(Policy, json.loads(body)) for body in bodies), key=lambda p: (p.created_at, p.id))

    def tags(self, dataset: str) -> dict[str, list[str]]:
        """The tags of each tagged column of a dataset."""
        query = sa.select(_tags).where(_tags.c.dataset == dataset).order_by(_tags.c.column, _tags.c.tag)
        found: dict[str, list[str]] = {}
        with self._catalog.transaction(writes=False) as db:
            for row in db.execute(query):
                found.setdefault(row.column, []).append(row.tag)
        return found

    def tag(self, dataset: str, column: str, tag: str) -> None:
        """Tag a column; nothing happens if it is tagged so."""
        if tag not in self.tags(dataset).get(column, ()):
            with self._catalog.transaction(writes=True) as db:
                db.execute(_tags.insert().prefix_with("OR IGNORE").values(dataset=dataset, column=column, tag=tag))
                self._changed(db)

    def untag(self, dataset: str, column: str, tag: str) -> None:
        """Take a tag from a column; NotFound."""
        chosen = sa.and_(_tags.c.dataset == dataset, _tags.c.column == column, _tags.c.tag == tag)
        with self._catalog.transaction(writes=True) as db:
            if not db.execute(_tags.delete().where(chosen)).rowcount:
                raise NotFound(
                    f"column {column[:80]!r} has no tag {tag[:80]!r}",
                    hint=f"'headrace column-tag list {dataset}' lists them",
                )
            self._changed(db)

    # Views

    def spec(self, key: str) -> tuple[str, str] | None:
        """The normalised policy and the encoded source schema behind the key of a compiled policy."""
        with self._catalog.transaction(writes=False) as db:
            row = db.execute(sa.select(_specs).where(_specs.c.key == key)).first()
        return None if row is None else (row.body, row.arrow_schema)

    def add_spec(self, key: str, body: str, arrow_schema: str) -> None:
        """Remember what the views of a key are made by."""
        if self.spec(key) is None:
            with self._catalog.transaction(writes=True) as db:
                row = {"key": key, "body": body, "arrow_schema": arrow_schema}
                db.execute(_specs.insert().prefix_with("OR IGNORE").values(**row))

    def _shown(self, key: str, dataset: str, version: int) -> tuple[Any, Any]:
        """The files of a version as a subquery, and how it joins the views of a key."""
        live = live_files(dataset, version).subquery()
        return live, sa.and_(_views.c.key == key, _views.c.file == live.c.id)

    def missing(self, key: str, dataset: str, version: int, after: int, limit: int) -> list[FileEntry]:
        """Files of a version beyond row ``after`` that have no view under a key yet, in row order."""
        live, on = self._shown(key, dataset, version)
        query = sa.select(live).outerjoin(_views, on).where(_views.c.id.is_(None), live.c.start > after)
        with self._catalog.transaction(writes=False) as db:
            return entries_of(db.execute(query.order_by(live.c.start).limit(limit)))

    def progress(self, key: str, dataset: str, version: int) -> tuple[int, int]:
        """How many files of a version have a view under a key, and how many files there are."""
        live, on = self._shown(key, dataset, version)
        query = sa.select(sa.func.count(_views.c.id), sa.func.count()).select_from(live).outerjoin(_views, on)
        with self._catalog.transaction(writes=False) as db:
            made, all = db.execute(query).one()
        return int(made), int(all)

    def totals(self, key: str, dataset: str, version: int) -> Totals | None:
        """What ``total`` found before, or None."""
        query = sa.select(_totals.c.body).where(
            _totals.c.key == key, _totals.c.dataset == dataset, _totals.c.version == version
        )
        with self._catalog.transaction(writes=False) as db:
            body = db.execute(query).scalar()
        return None if body is None else from_dict(Totals, json.loads(body))

    def total(self, key: str, dataset: str, version: int, splits: Iterable[str]) -> Totals:
        """Add up the views of a version, all of which are made, and remember the sums."""
        live, on = self._shown(key, dataset, version)
        wanted = (live.c.split, _views.c.rows, _views.c.bytes, _views.c.arrow_bytes, _views.c.content)
        query = sa.select(*wanted).outerjoin(_views, on).where(_SHOWN).order_by(live.c.start)
        rows = size = arrow_bytes = files = 0
        of_split, content = dict.fromkeys(splits, 0), hashlib.sha256(b"headrace.view.1")
        with self._catalog.transaction(writes=False) as db:
            for row in db.execute(query.execution_options(yield_per=_STREAMED)):
                rows, size, files = rows + row.rows, size + row.bytes, files + 1
                arrow_bytes += row.arrow_bytes
                content.update(f"{row.content}:{row.rows}:{row.split or ''}\n".encode())
                if row.split is not None:
                    of_split[row.split] += row.rows
        made = Totals(rows, size, arrow_bytes, files, of_split, content.hexdigest())
        body = {"key": key, "dataset": dataset, "version": version, "body": json.dumps(to_dict(made))}
        with self._catalog.transaction(writes=True) as db:
            db.execute(_totals.insert().prefix_with("OR REPLACE").values(**body))
        return made

    def listed(
        self, key: str, dataset: str, version: int, split: str | None, after: int, limit: int | None
    ) -> list[FileEntry]:
        """The views of a version in row order; ``after`` and ``limit`` page by position among visible rows."""
        live, on = self._shown(key, dataset, version)
        wanted = (_views.c.id, _views.c.rows, _views.c.bytes, _views.c.sha256, live.c.split, live.c.start.label("at"))
        query = sa.select(*wanted).outerjoin(_views, on).where(_SHOWN)
        first = 0
        if after < 0 and split is None:
            query = query.order_by(live.c.start).limit(limit)
        else:
            # Positions among visible rows follow from all views before.
            ends = sa.func.sum(_views.c.rows).over(order_by=live.c.start, rows=(None, 0))
            whole = query.add_columns((ends - _views.c.rows).label("place")).subquery()
            query = sa.select(whole).where(whole.c.place > after)
            if split is not None:
                query = query.where(whole.c.split == split)
            query = query.order_by(whole.c.at).limit(limit)
        found: list[FileEntry] = []
        with self._catalog.transaction(writes=False) as db:
            for row in db.execute(query.execution_options(yield_per=_STREAMED)):
                start = row.place if hasattr(row, "place") else first
                first += row.rows
                found.append(FileEntry(row.id, row.rows, row.bytes, row.sha256, start, "", row.split))
        return found

    def view(self, view_id: str) -> View | None:
        """One view, or None."""
        with self._catalog.transaction(writes=False) as db:
            row = db.execute(sa.select(_views).where(_views.c.id == view_id)).first()
        return None if row is None else View(*row)

    def add_views(self, views: Iterable[View]) -> None:
        """Remember views; those that are known stay as they are."""
        rows = [_row(view) for view in views]
        if rows:
            with self._catalog.transaction(writes=True) as db:
                db.execute(_views.insert().prefix_with("OR IGNORE"), rows)

    def replace_view(self, old: View, new: View) -> None:
        """Put a view with the same values and other bytes in the place of one, under a new id."""
        with self._catalog.transaction(writes=True) as db:
            db.execute(_views.delete().where(_views.c.id == old.id))
            db.execute(_views.insert().prefix_with("OR IGNORE"), [_row(new)])
            db.execute(_totals.delete().where(_totals.c.key == old.key, _totals.c.dataset == old.dataset))


def _row(view: View) -> dict[str, object]:
    return {name: getattr(view, name) for name in View.__slots__}
