"""What changed between two versions, matched by ``_id``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace import reading
from headrace.clean.keys import row_keys
from headrace.errors import BadRequest
from headrace.model import SYSTEM_COLUMNS, Diff, Ref
from headrace.reading import Contents
from headrace.root import Root
from headrace.settings import integer

_SAMPLE = 10


def diff(root: Root, old: Contents, base: Ref, new: Contents, other: Ref) -> Diff:
    """Records added, removed and changed from ``base``, as ``old`` knows it, to ``other``, as ``new`` does."""
    one, two = old.resolve(base), new.resolve(other)
    if max(one.rows, two.rows) > integer("diff_rows_max"):
        raise BadRequest(
            f"a diff of more than {integer('diff_rows_max')} rows is not made here", hint="compare the Parquet files"
        )
    shared = [c["name"] for c in one.schema if any(c["name"] == d["name"] for d in two.schema)]
    before, after = _digests(root, old, base, shared), _digests(root, new, other, shared)
    added, removed = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    both = before.keys() & after.keys()
    changed = sorted(key for key in both if before[key] != after[key])
    names = [{c["name"] for c in v.schema} - set(SYSTEM_COLUMNS) for v in (one, two)]
    return Diff(
        one.ref, two.ref, len(added), len(removed), len(changed), len(both) - len(changed),
        tuple(sorted(names[1] - names[0])), tuple(sorted(names[0] - names[1])),
        tuple(added[:_SAMPLE]), tuple(removed[:_SAMPLE]), tuple(changed[:_SAMPLE]),
    )  # fmt: skip


def _digests(root: Root, contents: Contents, ref: Ref, columns: Sequence[str]) -> dict[str, bytes]:
    """``_id`` → digest of the row's shared user columns."""
    user = [name for name in columns if name not in SYSTEM_COLUMNS]
    found: dict[str, bytes] = {}
    for batch in reading.scan(root, contents, ref, ["_id", *user]):
        none = np.zeros(batch.num_rows, bool)
        keys = row_keys([batch.column(name) for name in user], none, collapse=False) if user else None
        digests = keys.to_pylist() if keys is not None else [b""] * batch.num_rows
        found.update(zip(batch.column("_id").to_pylist(), digests, strict=True))
    return found
