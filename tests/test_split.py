"""A row's split follows from its id alone, for ever and wherever it is computed."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import BadData, BadRequest
from headrace.split import assign, hashes

GOLDEN = {
    "": 0xA706DD2F4D197E6F,
    "a": 0xD442DD5B42960211,
    "\0": 0x2A98F501AF37E97F,
    "abcdefgh": 0x3ACA75600F0C3E2A,
    "abcdefghi": 0xD0444EACBC8C227D,
    "日本語": 0x455118768D614324,
    "019a0000000000000000000000000000-00000000": 0x585843133AF33218,
}
NINE_TO_ONE = {"train": 0.9, "val": 0.1}


def mix(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def hash_as_documented(text):
    data, golden = text.encode(), 0x9E3779B97F4A7C15
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, max(len(data), 1), 8)]
    total = sum(mix((word + (j + 1) * golden) % 2**64) for j, word in enumerate(words))
    return mix((len(data) + golden + total) % 2**64)


def test_hashes_never_change():
    assert hashes(pa.array(GOLDEN)).tolist() == list(GOLDEN.values())


def test_splits_never_change():
    ids = pa.array([f"row-{number}" for number in range(12)])
    assert assign(ids, {"train": 0.5, "val": 0.25, "test": 0.25}).to_pylist() == [
        "train",
        "train",
        "train",
        "test",
        "val",
        "val",
        "val",
        "train",
        "val",
        "train",
        "train",
        "test",
    ]


@given(st.lists(st.text(max_size=40)))
def test_hashes_are_the_documented_ones(texts):
    assert hashes(pa.array(texts, pa.string())).tolist() == [hash_as_documented(text) for text in texts]


@settings(max_examples=50)
@given(st.lists(st.text(max_size=30), min_size=1), st.data())
def test_slices_string_types_and_batches_do_not_matter(texts, data):
    whole = pa.array(texts, pa.string())
    start = data.draw(st.integers(0, len(texts)))
    stop = data.draw(st.integers(start, len(texts)))
    expected = hashes(whole)[start:stop].tolist()
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        assert hashes(whole.cast(kind)[start:stop]).tolist() == expected
    assert [int(hashes(whole[row : row + 1])[0]) for row in range(start, stop)] == expected


def test_ids_longer_than_a_chunk_of_work_and_many_chunks_hash_alike():
    texts = ["x" * 600_001, "", *(f"{number:o}" * (number % 9) for number in range(40_000)), "y" * 600_000]
    found = hashes(pa.array(texts))
    for row in (0, 1, 2, 777, 16_383, 16_384, 16_385, 40_001, len(texts) - 1):
        assert int(found[row]) == hash_as_documented(texts[row])


def test_rows_spread_over_the_splits_as_their_fractions_say():
    count, fractions = 100_000, {"train": 0.9, "val": 0.07, "test": 0.03}
    for pattern in ("{}", "019a0000000000000000000000000000-{:08d}", "{:032x}", "p{}"):
        chosen = assign(pa.array([pattern.format(number) for number in range(count)]), fractions)
        counts = {pair["values"]: pair["counts"] for pair in chosen.value_counts().to_pylist()}
        for name, share in fractions.items():
            assert abs(counts[name] - share * count) <= 3 * np.sqrt(count * share * (1 - share))


def test_every_bit_of_the_hash_is_as_often_one_as_zero():
    count = 100_000
    found = hashes(pa.array([f"{number:08d}" for number in range(count)]))
    assert len(np.unique(found)) == count
    for bit in range(64):
        ones = int(((found >> np.uint64(bit)) & np.uint64(1)).sum())
        assert abs(ones - count / 2) < 4.5 * np.sqrt(count) / 2


def test_a_larger_first_fraction_moves_rows_into_it_only():
    ids = pa.array([str(number) for number in range(5000)])
    before, after = (assign(ids, {"train": share, "val": 1 - share}).to_pylist() for share in (0.8, 0.9))
    assert all(new == "train" for old, new in zip(before, after, strict=True) if old != new or old == "train")


def test_a_split_of_fraction_zero_gets_no_row():
    ids = pa.array([str(number) for number in range(3000)])
    assert set(assign(ids, {"none": 0.0, "all": 1.0, "rest": 0.0}).to_pylist()) == {"all"}
    assert set(assign(ids, {"a": 0.1, "b": 0.2, "c": 0.7, "d": 0}).to_pylist()) == {"a", "b", "c"}


def test_no_ids_give_no_splits():
    for kind in (pa.string(), pa.large_string()):
        assert assign(pa.array([], kind), NINE_TO_ONE).equals(pa.array([], pa.string()))
    assert assign(pa.array(["", ""]), NINE_TO_ONE).type == pa.string()


def test_rows_without_an_id_are_refused():
    with pytest.raises(BadData, match="2 rows have no _id, the first of them is row 1"):
        assign(pa.array(["a", None, None]), NINE_TO_ONE)
    with pytest.raises(BadData, match="these are int64"):
        assign(pa.array([1]), NINE_TO_ONE)


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": 0.6, "b": 0.6}]
)
def test_fractions_that_are_not_a_whole_are_refused(fractions):
    with pytest.raises(BadRequest, match="split fractions"):
        assign(pa.array(["a"]), fractions)
