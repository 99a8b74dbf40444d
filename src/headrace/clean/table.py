"""Rules on columns of a table: no nulls, limits, patterns, uniqueness, outliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.clean.keys import check_text_or_numbers, duplicates, row_keys, twins
from headrace.clean.robust import fit_outliers
from headrace.errors import BadRecipe
from headrace.steps import FitStep, Outcome, Position, Step, column, drop, fired, user_columns

Mask = npt.NDArray[np.bool_]
Fired = Iterator[pa.RecordBatch]


@dataclass(frozen=True)
class Limits:
    """What ``check`` demands of one column. Only ``not_null`` judges nulls; lists are judged element by element.

    ``regex`` (RE2) must match somewhere in the text; ``outliers: mad`` refuses values whose modified z-score
    0.6745 * |x - median| / MAD (Iglewicz and Hoaglin, 1993) is above ``mad_limit``.
    """

    not_null: bool = False
    min: int | float | str | None = None
    max: int | float | str | None = None
    regex: str | None = None
    one_of: tuple[Any, ...] | None = None
    unique: bool = False
    outliers: Literal["mad"] | None = None
    mad_limit: float = 3.5

    def __post_init__(self) -> None:
        if self.regex is not None:
            try:
                pc.match_substring_regex(pa.array([""]), self.regex)
            except pa.ArrowInvalid as error:
                raise BadRecipe(
                    f"check: {self.regex!r} is not a regular expression: {error}", hint="the syntax is RE2's"
                ) from None
        for limit in (self.min, self.max):
            if isinstance(limit, float) and math.isnan(limit):
                raise BadRecipe("check: nan is no limit", hint="give a number, or leave it out")
        if not self.mad_limit > 0:
            raise BadRecipe(f"check: mad_limit {self.mad_limit} is not above 0", hint="3.5 is the usual limit")


@dataclass(frozen=True)
class _Elements:
    """The values to judge: each with its row, and its place in the row's list if the column is one."""

    name: str
    values: pa.Array
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64] | None

    def shown(self, at: npt.NDArray[np.int64]) -> list[str]:
        """How reasons name the values at ``at``: ``age``, or ``features[3]``."""
        if self.places is None:
            return [self.name] * len(at)
        return [f"{self.name}[{place}]" for place in self.places[at].tolist()]

    def fire(self, bad: Mask, rule: str, reason: Callable[[str, str | None], str]) -> pa.RecordBatch:
        """Verdicts of ``rule``, one per ``bad`` value; ``reason`` makes the words from its name and its text."""
        at = np.flatnonzero(bad)
        texts = [None if v is None else _text(v) for v in self.values.take(pa.array(at)).to_pylist()]
        reasons = [reason(name, text) for name, text in zip(self.shown(at), texts, strict=True)]
        return fired(self.rows[at], rule, reasons, field=self.name, values=texts)


