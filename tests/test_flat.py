"""The compiled parser of flat records equals the fold, record by record, or says that it is not its text."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.collect import flat
from headrace.collect.formats import Limits
from headrace.collect.project import check_and_project, project_slowly

SCHEMA = pa.schema([("id", pa.int64()), ("grösse", pa.float64()), ("ok", pa.bool_()), ("note", pa.string())])
LIMITS = Limits.of_settings()

spaces = st.sampled_from(["", " ", "  ", "\t", "\r"])
integers = st.one_of(st.integers(-(10**18), 10**18), st.integers(-(2**70), 2**70), st.integers(-9, 9)).map(str)
numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(2**60), 2**60).map(str),
    st.from_regex(r"\A-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?\Z"),
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda t: json.dumps(t, ensure_ascii=False)),
    st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=6).map(json.dumps),
    st.sampled_from(
        ['"\\/\\b\\f\\u00e9\\u4e2d"', '"\\u0000"', '"\\ud83d\\ude00"', '"\\ud83d"', '"a\\qb"', '"\\u12g4"']
    ),
)
odd = st.sampled_from(["nul", "truE", "[1]", "{}", "NaN", "-", "1.", ".5", "01", "+1", "1e", '"', "Infinity", "-0"])
values = {"id": integers, "grösse": numbers, "ok": st.sampled_from(["true", "false"]), "note": texts}


@st.composite
def lines(draw: st.DrawFn, wild: bool) -> str:
    """One record, mostly of the schema's columns in its order; a wild one may be anything near that."""
    names = draw(st.sampled_from([["id", "grösse", "ok", "note"], ["note", "id"], ["ok"], []]))
    if wild:
        names = names + draw(st.lists(st.sampled_from(["id", "note", "new", "ID", ""]), max_size=1))
    members = []
    for name in names:
        kinds = [values.get(name, integers), st.just("null")]
        if wild:
            kinds += [odd, integers, texts, numbers]
        value = draw(st.one_of(kinds))
        members.append(f'{draw(spaces)}"{name}"{draw(spaces)}:{draw(spaces)}{value}{draw(spaces)}')
    return "{" + ",".join(members) + "}"


def assert_as_the_fold_or_none(records: list[str]) -> bool:
    """Whether the parser took ``records``; if it did, the fold made the same columns of them and refused none."""
    text = "".join(record + "\n" for record in records).encode()
    made = flat.parse_now(text, len(records), SCHEMA)
    if made is None:
        return False
    slow = project_slowly([record.encode() for record in records], SCHEMA)
    assert not slow.refused
    assert slow.schema == SCHEMA
    made.validate(full=True)
    assert made.equals(slow.batch)
    floats = (np.asarray(batch.column("grösse").fill_null(0)).tobytes() for batch in (made, slow.batch))
    assert len(set(floats)) == 1
    return True


@settings(max_examples=300, deadline=None)
@given(st.lists(lines(wild=False), min_size=1, max_size=6))
@example(['{"id":1}', "{}", '{ "note" : "\\"\\\\" , "grösse":-0.0}', '{"grösse":1e23,"ok":null}'])
def test_what_the_parser_takes_is_what_the_fold_makes(records: list[str]) -> None:
    assert_as_the_fold_or_none(records)


@settings(max_examples=500, deadline=None)
@given(st.lists(lines(wild=True), min_size=1, max_size=3))
@example(['{"id":1,"id":2}'])
@example(['{"id":1,}'])
@example(['{,"id":1}'])
@example(['{"id":1 "ok":true}'])
@example(['{"id":"1"}'])
@example(['{"note":1}'])
@example(['{"grösse":-0}'])
@example(['{"grösse":9007199254740993}'])
@example(['{"grösse":1e400}'])
def test_what_only_resembles_such_records_is_left_to_the_fold(records: list[str]) -> None:
    assert_as_the_fold_or_none(records)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60).map(lambda tail: b'{"id":1,"note":"' + tail.replace(b"\n", b"") + b"\n"))
def test_no_bytes_make_it_read_beyond_its_text(text: bytes) -> None:
    made = flat.parse_now(text, 1, SCHEMA)
    assert made is None or made.num_rows == 1


@pytest.mark.parametrize(
    "record", ['{"id":1,"grösse":2,"ok":true,"note":"x"}', '{"note":"a\\nb"}', "{ }", '{"id":null}']
)
def test_plain_records_are_taken(record: str) -> None:
    assert assert_as_the_fold_or_none([record])


@settings(max_examples=1000, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=20))
@example(["4.9e-324", "2.2250738585072011e-308", "1.7976931348623157e308", "8.5e-23", "9007199254740993.0"])
@example(["123456789012345678901234567890.5", "0.000000000000000000000000000001", "1e-400", "3.0e-5"])
def test_a_number_becomes_the_nearest_double(numbers: list[str]) -> None:
    text = "".join(f'{{"x":{number}}}\n' for number in numbers).encode()
    made = flat.parse_now(text, len(numbers), pa.schema([("x", pa.float64())]))
    if made is not None:
        assert made.column(0).to_pylist() == [float(number) for number in numbers]


def test_doubles_of_every_size_are_read_to_the_bit() -> None:
    bits = np.random.default_rng(7).integers(0, 2**63, 200_000, np.uint64)
    drawn = bits.view(np.float64)
    doubles = drawn[np.isfinite(drawn)]
    text = "".join(f'{{"x":{value!r}}}\n' for value in doubles.tolist()).encode()
    made = flat.parse_now(text, len(doubles), pa.schema([("x", pa.float64())]))
    assert made is None or made.column(0).to_numpy().tobytes() == doubles.tobytes()
    # Among the finite ones are subnormals, a few in ten thousand, which are read by other means.
    assert made is not None
    assert struct.unpack("<Q", struct.pack("<d", made.column(0)[0].as_py()))[0] == doubles.view(np.uint64)[0]


def test_large_uploads_come_out_the_same_with_the_parser_and_before_it_is_loaded() -> None:
    schema = pa.schema([("n", pa.int64()), ("name", pa.string()), ("share", pa.float64())])
    records = [{"n": n, "name": f"line {n}\t“quoted”", "share": n / 7} for n in range(20_000)]
    text = "".join(json.dumps(record, ensure_ascii=n % 2 == 0) + "\n" for n, record in enumerate(records)).encode()
    flat.parse_now(b'{"n":1}\n', 1, schema)
    good, rows, errors, made = check_and_project(text, LIMITS, schema)
    assert (good, rows, errors) == (text, 20_000, [])
    assert made is not None
    assert made.batch.to_pylist() == records
    assert made.batch.equals(flat.parse_now(text, rows, schema))


def test_a_program_that_ends_while_the_parser_loads_ends_well() -> None:
    code = (
        "import pyarrow as pa; from headrace.collect import flat\n"
        "assert flat.parse(b'{\"n\":1}\\n' * 100_000, 100_000, pa.schema([('n', pa.int64())])) is None\n"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
    assert time.monotonic() - began < 120
