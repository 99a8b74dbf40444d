"""The order of an epoch is a pinned bijection, the same from wherever it is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import BadRequest
from headrace.order import Order

GOLDEN = [
    (Order(10, 42, 0, "window", 3, 2), [8, 6, 9, 7, 0, 1, 4, 5, 2, 3]),
    (Order(10, 42, 1, "window", 3, 2), [1, 2, 4, 5, 0, 3, 7, 8, 9, 6]),
    (Order(10, 42, 0, "global"), [4, 5, 3, 1, 9, 6, 0, 8, 2, 7]),
    (Order(10, 43, 0, "global"), [3, 4, 2, 8, 1, 5, 6, 7, 0, 9]),
    (Order(10, 42, 0, False), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
]

orders = st.builds(
    Order,
    rows=st.integers(0, 3000),
    seed=st.integers(-(1 << 70), 1 << 70),
    epoch=st.integers(0, 1 << 40),
    shuffle=st.sampled_from(["window", "global", False]),
    block_rows=st.integers(1, 700),
    window_blocks=st.integers(1, 9),
)


@pytest.mark.parametrize(("order", "expected"), GOLDEN)
def test_the_order_of_ten_rows_never_changes(order, expected):
    assert order.positions(0, 10).tolist() == expected


def test_the_order_of_huge_tables_never_changes():
    window = Order(10**12, seed=7, epoch=3)
    assert window.positions(0, 2).tolist() == [154347638552, 966593800604]
    assert window.positions(10**12 - 3, 10**12).tolist() == [728881313974, 728881315252, 728881311787]
    assert Order(10**12, 7, 3, "global").positions(0, 2).tolist() == [204420253504, 625851266503]
    last = Order(2**62, -1, 0, "global").positions(2**62 - 2, 2**62)
    assert last.tolist() == [3432687209912163542, 4498557551669304087]


@settings(max_examples=60, deadline=None)
@given(orders)
def test_every_row_comes_exactly_once(order):
    rows = order.positions(0, order.rows)
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(order.rows))
    assert np.array_equal(order.position_of(rows), np.arange(order.rows))


@settings(max_examples=40, deadline=None)
@given(orders, st.data())
def test_a_part_read_alone_equals_the_same_part_of_the_whole(order, data):
    whole = order.positions(0, order.rows)
    start = data.draw(st.integers(0, order.rows))
    stop = data.draw(st.integers(start, order.rows))
    assert np.array_equal(order.positions(start, stop), whole[start:stop])
    picked = np.array(data.draw(st.lists(st.integers(0, max(0, order.rows - 1)), max_size=30)) if order.rows else [])
    assert np.array_equal(order.rows_at(picked), whole[picked.astype(int)])


def test_reading_may_start_at_every_position():
    for shuffle in ("window", "global", False):
        order = Order(257, 5, 2, shuffle, 16, 3)
        whole = order.positions(0, 257)
        for start in range(258):
            assert np.array_equal(order.positions(start, 257), whole[start:])
            assert np.array_equal(order.positions(start, min(257, start + 1)), whole[start : start + 1])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**63), st.sampled_from(["window", "global"]), st.data())
def test_positions_of_huge_tables_invert_exactly(rows, seed, shuffle, data):
    order = Order(rows, seed, 0, shuffle, data.draw(st.integers(1, 100_000)), data.draw(st.integers(1, 64)))
    near = st.one_of(
        st.integers(0, rows - 1), st.integers(max(0, rows - 5), rows - 1), st.integers(0, min(5, rows - 1))
    )
    positions = np.array(data.draw(st.lists(near, min_size=12, max_size=20)))
    found = order.rows_at(positions)
    assert found.min() >= 0
    assert found.max() < rows
    assert np.array_equal(order.position_of(found), positions)
    assert [int(order.rows_at([p])[0]) for p in positions] == found.tolist()
    assert [int(order.position_of([r])[0]) for r in found] == positions.tolist()


def test_a_window_holds_whole_blocks():
    order = Order(1000, 1, 0, "window", block_rows=10, window_blocks=4)
    blocks = order.positions(0, 1000).reshape(25, 40) // 10
    for window in blocks:
        assert len(set(window.tolist())) == 4


def test_the_short_last_block_may_land_anywhere():
    places = {int(Order(23, seed, 0, "window", 5, 1).position_of([20])[0]) // 5 for seed in range(60)}
    assert places == {0, 1, 2, 3, 4}


def test_spans_name_the_rows_in_the_order_of_need():
    order = Order(103, 9, 4, "window", 10, 3)
    spans = list(order.spans(0))
    assert sorted(span[1:] for span in spans) == [(i, min(i + 10, 103)) for i in range(0, 103, 10)]
    position = 0
    for i in range(0, len(spans), 3):
        window, until = spans[i : i + 3], spans[i][0]
        rows = order.positions(position, until)
        assert sorted(rows.tolist()) == sorted(row for _, start, stop in window for row in range(start, stop))
        assert list(order.spans(position)) == spans[i:]
        position = until
    assert list(Order(25, shuffle=False, block_rows=10).spans(0)) == [(10, 0, 10), (20, 10, 20), (25, 20, 25)]
    assert list(Order(25, shuffle="global").spans(3)) == [(25, 0, 25)]


def test_seeds_and_epochs_give_unlike_orders_and_rows_spread_evenly():
    first = [int(Order(8, seed, 0, "global").positions(0, 1)[0]) for seed in range(4000)]
    assert np.bincount(first, minlength=8).min() > 400
    base = Order(100_000, 1, 0).positions(0, 100_000)
    for other in (Order(100_000, 2, 0), Order(100_000, 1, 1)):
        assert np.count_nonzero(base == other.positions(0, 100_000)) < 50


@pytest.mark.parametrize("shuffle", ["window", "global", False])
def test_the_global_batch_is_the_same_at_every_world_size(shuffle):
    order = Order(1000, 3, 1, shuffle, 64, 4)
    for step in range(order.steps(24, 1)):
        alone = order.batch(step, 24)
        for world in (2, 3, 4, 12):
            parts = [order.batch(step, 24 // world, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), alone)


def test_a_dropped_tail_and_a_padded_tail_give_all_ranks_equal_steps():
    order = Order(10, 42, 0, "global")
    assert order.steps(2, 2) == 2
    assert order.steps(2, 2, drop_last=False) == 3
    padded = [order.batch(2, 2, rank, 2, drop_last=False).tolist() for rank in range(2)]
    assert padded == [[2, 7], [4, 5]]
    assert order.steps(2, 2, first=4) == 1
    assert order.batch(0, 2, 1, 2, first=4).tolist() == order.batch(1, 2, 1, 2).tolist()
    with pytest.raises(BadRequest, match="outside this epoch's 2 steps"):
        order.batch(2, 2, 0, 2)
    assert Order(3).batch(0, 8, drop_last=False).tolist() == (Order(3).positions(0, 3).tolist() * 3)[:8]


def test_impossible_orders_and_positions_are_refused():
    for wrong in ({"rows": -1}, {"rows": 5, "shuffle": "yes"}, {"rows": 5, "block_rows": 0}, {"rows": 5, "epoch": -1}):
        with pytest.raises(BadRequest):
            Order(**wrong)
    for positions in ([5], [-1]):
        with pytest.raises(BadRequest, match=r"outside 0\.\.4"):
            Order(5).rows_at(positions)
    with pytest.raises(BadRequest, match="rank 2"):
        Order(5).batch(0, 1, rank=2, world_size=2)
    with pytest.raises(BadRequest, match="at least 1"):
        Order(5).steps(0)
    assert Order(5, shuffle=True).shuffle == "window"
