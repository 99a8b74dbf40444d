"""May this principal do this? Every decision is made here, and denies unless a rule allows."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache

from headrace.errors import Forbidden
from headrace.model import Principal

READ, WRITE, MANAGE, ADMIN = "read", "write", "manage", "admin"
_MAY = {
    "admin": frozenset({READ, WRITE, MANAGE, ADMIN}),
    "producer": frozenset({READ, WRITE}),
    "consumer": frozenset({READ}),
    "open": frozenset({READ, WRITE}),
}
_WORDS = {READ: "read here", WRITE: "write here", MANAGE: "manage this exchange", ADMIN: "administer this exchange"}
ROLES = ("admin", "producer", "consumer")
OWNER = Principal("owner", "admin")
"""Whoever may open the root's files."""


@lru_cache(maxsize=4096)
def may(principal: Principal, action: str, dataset: str | None = None) -> bool:
    """Whether ``principal`` may do ``action``, on ``dataset`` if one is given."""
    if action not in _MAY.get(principal.role, ()):
        return False
    if dataset is None and action in (MANAGE, ADMIN):
        # These reach beyond any one dataset: who holds only some of them could help himself to the rest.
        return "*" in principal.datasets
    return dataset is None or any(fnmatchcase(dataset, pattern) for pattern in principal.datasets)


def allow(principal: Principal, action: str, dataset: str | None = None) -> None:
    """Raise Forbidden unless ``principal`` may do ``action``. The message is the same whether the dataset exists."""
    if not may(principal, action, dataset):
        what = _WORDS[action] if dataset is None else f"{action} dataset {dataset!r}"
        raise Forbidden(
            f"{principal.name!r} may not {what}", hint="ask an admin for a token whose role and datasets allow it"
        )
