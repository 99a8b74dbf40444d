"""What a policy hides: row filters and column masks, combined for a principal and applied to record batches.

``check(policy)`` refuses what cannot be one. ``effective(policies, principal, dataset, tags)`` combines all that match:
filters by AND, masks by the strongest. ``Effective.compile(schema, key)`` gives ``Compiled``, whose ``apply(batch)`` is
the only way from stored rows to visible ones. It fails closed: a filter that cannot be computed hides every row, a mask
that cannot be computed gives null.
"""

from headrace.policy.compiled import Compiled, Effective, effective, key_id
from headrace.policy.masks import Mask
from headrace.policy.rules import check, check_column_tag, concerns

__all__ = ["Compiled", "Effective", "Mask", "check", "check_column_tag", "concerns", "effective", "key_id"]
