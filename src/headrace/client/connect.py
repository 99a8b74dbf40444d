"""An exchange over HTTP: the session of ``headrace.connect(url)``, and the provider that a feed reads from."""

from __future__ import annotations

import dataclasses
import datetime
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote

import httpx
import pyarrow as pa

from headrace import settings
from headrace.client import payload
from headrace.client.http import Failure, Http, base_url, lost, retrying
from headrace.client.payload import Content
from headrace.client.policies import RemotePolicies
from headrace.client.session import Session
from headrace.errors import BadRequest, Conflict, Damaged, Forbidden
from headrace.model import (
    Dataset,
    Diff,
    FileEntry,
    Manifest,
    Quarantined,
    Receipt,
    Ref,
    Run,
    Token,
    TracedRow,
    Version,
    from_dict,
)

PAGE = 1000
SIGN_AHEAD = 256
SIGN_MARGIN_S, SIGN_LEAST_S = 60.0, 30.0
CHUNK = 1 << 20

T = TypeVar("T")


def token_from(token: str | None) -> str | None:
    """The token given, else that of HEADRACE_TOKEN, else None."""
    return token or os.environ.get("HEADRACE_TOKEN") or None


def _at(ref: Ref) -> str:
    return ref.at + (f":{ref.split}" if ref.split else "")


def _path(name: str, rest: str = "") -> str:
    return f"/v1/datasets/{quote(name, safe='')}{rest}"


def _joined(columns: Sequence[str] | None) -> str | None:
    if columns is None:
        return None
    if bad := [name for name in columns if "," in name]:
        raise BadRequest(f"the column {bad[0]!r} holds a comma", hint="read all columns and select afterwards")
    return ",".join(columns)


def _traced(http: Http, ref: Ref, query: Mapping[str, Any]) -> list[TracedRow]:
    found = http.call("GET", _path(ref.dataset, "/trace"), params={"ref": _at(ref), **query})
    return [from_dict(TracedRow, item) for item in _items(found)]


def _items(answer: Any) -> list[Any]:
    items: list[Any] = answer["items"] if isinstance(answer, Mapping) else answer
    return items


class _Body(io.RawIOBase):
    """A streamed answer as a file for Arrow to read."""

    def __init__(self, response: httpx.Response, url: str) -> None:
        self._response, self._url = response, url
        self._chunks = response.iter_bytes()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            try:
                self._rest = memoryview(next(self._chunks, b""))
            except httpx.TransportError as error:
                raise lost(error, self._url).error from None
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._response.close()
        super().close()


