"""The feed delivers exactly the stored rows, in the order of the arithmetic, from a cache that verifies its files."""

import datetime
import fcntl
import json
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from headrace.client.cache import Cache, default_folder, parse_bytes, true_schema
from headrace.client.feed import Feed, Progress, Provider, open_provider
from headrace.errors import BadData, BadRequest, Conflict, Damaged, NotFound
from headrace.order import Order
from parquet_provider import FolderProvider, open_folder, publish

ROWS = 203


def tokens(rows: int, length: int = 8) -> pa.Array:
    values = pa.array(np.arange(rows * length, dtype=np.uint16))
    return pa.FixedSizeListArray.from_arrays(values, length)


def table(rows: int = ROWS) -> pa.Table:
    return pa.table(
        {
            "row": pa.array(range(rows), pa.uint32()),
            "tokens": tokens(rows),
            "score": pa.array([i / 2 if i % 5 else None for i in range(rows)], pa.float64()),
            "flag": pa.array([i % 3 == 0 for i in range(rows)]),
            "text": pa.array([f"文本 {i}" if i % 7 else None for i in range(rows)]),
            "blob": pa.array([bytes([i % 256]) * (i % 4) for i in range(rows)]),
            "ragged": pa.array([list(range(i % 4)) if i % 6 else None for i in range(rows)], pa.list_(pa.uint16())),
            "names": pa.array([["a"] * (i % 3) for i in range(rows)]),
            "nested": pa.array([{"x": i, "y": {"z": float(i)}} for i in range(rows)]),
            "when": pa.array([datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=i) for i in range(rows)]),
            "_id": pa.array([f"id-{i}" for i in range(rows)]),
        }
    )


def feed(source, tmp_path, **options) -> Feed:
    options = {"batch_size": 8, "cache_dir": tmp_path / "cache", "opener": open_folder, **options}
    return Feed(str(source), **options)


@pytest.fixture
def source(tmp_path):
    return publish(tmp_path / "data", table(), files=5)


def delivered(batches, column="row") -> list[int]:
    return [int(row) for batch in batches for row in batch[column]]


@pytest.mark.parametrize("files", [1, 5])
@pytest.mark.parametrize("shuffle", [True, "global", False])
def test_batches_hold_the_stored_rows_in_the_order_of_the_arithmetic(tmp_path, files, shuffle):
    source = publish(tmp_path / "data", table(), files=files)
    made = feed(source, tmp_path, shuffle=shuffle, seed=9)
    order = Order(ROWS, 9, 2, shuffle, 16)
    # The first pass collects from files as they arrive, the second reads the whole from memory.
    batches = [*made.batches(epoch=2), *made.batches(epoch=2)]
    assert len(batches) == made.steps() * 2 == ROWS // 8 * 2
    for step, batch in enumerate(batches):
        step %= made.steps()
        rows = order.batch(step, 8)
        assert np.array_equal(batch["row"], rows)
        assert np.array_equal(batch["tokens"], rows[:, None] * 8 + np.arange(8))
        assert np.array_equal(batch["score"], np.where(rows % 5, rows / 2, np.nan).astype(np.float32), equal_nan=True)
        assert np.array_equal(batch["flag"], rows % 3 == 0)
        assert batch["text"] == [f"文本 {i}" if i % 7 else None for i in rows.tolist()]
        assert batch["blob"] == [bytes([i % 256]) * (i % 4) for i in rows.tolist()]
        assert [None if r is None else r.tolist() for r in batch["ragged"]] == [
            list(range(i % 4)) if i % 6 else None for i in rows.tolist()
        ]
        assert batch["names"] == [["a"] * (i % 3) for i in rows.tolist()]
        assert np.array_equal(batch["nested"]["x"], rows)
        assert np.array_equal(batch["nested"]["y"]["z"], rows.astype(np.float32))
        assert np.array_equal(batch["when"] - batch["when"][0], (rows - rows[0]) * 1_000_000)
        assert "_id" not in batch


def test_integers_come_as_int64_and_floats_as_float32_unless_asked_otherwise(source, tmp_path):
    batch = next(feed(source, tmp_path).batches())
    kinds = {name: batch[name].dtype.name for name in ("row", "tokens", "score", "flag", "when")}
    assert kinds == {"row": "int64", "tokens": "int64", "score": "float32", "flag": "bool", "when": "int64"}
    assert batch["ragged"][1 if batch["ragged"][0] is None else 0].dtype == np.int64
    assert batch["tokens"].shape == (8, 8)
    assert batch["tokens"].flags.writeable
    asked = next(feed(source, tmp_path, columns=["row", "score"], dtype={"score": "float64"}).batches())
    assert list(asked) == ["row", "score"]
    assert (asked["row"].dtype.name, asked["score"].dtype.name) == ("int64", "float64")
    one = next(feed(source, tmp_path, columns=["tokens", "score", "flag"], dtype=np.float16).batches())
    assert [one[name].dtype.name for name in ("tokens", "score", "flag")] == ["float16", "float16", "bool"]


