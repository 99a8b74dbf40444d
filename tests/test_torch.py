"""The dataset and loader for PyTorch: batches ready for a model, and a state that counts what was delivered."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from headrace.errors import BadRequest, Conflict, Damaged
from headrace.order import Order
from headrace.torch import StreamingDataLoader, StreamingDataset
from parquet_provider import open_folder, publish

ROWS = 203
STEPS = ROWS // 8


def patients(rows: int = ROWS) -> pa.Table:
    features = pa.array(np.arange(rows * 10, dtype=np.float64) / 7)
    return pa.table(
        {
            "row": pa.array(range(rows), pa.uint16()),
            "features": pa.FixedSizeListArray.from_arrays(features, 10),
            "label": pa.array([float(i) for i in range(rows)]),
            "name": pa.array([f"病人 {i}" for i in range(rows)]),
            "visits": pa.array([list(range(i % 3)) for i in range(rows)], pa.list_(pa.int16())),
        }
    )


@pytest.fixture
def source(tmp_path):
    return publish(tmp_path / "data", patients(), files=4)


def dataset(source, **options) -> StreamingDataset:
    cache = Path(source).parent.parent / "cache"
    return StreamingDataset(str(source), **{"batch_size": 8, "cache_dir": cache, "opener": open_folder, **options})


def rows_of(batches) -> list[int]:
    return [row for batch in batches for row in batch["row"].tolist()]


def expected(epoch: int, seed: int = 0, count: int = STEPS * 8) -> list[int]:
    return Order(ROWS, seed, epoch, "window", 16).positions(0, count).tolist()


def add_one(batch):
    return {"row": batch["row"] + 1}


def test_batches_are_tensors_ready_for_a_model(source):
    batch = next(iter(dataset(source)))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items() if torch.is_tensor(value)} == {
        "row": (torch.int64, (8,)),
        "features": (torch.float32, (8, 10)),
        "label": (torch.float32, (8,)),
    }
    assert batch["name"] == [f"病人 {row}" for row in batch["row"].tolist()]
    assert [visits.dtype for visits in batch["visits"]] == [torch.int64] * 8
    model = torch.nn.Linear(10, 1)
    loss = torch.nn.functional.mse_loss(model(batch["features"]).squeeze(1), batch["label"])
    loss.backward()
    assert model.weight.grad is not None


def test_dtype_takes_torch_types(source):
    batch = next(
        iter(dataset(source, columns=["features", "row"], dtype={"features": torch.float64, "row": torch.int32}))
    )
    assert (batch["features"].dtype, batch["row"].dtype) == (torch.float64, torch.int32)
    with pytest.raises(BadRequest, match="dtype"):
        dataset(source, dtype=torch.bfloat16)


def test_lengths_rows_and_items(source):
    data = dataset(source, rank=1, world_size=2)
    assert (len(data), len(StreamingDataLoader(data)), data.rows) == (12, 12, ROWS)
    assert len(dataset(source, drop_last=False)) == STEPS + 1
    item = data[5]
    assert (item["row"].item(), item["name"], item["features"].shape) == (5, "病人 5", (10,))
    assert item["visits"].tolist() == [0, 1]


def test_a_transform_sees_each_batch(source):
    data = dataset(source, transform=add_one)
    assert rows_of(data) == [row + 1 for row in expected(0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_iteration_is_the_next_epoch_unless_one_is_set(source, workers):
    loader = StreamingDataLoader(dataset(source, seed=3), num_workers=workers)
    assert rows_of(loader) == expected(0, 3)
    assert rows_of(loader) == expected(1, 3)
    loader.set_epoch(7)
    assert rows_of(loader) == expected(7, 3)
    assert rows_of(loader) == expected(8, 3)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("kind", [DataLoader, StreamingDataLoader])
def test_workers_lose_and_repeat_nothing_and_keep_the_order(source, start, kind):
    data = dataset(source)
    assert data[0]["row"].item() == 0
    options = {"batch_size": None} if kind is DataLoader else {}
    loader = kind(data, num_workers=2, multiprocessing_context=start, **options)
    assert rows_of(loader) == expected(0)


def test_a_plain_loader_works_without_workers_and_follows_set_epoch(source):
    data = dataset(source)
    loader = DataLoader(data, batch_size=None)
    assert [rows_of(loader), rows_of(loader)] == [expected(0), expected(1)]
    data.set_epoch(4)
    assert rows_of(DataLoader(data, batch_size=None, num_workers=2)) == expected(4)


def test_persistent_workers_hear_of_epochs_and_states(source):
    loader = StreamingDataLoader(dataset(source), num_workers=2, persistent_workers=True)
    assert [rows_of(loader), rows_of(loader)] == [expected(0), expected(1)]
    state = dataset(source, seed=11).feed.state(5, 16)
    loader.load_state_dict(state)
    assert rows_of(loader) == expected(5, 11)[16:]
    assert rows_of(loader) == expected(6, 11)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_counts_batches_delivered_and_is_there_at_once(source, workers):
    loader = StreamingDataLoader(dataset(source), num_workers=workers)
    assert loader.state_dict()["samples"] == 0
    batches = iter(loader)
    for step in range(1, 4):
        next(batches)
        assert loader.state_dict()["samples"] == step * 8
    state = json.loads(json.dumps(loader.state_dict()))
    again = StreamingDataLoader(dataset(source, seed=99, shuffle=False), num_workers=workers)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert rows_of(again) == expected(0)[24:]
    assert rows_of(again) == expected(1)
    assert again.state_dict() == {**state, "epoch": 2, "samples": 0}


def test_stopping_at_every_step_and_going_on_equals_the_full_run(source):
    for stop in range(1, STEPS + 1):
        loader = StreamingDataLoader(dataset(source))
        batches = iter(loader)
        seen = rows_of(next(batches) for _ in range(stop))
        again = StreamingDataLoader(dataset(source))
        again.load_state_dict(loader.state_dict())
        if stop < STEPS:
            seen += rows_of(again)
        assert seen == expected(0)
        assert rows_of(again) == expected(1)


def test_a_run_goes_on_twice_and_at_other_world_sizes(source):
    seen, state, samples = [], None, 0
    for world, steps in ((4, 3), (1, 1), (3, 2), (2, None)):
        loaders = [
            StreamingDataLoader(dataset(source, batch_size=12 // world, rank=r, world_size=world)) for r in range(world)
        ]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
        iterators = [iter(loader) for loader in loaders]
        count = steps if steps is not None else ROWS // 12 - samples // 12
        for _ in range(count):
            seen += rows_of(next(batches) for batches in iterators)
        states = [loader.state_dict() for loader in loaders]
        assert states.count(states[0]) == world
        state, samples = states[0], samples + count * 12
    assert seen == expected(0, count=ROWS // 12 * 12)
    assert (state["epoch"], state["samples"]) == (1, 0)


def test_a_state_loaded_while_an_iterator_waits_takes_effect_and_stops_one_that_runs(source):
    loader = StreamingDataLoader(dataset(source))
    state = dataset(source).feed.state(2, 8)
    waiting = iter(loader)
    loader.load_state_dict(state)
    assert next(waiting)["row"].tolist() == expected(2)[8:16]
    loader.load_state_dict(state)
    with pytest.raises(Conflict, match="while this iteration ran"):
        next(waiting)
    loader.set_epoch(2)
    assert rows_of(loader) == expected(2)[8:]


def test_a_state_of_other_data_is_refused(source, tmp_path):
    other = dataset(publish(tmp_path / "other" / "data", patients(50), version=9))
    loader = StreamingDataLoader(dataset(source))
    with pytest.raises(Conflict, match=r"corpus@9 .* corpus@3"):
        loader.load_state_dict(other.state_dict())
    assert rows_of(loader) == expected(0)


def test_ranks_are_found_from_arguments_processes_and_environment(source, tmp_path):
    assert (dataset(source).feed.rank, dataset(source).feed.world_size) == (0, 1)
    with pytest.raises(BadRequest, match="together"):
        dataset(source, rank=1)
    code = (
        "import sys; sys.path.insert(0, 'tests'); from headrace.client.torch import find_rank; import torch\n"
        "print(find_rank(), find_rank(2, 5))\n"
        f"torch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1)\n"
        "print(find_rank())"
    )
    env = {**os.environ, "RANK": "3", "WORLD_SIZE": "4"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["(3, 4) (2, 5)", "(0, 1)"]


def test_an_error_in_a_worker_names_rank_file_and_cause(source):
    (Path(source).parent / "part-1.parquet").write_bytes(b"PAR1 broken")
    data = dataset(source, rank=0, world_size=2)
    with pytest.raises(Damaged, match="rank 0: file part-1 of corpus@3"):
        rows_of(data)
    with pytest.raises(Exception, match="rank 0: file part-1 of corpus@3"):
        rows_of(StreamingDataLoader(dataset(source, rank=0, world_size=2), num_workers=2))


def read_in_child(data, out):
    out.send(rows_of(data))


def test_a_dataset_in_use_travels_to_a_spawned_process(source):
    data = dataset(source, seed=6)
    next(iter(data))
    data.set_epoch(2)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(False)
    process = context.Process(target=read_in_child, args=(data, there))
    process.start()
    assert here.poll(60)
    assert here.recv() == expected(2, 6)
    process.join(30)
    assert rows_of(pickle.loads(pickle.dumps(data))) == expected(2, 6)


def test_the_sources_of_a_step_are_the_rows_of_its_batch(source):
    data = dataset(source, batch_size=4, world_size=2, rank=0, seed=2)
    data.set_epoch(3)
    traced = data.sources(1)
    mine = [row.row for row in traced if row.rank == 0]
    batches = iter(data)
    next(batches)
    assert next(batches)["row"].tolist() == mine
    assert traced[0].sources[0]["locator"] == f"file#{mine[0]}"
    assert len(traced) == 8


def test_options_that_the_dataset_settles_are_refused_by_the_loader(source):
    with pytest.raises(BadRequest, match="batch_size"):
        StreamingDataLoader(dataset(source), batch_size=4)
    with pytest.raises(BadRequest, match="list"):
        StreamingDataLoader([1, 2])
    with pytest.raises(TypeError, match="mix"):
        dataset(source, mix={"a@1": 0.5})
