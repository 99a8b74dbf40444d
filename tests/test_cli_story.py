"""The whole way through the public names: the same story embedded, over HTTP, and on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import headrace
from conftest import wait_until
from headrace import errors
from headrace.client.session import Session

PATIENTS = [{"age": 30 + i, "bmi": 20.5 + i, "label": float(i)} for i in range(20)]
DAMAGED = [{"age": 900, "bmi": 21.0, "label": 1.0}, {"age": None, "bmi": 22.0, "label": 2.0}]
RECIPE = """\
dataset: ready
collect:
  - dataset: patients@latest
clean:
  - drop_nulls: [age]
  - check: {age: {max: 150}}
publish: {tag: first}
"""


@pytest.fixture(params=["embedded", "remote"])
def ex(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    if request.param == "embedded":
        with headrace.connect(tmp_path / "root") as session:
            yield session
    else:
        served = request.getfixturevalue("serve")
        with headrace.connect(served.url, token=served.token) as session:
            yield session


def test_records_come_in_are_cleaned_versioned_and_traced(ex: Session) -> None:
    receipt = ex.upload("patients", PATIENTS + DAMAGED)
    assert (receipt.accepted, receipt.rejected) == (22, 0)
    # Every writer reads its own writes, at once.
    assert ex.dataset("patients").to_arrow().num_rows == 22
    assert ex.head("patients", 1) == [PATIENTS[0]]

    run = ex.run(RECIPE)
    assert (run.status, run.rows_in, run.rows_out, run.quarantined) == ("succeeded", 22, 20, 2)
    ready = ex.dataset("ready@first")
    assert (ready.version, ready.rows) == (run.version, 20)
    assert ready.to_arrow().to_pylist() == PATIENTS
    assert ready.to_arrow(columns=["age"], where="age >= 45").to_pydict() == {"age": [45, 46, 47, 48, 49]}
    assert {(row.rule, row.value) for row in ready.quarantine()} >= {("check.max", "900")}
    assert ex.show("ready").tags == ("first",)

    step = ex.trace(f"ready@{run.version}", step=0, batch_size=4)
    assert len(step) == 4
    assert ex.trace("ready@first", row=step[0].id)[0].row == step[0].row
    assert all(row.sources for row in step)

    state = wait_until(lambda: ex.receipt(receipt.receipt).version is not None, what="the flush")
    assert state


def test_versions_differ_by_what_was_added(ex: Session) -> None:
    ex.upload("patients", PATIENTS)
    first = ex.run(RECIPE)
    ex.upload("patients", [{"age": 80, "bmi": 25.0, "label": 3.0}])
    second = ex.run(RECIPE)
    diff = ex.diff(f"ready@{first.version}", f"ready@{second.version}")
    assert (diff.added, diff.removed, diff.same) == (1, 0, 20)
    assert [v.version for v in ex.versions("ready")] == [second.version, first.version]
    ex.tag(f"ready@{first.version}", "gold")
    assert ex.dataset("ready@gold").rows == 20
    assert {d.name for d in ex.datasets()} == {"patients", "ready"}


def test_a_repeated_upload_stores_nothing_twice(ex: Session) -> None:
    one = ex.upload("patients", PATIENTS, idempotency_key="monday")
    two = ex.upload("patients", PATIENTS, idempotency_key="monday")
    assert two.receipt == one.receipt
    assert ex.dataset("patients").to_arrow().num_rows == 20
    with pytest.raises(errors.Conflict):
        ex.upload("patients", DAMAGED, idempotency_key="monday")


def test_files_and_tables_of_every_kind_come_back_equal(ex: Session, tmp_path: Path) -> None:
    import polars as pl

    frame = pl.DataFrame(PATIENTS)
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_csv(tmp_path / "a.csv")
    frame.write_csv(tmp_path / "a.tsv", separator="\t")
    frame.write_ndjson(tmp_path / "a.jsonl")
    frame.write_ipc_stream(tmp_path / "a.arrow")
    for number, given in enumerate([frame, frame.to_arrow(), frame.to_pandas(), *sorted(tmp_path.glob("a.*"))]):
        ex.upload(f"kind-{number}", given)
        assert ex.dataset(f"kind-{number}").to_polars().to_dicts() == PATIENTS, given


def test_a_recipe_is_judged_before_it_runs_and_its_result_before_it_is_published(ex: Session) -> None:
    ex.upload("patients", PATIENTS)
    assert ex.check_recipe(RECIPE) == []
    assert ex.check_recipe(RECIPE.replace("drop_nulls", "drop_nuls"))
    with pytest.raises(errors.BadRecipe):
        ex.run(RECIPE.replace("drop_nulls", "drop_nuls"))
    with pytest.raises(errors.ExpectationFailed):
        ex.run(RECIPE.replace("{tag: first}", "{expect: {min_rows: 1000}}"))
    assert ex.preview(RECIPE, rows=5)
    assert "ready" not in {d.name for d in ex.datasets() if d.version is not None}


def test_a_token_opens_what_it_is_for_until_it_ends(serve: Any) -> None:
    with headrace.connect(serve.url, serve.token) as admin:
        admin.upload("patients", PATIENTS)
        made = admin.create_token("ana", datasets=["patients"])
        with headrace.connect(serve.url, made.secret) as ana:
            assert ana.head("patients", 1) == [PATIENTS[0]]
            with pytest.raises(errors.Forbidden):
                ana.upload("patients", PATIENTS)
            admin.revoke_token(made.id)
            with pytest.raises(errors.Unauthenticated):
                ana.head("patients", 1)
        assert {t.principal for t in admin.tokens()} >= {"ana"}
        assert all(t.secret is None for t in admin.tokens())


class Shell:
    """The command in processes of its own, as people start it."""

    def __init__(self, folder: Path, **env: str) -> None:
        self._folder, self._env = folder, {**os.environ, "DO_NOT_TRACK": "1", **env}

    def __call__(self, *words: str, code: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-m", "headrace", *words, "--json"],
            cwd=self._folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        assert code == 0 or done.stdout == ""
        return json.loads(done.stdout if code == 0 else done.stderr)


@pytest.fixture(params=["embedded", "remote"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    if request.param == "embedded":
        return Shell(tmp_path, HEADRACE_ROOT=str(tmp_path / "root"))
    served = request.getfixturevalue("serve")
    return Shell(tmp_path, HEADRACE_URL=served.url, HEADRACE_TOKEN=served.token)


@pytest.mark.slow
def test_the_command_tells_the_same_story(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PATIENTS + DAMAGED))
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert shell("upload", "patients", "p.jsonl")["accepted"] == 22
    run = shell("run", "r.yaml")
    assert (run["status"], run["rows_out"]) == ("succeeded", 20)
    assert shell("head", "ready", "-n", "2") == PATIENTS[:2]
    assert len(shell("quarantine", "ready")) == 2
    assert shell("show", "ready@first")["version"] == run["version"]
    assert shell("show", "nothing-here", code=4)["error"]["code"] == "not_found"
    (tmp_path / "r.yaml").write_text(RECIPE.replace("{tag: first}", "{expect: {min_rows: 1000}}"))
    assert shell("run", "r.yaml", code=1)["error"]["code"] == "expectation_failed"
    assert all(check["state"] != "fail" for check in shell("doctor"))


def test_policies_and_tags_are_the_same_by_every_way_in(ex: Session, tmp_path: Path) -> None:
    rows = [{"mail": f"u{at}@example.com", "n": at} for at in range(4)]
    ex.upload("people", rows)
    wait_until(lambda: ex.dataset("people").version is not None)
    (found,) = ex.classify("people")
    assert (found.column, found.tag, found.values, found.found) == ("mail", "pii.email", 4, 4)
    assert ex.column_tags("people") == []
    ex.classify("people", apply=True)
    assert [(one.column, one.tag) for one in ex.tag_column("people", "n", "money")] == [
        ("mail", "pii.email"),
        ("n", "money"),
    ]
    assert [one.column for one in ex.untag_column("people", "n", "money")] == ["mail"]
    made = ex.add_policy("people", "role:consumer", "n > 1", {"tag:pii.*": "null"})
    assert ex.policy(made.id) == made
    assert ex.policies("people") == [made] == ex.policies()
    assert ex.policies("other") == []
    with pytest.raises(errors.BadRequest, match="no column wage"):
        ex.add_policy("people", "role:consumer", "wage > 1")
    assert ex.remove_policy(made.id) == made
    with pytest.raises(errors.NotFound):
        ex.policy(made.id)


def test_a_policy_holds_for_a_token_over_http(serve: Any) -> None:
    with headrace.connect(serve.url, serve.token) as admin:
        admin.upload("people", [{"mail": f"u{at}@example.com", "n": at} for at in range(4)])
        made = admin.add_policy("people", "principal:ana", "n > 1", {"mail": "null"})
        token = admin.create_token("ana", datasets=["people"])
        with headrace.connect(serve.url, token.secret) as ana:
            assert ana.head("people") == [{"mail": None, "n": 2}, {"mail": None, "n": 3}]
            with pytest.raises(errors.Forbidden):
                ana.policies()
            with pytest.raises(errors.Forbidden):
                ana.remove_policy(made.id)
            with pytest.raises(errors.Forbidden):
                ana.tag_column("people", "n", "x")
            with pytest.raises(errors.Forbidden):
                ana.classify("people")
        assert admin.head("people", 1) == [{"mail": "u0@example.com", "n": 0}]
