"""What a version promises once it is there: it stands still, its splits part its rows, and its counts add up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import headrace
from conftest import wait_until
from headrace.client.session import Session
from headrace.errors import BadRef, NotFound

RECIPE = """
dataset: ready
collect: [{dataset: raw}]
clean:
  - drop_nulls: [n]
  - check: {n: {max: 900}}
  - dedup: {exact: true}
publish: {tag: gold, split: {train: 0.8, val: 0.2}}
"""


@pytest.fixture
def ex(tmp_path: Path) -> Iterator[Session]:
    with headrace.connect(tmp_path / "root") as session:
        yield session


def ids(ex: Session, ref: str) -> list[str]:
    """The ``_id`` of every row of a ref, in its order."""
    found: list[str] = ex.dataset(ref).to_arrow(columns=["_id"]).column("_id").to_pylist()
    return found


def committed(ex: Session, name: str, rows: int) -> bool:
    """Whether a version of the dataset has ``rows`` rows."""
    return any(version.rows == rows for version in ex.versions(name))


def test_splits_part_the_rows_and_a_row_stays_in_its_split_as_data_grow(ex: Session) -> None:
    ex.upload("raw", [{"n": n} for n in range(300)])
    first = ex.run(RECIPE)
    train, val = (ids(ex, f"ready@{first.version}:{split}") for split in ("train", "val"))
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(ids(ex, f"ready@{first.version}"))
    assert min(len(train), len(val)) > 20
    ex.upload("raw", [{"n": n} for n in range(300, 600)])
    second = ex.run(RECIPE)
    assert set(train) < set(ids(ex, f"ready@{second.version}:train"))
    assert set(val) < set(ids(ex, f"ready@{second.version}:val"))
    with pytest.raises(NotFound, match="no split 'test'"):
        ex.head("ready@gold:test")


def test_a_version_stands_still_while_tags_move_and_data_grow(ex: Session) -> None:
    ex.upload("raw", [{"n": n} for n in range(50)])
    first = ex.run(RECIPE)
    then, table = ex.show("ready@gold"), ex.dataset("ready@gold").to_arrow()
    ex.upload("raw", [{"n": n, "new": "column"} for n in range(50, 80)])
    second = ex.run(RECIPE)
    assert (ex.show("ready@gold").version, ex.dataset("ready@gold").rows) == (second.version, 80)
    now = ex.show(f"ready@{first.version}")
    assert (now.fingerprint, now.rows, now.inputs, now.counts) == (then.fingerprint, 50, then.inputs, then.counts)
    assert ex.dataset(f"ready@{first.version}").to_arrow().equals(table)
    changes = ex.diff(f"ready@{first.version}", "ready@gold")
    assert (changes.added, changes.removed, changes.same) == (30, 0, 50)
    with pytest.raises(BadRef, match="two datasets"):
        ex.diff("ready@gold", "raw")


def test_every_row_of_a_step_goes_on_is_held_or_is_merged(ex: Session) -> None:
    ex.upload("raw", [{"n": n, "k": 1} for n in [*range(20), *range(10), None, None, 901, 902, 903]])
    run = ex.run(RECIPE)
    assert [(s.step, s.rows_in, s.rows_out, s.quarantined, s.merged) for s in run.steps] == [
        ("collect", 35, 35, 0, 0),
        ("drop_nulls", 35, 33, 2, 0),
        ("check", 33, 30, 3, 0),
        ("dedup", 30, 20, 0, 10),
    ]
    assert (run.rows_in, run.rows_out + run.quarantined + run.merged) == (35, 35)
    held = ex.quarantine("ready", limit=1000)
    assert all(one.rule and one.reason and one.record for one in held)
    assert sorted(one.value for one in held if one.rule == "check.max") == ["901", "902", "903"]
    kept, gone = set(ids(ex, "ready@gold")), {one.id for one in held}
    assert (len(kept), len(gone)) == (20, 15)
    assert kept | gone == set(ids(ex, "raw"))


def test_records_come_back_in_order_of_arrival_across_flushes(ex: Session) -> None:
    sent = [{"n": n} for n in range(28)]
    for count in range(1, 29):
        ex.upload("default", [sent[count - 1]])
        assert ex.get_data() == sent[:count]
        if count % 7 == 0:
            wait_until(partial(committed, ex, "default", count))
            assert ex.get_data() == sent[:count]
    assert ex.head("default", len(sent)) == sent
