"""Column masks: what a value becomes, of which type, and which of two masks hides more.

``null`` · ``constant:TEXT`` · ``hash`` (keyed, 128 bits in hex: equal values stay equal within a dataset; with
``hash:NAME`` in all datasets masked with this name) · ``last:N`` (the last N
characters of values at least twice as long) · ``month`` · ``bucket:WIDTH`` (the lower edge) · ``redact[:KIND,KIND]``

``null``, ``month`` and ``bucket`` keep numbers and times what they are, the others make text.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace import privacy
from headrace.errors import BadRequest
from headrace.rows import to_json

FORMS = "null, constant:TEXT, hash or hash:NAME, last:N, month, bucket:WIDTH, redact or redact:KIND,KIND"
_STARS = "****"
_LAST_MOST = 64
_CONSTANT_MOST = 200
_HASH_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Mask:
    """One way to hide the values of a column."""

    kind: str
    argument: str = ""

    @classmethod
    def parse(cls, text: str) -> Mask:
        """The mask written as ``text``; BadRequest says which forms there are."""
        kind, colon, argument = text.partition(":")
        good = {
            "null": not colon,
            "hash": not colon or _HASH_NAME.fullmatch(argument) is not None,
            "month": not colon,
            "constant": bool(colon) and len(argument) <= _CONSTANT_MOST,
            "last": argument.isascii() and argument.isdigit() and 1 <= int(argument[:9]) <= _LAST_MOST,
            "bucket": bool(colon) and _width(argument) > 0,
            "redact": True,
        }.get(kind, False)
        if not good:
            raise BadRequest(f"{text[:80]!r} is not a mask", hint=f"write {FORMS}")
        if kind == "redact":
            named = argument.split(",") if argument else privacy.KINDS
            privacy.redact(pa.array([], pa.string()), [one.strip() for one in named])
            argument = ",".join(kind for kind in privacy.KINDS if kind in {one.strip() for one in named})
        if kind == "last":
            argument = str(int(argument))
        return cls(kind, f"{_width(argument):.17g}" if kind == "bucket" else argument)

    @property
    def text(self) -> str:
        """The mask as it is written."""
        return f"{self.kind}:{self.argument}" if self.argument or self.kind == "constant" else self.kind

    def __and__(self, other: Mask) -> Mask:
        """What shows no more than either; two kinds of which neither covers the other give null."""
        if self == other:
            return self
        for strong in ("null", "constant"):
            if {self.kind, other.kind} >= {strong} and self.kind != other.kind:
                return self if self.kind == strong else other
        if self.kind == other.kind == "last":
            return min(self, other, key=lambda mask: int(mask.argument))
        if self.kind == other.kind == "redact":
            both = {*self.argument.split(","), *other.argument.split(",")}
            return Mask("redact", ",".join(kind for kind in privacy.KINDS if kind in both))
        if self.kind == other.kind == "bucket":
            narrow, wide = sorted((self, other), key=lambda mask: float(mask.argument))
            if float(wide.argument) % float(narrow.argument) == 0:
                return wide
        return Mask("null")

    def type_of(self, kind: pa.DataType) -> pa.DataType:
        """The type of a masked column that was of ``kind``."""
        if self.kind in ("constant", "hash", "last"):
            return pa.string()
        if self.kind == "redact":
            return kind if pa.types.is_nested(kind) else pa.string()
        if self.kind == "bucket" and _numeric(kind):
            whole = pa.types.is_integer(kind) and float(self.argument).is_integer()
            return pa.int64() if whole and float(self.argument) < 2**62 else pa.float64()
        return kind

    def apply(self, array: pa.Array, key: bytes) -> pa.Array:
        """The masked column, of ``type_of(array.type)``; null where it cannot be computed."""
        kind = self.type_of(array.type)
        try:
            made = _MAKERS[self.kind](array, self.argument, key)
            return _bare(made) if made.type == kind else pa.nulls(len(array), kind)
        except (pa.ArrowException, ArithmeticError, TypeError, ValueError):
            if len(array) <= 1:
                return pa.nulls(len(array), kind)
        # One value that cannot be computed must not change what is shown of the others.
        half = len(array) // 2
        return pa.concat_arrays([self.apply(array.slice(0, half), key), self.apply(array.slice(half), key)])


def _bare(array: pa.Array) -> pa.Array:
    """The same values, with nothing left in memory below its nulls: an Arrow stream carries what lies there, too."""
    if not array.null_count:
        return array
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    places = pa.array(np.cumsum(valid) - 1, pa.int64(), mask=~valid)
    return array.drop_null().take(places)


def _width(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        return 0.0
    return width if math.isfinite(width) and width < 1e300 else 0.0


def _numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def pseudonyms(array: pa.Array, key: bytes, domain: bytes) -> pa.Array:
    """A keyed hash of each text: equal within a ``domain``, telling nothing without the key. Nulls stay."""
    encoded = array.dictionary_encode()
    made = [
        hmac.digest(key, domain + b"\0" + text.encode("utf-8", "surrogatepass"), "sha256")[:16].hex()
        for text in encoded.dictionary.to_pylist()
    ]
    return pa.array(made, pa.string()).take(encoded.indices)


def texts(array: pa.Array) -> pa.Array:
    """Any column as text, equal values equally."""
    kind = array.type
    if pa.types.is_string(kind):
        return array
    if pa.types.is_nested(kind) or pa.types.is_binary(kind):
        return pa.array(
            [None if value is None else to_json(value).decode() for value in array.to_pylist()], pa.string()
        )
    if pa.types.is_floating(kind):
        # As whole numbers where they are: 13800138000.0 is a telephone number that was read as a fraction.
        values = (None if value is None else value for value in array.to_pylist())
        plain = [None if v is None else f"{v:.0f}" if math.isfinite(v) and v == int(v) else repr(v) for v in values]
        return pa.array(plain, pa.string())
    return array.cast(pa.string())


def _nulls(array: pa.Array, _: str, __: bytes) -> pa.Array:
    return pa.nulls(len(array), array.type)


def _constant(array: pa.Array, value: str, _: bytes) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.string()), len(array))


def _hash(array: pa.Array, _: str, key: bytes) -> pa.Array:
    return pseudonyms(texts(array), key, b"value")


def _last(array: pa.Array, count: str, _: bytes) -> pa.Array:
    written = texts(array)
    tail = pc.binary_join_element_wise(_STARS, pc.utf8_slice_codeunits(written, -int(count)), "")
    # Of a short value the last characters are nearly all.
    long = pc.greater_equal(pc.utf8_length(written), 2 * int(count))
    return pc.if_else(long, tail, pc.if_else(pc.is_valid(written), _STARS, pa.scalar(None, pa.string())))


def _month(array: pa.Array, _: str, __: bytes) -> pa.Array:
    kind = array.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return pc.floor_temporal(array, unit="month").cast(kind)
    if pa.types.is_string(kind):
        dated = pc.match_substring_regex(array, r"^[0-9]{4}-(?:0[1-9]|1[0-2])(?:[^0-9]|$)")
        return pc.if_else(dated, pc.utf8_slice_codeunits(array, 0, 7), pa.scalar(None, pa.string()))
    return pa.nulls(len(array), kind)


def _bucket(array: pa.Array, argument: str, _: bytes) -> pa.Array:
    kind, width = array.type, float(argument)
    if not _numeric(kind):
        return pa.nulls(len(array), kind)
    missing = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_integer(kind) and width.is_integer() and width < 2**62:
        whole = pc.fill_null(array.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
        # A bucket that begins below the least number has no lower edge to name.
        missing = missing | (whole < np.iinfo(np.int64).min + int(width))
        return pa.array(np.where(missing, 0, whole) // int(width) * int(width), pa.int64(), mask=missing)
    values = pc.fill_null(array.cast(pa.float64(), safe=False), 0.0).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):
        edges = np.floor(values / width) * width
    return pa.array(edges, pa.float64(), mask=missing | ~np.isfinite(edges))


def _redact(array: pa.Array, kinds: str, _: bytes) -> pa.Array:
    if not pa.types.is_nested(array.type):
        return privacy.redact(texts(array), kinds.split(","))
    return _redacted_within(array, kinds.split(","))


def _redacted_within(array: pa.Array, kinds: list[str]) -> pa.Array:
    """Lists and structs with their texts redacted; what is not text within them might be a number that tells: null."""
    kind = array.type
    missing = array.is_null() if array.null_count else None
    if pa.types.is_string(kind):
        return privacy.redact(array, kinds)
    if pa.types.is_struct(kind):
        parts = [_redacted_within(part, kinds) for part in array.flatten()]
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=missing)
    if pa.types.is_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return pa.ListArray.from_arrays(offsets, _redacted_within(array.flatten(), kinds), type=kind, mask=missing)
    return pa.nulls(len(array), kind)


_MAKERS: dict[str, Callable[[pa.Array, str, bytes], pa.Array]] = {
    "null": _nulls,
    "constant": _constant,
    "hash": _hash,
    "last": _last,
    "month": _month,
    "bucket": _bucket,
    "redact": _redact,
}
