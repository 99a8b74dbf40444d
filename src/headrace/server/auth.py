"""Who calls: bearer tokens through the exchange, remembered for seconds, and the open mode for one machine."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable

from headrace.errors import Forbidden, Unauthenticated
from headrace.model import Principal
from headrace.server.wire import Request, Workers

REMEMBER_SECONDS = 5.0
_REMEMBER_MOST = 1024
ANYONE = Principal("local", "open", ("default",))
_OPEN_ROUTES = frozenset({("POST", "/upload"), ("GET", "/get_data")})
# This machine by its own names. A page that made its name point here (DNS rebinding) still calls us by that name.
_LOCAL = re.compile(r"(localhost|[a-z0-9.-]+\.localhost|127(\.[0-9]{1,3}){3}|\[::1\])\.?(:[0-9]{1,5})?", re.IGNORECASE)
PUBLIC = frozenset({"/", "/healthz", "/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect"})


class Gate:
    """Turns an Authorization header into a principal. A token revoked elsewhere works for some seconds more."""

    def __init__(self, authenticate: Callable[[str], Principal], workers: Workers, open: bool) -> None:
        self._authenticate = authenticate
        self._workers = workers
        self._open = open
        self._known: dict[bytes, tuple[Principal, float]] = {}

    async def principal(self, request: Request) -> Principal:
        """The caller; raises Unauthenticated."""
        header = request.headers.get(b"authorization")
        if header is None:
            if self._open and (request.method, request.path) in _OPEN_ROUTES:
                _assert_local(request)
                return ANYONE
            raise Unauthenticated(
                "this route needs a token", hint="send 'Authorization: Bearer …'; see headrace token create"
            )
        scheme, _, secret = header.partition(b" ")
        secret = secret.strip()
        if scheme.lower() != b"bearer" or not 0 < len(secret) <= 512:
            raise Unauthenticated("the Authorization header is not 'Bearer …'", hint="send the token as a bearer token")
        # Looked up by hash, so that timing tells nothing about the secret.
        key = hashlib.sha256(secret).digest()
        known = self._known.get(key)
        now = time.monotonic()
        if known is not None and known[1] > now:
            return known[0]
        self._known.pop(key, None)
        principal = await self._workers.run(self._authenticate, secret.decode("latin-1"))
        if len(self._known) >= _REMEMBER_MOST:
            self._known.clear()
        self._known[key] = (principal, now + REMEMBER_SECONDS)
        return principal

    def forget(self) -> None:
        """Ask the exchange anew for every token, as after a revocation."""
        self._known.clear()


def _assert_local(request: Request) -> None:
    """Forbidden for what a browser sends on behalf of a foreign page: programs send no Origin, and call localhost."""
    host = request.header(b"host")
    if host and not _LOCAL.fullmatch(host):
        raise Forbidden(
            f"the open exchange is not called {host[:100]!r}", hint="use http://localhost or 127.0.0.1, or send a token"
        )
    origin = request.headers.get(b"origin")
    if origin is not None and origin.decode("latin-1").lower() != f"http://{host}".lower():
        raise Forbidden("a page from elsewhere may not use the open exchange", hint="send a token")
