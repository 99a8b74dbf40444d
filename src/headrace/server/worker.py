"""The worker process: flushes the inbox and executes runs, until a signal, or its server, ends it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from headrace import logs
from headrace.catalog import Catalog
from headrace.flush import Flusher
from headrace.inbox import InboxReader
from headrace.pipeline.durable import RunLoop
from headrace.pipeline.run import Engine
from headrace.root import Root
from headrace.server.lifeline import end_with_parent
from headrace.server.memory import reuse_memory


def main(root: str | Path | None = None, parent: int | None = None) -> None:
    """Work on the exchange at ``root`` until SIGTERM or SIGINT, or until process ``parent`` is gone."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    reuse_memory()
    logs.for_machines()
    place = Root.at(root or "headrace-data")
    catalog = Catalog(place.catalog)
    flusher = Flusher(place, catalog, InboxReader(place.path), on_commit=lambda _dataset, _seq: None)
    loop = RunLoop(Engine(place, catalog, flusher))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if parent is not None:
        end_with_parent(parent)
    flusher.recover()
    threads = [
        threading.Thread(target=flusher.run, args=(stop,), name="flusher"),
        threading.Thread(target=loop.run, args=(stop,), name="runs", daemon=True),
    ]
    for thread in threads:
        thread.start()
    stop.wait()
    threads[0].join()
    loop.close()
    catalog.close()


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="headrace worker")
    parser.add_argument("--root", default="headrace-data")
    parser.add_argument("--parent", type=int)
    return parser.parse_args(words)


if __name__ == "__main__":
    given = _arguments(sys.argv[1:])
    main(given.root, given.parent)
