"""``headrace serve``: one server process on granian, which owns the root, and its worker."""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvloop
from granian.constants import Interfaces
from granian.server.embed import Server

from headrace import logs, settings
from headrace.errors import BadRequest, Conflict
from headrace.exchange import Exchange
from headrace.inbox import Inbox
from headrace.lock import RootLock
from headrace.root import Root
from headrace.server.app import App, create_app
from headrace.server.lifeline import WorkerKeeper
from headrace.server.wire import log

_FORGET_SECONDS = 0.2
_PRUNE_SECONDS = 600.0
_GRACE_SECONDS = 10.0
_OPEN_FILES = 65536


def serve(root: Path, host: str, port: int, open: bool) -> None:
    """Serve ``root`` until SIGTERM or SIGINT. Port 0 takes a free one. Raises Conflict if the root or port is taken."""
    logs.for_machines()
    if open and not _is_loopback(host):
        raise BadRequest("--open serves this machine only", hint="use --host 127.0.0.1, or leave --open away")
    _raise_file_limit()
    place = Root.at(root)
    with RootLock(place.lock) as lock:
        port = _claim_port(host, port)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        lock.announce(url)
        inbox = Inbox(place.path)
        try:
            exchange = Exchange(place)
            try:
                _greet(exchange, url, place.path, open)
                exchange.owner_token()
                app = create_app(exchange, inbox, open)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(_main(app, exchange, inbox, place.path, host, port))
                app.workers.close()
            finally:
                exchange.close()
        finally:
            inbox.close()


async def _main(app: App, exchange: Exchange, inbox: Inbox, root: Path, host: str, port: int) -> None:
    server = Server(
        app, host, port, interface=Interfaces.ASGI, websockets=False, backlog=1024, backpressure=1024, log_enabled=False
    )
    keeper = WorkerKeeper(root)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    serving = asyncio.ensure_future(server.serve())
    working = asyncio.ensure_future(keeper.run())
    tidying = asyncio.ensure_future(_tidy(app, exchange, inbox))
    stop = asyncio.ensure_future(stopping.wait())
    await asyncio.wait((serving, working, tidying, stop), return_when=asyncio.FIRST_COMPLETED)
    log.info("stopping")
    server.stop()
    # A slow download must not hold the exchange up for ever.
    await asyncio.wait((serving,), timeout=_GRACE_SECONDS)
    tidying.cancel()
    await asyncio.to_thread(inbox.close)
    keeper.stop()
    await working
    for task in (serving, tidying):
        with suppress(asyncio.CancelledError):
            if task.done():
                task.result()


async def _tidy(app: App, exchange: Exchange, inbox: Inbox) -> None:
    """Delete from the inbox what the flusher has committed, and receipts that are too old."""
    forgotten: dict[str, int] = {}
    pruned = 0.0
    while True:
        if inbox.held_bytes:
            marks = await app.workers.run(exchange.flushed)
            for dataset, seq in marks.items():
                if seq > forgotten.get(dataset, 0):
                    await asyncio.wrap_future(inbox.forget(dataset, seq))
                    forgotten[dataset] = seq
        now = time.time()
        if now - pruned > _PRUNE_SECONDS:
            pruned = now
            await asyncio.wrap_future(inbox.prune(now - 86400 * settings.integer("receipts_keep_days")))
        await asyncio.sleep(_FORGET_SECONDS)


def _greet(exchange: Exchange, url: str, root: Path, open: bool) -> None:
    say: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    say(f"Headrace serves {url} (root {root})")
    token = exchange.first_token()
    if token is not None:
        say(f"Admin token, shown this once: {token.secret}")
    if open:
        say(f"Open: anyone on this machine may POST {url}/upload and GET {url}/get_data")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _claim_port(host: str, port: int) -> int:
    """The port, free at this moment. granian itself would share a taken one without a word."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise Conflict(f"{host}:{port} cannot be served: {error.strerror}", hint="choose another --port") from None


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