def test_a_row_is_read_by_its_stored_number(source, tmp_path):
    made = feed(source, tmp_path)
    row = made.row(-1)
    assert (int(row["row"]), row["text"], row["tokens"].tolist()) == (202, "文本 202", list(range(1616, 1624)))
    assert int(row["nested"]["x"]) == 202
    with pytest.raises(IndexError, match="203 of 203"):
        made.row(203)


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_global_batch_and_see_equal_steps(source, tmp_path, drop_last):
    alone = list(feed(source, tmp_path, batch_size=12, drop_last=drop_last).batches(1))
    for world in (2, 3):
        ranks = [
            list(
                feed(source, tmp_path, batch_size=12 // world, drop_last=drop_last, rank=r, world_size=world).batches(1)
            )
            for r in range(world)
        ]
        assert {len(batches) for batches in ranks} == {len(alone)}
        for step, whole in enumerate(alone):
            assert delivered(batches[step] for batches in ranks) == whole["row"].tolist()


def test_a_state_goes_on_at_every_step_and_at_another_world_size(source, tmp_path):
    made = feed(source, tmp_path, batch_size=12, seed=4)
    whole = delivered(made.batches(1)) + delivered(made.batches(2))
    for step in range(1, made.steps() + 1):
        state = json.loads(json.dumps(made.state(1, step * 12)))
        ranks = [feed(source, tmp_path, batch_size=4, rank=r, world_size=3, shuffle=False) for r in range(3)]
        epoch, samples = ranks[0].load(state)
        for other in ranks[1:]:
            assert other.load(state) == (epoch, samples)
        rest = [rank.batches(epoch, samples) for rank in ranks]
        found = [row for batches in zip(*rest, strict=True) for row in delivered(batches)]
        if epoch == 1:
            found += delivered(made.batches(2))
        assert found == whole[step * 12 :]


def test_a_state_names_its_data_and_is_refused_by_others(source, tmp_path):
    state = feed(source, tmp_path, seed=5).state(2, 16)
    fingerprint = state.pop("fingerprint")
    assert state == {
        "wire": 1,
        "ref": "corpus@3",
        "seed": 5,
        "epoch": 2,
        "samples": 16,
        "shuffle": "window",
        "block_rows": 16,
        "window_blocks": 8,
    }
    other = feed(publish(tmp_path / "other", table(50), version=4), tmp_path)
    with pytest.raises(Conflict) as refused:
        other.load({**state, "fingerprint": fingerprint})
    for word in ("corpus@3", fingerprint, "corpus@4", other.manifest.fingerprint):
        assert word in str(refused.value)
    with pytest.raises(BadRequest, match="no 'fingerprint'"):
        other.load(state)


def test_the_layout_of_files_does_not_matter(tmp_path):
    one = feed(publish(tmp_path / "one", table(), files=1, block_rows=16), tmp_path)
    many = feed(publish(tmp_path / "many", table(), files=11, block_rows=64), tmp_path)
    assert many.load(one.state(1, 16)) == (1, 16)
    assert delivered(many.batches(1, 16)) == delivered(one.batches(1, 16))


def test_every_iteration_is_the_next_epoch_unless_one_was_set():
    progress = Progress()
    assert [progress.begin(), progress.begin()] == [(0, 0), (1, 0)]
    progress.set_epoch(7)
    assert [progress.begin(), progress.begin()] == [(7, 0), (8, 0)]
    progress.load(3, 64)
    progress.set_epoch(3)
    assert progress.begin() == (3, 64)
    progress.load(3, 64)
    progress.set_epoch(4)
    assert progress.begin() == (4, 0)
    with pytest.raises(BadRequest):
        progress.set_epoch(-1)


def test_files_are_fetched_once_as_the_epoch_needs_them(tmp_path):
    source = publish(tmp_path / "data", table(200).select(["row"]), files=20, block_rows=10)
    provider = FolderProvider(tmp_path / "data")
    lazy = feed(source, tmp_path, window_blocks=1, prefetch=0, batch_size=10)
    batches = lazy.batches()
    assert provider.fetched() == []
    next(batches)
    assert len(provider.fetched()) == 1
    everything = [*range(200)]
    eager = feed(source, tmp_path, window_blocks=2, prefetch=3, batch_size=10)
    assert sorted(delivered(eager.batches())) == everything
    assert sorted(delivered(eager.batches(1))) == everything
    eager.close()
    assert sorted(delivered(eager.batches(2))) == everything
    assert sorted(provider.fetched()) == sorted(f"part-{i}" for i in range(20))


def test_a_damaged_file_is_named_with_rank_and_cause_and_leaves_nothing(source, tmp_path):
    path = tmp_path / "data" / "part-2.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    made = feed(source, tmp_path, rank=1, world_size=2)
    with pytest.raises(Damaged, match=r"rank 1: file part-2 of corpus@3: .*sha256"):
        list(made.batches())
    path.unlink()
    with pytest.raises(NotFound, match=r"rank 1: file part-2 of corpus@3: no file part-2"):
        list(made.batches())
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_values_that_do_not_fit_are_refused_not_cut(tmp_path):
    good = pa.table({"x": pa.array([1, 2], pa.uint16())})
    source = publish(tmp_path / "data", good)
    narrow = pa.schema([pa.field("x", pa.uint8())])
    wrong = publish(tmp_path / "wrong", pa.table({"x": pa.array([1, 70000], pa.uint32())}))
    manifest = FolderProvider(tmp_path / "wrong").manifest("", None)
    with pytest.raises(BadData, match="part-0"):
        Cache(tmp_path / "c").open(manifest.files[0], narrow, FolderProvider(tmp_path / "wrong").fetch)
    assert next(feed(source, tmp_path, batch_size=2, shuffle=False).batches())["x"].tolist() == [1, 2]
    assert next(feed(wrong, tmp_path, batch_size=2, shuffle=False).batches())["x"].tolist() == [1, 70000]
    nulls = publish(tmp_path / "nulls", pa.table({"x": pa.array([1, None], pa.int64())}))
    with pytest.raises(BadData, match="'x' has nulls"):
        next(feed(nulls, tmp_path, batch_size=2).batches())
    huge = publish(tmp_path / "huge", pa.table({"x": pa.array([1, 2**63], pa.uint64())}))
    with pytest.raises(BadData, match="2\\^63"):
        next(feed(huge, tmp_path, batch_size=2).batches())
    kept = next(feed(huge, tmp_path, batch_size=2, shuffle=False, dtype="uint64").batches())
    assert kept["x"].tolist() == [1, 2**63]


def test_wrong_columns_options_and_manifests_are_refused_at_once(source, tmp_path):
    for options, message in (
        ({"columns": ["row", "labl"]}, "no column 'labl'"),
        ({"columns": []}, "no columns"),
        ({"dtype": {"labl": "int32"}}, "labl"),
        ({"dtype": "quaternion"}, "dtype"),
        ({"dtype": "U8"}, "not a number"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"shuffle": "some"}, "'some'"),
        ({"cache_limit": "many"}, "'many' is not a size"),
    ):
        with pytest.raises(BadRequest, match=message):
            feed(source, tmp_path, **options)
    path = tmp_path / "data" / "manifest.json"
    body = json.loads(path.read_text())
    body["files"].pop(1)
    path.write_text(json.dumps(body))
    with pytest.raises(Damaged, match="do not cover"):
        feed(source, tmp_path)


