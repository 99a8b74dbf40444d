"""Twin exchanges that differ in hidden cells alone, and everything that a caller behind a policy can fetch of them."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

from headrace import quarantine, versions
from headrace.exchange import Exchange
from headrace.govern import OWNER
from headrace.inbox import RECORD_SEPARATOR, Inbox, Upload
from headrace.model import Run, StepCount
from headrace.root import Root
from headrace.rows import SYSTEM
from headrace.server.app import create_app

WHEN = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
USER = pa.schema(
    [
        ("k", pa.string()),
        ("g", pa.int64()),
        ("t", pa.string()),
        ("n", pa.int64()),
        ("f", pa.float64()),
        ("s", pa.string()),
        ("d", pa.date32()),
        ("l", pa.list_(pa.int64())),
        ("o", pa.struct([("t", pa.string()), ("n", pa.int64())])),
    ]
)
SECRET = ("n", "f", "s", "d", "l", "o")
Probe = tuple[str, str, dict[str, Any]]
"""Method, path, and headers or the body of a POST."""
DATASET = "default"
ARROW, PARQUET = "application/vnd.apache.arrow.stream", "application/vnd.apache.parquet"
FORMS = ("application/x-ndjson", "application/json", "text/csv", ARROW, PARQUET)


@dataclass(frozen=True)
class Row:
    """``key`` is told to all who see the row; ``g`` and ``t`` decide whether they do; ``number`` makes its canaries."""

    key: str
    g: int | None
    t: str | None
    number: int


@dataclass
class Case:
    """Files and a tail of rows, and a policy as text beside the same in Python."""

    files: list[list[Row]]
    tail: list[Row]
    row_filter: str | None
    passes: Any
    masks: dict[str, str]
    tagged: bool = False
    extra: list[int] = field(default_factory=list)

    def visible(self, rows: list[Row]) -> list[Row]:
        return [row for row in rows if self.passes(row) is True]


def canary(column: str, number: int, mask: str | None, twin: bool) -> Any:
    """A value that stands nowhere else. That of the twin differs, but in what ``mask`` shows of it by design."""
    kind = (mask or "").partition(":")[0]
    other = twin and kind != "hash"
    whole = 7_000_000_000_000 + number * 100 + 17
    if other:
        whole += 40 if kind == "bucket" else 1_000_000_000_000
    text = f"{'another' if other else 'canary'}{number:08d}@example.com"
    if column == "n":
        return whole
    if column == "f":
        within = 0.125 if kind == "bucket" else 1e7
        return 7e7 + number + 0.25 + (within if other else 0)
    if column == "s":
        return text
    if column == "d":
        day, years = (23, 0) if other and kind == "month" else (17, 3000 if other else 0)
        return dt.date(3000 + number // 12 + years, number % 12 + 1, day)
    if column == "l":
        return [whole + 1_000, whole]
    return {"t": text, "n": whole}


def plain(column: str, number: int) -> Any:
    """What anyone may see."""
    return {
        "n": number % 7,
        "f": number % 5 + 0.5,
        "s": f"s{number % 3}",
        "d": dt.date(2024, 1, 1 + number % 28),
        "l": list(range(number % 3)),
        "o": {"t": f"t{number % 2}", "n": number % 4},
    }[column]


def mask_of(case: Case, column: str) -> str | None:
    found = case.masks.get(column)
    return "null" if found is None and any(name.startswith(f"{column}.") for name in case.masks) else found


def record(case: Case, row: Row, twin: bool) -> dict[str, Any]:
    """The stored record of a row: canaries wherever it is hidden."""
    shown = case.passes(row) is True
    made: dict[str, Any] = {"k": row.key, "g": row.g, "t": row.t}
    for column in SECRET:
        mask = mask_of(case, column)
        hidden = not shown or mask is not None
        made[column] = (
            canary(column, row.number, mask if shown else None, twin) if hidden else plain(column, row.number)
        )
        if twin and not shown and row.number % 3 == 0:
            made[column] = None
    # JSON has no dates.
    return {**made, "d": None} if row in case.tail and _is_json(row.key) else made


def _is_json(key: str) -> bool:
    """Whether a row of the tail comes as JSON, whose text is kept, or as Arrow."""
    return int(key[3:11]) % 2 == 1


def needles(case: Case) -> list[tuple[str, bytes]]:
    """Every hidden value, as text and as the bytes of a number."""
    found = []
    for row in [row for part in [*case.files, case.tail] for row in part]:
        stored = record(case, row, False)
        if case.passes(row) is not True or mask_of(case, "k"):
            found.append(("k", row.key.encode()))
        for column in SECRET:
            if case.passes(row) is True and mask_of(case, column) is None:
                continue
            for value in _leaves(stored[column]):
                found.append((column, str(value).encode()))
                if isinstance(value, int):
                    found.append((column, struct.pack("<q", value)))
                if isinstance(value, float):
                    found.append((column, struct.pack("<d", value)))
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def expected(case: Case, row: Row) -> dict[str, Any]:
    """A visible row as the policy shows it; a hash as the value behind it."""
    stored = record(case, row, False)
    return {name: _masked(mask_of(case, name), value) for name, value in stored.items()}


def _masked(mask: str | None, value: Any) -> Any:
    kind, _, argument = (mask or "").partition(":")
    if kind == "constant":
        return argument
    if mask is None or kind == "hash":
        return value
    if kind == "null" or value is None:
        return None
    if kind == "last":
        text = json.dumps(value, separators=(",", ":")) if isinstance(value, list | dict) else str(value)
        return "****" + (text[-int(argument) :] if len(text) >= 2 * int(argument) else "")
    if kind == "bucket":
        if not isinstance(value, int | float):
            return None
        edge = value // float(argument) * float(argument)
        return int(edge) if isinstance(value, int) and float(argument).is_integer() else edge
    if kind == "month":
        return value.replace(day=1) if isinstance(value, dt.date) else None
    if isinstance(value, str):
        return "[EMAIL]"
    return [None] * len(value) if isinstance(value, list) else {"t": "[EMAIL]", "n": None}


class Twin:
    """An exchange that holds a case, and a caller behind the policy."""

    def __init__(self, folder: Path, case: Case, twin: bool) -> None:
        self.case, self.twin, self.receipt = case, twin, "none"
        self.root = Root.at(folder)
        for name in ("masks", "urls"):
            (self.root.keys / name).write_bytes((name * 32).encode()[:32])
        self.inbox = Inbox(folder)
        self.exchange = Exchange(self.root)
        self.app = create_app(self.exchange, self.inbox, False)
        self._fill()
        self.token = self.exchange.create_token(OWNER, "ann", "consumer", ("*",), None).secret
        self.ann = self.exchange.authenticate(str(self.token))

    def close(self) -> None:
        self.app.workers.close()
        self.inbox.close()
        self.exchange.close()

    def _records(self, rows: list[Row], at: int) -> list[dict[str, Any]]:
        made = [record(self.case, row, self.twin) for row in rows]
        if self.twin and self.case.row_filter is not None and at in self.case.extra:
            gone = [row for row in rows if self.case.passes(row) is not True]
            made += [{**record(self.case, row, True), "k": f"{row.key}x"} for row in gone]
        return made

    def _fill(self) -> None:
        for at, rows in enumerate(self.case.files):
            made = self._records(rows, at)
            user = pa.RecordBatch.from_pylist(made, schema=USER)
            source = [{"source": "upload", "locator": row["k"], "collected_at": WHEN} for row in made]
            told = {"_id": [row["k"] for row in made], "_source": source, "_ingested_at": [WHEN] * len(made)}
            system = [pa.array(told.get(f.name, [row["s"] for row in made]), f.type) for f in SYSTEM]
            batch = pa.RecordBatch.from_arrays([*user.columns, *system], schema=pa.schema([*USER, *SYSTEM]))
            secret = "canary00000000@example.com"
            about = versions.About(
                "run", "r" * 32, secret, ({"ref": secret},), (StepCount(secret, 1, 1),),
                {"tokenize": {"tokenizer": "secret", "sha256": "0" * 64}},
            )  # fmt: skip
            versions.append(self.root, self.exchange.catalog, DATASET, [batch], batch.schema, about, "run")
        self.root.tokenizers.mkdir(exist_ok=True)
        (self.root.tokenizers / "secret.json").write_text("canary00000000@example.com")
        self.exchange.catalog.add_run(
            Run(
                "r" * 32, DATASET, "failed", "2026-01-01T00:00:00Z", recipe="canary00000000@example.com", error="canary"
            ),
            "owner",
            ".",
        )
        self._refuse()
        made = self._records(self.case.tail, len(self.case.files))
        for row in self.case.tail:
            # That something was uploaded is told; what, and how much of it, is not.
            some, sink = [one for one in made if one["k"].startswith(row.key)], io.BytesIO()
            if _is_json(row.key):
                known = [{name: value for name, value in one.items() if value is not None} for one in some]
                sink.write(RECORD_SEPARATOR.join(json.dumps(one).encode() for one in known))
            else:
                with pa.ipc.new_stream(sink, USER) as writer:
                    writer.write_table(pa.Table.from_pylist(some, schema=USER))
            form = "json" if _is_json(row.key) else "arrow"
            upload = Upload(DATASET, form, len(some), sink.getvalue(), None, "k")
            self.receipt = self.inbox.append(upload).result().receipt

    def _refuse(self) -> None:
        text = json.dumps(
            {
                name: value
                for name in SECRET
                if self.case.row_filter is not None or mask_of(self.case, name)
                for value in [str(canary(name, 0, None, self.twin))]
            }
        )
        value = str(canary("s", 0, None, self.twin))
        rows = [
            {
                "id": "refused",
                "rule": "schema",
                "field": "s",
                "value": value,
                "reason": f"{value} is wrong",
                "record": text,
                "source": {"source": "upload", "locator": "refused", "collected_at": WHEN},
            }
        ]
        held = quarantine.refused(rows, "inbox", "schema", WHEN)
        versions.quarantine_rows(self.root, self.exchange.catalog, DATASET, [held], "inbox", ("inbox", 1))

    def restrict(self) -> None:
        """Put the policy in force."""
        masks = dict(self.case.masks)
        if self.case.tagged:
            for name in self.case.masks:
                self.exchange.tag_column(OWNER, DATASET, name, f"pii.{name.replace('.', '-')}")
            masks = {f"tag:pii.{name.replace('.', '-')}": mask for name, mask in masks.items()}
        self.exchange.add_policy(OWNER, "def*", "role:consumer", self.case.row_filter, masks)

    # What there is to ask

    def answers(self, probes: list[Probe]) -> list[tuple[str, httpx.Response]]:
        """The answers to ``probes``, and to all that they lead to: pages, signatures, files."""
        return asyncio.run(self._answers(probes))

    async def _answers(self, probes: list[Probe]) -> list[tuple[str, httpx.Response]]:
        found: list[tuple[str, httpx.Response]] = []
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        headers = {"authorization": f"Bearer {self.token}", "accept-encoding": "identity"}
        async with httpx.AsyncClient(transport=transport, base_url="http://there", headers=headers) as client:
            for method, path, more in probes:
                sent = {"json": more} if method == "POST" else {"headers": more}
                answer = await client.request(method, path, **sent)
                found.append((f"{method} {path} {more}", answer))
            found.append(("GET /v1/receipts/", await client.get(f"/v1/receipts/{self.receipt}")))
            for version in [*range(len(self.case.files)), "latest"]:
                found += await self._files(client, version)
        return found

    async def _files(self, client: httpx.AsyncClient, version: int | str) -> list[tuple[str, httpx.Response]]:
        found = []
        answer = await client.get(f"/v1/datasets/{DATASET}/manifest?ref={version}")
        found.append((f"manifest {version}", answer))
        ids = [entry["id"] for entry in answer.json()["files"]]
        signed = await client.post("/v1/files:sign", json={"ids": ids})
        for at, url in enumerate(signed.json()["urls"].values()):
            for part in ({}, {"range": "bytes=-64"}):
                found.append((f"file {version} {at} {part}", await client.get(url, headers=part)))
        for entry in self.exchange.catalog.files(DATASET, len(self.case.files) - 1):
            answer = await client.post("/v1/files:sign", json={"ids": [entry.id]})
            assert answer.status_code == 404, "a whole file was signed for who may see a part"
        return found


_CHANGING = re.compile(
    rb'"(?:urls|expires_at|created_at|request_id)":\s*(?:"[^"]*"|[0-9]+|\{[^}]*\})|v[0-9a-f]{32}|'
    rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z"
)
_RECEIPT = re.compile(rb"there is no receipt '[^']*'")
_TOLD = ("content-type", "etag", "content-length", "retry-after")


def comparable(answer: httpx.Response) -> tuple[Any, ...]:
    """An answer without what the making of it alone decides: random ids, moments."""
    headers = {name: answer.headers.get(name) for name in _TOLD}
    headers["etag"] = re.sub("v[0-9a-f]{32}", "V", headers["etag"] or "")
    return answer.status_code, headers, _RECEIPT.sub(b"", _CHANGING.sub(b"", answer.content))


def laid_open(answer: httpx.Response) -> bytes:
    """The bytes of an answer, and beside those of Parquet what is packed in them."""
    body = answer.content
    if not body.startswith(b"PAR1") or not body.endswith(b"PAR1"):
        return body
    with pq.ParquetFile(io.BytesIO(body)) as file:
        table = file.read().combine_chunks()
        parts = [repr(file.metadata.to_dict()).encode(), json.dumps(table.to_pylist(), default=str).encode()]
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return b"\n".join([body, *parts, sink.getvalue()])
