"""The server over real HTTP: what it takes, what it refuses and how, what it gives."""

import gzip
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import orjson
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import zstandard

from conftest import MAIN, Served, free_port, wait_until

NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"


@pytest.fixture
def name():
    return f"d-{uuid.uuid4().hex[:12]}"


def post(http, name, body, kind="application/json", **headers):
    headers = {"content-type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
    return http.post(f"/v1/datasets/{name}/records", content=body, headers=headers)


def rows(http, name, **params):
    answer = http.get(f"/v1/datasets/{name}/records", params=params, headers={"accept": NDJSON})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def datasets(http):
    return {d["name"] for d in http.get("/v1/datasets").json()["items"]}


def assert_error(answer, status, code=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"code", "message", "hint", "request_id"} <= set(error)
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["message"]
    assert code in (None, error["code"])
    return error


def table_bytes(table, kind):
    sink = io.BytesIO()
    if kind == PARQUET:
        pq.write_table(table, sink)
    elif kind == ARROW:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        pa_csv.write_csv(table, sink)
    return sink.getvalue()


# ------------------------------------------------------------------------------------------------ taking data


def test_a_plain_client_posts_records_and_gets_the_same_back_in_order(serve):
    records = [{"features": [i + 0.5, -1e-7, 3], "label": [i]} for i in range(30)]
    for record in records:
        answer = httpx.post(f"{serve.url}/upload", json=record)
        assert answer.json() | {"receipt": ""} == {
            "status": "success",
            "message": "1 record stored",
            "accepted": 1,
            "receipt": "",
        }
    assert httpx.get(f"{serve.url}/get_data").json() == records
    assert httpx.post(f"{serve.url}/upload", json=records[:3]).json()["accepted"] == 3
    assert httpx.get(f"{serve.url}/get_data").json() == records + records[:3]
    assert httpx.get(f"{serve.url}/get_data?limit=2&offset=29").json() == [records[29], records[0]]
    with serve.client() as http:
        seen = serve.log.read_text()
        assert http.get("/get_data").json()[0] == records[0]
        assert serve.token not in seen.split("\n", 3)[3]


def test_records_come_back_as_sent_even_where_parsers_differ(serve):
    text = '[{"big":1180591620717411303424,"a":1,"A":2},{"_id":"mine","x":1.0},{"中文":"值","e":"\\u00e9"}]'
    httpx.post(f"{serve.url}/upload", content=text, headers={"content-type": "application/json"})
    assert httpx.get(f"{serve.url}/get_data").text == text


@pytest.mark.parametrize("coding", ["identity", "gzip", "zstd"])
def test_ndjson_is_taken_under_every_coding_and_spooled_when_large(http, name, coding):
    lines = [orjson.dumps({"n": n, "text": "x" * 80}) for n in range(60_000)]
    body = b"\n".join(lines)
    body = {"identity": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}[coding](body)
    answer = post(http, name, body, NDJSON, content_encoding=coding)
    assert answer.json()["accepted"] == 60_000, answer.text
    got = rows(http, name)
    assert (len(got), got[0]["n"], got[-1]["n"]) == (60_000, 0, 59_999)


@pytest.mark.parametrize("kind", ["text/csv", ARROW, PARQUET])
def test_tables_are_taken(http, name, kind):
    table = pa.table({"n": list(range(1000)), "word": [f"w{n}" for n in range(1000)]})
    answer = post(http, name, table_bytes(table, kind), kind)
    assert answer.json()["accepted"] == 1000, answer.text
    receipt = http.get(f"/v1/receipts/{answer.json()['receipt']}").json()
    assert (receipt["dataset"], receipt["accepted"]) == (name, 1000)


def test_good_lines_are_stored_and_bad_ones_listed_with_their_index(http, name):
    answer = post(http, name, b'{"a":1}\n{"a":NaN}\n{"a":2}\nnope\n', NDJSON).json()
    assert (answer["accepted"], answer["rejected"]) == (2, 2)
    assert [error["index"] for error in answer["errors"]] == [1, 3]
    assert [row["a"] for row in rows(http, name)] == [1, 2]


def test_an_empty_array_is_accepted_and_stores_nothing(http, name):
    before = datasets(http)
    assert post(http, name, b"[]").json()["accepted"] == 0
    assert datasets(http) - before <= {name}


def test_the_same_key_and_body_is_stored_once(http, name):
    first = post(http, name, b'{"a":1}', idempotency_key="k1").json()
    again = post(http, name, b'{"a":1}', idempotency_key="k1").json()
    assert (first["receipt"], first["duplicates"]) == (again["receipt"], 0)
    assert again["duplicates"] == 1
    assert_error(post(http, name, b'{"a":2}', idempotency_key="k1"), 409, "conflict")
    assert len(rows(http, name)) == 1


def test_a_client_that_hangs_up_in_the_middle_changes_nothing(shared, http, name):
    before = {p.name for p in (shared.root / "inbox").iterdir()}
    with socket.create_connection(("127.0.0.1", shared.port)) as raw:
        head = f"POST /v1/datasets/{name}/records HTTP/1.1\r\nHost: x\r\nContent-Type: {NDJSON}\r\n"
        head += f"Authorization: Bearer {shared.token}\r\nContent-Length: 30000000\r\n\r\n"
        raw.sendall(head.encode() + b'{"a":1}\n' * 1_000_000)
    wait_until(lambda: {p.name for p in (shared.root / "inbox").iterdir()} <= before, 15, "the spooled file's end")
    assert name not in datasets(http)


# ------------------------------------------------------------------------------------------------ refusing

DEEP = b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
BAD_JSON = {
    "invalid": b'{"a":1',
    "two values": b'{"a":1},{"b":2}',
    "empty": b"",
    "NaN": b'{"a":NaN}',
    "Infinity": b'[{"a":1},{"a":-Infinity}]',
    "deep": DEEP,
    "deep array": b"[" * 10_000 + b"]" * 10_000,
    "UTF-8": b'{"a":"\xff\xfe"}',
    "a number": b"7",
    "an array of numbers": b"[1,2]",
    "a lone surrogate": b'{"a":"\\ud800"}',
    "text after": b'{"a":1} x',
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_refused_and_changes_nothing(http, name, case):
    before = http.get("/get_data").content
    answer = http.post("/upload", content=BAD_JSON[case], headers={"content-type": "application/json"})
    assert_error(answer, 400, "bad_data")
    assert http.get("/get_data").content == before
    if case != "Infinity":
        assert_error(post(http, name, BAD_JSON[case]), 400, "bad_data")
        assert name not in datasets(http)


@pytest.mark.parametrize("kind", [NDJSON, "text/csv", ARROW, PARQUET])
def test_a_body_of_another_format_is_refused(http, name, kind):
    error = assert_error(post(http, name, b"\x00\x01 not this \xff", kind), 400, "bad_data")
    assert error["hint"]
    assert name not in datasets(http)


WHOLE = b'{"a":1}\n' * 5000


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("gzip", gzip.compress(WHOLE)[:-20], 400),
        ("zstd", zstandard.compress(os.urandom(1000) + WHOLE)[:-20], 400),
        ("gzip", WHOLE, 400),
        ("zstd", WHOLE, 400),
        ("gzip", gzip.compress(b" " * (64 << 20)), 413),
        ("zstd", zstandard.compress(b" " * (64 << 20)), 413),
        ("br", WHOLE, 415),
    ],
    ids=["cut gzip", "cut zstd", "no gzip", "no zstd", "gzip bomb", "zstd bomb", "unknown coding"],
)
def test_a_bad_content_coding_is_refused(http, name, coding, body, status):
    assert_error(post(http, name, body, NDJSON, content_encoding=coding), status)
    assert name not in datasets(http)


