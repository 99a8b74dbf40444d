import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.collect import formats, project
from headrace.collect.project import project_json, project_slowly

EMPTY = pa.schema([])


def texts(*records):
    return [json.dumps(r).encode() for r in records]


def project_records(*records, schema=EMPTY):
    return project_json(texts(*records), schema)


def types(result):
    return {f.name: str(f.type) for f in result.schema}


def reasons(result):
    return [(r.index, r.field, r.value, r.reason) for r in result.refused]


def same(left, right):
    """Equal to the last bit and name: values, order, metadata, verdicts."""
    assert left.schema.equals(right.schema, check_metadata=True), (left.schema, right.schema)
    assert left.batch.schema.equals(left.schema, check_metadata=True)
    assert left.batch.equals(right.batch), (left.batch.to_pylist(), right.batch.to_pylist())
    assert left.accepted.tolist() == right.accepted.tolist()
    assert left.refused == right.refused
    assert left.widened == right.widened
    left.batch.validate(full=True)


# ------------------------------------------------------------------------------------------------ what a column holds


def test_the_first_value_decides_and_a_contradiction_refuses_the_record_alone():
    result = project_records(
        {"a": None, "b": True}, {"a": 1}, {"a": "x", "c": 1}, {"b": 0}, {"a": [1]}, {"a": {}}, {"a": True}, {"a": 2}
    )
    assert types(result) == {"b": "bool", "a": "int64"}
    assert result.batch.to_pylist() == [{"b": True, "a": None}, {"b": None, "a": 1}, {"b": None, "a": 2}]
    assert result.accepted.tolist() == [0, 1, 7]
    assert result.accepted.dtype == np.int64
    assert reasons(result) == [
        (2, "a", "x", "the column holds numbers, and this is a string"),
        (3, "b", "0", "the column holds true or false, and this is a number"),
        (4, "a", "[1]", "the column holds numbers, and this is a list"),
        (5, "a", "{}", "the column holds numbers, and this is an object"),
        (6, "a", "true", "the column holds numbers, and this is true or false"),
    ]


def test_integers_turn_into_floats_once_a_number_needs_it():
    assert types(project_records({"a": 1}, {"a": 2})) == {"a": "int64"}
    assert project_records({"a": 1}, {"a": 2.5}).batch.to_pylist() == [{"a": 1.0}, {"a": 2.5}]
    assert project_records({"a": 2**63 - 1}, {"a": -(2**63)}).batch.to_pylist() == [{"a": 2**63 - 1}, {"a": -(2**63)}]
    big = project_json(
        [b'{"a":9223372036854775808}', b'{"a":1180591620717411303424}', b'{"a":18446744073709551615}'], EMPTY
    )
    assert big.batch.to_pylist() == [{"a": 2.0**63}, {"a": 2.0**70}, {"a": 2.0**64}]
    assert types(project_json([b'{"a":1.0}', b'{"a":1}'], EMPTY)) == {"a": "double"}


@pytest.mark.parametrize("number", [b"1e400", b"-1e999", str(2**1100).encode(), b"9" * 5000])
def test_a_number_beyond_a_float_is_refused_and_never_stored_as_infinity(number):
    result = project_json([b'{"n":1}'] * 100 + [b'{"n":' + number + b"}"], EMPTY)
    assert [(r.index, r.field, r.reason) for r in result.refused] == [
        (100, "n", "the number is beyond the range of a 64-bit float")
    ]
    assert types(result) == {"n": "int64"}


def test_nulls_and_empties_give_no_type_until_a_value_comes():
    result = project_records({"a": None, "l": [], "o": {}, "n": [None], "d": {"x": None}})
    assert types(result) == {}
    assert (result.batch.num_rows, result.accepted.tolist()) == (1, [0])
    result = project_records({"l": [], "o": {}, "m": []}, {"o": {"x": 1}, "l": [None, "t"], "m": 5}, {"m": []})
    assert result.batch.to_pylist() == [
        {"o": {"x": None}, "l": [], "m": None},
        {"o": {"x": 1}, "l": [None, "t"], "m": 5},
    ]
    assert [r.index for r in result.refused] == [2]


def test_objects_gain_fields_and_lists_their_items():
    result = project_records({"o": {"p": [{"x": 1}]}}, {"o": {"p": [{"y": "t"}, None]}}, {"o": {"p": [{"x": "no"}]}})
    assert result.batch.to_pylist() == [
        {"o": {"p": [{"x": 1, "y": None}]}},
        {"o": {"p": [{"x": None, "y": "t"}, None]}},
    ]
    assert reasons(result) == [(2, "o.p[0].x", "no", "the column holds numbers, and this is a string")]


def test_strings_are_never_read_as_times():
    day = {"t": "2024-01-01", "l": ["2024-01-01T00:00:00Z"], "i": "12"}
    for result in (project_records(day), project_records(*[day] * 500)):
        assert types(result) == {"t": "string", "l": "list<item: string>", "i": "string"}


