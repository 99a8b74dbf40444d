"""The run loop: queued runs become dbos workflows of remembered steps, so a killed worker's run goes on later."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from dataclasses import replace
from typing import IO, Any

import structlog
from dbos import DBOS, SetWorkflowID
from dbos._serialization import DBOSPortableJSON

from headrace import __version__
from headrace.catalog import now
from headrace.errors import HeadraceError, RunFailed
from headrace.pipeline.run import Engine, save_preview
from headrace.root import Root

log = structlog.get_logger("headrace.runs")
_engine: Engine | None = None
_SLOTS = 64


def _the_engine() -> Engine:
    assert _engine is not None, "launch comes first"
    return _engine


@DBOS.step(name="plan")
def _plan(run_id: str) -> dict[str, Any]:
    return _the_engine().plan(run_id)


@DBOS.step(name="map")
def _map(run_id: str, stage: int, group: list[int]) -> None:
    _the_engine().map_group(run_id, stage, group)


@DBOS.step(name="fit")
def _fit(run_id: str, stage: int) -> None:
    _the_engine().fit(run_id, stage)


@DBOS.step(name="publish")
def _publish(run_id: str) -> None:
    _the_engine().publish(run_id)


@DBOS.workflow(name="run")
def _workflow(run_id: str) -> str:
    try:
        facts = _plan(run_id)
        for stage in range(facts["stages"]):
            for group in facts["groups"]:
                _map(run_id, stage, group)
            _fit(run_id, stage)
        _publish(run_id)
    except HeadraceError as error:
        log.warning("a run failed", run=run_id, error=error.message)
        _the_engine().fail(run_id, error)
    except Exception as error:
        log.error("a run failed", run=run_id, exc_info=error)
        _the_engine().fail(run_id, _unforeseen(error))
    return run_id


def _unforeseen(error: Exception) -> RunFailed:
    return RunFailed(f"{type(error).__name__}: {error}", hint="the worker's log has the details; run it again")


class RunLoop:
    """Takes queued runs one after the other. One process holds one of these; the slot names it for recovery."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._slot_file: IO[str] | None = None
        self._launched = False
        self._lock = threading.Lock()

    def launch(self) -> None:
        """Start dbos in this process. Runs that were under way in this slot when its last holder died go on now."""
        with self._lock:
            if self._launched:
                return
            global _engine
            _engine = self.engine
            slot = self._take_slot(self.engine.root)
            path = self.engine.root.runs
            with sqlite3.connect(path) as db:
                db.execute("PRAGMA journal_mode=WAL")
            DBOS(
                config={
                    "name": "headrace",
                    "system_database_url": f"sqlite:///{path}",
                    "application_version": f"headrace-{__version__}",
                    "executor_id": f"worker-{slot}",
                    "serializer": DBOSPortableJSON,
                    "log_level": "ERROR",
                    "enable_otlp": False,
                }
            )
            DBOS.launch()
            self._launched = True

    def _take_slot(self, root: Root) -> int:
        # The same executor id in two live processes would run a step twice: a file lock makes the id unique.
        for slot in range(_SLOTS):
            file = (root.path / f"worker-{slot}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            file.write(str(os.getpid()))
            file.flush()
            self._slot_file = file
            return slot
        raise RunFailed(f"{_SLOTS} workers hold this root already", hint="stop one of them")

    def run(self, stop: threading.Event, poll: float = 0.1) -> None:
        """Work until ``stop``; the run under way is finished at its next start if the process ends first."""
        known = False
        while not stop.wait(poll):
            try:
                if not known:
                    self._requeue_unknown()
                    known = True
                if self.engine.catalog.has_queued():
                    self.run_next()
            except Exception as error:
                log.error("the run loop met an error and goes on", exc_info=error)
                stop.wait(1.0)

    def _requeue_unknown(self) -> None:
        """Runs marked running that dbos never heard of: their worker died between the claim and the start."""
        running = self.engine.catalog.runs(1000, "running")
        if not running:
            return
        self.launch()
        for run in running:
            if run.preview_rows or DBOS.get_workflow_status(run.id) is None:
                self.engine.catalog.update_run(replace(run, status="queued"))

    def run_next(self) -> None:
        """Execute the oldest queued run, if there is one, to its end."""
        run = self.engine.catalog.claim_run(f"pid-{os.getpid()}")
        if run is None:
            return
        if run.preview_rows:
            self._preview(run.id, run.preview_rows)
            return
        self.launch()
        self.engine.catalog.update_run(replace(run, attempts=run.attempts + 1))
        with SetWorkflowID(run.id):
            handle = DBOS.start_workflow(_workflow, run.id)
        handle.get_result(polling_interval_sec=0.05)
        left, _, _ = self.engine.catalog.run(run.id)
        if left.status == "running":
            self.engine.fail(run.id, RunFailed("the run ended without a word", hint="the worker's log has the details"))

    def _preview(self, run_id: str, rows: int) -> None:
        try:
            save_preview(self.engine.root, run_id, self.engine.preview(run_id, rows))
        except Exception as error:  # noqa: BLE001 - as for a run: somebody waits for the answer
            known = error if isinstance(error, HeadraceError) else _unforeseen(error)
            self.engine.fail(run_id, known)
            save_preview(self.engine.root, run_id, known.to_dict())
            return
        run, _, _ = self.engine.catalog.run(run_id)
        self.engine.catalog.update_run(replace(run, status="succeeded", ended_at=now(), progress=1.0))

    def close(self) -> None:
        """Stop dbos, if it was started, and free the slot."""
        if self._launched:
            DBOS.destroy()
            self._launched = False
        if self._slot_file is not None:
            self._slot_file.close()
            self._slot_file = None
