"""The bare HTTP side: requests, answers, the error shape and streamed bodies as plain ASGI messages."""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar, cast
from urllib.parse import parse_qs

import orjson
import structlog
import zstandard

from headrace import model
from headrace.errors import BadRequest, HeadraceError, TooLarge, Unauthenticated

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGI = Callable[[Scope, Receive, Send], Awaitable[None]]

T = TypeVar("T")

JSON = b"application/json"
COMPRESS_FROM = 1 << 10
_CHUNK = 256 << 10
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

# Not the system's generator: each call would give the interpreter lock away. Request ids are no secrets.
_RANDOM = random.Random(secrets.randbits(128))  # noqa: S311

log = structlog.get_logger("headrace.server")


class ClientGone(Exception):
    """The other side hung up: there is nobody to answer."""


class Workers:
    """The bounded pool in which everything that blocks runs."""

    def __init__(self, threads: int = 16) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="headrace-call")

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Call ``work(*args)`` in a thread and await its result."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def each(self, items: Iterator[T]) -> AsyncIterator[T]:
        """Iterate a blocking iterator: the next item is made only when asked for."""
        end = object()
        lock = threading.Lock()

        def step() -> T | object:
            with lock:
                return next(items, end)

        def close() -> None:
            # Generators let go of files and snapshots here; a cancelled request may leave one at work for a moment.
            with lock:
                closing = getattr(items, "close", None)
                if closing is not None:
                    closing()

        try:
            while (item := await self.run(step)) is not end:
                yield cast(T, item)
        finally:
            await asyncio.shield(self.run(close))

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Request:
    """One HTTP request and the way to answer it. Header names are lower case."""

    __slots__ = ("_held", "headers", "id", "method", "path", "receive", "scope", "send", "started")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.id: str = given.decode() if given and _REQUEST_ID.fullmatch(given) else f"{_RANDOM.getrandbits(64):016x}"
        self.started = False
        self._held: tuple[bytes, bool] | None = None

    def header(self, name: bytes, default: str = "") -> str:
        """One header as text."""
        value = self.headers.get(name)
        return default if value is None else value.decode("latin-1")

    def hold(self, piece: bytes, more: bool) -> None:
        """Put back a piece of the body, for the next one who asks."""
        self._held = (piece, more)

    def held(self) -> tuple[bytes, bool] | None:
        """What was put back, once."""
        held, self._held = self._held, None
        return held

    def query(self) -> dict[str, str]:
        """Query parameters; of a repeated one the last. Raises BadRequest for text that is not UTF-8."""
        try:
            parsed = parse_qs(self.scope["query_string"].decode("latin-1"), keep_blank_values=True, errors="strict")
        except ValueError as error:
            raise BadRequest(f"the query cannot be read: {error}", hint="percent-encode it as UTF-8") from None
        return {name: values[-1] for name, values in parsed.items()}

    def marks(self) -> list[tuple[bytes, bytes]]:
        """The headers of every answer: its request's id, and that browsers must not take it for another type."""
        return [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send status and headers, the request's id among them."""
        self.started = True
        headers += self.marks()
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def answer(
        self, status: int, body: bytes, kind: bytes = JSON, headers: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        """Send a whole answer."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, [(b"content-type", kind), length, *(headers or [])])
        await self.send({"type": "http.response.body", "body": body})

    async def json(self, value: Any, status: int = 200) -> None:
        """Answer a value of the model, or plain JSON types."""
        await self.answer(status, orjson.dumps(model.to_dict(value)))

    async def fail(self, error: HeadraceError) -> None:
        """Answer an error in the one shape."""
        status, body, headers = error_answer(error, self.id)
        await self.answer(status, body, headers=headers)

    async def stream(self, chunks: AsyncIterator[bytes], kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer chunk by chunk, each made after the last was taken."""
        async with aclosing(_as_generator(chunks)) as body:
            first = await anext(body, b"")
            await self.start(200, [(b"content-type", kind), *headers])
            await self.send({"type": "http.response.body", "body": first, "more_body": True})
            async for chunk in body:
                await self.send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self.send({"type": "http.response.body", "body": b""})


async def _as_generator(chunks: AsyncIterator[bytes]) -> Any:
    async for chunk in chunks:
        yield chunk


def error_answer(error: HeadraceError, request_id: str) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """(status, body, headers) of an error."""
    headers: list[tuple[bytes, bytes]] = []
    if error.status in (429, 503):
        headers.append((b"retry-after", str(max(1, round(float(error.details.get("retry_after", 1))))).encode()))
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    return error.status, orjson.dumps(error.to_dict(request_id), default=str), headers


def unexpected(error: BaseException, request: Request) -> HeadraceError:
    """Log what nobody foresaw, and the error to answer, which tells no internals."""
    log.error("request failed", request_id=request.id, method=request.method, path=request.path, exc_info=error)
    return HeadraceError("something went wrong inside the exchange", hint="the log has it under this request_id")


class Watch:
    """Ends waits for a body that does not come. One look a second at all of them costs less than a timer for each."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._looking: asyncio.TimerHandle | None = None

    async def receive(self, request: Request, limit: float) -> MutableMapping[str, Any]:
        """The next message; BadRequest if none comes for ``limit`` seconds, give or take one."""
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        self._waiting[task] = loop.time() + limit
        if self._looking is None:
            self._looking = loop.call_later(1.0, self._look, loop)
        try:
            return await request.receive()
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            task.uncancel()
            raise BadRequest(f"no byte of the body came for {limit:g} seconds", hint="send it again") from None
        finally:
            del self._waiting[task]
            self._late.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for task, end in self._waiting.items():
            if end < now and task not in self._late:
                self._late.add(task)
                task.cancel()
        self._looking = loop.call_later(1.0, self._look, loop) if self._waiting else None


WATCH = Watch()


async def next_piece(request: Request, limit: float) -> tuple[bytes, bool]:
    """(bytes, whether more follow) of a body; ClientGone on a hang-up, BadRequest if nothing comes for ``limit`` s."""
    held = request.held()
    if held is not None:
        return held
    message = await WATCH.receive(request, limit)
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), bool(message.get("more_body"))


async def taken_whole(request: Request, most: int, limit: float) -> Receive:
    """A ``receive`` that gives the whole body, read here; TooLarge beyond ``most`` bytes, else raises as next_piece."""
    body, taken, more = b"", 0, True
    # What is somewhat too long is still taken, and let go: many clients read no answer before all is sent.
    while more and taken <= 16 * most:
        piece, more = await next_piece(request, limit)
        taken += len(piece)
        body = body + piece if taken <= most else b""
    if taken > most:
        raise TooLarge(f"the body is larger than {most} bytes", hint="only uploads may be large")
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await request.receive()

    return receive


def whole_number(query: dict[str, str], name: str, default: int | None, most: int) -> int | None:
    """A query parameter from 0 to ``most``; raises BadRequest."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise BadRequest(f"{name}={text[:40]!r} is not a whole number from 0 to {most}", hint=f"leave {name} away?")
    return int(text)


def accepted_coding(header: str) -> str:
    """zstd, gzip or identity, by an Accept-Encoding header."""
    offers: dict[str, float] = {}
    for part in header.lower().split(","):
        name, _, weight = part.partition(";")
        try:
            offers[name.strip()] = float(weight.partition("=")[2] or 1)
        except ValueError:
            offers[name.strip()] = 0
    best = max(("zstd", "gzip"), key=lambda name: offers.get(name, 0))
    return best if offers.get(best, 0) > 0 else "identity"


def gathered(chunks: Iterator[bytes], size: int = _CHUNK) -> Iterator[bytes]:
    """The same bytes in chunks of about ``size``."""
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        parts.append(chunk)
        held += len(chunk)
        if held >= size:
            yield b"".join(parts)
            parts, held = [], 0
    if parts:
        yield b"".join(parts)


def compressed(chunks: Iterator[bytes], coding: str) -> Iterator[bytes]:
    """The chunks under gzip or zstd."""
    packer = zlib.compressobj(1, wbits=31) if coding == "gzip" else zstandard.ZstdCompressor(level=1).compressobj()
    for chunk in chunks:
        packed = packer.compress(chunk)
        if packed:
            yield packed
    yield packer.flush()


async def send_text(request: Request, workers: Workers, chunks: Iterator[bytes], kind: bytes, etag: str = "") -> None:
    """Stream a text body, compressed as the client accepts if it is not tiny; 304 if the client has it already."""
    headers: list[tuple[bytes, bytes]] = [(b"vary", b"accept, accept-encoding")]
    if etag:
        tag = f'W/"{etag}"'
        headers.append((b"etag", tag.encode()))
        known = {part.strip().removeprefix("W/") for part in request.header(b"if-none-match").split(",")}
        if known & {"*", f'"{etag}"'}:
            await request.start(304, headers)
            await request.send({"type": "http.response.body", "body": b""})
            return
    body = gathered(chunks)
    first = await workers.run(next, body, b"")
    coding = accepted_coding(request.header(b"accept-encoding"))
    rest: Iterator[bytes] = _chained(first, body)
    if len(first) > COMPRESS_FROM and coding != "identity":
        headers.append((b"content-encoding", coding.encode()))
        rest = compressed(rest, coding)
    await request.stream(workers.each(rest), kind, headers)


def _chained(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