def test_a_body_above_the_limit_is_refused_whether_declared_or_not(http, shared, name):
    before = {p.name for p in (shared.root / "inbox").iterdir()}
    large = b'{"a":"' + b"x" * 1000 + b'"}\n'
    assert_error(post(http, name, large * 40_000, NDJSON), 413, "too_large")
    chunks = (large * 1000 for _ in range(40))
    answer = http.post(f"/v1/datasets/{name}/records", content=chunks, headers={"content-type": NDJSON})
    assert_error(answer, 413, "too_large")
    assert name not in datasets(http)
    assert {p.name for p in (shared.root / "inbox").iterdir()} <= before


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", ""])
def test_an_unknown_content_type_is_refused(http, name, kind):
    assert_error(post(http, name, b"{}", kind), 415, "unsupported_type")


@pytest.mark.parametrize("bad", ["..", ".hidden", "UPPER", "a b", "%2e%2e%2fetc", "..%5c..%5cetc", "a" * 129, "é"])
def test_names_that_could_leave_the_root_are_refused(http, shared, bad):
    for answer in (
        post(http, bad, b'{"a":1}'),
        http.get(f"/v1/datasets/{bad}/records"),
        http.get(f"/v1/datasets/{bad}"),
    ):
        assert answer.status_code in (400, 404, 405), answer.text
        assert_error(answer, answer.status_code)
    assert not (shared.root.parent / "etc").exists()


