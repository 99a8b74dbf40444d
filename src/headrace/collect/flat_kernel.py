"""The compiled part of ``flat``: where the values of flat JSON records are, and what they are, column by column.

``locate`` finds the place of every value; one small loop per kind then reads a column. All places are int32 into
``text`` (uint8), a value's start is NULL for null and 0 where the record has none. Imported only where it is used.

Floats: exact small cases after Clinger, "How to read floating point numbers accurately" (1990); else Lemire, "Number
parsing at a gigabyte per second" (2021), with the powers of five cut to 128 bits. What neither decides is left open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])
NOT_MINE = -1
NULL = -1
_LEAST, _MOST = -342, 308
_SMALL_POWERS = 10.0 ** np.arange(23)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ONE, _TEN = np.uint64(1), np.uint64(10)
_EXACT = np.uint64(1 << 53)
_HIDDEN = np.uint64(1 << 52)
_MASK9 = np.uint64(0x1FF)
_SIGNIFICANT_MOST = 19


def _compiled(function: _Function) -> _Function:
    return cast(_Function, njit(nogil=True, cache=True)(function))


def _powers() -> tuple[Any, Any]:
    """The upper and lower 64 bits of 5**q, normalised to 128 bits, for every q that a double can need."""
    high, low = [], []
    for q in range(_LEAST, _MOST + 1):
        five = 5 ** abs(q)
        if q < 0:
            bits = (five - 1).bit_length()
            cut = (1 << (bits + 127 if q >= -27 else 2 * bits + 128)) // five + 1
            cut >>= max(0, cut.bit_length() - 128)
        else:
            shift = 128 - five.bit_length()
            cut = five << shift if shift >= 0 else five >> -shift
        high.append(cut >> 64)
        low.append(cut & (2**64 - 1))
    return np.array(high, np.uint64), np.array(low, np.uint64)


_HIGH, _LOWER = _powers()


@_compiled
def _product(a: Any, b: Any) -> Any:
    """The upper and lower half of a 128-bit product."""
    a1, a0, b1, b0 = a >> _HALF, a & _LOW, b >> _HALF, b & _LOW
    low, left, right = a0 * b0, a1 * b0, a0 * b1
    middle = (low >> _HALF) + (left & _LOW) + (right & _LOW)
    return a1 * b1 + (left >> _HALF) + (right >> _HALF) + (middle >> _HALF), a * b


@_compiled
def double_bits(mantissa: Any, exponent: Any) -> Any:
    """The bits of the double nearest to ``mantissa * 10**exponent`` (uint64, int64), and whether that is decided."""
    if mantissa == np.uint64(0):
        return np.uint64(0), True
    if exponent < _LEAST or exponent > _MOST:
        return np.uint64(0), False
    zeros = np.uint64(0)
    while (mantissa << zeros) >> np.uint64(63) == np.uint64(0):
        zeros += _ONE
    shifted = mantissa << zeros
    high, low = _product(shifted, _HIGH[exponent - _LEAST])
    if high & _MASK9 == _MASK9:
        more, _ = _product(shifted, _LOWER[exponent - _LEAST])
        low += more
        if low < more:
            high += _ONE
        if low == _ALL and (exponent < -27 or exponent > 55):
            return np.uint64(0), False
    upper = high >> np.uint64(63)
    cut = upper + np.uint64(9)
    found = high >> cut
    power = ((217706 * exponent) >> 16) + 63 + np.int64(upper) - np.int64(zeros) + 1023
    if power <= 0:
        return np.uint64(0), False
    if low <= _ONE and -4 <= exponent <= 23 and found & np.uint64(3) == _ONE and found << cut == high:
        found &= ~_ONE
    found += found & _ONE
    found >>= _ONE
    if found >= _HIDDEN << _ONE:
        found = _HIDDEN
        power += 1
    if power >= 0x7FF:
        return np.uint64(0), False
    return (found & ~_HIDDEN) | (np.uint64(power) << np.uint64(52)), True


@_compiled
def _number(text: Any, at: Any) -> Any:
    """A JSON number at ``at``: its end (or NOT_MINE), sign, up to 19 significant digits, all of them, power, whole?"""
    negative = text[at] == 45
    if negative:
        at += 1
    mantissa, digits, exponent, whole = np.uint64(0), 0, 0, True
    if text[at] == 48:
        at += 1
    elif 49 <= text[at] <= 57:
        while 48 <= text[at] <= 57:
            digits += 1
            if digits <= _SIGNIFICANT_MOST:
                mantissa = mantissa * _TEN + np.uint64(text[at] - 48)
            at += 1
    else:
        return NOT_MINE, negative, mantissa, digits, exponent, whole
    if text[at] == 46:
        whole = False
        at += 1
        if not 48 <= text[at] <= 57:
            return NOT_MINE, negative, mantissa, digits, exponent, whole
        while 48 <= text[at] <= 57:
            if digits or text[at] != 48:
                digits += 1
            if digits <= _SIGNIFICANT_MOST:
                mantissa = mantissa * _TEN + np.uint64(text[at] - 48)
            exponent -= 1
            at += 1
    if text[at] == 101 or text[at] == 69:
        whole = False
        at += 1
        down = text[at] == 45
        if down or text[at] == 43:
            at += 1
        if not 48 <= text[at] <= 57:
            return NOT_MINE, negative, mantissa, digits, exponent, whole
        power: Any = 0
        while 48 <= text[at] <= 57:
            power = min(power * 10 + np.int64(text[at] - 48), 99999)
            at += 1
        exponent += -power if down else power
    return at, negative, mantissa, digits, exponent, whole


@_compiled
def _hex(text: Any, at: Any) -> Any:
    """The value of four hexadecimal digits, or NOT_MINE."""
    value: Any = 0
    for place in range(at, at + 4):
        c: Any = np.int64(text[place])
        if 48 <= c <= 57:
            c -= 48
        elif 97 <= c <= 102:
            c -= 87
        elif 65 <= c <= 70:
            c -= 55
        else:
            return NOT_MINE
        value = value * 16 + c
    return value


@_compiled
def _escape(text: Any, at: Any, out: Any, to: Any) -> Any:
    """One escape at ``at``, behind its backslash, as UTF-8 into ``out``: where both go on; NOT_MINE if unsure."""
    c = text[at]
    if c != 117:
        if c == 110:
            c = np.uint8(10)
        elif c == 116:
            c = np.uint8(9)
        elif c == 114:
            c = np.uint8(13)
        elif c == 98:
            c = np.uint8(8)
        elif c == 102:
            c = np.uint8(12)
        elif c != 34 and c != 92 and c != 47:
            return NOT_MINE, to
        out[to] = c
        return at + 1, to + 1
    code = _hex(text, at + 1)
    if code <= 0 or 0xD800 <= code < 0xE000:
        return NOT_MINE, to
    if code < 0x80:
        out[to] = code
        return at + 5, to + 1
    if code < 0x800:
        out[to] = 0xC0 | code >> 6
    else:
        out[to] = 0xE0 | code >> 12
        out[to + 1] = 0x80 | code >> 6 & 0x3F
        to += 1
    out[to + 1] = 0x80 | code & 0x3F
    return at + 5, to + 2


@_compiled
def _blank(text: Any, at: Any) -> Any:
    while text[at] == 32 or text[at] == 9 or text[at] == 13:
        at += 1
    return at


@_compiled
def _is_key(text: Any, at: Any, keys: Any, first: Any, last: Any) -> bool:
    for place in range(first, last):
        if text[at] != keys[place]:
            return False
        at += 1
    return bool(text[at] == 34)


@_compiled
def _column(text: Any, at: Any, keys: Any, key_ends: Any, order: Any, turn: Any) -> Any:
    """The column whose key begins at ``at``, first guessed from the records before; NOT_MINE if there is none."""
    columns = len(order)
    if turn < columns:
        guess = order[turn]
        if _is_key(text, at, keys, key_ends[guess], key_ends[guess + 1]):
            return guess
    for column in range(columns):
        if _is_key(text, at, keys, key_ends[column], key_ends[column + 1]):
            if turn < columns:
                order[turn] = column
            return column
    return NOT_MINE


@_compiled
def locate(text: Any, rows: int, keys: Any, key_ends: Any, is_text: Any, escaped: Any, starts: Any, stops: Any) -> bool:
    """Find every value of ``rows`` lines; False if one line is not surely a flat object of known keys, each once.

    ``keys`` (uint8, cut at ``key_ends``) are the columns' names, ``is_text`` says which hold strings; ``starts`` and
    ``stops`` [columns, rows] take the places, a string's without its quotes; ``escaped`` which columns hold escapes.
    """
    order = np.arange(len(is_text))
    at = 0
    for row in range(rows):
        if text[at] != 123:
            return False
        at = _blank(text, at + 1)
        turn = 0
        while text[at] != 125 or turn:
            if text[at] != 34:
                return False
            column = _column(text, at + 1, keys, key_ends, order, turn)
            if column < 0 or starts[column, row] != 0:
                return False
            at = _blank(text, at + 2 + key_ends[column + 1] - key_ends[column])
            if text[at] != 58:
                return False
            at = _blank(text, at + 1)
            start = at
            if text[at] == 110:
                if text[at + 1] != 117 or text[at + 2] != 108 or text[at + 3] != 108:
                    return False
                at += 4
                start = NULL
            elif text[at] == 34:
                if not is_text[column]:
                    return False
                at += 1
                start = at
                while text[at] != 34:
                    if text[at] < 32:
                        return False
                    if text[at] == 92:
                        escaped[column] = True
                        at += 1
                    at += 1
                stops[column, row] = at
                at += 1
            else:
                if is_text[column]:
                    return False
                while text[at] > 32 and text[at] != 44 and text[at] != 125:
                    at += 1
                stops[column, row] = at
            starts[column, row] = start
            at = _blank(text, at)
            turn += 1
            if text[at] == 44:
                at = _blank(text, at + 1)
            elif text[at] == 125:
                break
            else:
                return False
        if text[at + 1] != 10:
            return False
        at += 2
    return bool(at == len(text))


@_compiled
def booleans(text: Any, starts: Any, stops: Any, out: Any) -> bool:
    """Read true and false into ``out`` (uint8); False if something else is there."""
    for row in range(len(starts)):
        at, size = starts[row], stops[row] - starts[row]
        out[row] = 0
        if at <= 0:
            continue
        if size == 4 and text[at] == 116 and text[at + 1] == 114 and text[at + 2] == 117 and text[at + 3] == 101:
            out[row] = 1
        elif not (
            size == 5 and text[at] == 102 and text[at + 1] == 97 and text[at + 2] == 108 and text[at + 3] == 115
            and text[at + 4] == 101
        ):  # fmt: skip
            return False
    return True


@_compiled
def integers(text: Any, starts: Any, stops: Any, out: Any) -> bool:
    """Read integers of up to 18 digits into ``out`` (int64); False if something else is there."""
    for row in range(len(starts)):
        out[row] = 0
        if starts[row] <= 0:
            continue
        at = np.int64(starts[row])
        negative = text[at] == 45
        at += negative
        size = stops[row] - at
        if not 1 <= size <= 18 or (text[at] == 48 and (size > 1 or negative)):
            return False
        value: Any = 0
        for place in range(at, at + size):
            digit = np.int64(text[place]) - 48
            if not 0 <= digit <= 9:
                return False
            value = value * 10 + digit
        out[row] = -value if negative else value
    return True


@_compiled
def floats(text: Any, starts: Any, stops: Any, out: Any, bits: Any, undecided: Any) -> int:
    """Read numbers into ``out`` (float64; ``bits`` is the same memory as uint64). NOT_MINE if something else is there,
    or an integer that no double holds, else how many rows are listed in ``undecided``, to be read by other means.
    """
    count = 0
    for row in range(len(starts)):
        out[row] = 0.0
        if starts[row] <= 0:
            continue
        behind, negative, mantissa, digits, exponent, whole = _number(text, np.int64(starts[row]))
        if behind != stops[row]:
            return NOT_MINE
        if whole and (digits > 18 or mantissa > _EXACT or (negative and mantissa == np.uint64(0))):
            return NOT_MINE
        if mantissa <= _EXACT and -22 <= exponent <= 22 and digits <= _SIGNIFICANT_MOST:
            # Both numbers are doubles without error, so that one operation rounds once.
            size = np.float64(mantissa)
            size = size * _SMALL_POWERS[exponent] if exponent >= 0 else size / _SMALL_POWERS[-exponent]
            out[row] = -size if negative else size
            continue
        found, decided = double_bits(mantissa, exponent)
        if decided and digits <= _SIGNIFICANT_MOST:
            bits[row] = found | (np.uint64(negative) << np.uint64(63))
        elif count == len(undecided):
            return NOT_MINE
        else:
            undecided[count] = row
            count += 1
    return count


@_compiled
def texts(text: Any, starts: Any, stops: Any, ends: Any, out: Any) -> None:
    """Copy strings without escapes into ``out`` (uint8); ``ends`` int32 [rows + 1] takes where each ends."""
    to = 0
    for row in range(len(starts)):
        start = np.int64(starts[row])
        if start > 0:
            size = stops[row] - start
            for place in range(size):
                out[to + place] = text[start + place]
            to += size
        ends[row + 1] = to


@_compiled
def escaped_texts(text: Any, starts: Any, stops: Any, ends: Any, out: Any) -> bool:
    """As ``texts``, with escapes read; False if one is none, or a surrogate, or NUL."""
    to = 0
    for row in range(len(starts)):
        at = np.int64(starts[row])
        while 0 < at < stops[row]:
            c = text[at]
            at += 1
            if c != 92:
                out[to] = c
                to += 1
                continue
            at, to = _escape(text, at, out, to)
            if at < 0:
                return False
        ends[row + 1] = to
    return True
