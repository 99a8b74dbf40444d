"""What the exchange denies: to tokens of few rights, to pages in a browser, to others on the same machine."""

import json
import os
import stat
import threading

import httpx
import pyarrow as pa
import pytest

from conftest import Served, free_port, wait_until
from headrace import deliver
from headrace.client.cache import Cache
from headrace.errors import BadRecipe, Damaged, Forbidden
from headrace.exchange import PREVIEWS_MOST
from headrace.govern import may
from headrace.model import FileEntry, Principal, Token
from headrace.recipe import resolve
from headrace.root import Root

JSON = {"content-type": "application/json"}


@pytest.fixture
def holder(http, shared):
    """Makes a client with a token of some role for some datasets."""
    opened = []

    def make(role, *datasets):
        body = {"name": "someone", "role": role, "datasets": list(datasets)}
        secret = http.post("/v1/tokens", json=body).json()["secret"]
        opened.append(httpx.Client(base_url=shared.url, headers={"authorization": f"Bearer {secret}"}, timeout=60))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


def filled(http, name, *records):
    assert http.post(f"/v1/datasets/{name}/records", json=list(records)).status_code == 200
    wait_until(lambda: http.get(f"/v1/datasets/{name}").json()["version"] is not None, what=f"a version of {name}")
    return name


def recipe(dataset, source, *steps):
    return json.dumps({"dataset": dataset, "collect": [source], "transform": list(steps)})


