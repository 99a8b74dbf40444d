"""One task of one stage: fold the steps over its batches, and spill the rows, the verdicts, the keys, the counts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace import quarantine, reading
from headrace.collect.files import RefusedRecord
from headrace.model import SYSTEM_COLUMNS, StepCount
from headrace.pipeline.plan import unify
from headrace.pipeline.work import Spill, Stage, Work, counted, spill, spilled, spilled_schemas
from headrace.rows import to_json
from headrace.steps import Outcome, Position, Step


@dataclass
class _Tally:
    """Running counts of one step within one task; ``row`` is the position of its next input row."""

    step: str
    row: int = 0
    out: int = 0
    quarantined: int = 0
    merged: int = 0
    rules: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, rows_in: int, outcome: Outcome, seconds: float) -> None:
        self.row += rows_in
        self.out += outcome.batch.num_rows
        self.seconds += seconds
        first: dict[int, tuple[str, bool]] = {}
        for verdict in outcome.verdicts.select(["row", "rule", "kept"]).to_pylist():
            first.setdefault(verdict["row"], (verdict["rule"], verdict["kept"] is not None))
        for rule, merged in first.values():
            self.merged += merged
            self.quarantined += not merged
            self.rules[rule] = self.rules.get(rule, 0) + 1

    def done(self) -> StepCount:
        return StepCount(self.step, self.row, self.out, self.quarantined, self.merged, self.rules, self.seconds)


@dataclass(frozen=True)
class TaskRun:
    """What one task needs to know of its run. ``at`` stamps its quarantine rows, ``given`` is state for every step."""

    work: Work
    run_id: str
    stage: int
    task: int
    at: datetime
    given: Mapping[str, Any] = field(default_factory=dict)


def run_task(of: TaskRun, stage: Stage, rows: Iterable[pa.RecordBatch | RefusedRecord]) -> None:
    """Run one task to its files. Doing it again writes the same files again."""
    state = of.work.state(of.stage)
    tallies = [_Tally(step.name) for step in stage.steps]
    collected = _Tally("collect")
    place = of.work.path
    keys = _Keys(place("keys", of.stage, of.task, ".parquet"), of.task) if stage.fits else None
    with ExitStack() as stack:
        out = stack.enter_context(spill(place("rows", of.stage, of.task, "")))
        held = stack.enter_context(spill(place("held", of.stage, of.task, "")))
        for part in rows:
            if isinstance(part, RefusedRecord):
                _refuse(of, part, collected, held)
                continue
            if of.stage == 0:
                collected.row += part.num_rows
                collected.out += part.num_rows
            batch = _fold(of, stage.steps, tallies, state, part, held)
            if batch.num_rows:
                if keys is not None and stage.fits is not None:
                    keys.add(stage.fits.keys(batch), batch, out.rows)
                out.write(batch)
            elif not out.rows:
                out.write(batch)
        if keys is not None:
            keys.close()
    first = [collected.done()] if of.stage == 0 else []
    draft = place("counts", of.stage, of.task, ".draft")
    draft.write_text(json.dumps(counted([*first, *(tally.done() for tally in tallies)])))
    draft.replace(place("counts", of.stage, of.task, ".json"))


def _fold(
    of: TaskRun, steps: tuple[Step, ...], tallies: list[_Tally], state: Any, batch: pa.RecordBatch, held: Spill
) -> pa.RecordBatch:
    for number, (step, tally) in enumerate(zip(steps, tallies, strict=True)):
        started = time.perf_counter()
        # Only a stage's first step can have been fitted: a step that fits begins a stage.
        known = {**of.given, **state} if number == 0 else of.given
        outcome = step.apply(batch, known, Position(of.task, tally.row))
        tally.count(batch.num_rows, outcome, time.perf_counter() - started)
        if outcome.verdicts.num_rows:
            held.write(quarantine.held(batch, outcome.verdicts, of.run_id, step.name, of.at))
        batch = outcome.batch
    return batch


def _refuse(of: TaskRun, part: RefusedRecord, collected: _Tally, held: Spill) -> None:
    collected.row += 1
    collected.quarantined += 1
    rule = "schema" if part.field else "parse"
    collected.rules[rule] = collected.rules.get(rule, 0) + 1
    row = {
        "id": part.id, "rule": rule, "field": part.field, "value": part.value, "reason": part.reason,
        "record": part.raw, "source": {"source": "files", "locator": part.locator, "collected_at": None},
    }  # fmt: skip
    held.write(quarantine.refused([row], of.run_id, "collect", of.at))


class _Keys:
    """The Parquet file of one task's keys; it exists even if empty, so that every task has one."""

    def __init__(self, path: Path, task: int) -> None:
        self.path, self.task = path, task
        self._draft = path.with_suffix(".draft")
        self._writer: pq.ParquetWriter | None = None

    def add(self, keys: pa.RecordBatch | None, batch: pa.RecordBatch, first: int) -> None:
        if keys is None:
            return
        count = keys.num_rows
        columns = {name: keys.column(name) for name in keys.schema.names}
        columns["_task"] = pa.repeat(pa.scalar(self.task, pa.int32()), count)
        columns["_row"] = pa.array(range(first, first + count), pa.int64())
        if count == batch.num_rows:
            columns["_id"] = batch.column("_id")
        table = pa.table(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._draft, table.schema, compression="lz4")
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._draft.replace(self.path)


def staged(work: Work, stage: int, task: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows that ``task`` of ``stage`` spilled, in the columns of ``schema``."""
    for batch in spilled(work.path("rows", stage, task, "")):
        yield reading.conform(batch, schema)


def staged_schema(work: Work, stage: int, tasks: int) -> pa.Schema:
    """One schema for the rows of all tasks of a stage, user columns first."""
    found: dict[str, pa.Schema] = {}
    for task in range(tasks):
        for schema in spilled_schemas(work.path("rows", stage, task, "")):
            found.setdefault(schema.to_string(), schema)
    one = unify(list(found.values()), "the rows")
    system = [f for f in one if f.name in SYSTEM_COLUMNS]
    return pa.schema([*(f for f in one if f.name not in SYSTEM_COLUMNS), *system])


def fit(work: Work, stage: int, of: Stage, tasks: int) -> None:
    """Fit the step that ends ``stage`` over the keys of all tasks, and save its state."""
    assert of.fits is not None
    out = work.folder / f"fit-{stage}"
    out.mkdir(exist_ok=True)
    paths = [work.path("keys", stage, task, ".parquet") for task in range(tasks)]
    state = of.fits.fit([path for path in paths if path.exists()], out)
    work.save(f"fit-{stage}.json", json.loads(to_json(state)))
