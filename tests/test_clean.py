"""The steps under ``clean``: what they keep, what they drop, and what they say about it."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.clean import STEPS
from headrace.clean.dedup import Dedup
from headrace.clean.keys import row_keys, value_bytes
from headrace.clean.robust import fit_outliers
from headrace.clean.table import Check, DropNulls, Limits
from headrace.clean.text import Unicode
from headrace.errors import BadRecipe, Damaged
from headrace.steps import VERDICTS, FitStep, Outcome, Position, Step

START = Position(0, 0)


def batch(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch(columns)


def mapped(step: Step, rows: pa.RecordBatch, state: dict[str, Any] | None = None) -> Outcome:
    outcome = step.apply(rows, state or {}, START)
    assert outcome.verdicts.schema == VERDICTS
    dropped = set(outcome.verdicts.column("row").to_pylist())
    assert outcome.batch.num_rows == rows.num_rows - len(dropped)
    return outcome


def told(outcome: Outcome) -> list[tuple[Any, ...]]:
    names = ("row", "rule", "field", "value", "reason", "kept")
    return [tuple(line[name] for name in names) for line in outcome.verdicts.to_pylist()]


def fitted(step: FitStep, tasks: list[list[pa.RecordBatch]], folder: Path) -> list[list[Outcome]]:
    """Run a step over tasks of batches as a run does: keys to files, fit, map."""
    files = []
    for task, batches in enumerate(tasks):
        parts, row = [], 0
        for one in batches:
            keys = step.keys(one)
            if keys is not None:
                table = pa.Table.from_batches([keys])
                table = table.append_column("_task", pa.array([task] * keys.num_rows, pa.int32()))
                table = table.append_column("_row", pa.array(range(row, row + keys.num_rows), pa.int64()))
                if keys.num_rows == one.num_rows:
                    table = table.append_column("_id", one.column("_id"))
                parts.append(table)
            row += one.num_rows
        if parts:
            files.append(folder / f"keys-{task}.parquet")
            pq.write_table(pa.concat_tables(parts), files[-1])
    state = step.fit(files, folder / "out")
    outcomes = []
    for task, batches in enumerate(tasks):
        starts = np.cumsum([0, *(one.num_rows for one in batches)]).tolist()
        outcomes.append([step.apply(one, state, Position(task, at)) for one, at in zip(batches, starts, strict=False)])
    return outcomes


def test_the_registry_names_the_steps_as_recipes_do() -> None:
    assert list(STEPS) == ["unicode", "drop_nulls", "check", "dedup"]


def test_importing_the_steps_loads_no_engine() -> None:
    code = (
        "import sys, headrace.clean, headrace.transform, headrace.recipe as r; r.parse(r.starter());"
        "print([m for m in ('daft', 'tokenizers', 'ftfy', 'numba', 'deltalake') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# unicode


def test_unicode_repairs_mojibake_composes_and_strips_controls() -> None:
    texts = ["plain\tline\n", "schÃ¶n", "e\u0301te\u0301", "a\x00b\x1b[0m\r\n", None, "你好\u0085"]
    outcome = mapped(Unicode(), batch(text=texts, n=[1] * 6, _id=list("abcdef")))
    assert outcome.batch.column("text").to_pylist() == ["plain\tline\n", "schön", "été", "ab[0m\n", None, "你好…"]
    assert outcome.batch.column("_id").to_pylist() == list("abcdef")


def test_unicode_leaves_what_it_is_told_to_leave() -> None:
    step = Unicode(columns=("a",), form="NFKC", fix_mojibake=False, control=False)
    outcome = mapped(step, batch(a=["ﬁ\x01Ã¶"], b=["ﬁ\x01"]))
    assert outcome.batch.to_pydict() == {"a": ["fi\x01Ã¶"], "b": ["ﬁ\x01"]}


def test_unicode_refuses_a_column_of_numbers() -> None:
    with pytest.raises(BadRecipe, match="'n' is int64, not text"):
        Unicode(columns=("n",)).apply(batch(n=[1]), {}, START)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.none() | st.text(), min_size=1, max_size=8))
def test_unicode_without_repair_equals_the_standard_library(texts: list[str | None]) -> None:
    step = Unicode(columns=("t",), fix_mojibake=False, control=False)
    found = step.apply(pa.record_batch({"t": pa.array(texts, pa.string())}), {}, START).batch.column("t").to_pylist()
    expected = [None if t is None else unicodedata.normalize("NFC", t) for t in texts]
    # Two Unicode databases may differ on characters assigned lately.
    same = [a == b for a, b in zip(found, expected, strict=True)]
    assert all(same) or any(unicodedata.category(c) == "Cn" for t in texts if t for c in t)


# drop_nulls


def test_drop_nulls_names_every_null_column_and_element() -> None:
    rows = batch(a=[1, None, 3, None], b=[[1.0], [None, 2.0], [2.0], None], _raw=[None] * 4)
    outcome = mapped(DropNulls(), rows)
    assert outcome.batch.column("a").to_pylist() == [1, 3]
    assert told(outcome) == [
        (1, "drop_nulls", "a", None, "a is null", None),
        (1, "drop_nulls", "b", None, "b[0] is null", None),
        (3, "drop_nulls", "a", None, "a is null", None),
        (3, "drop_nulls", "b", None, "b is null", None),
    ]


def test_a_missing_column_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(BadRecipe, match="step 'drop_nulls': there is no column 'lable'") as caught:
        DropNulls(("lable",)).apply(batch(label=[1], text=["x"]), {}, START)
    assert caught.value.hint == "did you mean 'label'?"


# check


def test_check_lists_every_rule_with_the_deciding_value() -> None:
    step = Check(
        {
            "age": Limits(not_null=True, min=0, max=150),
            "features": Limits(not_null=True, min=-1, max=1.5),
            "kind": Limits(regex="^[ab]+$", one_of=("a", "b")),
        }
    )
    rows = batch(
        age=[40, None, 200, -1, 7],
        features=[[0.5, 1.5], [0.0, None], [float("nan"), 2.0], None, [0.0, 0.0]],
        kind=["a", "ab", None, "c", "b"],
        _id=list("vwxyz"),
    )
    outcome = mapped(step, rows)
    assert outcome.batch.column("_id").to_pylist() == ["v", "z"]
    assert told(outcome) == [
        (1, "check.not_null", "age", None, "age is null", None),
        (1, "check.not_null", "features", None, "features[1] is null", None),
        (1, "check.one_of", "kind", "ab", "kind is 'ab', not one of a, b", None),
        (2, "check.max", "age", "200", "age is 200, above the maximum 150", None),
        (2, "check.min", "features", "nan", "features[0] is nan, below the minimum -1", None),
        (2, "check.max", "features", "nan", "features[0] is nan, above the maximum 1.5", None),
        (2, "check.max", "features", "2.0", "features[1] is 2.0, above the maximum 1.5", None),
        (3, "check.min", "age", "-1", "age is -1, below the minimum 0", None),
        (3, "check.not_null", "features", None, "features is null", None),
        (3, "check.regex", "kind", "c", "kind is 'c', which does not match ^[ab]+$", None),
        (3, "check.one_of", "kind", "c", "kind is 'c', not one of a, b", None),
    ]


@pytest.mark.parametrize(
    ("values", "limits", "dropped"),
    [
        (pa.array([2**53, 2**53 + 1]), Limits(max=2**53), [1]),
        (pa.array([1, 2, 3]), Limits(min=1.5, max=2.5), [0, 2]),
        (pa.array([1, None]), Limits(min=1e300), [0]),
        (pa.array([1, None]), Limits(max=float("inf"), min=-(10**30)), []),
        (pa.array([2**64 - 1, 5], pa.uint64()), Limits(max=2**63), [0]),
        (pa.array([2**64 - 1, 5], pa.uint64()), Limits(min=-1), []),
        (pa.array([1.5, 2.5]).cast(pa.decimal128(5, 1)), Limits(min=2), [0]),
        (pa.array(["2024-05-01", "2025-05-01"]).cast(pa.date32()), Limits(min="2025-01-01"), [0]),
        (pa.array(["apple", "pear"]), Limits(max="b"), [1]),
        (pa.array([["a"], ["a", "x"], []]), Limits(one_of=("a",)), [1]),
    ],
)
def test_limits_compare_exactly_in_the_columns_own_type(values: pa.Array, limits: Limits, dropped: list[int]) -> None:
    outcome = mapped(Check({"x": limits}), batch(x=values))
    assert outcome.verdicts.column("row").to_pylist() == dropped


@pytest.mark.parametrize(
    "limits",
    [Limits(min=1), Limits(regex="a"), Limits(one_of=("x",)), Limits(outliers="mad"), Limits(max="2024-99-99")],
)
def test_limits_that_do_not_suit_the_type_are_the_recipes_fault(limits: Limits) -> None:
    kinds = {"min": pa.array(["t"]), "max": pa.array([0]).cast(pa.timestamp("us"))}
    rows = batch(x=kinds["min"] if limits.min else kinds["max"] if limits.max else pa.array([True]))
    step = Check({"x": limits}).expand(None)[0]
    with pytest.raises(BadRecipe, match=r"step .check.: .* of column .x."):
        step.keys(rows) if isinstance(step, FitStep) else step.apply(rows, {}, START)


def test_bad_limits_are_refused_when_written() -> None:
    for wrong in ({"regex": "("}, {"mad_limit": 0.0}, {"min": float("nan")}):
        with pytest.raises(BadRecipe, match="check:"):
            Limits(**wrong)


def test_check_fits_only_where_a_rule_needs_the_whole() -> None:
    assert not isinstance(Check({"x": Limits(min=0)}).expand(None)[0], FitStep)
    assert isinstance(Check({"x": Limits(unique=True)}).expand(None)[0], FitStep)


def test_unique_keeps_the_smallest_id_and_merges_nothing(tmp_path: Path) -> None:
    (step,) = Check({"mail": Limits(unique=True), "age": Limits(max=99)}).expand(None)
    assert isinstance(step, FitStep)
    tasks = [
        [
            batch(mail=["m", "n", None], age=[1, 1, 1], _id=["c", "x", "y"]),
            batch(mail=["m", None], age=[1, 1], _id=["a", "z"]),
        ],
        [batch(mail=["m", "n"], age=[1, 100], _id=["b", "e"])],
    ]
    first, second = fitted(step, tasks, tmp_path)
    reason = "mail has the same value as in record a"
    assert told(first[0]) == [(0, "check.unique", "mail", None, reason, None)]
    assert told(first[1]) == []
    # "e" comes before "x", but a row that misses another limit is nobody's twin.
    assert told(second[0]) == [
        (0, "check.unique", "mail", None, reason, None),
        (1, "check.max", "age", "100", "age is 100, above the maximum 99", None),
    ]


def test_outliers_follow_the_modified_z_score(tmp_path: Path) -> None:
    (step,) = Check({"x": Limits(outliers="mad")}).expand(None)
    assert isinstance(step, FitStep)
    rows = batch(x=[2.1, 2.6, 2.4, 2.5, 2.3, 2.1, 2.3, 2.6, 8.2, 8.3, None], _id=list("abcdefghijk"))
    ((outcome,),) = fitted(step, [[rows]], tmp_path)
    # Median 2.45, MAD 0.15: 0.6745 * 5.75 / 0.15 = 25.86.
    assert [line[:4] for line in told(outcome)] == [
        (8, "check.outliers", "x", "8.2"),
        (9, "check.outliers", "x", "8.3"),
    ]
    assert "modified z-score 25.86 around the median 2.45, limit 3.5" in told(outcome)[0][4]


def test_outliers_without_spread_fall_back_to_the_mean_deviation(tmp_path: Path) -> None:
    (step,) = Check({"x": Limits(outliers="mad")}).expand(None)
    assert isinstance(step, FitStep)
    rows = batch(x=[5] * 30 + [500], _id=[f"{n:02}" for n in range(31)])
    ((outcome,),) = fitted(step, [[rows]], tmp_path)
    assert outcome.verdicts.column("row").to_pylist() == [30]
    same = batch(x=[5, 5, None], _id=list("abc"))
    ((outcome,),) = fitted(step, [[same]], tmp_path)
    assert told(outcome) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300), min_size=1))
def test_median_and_mad_are_exact(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    folder = tmp_path_factory.mktemp("mad")
    pq.write_table(pa.table({"v": [*values, None, float("inf")]}), folder / "k.parquet")
    found = fit_outliers([folder / "k.parquet"], "v", folder)
    assert found["values"] == len(values)
    assert found["median"] == pytest.approx(np.median(values), rel=1e-12)
    deviations = np.abs(np.array(values) - found["median"])
    if np.median(deviations):
        assert found["spread"] == pytest.approx(np.median(deviations), rel=1e-12)


# dedup


def test_dedup_keeps_the_smallest_id_and_names_it(tmp_path: Path) -> None:
    tasks = [
        [
            batch(text=["one  two", "three", None, ""], _id=["d", "b", "n1", "n2"]),
            batch(text=["e\u0301\u3000x", "One two"], _id=["f", "g"]),
        ],
        [batch(text=["\tone\r\ntwo ", None, "", " \n", "é x"], _id=["a", "n3", "n4", "n5", "e"])],
        [batch(text=["one two"], _id=["c"])],
    ]
    first, second, third = fitted(Dedup(), tasks, tmp_path)
    assert told(first[0]) == [(0, "dedup.exact", None, None, "the same content as record a, which is kept", "a")]
    assert told(first[1]) == [(0, "dedup.exact", None, None, "the same content as record e, which is kept", "e")]
    assert told(second[0]) == []
    assert told(third[0]) == [(0, "dedup.exact", None, None, "the same content as record a, which is kept", "a")]
    assert first[0].batch.column("_id").to_pylist() == ["b", "n1", "n2"]


def test_dedup_compares_all_user_columns_unless_told_otherwise(tmp_path: Path) -> None:
    rows = batch(a=[1, 1, 1, 1], b=[[0.0], [-0.0], [1.0], None], c=["x"] * 4, _id=list("abcd"), _raw=list("1234"))
    ((outcome,),) = fitted(Dedup(), [[rows]], tmp_path)
    assert outcome.batch.column("_id").to_pylist() == ["a", "c", "d"]
    ((outcome,),) = fitted(Dedup(columns=("a", "c")), [[rows]], tmp_path)
    assert outcome.batch.column("_id").to_pylist() == ["a"]


def test_dedup_of_equal_ids_keeps_the_first_in_order(tmp_path: Path) -> None:
    tasks = [[batch(t=["x", "y"], _id=["same", "y"])], [batch(t=["x"], _id=["same"])]]
    (first,), (second,) = fitted(Dedup(), tasks, tmp_path)
    assert (first.batch.num_rows, second.batch.num_rows) == (2, 0)
    assert told(second)[0][5] == "same"


def test_dedup_drops_as_many_rows_as_there_are_twins_over_many_batches(tmp_path: Path) -> None:
    words = np.random.default_rng(3).integers(0, 300, 2000)
    ids = [f"{n:05}" for n in np.random.default_rng(4).permutation(2000)]
    rows = batch(w=words, _id=ids)
    tasks = [[rows.slice(at, 100) for at in range(low, low + 500, 100)] for low in range(0, 2000, 500)]
    kept = [one for task in fitted(Dedup(), tasks, tmp_path) for out in task for one in out.batch.to_pylist()]
    smallest: dict[int, str] = {}
    for word, one in zip(words.tolist(), ids, strict=True):
        smallest[word] = min(smallest.get(word, one), one)
    assert {row["w"]: row["_id"] for row in kept} == smallest
    assert len(kept) == len(smallest)


def test_a_lost_table_of_duplicates_is_an_error_not_a_silent_keep(tmp_path: Path) -> None:
    state = {"folder": str(tmp_path), "tasks": {"0": 1}}
    with pytest.raises(Damaged, match="missing"):
        Dedup().apply(batch(t=["x"], _id=["a"]), state, START)


def test_dedup_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(BadRecipe, match="nothing to do"):
        Dedup(exact=False)


def test_dedup_without_any_rows_fits_and_drops_nothing(tmp_path: Path) -> None:
    rows = batch(t=["x"], _id=["a"]).slice(0, 0)
    ((outcome,),) = fitted(Dedup(), [[rows]], tmp_path)
    assert outcome.batch.num_rows == 0


SAME = [
    (pa.array(["é"]), pa.array(["e\u0301"])),
    (pa.array(["a b"]), pa.array([" a \u00a0\n b\t"])),
    (pa.array([float("nan")]), pa.array([-float("nan")])),
    (pa.array(["x"]).dictionary_encode(), pa.array(["x"])),
    (pa.array([{"a": 1, "b": None}]), pa.array([{"a": 1, "b": None}])),
    (pa.array([[1, 2]]), pa.array([[9], [1, 2]]).slice(1)),
    (pa.array(["q"], pa.large_string()), pa.array(["z", "q"]).slice(1)),
]
DIFFERENT = [
    (pa.array(["A"]), pa.array(["a"])),
    (pa.array([0]), pa.array([None], pa.int64())),
    (pa.array([[None]], pa.list_(pa.int64())), pa.array([[0]], pa.list_(pa.int64()))),
    (pa.array([[]], pa.list_(pa.int64())), pa.array([None], pa.list_(pa.int64()))),
    (pa.array([["a", "b"]]), pa.array([["ab"]])),
    (pa.array([b"a b"]), pa.array([b"a  b"])),
    (pa.array([True]), pa.array([False])),
    (pa.array([0]).cast(pa.timestamp("us")), pa.array([1]).cast(pa.timestamp("us"))),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_equal_values_have_equal_keys(left: pa.Array, right: pa.Array) -> None:
    assert value_bytes(left, True).tobytes() == value_bytes(right, True).tobytes()


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_values_have_different_keys(left: pa.Array, right: pa.Array) -> None:
    assert value_bytes(left, True).tobytes() != value_bytes(right, True).tobytes()


def test_keys_are_the_same_in_every_version() -> None:
    keys = row_keys([pa.array(["a  b"]), pa.array([7])], np.zeros(1, dtype=bool), True)
    assert keys.to_pylist()[0].hex() == "68d10c3475295fd8adaebf3742e71927"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab \n\t\u3000é", max_size=12), min_size=1, max_size=20))
def test_texts_share_a_key_exactly_when_their_words_agree(texts: list[str]) -> None:
    keys = value_bytes(pa.array(texts, pa.string()), True)
    for at, one in enumerate(texts):
        for other in range(at):
            equal = keys[at].tobytes() == keys[other].tobytes()
            assert equal == (" ".join(one.split()) == " ".join(texts[other].split()))
