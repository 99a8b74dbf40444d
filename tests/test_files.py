import csv
import gzip
import hashlib
import itertools
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from headrace import model
from headrace.collect import files
from headrace.collect.files import FileTask, infer_schema, plan, read
from headrace.errors import BadData, Forbidden, UnsupportedType

STAMP_NS = 1_700_000_000_123_456_000
RECORDS = [{"i": n, "s": f"text {n}", "f": n / 2} for n in range(200)]


def write(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    os.utime(path, ns=(STAMP_NS, STAMP_NS))
    return path


def lines(records):
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def read_all(tasks, schema=None, rows=64, size=1 << 20, source="files"):
    schema = infer_schema(tasks) if schema is None else schema
    found = [batch for task in tasks for batch in read(task, schema, rows, size, source)]
    table = pa.Table.from_batches([b.batch for b in found])
    table.validate(full=True)
    return table, [r for b in found for r in b.refused]


def user_rows(table):
    return table.drop_columns(["_id", "_source", "_ingested_at"]).to_pylist()


def locators(table):
    return [s["locator"] for s in table["_source"].to_pylist()]


# ------------------------------------------------------------------------------------------------ plan


def test_files_come_in_the_order_of_their_names_and_small_ones_share_a_task(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a.jsonl", "c.jsonl"):
        write(tmp_path / name, lines(RECORDS[:10]))
    size = (tmp_path / "a.jsonl").stat().st_size
    tasks = plan("**/*.jsonl", tmp_path, task_bytes=2 * size)
    assert [[p.name for p in t.parts] for t in tasks] == [["a.jsonl", "a/z.jsonl"], ["b.jsonl", "c.jsonl"]]
    assert [t.index for t in tasks] == [0, 1]
    assert plan("./**/*.jsonl", tmp_path, task_bytes=2 * size) == tasks
    assert plan(".", tmp_path, task_bytes=2 * size) == tasks
    assert plan(str(tmp_path / "**/*.jsonl"), tmp_path, task_bytes=2 * size) == tasks


def test_tasks_go_through_json_unharmed(tmp_path):
    write(tmp_path / "a.jsonl", lines(RECORDS))
    for task in plan("a.jsonl", tmp_path, task_bytes=1000):
        assert model.from_dict(FileTask, json.loads(json.dumps(model.to_dict(task)))) == task


def test_no_match_names_the_pattern_and_the_folder(tmp_path):
    with pytest.raises(BadData) as missing:
        plan("*.jsonl", tmp_path)
    assert "'*.jsonl'" in missing.value.message
    assert str(tmp_path) in missing.value.message
    with pytest.raises(BadData) as missing:
        plan(f"{tmp_path}/*.jsonl", tmp_path)
    assert missing.value.message == f"no file matches '{tmp_path}/*.jsonl'"


def test_an_unknown_format_is_refused_unless_it_is_said(tmp_path):
    write(tmp_path / "data.log", lines(RECORDS[:2]))
    with pytest.raises(UnsupportedType, match="data"):
        plan("*.log", tmp_path)
    assert user_rows(read_all(plan("*.log", tmp_path, format="ndjson"))[0]) == RECORDS[:2]


def test_paths_outside_the_allowed_folders_are_refused_links_included(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    write(inside / "a.jsonl", b"{}\n")
    write(outside / "b.jsonl", b"{}\n")
    assert plan("*.jsonl", inside, allowed=[inside])
    with pytest.raises(Forbidden):
        plan("../out/*.jsonl", inside, allowed=[inside])
    (inside / "link.jsonl").symlink_to(outside / "b.jsonl")
    with pytest.raises(Forbidden, match="link"):
        plan("*.jsonl", inside, allowed=[inside])
    assert len(plan("*.jsonl", inside, allowed=[inside, outside])[0].parts) == 2


# ------------------------------------------------------------------------------------------------ ids and locators


def test_rows_carry_an_id_and_a_source_that_a_rerun_repeats(tmp_path):
    write(tmp_path / "sub/a.jsonl", lines(RECORDS[:2]))
    table, refused = read_all(plan("sub/*.jsonl", tmp_path), source="notes")
    assert not refused
    assert table.schema.names == ["i", "s", "f", "_id", "_source", "_ingested_at"]
    assert str(table.schema.field("_source").type) == (
        "struct<source: string, locator: string, collected_at: timestamp[us, tz=UTC]>"
    )
    origin = table["_source"][1].as_py()
    assert (origin["source"], origin["locator"]) == ("notes", "sub/a.jsonl#1")
    assert table["_id"][1].as_py() == hashlib.sha256(b"notes\nsub/a.jsonl#1").hexdigest()[:32]
    assert table["_ingested_at"].cast(pa.int64()).to_pylist() == [STAMP_NS // 1000] * 2
    assert origin["collected_at"] == table["_ingested_at"][1].as_py()
    again, _ = read_all(plan("sub/*.jsonl", tmp_path), source="notes")
    assert again.equals(table)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("task_bytes", [1, 60, 100, 1000, 5000, 1 << 20])
def test_a_large_file_gives_the_same_rows_however_it_is_cut(tmp_path, task_bytes, end):
    body = lines(RECORDS).replace(b"\n", end)
    body = body.replace(b"{", end + end + b"{", 1).replace(end, end + b" " + end, 3).rstrip()
    path = write(tmp_path / "a.jsonl", body)
    whole, _ = read_all(plan("a.jsonl", tmp_path, task_bytes=1 << 30))
    tasks = plan("a.jsonl", tmp_path, task_bytes=task_bytes)
    parts = [part for task in tasks for part in task.parts]
    assert sum(p.bytes for p in parts) == path.stat().st_size
    assert len(tasks) == 1 or all(p.stop == q.start for p, q in itertools.pairwise(parts))
    table, refused = read_all(tasks, rows=7)
    assert (table.combine_chunks().to_pylist(), refused) == (whole.to_pylist(), [])
    found = body.split(b"\n")
    for row, locator in zip(user_rows(table), locators(table), strict=True):
        assert json.loads(found[int(locator.partition("#")[2])]) == row


def test_batches_stay_within_rows_and_bytes(tmp_path):
    write(tmp_path / "a.jsonl", lines(RECORDS))
    (task,) = plan("a.jsonl", tmp_path)
    schema = infer_schema([task])
    assert [b.batch.num_rows for b in read(task, schema, 90, 1 << 20)] == [90, 90, 20]
    small = [b.batch.num_rows for b in read(task, schema, 90, 400)]
    assert sum(small) == 200
    assert max(small) <= 400 // len(lines(RECORDS[:1])) + 1


# ------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"])
def test_every_format_is_read_with_and_without_compression(tmp_path, kind, suffix, compress):
    table = pa.Table.from_pylist(RECORDS)
    plain = tmp_path / "plain"
    if kind in ("csv", "tsv"):
        with open(plain, "w", newline="") as out:
            writer = csv.DictWriter(out, ["i", "s", "f"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(RECORDS)
    elif kind == "parquet":
        pq.write_table(table, plain)
    elif kind == "arrow":
        with pa.ipc.new_file(plain, table.schema) as out:
            out.write_table(table)
    else:
        plain.write_bytes(
            {"jsonl": lines(RECORDS), "json": json.dumps(RECORDS).encode(), "txt": "你好\n".encode()}[kind]
        )
    name = f"a.{kind}{suffix}"
    write(tmp_path / name, compress(plain.read_bytes()))
    found, refused = read_all(plan("a.*", tmp_path))
    expected = [{"text": "你好\n", "path": name}] if kind == "txt" else RECORDS
    assert user_rows(found) == expected
    assert not refused
    assert locators(found) == [f"{name}#{n}" for n in range(len(expected))]


def test_a_json_file_may_hold_one_object_or_lines_in_truth(tmp_path):
    write(tmp_path / "one.json", json.dumps(RECORDS[0], indent=2).encode())
    write(tmp_path / "two.json", lines(RECORDS[1:3]))
    table, _ = read_all(plan("*.json", tmp_path))
    assert user_rows(table) == RECORDS[:3]


def test_parquet_is_cut_between_row_groups(tmp_path):
    table = pa.table({"i": list(range(1000))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    size = (tmp_path / "a.parquet").stat().st_size
    tasks = plan("a.parquet", tmp_path, task_bytes=size // 4)
    assert len(tasks) > 2
    found, _ = read_all(tasks)
    assert found["i"].to_pylist() == list(range(1000))
    assert locators(found) == [f"a.parquet#{n}" for n in range(1000)]


# ------------------------------------------------------------------------------------------------ nothing is lost


def test_broken_lines_and_contradictions_are_handed_over_with_place_and_text(tmp_path):
    write(tmp_path / "a.jsonl", b'{"a":1}\nnot json\n\n{"a":"x", "b":1}\n{"a":NaN}\n[1]\n{"a":2}\n')
    table, refused = read_all(plan("a.jsonl", tmp_path))
    assert user_rows(table) == [{"a": 1}, {"a": 2}]
    assert locators(table) == ["a.jsonl#0", "a.jsonl#6"]
    assert sorted((r.locator, r.raw) for r in refused) == [
        ("a.jsonl#1", "not json"), ("a.jsonl#3", '{"a":"x", "b":1}'), ("a.jsonl#4", '{"a":NaN}'), ("a.jsonl#5", "[1]"),
    ]  # fmt: skip
    contradiction = next(r for r in refused if r.field)
    assert (contradiction.field, contradiction.value) == ("a", "x")
    assert contradiction.id == hashlib.sha256(b"files\na.jsonl#3").hexdigest()[:32]


def test_what_the_sample_did_not_show_is_refused_and_not_dropped(tmp_path):
    write(tmp_path / "a.jsonl", lines([{"a": 1}] * 5 + [{"a": 0.5}, {"a": 1, "late": 2}]))
    tasks = plan("a.jsonl", tmp_path)
    table, refused = read_all(tasks, infer_schema(tasks, limit=3))
    assert len(user_rows(table)) == 5
    assert [(r.locator, r.field) for r in refused] == [("a.jsonl#5", "a"), ("a.jsonl#6", "late")]
    table, refused = read_all(tasks, infer_schema(tasks, limit=None))
    assert (len(user_rows(table)), refused) == (7, [])


def test_one_schema_holds_for_all_files(tmp_path):
    write(tmp_path / "a.csv", b"zip,n\n123,1\n")
    write(tmp_path / "b.csv", b"zip,n,extra\n007,1.5,true\n")
    table, refused = read_all(plan("*.csv", tmp_path))
    assert user_rows(table) == [{"zip": "123", "n": 1.0, "extra": None}, {"zip": "007", "n": 1.5, "extra": True}]
    assert not refused


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path / "a.jsonl.gz", gzip.compress(lines(RECORDS))[:-20])
    with pytest.raises(BadData, match=r"a\.jsonl\.gz: the gzip body ends too early"):
        read_all(plan("*.gz", tmp_path), pa.schema([]))
    write(tmp_path / "b.parquet", b"PAR1 nonsense PAR1")
    with pytest.raises(BadData, match=r"b\.parquet"):
        infer_schema(plan("*.parquet", tmp_path))
    (task,) = plan("*.parquet", tmp_path)
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(BadData, match=r"b\.parquet"):
        list(read(task, pa.schema([]), 10, 1000))


def test_text_that_is_no_utf8_is_refused_with_its_bytes_shown(tmp_path):
    write(tmp_path / "a.txt", b"good")
    write(tmp_path / "b.md", b"bad \xff")
    table, refused = read_all(plan("*", tmp_path))
    assert user_rows(table) == [{"text": "good", "path": "a.txt"}]
    assert [(r.locator, r.raw) for r in refused] == [("b.md#0", "bad \N{REPLACEMENT CHARACTER}")]


def test_a_line_beyond_the_limit_stops_before_memory_is_full(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_RECORD_BYTES_MAX", "100")
    write(tmp_path / "a.jsonl", b'{"a":"' + b"x" * (3 * files._PIECE))
    with pytest.raises(BadData, match="longer than 100 bytes"):
        read_all(plan("a.jsonl", tmp_path))


def test_an_empty_file_has_no_rows(tmp_path):
    write(tmp_path / "a.jsonl", b"")
    write(tmp_path / "b.jsonl", b"\n \n")
    tasks = plan("*.jsonl", tmp_path)
    assert infer_schema(tasks) == pa.schema([])
    assert [b.batch.num_rows for b in read(tasks[0], pa.schema([]), 10, 1000)] in ([], [0])
