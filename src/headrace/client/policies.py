"""The methods of a session about what is hidden from whom, and how they go over HTTP."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import quote

from headrace.client.http import Http
from headrace.model import ColumnTag, Policy, Ref, check_name, from_dict

CLASSIFY_ROWS = 10_000

T = TypeVar("T")


class PolicyMethods(abc.ABC):
    """The part of a session that decides what is visible; see ``Session``."""

    @abc.abstractmethod
    def add_policy(
        self,
        dataset: str,
        subject: str,
        row_filter: str | None = None,
        masks: Mapping[str, str] | None = None,
    ) -> Policy:
        """Hide rows and columns of the datasets whose names match ``dataset``, at once and on every way out.

        ``subject`` is ``principal:NAME``, ``role:NAME``, ``group:NAME``, or ``*`` for all but admins. Rows for which
        ``row_filter`` is not true are hidden. ``masks`` maps columns, or ``tag:PATTERN``, to masks: null,
        constant:TEXT, hash or hash:NAME, last:N, month, bucket:WIDTH, redact or redact:KIND,KIND. BadRequest if it
        cannot be.
        """

    @abc.abstractmethod
    def policies(self, dataset: str | None = None) -> list[Policy]:
        """All policies, or those that match a dataset, oldest first."""

    @abc.abstractmethod
    def policy(self, id: str) -> Policy:
        """One policy; NotFound."""

    @abc.abstractmethod
    def remove_policy(self, id: str) -> Policy:
        """End a policy, at once; NotFound."""

    @abc.abstractmethod
    def column_tags(self, dataset: str) -> list[ColumnTag]:
        """The tags of a dataset's columns."""

    @abc.abstractmethod
    def tag_column(self, dataset: str, column: str, tag: str) -> list[ColumnTag]:
        """Tag a column, such as ``pii.email``, so that policies can name it by the tag; the dataset's tags."""

    @abc.abstractmethod
    def untag_column(self, dataset: str, column: str, tag: str) -> list[ColumnTag]:
        """Take a tag from a column; the dataset's tags. NotFound."""

    @abc.abstractmethod
    def _classify(self, ref: Ref, rows: int, apply: bool) -> list[ColumnTag]:
        """Propose tags by the first rows of a version."""

    def classify(self, ref: Ref | str, rows: int = CLASSIFY_ROWS, apply: bool = False) -> list[ColumnTag]:
        """Propose tags such as ``pii.email`` for the columns of a version, by what its first ``rows`` rows hold.

        Each says how many values were looked at and how many of them hold that kind. ``apply`` tags the columns so.
        """
        return self._classify(ref if isinstance(ref, Ref) else Ref.parse(ref), rows, apply)


class RemotePolicies(PolicyMethods):
    """These methods over HTTP."""

    _http: Http

    @abc.abstractmethod
    def _all(self, kind: type[T], path: str, **query: str | None) -> list[T]:
        """All items of a paged list."""

    def add_policy(
        self,
        dataset: str,
        subject: str,
        row_filter: str | None = None,
        masks: Mapping[str, str] | None = None,
    ) -> Policy:
        """Hide rows and columns; see ``Session``."""
        body = {"dataset": dataset, "subject": subject, "row_filter": row_filter, "masks": dict(masks or {})}
        return from_dict(Policy, self._http.call("POST", "/v1/policies", json=body))

    def policies(self, dataset: str | None = None) -> list[Policy]:
        """All policies, or those that match a dataset, oldest first."""
        return self._all(Policy, "/v1/policies", dataset=dataset)

    def policy(self, id: str) -> Policy:
        """One policy; NotFound."""
        return from_dict(Policy, self._http.call("GET", f"/v1/policies/{quote(id, safe='')}"))

    def remove_policy(self, id: str) -> Policy:
        """End a policy, at once; NotFound."""
        return from_dict(Policy, self._http.call("DELETE", f"/v1/policies/{quote(id, safe='')}"))

    def column_tags(self, dataset: str) -> list[ColumnTag]:
        """The tags of a dataset's columns."""
        return self._all(ColumnTag, _tags(dataset))

    def tag_column(self, dataset: str, column: str, tag: str) -> list[ColumnTag]:
        """Tag a column; the dataset's tags."""
        answer = self._http.call("POST", _tags(dataset), json={"column": column, "tag": tag}, repeatable=True)
        return [from_dict(ColumnTag, item) for item in answer["items"]]

    def untag_column(self, dataset: str, column: str, tag: str) -> list[ColumnTag]:
        """Take a tag from a column; the dataset's tags. NotFound."""
        answer = self._http.call("DELETE", _tags(dataset), params={"column": column, "tag": tag})
        return [from_dict(ColumnTag, item) for item in answer["items"]]

    def _classify(self, ref: Ref, rows: int, apply: bool) -> list[ColumnTag]:
        body = {"ref": ref.at + (f":{ref.split}" if ref.split else ""), "rows": rows, "apply": apply}
        answer = self._http.call("POST", f"/v1/datasets/{ref.dataset}/classify", json=body, repeatable=True)
        return [from_dict(ColumnTag, item) for item in answer["items"]]


def _tags(dataset: str) -> str:
    return f"/v1/datasets/{check_name(dataset)}/column-tags"