def _text(value: Any) -> str:
    text = value.isoformat() if hasattr(value, "isoformat") else str(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _elements(name: str, array: pa.Array) -> _Elements:
    if not _is_list(array.type):
        return _Elements(name, array, np.arange(len(array)), None)
    rows = pc.list_parent_indices(array).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.searchsorted(rows, rows)
    return _Elements(name, pc.list_flatten(array), rows, np.arange(len(rows)) - starts)


def _nulls(name: str, array: pa.Array, rule: str) -> Fired:
    """Null values, and null elements of lists."""
    rows = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
    if len(rows):
        yield fired(rows, rule, [f"{name} is null"] * len(rows), field=name)
    if _is_list(array.type):
        inside = _elements(name, array)
        bad = inside.values.is_null().to_numpy(zero_copy_only=False)
        if bad.any():
            yield inside.fire(bad, rule, lambda shown, _: f"{shown} is null")


@dataclass(frozen=True)
class DropNulls(Step):
    """Drop rows with a null (or a list with a null element) in one of ``columns``; all user columns by default."""

    name: ClassVar[str] = "drop_nulls"
    whole: ClassVar[str | None] = "columns"

    columns: tuple[str, ...] = ()

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """The rows without nulls; verdicts ``drop_nulls`` name the columns."""
        names = self.columns or user_columns(batch.schema)
        return drop(batch, [one for name in names for one in _nulls(name, column(batch, name, self.name), self.name)])


def _mismatch(rule: str, elements: _Elements, wanted: str) -> BadRecipe:
    kind = elements.values.type
    return BadRecipe(
        f"step 'check': {rule} of column {elements.name!r} {wanted}, but the column is {kind}", hint="cast it first"
    )


def _whole(limit: int | float | str, least: bool) -> float:
    """The nearest whole number within ``limit``; an infinite one stays."""
    if isinstance(limit, int) or math.isinf(float(limit)):
        return float(limit) if isinstance(limit, str) else limit
    return math.ceil(float(limit)) if least else math.floor(float(limit))


def _beyond(elements: _Elements, limit: int | float | str, least: bool) -> Mask:
    """Where values are on the wrong side of ``limit``; NaN is on the wrong side of every limit, null of none."""
    kind, rule = elements.values.type, "min" if least else "max"
    values = elements.values
    if isinstance(limit, str) == (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise _mismatch(rule, elements, f"is {limit!r}")
    if pa.types.is_integer(kind):
        # Whole numbers compare exactly, also beyond 2^53.
        whole = _whole(limit, least)
        if not -(2**63) <= whole < 2 ** (64 if pa.types.is_uint64(kind) else 63):
            return np.asarray(values.is_valid().to_numpy(zero_copy_only=False)) & ((whole > 0) == least)
        scalar = pa.scalar(int(whole), pa.int64() if whole < 2**63 else pa.uint64())
        if pa.types.is_uint64(kind):
            values, scalar = values.cast(pa.decimal128(20)), scalar.cast(pa.decimal128(20))
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values, scalar = values.cast(pa.float64()), pa.scalar(float(limit))
    else:
        try:
            scalar = pa.scalar(limit).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise _mismatch(rule, elements, f"is {limit!r}") from None
    within = pc.greater_equal(values, scalar) if least else pc.less_equal(values, scalar)
    return np.asarray(pc.invert(within).fill_null(False).to_numpy(zero_copy_only=False))


def _mask(array: pa.Array) -> Mask:
    return np.asarray(pc.invert(array).fill_null(False).to_numpy(zero_copy_only=False))


def _one_of(elements: _Elements, allowed: Sequence[Any]) -> Mask:
    try:
        value_set = pa.array(list(allowed), elements.values.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, OverflowError):
        raise _mismatch("one_of", elements, f"lists {_listed(allowed)}") from None
    inside = pc.is_in(elements.values, value_set=value_set)
    return _mask(pc.or_(inside, elements.values.is_null()))


def _listed(allowed: Sequence[Any]) -> str:
    return ", ".join(str(one) for one in allowed[:10]) + (", …" if len(allowed) > 10 else "")


def _judge(name: str, array: pa.Array, limits: Limits) -> Fired:
    """Verdicts of the rules that need nothing but the batch."""
    if limits.not_null:
        yield from _nulls(name, array, "check.not_null")
    elements = _elements(name, array)
    if limits.min is not None:
        low = limits.min
        yield elements.fire(
            _beyond(elements, low, True), "check.min", lambda n, v: f"{n} is {v}, below the minimum {low}"
        )
    if limits.max is not None:
        high = limits.max
        yield elements.fire(
            _beyond(elements, high, False), "check.max", lambda n, v: f"{n} is {v}, above the maximum {high}"
        )
    if limits.regex is not None:
        pattern = limits.regex
        if not (pa.types.is_string(elements.values.type) or pa.types.is_large_string(elements.values.type)):
            raise _mismatch("regex", elements, "needs text")
        bad = _mask(pc.match_substring_regex(elements.values, pattern))
        yield elements.fire(bad, "check.regex", lambda n, v: f"{n} is {v!r}, which does not match {pattern}")
    if limits.one_of is not None:
        listed = _listed(limits.one_of)
        yield elements.fire(
            _one_of(elements, limits.one_of), "check.one_of", lambda n, v: f"{n} is {v!r}, not one of {listed}"
        )


def _numbers(name: str, array: pa.Array) -> pa.Array:
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise _mismatch("outliers", _elements(name, array), "needs numbers")
    return array.cast(pa.float64(), safe=False)


def _outliers(name: str, array: pa.Array, limits: Limits, fitted: Mapping[str, Any]) -> pa.RecordBatch:
    """Verdicts on values far from the median; NaN is far from every median."""
    median, spread, factor = fitted["median"], fitted["spread"], fitted["factor"]
    if median is None:
        return fired(np.zeros(0), "check.outliers", [])
    distance = np.abs(_numbers(name, array).to_numpy(zero_copy_only=False) - median)
    scores = factor * distance / spread if spread else np.where(distance == 0, 0.0, np.inf)
    bad = ~(scores <= limits.mad_limit) & array.is_valid().to_numpy(zero_copy_only=False)
    if not spread:
        # Every fitted value is the same: there is no scale to call another one an outlier by.
        bad &= False
    at = np.flatnonzero(bad)
    values = [_text(v) for v in array.take(pa.array(at)).to_pylist()]
    reasons = [
        f"{name} is {value}: modified z-score {score:.4g} around the median {median:.6g}, limit {limits.mad_limit:g}"
        for value, score in zip(values, scores[at].tolist(), strict=True)
    ]
    return fired(at, "check.outliers", reasons, field=name, values=values)


@dataclass(frozen=True)
class Check(Step):
    """Drop rows that miss a column's limits; every rule that fired is listed, as ``check.min`` and so on."""

    name: ClassVar[str] = "check"
    whole: ClassVar[str | None] = "columns"

    columns: Mapping[str, Limits]

    def expand(self, base: Path | None) -> list[Step]:  # noqa: ARG002
        """Itself, or the fitted form where a rule needs the whole."""
        needs_whole = any(limits.unique or limits.outliers for limits in self.columns.values())
        return [FittedCheck(self.columns)] if needs_whole else [self]

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """The rows within all limits."""
        return drop(batch, self._fired(batch))

    def _fired(self, batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        found: list[pa.RecordBatch] = []
        for name, limits in self.columns.items():
            found.extend(_judge(name, column(batch, name, self.name), limits))
        return found


@dataclass(frozen=True)
class FittedCheck(Check, FitStep):
    """``check`` with ``unique`` or ``outliers``. Rows that miss another limit count neither as twins nor in the median.

    ``unique`` keeps the row with the smallest ``_id``; the others are dropped, not merged.
    """

    def expand(self, base: Path | None) -> list[Step]:  # noqa: ARG002
        """Itself."""
        return [self]

    def keys(self, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """Per row ``unique_i`` (binary[16]) and ``value_i`` (float64) for the i-th column; null for rows not judged."""
        if not batch.num_rows:
            return None
        bad = np.zeros(batch.num_rows, dtype=bool)
        for verdicts in self._fired(batch):
            bad[verdicts.column("row").to_numpy()] = True
        parts = {}
        for index, (name, limits) in enumerate(self.columns.items()):
            values = column(batch, name, self.name)
            if limits.unique:
                check_text_or_numbers([values], [name], self.name)
                absent = bad | values.is_null().to_numpy(zero_copy_only=False)
                parts[f"unique_{index}"] = row_keys([values], absent, collapse=False)
            if limits.outliers:
                parts[f"value_{index}"] = pc.if_else(
                    pa.array(bad), pa.scalar(None, pa.float64()), _numbers(name, values)
                )
        return pa.record_batch(parts)

    def fit(self, keys: Sequence[Path], out: Path) -> dict[str, Any]:
        """``unique``: tables of twins per column; ``outliers``: median and spread per column."""
        unique, outliers = {}, {}
        for index, (name, limits) in enumerate(self.columns.items()):
            if limits.unique:
                unique[name] = duplicates(keys, f"unique_{index}", out / f"unique_{index}")
            if limits.outliers:
                outliers[name] = fit_outliers(keys, f"value_{index}", out)
        return {"unique": unique, "outliers": outliers}

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:
        """The rows within all limits, without later twins and outliers."""
        found = self._fired(batch)
        for name, limits in self.columns.items():
            values = column(batch, name, self.name)
            if limits.unique:
                found.append(twins(state["unique"][name], at, batch.num_rows, "check.unique", name))
            if limits.outliers:
                found.append(_outliers(name, values, limits, state["outliers"][name]))
        return drop(batch, found)
