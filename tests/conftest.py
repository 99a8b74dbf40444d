"""A real server per test or module, started as a user would start it, and waiting without sleeping."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

MAIN = "import sys; from headrace.cli import main; sys.exit(main())"


def wait_until(condition, seconds=20.0, what="the condition"):
    """Return the first true value of ``condition()``; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        pause.wait(0.02)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Served:
    """A running ``headrace serve``."""

    root: Path
    port: int
    open: bool = False
    env: dict = field(default_factory=dict)
    token: str = ""
    prefix: tuple = ()
    process: subprocess.Popen = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self):
        return {"authorization": f"Bearer {self.token}"}

    @property
    def log(self):
        return self.root.parent / f"{self.root.name}.log"

    def start(self, seconds=60):
        command = [sys.executable, "-c", MAIN, "serve", "--root", str(self.root), "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *command, *(["--open"] if self.open else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "DO_NOT_TRACK": "1", **self.env},
            )
        wait_until(self.is_ready, seconds, f"readiness of the server ({self.log})")
        shown = re.search(r"\bhr_[\w-]+|token[^:]*: (\S+)", self.log.read_text())
        if shown and not self.token:
            self.token = shown[1] or shown[0]
        return self

    def is_ready(self):
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number=signal.SIGTERM):
        """End the server; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(40)

    def client(self, **other):
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=60, **other)

    def workers(self):
        """Process ids of this root's workers."""
        found = subprocess.run(
            ["pgrep", "-f", f"headrace.server.worker --root {self.root} "], capture_output=True, text=True
        )
        return [int(line) for line in found.stdout.split()]


def _end(served):
    if served.process is not None and served.process.poll() is None:
        served.stop()


@pytest.fixture
def serve(tmp_path):
    """A running server: ``url``, ``token``, ``root``, ``client()``."""
    served = Served(tmp_path / "root", free_port(), open=True).start()
    yield served
    _end(served)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for all tests of a module, with a small upload limit."""
    env = {"HEADRACE_UPLOAD_BYTES_MAX": str(32 << 20), "HEADRACE_HTTP_SECONDS": "20"}
    served = Served(tmp_path_factory.mktemp("served") / "root", free_port(), open=True, env=env).start()
    yield served
    _end(served)


@pytest.fixture
def http(shared):
    """A client of the shared server with the admin's token."""
    with shared.client() as client:
        yield client
