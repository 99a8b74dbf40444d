"""Uploads over HTTP: what is sent for what people hand over, and what is repeated when an answer is lost."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from headrace import errors
from headrace.client.connect import RemoteSession
from headrace.client.payload import format_of
from headrace.model import Run, to_dict
from peer import LOST, Answer, Peer, answer, failure, peer

NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
RECORDS = "/v1/datasets/d/records"
RECEIPT = {"accepted": 2, "rejected": 0, "duplicates": 0, "receipt": "ab", "errors": []}


@pytest.fixture
def there() -> Iterator[Peer]:
    with peer() as found:
        found.on[f"POST {RECORDS}"] = answer(RECEIPT)
        yield found


@pytest.fixture
def ex(there: Peer) -> Iterator[RemoteSession]:
    with RemoteSession(there.url, "s3cret-token") as session:
        yield session


# Uploads: what is sent.


def test_dicts_arrive_as_ndjson_with_every_value_kept(ex: RemoteSession, there: Peer) -> None:
    record = {
        "big": 2**70,
        "array": np.arange(3, dtype=np.int32),
        "scalar": np.float32(1.5),
        "when": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
        "price": decimal.Decimal("1.20"),
        "text": "水车",
    }
    receipt = ex.upload("d", [record, {"x": None}])
    assert (receipt.accepted, receipt.receipt, receipt.dataset) == (2, "ab", "d")
    sent = [json.loads(line) for line in there.calls[0].body.splitlines()]
    assert sent == [
        {
            "big": 2**70,
            "array": [0, 1, 2],
            "scalar": 1.5,
            "when": "2026-01-02T03:04:05+00:00",
            "price": "1.20",
            "text": "水车",
        },
        {"x": None},
    ]
    assert there.calls[0].headers["content-type"] == NDJSON


def test_one_dict_is_one_record_and_a_long_or_lazy_list_is_streamed(ex: RemoteSession, there: Peer) -> None:
    ex.upload("d", {"x": 1})
    ex.upload("d", [{"x": i} for i in range(2000)])
    ex.upload("d", ({"x": i} for i in range(3)))
    assert [len(call.body.splitlines()) for call in there.calls] == [1, 2000, 3]
    assert "content-length" in there.calls[0].headers
    assert there.calls[1].headers["transfer-encoding"] == "chunked"


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"x": 1}, {"a": {"b": [0.0, float("nan")]}}], "record 1 holds NaN or infinity at a.b[1]"),
        ([{"x": np.array([1.0, np.inf])}], "record 0 holds NaN or infinity at x[1]"),
        ([{"x": b"raw"}], "bytes have no JSON form"),
        ([{"x": object()}], "a value of type object has no JSON form"),
        ([[1, 2]], "record 0 is of type list, not a dict"),
    ],
)
def test_a_value_that_json_cannot_say_is_refused_and_nothing_is_sent(
    ex: RemoteSession, there: Peer, records: Any, said: str
) -> None:
    with pytest.raises(errors.BadData) as caught:
        ex.upload("d", records)
    assert said in caught.value.message
    assert there.calls == []


@pytest.mark.parametrize(
    "value",
    [
        pa.table({"x": [1, 2, 3], "s": ["a", "b", "水"]}),
        pa.table({"x": [1, 2, 3], "s": ["a", "b", "水"]}).combine_chunks().to_batches()[0],
        pd.DataFrame({"x": [1, 2, 3], "s": ["a", "b", "水"]}),
        pl.DataFrame({"x": [1, 2, 3], "s": ["a", "b", "水"]}),
        pl.LazyFrame({"x": [1, 2, 3], "s": ["a", "b", "水"]}),
    ],
    ids=lambda value: type(value).__module__.split(".")[0] + type(value).__name__,
)
def test_tables_and_frames_arrive_as_an_arrow_stream(ex: RemoteSession, there: Peer, value: Any) -> None:
    ex.upload("d", value)
    call = there.calls[0]
    assert call.headers["content-type"] == ARROW
    assert pa.ipc.open_stream(call.body).read_all().to_pydict() == {"x": [1, 2, 3], "s": ["a", "b", "水"]}


def test_a_reader_is_sent_batch_by_batch(ex: RemoteSession, there: Peer) -> None:
    table = pa.table({"x": list(range(10))})
    ex.upload("d", pa.RecordBatchReader.from_batches(table.schema, iter(table.to_batches(max_chunksize=4))))
    reader = pa.ipc.open_stream(there.calls[0].body)
    assert [batch.num_rows for batch in reader] == [4, 4, 2]


@pytest.mark.parametrize(
    ("name", "content_type", "encoding"),
    [
        ("a.json", "application/json", None),
        ("a.jsonl", NDJSON, None),
        ("a.2024.ndjson.gz", NDJSON, "gzip"),
        ("a.csv.zst", "text/csv", "zstd"),
        ("a.parquet", "application/vnd.apache.parquet", None),
        ("a.arrow", ARROW, None),
    ],
)
def test_a_file_is_sent_as_it_is_and_its_suffixes_say_what_it_is(
    ex: RemoteSession, there: Peer, tmp_path: Path, name: str, content_type: str, encoding: str | None
) -> None:
    path = tmp_path / name
    path.write_bytes(b"just these bytes")
    ex.upload("d", path)
    ex.upload("d", str(path))
    for call in there.calls:
        assert call.body == b"just these bytes"
        assert call.headers["content-type"] == content_type
        assert call.headers.get("content-encoding") == encoding
        assert call.headers["content-length"] == "16"


@pytest.mark.parametrize("packed", [False, True])
def test_tabs_become_commas(ex: RemoteSession, there: Peer, tmp_path: Path, packed: bool) -> None:
    text = 'a\tb\n1\t"x,y"\n2\tz\n'.encode("utf-8-sig")
    path = tmp_path / ("t.tsv.gz" if packed else "t.tsv")
    path.write_bytes(gzip.compress(text) if packed else text)
    ex.upload("d", path)
    assert there.calls[0].body == b'a,b\n1,"x,y"\n2,z\n'
    assert there.calls[0].headers["content-type"] == "text/csv"


def test_an_arrow_file_becomes_a_stream(ex: RemoteSession, there: Peer, tmp_path: Path) -> None:
    table = pa.table({"x": [1, 2, 3]})
    with pa.ipc.new_file(tmp_path / "t.feather", table.schema) as writer:
        writer.write_table(table)
    ex.upload("d", tmp_path / "t.feather")
    assert pa.ipc.open_stream(there.calls[0].body).read_all() == table


def test_an_open_file_goes_from_where_it_stands(ex: RemoteSession, there: Peer, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,b\n1,2\n")
    with (tmp_path / "t.csv").open("rb") as file:
        ex.upload("d", io.BytesIO(b'{"x":1}\n'), format="ndjson")
        file.seek(4)
        ex.upload("d", file, format="json")
    assert [call.body for call in there.calls] == [b'{"x":1}\n', b"1,2\n"]


@pytest.mark.parametrize(
    ("records", "kind", "error"),
    [
        ("missing.csv", None, errors.NotFound),
        (io.StringIO("x"), "csv", errors.BadRequest),
        (io.BytesIO(b"x"), None, errors.BadRequest),
        (io.BytesIO(b"x"), "xml", errors.BadRequest),
        (b"x", None, errors.BadRequest),
        (7, None, errors.BadRequest),
    ],
)
def test_what_cannot_be_uploaded_says_what_can(ex: RemoteSession, records: Any, kind: str | None, error: type) -> None:
    with pytest.raises(error) as caught:
        ex.upload("d", records, format=kind)
    assert caught.value.hint


def test_a_bad_dataset_name_never_leaves_this_machine(ex: RemoteSession, there: Peer) -> None:
    with pytest.raises(errors.BadRef):
        ex.upload("../catalog", [{"x": 1}])
    assert there.calls == []


def test_suffixes_are_read_from_the_end() -> None:
    assert format_of("web.2024.JSONL.zst") == ("jsonl", "zstd")
    for name in ("plain", "a.gz", "a.txt", "json"):
        with pytest.raises(errors.BadRequest, match="does not say its format"):
            format_of(name)


def test_progress_hears_every_byte(ex: RemoteSession, there: Peer, tmp_path: Path) -> None:
    (tmp_path / "big.csv").write_bytes(b"x" * 2_500_000)
    heard: list[tuple[int, int | None]] = []
    ex.upload("d", tmp_path / "big.csv", on_progress=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (2_500_000, 2_500_000)
    assert len(heard) == 3
    assert there.calls[0].body == b"x" * 2_500_000


# Retries.


@pytest.mark.parametrize("first", [LOST, failure("busy", 503, Retry_After="0"), Answer(b"starting", 502)])
@pytest.mark.parametrize("records", [[{"x": 1}], [{"x": i} for i in range(600)], pa.table({"x": [1]})])
def test_an_upload_is_repeated_under_the_same_key(ex: RemoteSession, there: Peer, first: Answer, records: Any) -> None:
    there.on[f"POST {RECORDS}"] = [first, answer(RECEIPT)]
    assert ex.upload("d", records, key="x").accepted == 2
    one, two = there.calls
    assert one.body == two.body
    assert one.headers["idempotency-key"] == two.headers["idempotency-key"]
    assert one.query == two.query == {"key": "x"}


def test_each_upload_has_a_key_of_its_own_and_a_given_one_is_kept(ex: RemoteSession, there: Peer) -> None:
    ex.upload("d", [{"x": 1}])
    ex.upload("d", [{"x": 1}])
    ex.upload("d", [{"x": 1}], idempotency_key="mine")
    keys = [call.headers["idempotency-key"] for call in there.calls]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_what_can_be_read_only_once_is_sent_only_once(ex: RemoteSession, there: Peer) -> None:
    there.on[f"POST {RECORDS}"] = [LOST, answer(RECEIPT)]
    with pytest.raises(errors.Unreachable):
        ex.upload("d", ({"x": i} for i in range(3)))
    assert len(there.calls) == 1


def test_a_seekable_file_is_repeated_from_where_it_stood(ex: RemoteSession, there: Peer) -> None:
    there.on[f"POST {RECORDS}"] = [LOST, answer(RECEIPT)]
    file = io.BytesIO(b'{"x":1}\n{"x":2}\n')
    file.seek(8)
    ex.upload("d", file, format="ndjson")
    assert [call.body for call in there.calls] == [b'{"x":2}\n'] * 2


def test_a_run_is_not_started_twice(ex: RemoteSession, there: Peer) -> None:
    there.on["POST /v1/runs"] = [
        failure("busy", 503, Retry_After="0"),
        LOST,
        answer(to_dict(Run("r1", "d", "queued", "t"))),
    ]
    with pytest.raises(errors.Unreachable):
        ex.run("dataset: d\n", wait=False)
    assert len(there.calls) == 2


def test_tries_are_bounded(ex: RemoteSession, there: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_RETRIES", "3")
    there.on["GET /v1/datasets"] = failure("busy", 503, "full", Retry_After="0")
    with pytest.raises(errors.Busy, match="full"):
        ex.datasets()
    assert len(there.calls) == 3
