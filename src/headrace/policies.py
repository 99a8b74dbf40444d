"""Policies, column tags and what is known of policy views: their tables beside the catalog's, in the same database."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from headrace.catalog import Catalog
from headrace.errors import NotFound
from headrace.model import Policy, from_dict, to_dict

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
    sa.Index("policy_views_of", "key", "dataset"),
)


@dataclass(frozen=True, slots=True)
class View:
    """One data file as a policy shows it. ``key`` names the compiled policy; a view without rows has no file."""

    id: str
    key: str
    dataset: str
    file: str
    rows: int
    bytes: int
    arrow_bytes: int
    sha256: str


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

    def views(self, key: str, dataset: str) -> dict[str, View]:
        """The known views of a dataset under a key, by data file id."""
        query = sa.select(_views).where(_views.c.key == key, _views.c.dataset == dataset)
        with self._catalog.transaction(writes=False) as db:
            return {row.file: View(*row) for row in db.execute(query)}

    def view(self, view_id: str) -> View | None:
        """One view, or None."""
        with self._catalog.transaction(writes=False) as db:
            row = db.execute(sa.select(_views).where(_views.c.id == view_id)).first()
        return None if row is None else View(*row)

    def add_views(self, views: Iterable[View]) -> None:
        """Remember views; those that are known stay as they are."""
        rows: Sequence[dict[str, object]] = [{name: getattr(view, name) for name in View.__slots__} for view in views]
        if rows:
            with self._catalog.transaction(writes=True) as db:
                db.execute(_views.insert().prefix_with("OR IGNORE"), rows)
