"""What was acknowledged survives kill -9, once; and the disk had it before the client heard of it."""

import json
import os
import random
import re
import shutil
import signal
import socket
import threading
from collections import Counter

import httpx
import pytest

from conftest import Served, free_port, wait_until

KILLS = 30
CLIENTS = 4


class Uploader(threading.Thread):
    """Posts numbered records, one by one and in small groups, and remembers what was sent and what acknowledged."""

    def __init__(self, served, number, stop):
        super().__init__(daemon=True)
        self.served, self.number, self.stop = served, number, stop
        self.sent, self.acked = [], []

    def records(self):
        count = 1 if len(self.sent) % 3 else 5
        made = [{"who": self.number, "n": len(self.sent) + i, "even": bool(i % 2)} for i in range(count)]
        if len(self.sent) % 50 < count:
            # Contradicts the column's type, so that the quarantine gets its share.
            made[0]["even"] = {"not": "a boolean"}
        return made

    def run(self):
        with httpx.Client(base_url=self.served.url, timeout=20) as http:
            while not self.stop.is_set():
                records = self.records()
                keys = [(r["who"], r["n"]) for r in records]
                self.sent += keys
                try:
                    answer = http.post("/upload", json=records)
                except httpx.TransportError:
                    self.stop.wait(0.01)
                    continue
                if answer.status_code == 200:
                    self.acked += keys
                else:
                    assert answer.status_code == 503, answer.text
                    self.stop.wait(0.01)


def stored(http):
    """How often each record stands in the dataset or its quarantine, once the inbox is empty."""
    found = Counter((r["who"], r["n"]) for r in http.get("/get_data").json())
    held, token = Counter(), None
    while True:
        params = {"limit": 1000, **({"page_token": token} if token else {})}
        page = http.get("/v1/datasets/default/quarantine", params=params).json()
        for item in page["items"]:
            record = json.loads(item["record"])
            held[record["who"], record["n"]] += 1
        token = page["next_page_token"]
        if not token:
            return found, held


@pytest.mark.slow
def test_every_acknowledged_record_survives_kills_of_server_and_worker_exactly_once(tmp_path):
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    served = Served(tmp_path / "root", free_port(), open=True, env={"HEADRACE_FLUSH_AGE_S": "0.2"}).start()
    stop, pause = threading.Event(), threading.Event()
    uploaders = [Uploader(served, number, stop) for number in range(CLIENTS)]
    for uploader in uploaders:
        uploader.start()
    for kill in range(KILLS):
        pause.wait(chance.uniform(0.0, 0.8))
        if kill % 2:
            served.stop(signal.SIGKILL)
            served.start()
        else:
            for pid in wait_until(served.workers, 60, "a worker"):
                os.kill(pid, signal.SIGKILL)
    stop.set()
    for uploader in uploaders:
        uploader.join(60)
    with served.client() as http:
        wait_until(lambda: http.get("/v1/datasets/default").json()["pending"] == 0, 60, "the last flush")
        found, held = stored(http)
    assert served.stop() == 0
    acked = [key for uploader in uploaders for key in uploader.acked]
    sent = {key for uploader in uploaders for key in uploader.sent}
    total = found + held
    assert len(acked) > 200, f"seed {seed}"
    assert [key for key in acked if total[key] != 1] == [], f"seed {seed}"
    assert [key for key, count in total.items() if count > 1 or key not in sent] == [], f"seed {seed}"
    assert held, f"seed {seed}"


def strace_events(text):
    """(instant, kind) of received requests, finished syncs of the inbox, and answers, in order."""
    events, open_sync = [], {}
    for line in text.splitlines():
        match = re.match(r"(\d+) +([\d.]+) (.*)", line)
        if not match:
            continue
        thread, at, call = match[1], float(match[2]), match[3]
        if re.match(r"(fsync|fdatasync)\(\d+<[^>]*/inbox", call):
            if "unfinished" in call:
                open_sync[thread] = True
            elif call.endswith("= 0"):
                events.append((at, "sync", ""))
        elif "resumed" in call and re.match(r"<\.\.\. (fsync|fdatasync)", call):
            if open_sync.pop(thread, False) and call.endswith("= 0"):
                events.append((at, "sync", ""))
        elif "POST /upload HTTP" in call:
            # Posted one after the other, so their order is their number; the id itself may be in a later read.
            events.append((at, "request", str(sum(kind == "request" for _, kind, _ in events))))
        elif "HTTP/1.1 200" in call and (mark := re.search(r"x-request-id: mark-(\d+)", call)):
            events.append((at, "answer", mark[1]))
    return events


@pytest.mark.slow
def test_between_a_request_and_its_answer_the_inbox_is_synced(tmp_path):
    if shutil.which("strace") is None:
        assert not os.environ.get("CI"), "strace is needed"
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,read,recvfrom,write,writev,sendto,sendmsg"
    prefix = ("strace", "-f", "-ttt", "-y", "-s", "2048", "-e", calls, "-o", str(trace))
    served = Served(tmp_path / "root", free_port(), open=True, prefix=prefix).start(120)
    for number in range(20):
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            head = "POST /upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            raw.sendall(f'{head}X-Request-Id: mark-{number}\r\nContent-Length: 7\r\n\r\n{{"a":1}}'.encode())
            assert b"receipt" in b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
    (server,) = [int(p) for p in os.listdir("/proc") if p.isdigit() and is_child(int(p), served.process.pid)]
    os.kill(server, signal.SIGTERM)
    served.process.wait(60)
    events = strace_events(trace.read_text(errors="replace"))
    asked = {mark: at for at, kind, mark in events if kind == "request"}
    answered = {mark: at for at, kind, mark in events if kind == "answer"}
    syncs = [at for at, kind, _ in events if kind == "sync"]
    assert set(asked) == set(answered) == {str(number) for number in range(20)}
    for mark, at in asked.items():
        assert any(at <= sync <= answered[mark] for sync in syncs), f"request {mark} was answered before the disk"


def is_child(pid, parent):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1]) == parent
    except (FileNotFoundError, ProcessLookupError):
        return False
