"""Content codings: gzip and zstd bodies undone piece by piece, within limits, so that no bomb is ever unpacked."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import zstandard

from headrace import settings
from headrace.errors import BadData, TooLarge, UnsupportedType

PIECE_BYTES = 1 << 20
BLOCK_BYTES = 256 << 10
_ZSTD_WINDOW = 1 << 27
# A zstd block of 4 bytes can stand for 128 KiB: a slice of 1 KiB yields at most 32 MiB before the limits are checked.
_ZSTD_SLICE = 1 << 10


class _Coding(Protocol):
    def step(self, data: bytes) -> tuple[bytes, bytes]: ...  # (output, input left)

    @property
    def whole(self) -> bool: ...


class _Identity:
    whole = True

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        return data, b""


class _Gzip:
    def __init__(self) -> None:
        self._member = zlib.decompressobj(31)

    @property
    def whole(self) -> bool:
        return self._member.eof

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        if self._member.eof:
            self._member = zlib.decompressobj(31)
        out = self._member.decompress(data, PIECE_BYTES)
        return out, self._member.unused_data if self._member.eof else self._member.unconsumed_tail


class _Zstd:
    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame = self._context.decompressobj()

    @property
    def whole(self) -> bool:
        return bool(self._frame.eof)

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        if self._frame.eof:
            self._frame = self._context.decompressobj()
        out = self._frame.decompress(data[:_ZSTD_SLICE])
        rest = data[_ZSTD_SLICE:]
        return out, self._frame.unused_data + rest if self._frame.eof else rest


_CODINGS: dict[str, type[_Identity] | type[_Gzip] | type[_Zstd]] = {
    "": _Identity,
    "identity": _Identity,
    "gzip": _Gzip,
    "x-gzip": _Gzip,
    "zstd": _Zstd,
}


class Decompressor:
    """Undoes one content coding piece by piece, within limits.

    ``feed`` and ``pieces`` raise BadData for damaged input or bytes after its end, and TooLarge beyond ``bytes_max``
    or, past the first MiB of output, beyond ``ratio_max`` times the input. ``finish`` raises BadData for a cut one.
    """

    def __init__(self, encoding: str, *, bytes_max: int | None = None, ratio_max: int | None = None) -> None:
        name = encoding.strip().lower()
        if name not in _CODINGS:
            raise UnsupportedType(
                f"content encoding {encoding[:80]!r} is not read here", hint="use gzip, zstd or identity"
            )
        self.encoding = name or "identity"
        self.bytes_in = self.bytes_out = 0
        self._bytes_max = settings.integer("upload_bytes_max") if bytes_max is None else bytes_max
        self._ratio_max = settings.integer("upload_ratio_max") if ratio_max is None else ratio_max
        self._coding: _Coding = _CODINGS[name]()

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """What ``chunk`` adds to the output, in bounded pieces."""
        self.bytes_in += len(chunk)
        data = bytes(chunk)
        while data:
            try:
                out, data = self._coding.step(data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise BadData(
                    f"the body is not valid {self.encoding}: {error}", hint="is it damaged, or encoded otherwise?"
                ) from None
            self._count(len(out))
            if out:
                yield out

    def feed(self, chunk: bytes) -> bytes:
        """What ``chunk`` adds to the output, at once."""
        return b"".join(self.pieces(chunk))

    def finish(self) -> bytes:
        """Assert that the input was whole; returns what was held back (nothing, for the codings known today)."""
        if not self._coding.whole:
            raise BadData(f"the {self.encoding} body ends too early", hint="was the upload cut off? send it again")
        return b""

    def _count(self, size: int) -> None:
        self.bytes_out += size
        if self.bytes_out > self._bytes_max:
            raise TooLarge(
                f"the body is larger than {self._bytes_max} bytes", hint="send it in parts, or raise upload_bytes_max"
            )
        if self.bytes_out > PIECE_BYTES and self.bytes_out > self.bytes_in * self._ratio_max:
            raise TooLarge(
                f"the body grows more than {self._ratio_max} times when decompressed",
                hint="raise upload_ratio_max if it is honest",
            )


def decompress(
    data: bytes | Iterable[bytes], encoding: str, *, bytes_max: int | None = None, ratio_max: int | None = None
) -> bytes:
    """A whole body or its chunks, decoded; errors as Decompressor."""
    coding = Decompressor(encoding, bytes_max=bytes_max, ratio_max=ratio_max)
    chunks = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    return b"".join([piece for chunk in chunks for piece in coding.pieces(bytes(chunk))]) + coding.finish()
