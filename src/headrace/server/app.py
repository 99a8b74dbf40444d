"""The ASGI application: hot routes first, FastAPI behind them; one gate, one error shape, one request id for all."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from headrace import settings
from headrace.errors import BadRequest, HeadraceError, NotFound
from headrace.inbox import Inbox
from headrace.model import Principal
from headrace.server.api import create_api
from headrace.server.auth import PUBLIC, Gate
from headrace.server.files import Files, read_pieces
from headrace.server.hot import GetData, Uploads
from headrace.server.metrics import Metrics
from headrace.server.pages import PREFIX
from headrace.server.parts import listed, ref_of
from headrace.server.render import PARQUET, STREAMS, TEXTS, choose, parquet_file
from headrace.server.wire import (
    ASGI,
    ClientGone,
    Receive,
    Request,
    Scope,
    Send,
    Workers,
    error_answer,
    log,
    send_text,
    taken_whole,
    unexpected,
    whole_number,
)

if TYPE_CHECKING:
    from headrace.exchange import Exchange

_NOBODY = Principal("nobody", "none", ())
_RECORDS = "/records"
_DATASETS = "/v1/datasets/"
_FILES = "/v1/files/"
# Bodies of the routes that hold them in memory: a recipe may have 1 MiB, and a page of file ids far less.
_BODY_MOST = 4 << 20


class MethodNotAllowed(BadRequest):
    """The route exists, but not for this method."""

    code, status = "method_not_allowed", 405


class Invalid(BadRequest):
    """Parameters or a body that do not have the shape that the route asks for."""

    status = 422


class App:
    """See ``create_app``."""

    def __init__(self, exchange: Exchange, inbox: Inbox, open: bool) -> None:
        self.workers = Workers()
        self._exchange = exchange
        self._metrics = Metrics(inbox)
        self._gate = Gate(exchange.authenticate, self.workers, open)
        self._uploads = Uploads(exchange, inbox, self.workers, self._metrics)
        self._get_data = GetData(exchange, self.workers)
        self._files = Files(exchange, self.workers)
        self._api = create_api(exchange, self.workers, self._metrics, self._gate.forget)
        _shape_errors(self._api)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._serve(Request(scope, receive, send))
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _serve(self, request: Request) -> None:
        try:
            await self._route(request)
        except ClientGone:
            log.debug("client gone", request_id=request.id, path=request.path)
        except HeadraceError as error:
            self._metrics.failed(error.code)
            if request.started:
                # The status is gone already: only a broken answer can tell that it is not whole.
                raise
            await request.fail(error)
        except Exception as error:
            self._metrics.failed("internal")
            answer = unexpected(error, request)
            if request.started:
                raise
            await request.fail(answer)

    async def _route(self, request: Request) -> None:
        path, method = request.path, request.method
        if path == "/upload":
            _assert_method(request, "POST")
            await self._uploads.legacy(request, await self._gate.principal(request))
        elif path == "/get_data":
            _assert_method(request, "GET")
            await self._get_data(request, await self._gate.principal(request))
        elif path.startswith(_FILES):
            _assert_method(request, "GET", "HEAD")
            await self._files(request, path.removeprefix(_FILES))
        elif path.startswith(_DATASETS) and path.endswith(_RECORDS) and path.count("/") == 4:
            principal = await self._gate.principal(request)
            _assert_method(request, "POST", "GET")
            dataset = path[len(_DATASETS) : -len(_RECORDS)]
            take = self._uploads.records if method == "POST" else self._read
            await take(request, principal, dataset)
        else:
            await self._delegate(request)

    async def _delegate(self, request: Request) -> None:
        public = request.path in PUBLIC or request.path.startswith(PREFIX)
        principal = _NOBODY if public else await self._gate.principal(request)

        async def send(message: Scope) -> None:
            if message["type"] == "http.response.start":
                request.started = True
                message["headers"] = [*message.get("headers", []), *request.marks()]
                if message["status"] >= 400:
                    self._metrics.failed(str(message["status"]))
            await request.send(message)

        scope = {**request.scope, "headrace.principal": dataclasses.asdict(principal), "headrace.request": request.id}
        receive = request.receive
        if request.method not in ("GET", "HEAD"):
            receive = await taken_whole(request, _BODY_MOST, settings.number("http_seconds"))
        await self._api(scope, receive, send)

    async def _read(self, request: Request, principal: Principal, dataset: str) -> None:
        query = request.query()
        kind = choose(request.header(b"accept"))
        ref = ref_of(dataset, query.get("ref"))
        limit = whole_number(query, "limit", None, settings.integer("read_rows_max"))
        reading = await self.workers.run(
            self._exchange.read, principal, ref, listed(query.get("columns")), query.get("where"), limit
        )
        if kind == PARQUET:
            folder = self._exchange.root / "staging"
            path = await self.workers.run(parquet_file, reading.schema, reading.batches, folder)
            headers = [(b"content-length", str(path.stat().st_size).encode())]
            await request.stream(self.workers.each(read_pieces(path, remove=True)), PARQUET.encode(), headers)
        elif kind in TEXTS:
            chunks = STREAMS[kind](reading.schema, reading.batches)
            await send_text(request, self.workers, chunks, kind.encode(), reading.etag)
        else:
            chunks = STREAMS[kind](reading.schema, reading.batches)
            await request.stream(self.workers.each(chunks), kind.encode(), [])


def create_app(exchange: Exchange, inbox: Inbox, open: bool) -> App:
    """The server's ASGI application. With ``open`` anyone may use ``/upload`` and ``/get_data``."""
    return App(exchange, inbox, open)


def _assert_method(request: Request, *methods: str) -> None:
    if request.method not in methods:
        raise MethodNotAllowed(f"{request.path} takes no {request.method[:20]}", hint="use " + " or ".join(methods))


async def _lifespan(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def _shape_errors(api: FastAPI) -> None:
    def shaped(call: Call, error: HeadraceError) -> Response:
        status, body, headers = error_answer(error, call.scope["headrace.request"])
        plain = {name.decode(): value.decode() for name, value in headers}
        return Response(body, status, headers=plain, media_type="application/json")

    @api.exception_handler(HeadraceError)
    async def known(call: Call, error: HeadraceError) -> Response:
        return shaped(call, error)

    @api.exception_handler(HTTPException)
    async def http(call: Call, error: HTTPException) -> Response:
        if error.status_code == 404:
            return shaped(call, NotFound(f"there is no route {call.url.path[:200]}", hint="GET /docs lists the routes"))
        if error.status_code == 405:
            return shaped(call, MethodNotAllowed(f"{call.url.path[:200]} takes no {call.method}", hint="see /docs"))
        return shaped(call, Invalid(str(error.detail)[:200], hint="see /docs"))

    @api.exception_handler(RequestValidationError)
    async def invalid(call: Call, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return shaped(call, Invalid(f"{where}: {first['msg']}", hint="see /docs"))

    @api.exception_handler(Exception)
    async def unforeseen(call: Call, _: Exception) -> Response:
        # The outer application logs it: Starlette raises it again after this answer.
        return shaped(
            call, HeadraceError("something went wrong inside the exchange", hint="the log has this request_id")
        )


__all__ = ["ASGI", "App", "create_app"]