# ------------------------------------------------------------------------------------------------ pages in a browser


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1"])
def test_the_open_routes_answer_only_to_names_of_this_machine(shared, host):
    assert httpx.get(f"{shared.url}/get_data", headers={"host": host}).status_code == 403
    assert httpx.post(f"{shared.url}/upload", json={"a": 1}, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:5000", "127.0.0.1:1", "[::1]:5000", "app.localhost"])
def test_the_open_routes_answer_under_every_name_of_this_machine(shared, host):
    assert httpx.get(f"{shared.url}/get_data", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1"])
def test_a_foreign_page_cannot_write_through_the_browser_of_a_user(shared, origin):
    before = httpx.get(f"{shared.url}/get_data").json()
    # A page's fetch() of a Blob sends no Content-Type, which asks for no permission first.
    answer = httpx.post(f"{shared.url}/upload", content=b'{"stolen":1}', headers={"origin": origin})
    assert answer.status_code == 403
    assert httpx.get(f"{shared.url}/get_data").json() == before


def test_a_page_of_the_exchange_itself_and_a_holder_of_a_token_may_write(shared, http):
    assert httpx.post(f"{shared.url}/upload", json={"a": 1}, headers={"origin": shared.url}).status_code == 200
    away = {"origin": "http://evil.example", "host": "exchange.example"}
    assert http.post("/upload", json={"a": 1}, headers=away).status_code == 200


def test_no_answer_may_be_taken_for_another_type_by_a_browser(http):
    for path in ("/get_data", "/v1/datasets", "/nowhere", "/docs"):
        assert http.get(path).headers["x-content-type-options"] == "nosniff"


# ------------------------------------------------------------------------------------------------ tokens of few rights


def test_an_admin_of_some_datasets_cannot_make_a_token_for_others(holder):
    some = holder("admin", "mine")
    for answer in (some.post("/v1/tokens", json={"name": "x", "role": "admin"}), some.get("/v1/tokens")):
        assert answer.status_code == 403
    assert may(Principal("a", "admin", ("mine",)), "write", "mine")
    assert not may(Principal("a", "admin", ("mine",)), "manage")
    assert may(Principal("a", "admin", ("x", "*")), "manage")


@pytest.mark.parametrize("secret", ["${env:HOME}", "${env:NOT_SET_HERE}", "${file:/etc/passwd}", "${file:/nowhere}"])
def test_whether_a_secret_exists_is_told_only_to_those_who_manage(holder, secret):
    some = holder("producer", "mine")
    body = {"recipe": recipe("mine", {"files": secret}), "base": "/"}
    (problem,) = some.post("/v1/recipes:check", json=body).json()["problems"]
    assert problem["message"] == "only those who manage the exchange may use its secrets"
    assert some.post("/v1/runs", json=body).status_code == 422


def test_a_secret_is_read_from_plain_small_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * (1 << 20))
    (tmp_path / "good").write_text("  s\n")
    assert resolve("a${file:good}b", tmp_path) == "a  sb"
    for name in ("pipe", "large", "/dev/zero", "."):
        with pytest.raises(BadRecipe):
            resolve(f"${{file:{name}}}", tmp_path)


@pytest.mark.parametrize("path", ["/etc/passwd", "x.json", "sub/one", ".."])
def test_a_tokenizer_given_by_path_needs_the_right_to_read_files_here(http, holder, path):
    name = filled(http, "texts", {"t": "a b"})
    some = holder("producer", name)
    step = {"tokenize": {"tokenizer": path, "column": "t"}}
    for route, more in (("/v1/runs", {}), ("/v1/runs:preview", {"rows": 1})):
        answer = some.post(route, json={"recipe": recipe(name, {"dataset": name}, step), "base": "/", **more})
        assert answer.status_code == 403, answer.text


def test_signing_a_foreign_file_answers_as_for_a_file_that_is_not_there(http, holder):
    name = filled(http, "hidden", {"a": 1})
    held = http.get(f"/v1/datasets/{name}/manifest").json()["files"][0]["id"]
    some = holder("consumer", "other")
    answers = [some.post("/v1/files:sign", json={"ids": [id]}) for id in (held, "0" * 32)]
    told = [{k: v for k, v in a.json()["error"].items() if k != "request_id"} for a in answers]
    assert [a.status_code for a in answers] == [404, 404]
    assert told[0] == told[1]


# ------------------------------------------------------------------------------------------------ cheap requests


def test_a_large_body_is_refused_where_it_would_be_held_in_memory(http):
    body = b'{"ids":["' + b"a" * (5 << 20) + b'"]}'
    for content in (body, iter([body])):
        answer = http.post("/v1/files:sign", content=content, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert http.post("/v1/files:sign", json={"ids": []}).json()["urls"] == {}


def test_previews_that_wait_leave_the_exchange_answering(tmp_path):
    # A worker that cannot start: previews wait, as they would behind a long run.
    served = Served(tmp_path / "root", free_port(), open=True, env={"HEADRACE_FLUSH_AGE_S": "0.05"}).start()
    try:
        with served.client() as http:
            filled(http, "rows", {"a": 1})
            for pid in served.workers():
                os.kill(pid, 19)
            body = {"recipe": recipe("out", {"dataset": "rows"}), "rows": 1}
            answers = []

            def ask():
                answers.append(http.post("/v1/runs:preview", json=body, timeout=60).status_code)

            threads = [threading.Thread(target=ask) for _ in range(PREVIEWS_MOST + 12)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(answers) == 12, what="the refusal of previews beyond the limit")
            assert httpx.get(f"{served.url}/get_data", timeout=5).status_code == 200
            for pid in served.workers():
                os.kill(pid, 18)
            for thread in threads:
                thread.join()
        assert sorted(answers) == [200] * PREVIEWS_MOST + [503] * 12
    finally:
        served.stop()


@pytest.mark.parametrize("token", ["٣", "²", "1e3", "-1", "9" * 19])
def test_a_page_token_of_other_digits_is_refused(http, token):
    name = filled(http, "paged", {"a": 1})
    for route in ("manifest", "versions", "quarantine"):
        assert http.get(f"/v1/datasets/{name}/{route}", params={"page_token": token}).status_code == 400


def test_a_large_step_is_traced_in_one_pass_over_its_files(http):
    name = filled(http, "many", *({"n": n} for n in range(20_000)))
    params = {"ref": "0", "step": 0, "batch_size": 20_000, "shuffle": "global", "seed": 3}
    rows = http.get(f"/v1/datasets/{name}/trace", params=params, timeout=20).json()["items"]
    assert sorted(row["row"] for row in rows) == list(range(20_000))
    assert all(row["id"].endswith(f"-{row['row']:08d}") for row in rows)
    one = http.get(f"/v1/datasets/{name}/trace", params={**params, "batch_size": 3, "step": 5}).json()["items"]
    assert [r["id"] for r in one] == [r["id"] for r in rows[15:18]]


# ------------------------------------------------------------------------------------------------ files on the disk


def test_nothing_below_a_root_that_others_may_enter_is_theirs_to_read(tmp_path):
    (tmp_path / "root").mkdir(mode=0o755)
    served = Served(tmp_path / "root", free_port(), open=True).start()
    try:
        with served.client() as http:
            filled(http, "kept", {"a": 1})
        open_to_all = [p for p in served.root.iterdir() if p.stat().st_mode & 0o077]
    finally:
        served.stop()
    assert open_to_all == []


def test_a_signing_key_is_whole_or_refused(tmp_path):
    root = Root.at(tmp_path)
    first = deliver.Signer(root)
    expires, signature = first.sign("f", "p")
    deliver.Signer(root).check("f", expires, "p", signature)
    path = root.keys / "urls"
    assert (stat.S_IMODE(path.stat().st_mode), [p.name for p in root.keys.iterdir()]) == (0o600, ["urls"])
    path.write_bytes(b"")
    with pytest.raises(Damaged):
        deliver.Signer(root)


def test_a_token_does_not_show_its_secret():
    assert "hr_" not in repr(Token("1", "a", "admin", ("*",), "now", secret="hr_x"))


def test_a_cache_that_others_could_write_is_closed_or_refused(tmp_path):
    schema = pa.schema([("a", pa.int8())])
    entry = FileEntry("f", 1, 1, "0" * 64, 0)
    folder = tmp_path / "cache"
    for part in (folder, folder / "files"):
        part.mkdir()
        part.chmod(0o777)
    with pytest.raises(ZeroDivisionError):
        Cache(folder).ensure(entry, schema, lambda *_: 1 / 0)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (folder, folder / "files")] == [0o700, 0o700]
    if os.geteuid() == 0:
        os.chown(folder / "files", 12345, -1)
        with pytest.raises(Forbidden):
            Cache(folder).ensure(entry, schema, lambda *_: 1 / 0)
