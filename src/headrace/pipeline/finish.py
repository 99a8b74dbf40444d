"""The end of a run: splits, sequential steps, files, expectations, and the one commit that makes the version."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace import reading, versions
from headrace.catalog import Catalog
from headrace.errors import ExpectationFailed
from headrace.model import Run, StepCount, Version
from headrace.pipeline.plan import Plan
from headrace.pipeline.stage import staged, staged_schema
from headrace.pipeline.work import Work, sequential_of, spilled, stages_of
from headrace.recipe import Recipe
from headrace.root import Root
from headrace.rows import SOURCE
from headrace.split import assign
from headrace.steps import Carried, SequentialStep
from headrace.store.disk import DISK

ORIGINS = pa.schema([("_id", pa.string()), ("_source", SOURCE)])
_OF_THE_RUN = ("files", "path", "folder", "tasks")
Rows = Iterator[tuple[pa.RecordBatch, str | None]]


def final_rows(work: Work, recipe: Recipe, tasks: int) -> Rows:
    """The rows of the coming version with their split, in task order; within a split in row order."""
    last = len(stages_of(recipe)) - 1
    schema = staged_schema(work, last, tasks)
    if "_raw" in schema.names:
        schema = schema.remove(schema.get_field_index("_raw"))
    for task in range(tasks):
        for batch in staged(work, last, task, schema):
            if batch.num_rows or task == 0:
                yield from _by_split(batch, recipe.publish.split)


def _by_split(batch: pa.RecordBatch, fractions: Mapping[str, float]) -> Rows:
    if not fractions:
        yield batch, None
        return
    if "_split" in batch.schema.names:
        batch = batch.drop_columns(["_split"])
    assigned = assign(batch.column("_id"), fractions)
    marked = batch.append_column("_split", assigned)
    for split in fractions:
        part = marked.filter(pc.equal(assigned, split))
        if part.num_rows or not batch.num_rows:
            yield part, split


def with_origins(rows: Rows, path: Path) -> Rows:
    """``rows``, while ``_id`` and ``_source`` of each go to the Parquet file ``path``: what packing would forget."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    with pq.ParquetWriter(draft, ORIGINS, compression="zstd") as writer:
        for batch, split in rows:
            writer.write_batch(reading.conform(batch, ORIGINS))
            yield batch, split
    DISK.sync_path(draft)
    DISK.rename(draft, path)
    DISK.sync_folder(path.parent)


def advanced(rows: Rows, step: SequentialStep, counts: list[StepCount]) -> Rows:
    """The rows after a sequential step, whose count is added to ``counts`` when all are through."""
    carried: dict[str | None, Carried] = {}
    rows_in = rows_out = 0
    for batch, split in rows:
        made, carried[split] = step.advance(batch, carried.get(split, Carried()))
        rows_in, rows_out = rows_in + batch.num_rows, rows_out + made.num_rows
        yield made, split
    totals: dict[str, int] = {}
    for split, left in carried.items():
        batches, final = step.finish(left)
        for batch in batches:
            rows_out += batch.num_rows
            yield batch, split
        for name, value in final.counts.items():
            totals[name] = totals.get(name, 0) + value
    made, out, lost = (totals.get(name, 0) for name in ("tokens_in", "tokens_out", "tokens_dropped"))
    counts.append(StepCount(step.name, rows_in, rows_out, tokens_in=made, tokens_out=out, tokens_dropped=lost))


def held_rows(work: Work, stages: int, tasks: int) -> Iterator[pa.RecordBatch]:
    """Every quarantine row of the run, stage by stage, in task order."""
    for stage in range(stages):
        for task in range(tasks):
            yield from spilled(work.path("held", stage, task, ""))


def fitted(root: Root, work: Work, recipe: Recipe) -> dict[str, Any]:
    """What the steps fitted or used, by their place in the recipe; a tokenizer is kept under its own hash."""
    found: dict[str, Any] = {}
    place = 0
    for number, stage in enumerate(stages_of(recipe)):
        for first, step in enumerate(stage.steps):
            state = work.state(number) if first == 0 else {}
            kept = {key: value for key, value in state.items() if key not in _OF_THE_RUN}
            kept.update(step.used({"tokenizers": str(root.tokenizers), **state}))
            if "path" in kept:
                kept["tokenizer"] = _keep_tokenizer(root, Path(kept.pop("path")), kept["sha256"])
            if kept:
                found[f"{place}.{step.name}"] = kept
            place += 1
    return found


