"""Columns of numbers into one fixed-length vector per row, for a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.errors import BadRecipe
from headrace.steps import FitStep, Outcome, Position, Step, column, drop, fired

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

STATS = pa.schema(
    [
        pa.field("length", pa.int32(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("m2", pa.float64(), nullable=False),
    ]
)
"""Statistics of a batch: of the rows of ``length`` numbers, the count, mean and squared deviations per place."""


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(is_kind(kind) for is_kind in kinds)


def _floats(array: pa.Array) -> Floats:
    """Numbers as float64, null as NaN."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    return np.asarray(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def _mask(array: pa.Array) -> Mask:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)


def _bad(name: str, where: Mask, rule: str, reason: str, values: Sequence[str] | None = None) -> pa.RecordBatch:
    rows = np.flatnonzero(where)
    return fired(rows, rule, [reason] * len(rows), field=name, values=values)


def _within(rows: npt.NDArray[np.int64], count: int) -> Mask:
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return mask


def _judge(name: str, array: pa.Array) -> list[pa.RecordBatch]:
    """Verdicts on nulls and numbers that are not finite, in a column or in its lists."""
    absent = _mask(array.is_null())
    items = pc.list_flatten(array) if _is_list(array.type) else array
    if not (_is_number(items.type) or pa.types.is_null(items.type)):
        raise BadRecipe(
            f"step 'features': column {name!r} is {array.type}, not numbers", hint="cast it, or leave it out"
        )
    holes, wild = _mask(items.is_null()), ~np.isfinite(_floats(items))
    if items is not array:
        rows = pc.list_parent_indices(array).to_numpy(zero_copy_only=False).astype(np.int64)
        absent |= _within(rows[holes], len(array))
        infinite = _within(rows[wild & ~holes], len(array))
    else:
        infinite = wild & ~holes
    found = [_bad(name, absent, "features.null", f"{name} is null" if items is array else f"{name} has a null")]
    if infinite.any():
        texts = [str(value)[:200] for value in array.filter(pa.array(infinite)).to_pylist()]
        found.append(_bad(name, infinite, "features.finite", f"{name} is not a finite number", texts))
    return found