class RemoteSession(RemotePolicies, Session):
    """An exchange reached over HTTP. Safe for threads, fork and pickling: connections are made where first used."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """Nothing is sent yet. ``token`` defaults to HEADRACE_TOKEN. BadRequest if ``url`` is malformed."""
        self._http = Http(url, token_from(token))

    @property
    def url(self) -> str:
        """Where the exchange is."""
        return self._http.url

    def __repr__(self) -> str:
        return f"<Exchange {self.url}>"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _upload(
        self,
        dataset: str,
        body: Content,
        content_type: str,
        encoding: str | None,
        key: str | None,
        idempotency_key: str | None,
    ) -> Receipt:
        headers = {"Content-Type": content_type}
        if encoding:
            headers["Content-Encoding"] = encoding
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        again = isinstance(body, bytes | Path | payload.Replay) and idempotency_key is not None
        if not again:
            return self._upload_once(dataset, body, headers, key)
        answer = self._http.call(
            "POST", _path(dataset, "/records"), params={"key": key}, headers=headers, content=body, repeatable=True
        )
        return from_dict(Receipt, {"dataset": dataset, **answer})

    def _upload_once(self, dataset: str, body: Content, headers: Mapping[str, str], key: str | None) -> Receipt:
        """A body that can be read only once: even a refused connection must not lead to a second, shorter one."""
        try:
            response = self._http.open(
                "POST", _path(dataset, "/records"), params={"key": key}, headers=headers, content=body
            )
        except Failure as failure:
            raise failure.error from None
        try:
            response.read()
        except httpx.TransportError as error:
            raise lost(error, self.url).error from None
        finally:
            response.close()
        return from_dict(Receipt, {"dataset": dataset, **response.json()})

    def _stream(self, path: str, params: Mapping[str, Any], accept: str) -> httpx.Response:
        return retrying(lambda: self._http.open("GET", path, params=params, headers={"Accept": accept}))

    def _get_data(self, limit: int | None, offset: int) -> Iterator[bytes]:
        params = {"limit": limit, "offset": offset or None}
        return self._stream_bytes("/get_data", params)

    def _stream_bytes(self, path: str, params: Mapping[str, Any]) -> Iterator[bytes]:
        response = self._stream(path, params, "application/json")
        try:
            yield from response.iter_bytes()
        except httpx.TransportError as error:
            raise lost(error, self.url).error from None
        finally:
            response.close()

    def _read(
        self, ref: Ref, columns: Sequence[str] | None, where: str | None, limit: int | None
    ) -> pa.RecordBatchReader:
        params = {"ref": _at(ref), "columns": _joined(columns), "where": where, "limit": limit}
        body = _Body(self._stream(_path(ref.dataset, "/records"), params, payload.ARROW), self.url)
        try:
            source = pa.ipc.open_stream(io.BufferedReader(body, CHUNK))
        except pa.ArrowInvalid as error:
            body.close()
            raise Damaged(f"{self.url} sent no Arrow stream: {error}", hint="is there a proxy in between?") from None

        def batches() -> Iterator[pa.RecordBatch]:
            with body:
                yield from source

        return pa.RecordBatchReader.from_batches(source.schema, batches())

    def _all(self, kind: type[T], path: str, **query: str | None) -> list[T]:
        found: list[T] = []
        token: str | None = None
        while True:
            page = self._http.call("GET", path, params={**query, "limit": PAGE, "page_token": token})
            found += [from_dict(kind, item) for item in _items(page)]
            token = page.get("next_page_token") if isinstance(page, Mapping) else None
            if not token:
                return found

    def _page(self, kind: type[T], path: str, params: Mapping[str, Any]) -> tuple[list[T], str | None]:
        page = self._http.call("GET", path, params=params)
        return [from_dict(kind, item) for item in _items(page)], page.get("next_page_token")

    def datasets(self) -> list[Dataset]:
        """All datasets that this caller may see."""
        return self._all(Dataset, "/v1/datasets")

    def _dataset(self, name: str) -> Dataset:
        return from_dict(Dataset, self._http.call("GET", _path(name)))

    def _versions(self, name: str, limit: int, page_token: str | None) -> tuple[list[Version], str | None]:
        return self._page(Version, _path(name, "/versions"), {"limit": limit, "page_token": page_token})

    def _version(self, ref: Ref) -> Version:
        return from_dict(Version, self._http.call("GET", _path(ref.dataset, f"/versions/{quote(_at(ref), safe=':')}")))

    def _tag(self, ref: Ref, name: str) -> Version:
        body = {"name": name, "ref": _at(ref)}
        # Setting a tag twice is the same as setting it once.
        return from_dict(Version, self._http.call("POST", _path(ref.dataset, "/tags"), json=body, repeatable=True))

    def _diff(self, base: Ref, other: Ref) -> Diff:
        params = {"base": str(base), "other": str(other)}
        return from_dict(Diff, self._http.call("GET", _path(base.dataset, "/diff"), params=params))

    def _quarantine(
        self, name: str, rule: str | None, limit: int, page_token: str | None
    ) -> tuple[list[Quarantined], str | None]:
        params = {"rule": rule, "limit": limit, "page_token": page_token}
        return self._page(Quarantined, _path(name, "/quarantine"), params)

    def _trace(
        self,
        ref: Ref,
        *,
        step: int | None,
        seed: int,
        epoch: int,
        batch_size: int,
        world_size: int,
        shuffle: str,
        row: str | None,
        source: str | None,
    ) -> list[TracedRow]:
        query: dict[str, Any] = {"step": step, "row": row, "source": source}
        if step is not None:
            query |= {"seed": seed, "epoch": epoch, "batch_size": batch_size}
            query |= {"world_size": world_size, "shuffle": shuffle}
        return _traced(self._http, ref, query)

    def _check_recipe(self, text: str, base: str) -> list[dict[str, Any]]:
        found = self._http.call("POST", "/v1/recipes:check", json={"recipe": text, "base": base}, repeatable=True)
        problems: list[dict[str, Any]] = found["problems"] if "problems" in found else found["items"]
        return problems

    def _start_run(self, text: str, base: str) -> Run:
        return from_dict(Run, self._http.call("POST", "/v1/runs", json={"recipe": text, "base": base}))

    def _preview(self, text: str, base: str, rows: int) -> dict[str, Any]:
        body = {"recipe": text, "base": base, "rows": rows}
        found: dict[str, Any] = self._http.call("POST", "/v1/runs:preview", json=body)
        return found

    def runs(self) -> list[Run]:
        """Runs, the newest first."""
        return self._all(Run, "/v1/runs")

    def run_status(self, id: str) -> Run:
        """One run as it stands; NotFound."""
        return from_dict(Run, self._http.call("GET", f"/v1/runs/{quote(id, safe='')}"))

    def receipt(self, id: str) -> Receipt:
        """What became of an upload; NotFound once it is older than ``receipts_keep_days``."""
        return from_dict(Receipt, self._http.call("GET", f"/v1/receipts/{quote(id, safe='')}"))

    def _create_token(self, name: str, role: str, datasets: Sequence[str], days: int | None) -> Token:
        body = {"name": name, "role": role, "datasets": list(datasets), "days": days}
        return from_dict(Token, self._http.call("POST", "/v1/tokens", json=body))

    def _tokenizer(self, ref: Ref) -> bytes:
        return b"".join(self._stream_bytes(_path(ref.dataset, "/tokenizer"), {"ref": _at(ref)}))

    def tokens(self) -> list[Token]:
        """All tokens, without their secrets."""
        return self._all(Token, "/v1/tokens")

    def revoke_token(self, id: str) -> None:
        """End a token at once; NotFound."""
        self._http.call("DELETE", f"/v1/tokens/{quote(id, safe='')}")

    def health(self) -> dict[str, Any]:
        """Whether the exchange can take and give data."""
        found: dict[str, Any] = self._http.call("GET", "/readyz")
        return found


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class _Signed:
    """A signed URL and the moment of this machine's clock at which it is no longer used."""

    url: str
    until: float


