"""What stewards do: say what is hidden from whom, tag columns, and look for personal data."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from fnmatch import fnmatchcase

from headrace import govern, policy, privacy, reading
from headrace.catalog import Catalog, now
from headrace.errors import BadRequest
from headrace.model import SYSTEM_COLUMNS, ColumnTag, Policy, Principal, Ref, check_name
from headrace.policy.masks import texts
from headrace.predicate import compile_where
from headrace.root import Root
from headrace.views import Views

CLASSIFY_ROWS = 10_000
_ROWS_MOST = 1_000_000
_SHARE_LEAST = 0.01


class Stewards:
    """The part of an exchange that decides what is visible; see ``Exchange``."""

    catalog: Catalog
    _place: Root
    _views: Views

    def add_policy(
        self,
        principal: Principal,
        dataset: str,
        subject: str,
        row_filter: str | None = None,
        masks: Mapping[str, str] | None = None,
    ) -> Policy:
        """Hide rows and columns of the datasets that match; at once, for every way out. BadRequest if it cannot be."""
        govern.allow(principal, govern.MANAGE)
        made = policy.check(Policy(uuid.uuid4().hex[:16], dataset, subject, row_filter, dict(masks or {}), now()))
        if made.row_filter is not None:
            for name in self.catalog.dataset_names():
                schema = reading.schema_of(self.catalog, self.catalog.latest(name))
                if schema is not None and fnmatchcase(name, made.dataset):
                    # Where it cannot be computed it would hide all; whoever writes it should hear of that now.
                    compile_where(made.row_filter, schema)
        self._views.book.add(made)
        return made

    def policies(self, principal: Principal, dataset: str | None = None) -> list[Policy]:
        """All policies, or those that match a dataset, oldest first."""
        govern.allow(principal, govern.MANAGE)
        return [one for one in self._views.book.policies() if dataset is None or fnmatchcase(dataset, one.dataset)]

    def policy(self, principal: Principal, policy_id: str) -> Policy:
        """One policy; NotFound."""
        govern.allow(principal, govern.MANAGE)
        return self._views.book.policy(policy_id)

    def remove_policy(self, principal: Principal, policy_id: str) -> Policy:
        """End a policy; NotFound."""
        govern.allow(principal, govern.MANAGE)
        return self._views.book.remove(policy_id)

    def column_tags(self, principal: Principal, dataset: str) -> list[ColumnTag]:
        """The tags of a dataset's columns."""
        govern.allow(principal, govern.READ, check_name(dataset))
        self.catalog.dataset(dataset)
        tags = self._views.book.tags(dataset)
        return [ColumnTag(column, tag) for column, held in sorted(tags.items()) for tag in held]

    def tag_column(self, principal: Principal, dataset: str, column: str, tag: str) -> list[ColumnTag]:
        """Tag a column, so that policies can name it by the tag. The column need not be there yet."""
        govern.allow(principal, govern.MANAGE)
        self.catalog.dataset(check_name(dataset))
        if column in SYSTEM_COLUMNS or not 0 < len(column) <= 255:
            raise BadRequest(f"the column {column[:80]!r} cannot be tagged", hint="tag a column of the records")
        self._views.book.tag(dataset, column, policy.check_column_tag(tag))
        return self.column_tags(principal, dataset)

    def untag_column(self, principal: Principal, dataset: str, column: str, tag: str) -> list[ColumnTag]:
        """Take a tag from a column; NotFound."""
        govern.allow(principal, govern.MANAGE)
        self._views.book.untag(check_name(dataset), column, tag)
        return self.column_tags(principal, dataset)

    def classify(
        self, principal: Principal, ref: Ref, rows: int = CLASSIFY_ROWS, apply: bool = False
    ) -> list[ColumnTag]:
        """Tags such as ``pii.email`` for the columns of a version, by what its first ``rows`` rows hold.

        Proposals, with how many values were looked at and how many of them hold that kind; no value is told. With
        ``apply`` the columns are tagged so.
        """
        govern.allow(principal, govern.MANAGE)
        if not 1 <= rows <= _ROWS_MOST:
            raise BadRequest(f"{rows} rows cannot be classified", hint=f"1 to {_ROWS_MOST}")
        seen: dict[str, int] = {}
        held: dict[tuple[str, str], int] = {}
        contents = self._views.seen(principal, ref.dataset)
        for batch in reading.scan(self._place, contents, ref, limit=rows):
            for name in batch.schema.names:
                if name in SYSTEM_COLUMNS:
                    continue
                column = texts(batch.column(name))
                seen[name] = seen.get(name, 0) + len(column) - column.null_count
                for kind, count in privacy.find(column).items():
                    held[name, kind] = held.get((name, kind), 0) + count
        proposed = [
            ColumnTag(name, f"pii.{kind}", seen[name], count)
            for (name, kind), count in sorted(held.items())
            if count and count >= _SHARE_LEAST * seen[name]
        ]
        for one in proposed if apply else ():
            self._views.book.tag(ref.dataset, one.column, one.tag)
        return proposed