def test_structs_and_lists_keep_their_form_where_a_table_has_no_rows_to_spare(tmp_path):
    small = publish(tmp_path / "data", table(3), files=2)
    made = feed(small, tmp_path, batch_size=8, drop_last=False, shuffle=False)
    batches = list(made.batches())
    assert delivered(batches) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert list(feed(small, tmp_path, batch_size=8).batches()) == []
    empty = publish(tmp_path / "empty", table(3).slice(0, 0), files=1)
    assert list(feed(empty, tmp_path, drop_last=False).batches()) == []


def test_sizes_are_read_as_people_write_them():
    assert [parse_bytes(t) for t in ("50GB", "1 MiB", "1.5kb", "7", 9)] == [50 * 10**9, 1 << 20, 1500, 7, 9]


def test_the_cache_lies_where_the_environment_says():
    code = "from headrace.client.cache import default_folder; print(default_folder())"
    run = [sys.executable, "-c", code]
    said = subprocess.run(run, env={"HEADRACE_CACHE_DIR": "/some/where"}, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "/some/where"
    assert default_folder().name in ("headrace", Path(default_folder()).name)


def cached(tmp_path, limit: int = 10**9) -> tuple[Cache, list, pa.Schema, FolderProvider]:
    publish(tmp_path / "data", table(400).select(["row", "tokens"]), files=4)
    provider = FolderProvider(tmp_path / "data")
    manifest = provider.manifest("corpus", None)
    return Cache(tmp_path / "cache", limit), list(manifest.files), true_schema(manifest, None), provider


def test_an_entry_is_one_record_batch_of_the_true_types_in_a_private_folder(tmp_path):
    cache, files, schema, provider = cached(tmp_path)
    lease = cache.open(files[0], schema, provider.fetch)
    assert lease.batch.schema.types == [pa.uint32(), pa.list_(pa.uint16(), 8)]
    assert lease.batch.num_rows == 100
    assert cache.path().stat().st_mode & 0o777 == 0o700
    assert cache.size() == sum(f.stat().st_size for f in (tmp_path / "cache" / "files").iterdir()) > 0
    other = schema.remove(1)
    assert cache.key(files[0], schema) != cache.key(files[0], other)
    assert cache.holds(files[0], schema)
    assert not cache.holds(files[0], other)


def test_the_longest_unused_files_go_first_and_files_in_use_stay(tmp_path):
    cache, files, schema, provider = cached(tmp_path)
    leases = [cache.open(entry, schema, provider.fetch) for entry in files]
    each = cache.size() // 4
    assert cache.evict(limit=0) == 0
    del leases[1:]
    assert cache.evict(limit=each * 2 + each // 2) == each * 2
    assert [cache.holds(entry, schema) for entry in files] == [True, False, False, True]
    cache.limit = each
    cache.ensure(files[1], schema, provider.fetch)
    assert [cache.holds(entry, schema) for entry in files] == [True, True, False, False]
    assert leases[0].batch.column(0)[99].as_py() == 99
    assert cache.clear() == each
    del leases
    assert cache.clear() == each
    assert cache.size() == 0


def hold_open(folder, tell, let_go):
    cache, files, schema, provider = cached(Path(folder))
    lease = cache.open(files[0], schema, provider.fetch)
    tell.send(lease.batch.num_rows)
    let_go.recv()


def test_another_process_keeps_its_file_until_it_dies(tmp_path):
    context = multiprocessing.get_context("spawn")
    (told, tell), (waits, let_go) = context.Pipe(False), context.Pipe(False)
    process = context.Process(target=hold_open, args=(str(tmp_path), tell, waits))
    process.start()
    assert told.poll(30)
    assert told.recv() == 100
    cache = Cache(tmp_path / "cache")
    assert cache.clear() == 0
    process.kill()
    process.join(30)
    assert cache.clear() > 0
    let_go.close()


def test_many_threads_make_an_entry_once(tmp_path):
    cache, files, schema, provider = cached(tmp_path)
    rows = []
    threads = [
        threading.Thread(target=lambda: rows.append(cache.open(files[0], schema, provider.fetch).batch.num_rows))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert rows == [100] * 6
    assert provider.fetched() == ["part-0"]


def test_a_child_forked_during_a_download_does_not_keep_its_lock(tmp_path):
    cache, files, schema, provider = cached(tmp_path)
    context = multiprocessing.get_context("fork")
    end = context.Event()
    child = context.Process(target=end.wait, args=(60,))

    def fetch_and_fork(entry, into):
        child.start()
        provider.fetch(entry, into)

    cache.ensure(files[0], schema, fetch_and_fork)
    with (tmp_path / "cache" / "locks" / cache.key(files[0], schema)).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    end.set()
    child.join(60)
    assert child.exitcode == 0


def test_what_a_killed_download_left_is_swept_and_a_live_one_is_not(tmp_path):
    cache, files, schema, provider = cached(tmp_path)
    cache.ensure(files[0], schema, provider.fetch)
    dead = tmp_path / "cache" / "partial" / f"{cache.key(files[1], schema)}-1-1"
    live = tmp_path / "cache" / "partial" / "0123-1-1"
    dead.mkdir()
    live.mkdir()
    with (tmp_path / "cache" / "locks" / "0123").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.clear()
        assert not dead.exists()
        assert live.exists()


def test_a_damaged_entry_is_removed_and_made_again(tmp_path):
    cache, files, schema, provider = cached(tmp_path)
    path = cache.ensure(files[0], schema, provider.fetch)
    path.write_bytes(b"not arrow at all" * 10)
    with pytest.raises(Damaged, match="is damaged"):
        cache.open(files[0], schema, provider.fetch)
    assert cache.open(files[0], schema, provider.fetch).batch.num_rows == 100


def test_a_feed_reads_more_than_its_cache_may_hold(tmp_path):
    source = publish(tmp_path / "data", table(400).select(["row", "tokens"]), files=8)
    made = feed(source, tmp_path, cache_limit=6000, window_blocks=2)
    for epoch in range(2):
        assert sorted(delivered(made.batches(epoch))) == [*range(400)]
    made.close()
    assert made.cache.evict() >= 0
    assert made.cache.size() <= 6000


def test_a_provider_is_found_by_the_scheme_of_its_source():
    assert isinstance(FolderProvider(Path()), Provider)
    with pytest.raises(BadRequest):
        open_provider("http://127.0.0.1:1/../..")


def test_the_client_imports_no_server_library_no_framework_and_no_pandas():
    code = (
        "import sys, headrace.client, headrace.client.cache, headrace.client.feed, headrace.client.connect\n"
        "heavy = 'daft deltalake fastapi torch pandas pyarrow.dataset dbos sqlalchemy numba'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
