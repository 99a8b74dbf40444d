"""The command: its verbs, exit codes, errors in three lines, and what is printed where."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from headrace.cli import main
from headrace.cli.doctor import checks
from headrace.model import (
    ColumnTag,
    Dataset,
    Diff,
    Policy,
    Quarantined,
    Receipt,
    Run,
    StepCount,
    Token,
    TracedRow,
    Version,
    to_dict,
)
from peer import Answer, Peer, answer, failure, peer

RECIPE = "dataset: d\ncollect: []\n"
TIME = "2026-01-02T03:04:05.678Z"
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
COUNTS = (StepCount("unicode", 10, 9, 1, rules={"empty": 1}), StepCount("dedup", 9, 8, merged=1))
VERSION = Version(
    "d", 3, TIME, "run", 1234, 5_600_000, 2, "f" * 64, ({"name": "x", "type": "int64"},), 8, 1, ("gold",), counts=COUNTS
)
RUN = Run("r1", "d", "succeeded", TIME, version=3, rows_in=10, rows_out=8, quarantined=1, merged=1, steps=COUNTS)
DROPPED = Quarantined("id1", "r1", "check", "max", "above 100", TIME, '{"age":900}', "age", "900")


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Calls the command as a shell would and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = self._capsys.readouterr()
        return Done(int(ended.value.code or 0), printed.out, printed.err)


@pytest.fixture
def there() -> Iterator[Peer]:
    with peer() as found:
        yield found


@pytest.fixture
def shell(there: Peer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    monkeypatch.setenv("HEADRACE_URL", there.url)
    monkeypatch.setenv("HEADRACE_RETRIES", "1")
    monkeypatch.delenv("HEADRACE_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def items(*values: Any) -> Answer:
    return answer({"items": [to_dict(value) for value in values], "next_page_token": None})


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# Errors and exit codes.


@pytest.mark.parametrize(
    ("code", "status", "exit_code"),
    [
        ("run_failed", 500, 1),
        ("busy", 503, 1),
        ("bad_recipe", 422, 2),
        ("unauthenticated", 401, 3),
        ("forbidden", 403, 3),
        ("not_found", 404, 4),
        ("conflict", 409, 5),
    ],
)
def test_an_error_is_three_lines_and_an_exit_code(
    shell: Shell, there: Peer, code: str, status: int, exit_code: int
) -> None:
    there.on["GET /v1/datasets"] = failure(code, status, "it did not work", "try this")
    done = shell("datasets")
    assert done.code == exit_code
    assert done.out == ""
    what = code.replace("_", " ")
    assert done.err.splitlines() == [f"headrace datasets: {what}", "  why: it did not work", "  do:  try this"]
    done = shell("datasets", "--json")
    assert (done.code, done.out) == (exit_code, "")
    error = json.loads(done.err)["error"]
    assert (error["code"], error["message"], error["hint"]) == (code, "it did not work", "try this")


def test_the_problems_of_a_recipe_are_listed_with_their_lines(shell: Shell, there: Peer) -> None:
    Path("r.yaml").write_text(RECIPE)
    problem = {"line": 3, "path": "clean[0].unicod", "message": "there is no step 'unicod'", "hint": "unicode?"}
    error = {"code": "bad_recipe", "message": "recipe, line 3", "hint": "unicode?", "details": {"problems": [problem]}}
    there.on["POST /v1/runs"] = answer({"error": error}, 422)
    done = shell("run", "r.yaml")
    assert done.code == 2
    assert done.err.splitlines()[1:] == ["  why: r.yaml, line 3: there is no step 'unicod'", "  do:  unicode?"]
    error["details"] = {"problems": [problem, {"line": 9, "path": "", "message": "no dataset", "hint": ""}]}
    there.on["POST /v1/runs"] = answer({"error": error}, 422)
    assert shell("run", "r.yaml").err.splitlines()[1:] == [
        "  why: r.yaml has 2 problems",
        "       line 3: there is no step 'unicod'; unicode?",
        "       line 9: no dataset",
        "  do:  mend these lines",
    ]
    assert json.loads(shell("run", "r.yaml", "--json").err)["error"]["details"]["file"] == "r.yaml"


@pytest.mark.parametrize(
    "words",
    [
        ["show"],
        ["show", "d", "--frobnicate"],
        ["nothing"],
        ["head", "d", "-n", "-1"],
        ["show", "Not A Ref"],
        ["trace", "d@1"],
        ["run", "r.yaml", "--engine", "abacus"],
        ["datasets", "--root", ".", "--url", "http://x"],
        ["datasets", "--url", "a-folder"],
        ["diff", "d@1", "e@1"],
        ["trace", "d@1", "--step", "1", "--row", "id"],
        ["upload", "d", "a.csv", "b.csv", "--idempotency-key", "k"],
        ["token", "create", "ana", "--role", "king"],
    ],
)
def test_wrong_usage_exits_with_2_and_a_word_of_help(shell: Shell, words: list[str]) -> None:
    done = shell(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err


def test_a_missing_exchange_is_not_made_by_looking_at_it(shell: Shell, tmp_path: Path) -> None:
    done = shell("datasets", "--root", str(tmp_path / "nowhere"))
    assert done.code == 4
    assert "headrace serve" in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_exchange_that_does_not_answer_is_said_so(shell: Shell, there: Peer) -> None:
    with peer() as gone:
        url = gone.url
    done = shell("datasets", "--url", url, "--token", "s3cret")
    assert done.code == 1
    assert "cannot be reached" in done.err
    assert "s3cret" not in done.err


def test_help_names_every_verb(shell: Shell) -> None:
    done = shell("--help")
    assert done.code == 0
    verbs = (
        "init serve worker upload run runs datasets versions show head tag diff quarantine trace token doctor receipt "
        "policy column-tag classify"
    )
    assert all(f"\n  {verb} " in done.out for verb in verbs.split())
    assert shell("--version").out.startswith("headrace 0.")


# What is printed.


def test_datasets_are_a_table_or_json(shell: Shell, there: Peer) -> None:
    there.on["GET /v1/datasets"] = items(Dataset("d", TIME, 3, 1234, 5_600_000, 7, 2, {"gold": 3}))
    head, row = lines(shell("datasets").out)
    assert head[:3] == ["DATASET", "VERSION", "ROWS"]
    assert row == ["d", "3", "1,234", "5.6", "MB", "7", "2", "gold:", "3"]
    assert json.loads(shell("datasets", "--json").out)[0]["tags"] == {"gold": 3}
    there.on["GET /v1/datasets"] = items()
    assert "no datasets yet" in shell("datasets").out


def test_a_version_is_shown_with_schema_and_counts(shell: Shell, there: Peer) -> None:
    there.on["GET /v1/datasets/d/versions/gold"] = answer(to_dict(VERSION))
    out = shell("show", "d@gold").out
    assert ["ref", "d@3"] in lines(out)
    assert ["x", "int64"] in lines(out)
    assert ["unicode", "10", "9", "1", "0", "empty:", "1", "0.00"] in lines(out)
    assert json.loads(shell("show", "d@gold", "--json").out)["fingerprint"] == "f" * 64
    there.on["GET /v1/datasets/d/versions"] = items(VERSION)
    assert lines(shell("versions", "d").out)[1][:3] == ["d@3", "run", "1,234"]


def test_what_a_record_holds_cannot_steer_the_terminal(shell: Shell, there: Peer) -> None:
    sink = io.BytesIO()
    table = pa.table({"x": ["\x1b[31mred\n[bold]", "水车"], "n": [1, None]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    there.on["GET /v1/datasets/d/records"] = Answer(sink.getvalue(), headers=ARROW)
    done = shell("head", "d", "-n", "2")
    assert "\x1b" not in done.out
    assert lines(done.out) == [["x", "n"], ["\\x1b[31mred\\n[bold]", "1"], ["水车"]]
    assert there.calls[0].query == {"ref": "latest", "limit": "2"}
    assert json.loads(shell("head", "d", "--json").out) == table.to_pylist()


def test_a_tag_a_difference_and_a_receipt_are_told(shell: Shell, there: Peer) -> None:
    there.on["POST /v1/datasets/d/tags"] = answer(to_dict(VERSION))
    assert shell("tag", "d@3", "gold").out == "d@gold is d@3\n"
    there.on["GET /v1/datasets/d/diff"] = answer(to_dict(Diff("d@2", "d@3", 5, 1, 0, 90, ("y",), sample_added=("a",))))
    out = lines(shell("diff", "d@2", "d@3").out)
    assert ["added", "5", "a"] in out
    assert ["columns", "added", "y"] in out
    there.on["GET /v1/receipts/ab"] = answer(to_dict(Receipt("ab", "d", 4, state="committed", version=3)))
    assert ["state", "committed"] in lines(shell("receipt", "ab").out)


def test_quarantine_says_rule_value_and_reason(shell: Shell, there: Peer) -> None:
    there.on["GET /v1/datasets/d/quarantine"] = items(DROPPED)
    out = shell("quarantine", "d", "--rule", "max").out
    assert lines(out)[1] == ["id1", "check", "max", "age", "900", "above", "100", '{"age":900}']
    assert there.calls[0].query["rule"] == "max"
    assert json.loads(shell("quarantine", "d", "--json").out)[0]["reason"] == "above 100"


def test_trace_follows_a_step_to_every_source(shell: Shell, there: Peer) -> None:
    first = {"source": "web", "locator": "a#1", "collected_at": TIME, "id": "id7"}
    sources = (first, {"source": "web", "locator": "a#2", "id": "id8", "start": 5, "length": 3})
    there.on["GET /v1/datasets/d/trace"] = items(TracedRow(7, "id7", sources, rank=0, step=5))
    words = "trace d@3 --step 5 --seed 1 --epoch 2 --batch 8 --world 4 --shuffle global"
    out = lines(shell(*words.split()).out)
    assert out[1] == ["5", "0", "7", "id7", "web:", "a#1,", "collected", "2026-01-02", "03:04:05Z"]
    assert " ".join(out[2]) == "web: a#2, record id8, from position 5, 3 long"
    assert there.calls[0].query == {
        "ref": "3", "step": "5", "seed": "1", "epoch": "2", "batch_size": "8", "world_size": "4", "shuffle": "global",
    }  # fmt: skip


# Uploads.


def test_files_are_uploaded_one_by_one(shell: Shell, there: Peer) -> None:
    there.on["POST /v1/datasets/d/records"] = answer({"accepted": 2, "rejected": 0, "duplicates": 0, "receipt": "ab"})
    Path("a.csv").write_text("x\n1\n2\n")
    Path("b.jsonl").write_text('{"x":1}\n')
    done = shell("upload", "d", "a.csv", "b.jsonl", "--key", "x")
    assert done.code == 0
    assert done.out.splitlines() == ["d: 2 accepted   receipt ab"] * 2
    assert done.err.splitlines() == ["uploading a.csv", "uploading b.jsonl"]
    assert [call.query for call in there.calls] == [{"key": "x"}] * 2
    done = shell("upload", "d", "a.csv", "--json")
    assert (json.loads(done.out)["receipt"], done.err) == ("ab", "")


def test_rejected_records_are_listed_and_the_exit_code_tells(shell: Shell, there: Peer) -> None:
    refused = {"accepted": 1, "rejected": 1, "receipt": "ab", "errors": [{"index": 1, "reason": "not JSON"}]}
    there.on["POST /v1/datasets/d/records"] = answer(refused)
    Path("b.jsonl").write_text('{"x":1}\n{\n')
    done = shell("upload", "d", "b.jsonl")
    assert done.code == 1
    assert "1 accepted, 1 rejected" in done.out
    assert "record 1: not JSON" in done.err


@pytest.mark.parametrize(("words", "kind"), [([], "application/x-ndjson"), (["--format", "csv"], "text/csv")])
def test_standard_input_is_ndjson_unless_said_otherwise(shell: Shell, there: Peer, words: list[str], kind: str) -> None:
    there.on["POST /v1/datasets/d/records"] = answer({"accepted": 1, "receipt": "ab"})
    command = [sys.executable, "-m", "headrace", "upload", "d", "-", *words]
    done = subprocess.run(command, input=b"the body", capture_output=True, check=True)
    assert done.stdout == b"d: 1 accepted   receipt ab\n"
    assert (there.calls[0].body, there.calls[0].headers["content-type"]) == (b"the body", kind)


def test_nothing_is_sent_unless_every_file_is_there(shell: Shell, there: Peer) -> None:
    Path("a.csv").write_text("x\n1\n")
    done = shell("upload", "d", "a.csv", "missing.csv")
    assert (done.code, "'missing.csv'" in done.err) == (4, True)
    done = shell("upload", "d", "a.csv", ".")
    assert (done.code, "is a folder" in done.err) == (2, True)
    assert there.calls == []


# Runs.


def test_a_run_shows_its_stages_then_its_counts(shell: Shell, there: Peer) -> None:
    Path("r.yaml").write_text(RECIPE)
    there.on["POST /v1/runs"] = answer(to_dict(replace(RUN, status="queued")), 202)
    there.on["GET /v1/runs/r1"] = [answer(to_dict(replace(RUN, status="running", stage="map"))), answer(to_dict(RUN))]
    done = shell("run", "r.yaml")
    assert done.code == 0
    assert done.err.splitlines() == ["run r1: running map", "run r1: succeeded"]
    assert ["dedup", "9", "8", "0", "1", "0.00"] in lines(done.out)
    assert done.out.splitlines()[-1] == "d@3: 10 in, 8 out, 1 quarantined, 1 merged   run r1 succeeded"
    there.on["GET /v1/runs"] = items(RUN)
    assert lines(shell("runs").out)[1][:4] == ["r1", "d", "succeeded", "3"]
    assert json.loads(shell("runs", "r1", "--json").out)["status"] == "succeeded"
    assert json.loads(shell("run", "r.yaml", "--no-wait", "--json").out)["status"] == "queued"


def test_a_run_that_fails_still_shows_what_its_steps_did(shell: Shell, there: Peer) -> None:
    Path("r.yaml").write_text(RECIPE)
    failed = replace(RUN, status="failed", version=None, error="8 rows, 1000 wanted", error_code="expectation_failed")
    there.on["POST /v1/runs"] = answer(to_dict(failed))
    there.on["GET /v1/runs/r1"] = answer(to_dict(failed))
    done = shell("run", "r.yaml")
    assert done.code == 1
    assert "no version: 10 in" in done.out
    assert "why: 8 rows, 1000 wanted" in done.err


def test_a_preview_commits_nothing(shell: Shell, there: Peer) -> None:
    Path("r.yaml").write_text(RECIPE)
    there.on["POST /v1/runs:preview"] = answer(
        {"run": to_dict(RUN), "rows": 8, "sample": ['{"x":1,"t":"水"}'], "dropped": [to_dict(DROPPED)]}
    )
    done = shell("run", "r.yaml", "--preview", "100")
    assert ["dedup", "9", "8", "0", "1", "0.00"] in lines(done.out)
    assert lines(done.out)[lines(done.out).index(["x", "t"]) + 1] == ["1", "水"]
    assert ["id1", "check", "max", "age", "900", "above", "100", '{"age":900}'] in lines(done.out)
    assert "nothing was committed" in done.out
    assert [call.path for call in there.calls] == ["/v1/runs:preview"]


# Beginning, tokens, health.


def test_init_writes_a_recipe_and_its_schema_and_overwrites_nothing(shell: Shell) -> None:
    assert shell("init", "new").code == 0
    recipe = Path("new/recipe.yaml").read_text(encoding="utf-8")
    assert recipe.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert json.loads(Path("new/recipe.schema.json").read_text(encoding="utf-8"))["type"] == "object"
    Path("new/recipe.yaml").write_text("mine")
    done = shell("init", "new")
    assert done.code == 5
    assert "--yes" in done.err
    assert Path("new/recipe.yaml").read_text() == "mine"
    written = json.loads(shell("init", "new", "--yes", "--json").out)["written"]
    assert written == ["new/recipe.yaml", "new/recipe.schema.json"]
    assert Path("new/recipe.yaml").read_text(encoding="utf-8") == recipe
    Path("file").write_text("")
    assert shell("init", "file").code == 2


def test_a_tokens_secret_alone_goes_to_standard_output(shell: Shell, there: Peer) -> None:
    made = Token("t1", "ana", "producer", ("web-*",), TIME, secret="hr_secret")
    there.on["POST /v1/tokens"] = answer(to_dict(made), 201)
    done = shell("token", "create", "ana", "--role", "producer", "--dataset", "web-*", "--days", "30")
    assert done.out == "hr_secret\n"
    assert "shown only now" in done.err
    sent = {"name": "ana", "role": "producer", "datasets": ["web-*"], "days": 30}
    assert json.loads(there.calls[0].body) == sent
    there.on["GET /v1/tokens"] = items(replace(made, secret=None))
    assert lines(shell("token", "list").out)[1][:4] == ["t1", "ana", "producer", "web-*"]


def test_ending_a_token_needs_a_yes(shell: Shell, there: Peer) -> None:
    there.on["DELETE /v1/tokens/t1"] = Answer(b"", 204)
    command = [sys.executable, "-m", "headrace", "token", "revoke", "t1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, there.calls) == (2, [])
    assert "--yes" in done.stderr
    assert shell("token", "revoke", "t1", "--yes").out == "token t1 has ended\n"


def test_doctor_says_what_is_well_and_what_to_do(shell: Shell, there: Peer, tmp_path: Path) -> None:
    there.on["GET /readyz"] = answer({"status": "ready"})
    done = shell("doctor", "--json")
    found = {check["name"]: check for check in json.loads(done.out)}
    assert {"python", "client libraries", "sqlite", "clock", "settings", "root", "disk", "server"} <= set(found)
    assert (found["root"]["state"], found["server"]["state"]) == ("ok", "ok")
    assert all(check["do"] for check in found.values() if check["state"] != "ok")
    assert "answers" in shell("doctor").out


def test_doctor_fails_where_an_exchange_could_not_work(
    shell: Shell, there: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_FLUSH_BYTES", "many")
    done = shell("doctor", "--root", str(tmp_path / "file"))
    assert done.code == 1
    assert "is not a folder" in done.out
    assert "'many' is not a number" in done.out


def test_doctor_finds_the_server_in_the_lock_and_forgives_a_dead_one(shell: Shell, there: Peer, tmp_path: Path) -> None:
    there.on["GET /readyz"] = answer({"status": "ready"})
    lock = tmp_path / "lock"

    def server() -> str:
        return next(check.found for check in checks(tmp_path, None, None) if check.name == "server")

    lock.write_text(json.dumps({"pid": os.getpid(), "url": there.url}))
    assert server() == f"{there.url} answers"
    for text in ("", "{}", "[]", json.dumps({"pid": 2**22 + 7, "url": there.url})):
        lock.write_text(text)
        assert server() == "none is running on this root"


def test_policies_are_added_listed_shown_and_ended(shell: Shell, there: Peer) -> None:
    made = Policy("p1", "web-*", "role:consumer", "a = 'x'", {"mail": "hash", "note": "constant:a=b"}, TIME)
    there.on["POST /v1/policies"] = answer(to_dict(made), 201)
    there.on["GET /v1/policies"] = items(made)
    there.on["GET /v1/policies/p1"] = there.on["DELETE /v1/policies/p1"] = answer(to_dict(made))
    add = ("policy", "add", "web-*", "role:consumer", "--row-filter", "a = 'x'")
    done = shell(*add, "--mask", "mail=hash", "--mask", "note=constant:a=b")
    assert (done.code, ["mask", "mail", "hash"] in lines(done.out)) == (0, True)
    sent = {"dataset": "web-*", "subject": "role:consumer", "row_filter": "a = 'x'"}
    assert json.loads(there.calls[0].body) == {**sent, "masks": {"mail": "hash", "note": "constant:a=b"}}
    assert lines(shell("policy", "list", "--dataset", "web-1").out)[1][:3] == ["p1", "web-*", "role:consumer"]
    assert there.calls[1].query["dataset"] == "web-1"
    assert json.loads(shell("policy", "show", "p1", "--json").out)["row_filter"] == "a = 'x'"
    assert shell("policy", "remove", "p1", "--yes").out == "policy p1 has ended\n"
    assert shell(*add, "--mask", "mail").code == 2


def test_columns_are_tagged_and_classified(shell: Shell, there: Peer) -> None:
    tag = ColumnTag("mail", "pii.email", 10, 9)
    for verb in ("GET", "POST", "DELETE"):
        there.on[f"{verb} /v1/datasets/d/column-tags"] = items(tag)
    there.on["POST /v1/datasets/d/classify"] = items(tag)
    assert lines(shell("column-tag", "list", "d").out)[1] == ["mail", "pii.email"]
    assert shell("column-tag", "add", "d", "mail", "pii.email").code == 0
    assert json.loads(there.calls[1].body) == {"column": "mail", "tag": "pii.email"}
    assert shell("column-tag", "remove", "d", "a,b c", "pii.email", "--yes").code == 0
    assert there.calls[2].query == {"column": "a,b c", "tag": "pii.email"}
    done = shell("classify", "d@3:train", "--rows", "5", "--apply")
    assert lines(done.out)[1] == ["mail", "pii.email", "10", "9"]
    assert json.loads(there.calls[3].body) == {"ref": "3:train", "rows": 5, "apply": True}
