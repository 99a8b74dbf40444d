"""The routes that carry the load, as plain ASGI: uploads, and ``/get_data``."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

import orjson

from headrace import arrivals, settings
from headrace.collect import formats
from headrace.errors import BadRequest, Busy, HeadraceError, TooLarge
from headrace.inbox import Inbox, Upload, remove_body
from headrace.intake import Intake, Judged, Limits, small_json
from headrace.model import Principal, Receipt, check_name
from headrace.server.metrics import Metrics
from headrace.server.wire import JSON, Request, Workers, next_piece, send_text, whole_number

if TYPE_CHECKING:
    from headrace.exchange import Exchange

_INLINE_BYTES = 64 << 10
_HAND_OVER_BYTES = 1 << 20
_KEY_MOST = 200


class Uploads:
    """``POST /upload`` and ``POST /v1/datasets/{d}/records``: answered once durable."""

    def __init__(self, exchange: Exchange, inbox: Inbox, workers: Workers, metrics: Metrics) -> None:
        self._exchange = exchange
        self._inbox = inbox
        self._workers = workers
        self._metrics = metrics
        self._limits = Limits()
        self._known: set[str] = set()

    async def legacy(self, request: Request, principal: Principal) -> None:
        """One record, or an array of them, into ``default``; a bad one refuses all."""
        receipt = await self._accept(request, principal, "default", "application/json", strict=True)
        records = "1 record" if receipt.accepted == 1 else f"{receipt.accepted} records"
        body = {
            "status": "success",
            "message": f"{records} stored",
            "accepted": receipt.accepted,
            "receipt": receipt.receipt,
        }
        await request.answer(200, orjson.dumps(body))

    async def records(self, request: Request, principal: Principal, dataset: str) -> None:
        """Records of any format into a dataset; bad JSON records are listed, the good ones stored."""
        receipt = await self._accept(request, principal, check_name(dataset), "", strict=False)
        body = {
            "accepted": receipt.accepted,
            "rejected": receipt.rejected,
            "duplicates": receipt.duplicates,
            "receipt": receipt.receipt,
            "errors": [{"index": error.index, "reason": error.reason} for error in receipt.errors],
        }
        await request.answer(200, orjson.dumps(body))

    async def _accept(
        self, request: Request, principal: Principal, dataset: str, kind: str, *, strict: bool
    ) -> Receipt:
        began = time.perf_counter()
        idem = _idempotency_key(request)
        key = (request.query().get("key") or None) if request.scope["query_string"] else None
        form = formats.format_of_type(request.header(b"content-type", kind))
        _assert_declared(request, self._limits.upload_bytes)
        self._exchange.admit(principal, dataset, key, idem)
        judged = await self._small(request, strict) if form == "json" and idem is None else None
        if judged is None:
            hashed = None if idem is None else key or ""
            coding = request.header(b"content-encoding")
            intake = Intake(
                self._inbox,
                form,
                coding,
                strict=strict,
                hashed=hashed,
                limits=self._limits,
                schema=partial(arrivals.columns_of, self._exchange.catalog, dataset),
            )
            judged = await self._take(request, intake, form)
        if judged.rows and dataset not in self._known:
            await self._workers.run(self._exchange.make_known, dataset)
            self._known.add(dataset)
        receipt = await self._append(judged, dataset, key, idem)
        self._metrics.uploaded(receipt, time.perf_counter() - began)
        return receipt

    async def _small(self, request: Request, strict: bool) -> Judged | None:
        """The most frequent case, a small JSON body as it is; None leaves what came for the general way."""
        if b"content-encoding" in request.headers:
            return None
        body, more = await next_piece(request, self._limits.idle_seconds)
        while more and len(body) <= _INLINE_BYTES:
            piece, more = await next_piece(request, self._limits.idle_seconds)
            body += piece
        judged = None if more or len(body) > _INLINE_BYTES else small_json(body, strict, self._limits)
        if judged is None:
            request.hold(body, more)
        return judged

    async def _append(self, judged: Judged, dataset: str, key: str | None, idem: str | None) -> Receipt:
        upload = Upload(
            dataset, judged.format, judged.rows, judged.body, idem, key, judged.rejected, judged.errors, judged.body_sha
        )
        try:
            return await self._inbox.append_async(upload)
        except HeadraceError:
            if not isinstance(judged.body, bytes):
                remove_body(judged.body)
            raise

    async def _take(self, request: Request, intake: Intake, form: str) -> Judged:
        """Receive, decode and judge: small bodies right here, of large ones each MiB in a thread while more comes."""
        judged: Judged | None = None
        at_work: asyncio.Future[None] | None = None
        parts: list[bytes] = []
        held, more, threaded = 0, True, form not in ("json", "ndjson") or b"content-encoding" in request.headers
        try:
            while more:
                piece, more = await next_piece(request, self._limits.idle_seconds)
                parts.append(piece)
                held += len(piece)
                if held >= _HAND_OVER_BYTES:
                    if at_work is not None:
                        await at_work
                    at_work = asyncio.ensure_future(self._workers.run(intake.feed, parts))
                    parts, held, threaded = [], 0, True
            if at_work is not None:
                await at_work
            if threaded or held > _INLINE_BYTES:
                await self._workers.run(intake.feed, parts)
                judged = await self._workers.run(intake.finish)
            else:
                intake.feed(parts)
                judged = intake.finish()
            return judged
        except OSError as error:
            raise Busy(f"the upload could not be written: {error.strerror}", details={"retry_after": 10}) from None
        finally:
            if judged is None:
                if at_work is not None:
                    await asyncio.wait([at_work])
                    at_work.exception()
                await self._workers.run(intake.abandon)


class GetData:
    """``GET /get_data``: the records of ``default`` as uploaded, one JSON array, streamed."""

    def __init__(self, exchange: Exchange, workers: Workers) -> None:
        self._exchange = exchange
        self._workers = workers

    async def __call__(self, request: Request, principal: Principal) -> None:
        """Answer the array, or 304."""
        query = request.query()
        most = settings.integer("read_rows_max")
        limit = whole_number(query, "limit", None, most)
        offset = whole_number(query, "offset", 0, 1 << 62) or 0
        data = await self._workers.run(self._exchange.get_data, principal, limit, offset)
        await send_text(request, self._workers, data.chunks, JSON, data.etag)


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get(b"idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= _KEY_MOST:
        raise BadRequest(f"an Idempotency-Key has 1 to {_KEY_MOST} characters", hint="a UUID is a good one")
    return key.decode("latin-1")


def _assert_declared(request: Request, most: int) -> None:
    declared = request.header(b"content-length")
    if declared.isdigit() and int(declared) > most:
        raise TooLarge(f"the body is larger than {most} bytes", hint="send it in parts, or raise upload_bytes_max")
