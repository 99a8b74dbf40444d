"""Which policies are well formed, and whom they concern."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from headrace.errors import BadRequest
from headrace.model import SYSTEM_COLUMNS, Policy, Principal
from headrace.policy.masks import Mask
from headrace.predicate.words import tokenized

MASKS_MOST = 500
_SUBJECT = re.compile(r"\*|(?:principal|role|group):[a-z0-9][a-z0-9._-]{0,127}")
_PATTERN = re.compile(r"[a-z0-9._*?-]{1,128}")
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check(policy: Policy) -> Policy:
    """``policy`` with its masks in their one written form; BadRequest or BadRef for what cannot be one.

    The filter is checked for its words alone: which columns there are is a matter of each dataset.
    """
    if not _PATTERN.fullmatch(policy.dataset):
        raise BadRequest(f"{policy.dataset[:80]!r} is not a dataset pattern", hint="a name, or '*' and '?' in one")
    if not _SUBJECT.fullmatch(policy.subject):
        raise BadRequest(
            f"{policy.subject[:80]!r} is nobody", hint="principal:NAME, role:NAME, group:NAME, or * for all but admins"
        )
    if policy.row_filter is not None:
        tokenized(policy.row_filter)
    if not policy.masks and policy.row_filter is None:
        raise BadRequest("the policy hides nothing", hint="give a row filter, masks, or both")
    if len(policy.masks) > MASKS_MOST:
        raise BadRequest(f"{len(policy.masks)} masks are too many", hint=f"at most {MASKS_MOST}; use column tags")
    for column in policy.masks:
        if column in SYSTEM_COLUMNS or not 0 < len(column) <= 255:
            raise BadRequest(
                f"the column {column[:80]!r} cannot be masked", hint="under masks the system columns are veiled anyway"
            )
    masks = {column: Mask.parse(text).text for column, text in sorted(policy.masks.items())}
    return Policy(policy.id, policy.dataset, policy.subject, policy.row_filter, masks, policy.created_at)


def check_column_tag(tag: str) -> str:
    """``tag`` if it can be a column's tag, such as ``pii.email``; BadRequest otherwise."""
    if not _TAG.fullmatch(tag):
        raise BadRequest(f"{tag[:80]!r} is not a column tag", hint="such as pii.email: a-z, 0-9, '.', '_', '-'")
    return tag


def concerns(policy: Policy, principal: Principal, dataset: str) -> bool:
    """Whether ``policy`` holds for ``principal`` on ``dataset``. Admins are subject only where they are named."""
    if not fnmatchcase(dataset, policy.dataset):
        return False
    kind, _, name = policy.subject.partition(":")
    if kind == "principal":
        return name == principal.name
    if kind == "role":
        return name == principal.role
    if principal.role == "admin":
        return False
    return kind == "*" or name in getattr(principal, "groups", ())