@pytest.mark.parametrize("ref", ["-1", "nosuchtag", "99", "../x", "1:no such split", "a@b", "x" * 500])
def test_a_bad_or_unknown_ref_is_refused(http, name, ref):
    post(http, name, b'{"a":1}')
    answer = http.get(f"/v1/datasets/{name}/records", params={"ref": ref})
    assert answer.status_code in (400, 404), answer.text
    assert_error(answer, answer.status_code)


@pytest.mark.parametrize("path", ["", "/records", "/versions", "/manifest", "/quarantine", "/diff?base=1"])
def test_an_unknown_dataset_is_not_found(http, name, path):
    assert_error(http.get(f"/v1/datasets/{name}{path}"), 404, "not_found")
    assert name not in datasets(http)


@pytest.mark.parametrize("query", ["limit=-1", "limit=x", "offset=1.5", "limit=99999999999999999999999", "limit="])
def test_bad_parameters_are_refused(http, query):
    assert_error(http.get(f"/get_data?{query}"), 400, "bad_request")


def test_every_route_answers_errors_in_the_one_shape(http):
    assert_error(http.get("/no/such/route"), 404, "not_found")
    assert_error(http.put("/upload"), 405, "method_not_allowed")
    assert_error(http.post("/get_data"), 405, "method_not_allowed")
    assert_error(http.delete("/v1/datasets"), 405, "method_not_allowed")
    assert_error(http.post("/v1/files:sign", content=b"{"), 422)
    assert_error(http.post("/v1/tokens", json={"name": "x", "colour": "red"}), 422)
    assert_error(http.get("/v1/datasets/x/versions?limit=0"), 422)
    assert_error(http.get("/v1/runs/unknown"), 404, "not_found")
    assert_error(http.get("/v1/receipts/unknown"), 404, "not_found")


def test_the_callers_request_id_is_kept_if_it_is_harmless(http):
    assert http.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/nope", headers={"x-request-id": "abc-2"}).json()["error"]["request_id"] == "abc-2"
    made = http.get("/healthz", headers={"x-request-id": "<b>" + "y" * 100}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)


# ------------------------------------------------------------------------------------------------ who may


def test_without_a_token_only_the_open_routes_answer(shared):
    with httpx.Client(base_url=shared.url) as anyone:
        for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/", "/get_data"):
            assert anyone.get(path).status_code == 200, path
        for path in ("/v1/datasets", "/v1/datasets/default/records", "/metrics", "/v1/tokens", "/no/such/route"):
            assert_error(anyone.get(path), 401, "unauthenticated")
        assert anyone.get("/v1/tokens").headers["www-authenticate"] == "Bearer"
        for header in ("Bearer wrong", "Bearer", "Basic eDp5", "Bearer " + "x" * 5000, "nonsense"):
            assert_error(anyone.get("/get_data", headers={"authorization": header}), 401, "unauthenticated")


