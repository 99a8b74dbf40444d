"""Which row stands at which position of an epoch: arithmetic, so that resuming and tracing cost nothing.

Rows are permuted by a generalised Feistel network over Z_a x Z_b with a * b just above the size of the domain, and by
walking cycles for the few values outside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, the
second and third methods). The round function is the output mix of SplitMix64 (Steele, Lea and Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014), reduced to a range by multiplication. A shuffle, not a cipher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.errors import BadRequest

Shuffle: TypeAlias = Literal["window", "global", False]
Ints: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]

ROWS_MAX = 1 << 62
ROUNDS = 6
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_FEW = 8
_BLOCKS, _WINDOWS, _WHOLE = 1, 2, 3


def _mix(word: int) -> int:
    word = (word + _GAMMA) & _MASK
    word = ((word ^ (word >> 30)) * _MIX1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX2) & _MASK
    return word ^ (word >> 31)


def _u64(value: int) -> Words:
    # A one-element array is several times cheaper as a ufunc operand than a scalar that must be converted at each call.
    return np.array([value & _MASK], dtype=np.uint64)


_S27, _S30, _S31, _S32 = map(_u64, (27, 30, 31, 32))
_M1, _M2, _G = _u64(_MIX1), _u64(_MIX2), _u64(_GAMMA)
_ROUND_KEYS = tuple(_u64(_GAMMA * (i + 1)) for i in range(ROUNDS))


def _mix_words(words: Words) -> Words:
    words = words + _G
    words = (words ^ (words >> _S30)) * _M1
    words = (words ^ (words >> _S27)) * _M2
    return words ^ (words >> _S31)


@dataclass(frozen=True)
class _Permutation:
    """A keyed bijection of range(size). ``key`` is one word, or one per value; both directions cost O(1) memory."""

    size: int
    key: Words

    @cached_property
    def _sides(self) -> tuple[int, int]:
        left = isqrt(self.size - 1) + 1
        return left, -(-self.size // left)

    def _round(self, i: int, words: Words, side: Words, key: Words) -> Words:
        z = words + key
        z += _ROUND_KEYS[i]
        z ^= z >> _S30
        z *= _M1
        z ^= z >> _S27
        z *= _M2
        z >>= _S32
        z *= side
        z >>= _S32
        return z

    def _once(self, values: Words, key: Words, inverse: bool) -> Words:
        a, b = map(_u64, self._sides)
        high = values // a
        low = values - high * a
        for i in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
            target, other, side = (low, high, a) if i % 2 == 0 else (high, low, b)
            z = self._round(i, other, side, key)
            # Both are below `side`; where the sum or difference leaves the range, unsigned wrap-around makes it huge,
            # and the smaller of the two candidates is the residue.
            if inverse:
                target -= z
                np.minimum(target, target + side, out=target)
            else:
                target += z
                np.minimum(target, target - side, out=target)
        high *= a
        high += low
        return high

    def one(self, value: int, inverse: bool = False) -> int:
        """``apply`` for one value and one key: plain integers are faster than arrays of one."""
        (a, b), key = self._sides, int(self.key[0])
        while self.size > 1:
            high, low = divmod(value, a)
            for i in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
                z = ((high if i % 2 == 0 else low) + key + _GAMMA * (i + 1)) & _MASK
                z = ((z ^ (z >> 30)) * _MIX1) & _MASK
                z = (((z ^ (z >> 27)) * _MIX2) & _MASK) >> 32
                if i % 2 == 0:
                    z = z * a >> 32
                    low = (low - z if inverse else low + z) % a
                else:
                    z = z * b >> 32
                    high = (high - z if inverse else high + z) % b
            value = high * a + low
            if value < self.size:
                break
        return value

    def apply(self, values: Words, inverse: bool = False) -> Words:
        """The images (or with ``inverse`` the originals) of ``values``, all below ``size``."""
        if self.size < 2 or not len(values):
            return values.copy()
        out = self._once(values, self.key, inverse)
        outside = np.flatnonzero(out >= self.size)
        while len(outside):
            key = self.key if len(self.key) == 1 else self.key[outside]
            out[outside] = self._once(out[outside], key, inverse)
            outside = outside[out[outside] >= self.size]
        return out


@dataclass(frozen=True)
class Order:
    """The order of ``rows`` rows in one epoch; O(1) memory, exact for up to 2^62 rows.

    ``"window"``: blocks of ``block_rows`` consecutive rows are permuted, each ``window_blocks`` permuted blocks form a
    window, and rows are permuted within their window: few files are open at a time. The last block may be shorter,
    wherever it lands. ``"global"``: one permutation of all rows. ``False``: as stored. ``True`` means ``"window"``.
    """

    rows: int
    seed: int = 0
    epoch: int = 0
    shuffle: Shuffle | Literal[True] = "window"
    block_rows: int = 4096
    window_blocks: int = 8

    def __post_init__(self) -> None:
        if self.shuffle is True:
            object.__setattr__(self, "shuffle", "window")
        if self.shuffle not in ("window", "global", False):
            raise BadRequest(f"shuffle={self.shuffle!r} is not an order", hint='use True, "window", "global" or False')
        if not 0 <= self.rows <= ROWS_MAX:
            raise BadRequest(f"an order of {self.rows} rows is not possible", hint="0 to 2^62 rows")
        if self.block_rows < 1 or self.window_blocks < 1 or self.epoch < 0:
            raise BadRequest("block_rows and window_blocks are at least 1, epoch at least 0")

    def _key(self, level: int) -> int:
        return _mix(_mix(_mix(self.seed & _MASK) ^ self.epoch) ^ level)

    @cached_property
    def _window_key(self) -> int:
        return self._key(_WINDOWS)

    @cached_property
    def _whole(self) -> _Permutation:
        return _Permutation(self.rows, _u64(self._key(_WHOLE)))

    @cached_property
    def _blocks(self) -> _Permutation:
        return _Permutation(-(-self.rows // self.block_rows), _u64(self._key(_BLOCKS)))

    @cached_property
    def _short(self) -> tuple[int, int]:
        """Slot where the last block lands, and how many rows it lacks."""
        slot = self._blocks.one(self._blocks.size - 1, inverse=True)
        return slot, self._blocks.size * self.block_rows - self.rows

    def _slot_start(self, slot: int) -> int:
        short, lack = self._short
        return slot * self.block_rows - (lack if slot > short else 0)

    def _slot_of(self, positions: Words) -> tuple[Words, Words]:
        """Slot and offset within it, of each position."""
        short, lack = self._short
        shifted = positions
        if lack:
            shifted = positions + (positions >= (short + 1) * self.block_rows - lack) * np.uint64(lack)
        slots = shifted // np.uint64(self.block_rows)
        return slots, shifted - slots * np.uint64(self.block_rows)

    def _window(self, window: int) -> tuple[int, _Permutation]:
        """First position of a window, and the permutation within it."""
        start, stop = self._window_bounds(window)
        return start, _Permutation(stop - start, _u64(_mix((self._window_key + window * _GAMMA) & _MASK)))

    def _place(self, position: int) -> tuple[int, int]:
        """``_slot_of`` for one position."""
        short, lack = self._short
        return divmod(position + (lack if position >= (short + 1) * self.block_rows - lack else 0), self.block_rows)

    def _row(self, position: int) -> int:
        if self.shuffle == "global":
            return self._whole.one(position)
        start, inside = self._window(self._place(position)[0] // self.window_blocks)
        slot, offset = self._place(start + inside.one(position - start))
        return self._blocks.one(slot) * self.block_rows + offset

    def _position(self, row: int) -> int:
        if self.shuffle == "global":
            return self._whole.one(row, inverse=True)
        block, offset = divmod(row, self.block_rows)
        slot = self._blocks.one(block, inverse=True)
        start, inside = self._window(slot // self.window_blocks)
        return start + inside.one(self._slot_start(slot) + offset - start, inverse=True)

    def _within_windows(self, positions: Words, windows: Words, inverse: bool) -> Words:
        """Permute ``positions`` within their ``windows``."""
        low, high = int(windows.min()), int(windows.max())
        if low == high:
            start, permutation = self._window(low)
            return permutation.apply(positions - np.uint64(start), inverse) + np.uint64(start)
        short, lack = self._short
        block, slots = np.uint64(self.block_rows), np.uint64(self._blocks.size)
        first = windows * np.uint64(self.window_blocks)
        after = np.minimum(first + np.uint64(self.window_blocks), slots)
        starts = first * block - (first > short) * np.uint64(lack)
        sizes = after * block - (after > short) * np.uint64(lack) - starts
        keys = _mix_words(_u64(self._window_key) + windows * _G)
        inside, out = positions - starts, np.empty_like(positions)
        # Windows come in at most four sizes: full, last, and either of them with the short block.
        for size in np.unique(sizes):
            chosen = sizes == size
            out[chosen] = _Permutation(int(size), keys[chosen]).apply(inside[chosen], inverse)
        return out + starts

    def _window_bounds(self, window: int) -> tuple[int, int]:
        first = window * self.window_blocks
        return self._slot_start(first), self._slot_start(min(first + self.window_blocks, self._blocks.size))

    def _checked(self, values: npt.ArrayLike, what: str) -> Words:
        array = np.asarray(values, dtype=np.int64)
        if array.size and (int(array.min()) < 0 or int(array.max()) >= self.rows):
            raise BadRequest(f"a {what} is outside 0..{self.rows - 1}")
        return array.astype(np.uint64).reshape(-1)

    def rows_at(self, positions: npt.ArrayLike) -> Ints:
        """The stored rows (int64, one per position) at epoch positions in any order; beyond the rows: BadRequest."""
        at = self._checked(positions, "position")
        if not at.size or self.shuffle is False:
            return at.astype(np.int64)
        if at.size <= _FEW:
            return np.array([self._row(position) for position in at.tolist()], dtype=np.int64)
        if self.shuffle == "global":
            return self._whole.apply(at).astype(np.int64)
        windows = self._slot_of(at)[0] // np.uint64(self.window_blocks)
        slots, offsets = self._slot_of(self._within_windows(at, windows, inverse=False))
        low, high = int(windows.min()) * self.window_blocks, (int(windows.max()) + 1) * self.window_blocks
        if high - low <= len(at):
            # Many positions share a slot: permute the slots once and look them up.
            table = self._blocks.apply(np.arange(low, min(high, self._blocks.size), dtype=np.uint64))
            blocks = table[(slots - np.uint64(low)).astype(np.int64)]
        else:
            blocks = self._blocks.apply(slots)
        return (blocks * np.uint64(self.block_rows) + offsets).astype(np.int64)

    def positions(self, start: int, stop: int) -> Ints:
        """The stored rows at epoch positions [start, stop), int64."""
        return self.rows_at(np.arange(start, stop, dtype=np.int64))

    def position_of(self, rows: npt.ArrayLike) -> Ints:
        """The epoch positions (int64) at which the given stored rows stand: the inverse of ``rows_at``."""
        values = self._checked(rows, "row")
        if not values.size or self.shuffle is False:
            return values.astype(np.int64)
        if values.size <= _FEW:
            return np.array([self._position(row) for row in values.tolist()], dtype=np.int64)
        if self.shuffle == "global":
            return self._whole.apply(values, inverse=True).astype(np.int64)
        short, lack = self._short
        blocks = values // np.uint64(self.block_rows)
        offsets = values - blocks * np.uint64(self.block_rows)
        slots = self._blocks.apply(blocks, inverse=True)
        inside = slots * np.uint64(self.block_rows) - (slots > short) * np.uint64(lack) + offsets
        return self._within_windows(inside, slots // np.uint64(self.window_blocks), inverse=True).astype(np.int64)

    def spans(self, position: int) -> Iterator[tuple[int, int, int]]:
        """What the epoch needs from ``position`` on: (until, first row, row after the last), ``until`` ascending.

        The rows of a span are needed below position ``until``, and not before the spans of smaller ``until`` end.
        """
        if self.shuffle == "global":
            if position < self.rows:
                yield self.rows, 0, self.rows
            return
        while position < self.rows:
            if self.shuffle is False:
                stop = min(position + self.block_rows, self.rows)
                yield stop, position, stop
            else:
                window = self._place(position)[0] // self.window_blocks
                stop = self._window_bounds(window)[1]
                first = window * self.window_blocks
                slots = np.arange(first, min(first + self.window_blocks, self._blocks.size), dtype=np.uint64)
                for block in self._blocks.apply(slots).tolist():
                    yield stop, block * self.block_rows, min((block + 1) * self.block_rows, self.rows)
            position = stop

    def steps(self, batch_size: int, world_size: int = 1, drop_last: bool = True, first: int = 0) -> int:
        """Steps of every rank from position ``first`` to the epoch's end."""
        if batch_size < 1 or world_size < 1:
            raise BadRequest("batch_size and world_size are at least 1")
        left, together = max(0, self.rows - first), batch_size * world_size
        return left // together if drop_last else -(-left // together)

    def batch_positions(
        self, steps: npt.ArrayLike, batch_size: int, rank: int = 0, world_size: int = 1, first: int = 0
    ) -> Ints:
        """Epoch positions of this rank at each of ``steps``: int64 [steps, batch_size].

        ``batch_size`` counts per rank. The global batch is batch_size * world_size consecutive positions and rank r
        takes its r-th part: the global batch depends on its size only. Steps count from position ``first``. Beyond the
        epoch's end positions wrap to its beginning: so ``drop_last=False`` gives all ranks the same full batches.
        """
        if not 0 <= rank < world_size:
            raise BadRequest(f"rank {rank} is not below world_size {world_size}")
        starts = first + np.asarray(steps, dtype=np.int64).reshape(-1, 1) * (batch_size * world_size)
        starts = starts + rank * batch_size
        found: Ints = (starts + np.arange(batch_size, dtype=np.int64)) % max(1, self.rows)
        return found

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1, drop_last: bool = True, first: int = 0
    ) -> Ints:
        """The stored rows (int64 [batch_size]) of ``rank`` at ``step``; a step beyond the last raises BadRequest."""
        total = self.steps(batch_size, world_size, drop_last, first)
        if not 0 <= step < total:
            raise BadRequest(f"step {step} is outside this epoch's {total} steps")
        return self.rows_at(self.batch_positions([step], batch_size, rank, world_size, first)[0])
