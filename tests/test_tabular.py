import datetime

import pyarrow as pa
import pytest

from headrace.collect import formats
from headrace.collect.tabular import project_table, reading_schema
from headrace.errors import BadData

EMPTY = pa.schema([])


def batch(**columns):
    return pa.RecordBatch.from_pydict(columns)


def rows(result):
    result.batch.validate(full=True)
    assert result.batch.schema.equals(result.schema, check_metadata=True)
    return result.batch.to_pylist()


def test_new_columns_keep_their_type_and_lose_only_encodings():
    given = batch(
        small=pa.array([1, 2], pa.uint16()),
        word=pa.array(["x", "x"]).dictionary_encode(),
        wide=pa.array(["a", None], pa.large_string()),
        vector=pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        nothing=pa.nulls(2),
    )
    result = project_table(given, EMPTY)
    assert list(map(str, result.schema.types)) == ["uint16", "string", "string", "fixed_size_list<item: float>[2]"]
    assert rows(result)[0] == {"small": 1, "word": "x", "wide": "a", "vector": [1.0, 2.0]}
    assert result.accepted.tolist() == [0, 1]


def test_names_follow_the_rules_of_json_records_at_every_depth():
    result = project_table(batch(_id=[1], a=[2], A=[3], o=[{"x y": 1, "z": 2}]), EMPTY)
    assert result.schema.names == ["__id", "a", "A__2", "o"]
    assert rows(result) == [{"__id": 1, "a": 2, "A__2": 3, "o": {"x_y": 1, "z": 2}}]
    assert rows(project_table(batch(A=[7]), result.schema)) == [{"__id": None, "a": None, "A__2": 7, "o": None}]


def test_values_are_cast_where_nothing_is_lost_and_other_rows_are_refused():
    schema = pa.schema([("i", pa.int32()), ("t", pa.timestamp("us")), ("l", pa.list_(pa.int8()))])
    given = batch(i=["1", "x", None, "4"], t=["2024-01-01", None, "no", None], l=[[1], [2], [3], [4, 1000]])
    result = project_table(given, schema)
    assert rows(result) == [{"i": 1, "t": datetime.datetime(2024, 1, 1), "l": [1]}]
    assert [(r.index, r.field, r.value) for r in result.refused] == [
        (1, "i", "x"),
        (2, "t", "no"),
        (3, "l", "[4,1000]"),
    ]
    assert result.schema == schema
    assert result.widened == ()


def test_an_integer_column_widens_for_a_fraction_only():
    schema = pa.schema([("i", pa.int64())])
    assert project_table(batch(i=[1.0, 2.0]), schema).schema == schema
    result = project_table(batch(i=[1.0, 2.5]), schema)
    assert (rows(result), result.widened) == ([{"i": 1.0}, {"i": 2.5}], ("i",))


def test_structs_gain_fields_inside_lists_too():
    schema = pa.schema([("q", pa.list_(pa.struct([("a", pa.int64())])))])
    result = project_table(batch(q=[[{"b": "t", "a": 1}], None, [], [None, {"b": None, "a": 5}]]), schema)
    assert [r["q"] for r in rows(result)] == [[{"a": 1, "b": "t"}], None, [], [None, {"a": 5, "b": None}]]
    assert result.widened == ("q",)


@pytest.mark.parametrize(
    ("held", "given"),
    [
        (pa.int64(), [True]),
        (pa.bool_(), [1]),
        (pa.timestamp("us"), [1]),
        (pa.string(), [{"x": 1}]),
        (pa.int64(), [[1]]),
    ],
)
def test_kinds_are_not_crossed(held, given):
    result = project_table(batch(a=[*given, None]), pa.schema([("a", held)]))
    assert result.accepted.tolist() == [1]
    assert [r.index for r in result.refused] == [0]


def test_a_slice_of_a_batch_is_only_that_slice():
    whole = batch(s=[{"x": 1}, {"x": 2}, None, {"x": 4}], l=[[1], None, [2, 3], []], i=["1", "2", "x", "4"])
    schema = pa.schema([("s", pa.struct([("x", pa.float64())])), ("l", pa.list_(pa.float64())), ("i", pa.int64())])
    result = project_table(whole.slice(1, 3), schema)
    assert rows(result) == [{"s": {"x": 2.0}, "l": None, "i": 2}, {"s": {"x": 4.0}, "l": [], "i": 4}]
    assert [r.index for r in result.refused] == [1]


def test_columns_max_holds_for_tables(monkeypatch):
    monkeypatch.setenv("HEADRACE_COLUMNS_MAX", "2")
    with pytest.raises(BadData, match="'c'"):
        project_table(batch(a=[1], b=[1], c=[1]), EMPTY)


def test_csv_text_reaches_a_string_column_verbatim():
    body, schema = b"zip,n\n123,1\n1.50,2\n", pa.schema([("zip", pa.string())])
    reading = reading_schema(formats.table_schema("csv", body), schema)
    (read,) = formats.read_table("csv", body, reading)
    assert rows(project_table(read, schema)) == [{"zip": "123", "n": 1}, {"zip": "1.50", "n": 2}]