def test_without_open_even_upload_needs_a_token(tmp_path):
    served = Served(tmp_path / "root", free_port()).start()
    assert_error(httpx.post(f"{served.url}/upload", json={"a": 1}), 401)
    assert_error(httpx.get(f"{served.url}/get_data"), 401)
    assert httpx.post(f"{served.url}/upload", json={"a": 1}, headers=served.headers).status_code == 200
    assert served.stop() == 0


def test_a_token_works_within_its_datasets_until_it_is_revoked(http, shared):
    made = http.post("/v1/tokens", json={"name": "lab", "role": "producer", "datasets": ["lab-*"]}).json()
    with httpx.Client(base_url=shared.url, headers={"authorization": f"Bearer {made['secret']}"}) as lab:
        assert post(lab, "lab-one", b'{"a":1}').status_code == 200
        assert_error(post(lab, "other", b'{"a":1}'), 403, "forbidden")
        assert http.delete(f"/v1/tokens/{made['id']}").status_code == 200
        assert_error(post(lab, "lab-one", b'{"a":1}'), 401, "unauthenticated")
    assert made["secret"] not in http.get("/v1/tokens").text


# ------------------------------------------------------------------------------------------------ giving data


@pytest.fixture(scope="module")
def sample(shared):
    records = [{"n": n, "word": f"wörd {n}", "list": [n, n + 1], "none": None} for n in range(3000)]
    with shared.client() as http:
        assert post(http, "sample", orjson.dumps(records)).json()["accepted"] == 3000
    return records


def test_records_are_rendered_as_the_client_accepts(http, sample):
    def get(accept):
        answer = http.get("/v1/datasets/sample/records", headers={"accept": accept})
        assert answer.status_code == 200, answer.text
        return answer

    assert [json.loads(line)["n"] for line in get("*/*").text.splitlines()] == list(range(3000))
    assert [row["word"] for row in get("application/json").json()] == [row["word"] for row in sample]
    arrow = pa.ipc.open_stream(get(ARROW).content).read_all()
    assert arrow["list"].to_pylist()[7] == [7, 8]
    parquet = pq.read_table(io.BytesIO(get(f"text/html;q=0.9, {PARQUET}").content))
    assert parquet.select(["n", "word"]).equals(arrow.select(["n", "word"]))
    table = pa_csv.read_csv(io.BytesIO(get("text/csv").content))
    assert table["list"].to_pylist()[7] == "[7,8]"
    assert_error(http.get("/v1/datasets/sample/records", headers={"accept": "image/png"}), 406, "not_acceptable")


def test_columns_and_limit_narrow_a_read(http, sample):
    assert rows(http, "sample", columns="n", limit=2) == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize(("coding", "undo"), [("gzip", gzip.decompress), ("zstd", None), ("identity", bytes)])
def test_answers_are_compressed_as_the_client_accepts(shared, sample, coding, undo):
    undo = undo or (lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data))
    headers = {**shared.headers, "accept-encoding": coding, "accept": NDJSON}
    with httpx.stream("GET", f"{shared.url}/v1/datasets/sample/records", headers=headers) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers.get("content-encoding", "identity") == coding
    assert undo(raw).count(b"\n") == 3000


def test_get_data_knows_what_the_client_has(http):
    http.post("/upload", json={"first": 1})
    etag = http.get("/get_data").headers["etag"]
    assert http.get("/get_data", headers={"if-none-match": etag}).status_code == 304
    http.post("/upload", json={"second": 2})
    assert http.get("/get_data", headers={"if-none-match": etag}).status_code == 200