def _seconds(moment: str | float) -> float:
    """Seconds since 1970 of a moment told as such or in ISO form (UTC if it names no zone)."""
    if isinstance(moment, int | float):
        return moment
    then = datetime.datetime.fromisoformat(moment)
    return (then if then.tzinfo else then.replace(tzinfo=datetime.UTC)).timestamp()


class RemoteProvider:
    """Manifests, files and traces of an exchange over HTTP, for a feed. Safe for threads, fork, spawn and pickling."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """Nothing is sent yet."""
        self._http = Http(url, token_from(token))
        self._next: dict[str, str | None] = {}
        self._signed: dict[str, _Signed] = {}

    def __repr__(self) -> str:
        return f"<Provider {self._http.url}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_signed": {}}

    def manifest(self, ref: Ref | str, columns: Sequence[str] | None = None) -> Manifest:
        """The whole manifest of a ref, its pages joined. NotFound, Forbidden, TooNew."""
        ref = Ref.parse(ref) if isinstance(ref, str) else ref
        params = {"columns": _joined(columns)}
        first = self._manifest_page(ref, {**params, "ref": _at(ref)})
        # Later pages name the version itself: "latest" may move meanwhile.
        fixed = dataclasses.replace(ref, at=str(first.version))
        files, token = list(first.files), first.next_page_token
        while token:
            page = self._manifest_page(fixed, {**params, "ref": _at(fixed), "page_token": token})
            if page.fingerprint != first.fingerprint:
                raise Conflict(f"the pages of {fixed} belong to different content", hint="open the feed again")
            files += page.files
            token = page.next_page_token
        ids = [entry.id for entry in files]
        self._next.update(zip(ids, [*ids[1:], None], strict=True))
        return dataclasses.replace(first, files=tuple(files), next_page_token=None)

    def _manifest_page(self, ref: Ref, params: Mapping[str, Any]) -> Manifest:
        return from_dict(Manifest, self._http.call("GET", _path(ref.dataset, "/manifest"), params=params))

    def _url(self, id: str) -> str:
        known = self._signed.get(id)
        if known is None or known.until < time.time():
            self._sign(id)
            known = self._signed[id]
        return known.url

    def _sign(self, id: str) -> None:
        """Sign one file and those that follow it in the manifest, which will be wanted soon."""
        now = time.time()
        ids, following = [id], self._next.get(id)
        while following is not None and len(ids) < SIGN_AHEAD:
            if following not in self._signed or self._signed[following].until < now:
                ids.append(following)
            following = self._next.get(following)
        answer = self._http.call("POST", "/v1/files:sign", json={"ids": ids}, repeatable=True)
        life = _seconds(answer["expires_at"]) - now
        # At least a little: with clocks apart a file would need a signature each, and a dead one is renewed anyway.
        until = now + max(life - SIGN_MARGIN_S, life / 2, SIGN_LEAST_S)
        for signed_id, url in answer["urls"].items():
            self._signed[signed_id] = _Signed(self._http.absolute(url), until)
        if id not in self._signed:
            raise Forbidden(f"the exchange gives no URL for the file {id}", hint="is the version still there?")

    def fetch(self, entry: FileEntry, into: Path) -> None:
        """Download one file to the path ``into``; a broken connection continues where it stopped.

        Raises Damaged if the size is not the manifest's (the caller checks the hash), Unreachable, NotFound, Forbidden.
        """
        with into.open("wb") as file:
            size, stuck = 0, 0
            while size < entry.bytes and stuck < settings.integer("retries"):
                # The count of tries begins anew whenever bytes have come.
                retrying(lambda: self._fetch_some(entry, file))
                stuck = 0 if file.tell() > size else stuck + 1
                size = max(size, file.tell())
            size = file.tell()
        if size != entry.bytes:
            raise Damaged(
                f"file {entry.id} has {size} bytes, its manifest says {entry.bytes}", hint="run `headrace doctor` there"
            )

    def _fetch_some(self, entry: FileEntry, file: BinaryIO) -> None:
        """Append what one answer gives; returns early, having written something, when the connection breaks."""
        start = file.tell()
        response = self._open_file(entry, start)
        try:
            if start and response.status_code != 206:
                file.seek(0)
                file.truncate()
                start = 0
            # Without a chunk size: gathering chunks would lose what came before a break.
            for chunk in response.iter_raw():
                file.write(chunk)
                if file.tell() > entry.bytes:
                    break
        except httpx.TransportError as error:
            if file.tell() == start:
                raise lost(error, self._http.url) from None
        finally:
            response.close()

    def _open_file(self, entry: FileEntry, start: int) -> httpx.Response:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            return self._http.open("GET", self._url(entry.id), headers=headers)
        except Failure as failure:
            # A signature may die before its time (clocks, rotated keys): one fresh one is asked for.
            if not isinstance(failure.error, Forbidden):
                raise
        self._signed.pop(entry.id, None)
        return self._http.open("GET", self._url(entry.id), headers=headers)

    def trace(self, ref: Ref | str, **query: Any) -> list[TracedRow]:
        """The rows behind a step, an ``_id`` or a locator; ``query`` as in ``Session.trace``."""
        return _traced(self._http, Ref.parse(ref) if isinstance(ref, str) else ref, query)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def open_provider(source: str, token: str | None = None) -> tuple[RemoteProvider, str]:
    """The provider for ``http://host:port/name@ref`` and the ref in it; BadRequest or BadRef if malformed."""
    parts = base_url(source)
    prefix, _, last = parts.path.rpartition("/")
    if not last:
        raise BadRequest(f"{parts.geturl()} names no dataset", hint="write http://host:7070/name@version")
    ref = Ref.parse(unquote(last))
    return RemoteProvider(parts._replace(path=prefix).geturl(), token), str(ref)
