"""Types at rest, Parquet files with pinned bytes, and Delta tables that any reader opens."""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import deltalake
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.errors import BadData, BadRequest, Conflict, Damaged, NotFound
from headrace.store import types
from headrace.store.parquet import file_rows, file_schema, read_batches, write_file
from headrace.store.tables import CHECKPOINT_COMMITS, DataFile, Table

DAY = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456)
COLUMNS: dict[str, tuple[pa.DataType, list[object]]] = {
    "u8": (pa.uint8(), [0, None, 255]),
    "u16": (pa.uint16(), [32768, None, 65535]),
    "u32": (pa.uint32(), [2**31, None, 2**32 - 1]),
    "i64": (pa.int64(), [-(2**63), None, 2**63 - 1]),
    "f16": (pa.float16(), [np.float16(0.1), None, np.float16(65504)]),
    "f32": (pa.float32(), [0.5, None, float("inf")]),
    "flag": (pa.bool_(), [True, None, False]),
    "text": (pa.string(), ["漢字", None, ""]),
    "blob": (pa.binary(), [b"\0", None, b""]),
    "hash": (pa.binary(2), [b"ab", None, b"cd"]),
    "tokens": (pa.list_(pa.uint16()), [[32768, 65535, 0], None, []]),
    "vector": (pa.list_(pa.float16(), 2), [[np.float16(1), None], None, [np.float16(3), np.float16(4)]]),
    "image": (pa.list_(pa.list_(pa.uint8(), 2), 1), [[[1, 255]], None, [None]]),
    "day": (pa.date64(), [DAY.date(), None, DAY.date()]),
    "when": (pa.timestamp("us"), [DAY, None, DAY]),
    "paris": (pa.timestamp("s", "Europe/Paris"), [0, None, 1_700_000_000]),
    "nanos": (pa.timestamp("ns", "UTC"), [1_000, None, -5_000]),
    "clock": (pa.time64("ns"), [1, None, 86_399_999_999_999]),
    "took": (pa.duration("ms"), [5, None, -5]),
    "price": (pa.decimal128(12, 2), [Decimal("1.25"), None, Decimal("-3.00")]),
    "map": (pa.map_(pa.string(), pa.uint16()), [[("a", 65535)], None, []]),
    "deep": (
        pa.struct([("a", pa.uint32()), ("b", pa.list_(pa.struct([("c", pa.uint8())])))]),
        [{"a": 4_000_000_000, "b": [{"c": 255}, None]}, None, {"a": None, "b": None}],
    ),
}


def everything() -> pa.RecordBatch:
    return pa.record_batch([pa.array(values, kind) for kind, values in COLUMNS.values()], names=list(COLUMNS))


def people(first: int, rows: int) -> pa.RecordBatch:
    ids = range(first, first + rows)
    tokens = pa.array([[i % 65536, 40_000] for i in ids], pa.list_(pa.uint16()))
    return pa.record_batch(
        [pa.array(ids, pa.int64()), pa.array([f"p{i}" for i in ids]), tokens], names=["id", "name", "tokens"]
    )


def put(table: Table, name: str, batch: pa.RecordBatch, start: int = 0) -> DataFile:
    return table.write(f"{name}.parquet", [batch], batch.schema, start=start)


def rows(table: Table) -> list[dict[str, object]]:
    """The live rows in order, in true types."""
    schema = table.schema()
    paths = [table.file(file.path) for file in table.files()]
    true = types.true_schema(schema)
    return [row for batch in read_batches(paths, schema) for row in types.narrow(batch, true).to_pylist()]


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_every_type_comes_back_as_it_was(offset: int) -> None:
    batch = everything().slice(offset)
    stored = types.cast_to_stored(batch)
    stored.validate(full=True)
    assert deltalake.Schema.from_arrow(stored.schema).fields
    back = types.narrow(stored, types.true_schema(stored.schema))
    back.validate(full=True)
    assert back.schema.types == batch.schema.types
    assert back.to_pylist() == batch.to_pylist()


def test_a_stored_schema_is_its_own_stored_schema() -> None:
    stored = types.to_stored(everything().schema)
    assert types.to_stored(stored).equals(stored, check_metadata=True)
    assert types.to_stored(types.true_schema(stored)).equals(stored, check_metadata=True)
    assert types.describe(stored) == types.describe(everything().schema)


