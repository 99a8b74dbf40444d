"""What a step of a recipe is: a RecordBatch in, a RecordBatch and verdicts out; some first fit over small keys."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.errors import BadRecipe
from headrace.model import SYSTEM_COLUMNS

VERDICTS = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("field", pa.string()),
        pa.field("value", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("kept", pa.string()),
    ]
)
"""One line per rule that fired on a row of the step's input batch; ``kept`` names the twin of a merged duplicate."""

NO_VERDICTS = pa.RecordBatch.from_pylist([], schema=VERDICTS)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a batch stands: its task, and the position of its first row within that task's rows at this step."""

    task: int
    row: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step made of one batch: the rows that go on, and why the others do not."""

    batch: pa.RecordBatch
    verdicts: pa.RecordBatch = field(default_factory=lambda: NO_VERDICTS)


@dataclass(frozen=True)
class Step:
    """A map step. Subclasses are frozen dataclasses; their fields are the options a recipe may set.

    ``whole`` names the one option that a recipe may give bare, as in ``select: [a, b]``.
    """

    name: ClassVar[str]
    whole: ClassVar[str | None] = None

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:
        """Keep, drop or rewrite the rows of ``batch``, in order. System columns (``_id`` …) go through untouched."""
        raise NotImplementedError

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise BadRecipe for what the step needs and this exchange lacks, before anything runs."""

    def used(self, state: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """What decided the result beside recipe and data, for the version to keep; ``path`` names a file to keep."""
        return {}

    def expand(self, base: Path | None) -> list[Step]:  # noqa: ARG002
        """The steps that run for this one, in order; relative paths among its options count from ``base``."""
        return [self]

    def paths(self) -> tuple[str, ...]:
        """Files of the exchange's machine that the step's options name and it will read."""
        return ()


@dataclass(frozen=True)
class FitStep(Step):
    """A step that must see the whole before it can map: it fits over keys or statistics, never over the rows."""

    @property
    def fits(self) -> bool:
        """Whether the options given need a fit at all; if not, the step only maps, with an empty state."""
        return True

    def keys(self, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """The small part of ``batch`` that ``fit`` needs, or None. One row per row, or a few rows of statistics."""
        raise NotImplementedError

    def fit(self, keys: Sequence[Path], out: Path) -> dict[str, Any]:
        """Make the JSON state that ``apply`` receives, from Parquet files of keys in task order.

        Each file holds the columns of ``keys`` and ``_task`` (int32), ``_row`` (int64); keys one per row also ``_id``.
        Larger results go to files below the folder ``out``, named in the state.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Carried:
    """What a sequential step hands from one batch, or task, to the next: a small table per split, and its counts."""

    rows: Mapping[str, pa.RecordBatch] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SequentialStep(Step):
    """A step whose rows depend on all rows before them, such as packing. Runs over the tasks in order."""

    def advance(self, batch: pa.RecordBatch, carried: Carried) -> tuple[pa.RecordBatch, Carried]:
        """Take one batch (rows of one split only) after ``carried``; return finished rows and what is left over."""
        raise NotImplementedError

    def finish(self, carried: Carried) -> tuple[list[pa.RecordBatch], Carried]:
        """What remains after the last batch: finished rows per split if any, and the final counts."""
        raise NotImplementedError


def user_columns(schema: pa.Schema) -> list[str]:
    """The names of the columns that are the user's, in order."""
    return [name for name in schema.names if name not in SYSTEM_COLUMNS]


def no_column(schema: pa.Schema, name: str, step: str) -> BadRecipe:
    """The error for a column that a step names and its input lacks; it suggests the nearest one."""
    names = user_columns(schema)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"columns here: {', '.join(names[:20]) or 'none'}"
    return BadRecipe(f"step {step!r}: there is no column {name!r}", hint=hint)


def column(batch: pa.RecordBatch, name: str, step: str) -> pa.Array:
    """The column ``name`` of ``batch``; raises BadRecipe with the nearest name."""
    if name not in batch.schema.names:
        raise no_column(batch.schema, name, step)
    return batch.column(name)


def replaced(batch: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    """``batch`` with other ``values`` in the column ``name``, in its place."""
    return batch.set_column(batch.schema.get_field_index(name), pa.field(name, values.type), values)


def fired(
    rows: npt.NDArray[Any],
    rule: str,
    reasons: Sequence[str],
    *,
    field: str | None = None,
    values: Sequence[str | None] | None = None,
    kept: pa.Array | None = None,
) -> pa.RecordBatch:
    """Verdicts of one rule: one line per entry of ``rows`` (positions in the batch), ``reasons`` and so on."""
    count = len(rows)
    columns = [
        pa.array(np.asarray(rows, dtype=np.int32)),
        pa.array([rule] * count, pa.string()),
        pa.array([field] * count, pa.string()),
        pa.array(values if values is not None else [None] * count, pa.string()),
        pa.array(reasons, pa.string()),
        pa.nulls(count, pa.string()) if kept is None else kept.cast(pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=VERDICTS)


def drop(batch: pa.RecordBatch, verdicts: Sequence[pa.RecordBatch]) -> Outcome:
    """``batch`` without the rows that any of ``verdicts`` names, and the verdicts by row, then in the order given."""
    found = [one for one in verdicts if one.num_rows]
    if not found:
        return Outcome(batch)
    lines = pa.concat_batches(found)
    rows = lines.column("row").to_numpy()
    keep = np.ones(batch.num_rows, dtype=bool)
    keep[rows] = False
    return Outcome(batch.filter(pa.array(keep)), lines.take(pa.array(np.argsort(rows, kind="stable"))))
