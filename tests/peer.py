"""A small real HTTP server for tests of the client: it writes down what arrives and answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Call:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """``cut``: the connection breaks after so many bytes of the body; -1 before the status line."""

    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


def answer(value: Any, status: int = 200, **headers: str) -> Answer:
    """A JSON answer; underscores in header names stand for dashes."""
    return Answer(json.dumps(value).encode(), status, {k.replace("_", "-"): v for k, v in headers.items()})


def failure(code: str, status: int, message: str = "no", hint: str = "do", **headers: str) -> Answer:
    error = {"code": code, "message": message, "hint": hint, "request_id": "r1"}
    return answer({"error": error}, status, **headers)


LOST = Answer(cut=-1)

Script = Answer | list[Answer] | Callable[[Call], Answer]


class Peer:
    """``on["GET /path"]`` is an answer, a list of answers (the last stays), or a function of the call."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.on: dict[str, Script] = {}
        self.calls: list[Call] = []

    def reply(self, call: Call) -> Answer:
        self.calls.append(call)
        script = self.on.get(f"{call.method} {call.path}")
        if script is None:
            return failure("not_found", 404, f"nothing at {call.method} {call.path}")
        if isinstance(script, list):
            return script.pop(0) if len(script) > 1 else script[0]
        return script if isinstance(script, Answer) else script(call)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    peer: Peer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self._body()
        said = self.peer.reply(Call(self.command, parts.path, dict(parse_qsl(parts.query)), headers, body))
        if said.cut is not None:
            self.close_connection = True
        if said.cut == -1:
            return
        self.send_response(said.status)
        for name, value in ({"Content-Type": "application/json"} | said.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(said.body)))
        self.end_headers()
        self.wfile.write(said.body if said.cut is None else said.body[: said.cut])

    do_GET = do_POST = do_DELETE = do_HEAD = _handle


@contextmanager
def peer() -> Iterator[Peer]:
    """A peer that listens on a free port of this machine until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.peer = Peer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield handler.peer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
