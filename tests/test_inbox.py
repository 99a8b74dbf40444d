"""The inbox: acknowledged means durable, once, in order, within limits."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headrace.errors import Busy, Conflict
from headrace.inbox import Inbox, InboxReader, Upload
from headrace.inbox.writer import ReceiptClock
from headrace.model import RowError


@pytest.fixture
def inbox(tmp_path):
    inbox = Inbox(tmp_path)
    yield inbox
    inbox.close()


@pytest.fixture
def reader(tmp_path):
    reader = InboxReader(tmp_path)
    yield reader
    reader.close()


def upload(text='{"a":1}', **other):
    return Upload(**{"dataset": "default", "format": "json", "rows": 1, "body": text.encode(), **other})


def bodies(reader, dataset="default", after=0):
    return [entry.body for entry in reader.take(dataset, after, 1 << 30)]


def test_an_acknowledged_upload_is_there_for_another_process(inbox, tmp_path):
    inbox.append(upload('{"a":1}')).result(10)
    code = """if True:
        import pathlib, sys
        from headrace.inbox import InboxReader
        reader = InboxReader(pathlib.Path(sys.argv[1]))
        print(reader.take("default", 0, 99)[0].body)
        reader.close()"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "b'{\"a\":1}'"


def test_uploads_keep_their_order_of_arrival_and_their_receipts_grow(inbox, reader):
    receipts = [f.result(10) for f in [inbox.append(upload(f'{{"n":{n}}}')) for n in range(500)]]
    assert bodies(reader) == [f'{{"n":{n}}}'.encode() for n in range(500)]
    ids = [r.receipt for r in receipts]
    assert ids == sorted(set(ids))
    assert all(len(i) == 32 and i[12] == "7" and i[16] in "89ab" for i in ids)


def test_receipts_grow_even_when_the_clock_goes_back_or_the_process_restarts():
    clock = ReceiptClock()
    ids = [clock.next(now) for now in (1000.0, 999.0, 999.0, 5.0)]
    ids += [ReceiptClock(ids[-1]).next(1.0)]
    assert ids == sorted(set(ids))


