"""The exchange as its users meet it, embedded: what goes in comes out or is held with a reason; versions stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import polars
import pyarrow as pa
import pytest
from deltalake import DeltaTable

import headrace
from headrace.client.session import Session
from headrace.errors import BadRecipe, BadRequest, Conflict, ExpectationFailed, NotFound

ODD = [
    '{"a":1180591620717411303424,"A":2}',
    '{"a": 1}',
    '{"b" : 2.50}',
    '{"_id":"mine","_raw":null}',
    '{"名":"值","n":[[1],[2,3]],"e":{}}',
    '{"b":-0.0,"text":"line\\u2028end \\ud83d\\ude00"}',
]


@pytest.fixture
def ex(tmp_path: Path) -> Iterator[Session]:
    with headrace.connect(tmp_path / "root") as session:
        yield session


def flushed(ex: Session, name: str, rows: int) -> int:
    """Wait until ``rows`` rows of a dataset are committed; return the version that has them."""
    from conftest import wait_until

    wait_until(lambda: any(v.rows >= rows for v in ex.versions(name)), 20)
    return ex.versions(name)[0].version


def test_a_writer_reads_its_own_writes_before_and_after_the_flush(ex: Session) -> None:
    ex.upload("default", [{"x": 1}, {"x": 2}])
    assert ex.get_data() == [{"x": 1}, {"x": 2}]
    assert ex.head("default") == [{"x": 1}, {"x": 2}]
    flushed(ex, "default", 2)
    assert ex.get_data() == [{"x": 1}, {"x": 2}]
    assert ex.dataset("default").to_arrow().to_pylist() == [{"x": 1}, {"x": 2}]


def test_records_come_back_letter_by_letter(ex: Session) -> None:
    for text in ODD:
        ex.upload("default", _body(text), idempotency_key=None)
    expected = "[" + ",".join(ODD) + "]"
    assert b"".join(ex._get_data(None, 0)).decode() == expected
    flushed(ex, "default", len(ODD))
    assert b"".join(ex._get_data(None, 0)).decode() == expected
    assert b"".join(ex._get_data(2, 1)).decode() == "[" + ",".join(ODD[1:3]) + "]"


def _body(text: str) -> object:
    import io

    body = io.BytesIO(text.encode())
    body.name = "one.ndjson"
    return body


def test_a_record_that_contradicts_the_schema_is_held_with_field_and_reason(ex: Session) -> None:
    ex.upload("d", [{"age": 40, "name": "a"}])
    flushed(ex, "d", 1)
    receipt = ex.upload("d", [{"age": "forty", "name": "b"}, {"age": 41, "name": "c"}])
    flushed(ex, "d", 2)
    assert ex.dataset("d").to_arrow().column("name").to_pylist() == ["a", "c"]
    (held,) = ex.quarantine("d")
    assert (held.rule, held.field, json.loads(held.record)) == ("schema", "age", {"age": "forty", "name": "b"})
    assert held.id == f"{receipt.receipt}-00000000"
    assert held.reason == "the column holds numbers, and this is a string"
    after = ex.receipt(receipt.receipt)
    assert (after.state, after.accepted, after.quarantined) == ("committed", 2, 1)


def test_whole_numbers_widen_when_a_fraction_comes_and_nothing_is_lost(ex: Session) -> None:
    ex.upload("d", [{"x": 1}, {"x": 2}])
    first = flushed(ex, "d", 2)
    ex.upload("d", [{"x": 2.5, "y": "new"}])
    flushed(ex, "d", 3)
    table = ex.dataset("d").to_arrow()
    assert table.schema.field("x").type == pa.float64()
    assert table.to_pylist() == [{"x": 1.0, "y": None}, {"x": 2.0, "y": None}, {"x": 2.5, "y": "new"}]
    assert ex.dataset(f"d@{first}").to_arrow().to_pylist() == [{"x": 1}, {"x": 2}]


def test_small_files_are_merged_without_a_change_of_content(tmp_path: Path) -> None:
    many, one = [{"i": i, "s": f"row {i}"} for i in range(20)], tmp_path / "one"
    os.environ["HEADRACE_FLUSH_AGE_S"] = "0.01"
    try:
        with headrace.connect(tmp_path / "many") as ex:
            for count, record in enumerate(many, 1):
                ex.upload("d", [record])
                flushed(ex, "d", count)
            versions = ex.versions("d")
            assert [v.rows for v in versions] == list(range(20, 0, -1))
            assert versions[0].files < 10
            fingerprint = versions[0].fingerprint
            for version in versions:
                assert ex.dataset(version.ref).to_arrow().to_pylist() == many[: version.rows]
    finally:
        del os.environ["HEADRACE_FLUSH_AGE_S"]
    with headrace.connect(one) as ex:
        ex.upload("d", many)
        flushed(ex, "d", 20)
        assert ex.versions("d")[0].fingerprint == fingerprint
    assert pa.table(DeltaTable(str(tmp_path / "many/tables/d")).to_pyarrow_table()).num_rows == 20


RECIPE = """
dataset: clean
collect:
  - dataset: raw@latest
