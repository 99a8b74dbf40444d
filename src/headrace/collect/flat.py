"""Columns out of many flat JSON records at once: exact, or not at all, and then the general way decides.

The parser is compiled, and its library weighs more than an idle server may: it is loaded beside the work, the first
time that there is enough text, and until it is there nothing is parsed here.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.collect.kinds import BOOL, FLOAT, INT, TEXT, original_name
from headrace.lazy import load

_ENOUGH_BYTES = 256 << 10
_TEXT_BYTES_MOST = 1 << 30
_UNDECIDED_MOST = 4096


class _Loader:
    """Loads the kernel once, in a thread of its own."""

    def __init__(self) -> None:
        self.kernel: Any = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> threading.Thread:
        with self._lock:
            if self._thread is None:
                # Not a daemon: an interpreter that ends in the midst of compiling would abort.
                self._thread = threading.Thread(target=self._load, name="headrace-kernel")
                self._thread.start()
            return self._thread

    def _load(self) -> None:
        kernel = load("headrace.collect.flat_kernel")
        schema = pa.schema([("b", BOOL), ("i", INT), ("f", FLOAT), ("t", TEXT), ("u", TEXT)])
        # A first call compiles it, or takes what an earlier process compiled from the disk.
        _parsed(kernel, b'{"b":true,"i":1,"f":0.5,"t":"\\n","u":"u"}\n', 1, schema)
        self.kernel = kernel


_loader = _Loader()


def parse(text: bytes, rows: int, schema: pa.Schema) -> pa.RecordBatch | None:
    """The columns of ``schema`` from ``text``, valid UTF-8 that holds ``rows`` lines; None where that is not sure.

    Sure are flat records without unknown or repeated keys whose every value is null or what its column holds: true or
    false, an integer of up to 18 digits, a number, a string without surrogates or NUL in escapes.
    """
    if not _ENOUGH_BYTES <= len(text) <= _TEXT_BYTES_MOST or not text.endswith(b"\n"):
        return None
    if not len(schema) or any(field.type not in _READERS for field in schema):
        return None
    if _loader.kernel is None:
        _loader.start()
        return None
    return _parsed(_loader.kernel, text, rows, schema)


def parse_now(text: bytes, rows: int, schema: pa.Schema) -> pa.RecordBatch | None:
    """``parse`` of a text of any size, once the parser is loaded."""
    _loader.start().join()
    return _parsed(_loader.kernel, text, rows, schema)


def _parsed(kernel: Any, text: bytes, rows: int, schema: pa.Schema) -> pa.RecordBatch | None:
    names = [original_name(field).encode() for field in schema]
    bytes_ = np.frombuffer(text, np.uint8)
    is_text = np.array([field.type == TEXT for field in schema])
    escaped = np.zeros(len(names), np.bool_)
    starts, stops = np.zeros((2, len(names), rows), np.int32)
    keys = np.frombuffer(b"".join(names) + b"\0", np.uint8)
    key_ends = np.cumsum([0, *map(len, names)])
    if not kernel.locate(bytes_, rows, keys, key_ends, is_text, escaped, starts, stops):
        return None
    made: list[pa.Array] = []
    for place, field in enumerate(schema):
        buffers = _READERS[field.type](kernel, bytes_, starts[place], stops[place], bool(escaped[place]))
        if buffers is None:
            return None
        made.append(pa.Array.from_buffers(field.type, rows, [_validity(starts[place]), *map(pa.py_buffer, buffers)]))
    return pa.RecordBatch.from_arrays(made, schema=schema)


def _validity(starts: Any) -> pa.Buffer | None:
    valid = starts > 0
    return None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))


def _booleans(kernel: Any, text: Any, starts: Any, stops: Any, _: bool) -> list[Any] | None:
    out = np.empty(len(starts), np.uint8)
    return [np.packbits(out, bitorder="little")] if kernel.booleans(text, starts, stops, out) else None


def _integers(kernel: Any, text: Any, starts: Any, stops: Any, _: bool) -> list[Any] | None:
    out = np.empty(len(starts), np.int64)
    return [out] if kernel.integers(text, starts, stops, out) else None


def _floats(kernel: Any, text: Any, starts: Any, stops: Any, _: bool) -> list[Any] | None:
    out, undecided = np.empty(len(starts)), np.empty(_UNDECIDED_MOST, np.int64)
    count = kernel.floats(text, starts, stops, out, out.view(np.uint64), undecided)
    if count < 0:
        return None
    for row in undecided[:count].tolist():
        out[row] = float(bytes(text[starts[row] : stops[row]]))
    return [out] if np.isfinite(out).all() else None


def _texts(kernel: Any, text: Any, starts: Any, stops: Any, escaped: bool) -> list[Any] | None:
    ends = np.zeros(len(starts) + 1, np.int32)
    out = np.empty(int((stops - np.maximum(starts, 0)).sum(where=starts > 0)), np.uint8)
    if not escaped:
        kernel.texts(text, starts, stops, ends, out)
    elif not kernel.escaped_texts(text, starts, stops, ends, out):
        return None
    return [ends, out[: ends[-1]]]


_READERS = {BOOL: _booleans, INT: _integers, FLOAT: _floats, TEXT: _texts}