def test_of_a_key_that_appears_twice_the_last_counts():
    for count in (1, 500):
        result = project_json([b'{"a":1,"b":2,"a":3}'] * count, EMPTY)
        assert result.batch.to_pylist() == [{"a": 3, "b": 2}] * count


def test_a_text_that_is_no_record_is_refused_and_not_raised():
    result = project_json([b'{"a":1}', b"[1]", b"nonsense"], EMPTY)
    assert [r.index for r in result.refused] == [1, 2]


# ------------------------------------------------------------------------------------------------ the schema


def test_an_existing_column_that_must_change_is_listed_as_widened():
    schema = pa.schema(
        [("i", pa.int64()), ("s", pa.string()), ("o", pa.struct([("x", pa.int64())])), ("l", pa.list_(pa.int64()))]
    )
    result = project_records({"o": {"y": 1}}, {"i": 0.5}, {"new": 1}, {"l": [1.5]}, schema=schema)
    assert result.widened == ("i", "o", "l")
    assert types(result) == {
        "i": "double", "s": "string", "o": "struct<x: int64, y: int64>", "l": "list<item: double>", "new": "int64",
    }  # fmt: skip
    assert project_records({"s": 5}, schema=schema).widened == ()


def test_the_existing_schema_is_the_first_word():
    result = project_records({"a": 5}, {"a": "x"}, schema=pa.schema([("a", pa.string()), ("_id", pa.string())]))
    assert types(result) == {"a": "string"}
    assert [r.index for r in result.refused] == [0]


def test_metadata_of_untouched_columns_survives():
    field = pa.field("a", pa.int32(), metadata={b"headrace.type": b"x"})
    result = project_records({"a": 5, "b": 1}, schema=pa.schema([field]))
    assert result.schema.field("a").equals(field, check_metadata=True)
    assert types(project_records({"a": 2**40}, schema=pa.schema([field]))) == {"a": "int64"}


def test_columns_of_other_types_take_text_that_can_be_read_as_them():
    schema = pa.schema([("t", pa.timestamp("us", "UTC")), ("v", pa.list_(pa.float32(), 2))])
    result = project_records(
        {"t": "2024-01-01T00:00:00Z"}, {"t": "yesterday"}, {"v": [1, 2]}, {"v": [1]}, schema=schema
    )
    assert result.accepted.tolist() == [0, 2]
    assert result.schema == schema
    assert result.batch.column("v").to_pylist() == [None, [1.0, 2.0]]


def test_inference_stops_at_columns_max(monkeypatch):
    monkeypatch.setenv("HEADRACE_COLUMNS_MAX", "3")
    result = project_records({"a": 1, "o": {"x": 1}}, {"b": 1}, {"o": {"y": 1}}, {"a": 2})
    assert result.accepted.tolist() == [0, 3]
    assert "4 columns" in result.refused[0].reason
    wide = [{f"c{i}": i for i in range(4)}] * 200
    assert len(project_records(*wide).refused) == 200


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("count", [1, 300])
def test_names_that_cannot_be_columns_are_changed_and_remembered(count):
    record = {"_id": 1, "a": 1, "A": 2, "_x": 3, "__x": 4, "a b": 5, "a\tb": 6, "": 7, "a__2": 8}
    result = project_records(*[record] * count)
    assert result.schema.names == ["__id", "a", "A__2", "__x", "___x", "a_b", "a_b__2", "__", "a__2__2"]
    assert [project.original_name(f) for f in result.schema] == list(record)
    assert result.schema.field("A__2").metadata == {b"headrace.name": b"A"}
    assert result.schema.field("a").metadata is None
    again = project_records(record, {"A": "no"}, schema=result.schema)
    assert again.schema.equals(result.schema, check_metadata=True)
    assert again.batch.to_pylist() == result.batch.to_pylist()[:1]
    assert again.refused[0].field == "A"


def test_nested_names_are_changed_too_but_may_begin_with_an_underscore():
    result = project_records({"o": {"_x": 1, "y": 2, "Y": 3, "a=b": 4}})
    assert result.batch.to_pylist() == [{"o": {"_x": 1, "y": 2, "Y__2": 3, "a_b": 4}}]
    assert project_records({"o": {"Y": 5}}, schema=result.schema).batch.to_pylist() == [
        {"o": {"_x": None, "y": None, "Y__2": 5, "a_b": None}}
    ]


# ------------------------------------------------------------------------------------------------ fast equals slow


def fast_and_slow(records, schema=EMPTY):
    array = pa.array([r.decode() for r in records], pa.large_string())
    slow = project_slowly(records, schema)
    for given_texts in (records, array):
        same(project_json(given_texts, schema), slow)
    fast = project._project_fast(records, schema)
    if fast:
        same(fast, slow)
    return fast


def test_flat_records_take_the_fast_path():
    records = texts(*({"i": i, "f": i / 3, "s": f"text {i}", "b": i % 2 == 0, "l": [i, i + 1]} for i in range(1000)))
    first = fast_and_slow(records)
    assert first is not None
    assert fast_and_slow(records, first.schema) is not None


