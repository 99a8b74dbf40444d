"""Exact median and MAD of a column of any length in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

CHUNK = 1 << 20
SIGN = np.uint64(1 << 63)

Floats = npt.NDArray[np.float64]


def _ordered(values: Floats) -> npt.NDArray[np.uint64]:
    """Numbers as unsigned integers of the same order."""
    bits = (values + 0.0).view(np.uint64)
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def _number(code: int) -> float:
    sign = 1 << 63
    bits = code ^ sign if code & sign else code ^ (2 * sign - 1)
    return float(np.uint64(bits).view(np.float64))


def _select(data: Floats, rank: int, of: Callable[[Floats], Floats]) -> float:
    """The value at ``rank`` (from 0) among ``of(data)``: four passes, each of which settles 16 bits."""
    prefix = 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for at in range(0, len(data), CHUNK):
            codes = _ordered(of(np.asarray(data[at : at + CHUNK]))) >> np.uint64(shift)
            low = (codes[codes >> np.uint64(16) == prefix] & np.uint64(0xFFFF)).astype(np.int64)
            counts += np.bincount(low, minlength=1 << 16)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit - 1]) if digit else 0
        prefix = prefix << 16 | digit
    return _number(prefix)


def _median(data: Floats, of: Callable[[Floats], Floats]) -> float:
    low = _select(data, (len(data) - 1) // 2, of)
    return low if len(data) % 2 else low + (_select(data, len(data) // 2, of) - low) / 2


def fit_outliers(keys: Sequence[Path], name: str, out: Path) -> dict[str, Any]:
    """Robust place and scale of the finite values of column ``name``; score = factor * |x - median| / spread.

    The spread is the MAD; where that is 0 (more than half the values are equal), it is the mean absolute deviation,
    whose factor is 1/1.253314; where that is 0 too, all values are equal. Without values ``median`` is None.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.f64"
    with path.open("wb") as file:
        for one in keys:
            for batch in pq.ParquetFile(one).iter_batches(columns=[name]):
                values = batch.column(0).drop_null().to_numpy(zero_copy_only=False)
                file.write(values[np.isfinite(values)].tobytes())
    try:
        if not path.stat().st_size:
            return {"median": None, "spread": 0.0, "factor": 0.6745, "values": 0}
        return _fit(np.memmap(path, dtype=np.float64, mode="r"))
    finally:
        path.unlink()


def _fit(data: Floats) -> dict[str, Any]:
    median = _median(data, lambda values: values)
    spread, factor = _median(data, lambda values: np.abs(values - median)), 0.6745
    if spread == 0:
        chunks = range(0, len(data), CHUNK)
        spread = sum(float(np.abs(data[at : at + CHUNK] - median).sum()) for at in chunks) / len(data)
        factor = 1 / 1.253314
    return {"median": median, "spread": spread, "factor": factor, "values": len(data)}
