"""Exact duplicates: rows with equal content are merged into the one with the smallest ``_id``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.clean.keys import check_text_or_numbers, duplicates, row_keys, twins
from headrace.errors import BadRecipe
from headrace.steps import FitStep, Outcome, Position, column, drop, user_columns


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _blank(array: pa.Array) -> npt.NDArray[np.bool_]:
    """Where a value is null, or a text of white space only: bool [len]."""
    blank = array.is_null()
    if _is_text(array.type):
        blank = pc.or_(blank, pc.match_substring_regex(array, r"^[\s\pZ]*$").fill_null(True))
    return np.asarray(blank.to_numpy(zero_copy_only=False), dtype=bool)


@dataclass(frozen=True)
class Dedup(FitStep):
    """Merge rows whose ``columns`` (all user columns by default) are equal.

    Texts are compared after NFC with runs of white space as one space and none at the ends; case counts. Numbers
    compare by value within one type. Rows whose columns are all null or blank never merge.
    """

    name: ClassVar[str] = "dedup"

    exact: bool = True
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.exact:
            raise BadRecipe("dedup: exact: false leaves nothing to do", hint="write dedup: {exact: true}")

    def keys(self, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """``key``: binary[16] per row; null for rows that never merge."""
        names = list(self.columns) or user_columns(batch.schema)
        columns = [column(batch, name, self.name) for name in names]
        check_text_or_numbers(columns, names, self.name)
        if not columns or not batch.num_rows:
            return None
        absent = np.logical_and.reduce([_blank(one) for one in columns])
        return pa.record_batch({"key": row_keys(columns, absent, collapse=True)})

    def fit(self, keys: Sequence[Path], out: Path) -> dict[str, Any]:
        """Which rows of which task are later twins, as files below ``out``."""
        return duplicates(keys, "key", out)

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:
        """Drop later twins; their verdict ``dedup.exact`` names the kept one."""
        return drop(batch, [twins(state, at, batch.num_rows, "dedup.exact")])