def test_every_uint16_token_survives() -> None:
    tokens = pa.ListArray.from_arrays(
        pa.array([0, 40_000, 65_536], pa.int32()), pa.array(np.arange(65_536, dtype=np.uint16))
    )
    batch = pa.record_batch([tokens], names=["tokens"])
    stored = types.cast_to_stored(batch)
    assert stored.schema.field("tokens").type == pa.list_(pa.int32())
    assert types.narrow(stored, types.true_schema(stored.schema)).equals(batch)


def test_encodings_become_plain_types() -> None:
    words = pa.array(["a", None, "b"])
    batch = pa.record_batch(
        [
            words.dictionary_encode(),
            words.cast(pa.large_string()),
            words.cast(pa.string_view()),
            pa.array([[1], None, []], pa.large_list(pa.int8())),
        ],
        names=["d", "l", "v", "ll"],
    )
    stored = types.cast_to_stored(batch)
    assert stored.schema.types == [pa.string()] * 3 + [pa.list_(pa.int8())]
    assert not any(field.metadata for field in stored.schema)
    assert stored.to_pylist() == batch.to_pylist()


def test_columns_of_nulls_alone_are_left_out() -> None:
    batch = pa.record_batch([pa.array([1]), pa.nulls(1)], names=["a", "b"])
    assert types.cast_to_stored(batch).schema.names == ["a"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (pa.uint64(), "uint64"),
        (pa.decimal256(50, 2), "decimal256"),
        (pa.month_day_nano_interval(), "interval"),
        (pa.list_(pa.null()), "null"),
        (pa.struct([]), "no columns"),
        (pa.struct([("a", pa.int8()), ("A", pa.int8())]), "case"),
    ],
)
def test_a_type_without_a_safe_form_is_refused_by_name(kind: pa.DataType, said: str) -> None:
    with pytest.raises(BadData, match=f"'x'.*{said}"):
        types.to_stored(pa.schema([("x", kind)]))


def test_names_that_readers_would_confuse_are_refused() -> None:
    for names in (["a", "A"], ["a", "a"], [""], []):
        with pytest.raises(BadData):
            types.to_stored(pa.schema([(name, pa.int8()) for name in names]))


@pytest.mark.parametrize(
    ("values", "to"),
    [
        (pa.array([1], pa.timestamp("ns")), pa.timestamp("us", "UTC")),
        (pa.array([70_000]), pa.uint16()),
        (pa.array([1.5]), pa.int64()),
        (pa.array([0.1]), pa.float32()),
        (pa.array(["1"]), pa.int64()),
        (pa.array([1]), pa.string()),
        (pa.array([[1, 2], [3]]), pa.list_(pa.int64(), 2)),
        (pa.array([{"a": 1, "b": 2}]), pa.struct([("a", pa.int64())])),
    ],
)
def test_a_cast_that_would_change_values_is_refused(values: pa.Array, to: pa.DataType) -> None:
    with pytest.raises(BadData, match="'x'"):
        types.narrow(pa.record_batch([values], names=["x"]), pa.schema([("x", to)]))


def test_schemas_travel_as_text() -> None:
    schema = everything().schema
    assert types.decode_schema(types.encode_schema(schema)).equals(schema)
    for wrong in ("", "not base64!", "AAAA"):
        with pytest.raises(BadData):
            types.decode_schema(wrong)
    assert types.type_text(pa.list_(pa.field("element", pa.large_string(), nullable=False))) == "list<string>"
    assert types.describe(pa.schema([("v", pa.list_(pa.float16(), 10))])) == (
        {"name": "v", "type": "fixed_size_list<halffloat>[10]"},
    )


# --- Parquet ---------------------------------------------------------------------------------------------------------


def many() -> pa.Table:
    ids = pa.array(range(10_000))
    texts = [None if i % 11 == 0 else f"text {i % 97}" for i in range(10_000)]
    return pa.table(
        {
            "id": ids,
            "text": texts,
            "tokens": pa.array([[i % 65536] * (i % 4) for i in range(10_000)], pa.list_(pa.uint16())),
        }
    )