@dataclass(frozen=True)
class Features(Step):
    """Gather ``columns`` (numbers, or one column of lists of ``length`` numbers) into a vector column, ``features``.

    ``label`` is copied to the column ``label`` as int64, float32 or text; a list of one is unwrapped. The source
    columns go, but those in ``keep``. Rows with a null, an infinite number or another length are dropped.
    ``standardize`` subtracts the mean and divides by the population's standard deviation (0 counts as 1).
    Without ``length``, the length most lists have is the right one; of two equally frequent ones the shorter.
    """

    name: ClassVar[str] = "features"

    columns: tuple[str, ...]
    label: str | None = None
    into: str = field(default="features", metadata={"key": "name"})
    standardize: bool = False
    dtype: Literal["float32", "float64"] = "float32"
    keep: tuple[str, ...] = ()
    length: int | None = None

    def __post_init__(self) -> None:
        if not self.columns:
            raise BadRecipe("features: columns is empty", hint="name at least one column of numbers")
        if self.label == self.into or self.into == "label" or self.into.startswith("_"):
            raise BadRecipe(f"features: the vector cannot be named {self.into!r}", hint="choose another name")
        if self.length is not None and (self.length < 1 or len(self.columns) > 1):
            raise BadRecipe("features: length is for one column of lists, and at least 1", hint="leave length out")

    def expand(self, base: Path | None) -> list[Step]:  # noqa: ARG002
        """Itself, or the fitted form where constants or the length come from the whole."""
        if self.standardize or (len(self.columns) == 1 and self.length is None):
            return [FittedFeatures(**{one.name: getattr(self, one.name) for one in dataclasses.fields(self)})]
        return [self]

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """One vector per row, and the label."""
        return self._apply(batch, self.length, None)

    def _fired(self, batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        found: list[pa.RecordBatch] = []
        for name in self.columns:
            values = column(batch, name, self.name)
            if _is_list(values.type) and len(self.columns) > 1:
                raise BadRecipe(
                    f"step 'features': {name!r} is a list column beside others", hint="give it a step of its own"
                )
            found.extend(_judge(name, values))
        if self.label is not None:
            values = column(batch, self.label, self.name)
            found.append(_bad(self.label, _mask(values.is_null()), "features.null", f"{self.label} is null"))
            if _is_list(values.type):
                others = _mask(pc.not_equal(pc.list_value_length(values), 1).fill_null(False))
                reason = f"{self.label} is not a list of exactly one value"
                found.append(_bad(self.label, others, "features.label", reason))
                holes = _within(pc.list_parent_indices(values).filter(pc.list_flatten(values).is_null()), len(values))
                found.append(_bad(self.label, holes & ~others, "features.null", f"{self.label} has a null"))
        return found

    def _lengths(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64] | None:
        """Per row the length of the one list column, 0 for null; None where columns are plain numbers."""
        values = column(batch, self.columns[0], self.name)
        if not _is_list(values.type):
            return None
        return np.asarray(pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False), dtype=np.int64)

    def _matrix(self, batch: pa.RecordBatch, length: int) -> Floats:
        """float64 [rows, length] of rows that all have that length and no nulls."""
        first = batch.column(self.columns[0])
        if _is_list(first.type):
            return _floats(pc.list_flatten(first)).reshape(-1, length)
        return np.stack([_floats(batch.column(name)) for name in self.columns], axis=1)

    def _apply(self, batch: pa.RecordBatch, length: int | None, constants: tuple[Floats, Floats] | None) -> Outcome:
        found, lengths = self._fired(batch), self._lengths(batch)
        if lengths is None:
            length = len(self.columns)
        else:
            name = self.columns[0]
            others = (lengths != (length or 0)) & _mask(batch.column(name).is_valid())
            texts = [str(number) for number in lengths[others].tolist()]
            found.append(_bad(name, others, "features.length", f"{name} does not have {length} numbers", texts))
        outcome = drop(batch, found)
        matrix = self._matrix(outcome.batch, length or 1)
        if constants is not None:
            matrix = (matrix - constants[0]) / constants[1]
        numbers = pa.array(matrix.astype(self.dtype).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(numbers, max(1, length or 0))
        return Outcome(self._columns(outcome.batch, vectors), outcome.verdicts)

    def _columns(self, batch: pa.RecordBatch, vectors: pa.Array) -> pa.RecordBatch:
        """The vector, the label, then the columns that stay."""
        columns = {self.into: vectors}
        if self.label is not None:
            columns["label"] = _label(batch.column(self.label))
        gone = {*self.columns, *([] if self.label is None else [self.label])} - set(self.keep)
        for name in batch.schema.names:
            if name in gone:
                continue
            if name in columns:
                raise BadRecipe(f"step 'features': there is a column {name!r} already", hint="give name:, or rename it")
            columns[name] = batch.column(name)
        return pa.RecordBatch.from_pydict(columns)


def _label(values: pa.Array) -> pa.Array:
    if _is_list(values.type):
        values = pc.list_flatten(values)
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return values.cast(pa.int64())
    return values.cast(pa.float32(), safe=False) if _is_number(kind) else values


@dataclass(frozen=True)
class FittedFeatures(Features, FitStep):
    """``features`` with constants of the whole: the vector's length, and ``mean`` and ``std`` per column."""

    def expand(self, base: Path | None) -> list[Step]:  # noqa: ARG002
        """Itself."""
        return [self]

    def keys(self, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """``STATS`` of the rows that would stay, per length of vector."""
        good = drop(batch, self._fired(batch)).batch
        if not good.num_rows:
            return None
        lengths = self._lengths(good)
        if lengths is None:
            return self._stats(good, len(self.columns))
        known = np.unique(lengths) if self.length is None else np.array([self.length])
        parts = [self._stats(good.filter(pa.array(lengths == one)), one) for one in known.tolist() if one]
        return pa.concat_batches(parts) if parts else None

    def _stats(self, batch: pa.RecordBatch, length: int) -> pa.RecordBatch:
        matrix = self._matrix(batch, length)
        mean = matrix.mean(axis=0) if len(matrix) else np.zeros(length)
        m2 = ((matrix - mean) ** 2).sum(axis=0)
        same = [np.full(length, length), np.arange(length), np.full(length, len(matrix))]
        columns = [pa.array(one, kind.type) for one, kind in zip([*same, mean, m2], STATS, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=STATS)

    def fit(self, keys: Sequence[Path], out: Path) -> dict[str, Any]:  # noqa: ARG002
        """``length``, ``rows``, and per column ``mean`` and ``std`` (lists for a list column), in task order."""
        tables = [pq.ParquetFile(path).read(columns=STATS.names) for path in keys]
        table = pa.concat_tables(tables) if tables else STATS.empty_table()
        votes = table.filter(pc.equal(table.column("index"), 0)).group_by("length").aggregate([("n", "sum")])
        if not votes.num_rows:
            return {"length": self.length or len(self.columns), "rows": 0, "mean": {}, "std": {}}
        best = votes.sort_by([("n_sum", "descending"), ("length", "ascending")])
        length = best.column("length")[0].as_py()
        chosen = table.filter(pc.equal(table.column("length"), length))
        n, mean, m2 = (chosen.column(name).to_numpy().reshape(-1, length) for name in ("n", "mean", "m2"))
        rows, mean, m2 = _combine(n[:, 0], mean, m2)
        state: dict[str, Any] = {"length": length, "rows": rows, "mean": {}, "std": {}}
        if self.standardize:
            deviation = np.sqrt(m2 / max(rows, 1))
            state["mean"] = self._named(mean)
            state["std"] = self._named(np.where(deviation == 0, 1.0, deviation))
        return state

    def _named(self, numbers: Floats) -> dict[str, Any]:
        if len(self.columns) == 1 and len(numbers) > 1:
            return {self.columns[0]: numbers.tolist()}
        return dict(zip(self.columns, numbers.tolist(), strict=True))

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """One vector per row, standardised with the state's constants, and the label."""
        if not state["mean"]:
            return self._apply(batch, state["length"], None)
        mean, std = (np.hstack([state[part][name] for name in self.columns]) for part in ("mean", "std"))
        return self._apply(batch, state["length"], (mean, std))


def _combine(n: npt.NDArray[np.int64], mean: Floats, m2: Floats) -> tuple[int, Floats, Floats]:
    """Counts, means and squared deviations of parts, combined pairwise in order (Chan, Golub and LeVeque, 1979)."""
    count, center, spread = 0, np.zeros(mean.shape[1]), np.zeros(mean.shape[1])
    for size, one, deviations in zip(n.tolist(), mean, m2, strict=True):
        if size:
            total, delta = count + size, one - center
            center = center + delta * (size / total)
            spread = spread + deviations + delta**2 * (count * size / total)
            count = total
    return count, center, spread