clean:
  - drop_nulls: {columns: [a]}
  - check: {b: {min: 0, max: 100}}
  - dedup: {exact: true, columns: [a, b]}
transform:
  - features: {columns: [a, b], label: y, standardize: true}
publish: {tag: good, split: {train: 0.8, val: 0.2}, expect: {min_rows: 10}}
"""


def _raw(ex: Session) -> None:
    rows: list[dict[str, object]] = [{"a": float(i), "b": i % 7 * 1.0, "y": i} for i in range(100)]
    rows += [{"a": None, "b": 1.0, "y": 0}, {"a": 5.0, "b": -3.0, "y": 1}, {"a": 3.0, "b": 3.0, "y": 9}]
    ex.upload("raw", rows)


def test_a_run_accounts_for_every_record(ex: Session) -> None:
    _raw(ex)
    run = ex.run(RECIPE)
    assert (run.status, run.rows_in, run.rows_out, run.quarantined, run.merged) == ("succeeded", 103, 100, 2, 1)
    version = ex.show("clean@good")
    assert version.rows == 100
    assert sum(version.splits.values()) == 100
    assert set(version.splits) == {"train", "val"}
    assert version.inputs[0]["ref"] == "raw@0"
    assert version.run == run.id
    held = ex.quarantine("clean")
    assert sorted(q.rule for q in held) == ["check.min", "dedup.exact", "drop_nulls"]
    merged = next(q for q in held if q.rule == "dedup.exact")
    assert merged.kept == next(
        r["_id"] for r in ex.read("raw", ["_id", "a", "b"]).read_all().to_pylist() if r["a"] == 3
    )
    for step in version.counts:
        assert step.rows_in == step.rows_out + step.quarantined + step.merged, step.step


def test_the_same_recipe_on_the_same_input_gives_the_same_bytes(ex: Session) -> None:
    _raw(ex)
    one, two = ex.run(RECIPE), ex.run(RECIPE)
    first, second = ex.show(f"clean@{one.version}"), ex.show(f"clean@{two.version}")
    assert first.version != second.version
    assert first.fingerprint == second.fingerprint
    assert ex.diff(first.ref, second.ref).same == 100
    assert _hashes(ex, first.ref) == _hashes(ex, second.ref)


def _hashes(ex: Session, ref: str) -> list[str]:
    from headrace.client.feed import open_provider

    provider, name = open_provider(f"{ex._root.path}/{ref}")
    try:
        return [entry.sha256 for entry in provider.manifest(name, None).files]
    finally:
        provider.close()


def test_other_readers_see_what_the_exchange_gives(ex: Session, tmp_path: Path) -> None:
    _raw(ex)
    ex.run(RECIPE)
    ours = ex.read("clean", ["_id", "features", "label"]).read_all().to_pylist()
    path = str(tmp_path / "root/tables/clean")
    theirs = DeltaTable(path).to_pyarrow_table(columns=["_id", "features", "label"]).to_pylist()
    key = lambda row: row["_id"]  # noqa: E731
    assert sorted(theirs, key=key) == sorted(ours, key=key)
    frame = polars.read_delta(path).select("_id", "features", "label").sort("_id")
    assert frame.to_dicts() == sorted(ours, key=key)


TOKENS = """
dataset: tokens
collect: [{dataset: texts@latest}]
transform:
  - tokenize: {tokenizer: {train: bpe, vocab_size: 300}, pack: 16}
