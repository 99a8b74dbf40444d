"""Masks and row filters on batches: what comes out, of which type, and which of two masks wins."""

import datetime as dt
import struct
from decimal import Decimal

import pyarrow as pa
import pytest

from headrace import policy
from headrace.errors import BadRequest
from headrace.model import Policy, Principal
from headrace.policy import Mask

KEY = b"k" * 32
ANN = Principal("ann", "consumer")


def masked(text, values, kind=None):
    return Mask.parse(text).apply(pa.array(values, kind), KEY)


def combined(*policies, principal=ANN, dataset="people", tags=None):
    checked = [policy.check(one) for one in policies]
    return policy.effective(checked, principal, dataset, tags or {})


def rule(row_filter=None, subject="*", dataset="*", **masks):
    return Policy("x", dataset, subject, row_filter, masks)


@pytest.mark.parametrize(
    ("mask", "before", "after", "kind"),
    [
        ("null", [1, 2], [None, None], pa.int64()),
        ("constant:gone", [1, None], ["gone", "gone"], pa.string()),
        (
            "last:4",
            ["13800138000", "12345", None, "一二三四五六七八"],
            ["****8000", "****", None, "****五六七八"],
            pa.string(),
        ),
        ("last:2", [12345678], ["****78"], pa.string()),
        ("month", [dt.date(2024, 2, 29), None], [dt.date(2024, 2, 1), None], pa.date32()),
        ("month", ["2024-02-29T10:00:00", "x", "2024-13-01"], ["2024-02", None, None], pa.string()),
        ("month", [7], [None], pa.int64()),
        ("bucket:10", [-5, 0, 19, None], [-10, 0, 10, None], pa.int64()),
        ("bucket:0.5", [1.7, float("nan")], [1.5, None], pa.float64()),
        ("bucket:100", [Decimal("250.10")], [200.0], pa.float64()),
        ("bucket:10", ["12"], [None], pa.string()),
        ("redact:phone", ["打13800138000"], ["打[PHONE]"], pa.string()),
        ("redact", [13800138000], ["[PHONE]"], pa.string()),
        ("redact", [13800138000.0], ["[PHONE]"], pa.string()),
        ("redact", [[{"t": "a@b.co", "n": 5}], None], [[{"t": "[EMAIL]", "n": None}], None], None),
    ],
)
def test_a_mask_makes_of_values(mask, before, after, kind):
    made = masked(mask, before)
    assert made.to_pylist() == after
    assert made.type == (kind or made.type) == Mask.parse(mask).type_of(pa.array(before).type)


def test_months_of_timestamps_keep_unit_and_zone():
    kind = pa.timestamp("us", "UTC")
    assert masked("month", [dt.datetime(2024, 2, 29, tzinfo=dt.UTC)], kind).type == kind


def test_hashes_join_equal_values_and_change_with_the_key():
    made = masked("hash", ["a", "b", "a", None]).to_pylist()
    assert made[0] == made[2] != made[1]
    assert made[3] is None
    assert len(made[0]) == 32
    assert Mask.parse("hash").apply(pa.array(["a"]), b"other")[0].as_py() != made[0]
    assert masked("hash", [7])[0].as_py() == masked("hash", ["7"])[0].as_py()


def test_hashes_are_equal_within_a_dataset_and_across_those_of_a_name():
    def shown(dataset, mask):
        batch = pa.record_batch({"_id": ["7"], "a": ["7"]})
        return combined(rule(a=mask), dataset=dataset).compile(batch.schema, KEY).apply(batch).to_pylist()[0]

    assert shown("one", "hash") == shown("one", "hash")
    assert shown("one", "hash")["a"] != shown("two", "hash")["a"]
    assert shown("one", "hash")["_id"] != shown("two", "hash")["_id"]
    assert shown("one", "hash:people")["a"] == shown("two", "hash:people")["a"] != shown("two", "hash:others")["a"]
    assert (Mask.parse("hash:x") & Mask.parse("hash")).text == "null"


@pytest.mark.parametrize(
    "text",
    ["", "nil", "hash:", "hash:A b", "null:1", "last:", "last:0", "last:x", "bucket:-1", "bucket:nan", "redact:x"],
)
def test_what_is_no_mask_is_refused(text):
    with pytest.raises(BadRequest):
        Mask.parse(text)


@pytest.mark.parametrize(
    ("one", "two", "both"),
    [
        ("null", "constant:x", "null"),
        ("constant:x", "hash", "constant:x"),
        ("constant:x", "constant:y", "null"),
        ("last:2", "last:4", "last:2"),
        ("bucket:10", "bucket:100", "bucket:100"),
        ("bucket:10", "bucket:15", "null"),
        ("redact:email", "redact:phone", "redact:email,phone"),
        ("hash", "last:4", "null"),
        ("month", "month", "month"),
    ],
)
def test_of_two_masks_what_shows_no_more_than_either_holds(one, two, both):
    assert (Mask.parse(one) & Mask.parse(two)).text == both == (Mask.parse(two) & Mask.parse(one)).text