def test_the_same_rows_give_the_same_bytes_whatever_the_batches(tmp_path: Path) -> None:
    table = many()
    schema = types.to_stored(table.schema)
    stored = [types.cast_to_stored(batch) for batch in table.to_batches()]
    made = [
        write_file(tmp_path / f"{name}.parquet", batches, schema, 3000)
        for name, batches in (
            ("a", table.to_batches(1)),
            ("b", table.to_batches(777)),
            ("c", table.to_batches()),
            ("d", stored),
        )
    ]
    assert len({one.sha256 for one in made}) == 1
    assert made[0].sha256 == hashlib.sha256((tmp_path / "a.parquet").read_bytes()).hexdigest()
    assert (made[0].rows, made[0].bytes) == (10_000, (tmp_path / "a.parquet").stat().st_size)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3000, 3000, 3000, 1000]


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys, pyarrow as pa; from headrace.store import parquet, types;"
        "t = pa.table({'id': pa.array(range(5000)), 's': [str(i) for i in range(5000)]});"
        "print(parquet.write_file(sys.argv[1], t.to_batches(int(sys.argv[2])), types.to_stored(t.schema), 1024).sha256)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / size), size], capture_output=True, text=True, check=True
        ).stdout
        for size in ("100", "4999")
    }
    assert len(hashes) == 1


def test_text_leaves_no_statistics(tmp_path: Path) -> None:
    written = write_file(tmp_path / "a.parquet", [everything()], types.to_stored(everything().schema))
    assert set(json.loads(written.stats)["minValues"]) == {"u8", "u16", "u32", "i64", "f16", "clock", "took"}
    assert json.loads(written.stats)["nullCount"]["u8"] == 1
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    with_statistics = {group.column(i).path_in_schema for i in range(group.num_columns) if group.column(i).statistics}
    assert not with_statistics & {"text", "blob", "hash", "tokens.list.element"}
    assert "u8" in with_statistics


def test_a_file_keeps_the_true_types(tmp_path: Path) -> None:
    write_file(tmp_path / "a.parquet", [everything()], types.to_stored(everything().schema))
    assert types.true_schema(file_schema(tmp_path / "a.parquet")).types == everything().schema.types


def test_reading_skips_and_limits_over_files_and_row_groups(tmp_path: Path) -> None:
    schema = types.to_stored(people(0, 1).schema)
    paths = [tmp_path / f"{k}.parquet" for k in range(3)]
    for k, path in enumerate(paths):
        write_file(path, [people(k * 100, 100)], schema, 30)
    everyone = list(range(300))
    for skip, limit in (
        (0, None),
        (0, 0),
        (0, 1),
        (29, 2),
        (30, 30),
        (99, 2),
        (100, 100),
        (250, None),
        (299, 5),
        (300, None),
        (999, 9),
    ):
        got = [
            i
            for batch in read_batches(paths, columns=["id"], batch_rows=7, skip=skip, limit=limit)
            for i in batch["id"].to_pylist()
        ]
        assert got == everyone[skip : None if limit is None else skip + limit]
    assert [file_rows(path) for path in paths] == [100, 100, 100]


def test_a_column_that_a_file_lacks_is_null(tmp_path: Path) -> None:
    old = write_people(tmp_path / "old.parquet", 5)
    wanted = pa.schema([*types.to_stored(old.schema), pa.field("extra", pa.string())])
    (batch,) = read_batches([tmp_path / "old.parquet"], wanted, columns=["extra", "id"])
    assert batch.to_pylist() == [{"extra": None, "id": i} for i in range(5)]
    assert [b.num_rows for b in read_batches([tmp_path / "old.parquet"], wanted, ["extra"], batch_rows=2, skip=1)] == [
        2,
        2,
    ]


def write_people(path: Path, count: int) -> pa.RecordBatch:
    batch = people(0, count)
    write_file(path, [batch], types.to_stored(batch.schema))
    return batch


