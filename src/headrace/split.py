"""Which split a row belongs to: arithmetic on the text of its ``_id`` alone, so a row keeps its split for ever.

The hash is frozen. For an id of n UTF-8 bytes, cut into little-endian 64-bit words w_0, w_1, … (the last padded with
zero bytes; an empty id is one zero word), all modulo 2**64, with G = 0x9E3779B97F4A7C15 and ``mix`` the finaliser of
SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014):

    hash = mix(n + G + sum over j of mix(w_j + (j + 1) * G))

The sum lets numpy hash all words of many ids at once; the factor (j + 1) keeps the order of words significant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.errors import BadData, BadRequest

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNK_BYTES = 1 << 19
_CHUNK_ROWS = 1 << 14
_TOLERANCE = 1e-6

_Words = npt.NDArray[np.uint64]
_Offsets = npt.NDArray[np.int64]


def assign(ids: pa.Array, fractions: Mapping[str, float]) -> pa.StringArray:
    """The split of each row, as names of ``fractions``; same length as ``ids`` (any string type).

    With u = hash / 2**64 of an id, its split is the first in the mapping's order whose cumulative fraction exceeds u.
    So it depends on nothing but the id and the fractions. Nulls and other types raise BadData, fractions that do not
    add up to 1 BadRequest.
    """
    names, bounds = _bounds(fractions)
    chosen = np.searchsorted(bounds, hashes(ids), side="right")
    return pa.array(names, pa.string()).take(pa.array(chosen))


def hashes(ids: pa.Array) -> _Words:
    """The frozen 64-bit hash of each id: uint64, same length as ``ids``. Nulls or other types raise BadData."""
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(kind(ids.type) for kind in kinds):
        raise BadData(f"ids must be text to be split, these are {ids.type}", hint="give each row a string _id")
    if ids.null_count:
        first = ids.is_null().index(pa.scalar(True)).as_py()
        raise BadData(
            f"{ids.null_count} rows have no _id, the first of them is row {first}", hint="give each row an _id"
        )
    offsets, data = _buffers(ids)
    found = np.empty(len(ids), np.uint64)
    start = 0
    while start < len(ids):
        stop = int(np.searchsorted(offsets, offsets[start] + _CHUNK_BYTES, side="right")) - 1
        stop = min(max(stop, start + 1), start + _CHUNK_ROWS, len(ids))
        found[start:stop] = _hash_chunk(offsets[start : stop + 1], data)
        start = stop
    return found


def _bounds(fractions: Mapping[str, float]) -> tuple[list[str], _Words]:
    """Names in order, and for all but the last the least hash that lies beyond it."""
    shares = list(fractions.values())
    if not shares or not all(math.isfinite(share) and share >= 0 for share in shares):
        raise BadRequest(
            f"split fractions must be numbers from 0 to 1, not {dict(fractions)}", hint="such as train: 0.9, val: 0.1"
        )
    total = math.fsum(shares)
    if abs(total - 1) > _TOLERANCE:
        raise BadRequest(f"split fractions add up to {total:g}, not 1", hint="such as train: 0.9, val: 0.1")
    # Dividing by the total gives exactly 1 from the last nonzero share on, so that no row falls into an empty split.
    cumulative = [int(math.ldexp(math.fsum(shares[:k]) / total, 64)) for k in range(1, len(shares))]
    # A bound of 2**64 is never reached, so it need not be compared (nor would it fit).
    return list(fractions), np.array([bound for bound in cumulative if bound < 1 << 64], np.uint64)


def _buffers(ids: pa.Array) -> tuple[_Offsets, npt.NDArray[np.uint8]]:
    """Offsets of this very slice (length + 1) and the whole buffer of bytes they point into."""
    ids = ids.cast(pa.large_string())
    _, offsets, data = ids.buffers()
    if not len(ids) or data is None:
        return np.zeros(len(ids) + 1, np.int64), np.empty(0, np.uint8)
    return np.frombuffer(offsets, np.int64)[ids.offset : ids.offset + len(ids) + 1], np.frombuffer(data, np.uint8)


def _hash_chunk(offsets: _Offsets, data: npt.NDArray[np.uint8]) -> _Words:
    low, high = int(offsets[0]), int(offsets[-1])
    # Words may be read past the end of an id, so the bytes are copied to where eight more follow them.
    padded = np.zeros(high - low + 8, np.uint8)
    padded[: high - low] = data[low:high]
    at_byte = np.ndarray((high - low + 1,), np.dtype("<u8"), buffer=padded, strides=(1,))

    lengths = np.diff(offsets)
    counts = np.maximum((lengths + 7) >> 3, 1)
    ends = np.cumsum(counts)
    firsts = ends - counts
    within = np.arange(int(ends[-1]), dtype=np.int64) - np.repeat(firsts, counts)
    words = at_byte[np.repeat(offsets[:-1] - low, counts) + (within << 3)].astype(np.uint64, copy=False)
    lasts = ends - 1
    spare = ((counts << 3) - lengths).astype(np.uint64) << np.uint64(3)
    # A shift by all 64 bits is undefined: an empty id's word is cleared in its own way.
    clipped = np.minimum(spare, np.uint64(56))
    words[lasts] = np.where(lengths == 0, np.uint64(0), (words[lasts] << clipped) >> clipped)

    within += 1
    words += within.view(np.uint64) * _GOLDEN
    sums = np.add.reduceat(_mix(words), firsts)
    return _mix(sums + lengths.astype(np.uint64) + _GOLDEN)


def _mix(words: _Words) -> _Words:
    """SplitMix64's finaliser, in place."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