def test_filters_combine_by_and_and_null_hides():
    made = combined(rule("a > 1"), rule("b = 'x'", subject="role:consumer"), rule("a > 100", subject="role:producer"))
    batch = pa.record_batch({"a": [1, 2, 3, None], "b": ["x", "x", None, "x"]})
    assert made.compile(batch.schema, KEY).apply(batch).to_pylist() == [{"a": 2, "b": "x"}]


def test_filters_see_what_masks_hide_and_raw_is_dropped():
    batch = pa.record_batch({"_id": ["1", "2"], "a": [1, 2], "_raw": ["{}", "{}"]})
    found = combined(rule("a = 2", a="null")).compile(batch.schema, KEY).apply(batch).to_pylist()
    assert [row["a"] for row in found] == [None]
    assert "_raw" not in found[0]
    assert found[0]["_id"] not in ("1", "2")


def test_a_filter_that_cannot_be_computed_hides_the_rows_it_fails_on_and_no_other():
    batch = pa.record_batch({"a": [1, 9223372036854775807, 3, None], "b": [["x"], None, [], ["y"]]})
    assert combined(rule("missing = 1")).compile(batch.schema, KEY).apply(batch).num_rows == 0
    found = combined(rule("a + 1 > 0")).compile(batch.schema, KEY).apply(batch).to_pylist()
    assert found == [{"a": 1, "b": ["x"]}, {"a": 3, "b": []}]


def test_a_value_that_no_mask_can_show_is_null_and_leaves_the_others_alone():
    assert masked("bucket:10", [17, 2**64 - 1, None, 3], pa.uint64()).to_pylist() == [10, None, None, 0]
    far = pa.array([0, 2**62, 86_400_000_000], pa.timestamp("us"))
    assert Mask.parse("last:2").apply(far, KEY).to_pylist()[0::2] == ["****00", "****00"]


def test_tags_and_fields_and_case_bring_masks_to_columns():
    schema = pa.schema([("Mail", pa.string()), ("who", pa.struct([("name", pa.string())])), ("n", pa.int64())])
    made = combined(rule(**{"tag:pii.*": "hash", "MAIL": "null", "who.name": "hash"}), tags={"Mail": ["pii.email"]})
    assert {name: mask.text for name, mask in made.compile(schema, KEY).masks.items()} == {
        "Mail": "null",
        "who": "null",
    }


def test_admins_are_subject_only_where_they_are_named():
    root = Principal("root", "admin")
    assert combined(rule(a="null"), principal=root) is None
    assert combined(rule(a="null", subject="role:admin"), principal=root) is not None
    assert combined(rule(a="null", subject="principal:root"), principal=root) is not None
    assert combined(rule(a="null", dataset="other-*")) is None


def test_layout_alone_makes_no_other_policy():
    schema = pa.schema([("a", pa.int64())])
    keys = {combined(rule(text)).compile(schema, KEY).key for text in ("a>1", "a  >  1", "a > 1")}
    assert len(keys) == 1
    assert combined(rule("a > 2")).compile(schema, KEY).key not in keys
    assert combined(rule("a > 1")).compile(schema, b"o" * 32).key not in keys


def test_the_body_of_a_policy_makes_the_same_policy():
    made = combined(rule("a > 1", b="last:4", c="bucket:0.1"))
    assert policy.Effective.of(made.body) == made


@pytest.mark.parametrize(
    "wrong",
    [
        rule(),
        rule("a > "[:0] or "--", a="hash"),
        rule(subject="ann", a="hash"),
        rule(dataset="../x", a="hash"),
        rule(_id="hash"),
    ],
)
def test_what_cannot_be_a_policy_is_refused(wrong):
    with pytest.raises(BadRequest):
        policy.check(wrong)


@pytest.mark.parametrize(
    "mask", ["null", "constant:x", "hash", "last:4", "month", "bucket:10", "redact", "redact:phone"]
)
@pytest.mark.parametrize(
    "values",
    [
        ["canary0001@example.com", None, "2024-01-31"],
        [7_000_000_017, None, 5],
        [7e7 + 0.25, None, 1.5],
        [[7_000_000_017], None, []],
        [{"t": "canary0001@example.com", "n": 7_000_000_017}, None, {"t": None, "n": 5}],
    ],
)
def test_below_nulls_nothing_of_a_value_is_left(mask, values):
    made = Mask.parse(mask).apply(pa.array(values), KEY)
    if made[0].as_py() is None:
        batch, sink = pa.record_batch({"a": made}), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        stream = sink.getvalue().to_pybytes()
        traces = (b"canary", struct.pack("<q", 7_000_000_017), struct.pack("<d", 7e7 + 0.25))
        assert not [trace for trace in traces if trace in stream]