def _keep_tokenizer(root: Root, path: Path, sha256: str) -> str:
    """Keep a tokenizer for all who decode, or tokenise alike; return the name that recipes can give it."""
    name = sha256[:16]
    root.tokenizers.mkdir(mode=0o700, exist_ok=True)
    kept = root.tokenizers / f"{name}.json"
    if not kept.exists():
        draft = kept.with_suffix(".draft")
        draft.write_bytes(path.read_bytes())
        DISK.sync_path(draft)
        DISK.rename(draft, kept)
        DISK.sync_folder(root.tokenizers)
    return name


def totals(run: Run, counts: Iterable[StepCount]) -> Run:
    """``run`` with its steps and sums. Packing turns documents into rows: it takes no part in the sums of records."""
    steps = tuple(counts)
    records = [step for step in steps if not step.tokens_in]
    return replace(
        run,
        steps=steps,
        rows_in=records[0].rows_in if records else 0,
        rows_out=records[-1].rows_out if records else 0,
        quarantined=sum(step.quarantined for step in records),
        merged=sum(step.merged for step in records),
    )


def expect(recipe: Recipe, run: Run, rows: int) -> None:
    """Raise ExpectationFailed where the result misses what the recipe demands."""
    wanted = recipe.publish.expect
    dropped = (run.rows_in - run.rows_out) / run.rows_in if run.rows_in else 0.0
    problems = []
    if rows == 0:
        problems.append("no row is left to publish")
    if rows < wanted.get("min_rows", 0):
        problems.append(f"{rows} rows are fewer than min_rows {wanted['min_rows']}")
    if rows > wanted.get("max_rows", rows):
        problems.append(f"{rows} rows are more than max_rows {wanted['max_rows']}")
    if dropped > wanted.get("max_dropped", 1.0):
        problems.append(f"{dropped:.1%} of the records were dropped, max_dropped is {wanted['max_dropped']:.1%}")
    if problems:
        raise ExpectationFailed(
            f"nothing was published: {'; '.join(problems)}",
            hint=f"'headrace quarantine {recipe.dataset}' shows what was dropped and why",
        )


def publish(root: Root, catalog: Catalog, recipe: Recipe, plan: Plan, work: Work, run: Run) -> Run:
    """Write the files, check the expectations, and commit: quarantine first, then the version. May be done again."""
    tasks, stages = len(plan.tasks), stages_of(recipe)
    with versions.locked(root, recipe.dataset):
        versions.recover(root, catalog, recipe.dataset)
        versions.recover_quarantine(root, catalog, recipe.dataset)
        if (done := _published(catalog, run)) is not None:
            return replace(totals(run, done.counts), version=done.version)
        counts = work.counts(len(stages), tasks)
        rows = final_rows(work, recipe, tasks)
        sequential = sequential_of(recipe)
        if sequential:
            rows = with_origins(rows, reading.origins_path(root, recipe.dataset, run.id))
        for step in sequential:
            rows = advanced(rows, step, counts)
        writer = _write(root, recipe, rows)
        with writer:
            run = totals(run, counts)
            versions.quarantine_rows(
                root, catalog, recipe.dataset, list(held_rows(work, len(stages), tasks)), run.id, (f"run:{run.id}", 1)
            )
            catalog.update_run(run)
            expect(recipe, run, sum(entry.rows for entry in writer.files))
            about = versions.About(
                "recipe",
                run.id,
                recipe.fingerprint,
                plan.inputs,
                run.steps,
                fitted(root, work, recipe),
                tag=recipe.publish.tag,
            )
            made = versions.publish(catalog, recipe.dataset, writer, about, (f"run:{run.id}", 1))
    return replace(run, version=made.version)


def _published(catalog: Catalog, run: Run) -> Version | None:
    """The version this very run made before it was interrupted, if it did."""
    return next((v for v in catalog.versions(run.dataset, 100) if v.run == run.id), None)


def _write(root: Root, recipe: Recipe, rows: Rows) -> versions.Writer:
    writer: versions.Writer | None = None
    for batch, split in rows:
        if writer is None:
            writer = versions.Writer(root, recipe.dataset, batch.schema)
        if batch.num_rows:
            with_schema = reading.conform(batch, writer.schema)
            writer.write(with_schema, split)
    if writer is None:
        raise ExpectationFailed("nothing was published: the inputs hold no record", hint="check the recipe's collect")
    writer.finish(list(recipe.publish.split))
    return writer
