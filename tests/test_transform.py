"""The steps under ``transform``: columns, vectors, tokens, packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.errors import BadRecipe
from headrace.steps import Carried, FitStep, Position
from headrace.transform.features import Features
from headrace.transform.pack import Pack
from headrace.transform.table import Cast, Rename, Select
from headrace.transform.tokens import Tokenize, Train

START = Position(0, 0)


def fit(step: FitStep, batches: list[pa.RecordBatch], folder: Path) -> dict[str, Any]:
    files = []
    for task, one in enumerate(batches):
        keys = step.keys(one)
        if keys is not None:
            files.append(folder / f"{task}.parquet")
            pq.write_table(pa.Table.from_batches([keys]), files[-1])
    return step.fit(files, folder / "out")


def test_select_and_rename_keep_system_columns() -> None:
    rows = pa.record_batch({"a": [1], "b": [2], "_id": ["x"]})
    assert Select(("b",)).apply(rows, {}, START).batch.to_pydict() == {"b": [2], "_id": ["x"]}
    assert Rename({"a": "c"}).apply(rows, {}, START).batch.schema.names == ["c", "b", "_id"]
    with pytest.raises(BadRecipe, match="two columns would be 'b'"):
        Rename({"a": "b"}).apply(rows, {}, START)


def test_cast_drops_what_does_not_fit_with_its_value() -> None:
    rows = pa.record_batch({"n": [" 4", "x", None, "6"], "t": ["2024-01-02", "2024-01-02T03:04:05+02:00", None, "no"]})
    outcome = Cast({"n": "int64", "t": "timestamp"}).apply(rows, {}, START)
    assert outcome.batch.column("n").to_pylist() == [4, None]
    lines = [(v["row"], v["rule"], v["field"], v["value"]) for v in outcome.verdicts.to_pylist()]
    assert lines == [(1, "cast", "n", "x"), (3, "cast", "t", "no")]


def test_cast_reaches_into_lists() -> None:
    outcome = Cast({"v": "float32"}).apply(pa.record_batch({"v": [["1", "2"], ["?"], None]}), {}, START)
    assert outcome.batch.column("v").to_pylist() == [[1.0, 2.0], None]


def test_features_standardise_with_population_constants_in_order(tmp_path: Path) -> None:
    (step,) = Features(("a", "b"), "y", standardize=True).expand(None)
    assert isinstance(step, FitStep)
    first = pa.record_batch({"a": [1.0, 2.0], "b": [5, 5], "y": [1, 0], "_id": ["p", "q"]})
    second = pa.record_batch({"a": [3.0, None], "b": [5, 5], "y": [1, 1], "_id": ["r", "s"]})
    state = fit(step, [first, second], tmp_path)
    assert (state["mean"], state["std"]["b"]) == ({"a": 2.0, "b": 5.0}, 1.0)
    assert state["std"]["a"] == pytest.approx((2 / 3) ** 0.5)
    outcome = step.apply(second, state, START)
    assert outcome.batch.schema.field("features").type == pa.list_(pa.float32(), 2)
    assert outcome.batch.to_pydict() == {"features": [[pytest.approx(1.2247449), 0.0]], "label": [1], "_id": ["r"]}
    assert outcome.verdicts.to_pylist()[0]["reason"] == "a is null"


def test_a_list_column_becomes_vectors_of_its_usual_length(tmp_path: Path) -> None:
    (step,) = Features(("features",), "label").expand(None)
    assert isinstance(step, FitStep)
    rows = pa.record_batch({"features": [[1, 2], [3], [4, 5]], "label": [[0.5], [1.5], [2.5]]})
    outcome = step.apply(rows, fit(step, [rows], tmp_path), START)
    assert outcome.batch.to_pydict() == {"features": [[1, 2], [4, 5]], "label": [0.5, 2.5]}
    assert outcome.verdicts.to_pylist()[0]["rule"] == "features.length"


def test_packing_keeps_where_every_token_came_from() -> None:
    tokens, pack = Tokenize("bytes", pack=4).expand(None)
    rows = pa.record_batch({"text": ["ab", None, "", "cdefgh", "i!"], "_id": list("ABCDE")})
    outcome = tokens.apply(rows, {}, START)
    assert outcome.verdicts.column("rule").to_pylist() == ["tokenize.null", "tokenize.empty"]
    assert isinstance(pack, Pack)
    carried, made = Carried(), []
    for at in range(3):
        done, carried = pack.advance(outcome.batch.slice(at, 1), carried)
        made += done.to_pylist()
    whole, _ = pack.advance(outcome.batch, Carried())
    assert whole.to_pylist() == made
    assert whole.schema.field("tokens").type == pa.list_(pa.uint16(), 4)
    assert [row["tokens"] for row in made] == [[97, 98, 256, 99], [100, 101, 102, 103], [104, 256, 105, 33]]
    assert [[(s["id"], s["start"], s["length"]) for s in row["_sources"]] for row in made] == [
        [("A", 0, 3), ("D", 0, 1)],
        [("D", 1, 4)],
        [("D", 5, 2), ("E", 0, 2)],
    ]
    assert [row["_id"] for row in made[:2]] == ["dc98a8264543429c3c425e93ed1042fc", "ce86bd8d5d14d7c5e5757f3c383e9930"]
    assert pack.finish(carried)[1].counts == {"tokens_in": 13, "tokens_out": 12, "tokens_dropped": 1}


def test_a_trained_tokenizer_is_the_same_each_time_and_gives_texts_back(tmp_path: Path) -> None:
    (step,) = Tokenize(Train("bpe", vocab_size=300)).expand(None)
    assert isinstance(step, FitStep)
    rows = pa.record_batch({"text": ["the cat sat on the mat", "the dog"] * 20})
    states = [fit(step, [rows], tmp_path / name) for name in ("a", "b") if not (tmp_path / name).mkdir()]
    assert states[0]["sha256"] == states[1]["sha256"]
    ids = step.apply(rows, states[0], START).batch.column("tokens")
    assert ids.type == pa.list_(pa.uint16())
    assert np.all(ids.values.to_numpy() < 300)


def test_a_missing_tokenizer_says_where_it_belongs(tmp_path: Path) -> None:
    rows = pa.record_batch({"text": ["x"]})
    step = Tokenize("gpt2").expand(None)[0]
    with pytest.raises(BadRecipe, match="no tokenizer 'gpt2'") as caught:
        step.apply(rows, {"tokenizers": str(tmp_path)}, START)
    assert str(tmp_path / "gpt2" / "tokenizer.json") in caught.value.hint
