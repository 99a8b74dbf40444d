"""The session over HTTP: what is sent for what people upload, what is retried, what errors say."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import headrace
from headrace import errors
from headrace.client.connect import RemoteSession
from headrace.model import Dataset, Ref, Run, StepCount, Version, to_dict
from peer import LOST, Answer, Call, Peer, answer, failure, peer

NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
RECORDS = "/v1/datasets/d/records"
RECEIPT = {"accepted": 2, "rejected": 0, "duplicates": 0, "receipt": "ab", "errors": []}
RECIPE = "dataset: d\ncollect: []\n"


@pytest.fixture
def there() -> Iterator[Peer]:
    with peer() as found:
        found.on[f"POST {RECORDS}"] = answer(RECEIPT)
        yield found


@pytest.fixture
def ex(there: Peer) -> Iterator[RemoteSession]:
    with RemoteSession(there.url, "s3cret-token") as session:
        yield session


def version(number: int = 3, **more: Any) -> dict[str, Any]:
    made = Version(
        dataset="d",
        version=number,
        created_at="2026-01-01T00:00:00Z",
        kind="run",
        rows=10,
        bytes=100,
        files=1,
        fingerprint="f" * 64,
        schema=({"name": "x", "type": "int64"},),
        block_rows=8,
        delta_version=1,
        splits={"train": 8, "val": 2},
    )
    return {**to_dict(made), **more}


def run(status: str, **more: Any) -> dict[str, Any]:
    return {**to_dict(Run("r1", "d", status, "2026-01-01T00:00:00Z")), **more}


def arrow_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


# Errors and secrets.


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("unauthenticated", 401, errors.Unauthenticated),
        ("forbidden", 403, errors.Forbidden),
        ("not_found", 404, errors.NotFound),
        ("conflict", 409, errors.Conflict),
        ("bad_recipe", 422, errors.BadRecipe),
        ("damaged", 500, errors.Damaged),
        ("never heard of", 404, errors.NotFound),
    ],
)
def test_an_error_comes_back_as_what_it_was(
    ex: RemoteSession, there: Peer, code: str, status: int, error: type
) -> None:
    there.on["GET /v1/datasets"] = failure(code, status, "what and why", "what to do")
    with pytest.raises(error) as caught:
        ex.datasets()
    assert (caught.value.message, caught.value.hint) == ("what and why", "what to do")
    assert len(there.calls) == 1


def test_an_exchange_that_is_not_there_is_unreachable_and_no_secret_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADRACE_RETRIES", "1")
    with peer() as gone:
        url = gone.url
    with RemoteSession(url, "s3cret-token") as ex, pytest.raises(errors.Unreachable) as caught:
        ex.datasets()
    assert url in caught.value.message
    assert "headrace serve" in caught.value.hint
    assert "s3cret" not in f"{caught.value!r} {caught.value.to_dict()} {ex!r} {ex._http!r}"
    assert caught.value.__cause__ is None


def test_the_token_goes_with_every_call_but_never_to_another_place(ex: RemoteSession, there: Peer) -> None:
    with peer() as other:
        there.on["GET /v1/datasets"] = Answer(b"", 302, {"Location": other.url})
        with pytest.raises(errors.BadRequest):
            ex.datasets()
        assert other.calls == []
    assert there.calls[0].headers["authorization"] == "Bearer s3cret-token"


@pytest.mark.parametrize("url", ["http://me:pass@host", "ftp://host", "http://", "host:7070"])
def test_a_url_that_is_none_is_refused_without_repeating_its_secrets(url: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        RemoteSession(url)
    assert "pass@" not in str(caught.value) + caught.value.hint
    assert caught.value.hint


def test_something_else_on_the_port_is_said_to_be_something_else(ex: RemoteSession, there: Peer) -> None:
    there.on["GET /v1/datasets"] = Answer(b"<html>hello")
    with pytest.raises(errors.BadRequest, match="does not answer in JSON"):
        ex.datasets()
    there.on["GET /v1/datasets"] = Answer(b"<html>hello", 404)
    with pytest.raises(errors.NotFound):
        ex.datasets()


def test_url_and_token_come_from_the_environment(there: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_URL", there.url + "/")
    monkeypatch.setenv("HEADRACE_TOKEN", "from-env")
    there.on["GET /readyz"] = answer({"status": "ready"})
    with headrace.connect() as ex:
        assert ex.health() == {"status": "ready"}
        assert repr(ex) == f"<Exchange {there.url}>"
    assert there.calls[0].headers["authorization"] == "Bearer from-env"


def test_connect_says_what_a_target_can_be() -> None:
    with pytest.raises(errors.BadRequest, match="s3:// is not how an exchange is reached"):
        headrace.connect("s3://bucket/secret-path")


FORKED = """
import os, pickle, sys
from headrace.client.connect import RemoteSession
ex = RemoteSession(sys.argv[1])
assert ex.datasets() == []
child = os.fork()
assert ex.datasets() == []
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert pickle.loads(pickle.dumps(ex)).datasets() == []
"""


def test_a_session_works_in_a_forked_child_and_through_pickle(there: Peer) -> None:
    there.on["GET /v1/datasets"] = answer({"items": []})
    subprocess.run([sys.executable, "-c", FORKED, there.url], check=True, timeout=60)
    assert len(there.calls) == 4


def test_importing_headrace_and_its_command_loads_nothing_heavy() -> None:
    heavy = "('pyarrow', 'numpy', 'httpx', 'daft', 'deltalake', 'fastapi', 'dbos', 'torch', 'rich')"
    code = f"import sys, headrace, headrace.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Reading.


def test_rows_are_streamed_and_the_question_is_in_the_query(ex: RemoteSession, there: Peer) -> None:
    table = pa.table({"x": [1, 2, 3, 4, 5]})
    there.on[f"GET {RECORDS}"] = Answer(arrow_bytes(table), headers={"Content-Type": ARROW})
    with ex.read("d@gold:train", ["x", "y"], "x > 1", 5) as reader:
        assert [batch.num_rows for batch in reader] == [2, 2, 1]
    call = there.calls[0]
    assert call.query == {"ref": "gold:train", "columns": "x,y", "where": "x > 1", "limit": "5"}
    assert call.headers["accept"] == ARROW
    assert ex.head("d", 5)[4] == {"x": 5}


def test_a_stream_that_breaks_is_an_error_and_never_a_short_table(ex: RemoteSession, there: Peer) -> None:
    body = arrow_bytes(pa.table({"x": list(range(100_000))}))
    there.on[f"GET {RECORDS}"] = Answer(body, cut=len(body) // 2)
    with pytest.raises(errors.Unreachable, match="stopped answering"):
        ex.read("d").read_all()


def test_an_answer_that_is_no_arrow_is_damaged(ex: RemoteSession, there: Peer) -> None:
    there.on[f"GET {RECORDS}"] = Answer(b"<html>a proxy's greeting")
    with pytest.raises(errors.Damaged, match="no Arrow stream"):
        ex.read("d")


def test_get_data_gives_numbers_as_they_were(ex: RemoteSession, there: Peer) -> None:
    there.on["GET /get_data"] = Answer(b'[{"x":1180591620717411303424,"y":1.0}]')
    assert ex.get_data(limit=1) == [{"x": 2**70, "y": 1.0}]
    assert there.calls[0].query == {"limit": "1"}


def test_pages_are_joined_up_to_the_limit(ex: RemoteSession, there: Peer) -> None:
    def page(call: Call) -> Answer:
        first = int(call.query.get("page_token", 0))
        size = int(call.query["limit"])
        row = {"run": "r", "step": "s", "rule": "null", "reason": "because", "at": "t", "record": "{}"}
        items = [{"id": str(first + i), **row} for i in range(min(size, 40))]
        return answer({"items": items, "next_page_token": str(first + len(items))})

    there.on["GET /v1/datasets/d/quarantine"] = page
    found = ex.quarantine("d", rule="null", limit=100)
    assert [row.id for row in found] == [str(i) for i in range(100)]
    assert there.calls[0].query["rule"] == "null"
    pages = [answer({"items": [version(2)], "next_page_token": "1"}), answer({"items": [version(1)]})]
    there.on["GET /v1/datasets/d/versions"] = pages
    assert [v.version for v in ex.versions("d")] == [2, 1]


@pytest.mark.parametrize(("given", "sent"), [(True, "window"), (False, "false"), ("global", "global")])
def test_trace_asks_for_a_step_with_the_feeds_order(ex: RemoteSession, there: Peer, given: Any, sent: str) -> None:
    item = {"row": 4, "id": "a", "sources": [{"source": "s", "locator": "f#1"}], "rank": 0, "step": 7}
    there.on["GET /v1/datasets/d/trace"] = answer({"items": [item]})
    found = ex.trace("d@3", step=7, seed=5, epoch=1, batch_size=8, world_size=2, shuffle=given)
    assert (found[0].id, found[0].sources[0]["locator"]) == ("a", "f#1")
    assert there.calls[0].query == {
        "ref": "3", "step": "7", "seed": "5", "epoch": "1", "batch_size": "8", "world_size": "2", "shuffle": sent,
    }  # fmt: skip


def test_trace_needs_exactly_one_question(ex: RemoteSession) -> None:
    for asked in ({}, {"step": 1, "row": "a"}):
        with pytest.raises(errors.BadRequest, match="exactly one"):
            ex.trace("d@3", **asked)


# Runs.


def test_run_waits_and_tells_how_far_it_is(ex: RemoteSession, there: Peer, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    there.on["POST /v1/runs"] = answer(run("queued"), 202)
    states = [run("running", progress=0.5, stage="clean"), run("running", progress=0.5, stage="clean")]
    there.on["GET /v1/runs/r1"] = [answer(s) for s in [*states, run("succeeded", version=4, progress=1.0)]]
    heard: list[tuple[str, float]] = []
    done = ex.run(tmp_path / "r.yaml", on_progress=lambda r: heard.append((r.status, r.progress)))
    assert (done.version, heard) == (4, [("running", 0.5), ("succeeded", 1.0)])
    assert json.loads(there.calls[0].body) == {"recipe": RECIPE, "base": str(tmp_path)}


@pytest.mark.parametrize(
    ("code", "error"), [("expectation_failed", errors.ExpectationFailed), (None, errors.RunFailed)]
)
def test_a_run_that_fails_raises_its_own_error(ex: RemoteSession, there: Peer, code: str | None, error: type) -> None:
    there.on["POST /v1/runs"] = answer(run("queued"))
    there.on["GET /v1/runs/r1"] = answer(run("failed", error="too few rows", hint="lower it", error_code=code))
    with pytest.raises(error) as caught:
        ex.run(RECIPE)
    assert (caught.value.message, caught.value.hint, caught.value.details) == (
        "too few rows",
        "lower it",
        {"run": "r1"},
    )


def test_a_cancelled_run_is_a_conflict(ex: RemoteSession, there: Peer) -> None:
    there.on["GET /v1/runs/r1"] = answer(run("cancelled"))
    with pytest.raises(errors.Conflict, match="cancelled"):
        ex.wait("r1")


def test_recipes_are_files_or_text(ex: RemoteSession, there: Peer, tmp_path: Path) -> None:
    there.on["POST /v1/recipes:check"] = answer({"problems": [{"line": 1, "what": "unknown key"}]})
    there.on["POST /v1/runs:preview"] = answer({"rows": 3})
    assert ex.check_recipe(RECIPE) == [{"line": 1, "what": "unknown key"}]
    assert ex.preview("dataset: d", rows=3) == {"rows": 3}
    assert json.loads(there.calls[1].body)["rows"] == 3
    with pytest.raises(errors.NotFound, match="no recipe file"):
        ex.run(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(errors.BadRecipe, match="not UTF-8"):
        ex.check_recipe(tmp_path / "bad.yaml")


# Views, tags, tokens.


@pytest.fixture
def view(ex: RemoteSession, there: Peer) -> headrace.client.session.DatasetView:
    there.on["GET /v1/datasets/d"] = answer(to_dict(Dataset("d", "t", 3, 10, tags={"gold": 3})))
    there.on["GET /v1/datasets/d/versions/latest"] = answer(version())
    there.on["GET /v1/datasets/d/versions/gold:train"] = answer(version())
    there.on[f"GET {RECORDS}"] = Answer(arrow_bytes(pa.table({"x": [1, 2], "t": ["<b>", "水"]})))
    return ex.dataset("d")


def test_a_view_shows_what_it_is(view: Any) -> None:
    assert (view.ref, view.version, view.rows, len(view), view.fingerprint) == ("d@latest", 3, 10, 10, "f" * 64)
    assert repr(view) == "<Dataset d@latest: version 3, 10 rows>"
    assert view.schema.names == ["x", "t"]
    page = view._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "gold: 3" in page


def test_a_view_gives_its_rows_in_every_form(view: Any) -> None:
    rows = [{"x": 1, "t": "<b>"}, {"x": 2, "t": "水"}]
    assert view.head() == view.to_arrow().to_pylist() == rows
    assert view.to_pandas().to_dict("records") == rows
    assert view.to_polars().to_dicts() == rows


def test_a_view_of_a_split_counts_its_rows_and_tags_the_version_it_saw(
    ex: RemoteSession, there: Peer, view: Any
) -> None:
    train = ex.dataset("d@gold:train")
    assert train.rows == 8
    there.on["POST /v1/datasets/d/tags"] = answer(version(tags=["best"]))
    assert view.tag("best").tags == ("best",)
    assert json.loads(there.calls[-1].body) == {"name": "best", "ref": "3"}
    same = {"base": "d@3", "other": "d@3", "added": 0, "removed": 0, "changed": 0, "same": 10}
    there.on["GET /v1/datasets/d/diff"] = answer(same)
    assert view.diff(view).same == 10
    assert there.calls[-1].query == {"base": "d@3", "other": "d@3"}


def test_a_view_of_a_newborn_dataset_waits_for_its_version(ex: RemoteSession, there: Peer) -> None:
    there.on["GET /v1/datasets/d"] = answer(to_dict(Dataset("d", "t", None, pending=5)))
    view = ex.dataset("d")
    assert (view.version, view.rows, view.fingerprint) == (None, 5, None)
    assert "no version yet" in repr(view)
    with pytest.raises(errors.Conflict, match="no version yet"):
        view.tag("gold")


def test_bad_refs_and_tags_are_refused_before_a_call(ex: RemoteSession, there: Peer) -> None:
    for call in (lambda: ex.show("D@1"), lambda: ex.tag("d@1", "7"), lambda: ex.versions("../x")):
        with pytest.raises(errors.BadRef):
            call()
    with pytest.raises(errors.BadRequest, match="below 0"):
        ex.read("d", limit=-1)
    assert there.calls == []


def test_a_new_tokens_secret_is_in_the_answer(ex: RemoteSession, there: Peer) -> None:
    made = {"id": "t1", "principal": "ana", "role": "consumer", "datasets": ["d"], "created_at": "t", "secret": "hr_x"}
    there.on["POST /v1/tokens"] = [LOST, answer(made, 201)]
    with pytest.raises(errors.Unreachable):
        ex.create_token("ana", datasets=["d"])
    assert ex.create_token("ana", datasets=["d"], days=3).secret == "hr_x"
    assert json.loads(there.calls[1].body) == {"name": "ana", "role": "consumer", "datasets": ["d"], "days": 3}
    there.on["GET /v1/tokens"] = answer({"items": [made | {"secret": None}]})
    assert ex.tokens()[0].secret is None
    there.on["DELETE /v1/tokens/t1"] = answer(made)
    ex.revoke_token("t1")


def test_runs_and_versions_have_a_table_for_notebooks() -> None:
    done = Run("r1", "d", "succeeded", "t", steps=(StepCount("unicode", 3, 2, 1, rules={"<i>": 1}),))
    page = done._repr_html_()
    assert "unicode" in page
    assert "&lt;i&gt;: 1" in page
    assert str(Ref.parse("d@3")) == "d@3"
