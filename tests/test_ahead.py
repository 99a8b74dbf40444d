"""What is projected while a body is checked: the same verdicts and rows as without, and nothing left behind."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import arrivals
from headrace.collect import ahead, formats
from headrace.collect.project import check_and_project, project_slowly
from headrace.errors import BadData
from headrace.inbox import Entry, Inbox, Upload, columns_path, remove_body
from headrace.intake import Intake
from headrace.reading import conform
from headrace.rows import SYSTEM

LIMITS = formats.Limits(depth=8, bytes=1 << 20)
EMPTY = pa.schema([])
KNOWN = pa.schema([("i", pa.int64()), ("f", pa.float64()), ("s", pa.string())])
ODD = [
    b'{"f":NaN}', b'{"f":-Infinity}', b'{"x":[Inf]}', b'{"f":-0}', b'{"f":-0.0}', b'{"f":1e400}', b'{"i":1.5}',
    b'{"i":"x"}', b'{"i":1,"i":2}', b'{"s":"\\ud800"}', b'{"s":"a\\u0000"}', b'{"s":"\xff"}', b'{"o":{"a":1}}', b"{}",
    b"[1]", b"", b'{"i":1} {"i":2}', b'{"i":01}', b'{"new":true}', b'{"s":"' + b"x" * 40 + b'"}\r', b'{"l":[null,1]}',
]  # fmt: skip
VALUES = {
    "i": st.none() | st.integers(-9, 2**64), "f": st.floats(-9, 9) | st.integers(-9, 9), "s": st.text(max_size=4),
    "b": st.booleans(), "l": st.lists(st.integers(0, 9), max_size=2), "t": st.just("2024-01-01"),
}  # fmt: skip
RECORDS = st.fixed_dictionaries({}, optional=VALUES).map(lambda r: json.dumps(r).encode())


def line(i: int) -> bytes:
    return b'{"i":%d,"f":%d.5,"s":"t%d"}' % (i, i, i)


def agrees(chunk: bytes, schema: pa.Schema) -> bool:
    """Verdicts as of the check alone, columns as of the fold; says whether there were columns."""
    good, rows, errors, made = check_and_project(chunk, LIMITS, schema)
    assert (good, rows, errors) == formats.check_ndjson(chunk, LIMITS)
    if made is None:
        return False
    slow = project_slowly(good.splitlines(), schema)
    assert made.schema.equals(slow.schema, check_metadata=True)
    assert made.batch.equals(slow.batch)
    assert (made.accepted.tolist(), made.refused, made.widened) == (slow.accepted.tolist(), slow.refused, slow.widened)
    return True


def test_plain_lines_are_projected_by_the_parse_that_checks_them():
    assert agrees(b"\n".join(map(line, range(200))) + b"\n", EMPTY)
    assert agrees(formats.BOM + b"\r\n".join(map(line, range(200))), KNOWN)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", [0, 99])
def test_one_odd_line_changes_no_verdict(odd, place):
    lines = [line(i) for i in range(100)]
    lines[place] = odd
    for schema in (EMPTY, KNOWN):
        agrees(b"\n".join(lines) + b"\n", schema)


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS | st.sampled_from(ODD), min_size=1, max_size=6), st.integers(64, 90))
def test_check_and_projection_agree_on_any_lines(lines, count):
    agrees(b"\n".join((lines * count)[:count]) + b"\n", EMPTY)


@settings(max_examples=40, deadline=None)
@given(st.lists(RECORDS, min_size=64, max_size=80))
def test_check_and_projection_agree_on_flat_records(lines):
    agrees(b"\n".join(lines), KNOWN)


def body_of(schemas: int, rows: int) -> bytes:
    """Lines whose records gain a column ``schemas`` times."""
    lines = []
    for i in range(rows):
        more = "".join(f',"c{n}":{i}' for n in range(i * (schemas + 1) // rows))
        lines.append(f'{{"i":{i},"s":"text {i}","pad":"{"x" * 80}"{more}}}')
    return ("\n".join(lines) + "\n").encode()


@pytest.fixture
def inbox(tmp_path):
    made = Inbox(tmp_path)
    yield made
    made.close()


def taken(inbox: Inbox, body: bytes, schema: pa.Schema | None = EMPTY) -> tuple[Path, int]:
    intake = Intake(inbox, "ndjson", "", schema=None if schema is None else lambda: schema)
    for start in range(0, len(body), 1 << 20):
        intake.feed([body[start : start + (1 << 20)]])
    judged = intake.finish()
    assert isinstance(judged.body, Path)
    return judged.body, judged.rows


def rows_of(path: Path, rows: int, schema: pa.Schema = EMPTY) -> tuple[pa.Table, list]:
    entry = Entry(1, "0" * 32, "ndjson", rows, 1e9, None, path)
    made = arrivals.gather([entry], lambda entry: entry.body, schema)
    for batch in made.batches:
        batch.validate(full=True)
    schema = pa.schema([*made.schema, *SYSTEM])
    return pa.Table.from_batches([conform(batch, schema) for batch in made.batches], schema), made.refused


def same(left: tuple[pa.Table, list], right: tuple[pa.Table, list]) -> bool:
    """Equal in schema, rows and refusals, without a comparison of long texts should they not be."""
    return left[0].equals(right[0], check_metadata=True) and left[1] == right[1]


@pytest.mark.parametrize("schemas", [0, 2])
@pytest.mark.parametrize("stored", [EMPTY, pa.schema([("i", pa.int64())]), pa.schema([("pad", pa.string())])])
def test_rows_are_the_same_whether_columns_were_kept_or_not(inbox, schemas, stored):
    body = body_of(schemas, 70_000)
    with_columns, rows = taken(inbox, body)
    without, _ = taken(inbox, body, None)
    kept = list(ahead.parts(columns_path(with_columns)))
    assert sum(part.bytes for part in kept) == len(body)
    assert sum(part.rows for part in kept) == rows
    assert sum(part.batch is not None for part in kept) >= 2
    assert not columns_path(without).exists()
    assert with_columns.read_bytes() == without.read_bytes() == body
    held = same(rows_of(with_columns, rows, stored), rows_of(without, rows, stored))
    assert held


def test_lines_that_cannot_be_projected_early_are_at_the_flush(inbox):
    lines = body_of(0, 70_000).splitlines()
    lines[20_000] = b'{"i":"refused"}'
    lines[50_000] = b"broken"
    path, rows = taken(inbox, b"\n".join(lines))
    parts = list(ahead.parts(columns_path(path)))
    assert {part.batch is None for part in parts} == {True, False}
    held, refused = rows_of(path, rows)
    assert (len(held), [r["value"] for r in refused]) == (69_998, ["refused"])
    assert held["_raw"].slice(69_996).to_pylist() == [text.decode() for text in lines[-2:]]


def test_torn_foreign_or_missing_columns_cost_only_time(inbox):
    body = body_of(1, 40_000)
    path, rows = taken(inbox, body)
    expected = rows_of(path, rows)
    beside = columns_path(path)
    whole = beside.read_bytes()
    start = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    for damaged in (whole[: len(whole) // 2], whole[:-9], b"", b"no columns", whole.replace(start, start[::-1])):
        # A new file: the rows expected still lie in the mapped old one.
        beside.unlink()
        beside.write_bytes(damaged)
        held = same(rows_of(path, rows), expected)
        assert held
    assert list(ahead.parts(beside)) == []
    beside.unlink()
    held = same(rows_of(path, rows), expected)
    assert held


def test_columns_go_with_their_body(inbox, tmp_path):
    path, rows = taken(inbox, body_of(0, 40_000))
    assert len(list((tmp_path / "inbox").iterdir())) == 2
    inbox.append(Upload("d", "ndjson", rows, path)).result(10)
    inbox.forget("d", 1).result(10)
    assert list((tmp_path / "inbox").iterdir()) == []
    remove_body(taken(inbox, body_of(0, 40_000))[0])
    intake = Intake(inbox, "ndjson", "", schema=lambda: EMPTY)
    intake.feed([body_of(0, 40_000)])
    intake.feed([body_of(0, 40_000)])
    intake.abandon()
    intake.abandon()
    bad = Intake(inbox, "ndjson", "", schema=lambda: EMPTY)
    bad.feed([b"bad\n" * 400_000])
    with pytest.raises(BadData, match="no record is good"):
        bad.finish()
    bad.abandon()
    assert list((tmp_path / "inbox").iterdir()) == []


def test_a_restart_takes_columns_for_what_they_are(tmp_path):
    first = Inbox(tmp_path)
    body = body_of(0, 40_000)
    path, rows = taken(first, body)
    first.append(Upload("d", "ndjson", rows, path)).result(10)
    first.close()
    again = Inbox(tmp_path)
    again.close()
    assert [p.name for p in (tmp_path / "inbox").iterdir()] == [path.name]
    assert len(rows_of(path, rows)[0]) == 40_000
