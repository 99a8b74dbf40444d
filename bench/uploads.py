"""Data in: durable posts a second beside a Flask list, freshness, a million records, memory of a large answer.

``run`` gives rows for the table of ``make bench``: {"name", "value", "unit", "peer", "peer_value", "ratio", "target"}.
Flask runs in ``bench/.venv`` where it is installed (see requirements.txt). Needs wrk on the PATH.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson

CONNECTIONS, SECONDS, ROUNDS, BULK_ROUNDS = 32, 5, 3, 3
RATE, FRESH_SECONDS = 1000, 10
MILLION = 1_000_000
HERE = Path(__file__).resolve().parent
RECORD = b'{"features":[0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0],"label":[151.0]}'
MAIN = "import sys; from headrace.cli import main; sys.exit(main())"
FLASK = """
import sys
from flask import Flask, request
app, data = Flask("peer"), []
@app.post("/upload")
def upload():
    data.append(request.get_json())
    return {"status": "success"}
@app.get("/readyz")
def ready():
    return {}
app.run(port=int(sys.argv[1]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], port: int) -> Any:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env={**os.environ, "DO_NOT_TRACK": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/readyz", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} did not start") from None
                time.sleep(0.1)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def exchange(root: Path) -> Any:
    port = free_port()
    command = [sys.executable, "-c", MAIN, "serve", "--open", "--root", str(root), "--port", str(port)]
    return running(command, port)


def flask() -> Any:
    own = HERE / ".venv/bin/python"
    port = free_port()
    return running([str(own if own.exists() else sys.executable), "-c", FLASK, str(port)], port)


def posts_a_second(url: str) -> float:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write('wrk.method="POST"\nwrk.headers["Content-Type"]="application/json"\n')
        script.write(f"wrk.body='{RECORD.decode()}'\n")
        script.flush()
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}", "-s", script.name, f"{url}/upload"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out:
        raise SystemExit(out)
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])  # type: ignore[index]


def uploads() -> dict[str, Any]:
    """The two in turns, so that both meet the same machine; the best round of each counts."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder, exchange(Path(folder)) as (url, _process):
            ours.append(posts_a_second(url))
        with flask() as (url, _process):
            theirs.append(posts_a_second(url))
    return row("durable /upload, 32 connections", max(ours), "posts/s", "Flask list", max(theirs), ">= 5x")


def row(
    name: str, value: float, unit: str, peer: str = "", other: float | None = None, target: str = ""
) -> dict[str, Any]:
    ratio = None if not other else value / other
    return {
        "name": name, "value": round(value, 2), "unit": unit, "peer": peer,
        "peer_value": None if other is None else round(other, 2),
        "ratio": None if ratio is None else round(ratio, 2), "target": target,
    }  # fmt: skip


def freshness(url: str) -> dict[str, Any]:
    """Seconds from sending a marked record to reading it back, while others come at ``RATE`` a second."""
    stop = threading.Event()

    def background() -> None:
        with httpx.Client(base_url=url) as http:
            due = time.monotonic()
            while not stop.is_set():
                http.post("/upload", content=b"[" + b",".join([RECORD] * 20) + b"]", headers=JSON)
                due += 20 / RATE
                stop.wait(max(0.0, due - time.monotonic()))

    thread = threading.Thread(target=background)
    thread.start()
    delays = []
    with httpx.Client(base_url=url, timeout=60) as http:
        ends = time.monotonic() + FRESH_SECONDS
        sent = 0
        while time.monotonic() < ends:
            began = time.perf_counter()
            mark = f"mark-{sent}"
            sent += 1
            http.post("/upload", json={"mark": mark})
            while mark not in http.get("/get_data", params={"offset": max(0, sent - 1)}).text:
                pass
            delays.append(time.perf_counter() - began)
    stop.set()
    thread.join()
    p95 = statistics.quantiles(delays, n=20)[-1] if len(delays) > 1 else delays[0]
    return row(f"freshness p95 at {RATE} records/s", p95, "s", target="<= 2 s")


JSON = {"content-type": "application/json"}


def million(path: Path) -> None:
    with path.open("wb") as file:
        for start in range(0, MILLION, 10_000):
            lines = [
                orjson.dumps(
                    {"id": n, "name": f"customer {n:07d}", "amount": n * 0.25, "active": n % 3 == 0, "note": NOTE}
                )
                for n in range(start, start + 10_000)
            ]
            file.write(b"\n".join(lines) + b"\n")


NOTE = "paid on time, twice"
PEER = """
import sys, time, polars
began = time.perf_counter()
polars.read_ndjson(sys.argv[1]).write_parquet(sys.argv[2])
print(time.perf_counter() - began)
"""


def bulk(url: str, token: str, path: Path) -> dict[str, Any]:
    """First byte to visible version, in turns with Polars parsing the file and writing Parquet; best rounds count."""
    headers = {"authorization": f"Bearer {token}", "content-type": "application/x-ndjson"}
    ours, theirs = [], []
    for turn in range(BULK_ROUNDS):
        name = f"million-{turn}"
        with httpx.Client(base_url=url, timeout=300, headers=headers) as http, path.open("rb") as file:
            began = time.perf_counter()
            body = iter(lambda: file.read(1 << 20), b"")
            http.post(f"/v1/datasets/{name}/records", content=body).raise_for_status()
            while http.get(f"/v1/datasets/{name}").json().get("rows", 0) < MILLION:
                time.sleep(0.02)
            ours.append(time.perf_counter() - began)
        command = [sys.executable, "-c", PEER, str(path), str(path.with_suffix(".parquet"))]
        theirs.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    what, peer = MILLION / min(ours), MILLION / min(theirs)
    return row("1M NDJSON records to a version", what, "records/s", "Polars", peer, ">= 0.3x")


def family(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(int(child) for child in listed)]


def memory(pid: int, what: str) -> float:
    """MiB of one field of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def answer_memory(url: str, pid: int, path: Path) -> dict[str, Any]:
    """RssAnon that ``/get_data`` of a million records adds, summed over server and worker, at its highest."""
    with path.open("rb") as file, httpx.Client(base_url=url, timeout=600) as http:
        while lines := file.readlines(4 << 20):
            body = b"[" + b",".join([line.rstrip() for line in lines]) + b"]"
            http.post("/upload", content=body, headers=JSON).raise_for_status()
        settled = 0
        while settled < 20:
            time.sleep(0.2)
            before = sum(memory(p, "RssAnon") for p in family(pid))
            settled += 1
        highest = before
        with http.stream("GET", "/get_data", headers={"accept-encoding": "identity"}) as answer:
            for number, _ in enumerate(answer.iter_raw()):
                if number % 20 == 0:
                    highest = max(highest, sum(memory(p, "RssAnon") for p in family(pid)))
    return row("RssAnon added by /get_data of 1M records", highest - before, "MiB", target="<= 100 MiB")


def token_of(root: Path) -> str:
    return (root / "keys/owner").read_text()


def run() -> list[dict[str, Any]]:
    """All measurements of this file."""
    rows = [uploads()]
    with tempfile.TemporaryDirectory() as folder:
        root, path = Path(folder) / "root", Path(folder) / "million.ndjson"
        with exchange(root) as (url, process):
            time.sleep(3)
            rows.append(row("idle server", memory(process.pid, "VmRSS"), "MiB RSS", target="<= 200 MiB"))
            rows.append(freshness(url))
        million(path)
        with exchange(root) as (url, process):
            rows.append(bulk(url, token_of(root), path))
            rows.append(answer_memory(url, process.pid, path))
    return rows


if __name__ == "__main__":
    for measured in run():
        print(measured)
