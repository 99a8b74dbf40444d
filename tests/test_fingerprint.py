"""The content hash: pinned values, independence of layout, sensitivity to content, and resuming."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from headrace.errors import BadData
from headrace.store.fingerprint import BLOCK_ROWS, Fingerprint, fingerprint_of
from headrace.store.types import cast_to_stored

MIXED = pa.schema(
    [
        ("id", pa.int64()),
        ("name", pa.string()),
        ("ok", pa.bool_()),
        ("score", pa.float64()),
        ("half", pa.float16()),
        ("tokens", pa.list_(pa.uint16())),
        ("vector", pa.list_(pa.float32(), 3)),
        ("nested", pa.struct([("a", pa.uint8()), ("b", pa.list_(pa.string()))])),
        ("pairs", pa.map_(pa.string(), pa.int32())),
        ("when", pa.timestamp("us")),
        ("blob", pa.binary()),
        ("price", pa.decimal128(12, 2)),
    ]
)


def mixed(rows: int, start: int = 0) -> pa.Table:
    def row(i: int) -> dict[str, object]:
        if i % 7 == 3:
            return dict.fromkeys(MIXED.names)
        return {
            "id": i,
            "name": f"名前 {i}" * (i % 4),
            "ok": i % 3 == 0,
            "score": i / 7,
            "half": np.float16(i % 100),
            "tokens": [(i * 31 + k) % 65536 for k in range(i % 5)],
            "vector": [i, i + 0.5, -i],
            "nested": {"a": i % 256, "b": None if i % 5 == 0 else [str(i), None]},
            "pairs": [(str(k), k) for k in range(i % 3)],
            "when": i * 1_000_003,
            "blob": bytes([i % 256]) * (i % 6),
            "price": None,
        }

    return pa.Table.from_pylist([row(i) for i in range(start, start + rows)], schema=MIXED)


def cut(table: pa.Table, seed: int) -> Iterator[pa.RecordBatch]:
    """Batches of random sizes that are slices of larger buffers."""
    rng = random.Random(seed)
    (whole,) = table.combine_chunks().to_batches()
    at = 0
    while at < whole.num_rows:
        count = rng.choice([1, 2, 7, 100, 5000, 20000])
        yield whole.slice(at, count)
        at += count


def column(values: object, kind: pa.DataType) -> str:
    return fingerprint_of([pa.record_batch([pa.array(values, kind)], names=["x"])])


GOLDEN_MIXED = "364ba10d7145e35fb893d946ee111281eda248906e9a842ea90077c991b729ff"
GOLDEN_TOKENS = "ecf494a9200c256dd118a74d9a3e45465e56bd948e50e72337d93d65c5dfda9c"
GOLDEN_EMPTY = "993953ea2e3a1c2100da066986c371c1e180a7875631a9f4a5ddf901c9114da0"


def test_the_hash_of_known_content_never_changes() -> None:
    assert fingerprint_of(mixed(1000).to_batches()) == GOLDEN_MIXED
    tokens = pa.ListArray.from_arrays(
        pa.array(range(20_001), pa.int32()), pa.array([(i * 7) % 65536 for i in range(20_000)], pa.uint16())
    )
    assert fingerprint_of([pa.record_batch([tokens], names=["tokens"])]) == GOLDEN_TOKENS
    assert fingerprint_of([], pa.schema([("x", pa.int64())])) == GOLDEN_EMPTY


def test_the_hash_follows_its_description() -> None:
    rows = [("ab", 1), (None, None), ("c", 3)]

    def sha(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(parts)).digest()

    valid = bytes([1, 0, 1])
    lengths = np.array([2, 0, 1], "<i8").tobytes()
    text = sha(sha(valid), sha(lengths), sha(b"abc"))
    numbers = sha(sha(valid), sha(b""), sha(np.array([1, 0, 3], "<i4").tobytes()))
    start = bytes(32)
    expected = sha(
        b"headrace.fingerprint.1" + (3).to_bytes(8, "little"),
        b'["s", "string"]' + sha(start, text),
        b'["n", "int32"]' + sha(start, numbers),
    )
    table = pa.table({"s": [s for s, _ in rows], "n": pa.array([n for _, n in rows], pa.int32())})
    assert fingerprint_of(table.to_batches()) == expected.hex()


@pytest.mark.parametrize("seed", range(4))
def test_batches_and_slices_do_not_matter(seed: int) -> None:
    table = mixed(BLOCK_ROWS + 777)
    assert fingerprint_of(cut(table, seed)) == fingerprint_of(table.to_batches())


def test_types_at_rest_hash_as_the_true_ones() -> None:
    table = mixed(500)
    assert fingerprint_of(cast_to_stored(batch) for batch in cut(table, 1)) == fingerprint_of(table.to_batches())


def test_encodings_of_text_and_lists_do_not_matter() -> None:
    words = ["a", None, "", "ü漢字", "a", "long enough to leave a string view's inline part"]
    plain = column(words, pa.string())
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        assert column(words, kind) == plain
    lists = [[1, 2], None, [], [3]]
    assert column(lists, pa.large_list(pa.int8())) == column(lists, pa.list_(pa.int8()))
    assert column(lists, pa.list_(pa.field("element", pa.int8(), nullable=False))) == column(lists, pa.list_(pa.int8()))


def test_bytes_in_null_slots_do_not_matter() -> None:
    mask = pa.array([False, True, False])
    hidden = pa.Array.from_buffers(pa.int32(), 3, [mask_bits(mask), pa.py_buffer(np.array([1, 99, 3], np.int32))])
    assert fingerprint_of([pa.record_batch([hidden], names=["x"])]) == column([1, None, 3], pa.int32())
    text = pa.Array.from_buffers(
        pa.string(), 3, [mask_bits(mask), pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"ahhc")]
    )
    assert fingerprint_of([pa.record_batch([text], names=["x"])]) == column(["a", None, "c"], pa.string())
    child = pa.StructArray.from_arrays([pa.array([1, 99, 3])], names=["a"], mask=mask)
    kind = pa.struct([("a", pa.int64())])
    assert fingerprint_of([pa.record_batch([child], names=["x"])]) == column([{"a": 1}, None, {"a": 3}], kind)


def mask_bits(null: pa.Array) -> pa.Buffer:
    return pa.py_buffer(np.packbits(~null.to_numpy(zero_copy_only=False), bitorder="little").tobytes())


def test_every_nan_is_the_same_and_zeros_differ_by_sign() -> None:
    odd = np.array([0x7FF8_0000_0000_0001, 0xFFF0_0000_0000_0001], np.uint64).view(np.float64)
    assert column(odd, pa.float64()) == column([float("nan")] * 2, pa.float64())
    assert column([0.0], pa.float64()) != column([-0.0], pa.float64())
    halves = np.array([0x7E01, 0xFE00], np.uint16).view(np.float16)
    assert column(halves, pa.float16()) == column(np.array([np.nan, np.nan], np.float16), pa.float16())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (([1, 2], pa.int64()), ([2, 1], pa.int64())),
        (([1, 2], pa.int64()), ([1, 2], pa.int32())),
        (([1], pa.uint16()), ([1], pa.int32())),
        (([0], pa.int64()), ([None], pa.int64())),
        (([""], pa.string()), ([None], pa.string())),
        ((["ab", "c"], pa.string()), (["a", "bc"], pa.string())),
        ((["a"], pa.string()), ([b"a"], pa.binary())),
        (([[], [1]], pa.list_(pa.int8())), ([[1], []], pa.list_(pa.int8()))),
        (([[], None], pa.list_(pa.int8())), ([None, []], pa.list_(pa.int8()))),
        (([[1, 2]], pa.list_(pa.int8())), ([[1, 2]], pa.list_(pa.int8(), 2))),
        (([[[1], []]], pa.list_(pa.list_(pa.int8()))), ([[[], [1]]], pa.list_(pa.list_(pa.int8())))),
        (([{"a": None}], pa.struct([("a", pa.int8())])), ([None], pa.struct([("a", pa.int8())]))),
        (([{"a": 1}], pa.struct([("a", pa.int8())])), ([{"b": 1}], pa.struct([("b", pa.int8())]))),
        (([1], pa.timestamp("us")), ([1], pa.timestamp("us", "UTC"))),
        (([0] * 3, pa.int64()), ([0] * 4, pa.int64())),
    ],
)
def test_other_content_has_another_hash(
    one: tuple[list[object], pa.DataType], other: tuple[list[object], pa.DataType]
) -> None:
    assert column(*one) != column(*other)


def test_names_and_order_of_columns_matter() -> None:
    a, b = pa.array([1]), pa.array([2])
    hashes = {
        fingerprint_of([pa.record_batch(columns, names=names)])
        for columns, names in (([a, b], ["a", "b"]), ([b, a], ["a", "b"]), ([b, a], ["b", "a"]), ([a, b], ["a", "c"]))
    }
    assert len(hashes) == 4


def test_system_columns_take_no_part() -> None:
    user = pa.record_batch([pa.array([1, 2])], names=["x"])
    system = pa.record_batch(
        [pa.array(["r-0", "r-1"]), pa.array([1, 2]), pa.array(["train", "val"])], names=["_id", "x", "_split"]
    )
    assert fingerprint_of([user]) == fingerprint_of([system])


@pytest.mark.parametrize("first", [0, 1, 500, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS, 40_000])
def test_an_append_resumes_from_the_state_and_the_partial_block(first: int) -> None:
    table = pa.table({"i": pa.array(range(50_000)), "s": [None if i % 9 == 0 else str(i) for i in range(50_000)]})
    before = Fingerprint(table.schema)
    for batch in table.slice(0, first).to_batches(9_000):
        before.update(batch)
    kept = json.loads(json.dumps(before.state()))
    assert before.tail == first % BLOCK_ROWS
    after = Fingerprint.resume(kept, table.slice(first - before.tail, before.tail).to_batches(5_000))
    assert after.digest() == before.digest()
    for batch in table.slice(first).to_batches(11_111):
        after.update(batch)
    assert after.digest() == fingerprint_of(table.to_batches())


@pytest.mark.parametrize("first", [0, 10, BLOCK_ROWS, 3 * BLOCK_ROWS + 5])
def test_a_later_column_counts_as_null_in_the_rows_before(first: int) -> None:
    old = pa.table({"a": pa.array(range(first), pa.int64())})
    new = pa.table({"a": pa.array([7, 8]), "b": ["x", None], "c": pa.array([[1], [2]], pa.list_(pa.uint16(), 1))})
    made = Fingerprint(old.schema)
    for batch in (*old.to_batches(), *new.to_batches()):
        made.update(batch)
    nulls = [pa.nulls(first, new.schema.field(name).type) for name in ("b", "c")]
    whole = pa.concat_tables([pa.table([old["a"], *nulls], schema=new.schema), new])
    assert made.digest() == fingerprint_of(whole.to_batches())
    again = Fingerprint.resume(made.state(), whole.slice(made.rows - made.tail).select(["c", "a", "b"]).to_batches())
    assert again.digest() == made.digest()


def test_a_column_that_a_batch_lacks_is_null_there() -> None:
    made = Fingerprint(pa.schema([("a", pa.int64()), ("b", pa.string())]))
    made.update(pa.record_batch([pa.array([1])], names=["a"]))
    whole = pa.record_batch([pa.array([1]), pa.array([None], pa.string())], names=["a", "b"])
    assert made.digest() == fingerprint_of([whole])


def test_a_wrong_tail_or_type_is_refused() -> None:
    made = Fingerprint()
    made.update(pa.record_batch([pa.array([1, 2, 3])], names=["x"]))
    with pytest.raises(BadData, match="last 3 rows"):
        Fingerprint.resume(made.state(), [pa.record_batch([pa.array([3])], names=["x"])])
    with pytest.raises(BadData, match="unknown format"):
        Fingerprint.resume({**made.state(), "format": 2}, [])
    with pytest.raises(BadData, match="'x'"):
        made.update(pa.record_batch([pa.array(["text"])], names=["x"]))
    with pytest.raises(BadData, match="string now"):
        made.add_columns(pa.schema([("x", pa.string())]))


def test_asking_for_the_digest_changes_nothing() -> None:
    asked, silent = Fingerprint(), Fingerprint()
    for batch in cut(mixed(3000), 5):
        asked.update(batch)
        asked.digest()
        silent.update(batch)
    assert asked.digest() == silent.digest()