def test_many_threads_and_an_event_loop_may_append_at_once(inbox, reader):
    async def from_loop():
        return await asyncio.gather(*[inbox.append_async(upload("1")) for _ in range(300)])

    threads = [
        threading.Thread(target=lambda: [inbox.append(upload("2")).result(10) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert len({r.receipt for r in asyncio.run(from_loop())}) == 300
    for thread in threads:
        thread.join()
    assert sorted(bodies(reader)) == [b"1"] * 300 + [b"2"] * 200


def test_the_same_key_and_body_gives_the_first_receipt_again(inbox, reader):
    rejected = (RowError(1, "not JSON"),)
    first = inbox.append(upload(idem="k", rejected=1, errors=rejected)).result(10)
    again = inbox.append(upload(idem="k")).result(10)
    assert again.receipt == first.receipt
    assert (first.duplicates, again.duplicates, again.errors) == (0, 1, rejected)
    assert len(bodies(reader)) == 1
    other = inbox.append(upload(idem="k", dataset="other")).result(10)
    assert other.receipt != first.receipt


def test_the_same_key_with_another_body_is_a_conflict_that_changes_nothing(inbox, reader):
    inbox.append(upload("1", idem="k")).result(10)
    with pytest.raises(Conflict, match="another body"):
        inbox.append(upload("2", idem="k")).result(10)
    assert bodies(reader) == [b"1"]


def test_two_uploads_with_one_key_in_one_group_are_stored_once(inbox, reader):
    futures = [inbox.append(upload("1", idem="k")) for _ in range(20)]
    assert len({f.result(10).receipt for f in futures}) == 1
    assert len(bodies(reader)) == 1


def test_large_bodies_are_spooled_and_go_when_forgotten(inbox, reader, tmp_path):
    large = b"x" * (3 << 20)
    inbox.append(upload(body=large)).result(10)
    spool = inbox.spool()
    spool.write(b"streamed")
    inbox.append(upload(body=spool.finish())).result(10)
    first, second = bodies(reader)
    assert isinstance(first, Path)
    assert first.read_bytes() == large
    assert second.read_bytes() == b"streamed"
    assert inbox.forget("default", 2).result(10) == 2
    assert list((tmp_path / "inbox").iterdir()) == []
    assert inbox.held_bytes == 0


def test_a_refused_or_repeated_spooled_upload_leaves_no_file(inbox, tmp_path):
    def spooled(body, key):
        spool = inbox.spool()
        spool.write(body)
        return inbox.append(upload(body=spool.finish(), idem=key))

    spooled(b"one", "k").result(10)
    spooled(b"one", "k").result(10)
    with pytest.raises(Conflict):
        spooled(b"two", "k").result(10)
    assert len(list((tmp_path / "inbox").iterdir())) == 1
    assert inbox.held_bytes == 3


def test_files_without_a_row_are_removed_at_the_next_start(tmp_path):
    first = Inbox(tmp_path)
    first.spool().finish()
    first.append(upload(body=b"y" * (2 << 20))).result(10)
    first.close()
    second = Inbox(tmp_path)
    second.close()
    assert [p.stat().st_size for p in (tmp_path / "inbox").iterdir()] == [2 << 20]


def test_pending_tells_what_waits_per_dataset(inbox, reader):
    for dataset, rows in (("a", 2), ("b", 5), ("a", 3)):
        inbox.append(upload("xy", dataset=dataset, rows=rows)).result(10)
    assert [(p.dataset, p.uploads, p.rows, p.bytes, p.last_seq) for p in reader.pending()] == [
        ("a", 2, 5, 4, 3),
        ("b", 1, 5, 2, 2),
    ]
    inbox.forget("a", 1).result(10)
    assert [(p.dataset, p.uploads, p.rows) for p in reader.pending()] == [("a", 1, 3), ("b", 1, 5)]


def test_take_stops_at_its_byte_limit_but_gives_at_least_one(inbox, reader):
    for _ in range(5):
        inbox.append(upload("x" * 10)).result(10)
    assert [e.seq for e in reader.take("default", 0, 25)] == [1, 2]
    assert [e.seq for e in reader.take("default", 2, 1)] == [3]
    assert reader.take("default", 5, 1) == []


def test_a_snapshot_outlives_the_forgetting_of_what_it_shows(inbox, reader):
    inbox.append(upload("small", key_column="id")).result(10)
    inbox.append(upload(body=b"L" * (2 << 20))).result(10)
    with reader.snapshot("default") as tail:
        inbox.append(upload("later")).result(10)
        inbox.forget("default", 2).result(10)
        assert [(e.seq, e.key_column) for e in tail.entries] == [(1, "id"), (2, None)]
        assert tail.body(tail.entries[1]) == b"L" * (2 << 20)
        assert tail.body(tail.entries[0]) == b"small"
        assert tail.open(tail.entries[0]).read() == b"small"
        for _ in range(2):
            with tail.open(tail.entries[1]) as file:
                assert file.read(2) == b"LL"
                assert file.seek(-1, 2) == (2 << 20) - 1
                assert file.read() == b"L"
    with reader.snapshot("default", after_seq=2) as tail:
        assert [tail.body(e) for e in tail.entries] == [b"later"]


def test_a_snapshot_holds_no_lock_that_keeps_the_log_from_being_emptied(inbox, reader, tmp_path):
    inbox.append(upload("x")).result(10)
    with reader.snapshot("default"):
        db = sqlite3.connect(tmp_path / "inbox.db")
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        db.close()


def test_a_reader_may_come_before_the_inbox(tmp_path):
    reader = InboxReader(tmp_path)
    assert reader.pending() == []
    assert reader.receipt("0" * 32) is None
    inbox = Inbox(tmp_path)
    inbox.append(upload()).result(10)
    assert len(reader.pending()) == 1
    inbox.close()
    reader.close()


def test_a_receipt_tells_what_arrived(inbox, reader):
    receipt = inbox.append(upload(rejected=1, errors=(RowError(4, "NaN is not JSON"),))).result(10)
    row = reader.receipt(receipt.receipt)
    assert (row.dataset, row.rows, row.rejected, row.errors[0].index, row.pending) == ("default", 1, 1, 4, True)
    inbox.forget("default", row.seq).result(10)
    assert reader.receipt(receipt.receipt).pending is False


def test_pruning_forgets_old_receipts_but_never_pending_ones_or_the_counter(tmp_path, reader):
    inbox = Inbox(tmp_path)
    ids = [inbox.append(upload(str(n), idem=str(n))).result(10).receipt for n in range(3)]
    inbox.forget("default", 1).result(10)
    assert inbox.prune(before=4e9).result(10) == 1
    assert [reader.receipt(i) is None for i in ids] == [True, False, False]
    inbox.forget("default", 3).result(10)
    inbox.prune(before=4e9).result(10)
    inbox.close()
    inbox = Inbox(tmp_path)
    inbox.append(upload("next")).result(10)
    inbox.close()
    assert [e.seq for e in reader.take("default", 0, 99)] == [4]


def test_a_full_inbox_answers_busy_until_the_flusher_caught_up(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_INBOX_BYTES_MAX", str(1 << 20))
    inbox = Inbox(tmp_path)
    inbox.append(upload("x" * 1_000_000)).result(10)
    with pytest.raises(Busy) as refused:
        inbox.append(upload("x" * 100_000))
    assert refused.value.details["retry_after"] > 0
    inbox.forget("default", 1).result(10)
    assert inbox.append(upload("x" * 100_000)).result(10).accepted == 1
    inbox.close()


def test_a_disk_that_fails_answers_busy_and_the_next_upload_succeeds(inbox, reader):
    first = inbox.append(upload("1")).result(10)
    gone = inbox.spool().finish()
    failing = sqlite3.connect(inbox.root / "inbox.db")
    failing.execute("CREATE TRIGGER full BEFORE INSERT ON bodies BEGIN SELECT raise(ABORT, 'disk full'); END")
    with pytest.raises(Busy, match="could not be stored"):
        inbox.append(upload(body=gone)).result(10)
    failing.execute("DROP TRIGGER full")
    failing.close()
    assert not gone.exists()
    assert inbox.append(upload("2")).result(10).receipt > first.receipt
    assert [(e.seq, e.body) for e in reader.take("default", 0, 99)] == [(1, b"1"), (2, b"2")]


def test_close_commits_what_is_queued_and_refuses_what_comes(tmp_path, reader):
    inbox = Inbox(tmp_path)
    futures = [inbox.append(upload()) for _ in range(1000)]
    inbox.close()
    assert all(f.result(0).accepted == 1 for f in futures)
    with pytest.raises(Busy, match="stopping"):
        inbox.append(upload())
    assert len(bodies(reader)) == 1000


def test_forgetting_thousands_of_uploads_goes_in_steps(inbox, reader):
    for future in [inbox.append(upload("x")) for _ in range(10_000)]:
        future.result(30)
    inbox.forget("default", 9_999).result(30)
    assert [e.seq for e in reader.take("default", 0, 99)] == [10_000]
    assert os.listdir(inbox.folder) == []


def test_an_upload_without_records_leaves_its_receipt_and_nothing_to_flush(inbox, reader):
    receipt = inbox.append(upload("", rows=0)).result(10)
    spooled = inbox.append(upload(body=b"h" * (2 << 20), rows=0)).result(10)
    assert reader.pending() == []
    assert reader.receipt(receipt.receipt).pending is False
    assert spooled.accepted == 0
    assert os.listdir(inbox.folder) == []
    assert inbox.held_bytes == 0
