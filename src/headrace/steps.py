"""What a step of a recipe is: a RecordBatch in, a RecordBatch and verdicts out; some first fit over small keys of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

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
    verdicts: pa.RecordBatch = NO_VERDICTS


@dataclass(frozen=True)
class Step:
    """A map step. Subclasses are frozen dataclasses; their fields are the options a recipe may set.

    ``whole`` names the one option that a recipe may give bare, as in ``select: [a, b]``.
    """

    name: ClassVar[str]
    whole: ClassVar[str | None] = None

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:
        """Keep, drop or rewrite the rows of ``batch``. System columns (``_id`` …) go through untouched, in row order."""
        raise NotImplementedError


@dataclass(frozen=True)
class FitStep(Step):
    """A step that must see the whole before it can map: it fits over keys or statistics, never over the rows."""

    def keys(self, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """The small part of ``batch`` that ``fit`` needs, or None. One row per row, or a few rows of statistics."""
        raise NotImplementedError

    def fit(self, keys: Sequence[Path], out: Path) -> dict[str, Any]:
        """Make the JSON state that ``apply`` receives, from Parquet files of keys in task order.

        Each file holds the columns of ``keys`` and ``_task`` (int32), ``_row`` (int64); when keys are one per row also ``_id``.
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