def test_pretty_printed_records_take_the_fast_path():
    records = [json.dumps({"i": i, "l": [1.5], "s": "a\nb"}, indent=2).encode() for i in range(100)]
    assert fast_and_slow(records) is not None


def test_the_order_of_new_columns_is_that_of_their_first_values():
    records = texts(
        {"z": None, "l": []}, {"y": 1}, {"x": 1, "z": 2, "l": []}, *[{"l": [1], "w": "t", "_v": True}] * 100
    )
    assert fast_and_slow(records).schema.names == ["y", "x", "z", "l", "w", "__v"]


@pytest.mark.parametrize(
    "odd",
    [
        b'{"f":-0}',
        b'{"i":1.0}',
        b'{"i":1e2}',
        b'{"i":9223372036854775808}',
        b'{"i":"1"}',
        b'{"s":1}',
        b'{"s":null,"s":"x"}',
        b'{"i":1,"i":2}',
        b'{"n":1e400}',
        b'{"n":' + b"9" * 400 + b"}",
        b'{"o":{"x":1}}',
        b'{"o":{}}',
        b'{"e":[]}',
        b'{"e":[[]]}',
        b'{"e":[null]}',
        b'{"i":[]}',
        b'{"t":"2024-01-01"}',
        b'{"t":["2024-01-01"]}',
        b'{"s":"\\ud83d\\ude00\\u0000"}',
        b'{"\\u0069":5}',
        b'{"I":5}',
        b"{}",
        b'{"f":-0.0}',
        b'{"m":[1,"x"]}',
        b'{"m":[1,2.5]}',
        b'{"m":[[1]]}',
        b'{"f":1e-400}',
        b'{"f":9007199254740993}',
        b'{"i":true}',
        b'{ "i" : 3 }',
        b'{"i":-0}',
    ],
)
@pytest.mark.parametrize("place", [0, 70, 99])
def test_one_odd_record_changes_nothing_but_the_speed(odd, place):
    records = [b'{"i":%d,"f":%d.5,"s":"t%d"}' % (i, i, i) for i in range(100)]
    records[place] = odd
    fast_and_slow(records)
    fast_and_slow(records, pa.schema([("i", pa.int64()), ("f", pa.float64()), ("s", pa.string())]))


LEAVES = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.sampled_from(["x", "2024-01-01", "12:00", "", "你好", "1", "\n", "}\n{"])
VALUES = st.recursive(
    LEAVES | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyX "), inner, max_size=2),
    max_leaves=4,
)
RECORDS = st.dictionaries(st.sampled_from(["a", "b", "A", "_id", "c d"]), VALUES, max_size=4)
COLUMNS = {
    "i": st.integers(-9, 9), "f": st.floats(-9, 9) | st.integers(-9, 9), "s": TEXTS, "b": st.booleans(),
    "l": st.lists(st.none() | st.integers(0, 9), max_size=3), "t": st.just("2024-01-01"),
    "v": st.lists(TEXTS, max_size=2),
}  # fmt: skip
PLAIN = st.fixed_dictionaries({}, optional={name: st.none() | values for name, values in COLUMNS.items()})


@settings(max_examples=50, deadline=None)
@given(st.lists(RECORDS, max_size=8), st.integers(0, 8))
def test_any_prefix_has_the_same_verdicts(records, cut):
    whole = project_slowly(texts(*records), EMPTY)
    part = project_slowly(texts(*records[:cut]), EMPTY)
    assert part.refused == [r for r in whole.refused if r.index < cut]
    assert part.accepted.tolist() == [i for i in whole.accepted if i < cut]
    rest = project_slowly(texts(*records[cut:]), part.schema)
    assert rest.schema.equals(whole.schema, check_metadata=True)
    assert (rest.accepted + min(cut, len(records))).tolist() == [i for i in whole.accepted if i >= cut]


@settings(max_examples=50, deadline=None)
@given(st.lists(PLAIN, min_size=64, max_size=80))
def test_fast_equals_slow_on_plain_records(records):
    fast_and_slow(texts(*records))


@settings(max_examples=30, deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=6), st.integers(64, 90))
def test_fast_equals_slow_on_any_records(records, count):
    fast_and_slow([texts(*records)[i * i % len(records)] for i in range(count)])


@settings(max_examples=50, deadline=None)
@given(st.lists(RECORDS, max_size=6))
def test_every_accepted_value_is_in_its_column(records):
    result = project_slowly(texts(*records), EMPTY)
    for row, index in enumerate(result.accepted.tolist()):
        record = formats.loads(texts(*records)[index])
        for field in result.schema:
            value, stored = record.get(project.original_name(field)), result.batch.column(field.name)[row].as_py()
            if isinstance(value, str | bool):
                assert stored == value
            elif isinstance(value, int | float):
                assert math.isclose(stored, value, rel_tol=1e-15)