"""


def test_a_version_keeps_the_tokenizer_that_made_it_and_others_can_use_it(ex: Session) -> None:
    from tokenizers import Tokenizer

    ex.upload("texts", [{"text": f"the quick brown fox number {i} jumps over the lazy dog"} for i in range(200)])
    ex.run(TOKENS)
    tokenizer = Tokenizer.from_str(ex.tokenizer("tokens"))
    first = ex.read("tokens", ["tokens"], limit=1).read_all().column(0).to_pylist()[0]
    assert tokenizer.decode(first).startswith("the quick brown fox number 0 jumps")
    (used,) = ex.show("tokens").fitted.values()
    ex.run(TOKENS.replace("{train: bpe, vocab_size: 300}", used["tokenizer"]))
    assert ex.show("tokens@1").fingerprint == ex.show("tokens@0").fingerprint
    with pytest.raises(NotFound, match="not tokenised"):
        ex.tokenizer("texts")


def test_packing_accounts_for_every_token_and_names_its_documents(ex: Session) -> None:
    texts = [f"document {i} " + "word " * (i % 40) for i in range(300)]
    ex.upload("texts", [{"text": text} for text in texts])
    ex.run(TOKENS.replace("{train: bpe, vocab_size: 300}", "bytes") + "publish: {split: {train: 0.7, val: 0.3}}\n")
    pack = ex.show("tokens").counts[-1]
    assert pack.tokens_in == sum(len(text.encode()) + 1 for text in texts)
    assert pack.tokens_in == pack.tokens_out + pack.tokens_dropped
    assert pack.tokens_out == 16 * ex.show("tokens").rows
    known = dict(zip(*ex.read("texts", ["_id", "text"]).read_all().to_pydict().values(), strict=True))
    splits: dict[str, set[str]] = {"train": set(), "val": set()}
    for row in ex.read("tokens", ["tokens", "_sources", "_split"]).read_all().to_pylist():
        whole = b"".join(
            (known[p["id"]].encode() + b"\0")[p["start"] : p["start"] + p["length"]] for p in row["_sources"]
        )
        assert [256 if token == 0 else token for token in whole] == row["tokens"]
        splits[row["_split"]].update(part["id"] for part in row["_sources"])
    assert not splits["train"] & splits["val"]
    assert len(splits["train"]) > 150


def test_a_failed_expectation_publishes_nothing(ex: Session) -> None:
    _raw(ex)
    with pytest.raises(ExpectationFailed, match="min_rows"):
        ex.run(RECIPE.replace("min_rows: 10", "min_rows: 1000"))
    with pytest.raises(NotFound):
        ex.show("clean")


def test_a_trace_leads_from_a_step_to_its_sources_and_back(ex: Session) -> None:
    _raw(ex)
    run = ex.run(RECIPE)
    rows = ex.trace(f"clean@{run.version}", step=1, seed=7, batch_size=8, world_size=2)
    assert len(rows) == 16
    assert {r.rank for r in rows} == {0, 1}
    known = {r["_id"] for r in ex.read("raw", ["_id"]).read_all().to_pylist()}
    for row in rows:
        assert row.id in known
        (back,) = ex.trace(f"clean@{run.version}", row=row.id, seed=7, batch_size=8, world_size=2)
        assert (back.step, back.rank, back.row) == (1, row.rank, row.row)


def test_a_second_program_cannot_open_the_same_root(ex: Session, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="in use by process"):
        headrace.connect(tmp_path / "root")


def test_what_the_table_holds_and_the_catalog_lost_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with headrace.connect(root) as ex:
        ex.upload("default", [{"x": 1}])
    before = (root / "catalog.db").read_bytes()
    with headrace.connect(root) as ex:
        ex.upload("default", [{"x": 2}, {"x": "two"}])
    (root / "catalog.db").write_bytes(before)
    with headrace.connect(root) as ex:
        assert [v.rows for v in ex.versions("default")] == [2, 1]
        assert ex.get_data() == [{"x": 1}, {"x": 2}]
        assert [q.record for q in ex.quarantine("default")] == ['{"x":"two"}']
        ex.upload("default", [{"x": 3}])
        assert ex.get_data() == [{"x": 1}, {"x": 2}, {"x": 3}]


def test_csv_values_reach_a_string_column_as_they_are(ex: Session, tmp_path: Path) -> None:
    ex.upload("d", [{"code": "a", "n": 1}])
    (tmp_path / "more.csv").write_text("code,n\n1.50,2\n007,3\n")
    ex.upload("d", tmp_path / "more.csv")
    assert ex.head("d") == [{"code": "a", "n": 1}, {"code": "1.50", "n": 2}, {"code": "007", "n": 3}]
    flushed(ex, "d", 3)
    assert ex.dataset("d").to_arrow().column("code").to_pylist() == ["a", "1.50", "007"]


def test_a_closed_exchange_refuses_everything(tmp_path: Path) -> None:
    ex = headrace.connect(tmp_path / "root")
    ex.upload("d", [{"x": 1}])
    ex.close()
    ex.close()
    for ask in (lambda: ex.upload("e", [{"x": 1}]), ex.datasets, lambda: ex.run(TOKENS), ex.get_data):
        with pytest.raises(BadRequest, match="was closed"):
            ask()
    with headrace.connect(tmp_path / "root") as again:
        assert [d.name for d in again.datasets()] == ["d"]


def test_a_recipe_with_an_unknown_tokenizer_is_refused_before_it_runs(ex: Session) -> None:
    ex.upload("texts", [{"text": "a"}])
    with pytest.raises(BadRecipe, match="there is no tokenizer 'nope'"):
        ex.run(TOKENS.replace("{train: bpe, vocab_size: 300}", "nope"))
    assert ex.runs() == []


def test_where_and_columns_choose_rows(ex: Session) -> None:
    ex.upload("d", [{"x": i, "s": "a" if i % 2 else "b"} for i in range(10)])
    assert ex.read("d", ["x"], "s = 'a' and x > 4").read_all().to_pylist() == [{"x": 5}, {"x": 7}, {"x": 9}]
    with pytest.raises(BadRequest, match="no column"):
        ex.read("d", ["nope"]).read_all()


KILLED = """
import os, signal, sys, threading
import headrace
os.environ["HEADRACE_TASK_BYTES"] = "20000"
ex = headrace.connect(sys.argv[1])
counter = iter(range(10**6))
ex.upload("raw", [{"a": float(i), "b": i % 7 * 1.0, "y": i} for i in range(3000)])
run = ex.run(open(sys.argv[2]).read(), wait=False)
print(run.id, flush=True)
while True:
    now = ex.run_status(run.id)
    if now.progress > 0.1 or now.status != "queued" and now.stage.startswith("pass"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_when_the_exchange_opens_again(tmp_path: Path) -> None:
    from conftest import wait_until

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "root"), str(tmp_path / "recipe.yaml")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    with headrace.connect(tmp_path / "root") as ex:
        wait_until(lambda: ex.run_status(killed.stdout.strip()).status == "succeeded", 60)
        assert ex.show("clean").rows == 2893 or ex.show("clean").run == killed.stdout.strip()
        assert len([v for v in ex.versions("clean") if v.run == killed.stdout.strip()]) == 1
