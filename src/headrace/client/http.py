"""Calls to an exchange over HTTP: one shape of errors, bounded retries, nothing secret in any message."""

from __future__ import annotations

import datetime
import email.utils
import ipaddress
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx
import orjson

from headrace import errors, settings
from headrace.client.payload import Content, read_chunks
from headrace.errors import BadRequest, HeadraceError, Unreachable

BACKOFF_FIRST_S, BACKOFF_MAX_S, RETRY_AFTER_MAX_S = 0.2, 10.0, 60.0
# An exchange may read and parse a whole large body before it answers.
UPLOAD_PATIENCE = 10
CONNECTIONS = 32
AGAIN = (429, 502, 503, 504)
NOT_DONE = (429, 503)

T = TypeVar("T")


@dataclass
class Failure(Exception):
    """One failed try: ``untouched`` says that the exchange cannot have acted on it, ``again`` that a retry may help."""

    error: HeadraceError
    again: bool = True
    untouched: bool = False
    after: float | None = None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def base_url(url: str) -> SplitResult:
    """The parts of an exchange's URL; BadRequest if it is not http(s) or holds a secret."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadRequest("that is not the URL of an exchange", hint="it looks like http://host:7070")
    if parts.username or parts.password:
        raise BadRequest(
            f"the URL of {parts.hostname} holds a user or password",
            hint="give the token apart: token=… or HEADRACE_TOKEN",
        )
    return parts._replace(path=parts.path.rstrip("/"), query="", fragment="")


def _retry_after(response: httpx.Response) -> float | None:
    said = response.headers.get("retry-after", "")
    if said.isdecimal():
        return float(said)
    try:
        then = email.utils.parsedate_to_datetime(said)
    except ValueError:
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=datetime.UTC)
    return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())


def _answered(response: httpx.Response, url: str) -> Failure:
    """The error that a finished answer of status >= 300 carries."""
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        body = None
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        error = errors.from_dict(body, response.status_code)
    elif response.is_redirect:
        error = BadRequest(
            f"{url} sends its callers elsewhere", hint="give the final URL, with https if it asks for that"
        )
    elif response.status_code in AGAIN:
        error = Unreachable(
            f"{url} answers status {response.status_code}", hint="its exchange may be starting; try later"
        )
    else:
        error = errors.from_dict({}, response.status_code)
        error.hint = f"is {url} an exchange of Headrace?"
    code = response.status_code
    return Failure(error, code in AGAIN or error.retryable, code in NOT_DONE, _retry_after(response))


def lost(error: httpx.TransportError, url: str) -> Failure:
    """The error of a connection that broke or never was."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        what, untouched = "cannot be reached", True
    else:
        what, untouched = "stopped answering", False
    # The cause's own text is left out: it may quote a URL with its signature.
    return Failure(
        Unreachable(
            f"{url} {what} ({type(error).__name__})",
            hint="is it running (`headrace serve`), and are URL, network and certificate right?",
        ),
        untouched=untouched,
    )


def retrying(attempt: Callable[[], T], repeatable: bool = True) -> T:
    """Call ``attempt`` until it gives a value, up to ``retries`` times; raise the last error.

    ``attempt`` raises Failure. What is not ``repeatable`` is tried again only if the exchange cannot have acted on it.
    While the exchange prepares an answer and gets on with it, tries do not count.
    """
    tries, count, progress = settings.integer("retries"), 0, None
    while True:
        count += 1
        try:
            return attempt()
        except Failure as failure:
            told = failure.error.details.get("progress")
            if told is not None and told != progress:
                count, progress = 1, told
            if count >= tries or not failure.again or not (repeatable or failure.untouched):
                raise failure.error from None
            pause = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (count - 1)) * random.uniform(0.5, 1.0)  # noqa: S311
            time.sleep(pause if failure.after is None else min(failure.after, RETRY_AFTER_MAX_S) + pause / 4)


class Http:
    """An exchange's address and its connections: made when first used, a pool per process; survives fork, pickling."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """``url`` like http://host:7070, with a path if the exchange stands below one. BadRequest if malformed."""
        self._parts = base_url(url)
        self.url = self._parts.geturl()
        self._token = token or None
        self._clients: dict[int, httpx.Client] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": {}}

    def __repr__(self) -> str:
        return f"<Http {self.url}>"

    @property
    def client(self) -> httpx.Client:
        """This process's connection pool."""
        found = self._clients.get(os.getpid())
        return found or self._clients.setdefault(os.getpid(), self._open())

    def _open(self) -> httpx.Client:
        seconds = settings.number("http_seconds")
        # A proxy from the environment would be asked for this very machine's loopback otherwise.
        return httpx.Client(
            timeout=httpx.Timeout(seconds, connect=min(seconds, 10.0)),
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            trust_env=not _loopback(self._parts.hostname or ""),
        )

    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None,
        content: Content | None,
    ) -> httpx.Request:
        sent = dict(headers or {})
        if self._token and not path.startswith(("http://", "https://")):
            sent["Authorization"] = f"Bearer {self._token}"
        extensions: dict[str, Any] = {}
        body: bytes | Iterable[bytes] | None
        if isinstance(content, Path):
            sent["Content-Length"] = str(content.stat().st_size)
            body = read_chunks(content)
        else:
            body = content
        if content is not None:
            limits = self.client.timeout.as_dict()
            extensions["timeout"] = {**limits, "read": (limits["read"] or 60.0) * UPLOAD_PATIENCE}
        known = {name: value for name, value in (params or {}).items() if value is not None}
        # urljoin would drop a path that the exchange stands below.
        url = path if path.startswith(("http://", "https://")) else self.url + path
        return self.client.build_request(
            method, url, params=known or None, headers=sent, content=body, extensions=extensions
        )

    def open(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        content: Content | None = None,
    ) -> httpx.Response:
        """One try: an answer of status < 300 whose body is not read yet; raises Failure. The caller closes it.

        ``path`` begins with '/', or is a whole signed URL, which gets no token.
        """
        request = self._request(method, path, params, headers, content)
        try:
            response = self.client.send(request, stream=True)
            if response.status_code < 300:
                return response
            try:
                response.read()
            finally:
                response.close()
        except httpx.TransportError as error:
            raise lost(error, self.url) from None
        raise _answered(response, self.url)

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        content: Content | None = None,
        repeatable: bool | None = None,
    ) -> Any:
        """The JSON of an answer (None if empty), with retries. ``repeatable`` defaults to True but for POST."""
        if json is not None:
            content, headers = orjson.dumps(json), {**(headers or {}), "Content-Type": "application/json"}

        def attempt() -> Any:
            response = self.open(method, path, params=params, headers=headers, content=content)
            try:
                body = response.read()
            except httpx.TransportError as error:
                raise lost(error, self.url) from None
            finally:
                response.close()
            try:
                return orjson.loads(body) if body else None
            except orjson.JSONDecodeError:
                raise Failure(
                    BadRequest(f"{self.url} does not answer in JSON", hint="is it Headrace?"), False
                ) from None

        return retrying(attempt, method != "POST" if repeatable is None else repeatable)

    def absolute(self, url: str) -> str:
        """A URL of an answer, made whole if it is relative to the exchange."""
        return self.url + url if url.startswith("/") else urljoin(self.url + "/", url)

    def close(self) -> None:
        """Close this process's connections."""
        if (client := self._clients.pop(os.getpid(), None)) is not None:
            client.close()
