"""``GET`` and ``HEAD /v1/files/{id}``: the bytes of published files, to whoever holds a signed URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import BadRequest, Forbidden, NotFound
from headrace.server.wire import Request, Workers, error_answer

if TYPE_CHECKING:
    from headrace.exchange import Exchange

_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")
_KIND = b"application/vnd.apache.parquet"


class Files:
    """Whole files by pathsend, ranges in pieces of 1 MiB."""

    def __init__(self, exchange: Exchange, workers: Workers) -> None:
        self._exchange = exchange
        self._workers = workers

    async def __call__(self, request: Request, file_id: str) -> None:
        """Answer the file, a part of it, or its headers; the signature stands for a token."""
        query = request.query()
        expires = query.get("exp", "")
        if not (expires.isascii() and expires.isdigit() and len(expires) < 20) or not query.get("sig"):
            raise Forbidden("this file needs a signed URL", hint="POST /v1/files:sign gives one")
        path = await self._workers.run(
            self._exchange.file_path, file_id, int(expires), query.get("by", ""), query["sig"]
        )
        try:
            size = (await self._workers.run(path.stat)).st_size
        except FileNotFoundError:
            raise NotFound(f"file {file_id} is no longer stored", hint="fetch the manifest again") from None
        headers = [
            (b"content-type", _KIND),
            (b"accept-ranges", b"bytes"),
            (b"etag", f'"{file_id}"'.encode("latin-1", "replace")),
            (b"cache-control", b"private, immutable, max-age=31536000"),
        ]
        try:
            bounds = _bounds(request.header(b"range"), size)
        except BadRequest as error:
            _, body, _ = error_answer(error, request.id)
            await request.answer(416, body, headers=[(b"content-range", f"bytes */{size}".encode())])
            return
        if bounds is None:
            await self._whole(request, path, size, headers)
        else:
            await self._part(request, path, size, bounds, headers)

    async def _whole(self, request: Request, path: Path, size: int, headers: list[tuple[bytes, bytes]]) -> None:
        await request.start(200, [*headers, (b"content-length", str(size).encode())])
        if request.method == "HEAD":
            await request.send({"type": "http.response.body", "body": b""})
        elif "http.response.pathsend" in request.scope.get("extensions", {}):
            await request.send({"type": "http.response.pathsend", "path": str(path)})
        else:
            await self._pieces(request, path, 0, size)

    async def _part(
        self, request: Request, path: Path, size: int, bounds: tuple[int, int], headers: list[tuple[bytes, bytes]]
    ) -> None:
        first, last = bounds
        spoken = f"bytes {first}-{last}/{size}".encode()
        length = str(last - first + 1).encode()
        await request.start(206, [*headers, (b"content-range", spoken), (b"content-length", length)])
        if request.method == "HEAD":
            await request.send({"type": "http.response.body", "body": b""})
        else:
            await self._pieces(request, path, first, last + 1)

    async def _pieces(self, request: Request, path: Path, start: int, end: int) -> None:
        async for piece in self._workers.each(_read(path, start, end)):
            await request.send({"type": "http.response.body", "body": piece, "more_body": True})
        await request.send({"type": "http.response.body", "body": b""})


def _bounds(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a single range; None for no range, or one of a kind that is answered in full."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if first == "":
        start, stop = max(0, size - int(last)), size - 1
    else:
        start, stop = int(first), min(int(last or size), size - 1)
    if first and last and int(last) < int(first):
        return None
    if start >= size or start > stop:
        raise BadRequest(f"the file has only {size} bytes", hint="ask for a range within it")
    return start, stop


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while start < end:
            piece = os.pread(file.fileno(), min(_CHUNK, end - start), start)
            if not piece:
                return
            start += len(piece)
            yield piece


def read_pieces(path: Path, remove: bool) -> Iterator[bytes]:
    """The whole file in pieces; with ``remove`` it is gone from its folder as soon as the first is asked for."""
    with path.open("rb", buffering=0) as file:
        if remove:
            path.unlink()
        while piece := file.read(_CHUNK):
            yield piece