def test_a_damaged_file_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_people(path, 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(Damaged):
        list(read_batches([path]))
    path.write_bytes(whole[:40] + bytes(200) + whole[240:])
    with pytest.raises(Damaged):
        list(read_batches([path]))


# --- tables ----------------------------------------------------------------------------------------------------------


def test_plain_readers_see_the_rows_that_were_written(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    assert (table.exists(), table.version, table.transaction("run"), table.history()) == (False, None, None, [])
    assert table.create_or_append([put(table, "a", everything())], everything().schema) == 0
    assert table.create_or_append([put(table, "b", everything(), start=3)], everything().schema) == 1
    stored = types.cast_to_stored(everything())
    expected = pa.Table.from_batches([stored, stored])
    plain = deltalake.DeltaTable(str(tmp_path / "t")).to_pyarrow_table()
    assert plain.cast(expected.schema).equals(expected)
    simple = ["u8", "u16", "i64", "text", "tokens", "vector", "deep"]
    for frame in (polars.read_delta(str(tmp_path / "t")), polars.scan_delta(str(tmp_path / "t")).collect()):
        assert frame.select(simple).to_dicts() == expected.select(simple).to_pylist()
    assert table.schema().equals(stored.schema, check_metadata=True)
    assert rows(table) == everything().to_pylist() * 2


def test_a_file_knows_its_hash_place_and_split(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    batch = people(0, 10)
    late = table.write("v1/val-0.parquet", [batch], batch.schema, start=10, split="val")
    early = table.write("v1/train-0.parquet", [batch], batch.schema, start=0, split="train")
    table.create_or_append([late, early], batch.schema)
    assert Table(tmp_path / "t").files() == [early, late]
    assert late.sha256 == hashlib.sha256(table.file(late.path).read_bytes()).hexdigest()
    assert late.bytes == table.file(late.path).stat().st_size


def test_a_commit_carries_what_was_given_with_it(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    first = put(table, "a", people(0, 2))
    table.create_or_append([first], people(0, 1).schema, ("run-1", 5), {"run": "run-1", "名": ["x", 1, None]})
    table.create_or_append([], people(0, 1).schema, ("inbox", 9), {"rows": 0})
    one, two = table.history()
    assert (one.version, one.app, one.meta, one.added) == (
        0,
        {"run-1": 5},
        {"run": "run-1", "名": ["x", 1, None]},
        (first,),
    )
    assert (two.version, two.app, two.meta, two.added, two.removed) == (1, {"inbox": 9}, {"rows": 0}, (), ())
    assert table.history(since=0) == [two]
    assert (table.transaction("run-1"), table.transaction("inbox"), table.transaction("other")) == (5, 9, None)


def test_a_transaction_happens_once_and_a_stale_one_never(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    schema = people(0, 1).schema
    files = [put(table, name, people(k, 1), k) for k, name in enumerate("abc")]
    assert table.create_or_append([files[0]], schema, ("inbox", 3)) == 0
    assert table.create_or_append([files[1]], schema, ("inbox", 7)) == 1
    assert table.create_or_append([], schema, ("other", 0)) == 2
    for again, version in (((files[2],), 7), ((files[0],), 3), ((files[2],), 0)):
        assert Table(tmp_path / "t").create_or_append(again, schema, ("inbox", version)) == (1 if version == 7 else 0)
    assert table.overwrite([files[2]], schema, ("inbox", 7)) == 1
    assert [row["id"] for row in rows(table)] == [0, 1]
    assert Table(tmp_path / "t").create_or_append([files[2]], schema, ("inbox", 8)) == 3


def test_new_columns_join_in_the_same_commit(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    table.create_or_append([put(table, "a", people(0, 1))], people(0, 1).schema)
    wide = people(1, 1).append_column("age", pa.array([7], pa.uint8()))
    assert table.create_or_append([put(table, "b", wide, 1)], wide.schema) == 1
    fewer = people(2, 1).select(["id"])
    assert table.create_or_append([put(table, "c", fewer, 2)], fewer.schema) == 2
    assert table.schema().names == ["id", "name", "tokens", "age"]
    assert types.true_schema(table.schema()).field("age").type == pa.uint8()
    assert [(row["id"], row["name"], row["age"]) for row in rows(table)] == [
        (0, "p0", None),
        (1, "p1", 7),
        (2, None, None),
    ]
    plain = deltalake.DeltaTable(str(tmp_path / "t")).to_pyarrow_table().sort_by("id")
    assert plain["age"].to_pylist() == [None, 7, None]
    assert polars.read_delta(str(tmp_path / "t")).sort("id")["age"].to_list() == [None, 7, None]


@pytest.mark.parametrize("kind", [pa.int32(), pa.string(), pa.uint16()])
def test_another_type_is_refused_and_changes_nothing(tmp_path: Path, kind: pa.DataType) -> None:
    table = Table(tmp_path / "t")
    table.create_or_append([put(table, "a", people(0, 1))], people(0, 1).schema)
    other = pa.record_batch([pa.array([1]).cast(kind)], names=["id"])
    with pytest.raises(Conflict, match="'id' is int64"):
        table.create_or_append([put(table, "b", other)], other.schema, ("run", 1))
    assert (table.version, table.transaction("run")) == (0, None)
    with pytest.raises(BadData, match="case"):
        table.create_or_append([], pa.schema([("ID", pa.int64())]))


def test_an_overwrite_may_change_the_schema_and_old_versions_stay(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    first = [put(table, "a", people(0, 2)), put(table, "b", people(2, 2), 2)]
    table.create_or_append(first, people(0, 1).schema, meta={"n": 0})
    other = pa.record_batch([pa.array(["x", "y"]), pa.array([1, 2], pa.uint16())], names=["id", "n"])
    second = put(table, "c", other)
    assert table.overwrite([second], other.schema, ("run", 1), {"n": 1}) == 1
    assert table.schema().equals(types.to_stored(other.schema), check_metadata=True)
    assert rows(table) == other.to_pylist()
    assert set(table.history(0)[0].removed) == {"a.parquet", "b.parquet"}
    assert polars.read_delta(str(tmp_path / "t")).to_dicts() == other.to_pylist()
    old = deltalake.DeltaTable(str(tmp_path / "t"), version=0).to_pyarrow_table()
    assert sorted(old["id"].to_pylist()) == [0, 1, 2, 3]
    assert table.files(version=0) == first
    with pytest.raises(NotFound, match="no Delta version 9"):
        table.files(version=9)


def test_an_overwrite_may_keep_a_file(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    kept, gone = put(table, "a", people(0, 1)), put(table, "b", people(1, 1), 1)
    table.create_or_append([kept, gone], people(0, 1).schema)
    new = put(table, "c", people(5, 1), 1)
    table.overwrite([kept, new], people(0, 1).schema)
    assert [row["id"] for row in rows(table)] == [0, 5]
    assert table.history(0)[0].added == (new,)


def test_small_files_are_compacted_beside_an_append(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    schema = people(0, 1).schema
    for k in range(3):
        table.create_or_append([put(table, f"small-{k}", people(k, 1), k)], schema)
    merged = table.write("merged.parquet", read_batches([table.file(f.path) for f in table.files()]), table.schema())
    fresh = put(table, "fresh", people(3, 1), 3)
    small = [file.path for file in table.files()]
    table.create_or_append([fresh], schema, ("inbox", 4), removes=small, compacted=[merged])
    assert table.files() == [merged, fresh]
    assert [row["id"] for row in rows(table)] == [0, 1, 2, 3]
    text = (tmp_path / "t/_delta_log/00000000000000000003.json").read_text()
    actions = [json.loads(line) for line in text.splitlines()]
    changes = {a[kind]["path"]: a[kind]["dataChange"] for a in actions for kind in ("add", "remove") if kind in a}
    assert changes == {**dict.fromkeys(small, False), "merged.parquet": False, "fresh.parquet": True}
    with pytest.raises(Conflict, match="no longer in the table"):
        table.create_or_append([], schema, removes=small[:1])
    assert sorted(polars.read_delta(str(tmp_path / "t"))["id"].to_list()) == [0, 1, 2, 3]


def test_files_that_are_not_there_are_never_committed(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    schema = people(0, 1).schema
    real = put(table, "a", people(0, 1))
    with pytest.raises(Damaged, match="missing"):
        table.create_or_append([DataFile("ghost.parquet", 1, 10, "")], schema)
    with pytest.raises(Damaged, match="bytes"):
        table.create_or_append([DataFile(real.path, 1, real.bytes + 1, "")], schema)
    with pytest.raises(BadRequest, match="twice"):
        table.create_or_append([real, real], schema)
    with pytest.raises(BadRequest, match="negative"):
        table.create_or_append([real], schema, ("run", -1))
    table.create_or_append([real], schema)
    with pytest.raises(Conflict, match="already"):
        table.create_or_append([real], schema)
    for name in ("../x.parquet", "/x.parquet", "a//b", "_delta_log/x", ".hidden", "a/../b", "a b"):
        with pytest.raises(BadRequest):
            DataFile(name, 0, 0, "")
    assert table.version == 0


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    def commit(writer: int) -> None:
        table = Table(tmp_path / "t")
        for k in range(8):
            at = writer * 1000 + k
            table.create_or_append([put(table, f"f{at}", people(at, 1), at)], people(at, 1).schema, (f"w{writer}", k))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(commit, range(4)))
    table = Table(tmp_path / "t")
    assert [row["id"] for row in rows(table)] == [w * 1000 + k for w in range(4) for k in range(8)]
    assert table.version == 31


def test_the_same_transaction_from_writers_at_once_happens_once(tmp_path: Path) -> None:
    def commit(k: int) -> int:
        table = Table(tmp_path / "t")
        return table.create_or_append([put(table, f"f{k}", people(0, 1))], people(0, 1).schema, ("inbox", 1))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(commit, range(4))) == [0, 0, 0, 0]
    assert len(rows(Table(tmp_path / "t"))) == 1


def test_another_process_writes_into_the_same_table(tmp_path: Path) -> None:
    script = (
        "import sys, pyarrow as pa; from headrace.store.tables import Table;"
        "t = Table(sys.argv[1]); b = pa.record_batch([pa.array([int(sys.argv[2])])], names=['id']);"
        "[t.create_or_append([t.write(f'{sys.argv[2]}-{k}.parquet', [b], b.schema)], b.schema) for k in range(10)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "t"), str(w)]) for w in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert sorted(row["id"] for row in rows(Table(tmp_path / "t"))) == [0] * 10 + [1] * 10


def test_an_overwrite_made_for_an_older_version_is_refused(tmp_path: Path) -> None:
    one, two = Table(tmp_path / "t"), Table(tmp_path / "t")
    schema = people(0, 1).schema
    seen = one.create_or_append([put(one, "a", people(0, 1))], schema, expected=-1)
    two.create_or_append([put(two, "b", people(1, 1), 1)], schema)
    with pytest.raises(Conflict, match="stands at version 1, not 0"):
        one.overwrite([put(one, "c", people(2, 1))], schema, expected=seen)
    assert [row["id"] for row in rows(one)] == [0, 1]


def test_checkpoints_keep_a_long_log_readable(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    schema = people(0, 1).schema
    for k in range(CHECKPOINT_COMMITS + 3):
        table.create_or_append([put(table, f"f{k}", people(k, 1), k)], schema, ("inbox", k), {"k": k})
    log = tmp_path / "t/_delta_log"
    assert list(log.glob("*.checkpoint.parquet"))
    (log / f"{3:020d}.json").rename(tmp_path / "aside.json")
    again = Table(tmp_path / "t")
    assert again.files() == table.files(), "a checkpoint spares reading the commits below it"
    (tmp_path / "aside.json").rename(log / f"{3:020d}.json")
    assert (again.version, again.transaction("inbox")) == (CHECKPOINT_COMMITS + 2, CHECKPOINT_COMMITS + 2)
    assert [row["id"] for row in rows(again)] == list(range(CHECKPOINT_COMMITS + 3))
    assert [commit.meta["k"] for commit in again.history()] == list(range(CHECKPOINT_COMMITS + 3))
    assert deltalake.DeltaTable(str(tmp_path / "t")).count() == CHECKPOINT_COMMITS + 3


def test_a_commit_that_reads_otherwise_elsewhere_is_damage(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    table.create_or_append([put(table, "a", people(0, 1))], people(0, 1).schema)
    table.create_or_append([put(table, "b", people(1, 1), 1)], people(0, 1).schema)
    first = tmp_path / "t/_delta_log/00000000000000000000.json"
    first.write_text(first.read_text().replace('"a.parquet"', '"z.parquet"'))
    wide = people(2, 1).append_column("age", pa.array([7]))
    with pytest.raises(Damaged, match="reads otherwise"):
        table.create_or_append([put(table, "c", wide, 2)], wide.schema)


def test_another_tools_commits_are_read_and_its_upgrades_refused(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    batch = people(0, 1).select(["id", "name"])
    table.create_or_append([put(table, "a", batch)], batch.schema)
    deltalake.write_deltalake(str(tmp_path / "t"), pa.table({"id": [9], "name": ["x"]}), mode="append")
    assert table.version == 1
    assert {row["id"] for row in rows(table)} == {0, 9}
    handle = deltalake.DeltaTable(str(tmp_path / "t"))
    handle.alter.add_feature(deltalake.TableFeatures.DeletionVectors, allow_protocol_versions_increase=True)
    with pytest.raises(Conflict, match="another tool"):
        table.create_or_append([put(table, "b", batch)], batch.schema)