def test_files_of_a_version_are_served_by_signed_url_whole_or_in_part(http, shared, name):
    post(http, name, b'{"a":1}\n{"a":2}\n', NDJSON)
    wait_until(lambda: http.get(f"/v1/datasets/{name}").json().get("version") is not None, 30, "the first version")
    manifest = http.get(f"/v1/datasets/{name}/manifest").json()
    entry = manifest["files"][0]
    url = http.post("/v1/files:sign", json={"ids": [entry["id"]]}).json()["urls"][entry["id"]]
    body = httpx.get(url).content
    assert (len(body), hashlib.sha256(body).hexdigest()) == (entry["bytes"], entry["sha256"])
    head = httpx.head(url)
    assert (head.status_code, int(head.headers["content-length"]), head.content) == (200, len(body), b"")
    for asked, part in (("bytes=0-3", body[:4]), ("bytes=-4", body[-4:]), (f"bytes={len(body) - 2}-", body[-2:])):
        answer = httpx.get(url, headers={"range": asked})
        assert (answer.status_code, answer.content) == (206, part)
    assert answer.headers["content-range"] == f"bytes {len(body) - 2}-{len(body) - 1}/{len(body)}"
    assert_error(httpx.get(url, headers={"range": f"bytes={len(body)}-"}), 416)
    assert_error(httpx.get(re.sub("sig=[^&]*", "sig=forged", url)), 403, "forbidden")
    assert_error(httpx.get(url.split("?")[0]), 403, "forbidden")
    assert_error(httpx.get(f"{shared.url}/v1/files/..%2f..%2fcatalog.db?exp=4102444800&by=x&sig=y"), 403)


def test_the_openapi_document_describes_the_hot_routes_too(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/upload", "/get_data", "/v1/datasets/{dataset}/records", "/v1/files/{id}", "/v1/runs"} <= set(paths)
    assert set(paths["/v1/datasets/{dataset}/records"]) == {"get", "post"}


def test_metrics_count_uploads(http, name):
    def count():
        return float(re.search(r"^headrace_records_total (\S+)", http.get("/metrics").text, re.M)[1])

    before = count()
    post(http, name, b'[{"a":1},{"a":2}]')
    assert count() == before + 2


# ------------------------------------------------------------------------------------------------ processes


def serve_once(*arguments):
    return subprocess.run([sys.executable, "-c", MAIN, "serve", *arguments], capture_output=True, text=True, timeout=60)


def test_a_second_server_on_the_same_root_or_port_is_refused(shared, tmp_path):
    second = serve_once("--root", str(shared.root), "--port", str(free_port()))
    assert second.returncode == 5
    assert str(shared.process.pid) in second.stderr
    assert serve_once("--root", str(tmp_path / "other"), "--port", str(shared.port)).returncode == 5


def test_open_is_for_this_machine_only(tmp_path):
    refused = serve_once("--root", str(tmp_path / "root"), "--host", "0.0.0.0", "--open")
    assert refused.returncode == 2
    assert "this machine" in refused.stderr


def test_a_stopped_server_exits_cleanly_takes_its_worker_along_and_starts_again(serve):
    httpx.post(f"{serve.url}/upload", json={"a": 1})
    workers = wait_until(serve.workers, what="a worker")
    assert serve.stop(signal.SIGINT) == 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    token = serve.token
    serve.start()
    assert serve.log.read_text().count(token) == 1
    assert httpx.get(f"{serve.url}/get_data").json() == [{"a": 1}]


def test_a_dead_worker_is_replaced_and_a_dead_server_takes_its_worker_along(serve):
    (first,) = wait_until(serve.workers, what="a worker")
    os.kill(first, signal.SIGKILL)
    (second,) = wait_until(lambda: [pid for pid in serve.workers() if pid != first], what="another worker")
    serve.stop(signal.SIGKILL)
    wait_until(lambda: second not in serve.workers(), 30, "the worker's end")


def test_an_idle_server_is_small_and_loads_no_engine(serve):
    process = Path(f"/proc/{serve.process.pid}")
    status = (process / "status").read_text()
    assert int(re.search(r"VmRSS:\s+(\d+)", status)[1]) <= 200 << 10
    maps = (process / "maps").read_text()
    assert not [lib for lib in ("daft", "numba", "deltalake", "torch") if f"/{lib}/" in maps]
