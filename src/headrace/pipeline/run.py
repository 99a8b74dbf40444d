"""Runs: a recipe's stages as durable steps, so that a killed run goes on where it stood."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace import quarantine
from headrace import recipe as recipes
from headrace.catalog import Catalog, now
from headrace.errors import HeadraceError
from headrace.flush import Flusher
from headrace.model import Run, to_dict
from headrace.pipeline import finish
from headrace.pipeline.plan import Plan, make_plan, read_task
from headrace.pipeline.stage import TaskRun, fit, run_task, staged, staged_schema
from headrace.pipeline.work import Work, sequential_of, stages_of
from headrace.recipe import Recipe
from headrace.root import Root
from headrace.rows import records, to_json
from headrace.settings import integer


@dataclass(frozen=True)
class Engine:
    """Executes runs of one exchange on this machine's threads. Every method may be done again after a kill."""

    root: Root
    catalog: Catalog
    flusher: Flusher

    def recipe(self, run_id: str) -> tuple[Run, Recipe, Path]:
        """A run with its recipe, parsed anew, and the folder its paths start from."""
        run, _, base = self.catalog.run(run_id)
        return run, recipes.parse(run.recipe, Path(base)), Path(base)

    def plan(self, run_id: str, limit: int | None = None) -> dict[str, Any]:
        """Pin the inputs; records pushed before the run started are flushed into a version first."""
        run, recipe, base = self.recipe(run_id)
        work = Work.of(self.root, run_id)
        if (saved := work.load("plan.json")) is None:
            for entry in recipe.collect:
                if entry.ref is not None and entry.ref.at == "latest":
                    self.flusher.flush_all(entry.ref.dataset)
            plan = make_plan(self.catalog, recipe, base, None)
            saved = (plan if limit is None else _sampled(plan, limit)).to_json()
            work.save("plan.json", saved)
            self._progress(run, 0.02, "planned")
        return {"groups": saved["groups"], "stages": len(stages_of(recipe))}

    def map_group(self, run_id: str, stage: int, group: Sequence[int], limit: int | None = None) -> None:
        """Run some tasks of a stage, side by side."""
        run, recipe, _ = self.recipe(run_id)
        work = Work.of(self.root, run_id)
        plan = Plan.from_json(work.load("plan.json"))
        stages = stages_of(recipe)
        schema = plan.schema if stage == 0 else staged_schema(work, stage - 1, len(plan.tasks))
        at = datetime.fromisoformat(run.created_at)
        given = {"tokenizers": str(self.root.tokenizers)}

        def task(number: int) -> None:
            if work.path("counts", stage, number, ".json").exists():
                return
            if stage == 0:
                rows: Any = read_task(self.root, self.catalog, plan.tasks[number], schema)
                rows = rows if limit is None else _first(rows, limit)
            else:
                rows = staged(work, stage - 1, number, schema)
            run_task(TaskRun(work, run_id, stage, number, at, given), stages[stage], rows)

        tell = f"pass {stage + 1} of {len(stages)}"
        self._progress(run, (stage + group[0] / len(plan.tasks)) / (len(stages) + 1), tell)
        with ThreadPoolExecutor(integer("threads")) as pool:
            list(pool.map(task, group))
        self._progress(run, (stage + (group[-1] + 1) / len(plan.tasks)) / (len(stages) + 1), tell)

    def fit(self, run_id: str, stage: int) -> None:
        """Fit the step between two stages, if there is one."""
        _, recipe, _ = self.recipe(run_id)
        work = Work.of(self.root, run_id)
        of = stages_of(recipe)[stage]
        if of.fits is not None and work.load(f"fit-{stage}.json") is None:
            fit(work, stage, of, len(work.load("plan.json")["tasks"]))

    def publish(self, run_id: str) -> None:
        """Make the version, and close the run."""
        run, recipe, _ = self.recipe(run_id)
        work = Work.of(self.root, run_id)
        self._progress(run, 0.95, "publishing")
        plan = Plan.from_json(work.load("plan.json"))
        run = finish.publish(self.root, self.catalog, recipe, plan, work, run)
        self.catalog.update_run(replace(run, status="succeeded", ended_at=now(), progress=1.0, stage="published"))
        shutil.rmtree(work.folder, ignore_errors=True)

    def preview(self, run_id: str, limit: int) -> dict[str, Any]:
        """The effect of a recipe on the first ``limit`` records: counts, kept and dropped samples. Commits nothing."""
        run, recipe, _ = self.recipe(run_id)
        work = Work.of(self.root, run_id)
        facts = self.plan(run_id, limit)
        for stage in range(facts["stages"]):
            self.map_group(run_id, stage, [0], limit)
            self.fit(run_id, stage)
        counts = work.counts(facts["stages"], 1)
        rows = finish.final_rows(work, recipe, 1)
        for step in sequential_of(recipe):
            rows = finish.advanced(rows, step, counts)
        batches = [batch for batch, _ in rows if batch.num_rows]
        sample = [record.decode() for batch in batches[:1] for record in records(batch.slice(0, 10))]
        held = pa.Table.from_batches(list(finish.held_rows(work, facts["stages"], 1)), schema=quarantine.SCHEMA)
        shown = [quarantine.shown(row) for row in held.slice(0, 20).to_pylist()]
        run = finish.totals(run, counts)
        shutil.rmtree(work.folder, ignore_errors=True)
        return {
            "run": to_dict(run),
            "rows": sum(b.num_rows for b in batches),
            "sample": sample,
            "dropped": to_dict(shown),
        }

    def fail(self, run_id: str, error: HeadraceError) -> None:
        """Close a run that cannot go on: its staged work is removed, nothing was published."""
        run, _, _ = self.catalog.run(run_id)
        self.catalog.update_run(
            replace(run, status="failed", ended_at=now(), error=error.message, hint=error.hint, error_code=error.code)
        )
        shutil.rmtree(self.root.run(run_id), ignore_errors=True)

    def _progress(self, run: Run, progress: float, stage: str) -> None:
        current, _, _ = self.catalog.run(run.id)
        if current.status == "running":
            self.catalog.update_run(replace(current, progress=round(progress, 3), stage=stage))


def _sampled(plan: Plan, limit: int) -> Plan:
    """A plan of one task: the first records of the first input, enough for a preview of ``limit`` rows."""
    task = plan.tasks[0] if plan.tasks else None
    if task is not None and "ref" in task:
        task = {**task, "rows": min(task["rows"], limit)}
    return replace(plan, tasks=(task,) if task else (), groups=((0,),) if task else ())


def _first(rows: Any, limit: int) -> Any:
    left = limit
    for part in rows:
        if left <= 0:
            return
        if isinstance(part, pa.RecordBatch):
            part = part.slice(0, left)
            left -= part.num_rows
        yield part


def save_preview(root: Root, run_id: str, answer: Any) -> None:
    """Leave a preview's answer, whole or not at all."""
    path = root.preview(run_id)
    draft = path.with_suffix(".draft")
    draft.write_bytes(to_json(answer))
    draft.replace(path)
