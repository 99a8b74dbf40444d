"""A worker lives no longer than its server, and never less: ends with it, and is started again when it dies."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

from headrace.server.wire import log

_SET_PDEATHSIG = 1
_POLL_SECONDS = 1.0
_BACK_OFF = (0.2, 10.0)
_STOP_SECONDS = 10.0


def end_with_parent(parent: int) -> None:
    """Called by a worker first thing: SIGTERM to this process once ``parent`` is gone, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), name="headrace-lifeline", daemon=True).start()
    if os.getppid() != parent:
        # The server went before the line above: there will be no signal.
        sys.exit(0)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


class WorkerKeeper:
    """Keeps one worker process running. ``run`` must be called on the main thread's loop: the signal is bound to it."""

    def __init__(self, root: Path) -> None:
        self._command = (
            sys.executable,
            "-m",
            "headrace.server.worker",
            "--root",
            str(root),
            "--parent",
            str(os.getpid()),
        )
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Start the worker, and again with growing pauses whenever it dies, until ``stop``."""
        pause, longest = _BACK_OFF
        while not self._stopping.is_set():
            began = time.monotonic()
            worker = await asyncio.create_subprocess_exec(*self._command, stdin=asyncio.subprocess.DEVNULL)
            ended, stopping = asyncio.ensure_future(worker.wait()), asyncio.ensure_future(self._stopping.wait())
            await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if self._stopping.is_set():
                await _end(worker, ended)
                return
            pause = _BACK_OFF[0] if time.monotonic() - began > longest else min(pause * 2, longest)
            log.warning("worker died", code=ended.result(), again_in=pause)
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                continue

    def stop(self) -> None:
        """Ask the worker to end; ``run`` returns when it has."""
        self._stopping.set()


async def _end(worker: asyncio.subprocess.Process, ended: asyncio.Future[int]) -> None:
    if ended.done():
        return
    worker.terminate()
    done, _ = await asyncio.wait((ended,), timeout=_STOP_SECONDS)
    if not done:
        worker.kill()
        await ended
